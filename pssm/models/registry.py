"""The models by their names: for files, which hold no functions."""

import functools
from collections.abc import Callable
from typing import Any

from pssm import models


def describe(model: Callable[..., Any]) -> tuple[str | None, dict[str, Any], str]:
    """The registered name of a model (None for others), the options bound to it, and its own name."""
    options: dict[str, Any] = {}
    while isinstance(model, functools.partial) and not model.args:
        options = {**model.keywords, **options}
        model = model.func
    name = next((n for n in models.NAMES if getattr(models, n) is model), None)
    return name, options, getattr(model, "__qualname__", type(model).__name__)
