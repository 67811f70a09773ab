"""The house rules that a program can check: import order, module length, no assert, no bare except, a quick import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pssm"
MODULES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 400
MAX_IMPORT_SECONDS = 1.0

# A module imports only from what stands before it (and from its own folder). `pssm/__init__.py` imports from all.
ORDER = [
    "_version",
    "_types",
    "_keys",
    "_checks",
    "storage",
    "linalg",
    "results",
    "ssm",
    "batch",
    "devices",
    "missing",
    "observed",
    "register",
    "nonlinear",
    "sde",
    "nonlinear_sde",
    "filters",
    "learning",
    "distributions",
    "nets",
    "models",
    "modes",
    "guides",
    "inspection",
    "objectives",
    "kernels",
    "fitting",
    "infer",
    "diagnostics",
    "datasets",
    "plot_helpers",
    "plots",
    "study",
    "cli",
    "__main__",
]

every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))


def part_of(path: Path) -> str:
    """The entry of ORDER that a file belongs to: 'filters' for pssm/filters/kalman.py."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(path: Path) -> list[tuple[int, str]]:
    """Line and entry of ORDER for every import from the package; '' for a name taken from `pssm` itself."""
    package = ("pssm", *path.relative_to(ROOT).parent.parts)
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            names = [[*base, alias.name] for alias in node.names] if base == ["pssm"] else [base]
        else:
            continue
        for name in names:
            if name[0] == "pssm":
                part = name[1] if len(name) > 1 else ""
                is_module = (ROOT / part).is_dir() or (ROOT / f"{part}.py").is_file()
                found.append((node.lineno, part if part and is_module else ""))
    return found


@every_module
def test_imports_point_upward(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in ORDER, f"{path.name}: give `{part}` its place in ORDER"
    allowed = {part, *ORDER[: ORDER.index(part)]}
    if part in ("cli", "__main__"):
        allowed.add("")  # they stand below the package's own table of contents
    wrong = [f"line {line}: {name or 'pssm'}" for line, name in imported_parts(path) if name not in allowed]
    assert not wrong, (
        f"{path.relative_to(ROOT)} imports {wrong}; `{part}` may import only from {ORDER[: ORDER.index(part)]}"
    )


@every_module
def test_module_is_short(path):
    num_lines = len(path.read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines: split it"


@every_module
def test_no_assert_and_no_bare_except(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    asserts = [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    bare = [node.lineno for node in nodes if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not asserts, f"{path.relative_to(ROOT)}: `assert` in lines {asserts}; raise an error that names the argument"
    assert not bare, f"{path.relative_to(ROOT)}: bare `except` in lines {bare}; name the exception"


@pytest.mark.skipif(os.name != "posix", reason="reads the load of the machine")
def test_import_is_quick():
    """`import pssm` adds less than a second of processor time to `import numpyro`."""
    if os.getloadavg()[0] > 4 * (os.cpu_count() or 1):
        pytest.skip("the machine is busy")
    program = "import time, numpyro; t = time.process_time(); import pssm; print(time.process_time() - t)"
    seconds = min(
        float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    assert seconds < MAX_IMPORT_SECONDS, f"{seconds:.2f} s; import what is heavy and rare inside the function using it"
