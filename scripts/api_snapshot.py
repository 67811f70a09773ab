"""The public names of the package and their arguments, a line each. `make api` writes tests/api_snapshot.txt."""

import ast
import importlib
import inspect
import re
import sys
from types import ModuleType

MODULES = [
    "pssm",
    "pssm.datasets",
    "pssm.diagnostics",
    "pssm.distributions",
    "pssm.filters",
    "pssm.guides",
    "pssm.infer",
    "pssm.learning",
    "pssm.linalg",
    "pssm.models",
    "pssm.nets",
    "pssm.plots",
    "pssm.sde",
    "pssm.nonlinear_sde",
]
LAZY = {"pssm": ("Study", "compare", "diagnostics", "plots")}  # what its `__getattr__` brings


def signature(x: object) -> str:
    """Names, kinds and defaults of the arguments, without annotations; the defaults without addresses."""
    try:
        found = inspect.signature(x)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    text = str(inspect.Signature(bare))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def public_names(module: ModuleType) -> list[str]:
    """`__all__`; else what the file defines, or re-exports as `from x import name as name`."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.asname == alias.name}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return sorted(name for name in {*names, *LAZY.get(module.__name__, ())} if not name.startswith("_"))


def lines() -> list[str]:
    """`module.name(arguments)`, and the public methods and attributes of classes."""
    found = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in public_names(module):
            x = getattr(module, name)
            here = f"{module_name}.{name}"
            if isinstance(x, ModuleType):
                found.append(f"{here}: module")
            elif inspect.isclass(x):
                found.append(f"{here}{signature(x)}")
                found += [f"{here}.{line}" for line in members(x)]
            elif callable(x):
                found.append(f"{here}{signature(x)}")
            else:
                found.append(f"{here}: {type(x).__name__}")
    return found


def members(kind: type) -> list[str]:
    """Public methods and attributes that a class of the package has of its own or from another one of the package."""
    found = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] == "pssm":
            found |= vars(base)
    result = []
    for name, x in sorted(found.items()):
        if name.startswith("_"):
            continue
        x = getattr(x, "__func__", x)
        if isinstance(x, property):
            result.append(f"{name}: property")
        else:
            result.append(f"{name}{signature(x)}" if callable(x) else f"{name}: attribute")
    return result


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
