"""Where the searches of a `PathMarginal` begin: the maximum of its posterior, and the paths there."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_median, init_to_value
from numpyro.infer.util import initialize_model

from pssm._checks import is_traced
from pssm._types import Array

MOST = 200  # steps of the climb


class Marginal(Protocol):
    """A model that has integrated its paths out, and has their centres at values of the others."""

    reference: Any

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Declares its sites."""

    def centres(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The paths there."""
        ...


class Reference(NamedTuple):
    """What is kept of a preparation.

    Attributes:
        data: a fingerprint of the arguments.
        values: of the other latent sites at the maximum, by name.
        paths: of the model at the maximum.
    """

    data: str
    values: dict[str, Array]
    paths: dict[str, Array]


def is_known(tree: Any) -> bool:
    """Whether nothing of it is traced."""
    return not any(is_traced(x) for x in jax.tree.leaves(tree))


def fingerprint(tree: Any) -> str:
    """Of arguments: equal for equal numbers."""
    leaves, structure = jax.tree.flatten(tree)
    digest = hashlib.sha256(repr(structure).encode())
    for x in leaves:
        if isinstance(x, np.ndarray | jax.Array) and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended):
            x = np.asarray(x)
            digest.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
        else:
            digest.update(repr(x).encode())
    return digest.hexdigest()


def find_reference(marginal: Marginal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reference:
    """The maximum of the posterior, from the last reference if there is one, and the paths there."""
    before = marginal.reference
    values = climb(marginal, args, kwargs, None if before is None else before.values)
    paths = jax.jit(lambda values: marginal.centres(values, *args, **kwargs))(values)
    known = {n: x for n, x in paths.items() if np.isfinite(x).all()}
    return Reference(fingerprint((args, kwargs)), values, known)


def climb(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], start: Any) -> dict[str, Any]:
    """The values of the latent sites at the maximum of their posterior, from the prior's median or a `start`."""
    from scipy.optimize import minimize  # takes a fifth of a second

    strategy = init_to_median(num_samples=25) if start is None else init_to_value(values=start)
    found = initialize_model(
        jax.random.key(0), model, init_strategy=strategy, model_args=args, model_kwargs=kwargs, validate_grad=False
    )
    flat, unflatten = ravel_pytree(found.param_info.z)
    loss = jax.jit(jax.value_and_grad(lambda x: found.potential_fn(unflatten(x))))

    def safe(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(np.asarray(x, flat.dtype))
        gradient = np.asarray(gradient, float)
        good = np.isfinite(value) and np.isfinite(gradient).all()
        return (float(value), gradient) if good else (1e100, np.zeros(len(x)))

    best = np.asarray(flat, float)
    if len(best) and safe(best)[0] < 1e100:
        best = minimize(safe, best, jac=True, method="L-BFGS-B", options={"maxiter": MOST}).x
    return found.postprocess_fn(unflatten(np.asarray(best, flat.dtype)))
