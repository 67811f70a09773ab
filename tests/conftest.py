"""Settings and fixtures for all tests: CPU, a shared compilation cache, 64-bit arithmetic on request."""

import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import shapes

shapes.install()  # before anything of the package is imported
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


SLOW = {
    line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if line and not line.startswith("#")
}


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, help="seconds after which no further test is begun")


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()


STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(config, items):
    """Marks the tests of `slow.txt`; with a budget, begins at another file every day, so that all have a turn."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if config.getoption("budget") and items:
        files = list(dict.fromkeys(item.path for item in items))
        first = int(time.time() / 86400) * 7 % len(files)
        order = {path: (i - first) % len(files) for i, path in enumerate(files)}
        items.sort(key=lambda item: order[item.path])


def pytest_runtest_setup(item):
    budget = item.config.getoption("budget")
    if budget and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip("the budget is spent")


@pytest.fixture
def x64():
    """64-bit arithmetic for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A random key."""
    return jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_file():
    """Compiled programs are dropped with their file."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Compiled programs are dropped before they are too many: Linux lets a process map 65 530 pieces of memory, and a
    program takes dozens. One more is a segmentation fault."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
