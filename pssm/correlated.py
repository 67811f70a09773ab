"""Noise of the state and noise of the observation that are correlated, `Cov(w, v)`.

    [ v_t ]                [ R  S' ]
    [ w_s ]  ~  N( 0,      [ S  Q  ] ),      s = t (both act at time t) or s = t + 1 (w leads into the next step)

With the triangular factor `[L_R, 0; G, L_w]` of this matrix, both noises are made of one standard normal `e_t`, which
is put into the state: `v_t = L_R e_t`, `w_s = G e_t + L_w (more noise)`. The readings are then exact, which is no
special case here, and everything else (gaps, derivatives, EM but for its M-step) follows.
"""

import jax.numpy as jnp

from pssm._checks import as_float
from pssm._types import Array, ArrayLike
from pssm.fields import TIME_VARYING
from pssm.linalg import factor_from_covariance, triangularise
from pssm.ssm import LinearGaussianSSM, check_model, rebuild


def correlated_noise(ssm: LinearGaussianSSM, S: ArrayLike, *, into_next: bool = False) -> LinearGaussianSSM:
    """`ssm` with noises that are correlated: a model whose first states are those of `ssm`.

    Args:
        ssm: the model, with `Q` and `R` as they are.
        S: `Cov(w_t, v_t)`, `(state, obs)`, of the noise of the transition INTO time `t` and that of the observation at
            `t`; with axes in front as `chol_Q` has them, or constant.
        into_next: `S` is `Cov(w_{t+1}, v_t)` instead: the noise of the observation and that of the transition that
            follows it. Textbooks that write `z_{t+1} = A z_t + w_t` mean this by `Cov(w_t, v_t)`.

    Returns:
        A model with `n_state + n_obs` states: those of `ssm`, and standard normals that the noise of the observation is
        made of. `chol_R` is zero. What varies in time is what has to.

    Raises:
        ValueError: `S` has the wrong shape, or the matrix above is not a covariance.

    Example:
        >>> one = [[1.0]]
        >>> level = LinearGaussianSSM([0.0], one, one, one, one, one)
        >>> correlated_noise(level, [[1.0]]).n_state
        2

    Source:
        Anderson & Moore 1979, section 5.5; by a state that holds the noise, as in Durbin & Koopman 2012, section 6.4.
    """
    check_model(ssm)
    n, p = ssm.n_state, ssm.n_obs
    cross = as_float("S", S)
    if cross.shape[-2:] != (n, p):
        raise ValueError(f"`S` must have shape ({n}, {p}): (state, obs); got {cross.shape}.")
    timed = {"chol_Q", "chol_R"} & set(ssm.time_varying)
    if into_next and timed:
        raise ValueError(f"`into_next` needs constant noise; {sorted(timed)} of `ssm` vary in time.")
    noises = (ssm.Q, "chol_Q"), (ssm.R, "chol_R")
    Q, R = (jnp.expand_dims(x, -3) if timed and name not in timed else x for x, name in noises)
    cross = cross.astype(ssm.dtype)
    joint = _block([[R, jnp.swapaxes(cross, -1, -2)], [cross, Q]])
    root = factor_from_covariance("[R, S'; S, Q]", joint)
    factor = jnp.vectorize(triangularise, signature="(n,m)->(n,n)")(root)
    return _in_state(ssm, factor[..., :p, :p], factor[..., p:, :p], factor[..., p:, p:], into_next)


def noise_as_state(ssm: LinearGaussianSSM) -> LinearGaussianSSM:
    """The same model with the observation's noise among its states, read off exactly.

    The noise of an entry that is missing may depend on that of its neighbours: then it is a state like others.
    """
    noises = ssm.chol_R, ssm.chol_Q
    if {"chol_Q", "chol_R"} & set(ssm.time_varying):
        wide = [ssm.with_time_axis(name) for name in ("chol_R", "chol_Q")]
        noises = [jnp.broadcast_to(x, (*x.shape[:-3], ssm.num_steps, *x.shape[-2:])) for x in wide]
    return _in_state(ssm, noises[0], jnp.zeros((ssm.n_state, ssm.n_obs), ssm.dtype), noises[1], False)


def _in_state(ssm: LinearGaussianSSM, L_R: Array, G: Array, L_w: Array, into_next: bool) -> LinearGaussianSSM:
    """The model with the standard normals of `v = L_R e` and `w = G e + L_w (more noise)` behind its states."""
    n, p = ssm.n_state, ssm.n_obs
    timed = bool({"chol_Q", "chol_R"} & set(ssm.time_varying))
    one, zero = jnp.eye(p, dtype=ssm.dtype), jnp.zeros((p, n), ssm.dtype)
    none = jnp.zeros((p, L_w.shape[-1]), ssm.dtype)
    C = jnp.expand_dims(ssm.C, -3) if timed and "C" not in ssm.time_varying else ssm.C
    if not timed and "C" in ssm.time_varying and L_R.ndim > 2:
        L_R = jnp.expand_dims(L_R, -3)
    before = jnp.expand_dims(G, -3) if "A" in ssm.time_varying and G.ndim > 2 else G
    fields = {
        "m0": _padded(ssm.m0, p, -1),
        "chol_P0": _block([[ssm.chol_P0, zero.T], [zero, one]]),
        "A": _block([[ssm.A, before if into_next else zero.T], [zero, jnp.zeros_like(one)]]),
        "chol_Q": _block([[zero.T if into_next else G, L_w], [one, none]]),
        "C": _block([[C, L_R]]),
        "chol_R": jnp.zeros((p, p), ssm.dtype),
        "b": None if ssm.b is None else _padded(ssm.b, p, -1),
        "d": ssm.d,
        "B": None if ssm.B is None else _padded(ssm.B, p, -2),
        "D": ssm.D,
    }
    varies = {*ssm.time_varying, *(("C", "chol_Q") if timed else ())} - {"chol_R"}
    diffuse = (*ssm.diffuse, *(False,) * p) if ssm.diffuse else ()
    return rebuild(fields, tuple(name for name in TIME_VARYING if name in varies), diffuse)


def _block(rows: list[list[Array]]) -> Array:
    """A matrix of blocks, whose axes in front broadcast."""
    lead = jnp.broadcast_shapes(*(x.shape[:-2] for row in rows for x in row))
    wide = [[jnp.broadcast_to(x, lead + x.shape[-2:]) for x in row] for row in rows]
    return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in wide], axis=-2)


def _padded(x: Array, more: int, axis: int) -> Array:
    """Zeros for `more` states."""
    return jnp.pad(x, [(0, more if i == x.ndim + axis else 0) for i in range(x.ndim)])
