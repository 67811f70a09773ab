"""Series of one model with the same gaps: one recursion for their gains, and one for the derivative of the gains.

The series themselves enter by the means alone, whose derivative is that of a scan of small products.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array
from pssm.filters.covariance import OF_COVARIANCES, Gains, spread_rows, timed_fields
from pssm.filters.passes import of_gains
from pssm.filters.plan import Plan
from pssm.linalg import orthogonalise
from pssm.linalg.small import batch_first, matmul
from pssm.ssm import LinearGaussianSSM


def shared_gains(plan: Plan, observed: Array, ssm: LinearGaussianSSM) -> Gains:
    """The part of the gains that means and log-likelihoods need, of every step; nothing else is there."""
    gain, root, log_norm, tied = _what_means_need(plan, ssm, observed)
    return Gains(*(None for _ in Gains._fields))._replace(gain=gain, root=root, log_norm=log_norm, tied=tied)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _what_means_need(plan: Plan, ssm: LinearGaussianSSM, observed: Array) -> tuple[Array, ...]:
    """`Kbar`, `S^-1/2`, `log_norm` and `tied` of all steps."""
    return batch_first(_needed(_rows(plan, ssm, observed)))


def _needed(rows: Gains) -> tuple[Array, ...]:
    return rows.gain, rows.root, rows.log_norm, rows.tied


def _rows(plan: Plan, ssm: LinearGaussianSSM, observed: Array) -> Gains:
    def spread(rows: Gains, last: Array | int, _: LinearGaussianSSM) -> Gains:
        tied = jnp.zeros(rows.log_norm.shape, bool) if rows.tied is None else rows.tied
        return spread_rows(rows._replace(tied=tied), last, len(observed))

    return of_gains(spread, plan, observed, ssm)


@_what_means_need.defjvp
def _what_means_need_jvp(plan: Plan, primals: tuple, tangents: tuple) -> tuple:
    """In closed form, linear in `D`, which is such that `D L' + L D'` is the derivative of the covariance `L L'`.

    With `T = S^-1/2 [dC L + C D, dchol_R]`, `G = T [Q11, Q12]'` and `H` the first columns of `T`,

        d log_norm = -tr G      d S^-1/2 = -(G + G') S^-1/2 / 2      d Kbar = D Q11' + L H' - Kbar (G + G') / 2
        D <- (D - K (dC L + C D)) Q21' - K dchol_R Q22',             D <- (A D + dA L+) Q1' + dchol_Q Q2'

    A rotation of `S^-1/2` has been left out: no log-likelihood changes with it. Its transpose is `gam` once more.
    """
    ssm, observed = primals
    rows = _rows(plan, ssm, observed)
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
    return batch_first((_needed(rows), (*changes, np.zeros(rows.tied.shape, jax.dtypes.float0))))
