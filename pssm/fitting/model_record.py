"""A model and its arguments as JSON and named arrays, and back: pssm's own models by their names, others are given."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from pssm import models
from pssm._checks import check_choice
from pssm.models.registry import describe
from pssm.storage.folder import SavedFitError
from pssm.storage.packing import UnpackableError, call_digest, pack, unpack


def pack_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict]:
    """The manifest's entries on a model and its arguments, and their arrays.

    Arguments that cannot be saved are left out: who loads the fit gives them.
    """
    arrays: dict[str, np.ndarray] = {}
    name, options, function = describe(model)
    try:
        arguments = pack({"args": tuple(args), "kwargs": dict(kwargs)}, arrays)
        digest = call_digest(args, kwargs)
    except UnpackableError:
        arrays, arguments, digest = {}, None, None
    try:
        packed = pack(options, arrays)
    except UnpackableError:
        name, packed = None, None
    entry = {"name": name, "options": packed, "function": function}
    return {"model": entry, "arguments": arguments, "data_sha256": digest}, arrays


def model_for(manifest: dict[str, Any], arrays: dict[str, np.ndarray], given: Any) -> Callable[..., Any]:
    """The model of a saved fit: the one given, or the registered one with its options.

    Raises:
        ValueError: no model is given, and the saved one is none of pssm's.
    """
    if callable(given):
        return given
    saved = manifest.get("model") if isinstance(manifest.get("model"), dict) else {}
    name = saved.get("name") if given is None else given
    if name is None:
        raise ValueError(f"`model` is needed: the saved fit is of {saved.get('function')!r}, none of pssm.models.")
    check_choice("model", name, models.NAMES)
    options = unpack(saved.get("options"), arrays) if given is None else {}
    if not isinstance(options, dict):
        raise SavedFitError("`path`: the options of the saved model are no dict.")
    return functools.partial(getattr(models, name), **options) if options else getattr(models, name)
