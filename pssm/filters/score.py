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
from pssm.linalg import orthogonalise, solve_lower
from pssm.linalg.small import matmul, matvec
from pssm.missing import split_missing
from pssm.ssm import FIELDS, TRANSITION, LinearGaussianSSM


def log_likelihood(ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto") -> Scalar:
    """`log p(y_{1:T})`, exact, the states integrated out. Arguments and errors as in `kalman_filter`.

    Its gradient (also of second and higher order, forward and reverse) costs about as much again as its value:
    `"auto"` and `"sequential"` use the closed form of this module, `"square_root"` differentiates the recursion.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[0.5]], [[1.0]], [[1.0]], [[1.0]])
        >>> print(f"{log_likelihood(model, [0.3, -0.1]):.4f}")
        -2.5910

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

    `lam` is the derivative with respect to the predicted mean, and `gam = Lam L` that with respect to the predicted
    covariance (symmetric, `Lam`) times its factor. With the orthogonal factors of the forward pass,

        [C L, chol_R; L, 0] = [S^1/2, 0; Kbar, L+] [Q11, Q12; Q21, Q22],   [A L+, chol_Q] = L' [Q1, Q2],

    `J = 1 - K C`, `w = S^-1/2 (y - prediction)` and `e = S^-T/2 w`, one step back through the transition is

        lam <- A' lam,    gam <- A' gam Q1

    and through the update, since `J L = L+ Q21` and `C L = S^1/2 Q11`,

        lam <- J' lam + C' e
        gam <- J' gam Q21 + (C' e lam' L+ Q21 + J' lam w' Q11 + C' e w' Q11 - C' S^-T/2 Q11) / 2.

    Nothing is divided by a predicted covariance. For a wide `P`, `lam` is the small difference of large terms; so
    `rho = L' lam` is carried beside it, by orthogonal factors alone,

        rho <- Q1' rho,    rho <- Q21' rho + Q11' w

    and the derivative with respect to `m0` is read from it where `chol_P0` is regular.
    """
    _, observed = split_missing(y)
    records, log_liks = scan_filter(ssm, y, u)
    n = ssm.n_state

    def back(carry: tuple[Array, Array, Array], xs: tuple) -> tuple[tuple[Array, Array, Array], tuple]:
        lam, gam, rho = carry
        r, seen, u_t, u_next, timed = xs
        now = ssm.at(timed)
        grads, u_from_transition, lam, gam = _back_transition(now, r, u_next, lam, gam)
        more, y_grad, u_from_emission, lam, gam = _back_update(now, r, seen, u_t, lam, gam)
        rho = matvec(r.turn_next[:, :n].T, rho)
        rho = matvec(r.turn[:, :n].T, jnp.concatenate([r.whitened, rho]))
        return (lam, gam, rho), ({**grads, **more}, y_grad, u_from_transition, u_from_emission)

    start = jnp.zeros(n, y.dtype), jnp.zeros((n, n), y.dtype), jnp.zeros(n, y.dtype)
    xs = records, observed, u, shift(u), timed_fields(ssm, ahead=True)
    (lam, gam, rho), (grads, y_grad, u_transition, u_emission) = jax.lax.scan(back, start, xs, reverse=True)

    chol, turn = orthogonalise(ssm.chol_P0)
    lam = jnp.where(jnp.diagonal(chol) > 0, 0.0, lam)
    lam = lam + solve_lower(chol, rho - matvec(chol.T, lam), transpose=True)
    total = {"m0": lam, "chol_P0": 2 * matmul(gam, turn)}
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
    ssm: LinearGaussianSSM, r: StepRecord, u_next: Array | None, lam: Array, gam: Array
) -> tuple[dict[str, Array], Array | None, Array, Array]:
    """Through `m' = A m + b + B u`, `P' = A P A' + Q`."""
    n = ssm.n_state
    turned = matmul(gam, r.turn_next)
    grads = {"A": lam[:, None] * r.new_mean + 2 * matmul(turned[:, :n], r.new_chol.T), "chol_Q": 2 * turned[:, n:]}
    if ssm.b is not None:
        grads["b"] = lam
    u_grad = None if u_next is None else jnp.zeros_like(u_next)
    if ssm.B is not None and u_next is not None:
        grads["B"] = lam[:, None] * u_next
        u_grad = matvec(ssm.B.T, lam)
    return grads, u_grad, matvec(ssm.A.T, lam), matmul(ssm.A.T, turned[:, :n])


def _back_update(
    ssm: LinearGaussianSSM, r: StepRecord, seen: Array, u_t: Array | None, lam: Array, gam: Array
) -> tuple[dict[str, Array], Array, Array | None, Array, Array]:
    """Through the update and the log-likelihood of one step."""
    n_obs, n = ssm.C.shape
    C = jnp.where(seen[:, None], ssm.C, 0.0)
    q_obs, q_state = r.turn[:n_obs], r.turn[n_obs:]  # [Q11, Q12] and [Q21, Q22]
    w_q = matvec(q_obs.T, r.whitened)
    lam_q = matvec(q_state.T, matvec(r.new_chol.T, lam))
    gam_q = matmul(gam, q_state)
    root_q = matmul(r.root.T, q_obs)
    e = matvec(r.root.T, r.whitened)
    gain_lam = matvec(r.gain.T, lam)
    residual_grad = gain_lam - e
    # Derivative with respect to the stacked factor's first row [C L, chol_R], both of its halves at once.
    by_top = e[:, None] * (w_q + lam_q) - gain_lam[:, None] * w_q - root_q - 2 * matmul(r.gain.T, gam_q)
    by_c = -residual_grad[:, None] * r.mean + matmul(by_top[:, :n], r.chol.T)
    ce, gain_back = matvec(C.T, e), lam - matvec(C.T, gain_lam)
    new_gam = gam_q - matmul(C.T, matmul(r.gain.T, gam_q))
    new_gam = new_gam[:, :n] + 0.5 * (
        ce[:, None] * (lam_q + w_q)[:n] + gain_back[:, None] * w_q[:n] - matmul(C.T, root_q[:, :n])
    )
    grads = {"C": jnp.where(seen[:, None], by_c, 0.0), "chol_R": by_top[:, n:]}
    if ssm.d is not None:
        grads["d"] = -residual_grad
    u_grad = None if u_t is None else jnp.zeros_like(u_t)
    if ssm.D is not None and u_t is not None:
        grads["D"] = -residual_grad[:, None] * u_t
        u_grad = -matvec(ssm.D.T, residual_grad)
    return grads, residual_grad, u_grad, gain_back + ce, new_gam
