"""The proposal of a guided particle filter in one line: potentials from the mode of the path, and made better there."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions import LowRankChain, StatePath
from pssm.filters.linearize import cubature_points, hermite_points
from pssm.filters.particle_sweep import MAKERS
from pssm.linalg.low_rank import Factor, as_factor
from pssm.linalg.potential import Potential
from pssm.modes.mode import DENSE, potentials_at
from pssm.modes.path import check_start, linear_mode, mode_path
from pssm.modes.search import End, judge, not_converged
from pssm.modes.starts import further_starts
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.ssm import LinearGaussianSSM


def guided_proposal(
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    rank: int | None = None,
    num_iters: int = 30,
    num_rounds: int = 4,
    start: ArrayLike | None = None,
) -> Potential:
    """Potentials that stand for `p(y_{t:T} | z_t)`, from the mode of the path: the `proposal` of a guided filter.

    On a linear-Gaussian model they are exact, and then so is the filter. Elsewhere they start as Gaussian
    approximations at the mode, found by Gauss-Newton steps from `start`. Further rounds put in place of the
    log-likelihood its average over the posterior that the last round gave about the path: slopes and curvatures are
    then those of the best Gaussian (in the sense of variational inference), and the weights vary less. The filter's
    estimate of the evidence is unbiased with any potentials; bad ones show in a small `ess`, as several modes may.

    Args:
        model: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`.
        rank: columns of the factor beside the diagonal, at most `state`; None for `state`, which cuts nothing.
        num_iters: most Gauss-Newton steps of a round.
        num_rounds: further rounds; 0 for the mode. Above 64 states there are none.
        start: a path `(time, state)` near the mode that is wanted, such as a guide's mean, where there may be several;
            None for those of `laplace_path`.

    Returns:
        A `Potential` written around the mode, with the posterior's `scale`. A search that has not converged gives a
        warning (outside of `jit`).

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

    Source:
        The Gaussian whose slopes and curvatures are averages over itself: Opper & Archambeau 2009.
    """
    check_count("num_iters", num_iters)
    check_count("num_rounds", num_rounds, least=0)
    is_linear = isinstance(model, LinearGaussianSSM)
    model = check_nonlinear(model)
    rank = model.n_state if rank is None else check_count("rank", rank, least=0)
    if rank > model.n_state:
        raise ValueError(f"`rank` must be at most {model.n_state}, the size of the state; got {rank}.")
    series, inputs = model.check_series(y, u)
    dtype = model.m0.dtype
    inputs = None if inputs is None else inputs.astype(dtype)
    factors = as_factor("chol_P0", model.chol_P0), as_factor("chol_Q", model.chol_Q)
    rounds = num_rounds if model.n_state <= DENSE else 0
    path = None if start is None else check_start(start, len(series), model.n_state).astype(model.m0.dtype)
    options = {"rank": rank, "num_iters": num_iters, "num_rounds": rounds}
    options["is_linear"] = is_linear and model.n_state <= DENSE
    found, end = _potentials(model, *factors, series.astype(dtype), inputs, path, **options)
    if not is_traced(end.is_mode) and not bool(end.is_mode):
        warnings.warn(
            f"`num_iters`: {not_converged(end, num_iters)} Estimates with these potentials stay unbiased, but look at "
            "the filter's `ess`.",
            stacklevel=2,
        )
    return found


MAKERS["guided"] = guided_proposal  # a proposal by name, for every particle method


@partial(jax.jit, static_argnames=("rank", "num_iters", "num_rounds", "is_linear"))
def _potentials(
    model: NonlinearSSM,
    chol_P0: Factor,
    chol_Q: Factor,
    y: Array,
    u: Array | None,
    path: Array | None,
    *,
    rank: int,
    num_iters: int,
    num_rounds: int,
    is_linear: bool,
) -> tuple[Potential, End]:
    """The potentials, and where the last search has ended."""
    timed = model.time_varying
    prior = StatePath(model.m0, chol_P0, model.transition, chol_Q, len(y), u, time_varying=timed)

    def log_lik(path: Array) -> Array:
        return jnp.sum(jax.vmap(model.log_prob)(y, path, u))

    def one_round(_: int, state: tuple[Array, Potential, End]) -> tuple[Array, Potential, End]:
        offsets, found = state[:2]  # points about the path, `(points, time, state)`: at first all on it

        def average(path: Array) -> Array:
            return jnp.sum(weights * jax.vmap(log_lik)(path + offsets))

        path = mode_path(prior, average, rank=rank, start=found.center, num_iters=num_iters, strict=False)
        found = potentials_at(prior, average, path, rank=rank)
        return _spread(prior, found), found, judge(prior, average, path, found.center - path)

    if is_linear:
        found = potentials_at(prior, log_lik, linear_mode(prior, log_lik, path), rank=rank)
        return found, End(jnp.ones((), bool), jnp.zeros((), y.dtype))
    points, weights = (jnp.asarray(x, y.dtype) for x in _points(model.n_state))
    if path is None:
        others = further_starts(model, y, u)
        path = mode_path(prior, log_lik, rank=rank, others=others, num_iters=num_iters, strict=False)
    nothing = jnp.zeros_like(path)
    start = Potential(jnp.zeros((*path.shape, rank), y.dtype), nothing, center=path, slope=nothing, scale=nothing)
    offsets = jnp.zeros((len(points), *path.shape), y.dtype)
    end = End(jnp.zeros((), bool), jnp.zeros((), y.dtype))
    _, found, end = jax.lax.fori_loop(0, num_rounds + 1, one_round, (offsets, start, end))
    return found, end


def _points(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights that stand for a standard normal variable of size `n`."""
    return hermite_points(n) if n <= 2 else cubature_points(n)


def _spread(prior: StatePath, found: Potential) -> Array:
    """Points about the path, `(points, time, state)`, spread as the chain of these potentials is at each step."""
    now = None if prior.u is None else prior.u[1:]
    A = jax.vmap(jax.jacfwd(prior.transition, argnums=0))(found.center[:-1], now)
    A = jnp.concatenate([jnp.zeros((1, *A.shape[1:]), A.dtype), A])
    timed = ("transition", *prior.time_varying)
    linear = StatePath(prior.m0, prior.chol_P0, A, prior.chol_Q, prior.num_steps, time_varying=timed)
    chain = LowRankChain.from_potential(linear, found)
    values, vectors = jnp.linalg.eigh(chain.covariance())
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
    points = jnp.asarray(_points(prior.n_state)[0], root.dtype)
    return jnp.einsum("tij,pj->pti", root, points)
