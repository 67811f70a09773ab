"""The common parts of models of several series: their data, the basis of their states, and their observed site.

`z -> M z` changes all matrices of a linear system but not the distribution of the data, so a sampler that can move
along it does not converge. Here the transition's noise is the identity, so only rotations remain; and the loadings are
zero above the diagonal and positive on it, which excludes rotations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import as_float, check_count, check_series
from pssm._types import Array, ArrayLike
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath, observe
from pssm.distributions.state_path import path_site
from pssm.ssm import LinearGaussianSSM


class About(NamedTuple):
    """The data, and their location and scale for the priors."""

    y: Array | None
    u: Array | None
    num_sequences: int | None
    num_steps: int
    num_obs: int
    location: Array
    scale: Array
    input_scale: Array


def look_at(
    y: ArrayLike | None,
    num_steps: int | None,
    num_obs: int | None,
    u: ArrayLike | None = None,
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    num_trials: int | None = None,
) -> About:
    """The arguments that all these models have, checked, and the scales of the data; `num_trials` is for no `y`."""
    if y is None:
        if num_steps is None or num_obs is None:
            raise ValueError("`num_steps` and `num_obs` are required where `y` is None.")
        data, shape = None, (check_count("num_steps", num_steps), check_count("num_obs", num_obs))
    else:
        data = as_float("y", y)
        data = check_series(data, data.shape[-1] if data.ndim > 1 else 1)
        shape = data.shape
        if len(shape) > 3:
            raise ValueError(f"`y` must have shape (time, obs) or (sequence, time, obs); got {shape}.")
        for name, value, size in (("num_steps", num_steps, shape[-2]), ("num_obs", num_obs, shape[-1])):
            if value is not None and value != size:
                raise ValueError(f"`{name}` is {value}, but `y` has {size}; leave it out.")
    inputs = None
    if u is not None:
        inputs = as_float("u", u)
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        if inputs.shape[-2] != shape[-2] or inputs.ndim > max(len(shape), 2):
            raise ValueError(f"`u` must have shape ({', '.join(map(str, shape[:-1]))}, input); got {inputs.shape}.")
    p = shape[-1]
    mean, spread = jnp.zeros(p), jnp.ones(p)
    if data is not None:
        flat = data.reshape(-1, p)
        seen = ~jnp.isnan(flat)
        count = jnp.maximum(seen.sum(0), 1)
        mean = jnp.where(seen, flat, 0.0).sum(0) / count
        spread = jnp.sqrt(jnp.where(seen, (flat - mean) ** 2, 0.0).sum(0) / count)
        spread = jnp.where(spread > 0, spread, 1.0)
    width = jnp.ones(0) if inputs is None else jnp.sqrt(jnp.mean(inputs**2, axis=tuple(range(inputs.ndim - 1))))
    several = shape[0] if len(shape) == 3 else None
    if data is None and num_trials is not None:
        several = check_count("num_trials", num_trials)
    return About(
        data,
        inputs,
        several,
        shape[-2],
        p,
        mean if location is None else jnp.broadcast_to(as_float("location", location), (p,)),
        spread if scale is None else jnp.broadcast_to(as_float("scale", scale), (p,)),
        jnp.where(width > 0, width, 1.0),
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


def triangular_loadings(name: str, spread: Array, n: int) -> Array:
    """A `(p, n)` matrix, zero above the diagonal and positive on it, whose rows are scaled by `spread`."""
    p = len(spread)
    k = min(n, p)
    rows, cols = below_diagonal(p, n)
    diagonal = numpyro.sample(f"{name}_diagonal", dist.HalfNormal(spread[:k]).to_event(1))
    C = jnp.zeros((p, n), spread.dtype).at[np.arange(k), np.arange(k)].set(diagonal)
    below = numpyro.sample(f"{name}_below", dist.Normal(jnp.zeros(len(rows)), spread[rows]).to_event(1))
    return numpyro.deterministic(name, C.at[rows, cols].set(below))


def sample_path(ssm: LinearGaussianSSM, about: About) -> Array:
    """The site `z`, `(time, state)`, driven by the noise where the path has no density."""
    path = StatePath.from_ssm(ssm, about.num_steps, about.u)
    if ssm.chol_Q.shape[-1] < ssm.n_state:
        return numpyro.deterministic("z", NonCenteredPath()("z", path, None)[1])
    return path_site("z", path)


def observe_series(ssm: LinearGaussianSSM, about: About, states: str) -> None:
    """The observed site `y`, states integrated out or sampled; inside a plate where there are several sequences."""
    if about.num_sequences is not None:
        with numpyro.plate("sequences", about.num_sequences):
            observe_series(ssm, about._replace(num_sequences=None), states)
        return
    inputs = about.u if ssm.n_input else None
    if states == "marginal":
        numpyro.sample("y", LinearGaussianMarginal(ssm, about.num_steps, inputs), obs=about.y)
        return
    z = sample_path(ssm, about)
    observe("y", dist.Normal(ssm.signal(z, about.u), jnp.sqrt(jnp.diagonal(ssm.R))).to_event(2), about.y)
