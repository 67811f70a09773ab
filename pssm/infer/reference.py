"""Where the searches of a `PathMarginal` begin: the maximum of its posterior, and the moments of the paths there."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import init_to_median
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy

from pssm._checks import is_traced
from pssm._types import Array

MOST = 200  # steps of a climb
ROUNDS = 2

Moments = tuple[dict[str, Array], dict[str, Array]]  # means of the paths by site, covariances by group


class Marginal(Protocol):
    """A model that has integrated its paths out."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Declares its sites."""

    def moments(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> Moments:
        """Means and covariances of the paths at values of the others; NaN where the search has failed."""
        ...

    def beginning(self, moments: Moments | None, *, parameters_only: bool = False) -> AbstractContextManager[Any]:
        """Searches begin at these moments; or there are none, and the paths are left out."""
        ...


class Reference(NamedTuple):
    """What is kept of a preparation.

    Attributes:
        data: a fingerprint of the arguments.
        values: of the other latent sites at the maximum, by name.
        paths: means of the paths at the maximum, by site.
        covs: their covariances, by group; none where the approximation needs none.
    """

    data: str
    values: dict[str, Array]
    paths: dict[str, Array]
    covs: dict[str, Array]


def is_known(tree: Any) -> bool:
    """Whether nothing of it is traced."""
    return not any(is_traced(x) for x in jax.tree.leaves(tree))


def fingerprint(tree: Any) -> str:
    """Of arguments: equal for equal numbers."""
    leaves, structure = jax.tree.flatten(tree)
    digest = hashlib.sha256(repr(structure).encode())
    for x in leaves:
        if isinstance(x, np.ndarray | jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
            x = np.asarray(x)
            digest.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
        else:
            digest.update(repr(x).encode())
    return digest.hexdigest()


def find_reference(marginal: Marginal, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reference:
    """The maximum of the approximate posterior, from the median of the prior, and the moments of the paths there."""

    def moments(values: dict[str, Array], before: Moments | None) -> Moments:
        with marginal.beginning(before):
            return marginal.moments(values, *args, **kwargs)

    def loss(flat: Array, before: Moments) -> Array:
        with marginal.beginning(before):
            return jnp.asarray(potential_energy(seeded, args, kwargs, unflatten(flat)))

    seeded = handlers.seed(marginal, jax.random.key(0))
    with marginal.beginning(None, parameters_only=True):
        median = init_to_median(num_samples=25)
        found = initialize_model(
            jax.random.key(0), marginal, init_strategy=median, model_args=args, model_kwargs=kwargs, validate_grad=False
        )
        flat, unflatten = ravel_pytree(found.param_info.z)
        constrain = jax.jit(lambda flat: constrain_fn(seeded, args, kwargs, unflatten(flat)))
        values = constrain(flat)
    known = _finite(jax.jit(lambda values: moments(values, None))(values))
    both, after, best = jax.jit(jax.value_and_grad(loss)), jax.jit(moments), np.asarray(flat, float)
    for _ in range(ROUNDS if best.size else 0):
        best = _climb(lambda x, known=known: both(x.astype(flat.dtype), known), best)
        with marginal.beginning(None, parameters_only=True):
            values = constrain(best.astype(flat.dtype))
        known = {**known[0], **(new := _finite(after(values, known)))[0]}, {**known[1], **new[1]}
    return Reference(fingerprint((args, kwargs)), values, *known)


def _finite(moments: Moments) -> Moments:
    paths, covs = ({n: x for n, x in part.items() if np.isfinite(x).all()} for part in moments)
    return paths, covs


def _climb(function: Callable[[np.ndarray], tuple[Array, Array]], start: np.ndarray) -> np.ndarray:
    """The minimum near a start; the start itself where the function is not finite there."""
    from scipy.optimize import minimize  # takes a fifth of a second

    def safe(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = (np.asarray(part, float) for part in function(x))
        good = np.isfinite(value) and np.isfinite(gradient).all()
        return (float(value), gradient) if good else (1e100, np.zeros(len(x)))

    if safe(start)[0] >= 1e100:
        return start
    return minimize(safe, start, jac=True, method="L-BFGS-B", options={"maxiter": MOST}).x
