"""Many sensors, few states: the observations of a step brought down to one more than there are states, exactly.

With independent noises `r` the step `y = d + C z + r e` says the same as `w = W z + e`, with `w = (y - d) / r` and
`W = C / r`, rows of missing entries zero; and so does any rotation of it. In an orthonormal basis `Q` of the columns of
`[W, w]` all but the first `state + 1` entries are zero:

    Q'w = Q'W z + e        log p(y) = log p(Q'w) - sum log r - (observed entries - state - 1) log(2 pi) / 2

No first derivative needs that of `Q` or of the scale `r`: entries beyond are zero in `w` and in `W`, and the
log-likelihood has slope zero there. Higher derivatives do need it, and are those of the whole step.

Source:
    Jungbacker & Koopman 2015, section 2 (there with a fixed basis, of `W` alone).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pssm._types import Array, Bool
from pssm.batch import in_all_of_a_batch
from pssm.filters.step import LOG_2PI
from pssm.linalg.small import SMALL, along_time, batch_first
from pssm.missing import split_missing
from pssm.ssm import FIELDS, LinearGaussianSSM, rebuild


def is_wide(ssm: LinearGaussianSSM) -> bool:
    """Whether a series is worth collapsing, by its sizes: below, a step is one small fused loop."""
    n_obs, n = ssm.C.shape[-2:]
    return n_obs >= 2 * (n + 1) and n_obs + n > SMALL


def can_collapse(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Bool[Array, ""]:
    """Whether noises are independent, none is zero, and all signals are below `1 / sqrt(rounding)` in their units.

    A rotation rounds each entry by what the largest one has, in units of the noise, and the start is part of that.
    """
    r = _scale(ssm)
    independent = jnp.all(ssm.chol_R == jnp.eye(r.shape[-1], dtype=r.dtype) * r[..., None, :]) & jnp.all(r != 0)
    loadings, readings = _whitened(ssm, y, u)
    largest = jnp.maximum(jnp.max(jnp.abs(loadings)) * jnp.max(jnp.abs(ssm.chol_P0)), jnp.max(jnp.abs(readings)))
    return independent & (largest * math.sqrt(jnp.finfo(r.dtype).eps) <= 1.0)


def where_collapsed(narrow: Callable[..., Any], general: Callable[..., Any], *args: Any) -> Any:
    """`narrow(*args)` where the series of `args = (ssm, y, u, ...)` can be collapsed, else `general(*args)`."""
    return jax.lax.cond(in_all_of_a_batch(can_collapse(*args[:3])), narrow, general, *args)


def basis(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    """`Q` of each step, `(time, obs, state + 1)`."""
    loadings, readings = _whitened(ssm, y, u)
    return jnp.linalg.qr(jnp.concatenate([loadings, readings[:, :, None]], axis=2))[0]


def collapse(q: Array, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[LinearGaussianSSM, Array, Array]:
    """Model and series in the basis `q`, and what the log-likelihood of each step lacks.

    A step without any observation is NaN. Derivatives are right but for those by `chol_R`, see `collapsed_score`.
    """
    loadings, readings = _whitened(ssm, y, u)
    observed, size = ~jnp.isnan(y), q.shape[2]
    noise = jnp.broadcast_to(jnp.eye(size, dtype=y.dtype), (len(y), size, size))
    fields = {name: getattr(ssm, name) for name in FIELDS} | {"d": None, "D": None, "chol_R": noise}
    fields["C"] = jnp.einsum("tpk,tpn->tkn", q, loadings)
    timed = (*(name for name in ssm.time_varying if name not in ("C", "chol_R", "d", "D")), "C", "chol_R")
    log_scale = jnp.sum(jnp.where(observed, jnp.log(jnp.abs(_scale(ssm))), 0.0), axis=1)
    lacking = -0.5 * LOG_2PI * (jnp.sum(observed, axis=1) - size) - jax.lax.stop_gradient(log_scale)
    empty = ~jnp.any(observed, axis=1)
    small_y = jnp.where(empty[:, None], jnp.nan, jnp.einsum("tpk,tp->tk", q, readings))
    return rebuild(fields, timed), small_y, jnp.where(empty, 0.0, lacking)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def collapsed_score(
    score: Callable[..., Any], ssm: LinearGaussianSSM, y: Array, u: Array | None
) -> tuple[Array, tuple]:
    """The log-likelihood and its gradient with respect to `(ssm, y, u)`, by `score` of the collapsed series.

    With `M_t` the expected square of what `w - W z` is in the basis, that by `chol_R` is
    `diag(1/r) (sum_t Q_t M_t Q_t' - observed)`; off the diagonal too.
    """
    q = basis(ssm, y, u)
    (small, small_y, lacking), back = jax.vjp(partial(collapse, q), ssm, y, u)
    value, (by_ssm, by_y, by_u) = score(small, small_y, u)
    squares = by_ssm.chol_R + jnp.eye(q.shape[2], dtype=q.dtype)
    whole, whole_y, whole_u = back((by_ssm, by_y, jnp.zeros_like(lacking)))
    observed = ~jnp.isnan(y)
    squares = jnp.where(jnp.any(observed, axis=1)[:, None, None], squares, 0.0)
    turned = jnp.einsum("tpk,tkl->tpl", q, squares)
    if "chol_R" in ssm.time_varying:
        by_noise = jnp.einsum("tpl,tql->tpq", turned, q) - jax.vmap(jnp.diag)(observed.astype(y.dtype))
    else:
        by_noise = jnp.tensordot(turned, q, ((0, 2), (0, 2))) - jnp.diag(observed.sum(0).astype(y.dtype))
    fields = {name: getattr(whole, name) for name in FIELDS}
    fields["chol_R"] = by_noise / _scale(ssm)[..., :, None]
    by_u = whole_u if u is None else whole_u + by_u
    return batch_first((value + jnp.sum(lacking), (rebuild(fields, ssm.time_varying), whole_y, by_u)))


@collapsed_score.defjvp
def _collapsed_score_jvp(score: Callable[..., Any], primals: tuple, tangents: tuple) -> tuple:
    return batch_first(jax.jvp(score, primals, tangents))


def _scale(ssm: LinearGaussianSSM) -> Array:
    return jnp.diagonal(ssm.chol_R, axis1=-2, axis2=-1)


def _whitened(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, Array]:
    """`W` `(time, obs, state)` and `w` `(time, obs)`, zero where missing."""
    filled, observed = split_missing(y)
    r = jax.lax.stop_gradient(_scale(ssm))
    r = jnp.where(observed & (r != 0), r, 1.0)  # `can_collapse` refuses zeros
    if ssm.d is not None:
        filled = filled - ssm.d
    if ssm.D is not None and u is not None:
        filled = filled - along_time(ssm.D, u, "D" in ssm.time_varying)
    return jnp.where(observed[:, :, None], ssm.C / r[:, :, None], 0.0), jnp.where(observed, filled / r, 0.0)
