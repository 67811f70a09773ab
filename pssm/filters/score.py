"""The log-likelihood with its derivative in closed form.

Differentiating the filter's triangularisations step by step is slow. The derivative of the log-likelihood needs none
of them: with the gains and innovations of the forward pass stored, one backward recursion over the derivative `lam`
with respect to the predicted mean and `Lam` (symmetric) with respect to the predicted covariance gives the derivative
with respect to everything. The derivative of a singular covariance's factor comes out right by itself.
"""

import jax
import jax.numpy as jnp

from pssm._types import Array, ArrayLike, Scalar
from pssm.batch import over_batches
from pssm.filters.kalman import StepRecord, prepare, scan_filter, shift, timed_fields
from pssm.linalg.small import matmul, matvec
from pssm.missing import split_missing
from pssm.ssm import FIELDS, TRANSITION, LinearGaussianSSM


def log_likelihood(ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto") -> Scalar:
    """`log p(y_{1:T})`, exact, the states integrated out. Arguments and errors as in `kalman_filter`.

    Its gradient (also of second and higher order, forward and reverse) costs about as much again as its value:
    `"auto"` and `"sequential"` use the closed form of this module, `"square_root"` differentiates the recursion.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[0.5]], [[1.0]], [[1.0]], [[1.0]])
        >>> print(round(float(log_likelihood(model, [0.3, -0.1])), 4))
        -2.6184

    Source:
        Koopman & Shephard 1992 for the score; the recursion here is written for means and covariances.
    """
    ssm, series, inputs = prepare(ssm, y, u, method)
    if method == "square_root":
        return over_batches(lambda *args: scan_filter(*args)[1].sum(), ssm, (series, 2), (inputs, 2))
    return over_batches(_log_likelihood, ssm, (series, 2), (inputs, 2))


@jax.custom_jvp
def _log_likelihood(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return scan_filter(ssm, y, u)[1].sum()


@_log_likelihood.defjvp
def _log_likelihood_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """A scalar's derivative is its gradient times the tangents: linear, so it serves forward and reverse mode."""
    value, gradient = _score(*primals)
    products = jax.tree.map(jnp.vdot, gradient, tangents)
    return value, sum(jax.tree.leaves(products), jnp.zeros_like(value))


def _score(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, tuple]:
    """The log-likelihood and its gradient with respect to `(ssm, y, u)`.

    With `e = S^-1 (y - prediction)` and `J = 1 - K C`, one step back through the update is

        lam <- J' lam + C' e,    Lam <- J' Lam J + sym(C' e (J' lam)') - (C' S^-1 C - C' e e' C) / 2

    and through the transition `lam <- A' lam`, `Lam <- A' Lam A`.
    """
    _, observed = split_missing(y)
    records, log_liks = scan_filter(ssm, y, u)
    n = ssm.n_state

    def back(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple]:
        lam, big = carry
        r, seen, u_t, u_next, timed = xs
        now = ssm.at(timed)
        grads, u_from_transition, lam, big = _back_transition(now, r, u_next, lam, big)
        more, y_grad, u_from_emission, lam, big = _back_update(now, r, seen, u_t, lam, big)
        return (lam, big), ({**grads, **more}, y_grad, u_from_transition, u_from_emission)

    start = jnp.zeros(n, y.dtype), jnp.zeros((n, n), y.dtype)
    xs = records, observed, u, shift(u), timed_fields(ssm, ahead=True)
    (lam, big), (grads, y_grad, u_transition, u_emission) = jax.lax.scan(back, start, xs, reverse=True)

    total = {"m0": lam, "chol_P0": 2 * matmul(big, ssm.chol_P0)}
    for name, g in grads.items():
        if name not in ssm.time_varying:
            total[name] = g.sum(0)
        else:  # what step t says of the transition belongs to the step into t + 1
            total[name] = _delay(g) if name in TRANSITION else g
    fields = {name: total.get(name) for name in FIELDS}
    gradient = LinearGaussianSSM.tree_unflatten(ssm.time_varying, tuple(fields.values()))
    return log_liks.sum(), (gradient, y_grad, None if u is None else _delay(u_transition) + u_emission)


def _delay(g: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(g[:1]), g[:-1]])


def _back_transition(
    ssm: LinearGaussianSSM, r: StepRecord, u_next: Array | None, lam: Array, big: Array
) -> tuple[dict[str, Array], Array | None, Array, Array]:
    """Through `m' = A m + b + B u`, `P' = A P A' + Q`."""
    big_a = matmul(big, ssm.A)
    spread = matmul(matmul(big_a, r.new_chol), r.new_chol.T)
    grads = {"A": lam[:, None] * r.new_mean + 2 * spread, "chol_Q": 2 * matmul(big, ssm.chol_Q)}
    if ssm.b is not None:
        grads["b"] = lam
    u_grad = None if u_next is None else jnp.zeros_like(u_next)
    if ssm.B is not None and u_next is not None:
        grads["B"] = lam[:, None] * u_next
        u_grad = matvec(ssm.B.T, lam)
    return grads, u_grad, matvec(ssm.A.T, lam), matmul(ssm.A.T, big_a)


def _back_update(
    ssm: LinearGaussianSSM, r: StepRecord, seen: Array, u_t: Array | None, lam: Array, big: Array
) -> tuple[dict[str, Array], Array, Array | None, Array, Array]:
    """Through the update and the log-likelihood of one step."""
    C = jnp.where(seen[:, None], ssm.C, 0.0)
    e = r.weighted
    rest = jnp.eye(ssm.n_state, dtype=lam.dtype) - matmul(r.gain, C)  # J
    rest_lam = matvec(rest.T, lam)
    gain_lam = matvec(r.gain.T, lam)
    residual_grad = gain_lam - e
    gain_big = matmul(r.gain.T, big)
    # Derivative with respect to S, the covariance of the prediction error.
    by_s = -0.5 * (r.precision - e[:, None] * e) - 0.5 * (e[:, None] * gain_lam + gain_lam[:, None] * e)
    by_r = by_s + matmul(gain_big, r.gain)
    c_chol = matmul(C, r.chol)
    by_c = (
        -residual_grad[:, None] * r.mean
        + 2 * matmul(by_s, matmul(c_chol, r.chol.T))
        + e[:, None] * matvec(r.chol, matvec(r.chol.T, lam))
        - 2 * matmul(matmul(gain_big, r.new_chol), r.new_chol.T)
    )
    ce = matvec(C.T, e)
    new_big = (
        matmul(rest.T, matmul(big, rest))
        + 0.5 * (ce[:, None] * rest_lam + rest_lam[:, None] * ce)
        - 0.5 * (matmul(C.T, matmul(r.precision, C)) - ce[:, None] * ce)
    )
    grads = {
        "C": jnp.where(seen[:, None], by_c, 0.0),
        "chol_R": 2 * matmul(by_r, jnp.where(seen[:, None], ssm.chol_R, 0.0)),
    }
    if ssm.d is not None:
        grads["d"] = -residual_grad
    u_grad = None if u_t is None else jnp.zeros_like(u_t)
    if ssm.D is not None and u_t is not None:
        grads["D"] = -residual_grad[:, None] * u_t
        u_grad = -matvec(ssm.D.T, residual_grad)
    return grads, residual_grad, u_grad, rest_lam + ce, new_big
