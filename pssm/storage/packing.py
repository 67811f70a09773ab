"""Arguments, states and provenance of a fit as JSON and named arrays, and back; nothing here runs what it reads."""

import importlib.metadata
import math
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._keys import is_key
from pssm.storage.folder import SavedFitError, data_digest

DEEPEST = 20
KEY_TYPES = ("threefry2x32", "rbg", "unsafe_rbg")
PACKAGES = ("pssm-numpyro", "numpyro", "jax", "jaxlib", "optax", "equinox", "numpy")


class UnpackableError(TypeError):
    """A value that neither JSON nor an array file can hold."""


def pack(tree: Any, arrays: dict[str, np.ndarray], depth: int = 0) -> Any:
    """A tree of numbers, texts, lists, tuples, dicts and arrays as JSON; arrays go into `arrays` and are named."""
    if depth > DEEPEST:
        raise UnpackableError("nested too deeply")
    if isinstance(tree, bool | int | str | None):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"float": str(tree)}
    if isinstance(tree, tuple | list) and type(tree) in (tuple, list):
        return {type(tree).__name__: [pack(x, arrays, depth + 1) for x in tree]}
    if type(tree) is dict and all(isinstance(n, str) for n in tree):
        return {"dict": {n: pack(x, arrays, depth + 1) for n, x in tree.items()}}
    if is_key(tree):
        return {"key": str(jax.random.key_impl(tree)), "of": pack(jax.random.key_data(tree), arrays, depth)}
    if isinstance(tree, np.ndarray | np.generic | jax.Array):
        values = np.asarray(tree)
        if values.dtype.kind in "biufc":
            name = f"array{len(arrays)}"
            arrays[name] = values
            return {"jax" if isinstance(tree, jax.Array) else "numpy": name}
    raise UnpackableError(f"{type(tree).__name__} cannot be saved")


def unpack(tree: Any, arrays: dict[str, np.ndarray], depth: int = 0) -> Any:
    """What `pack` was given."""
    if isinstance(tree, bool | int | float | str | None):
        return tree
    if isinstance(tree, dict) and depth <= 2 * DEEPEST:
        match tree:
            case {"float": "nan" | "inf" | "-inf" as text}:
                return float(text)
            case {"tuple": list(items)}:
                return tuple(unpack(x, arrays, depth + 1) for x in items)
            case {"list": list(items)}:
                return [unpack(x, arrays, depth + 1) for x in items]
            case {"dict": dict(items)}:
                return {n: unpack(x, arrays, depth + 1) for n, x in items.items()}
            case {"key": str(kind), "of": data} if kind in KEY_TYPES:
                return jax.random.wrap_key_data(unpack(data, arrays, depth + 1), impl=kind)
            case {"numpy": str(name)} if name in arrays:
                return arrays[name]
            case {"jax": str(name)} if name in arrays:
                return jnp.asarray(arrays[name])
    raise SavedFitError(f"`path`: the saved arguments have an entry that cannot be read: {str(tree)[:80]!r}.")


def pack_leaves(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree as arrays, named by their paths; random keys as their numbers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p): np.asarray(jax.random.key_data(x) if is_key(x) else x) for p, x in leaves}


def unpack_leaves(like: Any, arrays: dict[str, np.ndarray]) -> Any:
    """A pytree of the structure, shapes and dtypes of `like` (arrays, or shapes alone) from named leaves.

    Raises:
        SavedFitError: a leaf is missing, left over, or of another shape or dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(p) for p, _ in leaves]
    if set(names) != set(arrays):
        odd = sorted(set(names) ^ set(arrays))
        raise SavedFitError(f"`path`: the saved state does not fit this model and method; not in both: {odd[:5]}.")
    found = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        shape, dtype = arrays[name].shape, arrays[name].dtype
        expected = (leaf.shape, leaf.dtype)
        if typed:
            expected = jax.eval_shape(jax.random.key_data, leaf)
            expected = (expected.shape, expected.dtype)
        if (shape, dtype) != expected:
            raise SavedFitError(f"`path`: the saved state's {name} is {dtype} {shape}; this model has {expected}.")
        value = jnp.asarray(arrays[name])
        found.append(jax.random.wrap_key_data(value) if typed else value)
    return jax.tree.unflatten(treedef, found)


def call_digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """sha256 of a model's arguments: of its arrays, and of all else as text."""
    arrays: dict[str, np.ndarray] = {}
    text = repr(pack({"args": tuple(args), "kwargs": dict(sorted(kwargs.items()))}, arrays))
    for kind in ("'jax'", "'numpy'"):  # the same numbers are the same data
        text = text.replace(kind, "'array'")
    arrays["rest"] = np.frombuffer(text.encode(), np.uint8)
    return data_digest(arrays)


def provenance(seconds: float, seed: Any) -> dict[str, Any]:
    """What a number depends on besides model and data: versions, back end, precision, seed, time spent."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": sys.platform,
        "backend": jax.default_backend(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "seed": seed_of(seed),
        "wall_seconds": float(seconds) if math.isfinite(seconds) else None,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def seed_of(key: Any) -> list[int] | None:
    """The numbers of a random key."""
    if key is None:
        return None
    return [int(x) for x in np.asarray(jax.random.key_data(key) if is_key(key) else key).ravel()]
