"""The log-likelihood with its derivative in closed form.

Differentiating the filter's triangularisations step by step is slow. The derivative of the log-likelihood needs none
of them. With gains and innovations of the forward pass stored, a backward recursion over `lam`, the derivative with
respect to the predicted mean, runs over the data; a second one over `gam = Lam L`, where `Lam` (symmetric) is the
derivative with respect to the predicted covariance and `L` its factor, takes from the data the products `w w'` and
`lam w'` alone. With the factors of `covariance.py`, `w` the whitened innovation and everything known after the update,
one step back through the transition and through the update is

    lam <- A' lam                    gam <- A' gam Q1
    d   =  S^-T/2 (Kbar' lam - w)    top <- S^-T/2 [(w w' - Kbar' lam w' - 1) Q11 + w lam' L+ Q21 - 2 Kbar' gam Q21]
    lam <- lam - C' d                gam <- gam Q21 + (lam w' Q11 + C' top) / 2

where `d` is the derivative with respect to the observation and `[top, ...]`, with `Q12`, `Q22` for `Q11`, `Q21`, that
with respect to the stacked factor `[C L, chol_R]`. Nothing is divided by a predicted covariance, and the derivative of
a singular covariance's factor comes out right by itself.

For a wide `P`, `lam` is the small difference of large terms; so `rho = L' lam` is carried beside it, by orthogonal
factors alone, `rho <- Q1' rho` and `rho <- Q21' rho + Q11' w`, and the derivative with respect to `m0` is read from it.

Once the gains stand still, the second recursion is `gam <- F' gam Theta` plus a term that is linear in the products,
with `F` and `Theta` fixed. All that is wanted is the sum of `gam` over these steps, which solves a linear equation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array, ArrayLike, Scalar
from pssm.filters.collapse import score_by_width
from pssm.filters.covariance import (
    OF_COVARIANCES,
    Gains,
    by_step,
    can_freeze,
    every_step,
    over_series,
    row_at,
    spread_rows,
    timed_fields,
    until_standstill,
    with_gains,
)
from pssm.filters.kalman import METHODS, Means, kalman_filter, prepare, scan_means, shift
from pssm.filters.low_memory import low_memory_log_likelihood
from pssm.linalg import orthogonalise, solve_lower
from pssm.linalg.small import batch_first, matmul, matvec, row_of, unroll
from pssm.ssm import FIELDS, TRANSITION, LinearGaussianSSM


def log_likelihood(ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto") -> Scalar:
    """`log p(y_{1:T})`, exact, the states integrated out. Arguments and errors as in `kalman_filter`.

    Its gradient (also of second and higher order, forward and reverse) costs about as much again as its value:
    `"auto"` and `"sequential"` use the closed form of this module, the others differentiate their recursion. There is
    one method more, `"low_memory"`, whose gradient keeps what `2 sqrt(T)` steps need, not `T`, and takes longer.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[0.5]], [[1.0]], [[1.0]], [[1.0]])
        >>> print(f"{log_likelihood(model, [0.3, -0.1]):.4f}")
        -2.5910

    Source:
        Koopman & Shephard 1992 for the score; the recursion here is written for means and covariances.
    """
    ssm, series, inputs = prepare(ssm, y, u, method, (*METHODS, "low_memory"))
    if method == "low_memory":
        return low_memory_log_likelihood(ssm, series, inputs)
    if method == "parallel":
        return kalman_filter(ssm, series, inputs, method=method).log_likelihood
    return _log_likelihoods(ssm, series, inputs, method)


@partial(jax.jit, static_argnames="method")
def _log_likelihoods(ssm: LinearGaussianSSM, y: Array, u: Array | None, method: str) -> Array:
    one = None if method == "square_root" else _log_likelihood if method == "auto" else _full_log_likelihood
    each = None if method == "square_root" else _full_log_likelihood
    together = None if method == "square_root" else partial(_together, freeze=method == "auto")
    options = {"freeze": method == "auto", "ends_matter": False}
    return over_series(_total, ssm, y, u, **options, one=one, each=each, together=together)


def _total(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return scan_means(rows, last, ssm, y, u)[1].sum(0).reshape(y.shape[:-2])


@jax.custom_jvp
def _full_log_likelihood(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return with_gains(_total, ssm, y, u, freeze=False)


@jax.custom_jvp
def _log_likelihood(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return with_gains(_total, ssm, y, u, freeze=True)


_full_log_likelihood.defjvp(lambda primals, tangents: _along(_score, primals, tangents))


@_log_likelihood.defjvp
def _log_likelihood_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _along(_frozen_score if can_freeze(primals[0], primals[1].shape[0]) else _score, primals, tangents)


def _along(score: Callable[..., Any], primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """A scalar's derivative is its gradient times the tangents: linear, so it serves forward and reverse mode."""
    value, gradient = score_by_width(_score, score, *primals)
    products = jax.tree.map(jnp.vdot, gradient, tangents)
    return value, sum(jax.tree.leaves(products), jnp.zeros_like(value))


def _score(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, tuple]:
    """The log-likelihood and its gradient with respect to `(ssm, y, u)`, every step computed."""
    n = ssm.n_state
    rows, last = every_step(ssm, ~jnp.isnan(y)), y.shape[0] - 1
    means, log_liks = scan_means(rows, last, ssm, y, u)
    back = _scan_back(rows, last, ssm, means)

    def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], dict[str, Array]]:
        gam, rho = carry
        row, w, lam, timed = xs
        grads, gam = _covariances_back(ssm.at(timed), row, _products(w, lam), gam)
        return (gam, _rho_back(row, w, rho)), grads

    start = jnp.zeros((n, n), y.dtype), jnp.zeros(n, y.dtype)
    xs = rows, means.whitened, back.lam, timed_fields(ssm, ahead=True, names=OF_COVARIANCES)
    (gam, rho), grads = jax.lax.scan(step, start, xs, reverse=True)
    sums = {name: g if name in ssm.time_varying else g.sum(0) for name, g in grads.items()}
    return log_liks.sum(), _gradient(ssm, u, means, back, sums, gam, rho)


@jax.custom_jvp
def _frozen_score(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, tuple]:
    """The same where gains may come to a standstill; higher derivatives are those of `_score`."""
    rows, last, served = until_standstill(ssm, ~jnp.isnan(y))
    if served is True:
        return batch_first(_still_score(ssm, y, u, rows, last))
    return batch_first(jax.lax.cond(served, lambda: _still_score(ssm, y, u, rows, last), lambda: _score(ssm, y, u)))


@_frozen_score.defjvp
def _frozen_score_jvp(primals: tuple, tangents: tuple) -> tuple:
    return batch_first(jax.jvp(_score, primals, tangents))


def _still_score(ssm: LinearGaussianSSM, y: Array, u: Array | None, rows: Gains, last: Array) -> tuple[Array, tuple]:
    """`_score` where row `last` stands for all later steps."""
    length, n = y.shape[0], ssm.n_state
    means, log_liks = scan_means(rows, last, ssm, y, u)
    back = _scan_back(rows, last, ssm, means)
    w, lam = means.whitened, back.lam

    # The sum of gam from `border` on is found at once. What reaches the steps before it comes from the next `window`
    # steps alone: Theta^window is negligible. Without such a window (or room for it) every step is computed.
    final = jax.tree.map(lambda x: x[last], rows)
    powers = _powers(ssm, final, length)
    window, vanishes = powers.window, powers.vanishes & (powers.window <= length - last)
    border = jnp.where(vanishes, last, length)
    first = jnp.where(vanishes, jnp.minimum(last + window, length), length)

    def running(state: tuple) -> Array:
        return state[0] > 0

    def step(state: tuple) -> tuple:
        t, gam, rho, at_border, total = state
        t = t - 1
        row = row_at(rows, t, last)
        grads, gam = _covariances_back(ssm, row, _products(row_of(w, t), row_of(lam, t)), gam)
        total = jax.tree.map(lambda s, g: s + jnp.where(t < border, g, 0.0), total, grads)
        return t, gam, _rho_back(row, row_of(w, t), rho), jnp.where(t == border, gam, at_border), total

    zero = jnp.zeros((n, n), y.dtype)
    beyond = jnp.where(first < length, matvec(final.chol.T, back.next_lam[first - 1]), 0.0)
    total = {name: jnp.zeros_like(getattr(ssm, name)) for name in OF_COVARIANCES}
    _, gam, rho, at_border, total = jax.lax.while_loop(running, step, (first, zero, beyond, zero, total))

    late = jnp.arange(length) >= border
    late_w = jnp.where(late[:, None], w, 0.0)
    products = _Products(late_w.T @ late_w, lam.T @ late_w, jnp.sum(late))
    after = _covariances_back(ssm, final, products, jnp.zeros_like(gam))[1]  # the terms of all these steps
    after = powers.solve(after - powers.back @ at_border @ powers.turn) - at_border
    tail = _covariances_back(ssm, final, products, jnp.where(vanishes, after, 0.0))[0]
    total = jax.tree.map(lambda s, g: s + jnp.where(vanishes, g, 0.0), total, tail)
    return log_liks.sum(), _gradient(ssm, u, means, back, total, gam, rho)


# ------------------------------------------------------------------------------------------------------- one step back


class _Back(NamedTuple):
    """Derivatives with respect to the next predicted mean, to the filtered mean, and to the observation (`d`)."""

    next_lam: Array
    lam: Array
    residual: Array


class _Products(NamedTuple):
    """`w w'`, `lam w'` and the number of steps they are summed over."""

    ww: Array
    lam_w: Array
    count: Array | int


def _products(w: Array, lam: Array) -> _Products:
    return _Products(w[:, None] * w, lam[:, None] * w, 1)


def _scan_back(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, means: Means) -> _Back:
    row_xs, row_of_step = by_step((rows.gain, rows.root), last, means.whitened.shape[0])

    def step(next_lam: Array, xs: tuple) -> tuple[Array, _Back]:
        row, w, timed = xs
        now = ssm.at(timed)
        gain, root = row_of_step(row)
        lam = matvec(now.A.T, next_lam)
        residual = matvec(root.T, matvec(gain.T, lam) - w)
        return lam - matvec(now.C.T, residual), _Back(next_lam, lam, residual)

    xs = row_xs, means.whitened, timed_fields(ssm, ahead=True, names=("A", "C"))
    start = jnp.zeros_like(means.mean[0])
    return jax.lax.scan(step, start, xs, reverse=True, unroll=unroll(ssm.n_state))[1]


def _covariances_back(
    ssm: LinearGaussianSSM, row: Gains, products: _Products, gam: Array
) -> tuple[dict[str, Array], Array]:
    """The step of the module's head, linear in the products and in `gam` together; without what goes by the means."""
    n_obs, n = ssm.C.shape
    turned = matmul(gam, row.turn_next)
    gam = matmul(ssm.A.T, turned[:, :n])
    q_obs, q_state = row.turn[:n_obs], row.turn[n_obs:]
    gam_q = matmul(gam, q_state)
    lam_w_q = matmul(products.lam_w, q_obs)
    inner = matmul(products.ww - products.count * jnp.eye(n_obs, dtype=gam.dtype), q_obs)
    inner = inner - matmul(row.gain.T, lam_w_q + 2 * gam_q)
    inner = inner + matmul(matmul(products.lam_w.T, row.new_chol), q_state)
    top = matmul(row.root.T, inner)
    grads = {
        "A": 2 * matmul(turned[:, :n], row.new_chol.T),
        "chol_Q": 2 * turned[:, n:],
        "C": matmul(top[:, :n], row.chol.T),
        "chol_R": top[:, n:],
    }
    return grads, (gam_q + 0.5 * (lam_w_q + matmul(ssm.C.T, top)))[:, :n]


def _rho_back(row: Gains, w: Array, rho: Array) -> Array:
    n = rho.shape[0]
    return matvec(row.turn[:, :n].T, jnp.concatenate([w, matvec(row.turn_next[:, :n].T, rho)]))


def _gradient(
    ssm: LinearGaussianSSM,
    u: Array | None,
    means: Means,
    back: _Back,
    total: dict[str, Array],
    gam: Array,
    rho: Array,
) -> tuple:
    """Everything together, with what goes by the means: sums over all steps of products of two vectors."""
    chol, turn = orthogonalise(ssm.chol_P0)
    lam = back.lam[0] - matvec((ssm.C[0] if "C" in ssm.time_varying else ssm.C).T, back.residual[0])
    lam = jnp.where(jnp.diagonal(chol) > 0, 0.0, lam)
    lam = lam + solve_lower(chol, rho - matvec(chol.T, lam), transpose=True)

    def product(name: str, a: Array, b: Array) -> Array:
        return a[:, :, None] * b[:, None, :] if name in ssm.time_varying else a.T @ b

    def offset(name: str, a: Array) -> Array:
        return a if name in ssm.time_varying else a.sum(0)

    total = dict(total)
    total["A"] = total["A"] + product("A", back.next_lam, means.new_mean)
    total["C"] = total["C"] - product("C", back.residual, means.mean)
    u_grad = None if u is None else jnp.zeros_like(u)
    if ssm.b is not None:
        total["b"] = offset("b", back.next_lam)
    if ssm.d is not None:
        total["d"] = -offset("d", back.residual)
    if ssm.B is not None and u is not None:
        total["B"] = product("B", back.next_lam, shift(u))
        # The input of step t + 1 acts on the step into it.
        B = jnp.concatenate([ssm.B[1:], ssm.B[-1:]]) if "B" in ssm.time_varying else ssm.B
        u_grad = u_grad + _delay(jnp.einsum("...nk,...n->...k", B, back.next_lam))
    if ssm.D is not None and u is not None:
        total["D"] = -product("D", back.residual, u)
        u_grad = u_grad - jnp.einsum("...pk,...p->...k", ssm.D, back.residual)
    for name in set(TRANSITION) & set(ssm.time_varying):  # what step t says of it belongs to the step into t + 1
        total[name] = _delay(total[name])
    fields = {name: total.get(name) for name in FIELDS} | {"m0": lam, "chol_P0": 2 * matmul(gam, turn)}
    return LinearGaussianSSM.tree_unflatten(ssm.time_varying, tuple(fields.values())), back.residual, u_grad


def _delay(g: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(g[:1]), g[:-1]])


# ---------------------------------------------------------------------------------------------------- series together


def _together(gaps: Array, ssm: LinearGaussianSSM, y: Array, u: Array | None, *, freeze: bool) -> Array:
    """Log-likelihoods of series with the same gaps: one recursion for the gains, and one for their derivative."""
    gain, root, log_norm = _what_means_need(freeze, ssm, ~gaps)
    rows = Gains(*(None for _ in Gains._fields))._replace(gain=gain, root=root, log_norm=log_norm)
    return _total(rows, y.shape[-2] - 1, ssm, y, u)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _what_means_need(freeze: bool, ssm: LinearGaussianSSM, observed: Array) -> tuple[Array, Array, Array]:
    """`Kbar`, `S^-1/2` and `log_norm` of all steps."""
    rows = _rows(ssm, observed, freeze)
    return batch_first((rows.gain, rows.root, rows.log_norm))


def _rows(ssm: LinearGaussianSSM, observed: Array, freeze: bool) -> Gains:
    gaps = ~observed
    return with_gains(lambda rows, last, *_: spread_rows(rows, last, len(gaps)), ssm, None, gaps=gaps, freeze=freeze)


@_what_means_need.defjvp
def _what_means_need_jvp(freeze: bool, primals: tuple, tangents: tuple) -> tuple:
    """In closed form, linear in `D`, which is such that `D L' + L D'` is the derivative of the covariance `L L'`.

    With `T = S^-1/2 [dC L + C D, dchol_R]`, `G = T [Q11, Q12]'` and `H` the first columns of `T`,

        d log_norm = -tr G      d S^-1/2 = -(G + G') S^-1/2 / 2      d Kbar = D Q11' + L H' - Kbar (G + G') / 2
        D <- (D - K (dC L + C D)) Q21' - K dchol_R Q22',             D <- (A D + dA L+) Q1' + dchol_Q Q2'

    A rotation of `S^-1/2` has been left out: no log-likelihood changes with it. Its transpose is `gam` once more.
    """
    ssm, observed = primals
    rows = _rows(ssm, observed, freeze)
    n_obs, n = ssm.C.shape[-2:]

    def step(D: Array, xs: tuple) -> tuple[Array, tuple[Array, Array, Array]]:
        row, seen, timed, d_timed = xs
        now, change = ssm.at(timed), tangents[0].at(d_timed)
        q_obs, q_state = row.turn[:n_obs], row.turn[n_obs:]
        by_state = matmul(change.C, row.chol) + matmul(now.C, D)
        top = jnp.where(seen[:, None], jnp.concatenate([by_state, change.chol_R], axis=1), 0.0)
        turned = matmul(row.root, top)
        g = matmul(turned, q_obs.T)
        both = 0.5 * (g + g.T)
        d_gain = matmul(D, q_obs[:, :n].T) + matmul(row.chol, turned[:, :n].T) - matmul(row.gain, both)
        D = matmul(D, q_state[:, :n].T) - matmul(row.gain, matmul(turned, q_state.T))
        moved = jnp.concatenate([matmul(now.A, D) + matmul(change.A, row.new_chol), change.chol_Q], axis=1)
        return matmul(moved, row.turn_next.T), (d_gain, -matmul(both, row.root), -jnp.trace(g))

    turn = orthogonalise(ssm.chol_P0)[1]
    timed, d_timed = (timed_fields(x, ahead=True, names=OF_COVARIANCES) for x in (ssm, tangents[0]))
    xs = rows, observed, timed, d_timed
    changes = jax.lax.scan(step, matmul(tangents[0].chol_P0, turn.T), xs)[1]
    return batch_first(((rows.gain, rows.root, rows.log_norm), changes))


# ------------------------------------------------------------------------------------------------------- standing still


class _Powers(NamedTuple):
    """`F'` (`back`) and `Theta` (`turn`) of `gam <- F' gam Theta`, with the powers that make the sum over all steps.

    `window` is a power of two, `vanishes` tells whether `Theta^window` is below rounding.
    """

    back: Array
    turn: Array
    window: Array
    vanishes: Array

    def solve(self, x: Array) -> Array:
        """`x + F' x Theta + F'^2 x Theta^2 + ...` up to the window, by doubling."""

        def double(state: tuple) -> tuple:
            count, x, back, turn = state
            return 2 * count, x + back @ x @ turn, back @ back, turn @ turn

        return jax.lax.while_loop(lambda s: s[0] < self.window, double, (1, x, self.back, self.turn))[1]


def _powers(ssm: LinearGaussianSSM, row: Gains, length: int) -> _Powers:
    n_obs, n = ssm.C.shape
    turn = row.turn_next[:, :n] @ row.turn[n_obs:, :n]
    back = ssm.A.T - ssm.C.T @ (row.root.T @ (row.gain.T @ ssm.A.T))
    rounding = jnp.finfo(turn.dtype).eps

    def square(state: tuple) -> tuple:
        count, power = state
        return 2 * count, power @ power

    def large(state: tuple) -> Array:
        return (state[0] < length) & (jnp.sum(state[1] ** 2) > rounding**2)

    window, power = jax.lax.while_loop(large, square, (1, turn))
    return _Powers(back, turn, window, jnp.sum(power**2) <= rounding**2)
