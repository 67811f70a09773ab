"""Linear stochastic differential equations observed at any times: exact discretisation, and components to add up.

    dz = F z dt + L dW,    Cov(dW) = 1 dt,    y_i = C z(t_i) + noise

Between two times `d` apart the solution is `z' = e^{F d} z + N(0, Q)` with `Q = int_0^d e^{F s} L L' e^{F' s} ds`, so
that a series observed at uneven times is a `LinearGaussianSSM` whose `A` and `chol_Q` vary. This is exact.

Source:
    Van Loan 1978; Särkkä & Solin 2019, chapters 6 and 12; Matern processes: Hartikainen & Särkkä 2010.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np

from pssm._checks import as_float, check_choice, check_finite, check_shape, is_traced
from pssm._types import Array, ArrayLike, Float
from pssm.linalg import factor_from_covariance, triangularise
from pssm.linalg.small import TINY, matmul
from pssm.ssm import LinearGaussianSSM

__all__ = ["LinearSDE", "discretise", "integrated_walk", "matern", "oscillator"]

DOUBLINGS = 10


class LinearSDE(NamedTuple):
    """A linear equation of motion, with its start and its observed part.

    Attributes:
        F: drift, `(state, state)`, per unit of time.
        L: diffusion, `(state, noise)`, per square root of time.
        C: the emission matrix, `(obs, state)`.
        m0: mean of the first state, `(state,)`.
        P0: its covariance, `(state, state)`; for a stationary process the stationary one.
    """

    F: Array
    L: Array
    C: Array
    m0: Array
    P0: Array

    def __add__(self, other: "LinearSDE") -> "LinearSDE":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Independent processes whose contributions to the observation add up."""
        return LinearSDE(
            jsl.block_diag(self.F, other.F),
            jsl.block_diag(self.L, other.L),
            jnp.concatenate([self.C, other.C], axis=1),
            jnp.concatenate([self.m0, other.m0]),
            jsl.block_diag(self.P0, other.P0),
        )

    def at(self, t: ArrayLike, chol_R: ArrayLike, *, d: ArrayLike | None = None) -> LinearGaussianSSM:
        """The model of observations at the times `t`, `(time,)`, in order; equal times are allowed.

        Args:
            t: times.
            chol_R: factor of the observations' noise, `(obs, obs)`.
            d: offset of the observations, `(obs,)`.

        Example:
            >>> model = matern(1.0, 2.0).at([0.0, 0.1, 1.7], [[0.1]])
            >>> model.time_varying
            ('A', 'chol_Q')
        """
        A, chol_Q = jax.vmap(lambda step: discretise(self.F, self.L, step))(gaps_between(t))
        chol_P0 = factor_from_covariance("P0", self.P0)
        return LinearGaussianSSM(self.m0, chol_P0, A, chol_Q, self.C, chol_R, d=d, time_varying=("A", "chol_Q"))


def gaps_between(t: ArrayLike) -> Float[Array, " time"]:
    """The time that passes before each of the times `t`, which must not go back; 0 before the first.

    Under `jit`, where times that go back cannot be refused, the time before such a step is NaN, as are all densities.
    """
    times = as_float("t", t)
    if times.ndim != 1 or not len(times):
        raise ValueError(f"`t` must have shape (time,) with at least one time; got {times.shape}.")
    check_finite("t", times)
    if is_traced(t) or isinstance(t, jax.Array):
        steps = jnp.diff(times, prepend=times[:1])
    else:  # of 64-bit numbers: 32 bits do not tell seconds since 1970 apart
        exact = np.asarray(t, np.float64)
        steps = jnp.asarray(np.diff(exact, prepend=exact[:1]), times.dtype)
    if not is_traced(steps) and bool((steps < 0).any()):
        raise ValueError(f"`t` must not go back; it does at index {int(jnp.argmax(steps < 0))}.")
    return jnp.where(steps < 0, jnp.nan, steps)


def discretise(
    F: Float[Array, "state state"], L: Float[Array, "state noise"], step: ArrayLike
) -> tuple[Float[Array, "state state"], Float[Array, "state state"]]:
    """`e^{F step}` and a factor of the noise that comes in within `step`; exact, by one matrix exponential.

    The exponential of `[[-F, L L'], [0, F']] h` has `e^{F' h}` in its last block and `e^{-F h} Q` beside it. The former
    vanishes and the latter explodes where `h` is long; so `h` is a small part of the step, doubled again and again.
    """
    n = F.shape[0]
    zero = jnp.zeros_like(F)
    block = jsl.expm(jnp.block([[-F, L @ L.T], [zero, F.T]]) * (step / 2**DOUBLINGS))
    A = block[n:, n:].T
    Q = A @ block[:n, n:]

    def double(_: int, both: tuple[Array, Array]) -> tuple[Array, Array]:
        A, chol = both
        return matmul(A, A), triangularise(jnp.concatenate([matmul(A, chol), chol], axis=1))

    return jax.lax.fori_loop(0, DOUBLINGS, double, (A, semidefinite_cholesky(0.5 * (Q + Q.T))))


def semidefinite_cholesky(cov: Float[Array, "state state"]) -> Float[Array, "state state"]:
    """Lower-triangular factor of a covariance that may be singular; pivots below rounding count as zero."""
    n = cov.shape[0]
    variances = jnp.diagonal(cov)
    scale = jnp.sqrt(jnp.where(variances > 0, variances, 1.0))
    rest = cov / scale / scale[:, None]
    least = 4 * max(n, TINY) * jnp.finfo(cov.dtype).eps
    columns = []
    for i in range(n):
        live = rest[i, i] > least
        pivot = jnp.sqrt(jnp.where(live, rest[i, i], 1.0))
        column = jnp.where(live & (jnp.arange(n) >= i), rest[:, i] / pivot, 0.0)
        rest = rest - column[:, None] * column
        columns.append(column)
    return scale[:, None] * jnp.stack(columns, axis=1)


def matern(lengthscale: ArrayLike, scale: ArrayLike, *, smoothness: float = 1.5) -> LinearSDE:
    """A stationary Gaussian process with a Matern covariance of standard deviation `scale`.

    Args:
        lengthscale: in units of time.
        scale: standard deviation of the process.
        smoothness: 0.5 (Ornstein-Uhlenbeck, `exp(-d / lengthscale)`), 1.5 or 2.5.
    """
    check_choice("smoothness", smoothness, (0.5, 1.5, 2.5))
    order = int(smoothness + 0.5)
    rate = math.sqrt(2 * smoothness) / jnp.asarray(lengthscale, jnp.result_type(float))
    # (d/dt + rate)^order x = noise, in the states x, x', x'' in units of rate: no large and small entries side by side.
    weights = jnp.array([-math.comb(order, k) for k in range(order)], rate.dtype)
    F = rate * jnp.concatenate([jnp.eye(order - 1, order, 1), weights[None]])
    spread = {1: 2.0, 2: 4.0, 3: 16.0 / 3.0}[order]
    L = jnp.zeros((order, 1)).at[-1, 0].set(scale * jnp.sqrt(spread * rate))
    cov = {1: [[1.0]], 2: [[1.0, 0.0], [0.0, 1.0]], 3: [[1.0, 0.0, -1 / 3], [0.0, 1 / 3, 0.0], [-1 / 3, 0.0, 1.0]]}
    C = jnp.eye(1, order)
    return LinearSDE(F, L, C, jnp.zeros(order), jnp.asarray(scale) ** 2 * jnp.array(cov[order], rate.dtype))


def oscillator(period: ArrayLike, decay: ArrayLike, scale: ArrayLike) -> LinearSDE:
    """A stationary oscillation of random phase: covariance `scale^2 exp(-d / decay) cos(2 pi d / period)`.

    Args:
        period: in units of time.
        decay: time after which the phase is forgotten.
        scale: standard deviation.
    """
    turn = 2 * jnp.pi / jnp.asarray(period, jnp.result_type(float))
    rate = 1.0 / jnp.asarray(decay, turn.dtype)
    F = jnp.array([[0.0, -1.0], [1.0, 0.0]]) * turn - rate * jnp.eye(2)
    L = scale * jnp.sqrt(2 * rate) * jnp.eye(2)
    return LinearSDE(F, L, jnp.eye(1, 2), jnp.zeros(2), jnp.asarray(scale) ** 2 * jnp.eye(2))


def integrated_walk(scale: ArrayLike, *, order: int = 1, start: ArrayLike | None = None) -> LinearSDE:
    """A Brownian motion (`order=1`), or the one whose slope is one (`order=2`): the local level and the smooth trend.

    Args:
        scale: of the Brownian motion, per square root of time.
        order: number of states.
        start: standard deviations of the first state, `(order,)`; 1 by default.
    """
    check_choice("order", order, (1, 2, 3))
    sd = jnp.ones(order) if start is None else as_float("start", start)
    check_shape("start", sd, (order,), "state")
    L = jnp.zeros((order, 1)).at[-1, 0].set(scale)
    return LinearSDE(jnp.eye(order, k=1), L, jnp.eye(1, order), jnp.zeros(order), jnp.diag(sd**2))
