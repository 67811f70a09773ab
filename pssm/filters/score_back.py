"""The derivative of the log-likelihood in closed form, for one series: a recursion back through every step.

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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import OF_COVARIANCES, Gains, by_step, every_step, timed_fields
from pssm.filters.means import Means, scan_means, shift
from pssm.linalg import orthogonalise, solve_lower
from pssm.linalg.small import matmul, matvec, unroll
from pssm.ssm import FIELDS, TRANSITION, LinearGaussianSSM, rebuild


def score(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, tuple]:
    """The log-likelihood and its gradient with respect to `(ssm, y, u)`, every step computed."""
    n = ssm.n_state
    rows, last = every_step(ssm, ~jnp.isnan(y)), y.shape[0] - 1
    means, log_liks = scan_means(rows, last, ssm, y, u)
    back = scan_back(rows, last, ssm, means)

    def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], dict[str, Array]]:
        gam, rho = carry
        row, w, lam, timed = xs
        grads, gam = covariances_back(ssm.at(timed), row, products_of(w, lam), gam)
        return (gam, rho_back(row, w, rho)), grads

    start = jnp.zeros((n, n), y.dtype), jnp.zeros(n, y.dtype)
    xs = rows, means.whitened, back.lam, timed_fields(ssm, ahead=True, names=OF_COVARIANCES)
    (gam, rho), grads = jax.lax.scan(step, start, xs, reverse=True)
    sums = {name: g if name in ssm.time_varying else g.sum(0) for name, g in grads.items()}
    return log_liks.sum(), gradient_of(ssm, u, means, back, sums, gam, rho)


# ------------------------------------------------------------------------------------------------------- one step back


class Back(NamedTuple):
    """Derivatives with respect to the next predicted mean, to the filtered mean, and to the observation (`d`)."""

    next_lam: Array
    lam: Array
    residual: Array


class Products(NamedTuple):
    """`w w'`, `lam w'` and the number of steps they are summed over."""

    ww: Array
    lam_w: Array
    count: Array | int


def products_of(w: Array, lam: Array) -> Products:
    """Those of one step."""
    return Products(w[:, None] * w[None, :], lam[:, None] * w[None, :], 1)


def scan_back(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, means: Means) -> Back:
    """The first recursion of the module's head, over the data."""
    row_xs, row_of_step = by_step((rows.gain, rows.root), last, means.whitened.shape[0])

    def step(next_lam: Array, xs: tuple) -> tuple[Array, Back]:
        row, w, timed = xs
        now = ssm.at(timed)
        gain, root = row_of_step(row)
        lam = matvec(now.A.T, next_lam)
        residual = matvec(root.T, matvec(gain.T, lam) - w)
        return lam - matvec(now.C.T, residual), Back(next_lam, lam, residual)

    xs = row_xs, means.whitened, timed_fields(ssm, ahead=True, names=("A", "C"))
    start = jnp.zeros_like(means.mean[0])
    return jax.lax.scan(step, start, xs, reverse=True, unroll=unroll(ssm.n_state))[1]


def covariances_back(
    ssm: LinearGaussianSSM, row: Gains, products: Products, gam: Array
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


def rho_back(row: Gains, w: Array, rho: Array) -> Array:
    """One step of the recursion for `rho`."""
    n = rho.shape[0]
    return matvec(row.turn[:, :n].T, jnp.concatenate([w, matvec(row.turn_next[:, :n].T, rho)]))


def gradient_of(
    ssm: LinearGaussianSSM,
    u: Array | None,
    means: Means,
    back: Back,
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
    u_grad: Any = None if u is None else jnp.zeros_like(u)
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
    return rebuild(fields, ssm.time_varying), back.residual, u_grad


def _delay(g: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(g[:1]), g[:-1]])
