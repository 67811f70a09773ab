"""Each module of the package is covered by a quick test: what is exact is checked in every run of `make test`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
WITHOUT_NUMBERS = {"pssm.__main__", "pssm._types", "pssm._version"}  # nothing in them could be wrong by itself
TABLE = [line.split() for line in (HERE / "quick_cases.txt").read_text().splitlines() if not line.startswith("#")]


def test_the_table_has_every_module():
    paths = [path for path in (ROOT / "pssm").rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths} - WITHOUT_NUMBERS
    listed = [module for module, _ in TABLE]
    assert len(set(listed)) == len(listed)
    assert modules - set(listed) == set(), "give these modules a quick exact test in tests/quick_cases.txt"
    assert set(listed) - modules == set(), "these modules are gone"


def test_every_test_of_the_table_has_a_quick_case(request):
    """Of the files that this run collects: all of them in `make test`."""
    quick = {item.nodeid.partition("[")[0] for item in request.session.items if not item.get_closest_marker("slow")}
    files = {test.partition("::")[0] for _, test in TABLE}
    if any(".py" in name for name in request.config.args):
        files &= {name.partition("::")[0] for name in quick}
    if request.config.getoption("keyword"):
        pytest.skip("-k leaves out quick tests")
    missing = {module: test for module, test in TABLE if test.partition("::")[0] in files and test not in quick}
    assert not missing, "these tests are gone or slow, and the modules have no other"
