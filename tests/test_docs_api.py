"""The reference in docs/api has every public name, and no name that is gone.

Public are: the names of `pssm` itself; those in `__all__` of its folders and of the modules beside them; the types that
public functions return; and the names that an example on a page imports.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest

import pssm

ROOT = Path(__file__).parent.parent
API = ROOT / "docs" / "api"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DIRECTIVE = re.compile(r"^\.\. (auto\w+):: (\S+)\n((?: +:.*\n)*)", re.MULTILINE)
PYTHON = re.compile(r"^( *)```python\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LAZY = ("Study", "compare", "diagnostics", "plots")  # `pssm.__getattr__` imports them when they are first asked for


def look_up(address: str) -> object:
    """The object with the address 'pssm.filters.linearize.Linearization', a module's attribute or a module."""
    parent, _, name = address.rpartition(".")
    if not parent or address in MODULES:
        return importlib.import_module(address)
    return getattr(look_up(parent), name)


def members(module, listed: list[str]) -> list[str]:
    """The names that Sphinx's automodule writes: functions and classes, those listed or all public ones."""
    names = (
        listed
        or getattr(module, "__all__", None)
        or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith("pssm")
        ]
    )
    values = {name: getattr(module, name, None) for name in names}
    return [name for name, x in values.items() if x is None or inspect.isroutine(x) or inspect.isclass(x)]


def documented() -> dict[str, object]:
    """Address and object of everything that a directive in docs/api names; None for an object that is gone."""
    addresses = []
    for page in sorted(API.glob("*.md")):
        for directive, address, options in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            addresses.append(address)
            listed = re.search(r":members:(.*)", options)
            if directive == "automodule" and listed:
                names = members(look_up(address), listed[1].replace(",", " ").split())
                addresses += [f"{address}.{name}" for name in names]
    return {address: look_up_or_none(address) for address in addresses}


def look_up_or_none(address: str) -> object | None:
    """The object, or None where there is none."""
    try:
        return look_up(address)
    except (AttributeError, ImportError):
        return None


def imported_by(code: str) -> list[str]:
    """Addresses that a program takes from the package: 'pssm.nets.register'."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    return [
        f"{node.module}.{alias.name}"
        for node in nodes
        if (node.module or "").startswith("pssm")
        for alias in node.names
    ]


MODULES = {"pssm", *(module.name for module in pkgutil.walk_packages(pssm.__path__, "pssm."))} - {"pssm.__main__"}
ROOMS = sorted(name for name in MODULES if name.count(".") < 2 and not name.startswith("pssm._"))
DOCUMENTED = documented()


def absent(addresses) -> list[str]:
    """Those that no page of the reference has, under this address or another."""
    objects = {id(value) for value in DOCUMENTED.values()}
    wanted = {address: look_up(address) for address in addresses}
    return [
        address
        for address, value in wanted.items()
        if address not in DOCUMENTED and not inspect.ismodule(value) and id(value) not in objects
    ]


def public(name: str) -> list[str]:
    """Addresses of a module's public names."""
    names = getattr(importlib.import_module(name), "__all__", [])
    if name == "pssm":
        names = [*(name for name in vars(pssm) if not name.startswith("_") and name != "importlib"), *LAZY]
    return [f"{name}.{each}" for each in names]


def returned(address: str) -> list[str]:
    """Addresses of the package's own types in a function's return annotation."""
    value = look_up(address)
    annotation = value.__annotations__.get("return") if inspect.isfunction(value) else None
    if isinstance(annotation, type):
        annotation = f"{annotation.__module__}.{annotation.__qualname__}"
    return re.findall(r"\bpssm(?:\.\w+)+", str(annotation))


def test_every_name_in_the_reference_exists():
    assert not [address for address, value in DOCUMENTED.items() if value is None], "gone: correct docs/api"


@pytest.mark.parametrize("name", ROOMS)
def test_every_public_name_is_in_the_reference(name):
    assert not absent(public(name)), "add these to a page in docs/api"


@pytest.mark.parametrize("name", ROOMS)
def test_every_type_that_a_public_function_returns_is_in_the_reference(name):
    assert not absent(kind for address in public(name) for kind in returned(address)), "add these to a page in docs/api"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_that_an_example_imports_is_in_the_reference(page):
    blocks = [textwrap.dedent(code) for _, code in PYTHON.findall(page.read_text(encoding="utf-8"))]
    addresses = [address for block in blocks for address in imported_by(block)]
    assert not absent(addresses), f"{page.name} uses these: add them to a page in docs/api"


def test_the_index_lists_every_page_of_the_reference():
    listed = re.search(r"```\{toctree\}.*?```", (API / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    entries = set(listed[0].split("\n")) if listed else set()
    assert {page.stem for page in API.glob("*.md")} - {"index"} <= entries
