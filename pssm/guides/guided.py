"""The proposal of a guided particle filter in one line: potentials at the mode of the path."""

from functools import partial

import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._types import Array, ArrayLike
from pssm.distributions import StatePath
from pssm.guides.mode import PotentialsAtMode, mode_potentials
from pssm.linalg.low_rank import Factor, as_factor
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.ssm import LinearGaussianSSM


def guided_proposal(
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    rank: int | None = None,
    num_iters: int = 30,
) -> PotentialsAtMode:
    """Potentials that stand for `p(y_{t:T} | z_t)`, from the mode of the path: the `proposal` of a guided filter.

    On a linear-Gaussian model they are exact, and then so is the filter. Elsewhere they are Gaussian approximations at
    one path, found by Gauss-Newton steps from the path that the model takes without noise. The filter's estimate of the
    evidence is unbiased with any potentials; bad ones show in a small `ess`, as a posterior with several modes may.

    Args:
        model: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`.
        rank: columns of `K` beside the diagonal, at most `state`; None for `state`, which cuts nothing.
        num_iters: most Gauss-Newton steps.

    Returns:
        A `PotentialsAtMode`.

    Raises:
        ValueError: a shape does not fit.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from pssm.filters import particle_filter
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, 0.3 * jnp.eye(1),
        ...                      lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> y = [1.0, 0.0, float("nan"), 2.0]
        >>> found = particle_filter(jax.random.key(0), model, y, num_particles=50, proposal=guided_proposal(model, y))
        >>> bool(found.ess.min() > 40)
        True
    """
    check_count("num_iters", num_iters)
    model = check_nonlinear(model)
    rank = model.n_state if rank is None else check_count("rank", rank, least=0)
    if rank > model.n_state:
        raise ValueError(f"`rank` must be at most {model.n_state}, the size of the state; got {rank}.")
    series, inputs = model.check_series(y, u)
    dtype = model.m0.dtype
    inputs = None if inputs is None else inputs.astype(dtype)
    factors = as_factor("chol_P0", model.chol_P0), as_factor("chol_Q", model.chol_Q)
    return _at_mode(model, *factors, series.astype(dtype), inputs, rank=rank, num_iters=num_iters)


@partial(jax.jit, static_argnames=("rank", "num_iters"))
def _at_mode(
    model: NonlinearSSM,
    chol_P0: Factor,
    chol_Q: Factor,
    y: Array,
    u: Array | None,
    *,
    rank: int,
    num_iters: int,
) -> PotentialsAtMode:
    timed = model.time_varying
    prior = StatePath(model.m0, chol_P0, model.transition, chol_Q, len(y), u, time_varying=timed)

    def log_lik(path: Array) -> Array:
        return jnp.sum(jax.vmap(model.log_prob)(y, path, u))

    return mode_potentials(prior, log_lik, rank=rank, num_iters=num_iters)
