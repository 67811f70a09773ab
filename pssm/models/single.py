"""The common parts of models of one series: their data, the scales of their priors, and their observed site."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro

from pssm._checks import as_float, check_choice, check_count, check_shape, is_traced
from pssm._types import ArrayLike
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath
from pssm.distributions.in_units import Normal
from pssm.distributions.state_path import path_site
from pssm.models import components
from pssm.models.components import Block, Scale
from pssm.models.effects import intervention_effects, regression
from pssm.models.noise import NOISES, observation_noise
from pssm.models.scales import Regressors, Series, known, located, moments, number, observe_from, series, warn_of_few
from pssm.sde import gaps_between
from pssm.ssm import LinearGaussianSSM

STATES = ("marginal", "sampled")
INITIAL = ("prior", "diffuse")


def fit(
    y,
    num_steps,
    t,
    u,
    states,
    location,
    scale,
    make_blocks,
    *,
    constant=False,
    moving=False,
    u_origin=None,
    u_names=None,
    interventions=None,
    noise="normal",
    initial="prior",
) -> None:
    """The common body: scale the priors, stack the blocks, and score or sample."""
    check_choice("states", states, STATES)
    check_choice("initial", initial, INITIAL)
    if initial == "diffuse" and states == "sampled":
        raise ValueError('`initial="diffuse"` is no prior for a path; it goes with `states="marginal"`.')
    check_choice("noise", noise, NOISES)
    found, length = one_series(y, num_steps, t)
    gaps = None if t is None else gaps_between(t)
    about = scale_of(found, location, scale)._replace(gaps=gaps)
    origin = None if found is None else found.origin
    blocks = make_blocks(about)
    v = observation_noise(noise, about, length, sampled=states == "sampled")
    offset = None
    if constant:
        offset = located("mean", Normal(about.location, 10 * about.spread, unit=about.spread), origin)[None]
    effect, inputs, coefficients = regression(
        u, length, about, found=found, moving=moving, origin=u_origin, names=u_names
    )
    shift = intervention_effects(interventions, t, length, about)
    if shift is not None:
        offset = shift if offset is None else offset + shift
    blocks += [extra for extra in (coefficients, v.block) if extra is not None]
    block = components.stack(blocks)
    warn_of_few(found, len(block.names))
    timed = tuple(name for name in ("A", "chol_Q", "C") if getattr(block, name).ndim == 3)
    timed += ("chol_R",) * (v.chol_R.ndim == 3) + ("d",) * (shift is not None)
    diffuse = None
    if initial == "diffuse" and found is not None:  # without data there is nothing that would make it finite
        diffuse = np.concatenate([np.full(len(part.names), part.free) for part in blocks])
    ssm = LinearGaussianSSM(*block[:5], v.chol_R, d=offset, D=effect, time_varying=timed, diffuse=diffuse)
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
        z = path_site("z", path.in_units(block.m0, _units(blocks, about.spread)), infer=named)
    z = jnp.asarray(z)
    signal = ssm.signal(z, None if inputs is None else inputs.differences)
    observe_from("y", v.around(signal, z), found)


def _units(blocks: list[Block], spread: Any) -> Any:
    """Sizes of the states, in which a sampler moves."""
    units = [spread if block.unit is None else block.unit for block in blocks]
    if all(block.unit is None for block in blocks):
        return spread
    xp: Any = jnp if any(is_traced(unit) for unit in units) else np
    return xp.concatenate([xp.broadcast_to(x, (len(b.names),)) for x, b in zip(units, blocks, strict=True)])


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
