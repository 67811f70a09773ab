"""The common parts of models of one series: their data, the scales of their priors, and their observed site."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from pssm._checks import as_float, check_choice, check_count, check_series, check_shape, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath, observe
from pssm.distributions.state_path import path_site
from pssm.models import components
from pssm.models.components import Scale
from pssm.sde import gaps_between
from pssm.ssm import LinearGaussianSSM

STATES = ("marginal", "sampled")


def fit(y, num_steps, t, u, states, location, scale, make_blocks, *, constant=False) -> None:
    """The common body: scale the priors, stack the blocks, and score or sample."""
    check_choice("states", states, STATES)
    data, length = one_series(y, num_steps, t)
    gaps = None if t is None else gaps_between(t)
    about = scale_of(data, location, scale)._replace(gaps=gaps)
    block = components.stack(make_blocks(about))
    sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(about.spread))
    offset = numpyro.sample("mean", dist.Normal(about.location, 10 * about.spread))[None] if constant else None
    effect, inputs = regression(u, length, about)
    timed = tuple(name for name in ("A", "chol_Q") if getattr(block, name).ndim == 3)
    ssm = LinearGaussianSSM(*block[:5], sigma_obs * jnp.ones((1, 1)), d=offset, D=effect, time_varying=timed)
    named = {"state_names": block.names}  # for the axes of results, see `pssm.diagnostics.to_datatree`
    if states == "marginal":
        numpyro.sample("y", LinearGaussianMarginal(ssm, length, inputs), obs=data, infer=named)
        return
    path = StatePath.from_ssm(ssm, length)
    stands = gaps is not None and (is_traced(gaps) or bool((gaps[1:] == 0).any()))
    if stands or ssm.chol_Q.shape[-1] < ssm.n_state:  # the path has no density: sample the noise that drives it
        with numpyro.handlers.infer_config(config_fn=lambda site: named):
            z = numpyro.deterministic("z", NonCenteredPath()("z", path, None)[1])
    else:
        z = path_site("z", path, infer=named)
    observe("y", dist.Normal(ssm.signal(z, inputs), sigma_obs).to_event(2), data)


def one_series(y: ArrayLike | None, num_steps: int | None, t: ArrayLike | None = None) -> tuple[Array | None, int]:
    """The data as `(time, 1)` or None, and the number of steps; `t` are their times."""
    if t is not None:
        data, length = one_series(y, len(gaps_between(t)) if y is None and num_steps is None else num_steps)
        check_shape("t", as_float("t", t), (length,), "time")
        return data, length
    if y is None:
        if num_steps is None:
            raise ValueError("`num_steps` is required where `y` is None.")
        return None, check_count("num_steps", num_steps)
    data = check_series(y, 1)
    if data.ndim != 2:
        raise ValueError(f"`y` must be one series of shape (time,) or (time, 1); got {data.shape}.")
    if num_steps is not None and num_steps != data.shape[0]:
        raise ValueError(f"`num_steps` is {num_steps}, but `y` has {data.shape[0]} time steps; leave it out.")
    return data, data.shape[0]


def scale_of(data: Array | None, location: float | None, scale: float | None) -> Scale:
    """Location and spread for the priors: given, or from the data, or 0 and 1."""
    dtype = jnp.result_type(float)
    if data is None:
        first, spread = jnp.zeros((), dtype), jnp.ones((), dtype)
    else:
        seen = ~jnp.isnan(data[:, 0])
        first = jnp.where(seen.any(), data[jnp.argmax(seen), 0], 0.0)
        spread = jnp.nanstd(jnp.where(seen.any(), data, 0.0))
        spread = jnp.where(spread > 0, spread, 1.0)
    return Scale(
        first if location is None else jnp.asarray(location, dtype),
        spread if scale is None else jnp.asarray(scale, dtype),
    )


def regression(u: ArrayLike | None, length: int, about: Scale) -> tuple[Array | None, Array | None]:
    """Effect `(1, input)` of the regressors and the regressors themselves, or None twice."""
    if u is None:
        return None, None
    inputs = as_float("u", u)
    inputs = inputs[:, None] if inputs.ndim == 1 else inputs
    if inputs.ndim != 2 or inputs.shape[0] != length:
        raise ValueError(f"`u` must have shape ({length}, input); got {inputs.shape}.")
    spread = jnp.std(inputs, axis=0)
    width = 2.5 * about.spread / jnp.where(spread > 0, spread, 1.0)
    beta = numpyro.sample("beta", dist.Normal(0.0, width).to_event(1), infer={"dims": {"beta": ("input",)}})
    return beta[None], inputs
