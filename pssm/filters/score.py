"""The log-likelihood, and by which of its derivatives it is differentiated.

Differentiating the filter's triangularisations step by step is slow, and needless: `score_back.py` has the derivative
in closed form, `score_steady.py` takes all steps of a steady state at once, and `score_shared.py` has one recursion for
the gains that many series share.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pssm._types import Array, ArrayLike, Scalar
from pssm.batch import over_batches
from pssm.filters.collapse import collapsed_score, where_collapsed
from pssm.filters.covariance import Gains
from pssm.filters.diffuse import diffuse_log_likelihood
from pssm.filters.low_memory import low_memory_log_likelihood
from pssm.filters.means import scan_means
from pssm.filters.parallel import parallel_filter
from pssm.filters.passes import of_one_series, run, spread, where_gaps_agree
from pssm.filters.plan import METHODS, Plan, plan_for, prepare
from pssm.filters.refused import possible
from pssm.filters.score_back import score
from pssm.filters.score_shared import shared_gains
from pssm.filters.score_steady import steady_score
from pssm.ssm import LinearGaussianSSM


def log_likelihood(ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto") -> Scalar:
    """`log p(y_{1:T})`, exact, the states integrated out. Arguments and errors as in `kalman_filter`.

    Its gradient (also of second and higher order, forward and reverse) costs about as much again as its value:
    `"auto"` and `"sequential"` use the closed form of `score_back.py`, the others differentiate their recursion. There
    is one method more, `"low_memory"`, whose gradient keeps what `2 sqrt(T)` steps need, not `T`, and takes longer.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[0.5]], [[1.0]], [[1.0]], [[1.0]])
        >>> print(f"{log_likelihood(model, [0.3, -0.1]):.4f}")
        -2.5910

    Source:
        Koopman & Shephard 1992 for the score; the recursion here is written for means and covariances.
    """
    ssm, series, inputs = prepare(ssm, y, u, method, (*METHODS, "low_memory"))
    plan = plan_for(ssm, series, inputs, method=method, ends_matter=False)
    total = _log_likelihoods(plan, ssm, series, inputs)
    return possible(total, total, ssm, series, inputs)


@partial(jax.jit, static_argnames="plan")
def _log_likelihoods(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    series = (y, 2), (u, 2)
    if ssm.diffuse:

        def rest(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
            return _log_likelihoods(plan.for_rest(ssm, len(y)), ssm, y, u)

        return over_batches(partial(diffuse_log_likelihood, rest), ssm, *series)
    if plan.recursion == "low_memory":
        return over_batches(low_memory_log_likelihood, ssm, *series)
    if plan.recursion == "parallel":
        return over_batches(parallel_filter, ssm, *series).log_likelihood
    if not plan.score:
        return run(_total, plan, ssm, y, u)
    if not plan.shared_gains:
        return over_batches(partial(_scored, plan), ssm, *series)

    def together(observed: Array) -> Array:
        whole, inputs = spread(*series)
        return _total(shared_gains(plan, observed, ssm), y.shape[-2] - 1, ssm, whole, inputs)

    return where_gaps_agree(plan, y, together, lambda: over_batches(partial(_scored, plan.every_step()), ssm, *series))


def _total(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return scan_means(rows, last, ssm, y, u)[1].sum(0).reshape(y.shape[:-2])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scored(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    """The log-likelihood of one series with gains of its own."""
    return of_one_series(_total, plan, ssm, y, u)


@_scored.defjvp
def _scored_jvp(plan: Plan, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The derivative of a scalar is its gradient times the tangents: linear, so it serves forward and reverse mode."""
    general = steady_score if plan.steady_state else score
    if plan.collapse:
        value, gradient = where_collapsed(partial(collapsed_score, score), general, *primals)
    else:
        value, gradient = general(*primals)
    products = jax.tree.map(jnp.vdot, gradient, tangents)
    return value, sum(jax.tree.leaves(products), jnp.zeros_like(value))
