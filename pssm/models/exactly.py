"""Models whose observations have no noise of their own: the states, given all of `y`, are known up to gaps.

What these models share: `y_t = C z_t + d + D u_t` without noise, a transition whose noise reaches every series at once
(`C chol_Q` has full rank), and states whose start is diffuse. With the states integrated out nothing is special. With
`states="sampled"` a path cannot be sampled freely, since almost none meets the data; so the noise of each step is
drawn, and then moved to what the step's observed entries say (Matheron's rule): the site `y` has the density of the
observed entries given the states before, and the states are deterministic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._types import Array
from pssm.distributions import LinearGaussianMarginal
from pssm.distributions.in_units import FromOrigin
from pssm.distributions.state_path import check_steps
from pssm.linalg import triangularise
from pssm.models.scales import Regressors, Series
from pssm.observed import observe
from pssm.ssm import LinearGaussianSSM


class Start(NamedTuple):
    """The first state: `m0`, and a factor `chol_P0` that is zero for the states whose start is diffuse.

    Attributes:
        m0: `(state,)`.
        chol_P0: `(state, state)`.
        diffuse: which states have infinite variance, `(state,)`.
        spread: what a wide but proper prior of theirs has, `(state,)`: for draws without data, and for sampled states.
    """

    m0: Array
    chol_P0: Array
    diffuse: np.ndarray
    spread: Array

    def proper(self) -> Array:
        """A factor of the covariance of the proper prior."""
        return self.chol_P0 + jnp.diag(jnp.where(self.diffuse, self.spread, 0.0))


def observe_exactly(
    start: Start,
    system: dict[str, Array | None],
    length: int,
    inputs: Regressors | None,
    found: Series | None,
    names: tuple[str, ...],
    states: str,
    above: np.ndarray | Array | None = None,
) -> None:
    """The observed site `y`, states integrated out or sampled.

    Args:
        start: of the states.
        system: `A`, `chol_Q`, `C`, and `b`, `d`, `B`, `D` where the model has them.
        length: number of steps.
        inputs: regressors, where there are any.
        found: the data; None to predict.
        names: of the states.
        states: "marginal" or "sampled".
        above: what the states are counted from, `(state,)`.
    """
    no_noise = jnp.zeros((system["C"].shape[0],) * 2, start.m0.dtype)  # pyright: ignore[reportOptionalMemberAccess]
    ssm = LinearGaussianSSM(start.m0, start.proper(), chol_R=no_noise, **system)  # pyright: ignore[reportArgumentType]
    if states == "marginal":
        u, u_origin = (None, None) if inputs is None else (inputs.u, inputs.origin)
        data, origin = (None, None) if found is None else (found.data, found.origin)
        if found is not None and start.diffuse.any():
            ssm = ssm.replace(chol_P0=start.chol_P0, diffuse=start.diffuse)
        fn = LinearGaussianMarginal(ssm, length, u, origin=origin, u_origin=u_origin, state_origin=above)
        numpyro.sample("y", fn, obs=data, infer={"state_names": names})
        return
    path, centre, factor = _sampled(ssm, length, inputs, found, names)
    numpyro.deterministic("z", path if above is None else path + above)
    if found is None:
        numpyro.sample("y", dist.Delta(centre, event_dim=2))
        return
    given = dist.MultivariateNormal(centre, scale_tril=factor)
    if found.origin is None:
        observe("y", given.to_event(1), found.data)
    else:
        numpyro.sample("y", FromOrigin(given, found.origin).to_event(1), obs=found.data)


def _sampled(
    ssm: LinearGaussianSSM, length: int, inputs: Regressors | None, found: Series | None, names: tuple[str, ...]
) -> tuple[Array, Array, Array]:
    """The path, and the mean and a factor of the observations given the states before: of the signal without data."""
    n, q = ssm.chol_Q.shape
    p, dtype = ssm.n_obs, ssm.dtype
    normal = dist.Normal(jnp.zeros((), dtype), 1.0).expand([n + (length - 1) * q]).to_event(1)
    noise = numpyro.sample("z_base", normal, infer={"state_names": names, "path_noise": True})
    check_steps("z_base", noise, normal, length)
    u = None if inputs is None else inputs.differences.astype(dtype)
    into = jnp.zeros((length, n), dtype) if ssm.b is None else jnp.broadcast_to(ssm.b, (length, n))
    read = jnp.zeros((length, p), dtype) if ssm.d is None else jnp.broadcast_to(ssm.d, (length, p))
    if u is not None:
        into = into if ssm.B is None else into + u @ ssm.B.T
        read = read if ssm.D is None else read + u @ ssm.D.T
    values = jnp.full((length, p), jnp.nan, dtype) if found is None else jnp.asarray(found.values, dtype)

    def given(mean: Array, factor: Array, base: Array, shift: Array, y: Array) -> tuple[Array, Array, Array]:
        """The state, drawn given the observed entries of its step; mean and factor of the whole step without them."""
        seen = ~jnp.isnan(y)
        reach = ssm.C @ factor
        centre = ssm.C @ mean + shift
        partly = jnp.where(seen[:, None], reach, 0.0)
        chol = triangularise(jnp.concatenate([partly, jnp.diag(jnp.where(seen, 0.0, 1.0).astype(dtype))], axis=1))
        off = jnp.where(seen, jnp.where(seen, y, 0.0) - centre, 0.0) - partly @ base
        z = mean + factor @ (base + partly.T @ jsl.cho_solve((chol, True), off))
        return z, centre, triangularise(reach)

    first, centre, chol = given(ssm.m0, ssm.chol_P0, noise[:n], read[0], values[0])

    def step(z: Array, xs: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array, Array]]:
        shift, offset, y, base = xs
        z, mean, factor = given(ssm.A @ z + offset, ssm.chol_Q, base, shift, y)
        return z, (z, mean, factor)

    xs = read[1:], into[1:], values[1:], noise[n:].reshape(length - 1, q)
    _, (later, means, chols) = jax.lax.scan(step, first, xs)
    path = jnp.concatenate([first[None], later])
    if found is None:
        return path, path @ ssm.C.T + read, chols
    return path, jnp.concatenate([centre[None], means]), jnp.concatenate([chol[None], chols])
