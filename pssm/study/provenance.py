"""What is needed to run a study again: its settings, the data's fingerprint, and the versions of everything."""

import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from pssm._version import __version__
from pssm.diagnostics.tree import data_digest
from pssm.study.methods import Settings


def settings_of(settings: Settings, y: Any, model_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a study as plain values."""
    import arviz

    return {
        "model": model_name,
        "model_options": {
            k: v if isinstance(v, int | float | str | bool | None | tuple) else _in_words(v) for k, v in options.items()
        },
        "seed": settings.seed,
        "num_warmup": settings.num_warmup,
        "num_samples": settings.num_samples,
        "num_chains": settings.num_chains,
        "svi_steps": settings.svi_steps,
        "horizon": settings.horizon,
        "budget_seconds": settings.budget,
        "data_sha256": data_digest({"y": np.asarray(y)} if not isinstance(y, Mapping) else _leaves(y)),
        "pssm": __version__,
        "numpyro": numpyro.__version__,
        "jax": jax.__version__,
        "arviz": arviz.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "processors": os.cpu_count(),
    }


def _in_words(value: Any) -> str:
    return f"array {np.shape(value)}" if isinstance(value, np.ndarray | jax.Array) else str(value)


def _leaves(y: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of nested dicts by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(dict(y))[0]
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves if isinstance(x, jax.Array)}
