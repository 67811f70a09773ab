"""Settings and fixtures for all tests: CPU, a shared compilation cache, 64-bit arithmetic on request, slow tests."""

import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import shapes
import slow_parts

shapes.install()  # before anything of the package is imported
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

SPENT = "the budget is spent"
STARTED = pytest.StashKey[float]()
LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, help="seconds after which no further test is begun")
    parser.addoption("--part", type=slow_parts.part, help="k/n: the k-th of n parts of about equal time")
    parser.addoption("--durations-file", type=Path, help="write the seconds of every test here, for balanced parts")


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()
    config.stash[LEFT_OUT] = []


def pytest_collection_modifyitems(config, items):
    """Marks the tests of `slow.txt`; leaves out those of other parts."""
    for item in items:
        if item.nodeid in slow_parts.SLOW:
            item.add_marker(pytest.mark.slow)
    if config.getoption("part"):
        names = [item.nodeid for item in items if item.get_closest_marker("slow")]
        mine = slow_parts.of_part(names, *config.getoption("part"))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
        items[:] = [item for item in items if item.nodeid in mine]


def pytest_deselected(items):
    if items:
        items[0].config.stash[LEFT_OUT].extend(item.nodeid for item in items)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist hands it to the one that prints
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter, config):
    """What was not run: by its number where it was not asked for, by its name where there was no time."""
    if config.stash[LEFT_OUT]:
        terminalreporter.write_line(
            f"not run: {len(config.stash[LEFT_OUT])} tests that this command leaves out (see `make slow`)"
        )
    skipped = terminalreporter.stats.get("skipped", [])
    spent = [report.nodeid for report in skipped if SPENT in str(report.longrepr)]
    if config.getoption("budget"):
        terminalreporter.write_line(f"not run: {len(spent)} tests, because {SPENT}")
        for name in spent:
            terminalreporter.write_line(f"  {name}")
    if config.getoption("durations_file"):
        reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, []) if r.when == "call"]
        slow_parts.save_durations(config.getoption("durations_file"), {r.nodeid: r.duration for r in reports})


def pytest_runtest_setup(item):
    budget = item.config.getoption("budget")
    if budget and time.monotonic() - item.config.stash[STARTED] > budget:
        pytest.skip(SPENT)


@pytest.fixture
def x64():
    """64-bit arithmetic for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A random key."""
    return jax.random.key(0)


# Files that test `linalg/`, where an array of fewer axes beside one of more is a mistake.
STRICT_RANKS = {"test_linalg", "test_low_rank", "test_kalman", "test_score", "test_smoother", "test_steps"}


@pytest.fixture(autouse=True)
def _ranks_do_not_change_unseen(request):
    """JAX raises where it would add axes to an array by itself, in the quick tests of `linalg` and of exact filters."""
    strict = request.path.stem in STRICT_RANKS and request.node.get_closest_marker("slow") is None
    with jax.numpy_rank_promotion("raise" if strict else "allow"):
        yield


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
