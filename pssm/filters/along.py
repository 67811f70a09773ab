"""The extended Kalman filter along a series of which the first states are seen: the linear model that it meets."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pssm._checks import also_called, as_float
from pssm._types import Array, ArrayLike
from pssm.batch import map_batch
from pssm.filters.step import predict_one, update_one
from pssm.linalg.low_rank import Factor, as_matrix
from pssm.linalg.small import matvec
from pssm.ssm import FIELDS, LinearGaussianSSM, rebuild


class PathPrior(Protocol):
    """What of a prior over paths is needed here; a `StatePath` has it."""

    m0: Array
    chol_P0: Factor
    chol_Q: Factor
    time_varying: tuple[str, ...]

    @property
    def n_state(self) -> int:
        """Size of the state."""
        ...

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch axes of the prior."""
        ...

    @property
    def transition(self) -> Any:
        """A function `f(z, u)`."""
        ...

    def arrays(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Arrays by name, and the number of core axes of each."""
        ...


@also_called(linearize="linearization")
def along_filter(
    path: PathPrior, sigma: ArrayLike, series: Array, *, linearization: str = "local"
) -> LinearGaussianSSM:
    """The linear-Gaussian model that an extended Kalman filter meets on its way along a series.

    Observed are the first states, `a_t ~ N((z_t)_{1..size}, diag(sigma^2))`; step t is affine about the filtered mean
    of t - 1.

    Args:
        path: the prior of the states, its transition a function; its noise may vary in time.
        sigma: standard deviations `(size,)`.
        series: `(..., time, size)`, NaN where missing.
        linearization: "local", by `path.transition.affine(z, u)`, or "jacobian"; `linearize` is a second name for it.
    """
    batch = jnp.broadcast_shapes(path.batch_shape, series.shape[:-2])
    sigma = as_float("sigma", sigma)
    n, f = path.n_state, path.transition
    C, chol_R = jnp.eye(series.shape[-1], n, dtype=series.dtype), jnp.diag(sigma)
    noise_varies = "chol_Q" in path.time_varying

    def one(x: dict[str, Any]) -> tuple[Array, Array]:
        chol_Q = as_matrix(x["chol_Q"])
        known = {"m0": x["m0"], "chol_P0": as_matrix(x["chol_P0"]), "C": C, "chol_R": chol_R, "chol_Q": chol_Q}
        emission = rebuild({**dict.fromkeys(FIELDS), **known}, ())

        def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
            a, u, noise = xs
            new = update_one(emission, *carry, a, None)
            F, b = _affine(f, new.mean, u, linearization)
            now = emission.at({"A": F, "b": b, **noise})
            ahead = predict_one(now, new.mean, new.chol, None)
            return (ahead.mean, ahead.chol), (F, b)

        # The step after t carries input and noise of t + 1; the transition into the first step is not used.
        ahead = x["u"], {"chol_Q": chol_Q} if noise_varies else {}
        xs = x["a"], *jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), ahead)
        _, found = jax.lax.scan(step, (known["m0"], known["chol_P0"]), xs)
        return jax.tree.map(lambda x: jnp.concatenate([x[:1], x[:-1]]), found)

    arrays, cores = path.arrays()
    xs = {"u": None, **arrays, "a": series}
    A, b = map_batch(one, batch, xs, {"u": 2, **cores, "a": 2})
    timed = ("A", "b", "chol_Q") if noise_varies else ("A", "b")
    chol_P0, chol_Q = as_matrix(path.chol_P0), as_matrix(path.chol_Q)
    return LinearGaussianSSM(path.m0, chol_P0, A, chol_Q, C, chol_R, b=b, time_varying=timed)


def _affine(f: Callable[..., Any], z: Array, u: Array | None, linearization: str) -> tuple[Array, Array]:
    """Slope and offset of the transition about `z`."""
    if linearization == "local":
        return f.affine(z, u)  # pyright: ignore[reportFunctionMemberAccess]
    slope = jax.jacfwd(f)(z, u)
    return slope, f(z, u) - matvec(slope, z)
