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
    "times",
    "storage",
    "linalg",
    "results",
    "fields",
    "ssm",
    "correlated",
    "aggregation",
    "batch",
    "devices",
    "missing",
    "callables",
    "events",
    "partly_observed",
    "observed",
    "emission_moments",
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
    "plot_helpers",
    "diagnostics",
    "datasets",
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


# What may be imported inside a function, because it takes long to import or is optional. So may modules of the package,
# which bring such packages with them, but not to hide a circle.
LAZY_PACKAGES = {
    "arviz",
    "arviz_stats",
    "av",
    "diffrax",
    "matplotlib",
    "optax",
    "pandas",
    "PIL",
    "rich",
    "scipy",
    "tqdm",
}
LAZY_PACKAGES |= {"xarray", "jax", "numpy"}  # the last two in the command, which answers `--help` without them


def module_name(path: Path) -> str:
    parts = ("pssm", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere: inside functions and for type checkers too."""
    package = ("pssm", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*base, node.module] if node.module else base)
            # A name that is a module of its own, else the module that the name is in.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in NAMES else base for alias in node.names}
    return (found & set(NAMES)) - {module_name(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not: strongly connected components of two or more."""

    def reached(start: str) -> set[str]:
        seen, front = set(), [start]
        while front:
            new = graph[front.pop()] - seen
            seen |= new
            front += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}) == [["a", "b", "c"]]


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions counted. The package's own `__init__` imports all and is imported by the command."""
    graph = {name: imported_modules(path) - {"pssm"} for name, path in NAMES.items()}
    found = circles(graph)
    assert not found, f"these modules import each other: {found}"


@every_module
def test_imports_inside_functions_are_of_heavy_packages(path):
    lazy = {
        name.partition(".")[0]
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    wrong = lazy - LAZY_PACKAGES - {"pssm"}
    assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} inside a function; import it at the top"
