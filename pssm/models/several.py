"""The common parts of models of several series: their data, the basis of their states, and their observed site.

`z -> M z` changes all matrices of a linear system but not the distribution of the data, so a sampler that can move
along it does not converge. Here the transition's noise is the identity, so only rotations remain; and the loadings are
zero above the diagonal and positive on it, which excludes rotations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import as_float, check_count, check_series
from pssm._types import Array, ArrayLike
from pssm.distributions import NonCenteredPath, StatePath
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.distributions.state_path import path_site
from pssm.models.scales import Regressors, Series, moments, number, observe_from, regressors, series
from pssm.models.single import marginal
from pssm.ssm import LinearGaussianSSM


class About(NamedTuple):
    """The data, and their location and scale for the priors; `series` and `inputs` know their zero.

    `location` counts from the origin of the series, where it has one. `u` are the inputs as they came, and
    `inputs.differences` counts them from their first row; `input_scale` is their spread.
    """

    y: Any
    u: Array | None
    num_sequences: int | None
    num_steps: int
    num_obs: int
    location: Array
    scale: Array
    input_scale: Array
    series: Series | None = None
    inputs: Regressors | None = None

    @property
    def origin(self) -> np.ndarray | None:
        """Where the series counts from, `(obs,)`; None for zero."""
        return None if self.series is None else self.series.origin


def look_at(
    y: ArrayLike | None,
    num_steps: int | None,
    num_obs: int | None,
    u: ArrayLike | None = None,
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    num_trials: int | None = None,
    *,
    from_origin: bool = False,
) -> About:
    """The arguments that all these models have, checked, and the scales of the data; `num_trials` is for no `y`.

    With `from_origin` the model counts its data from an origin where 32 bits cannot hold them.
    """
    found = None
    if y is None:
        if num_steps is None or num_obs is None:
            raise ValueError("`num_steps` and `num_obs` are required where `y` is None.")
        shape = (check_count("num_steps", num_steps), check_count("num_obs", num_obs))
    else:
        given = np.shape(as_float("y", y))
        found = series(y, given[-1] if len(given) > 1 else 1)
        if found.origin is not None and not from_origin:
            data = check_series(y, len(found.origin))  # says that digits are lost
            found = Series(data, found.values + found.origin, None, found.precision)
        shape = np.shape(found.data)
        if len(shape) > 3:
            raise ValueError(f"`y` must have shape (time, obs) or (sequence, time, obs); got {shape}.")
        for name, value, size in (("num_steps", num_steps, shape[-2]), ("num_obs", num_obs, shape[-1])):
            if value is not None and value != size:
                raise ValueError(f"`{name}` is {value}, but `y` has {size}; leave it out.")
    inputs = None if u is None else regressors(u, shape[:-1])
    p = shape[-1]
    mean, spread = np.zeros(p), np.ones(p)
    if found is not None:
        _, mean, spread = moments(found, warn=from_origin and scale is None)
    if location is not None:
        mean = jnp.broadcast_to(as_float("location", location), (p,))
        if found is not None and found.origin is not None:
            mean = np.broadcast_to(np.asarray(location, float), (p,)) - found.origin
    if scale is not None:
        spread = jnp.broadcast_to(as_float("scale", scale), (p,))
    several = shape[0] if len(shape) == 3 else None
    if y is None and num_trials is not None:
        several = check_count("num_trials", num_trials)
    return About(
        None if found is None else found.data,
        None if inputs is None else jnp.asarray(inputs.u, jnp.result_type(float)),
        several,
        shape[-2],
        p,
        number(mean),
        number(spread),
        jnp.ones(0) if inputs is None else inputs.spread,
        found,
        inputs,
    )


def in_trials(one: Callable[[Array | None, Array | None], None], about: About, batch_size: int | None) -> None:
    """`one(inputs, data)` of a series, or of a minibatch of trials inside their plate."""
    if about.num_sequences is None:
        one(about.u, about.y)
        return
    with numpyro.plate("trials", about.num_sequences, subsample_size=batch_size) as index:
        inputs = about.u if about.u is None or about.u.ndim == 2 else about.u[index]
        one(inputs, None if about.y is None else about.y[index])


def at_each(read: Callable[[Array], Array], z: Array) -> Array:
    """A function of one vector, at every vector of `(..., size)`."""
    return jax.vmap(read)(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], -1)


def below_diagonal(p: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Places below the diagonal of a `(p, n)` matrix."""
    return np.tril_indices(p, -1, n)


def triangular_loadings(name: str, spread: Array, n: int, unit: Array | None = None) -> Array:
    """A `(p, n)` matrix, zero above the diagonal and positive on it, whose rows are scaled by `spread`.

    The sampler counts a row in multiples of its `unit`, by default `spread`, which must not depend on other sites.
    """
    p = len(spread)
    k = min(n, p)
    rows, cols = below_diagonal(p, n)
    unit = spread if unit is None else unit
    diagonal = numpyro.sample(f"{name}_diagonal", HalfNormal(spread[:k], unit=unit[:k]).to_event(1))
    C = jnp.zeros((p, n), jnp.result_type(spread)).at[np.arange(k), np.arange(k)].set(diagonal)
    entries = Normal(jnp.zeros(len(rows)), spread[rows], centre=np.zeros(()), unit=unit[rows])
    below = numpyro.sample(f"{name}_below", entries.to_event(1))
    return numpyro.deterministic(name, C.at[rows, cols].set(below))


def sample_path(
    ssm: LinearGaussianSSM, about: About, named: dict[str, Any] | None = None, *, by_noise: bool = False
) -> Array:
    """The site `z`, `(time, state)`, driven by the noise where the path has no density, or where that is asked for."""
    inputs = None if about.inputs is None else about.inputs.differences
    path = StatePath.from_ssm(ssm, about.num_steps, inputs)
    if by_noise or ssm.chol_Q.shape[-1] < ssm.n_state:
        with numpyro.handlers.infer_config(config_fn=lambda site: named or {}):
            return numpyro.deterministic("z", NonCenteredPath()("z", path, None)[1])
    return path_site("z", path, infer=named or {})


def observe_series(
    ssm: LinearGaussianSSM,
    about: About,
    states: str,
    named: dict[str, Any] | None = None,
    above: np.ndarray | None = None,
) -> None:
    """The observed site `y`, states integrated out or sampled; inside a plate where there are several sequences.

    `named` goes to the site that has the states, and `above` `(state,)` is what the origin of the data is of them.
    """
    if about.num_sequences is not None:
        with numpyro.plate("sequences", about.num_sequences):
            observe_series(ssm, about._replace(num_sequences=None), states, named, above)
        return
    if states == "marginal":
        marginal(ssm, about.num_steps, about.inputs if ssm.n_input else None, about.series, named, above)
        return
    z = sample_path(ssm, about, dict(named or {}) | ({} if above is None else {"origin": above}))
    signal = ssm.signal(z, None if about.inputs is None else about.inputs.differences)
    noise = jnp.diagonal(ssm.chol_R)
    observe_from("y", dist.Normal(signal, noise), about.series)
