"""Settings and fixtures for all tests: CPU, a shared compilation cache, 64-bit arithmetic on request."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


SLOW = {
    line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if line and not line.startswith("#")
}


def pytest_collection_modifyitems(items):
    """Marks the tests listed in `slow.txt`."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)


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
    """Compiled programs are dropped with their file: a process may hold no more than some ten thousand of them."""
    yield
    jax.clear_caches()
