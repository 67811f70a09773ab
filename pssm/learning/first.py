"""The mean of the first state where its covariance is singular: EM alone cannot move it there.

Where `P0` is zero in a direction, the smoothed first state is `m0` there whatever the data say, and the usual M-step
returns `m0` itself. But `m0` enters the mean of the data linearly, as coefficients of a regression with the noise of
the model: `log p(y)` is quadratic in it, and one Newton step is the generalised least-squares estimate. It raises the
likelihood itself, so the algorithm (ECME) still never falls.

Source:
    Holmes 2013, the section on a fixed initial state; Liu & Rubin 1994 (ECME).
"""

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters import log_likelihood
from pssm.learning.constraints import solve_least
from pssm.learning.priors import Prior, log_prior
from pssm.ssm import LinearGaussianSSM, rebuild


def most_likely_start(
    ssm: LinearGaussianSSM, y: Array, u: Array | None, basis: Array, prior: Prior
) -> LinearGaussianSSM:
    """The model with `m0` moved along the columns of `basis` to the maximum of its log-likelihood plus log prior.

    Directions about which the data say nothing stay.
    """
    if not basis.shape[1]:
        return ssm
    fields = {name: getattr(ssm, name) for name in ("chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")}

    def moved(a: Array) -> LinearGaussianSSM:
        return rebuild({"m0": ssm.m0 + basis @ a, **fields}, (), ssm.diffuse)

    def value(a: Array) -> Array:
        return jnp.sum(log_likelihood(moved(a), y, u)) + log_prior(moved(a), prior)

    # The slope is linear: its derivative is the same everywhere, and the step is exact.
    slope, turn = jax.linearize(jax.grad(value), jnp.zeros(basis.shape[1], ssm.dtype))
    information = -jax.vmap(turn)(jnp.eye(basis.shape[1], dtype=ssm.dtype))
    return moved(solve_least(0.5 * (information + information.T), slope[None])[0])
