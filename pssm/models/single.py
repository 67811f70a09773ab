"""The common parts of models of one series: their data, the scales of their priors, and their observed site."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import as_float, check_choice, check_count, check_shape
from pssm._types import Array, ArrayLike
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.distributions.state_path import path_site
from pssm.models import components
from pssm.models.components import Scale
from pssm.models.scales import (
    Regressors,
    Series,
    known,
    located,
    moments,
    number,
    observe_from,
    regressors,
    series,
    warn_of_few,
)
from pssm.sde import gaps_between
from pssm.ssm import LinearGaussianSSM

STATES = ("marginal", "sampled")


def fit(y, num_steps, t, u, states, location, scale, make_blocks, *, constant=False) -> None:
    """The common body: scale the priors, stack the blocks, and score or sample."""
    check_choice("states", states, STATES)
    found, length = one_series(y, num_steps, t)
    gaps = None if t is None else gaps_between(t)
    about = scale_of(found, location, scale)._replace(gaps=gaps)
    origin = None if found is None else found.origin
    block = components.stack(make_blocks(about))
    warn_of_few(found, len(block.names))
    sigma_obs = numpyro.sample("sigma_obs", HalfNormal(about.spread))
    offset = None
    if constant:
        offset = located("mean", Normal(about.location, 10 * about.spread, unit=about.spread), origin)[None]
    effect, inputs = regression(u, length, about)
    timed = tuple(name for name in ("A", "chol_Q") if getattr(block, name).ndim == 3)
    ssm = LinearGaussianSSM(*block[:5], sigma_obs * jnp.ones((1, 1)), d=offset, D=effect, time_varying=timed)
    named: dict[str, Any] = {"state_names": block.names}  # for the axes of results, see `pssm.diagnostics.to_datatree`
    above = None if origin is None or constant else origin * np.eye(len(block.names))[0]  # the level is the first state
    if states == "marginal":
        marginal(ssm, length, inputs, found, named, above)
        return
    named |= {} if above is None else {"origin": above}
    path = StatePath.from_ssm(ssm, length)
    times = None if t is None else known(t)  # as numbers: the form of the model must not depend on `jit`
    stands = t is not None and (times is None or bool((np.diff(times) == 0).any()))
    if stands or ssm.chol_Q.shape[-1] < ssm.n_state:  # the path has no density: sample the noise that drives it
        with numpyro.handlers.infer_config(config_fn=lambda site: named):
            z = numpyro.deterministic("z", NonCenteredPath()("z", path, None)[1])
    else:
        z = path_site("z", path.in_units(block.m0, about.spread), infer=named)
    signal = ssm.signal(z, None if inputs is None else inputs.differences)
    observe_from("y", dist.Normal(signal, sigma_obs), found)


def marginal(
    ssm: LinearGaussianSSM,
    length: int,
    inputs: Regressors | None,
    found: Series | None,
    named: dict[str, Any] | None = None,
    above: np.ndarray | None = None,
) -> None:
    """The observed site `y` with the states integrated out."""
    u, u_origin = (None, None) if inputs is None else (inputs.u, inputs.origin)
    data, origin = (None, None) if found is None else (found.data, found.origin)
    fn = LinearGaussianMarginal(ssm, length, u, origin=origin, u_origin=u_origin, state_origin=above)
    numpyro.sample("y", fn, obs=data, infer=named or {})


def one_series(y: ArrayLike | None, num_steps: int | None, t: ArrayLike | None = None) -> tuple[Series | None, int]:
    """The data as `(time, 1)` or None, and the number of steps; `t` are their times."""
    if t is not None:
        data, length = one_series(y, len(gaps_between(t)) if y is None and num_steps is None else num_steps)
        check_shape("t", as_float("t", t), (length,), "time")
        return data, length
    if y is None:
        if num_steps is None:
            raise ValueError("`num_steps` is required where `y` is None.")
        return None, check_count("num_steps", num_steps)
    found = series(y, 1)
    shape = np.shape(found.data)
    if len(shape) != 2:
        raise ValueError(f"`y` must be one series of shape (time,) or (time, 1); got {shape}.")
    if num_steps is not None and num_steps != shape[0]:
        raise ValueError(f"`num_steps` is {num_steps}, but `y` has {shape[0]} time steps; leave it out.")
    return found, shape[0]


def scale_of(found: Series | None, location: float | None, scale: float | None, *, mean: bool = False) -> Scale:
    """Location and spread for the priors: given, or from the data, or 0 and 1.

    The location is the first observed value, or with `mean` that of all; it counts from the origin of the data.
    """
    first = spread = None
    if found is not None:
        start, centre, width = moments(found, warn=scale is None)
        first, spread = (centre if mean else start)[0], width[0]
    if location is not None:
        first = location if found is None or found.origin is None else np.asarray(location, float) - found.origin[0]
    if scale is not None:
        spread = scale
    return Scale(number(0.0 if first is None else first), number(1.0 if spread is None else spread))


def regression(u: ArrayLike | None, length: int, about: Scale) -> tuple[Array | None, Regressors | None]:
    """Effect `(1, input)` of the regressors and the regressors themselves, or None twice."""
    if u is None:
        return None, None
    inputs = regressors(u, (length,))
    width = 2.5 * about.spread / inputs.spread
    beta = numpyro.sample("beta", Normal(0.0, width).to_event(1), infer={"dims": {"beta": ("input",)}})
    return jnp.asarray(beta)[None], inputs
