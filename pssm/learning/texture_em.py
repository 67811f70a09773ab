"""EM for dynamic textures, in the principal coordinates of a clip, with one noise variance for all pixels.

Maximum likelihood has `state^2` numbers of a transition to learn from as many frames as a clip has, and shrinks the
noise of directions that it fits by chance: the next frames of the clip are then very unlikely. The prior has the weight
of some transitions in which each component of the clip moves by itself.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array
from pssm.filters import kalman_smoother
from pssm.learning.em import LikelihoodFellError
from pssm.ssm import LinearGaussianSSM


class Numbers(NamedTuple):
    """The learned parameters; `C` `(coordinates, state)` is orthonormal. `m0` and `chol_P0` change with the basis."""

    C: np.ndarray
    A: np.ndarray
    chol_Q: np.ndarray
    sigma: float
    m0: np.ndarray
    chol_P0: np.ndarray


class Transitions(NamedTuple):
    """Sums over transitions from `z` to `w`: `z z'`, `w z'`, `w w'`, and their number."""

    before: np.ndarray
    cross: np.ndarray
    after: np.ndarray
    count: float

    def plus(self, other: "Transitions") -> "Transitions":
        """Both."""
        return Transitions(*(a + b for a, b in zip(self, other, strict=True)))

    def turned(self, turn: np.ndarray) -> "Transitions":
        """The same in another basis of the states."""
        return Transitions(*(turn @ x @ turn.T for x in self[:3]), self.count)

    def left(self, A: np.ndarray) -> np.ndarray:
        """Sum of the squared errors of `A`, `(state, state)`."""
        return self.after - A @ self.cross.T - self.cross @ A.T + A @ self.before @ A.T

    def log_density(self, A: np.ndarray, chol_Q: np.ndarray) -> float:
        """Log density of the transitions, up to a constant; 0 where there are none."""
        if not self.count:
            return 0.0
        Q = chol_Q @ chol_Q.T
        return -0.5 * (self.count * np.linalg.slogdet(Q)[1] + float(np.trace(np.linalg.solve(Q, self.left(A)))))


def own_autoregressions(states: np.ndarray, count: float) -> Transitions:
    """`count` transitions in which each state follows the autoregression of order one that fits it best."""
    before, after = (np.mean(z**2, axis=0) for z in (states[:-1], states[1:]))
    cross = np.mean(states[1:] * states[:-1], axis=0)
    return Transitions(*(count * np.diag(x) for x in (before, cross, after)), count)


def improve(
    x: np.ndarray,
    energy: float,
    pixels: int,
    start: Numbers,
    prior: Transitions,
    *,
    noise_factor: Callable[[np.ndarray], np.ndarray],
    num_iters: int,
    tol: float,
    slack: float,
    made: Callable[[Numbers], Any],
) -> Any:
    """`made` of the numbers at the end of EM.

    After each step `C` is made orthonormal by a change of the state's basis, which the prior follows.

    Args:
        x: the clip in its principal coordinates, `(time, coordinates)`.
        energy: sum of squares of the clip about its mean, over all pixels.
        pixels: their number; the noise is shared by all of them.
        start: where to begin.
        prior: transitions of the prior, in the basis of `start`.
        noise_factor: a factor of `Q` of any factor of it, `(state, columns)`.
        num_iters: most iterations.
        tol: relative gain of the objective at which it stops.
        slack: relative fall of the objective that counts as rounding.
        made: the result of the numbers.

    Raises:
        LikelihoodFellError: the objective, log-likelihood plus log prior, fell.
    """
    length, n = len(x), len(start.A)
    found, before, log_turn = start, -math.inf, 0.0
    for count in range(num_iters + 1):
        C, A, chol_Q, sigma, m0, chol_P0 = found
        eye = jnp.eye(n)
        model = LinearGaussianSSM(m0, chol_P0, A, chol_Q, eye, sigma * eye)
        means, S00, S10, S11, Szz, value = (np.asarray(v, float) for v in _expectations(model, jnp.asarray(x @ C)))
        left = energy - float(np.sum((x @ C) ** 2))
        total = float(value) - 0.5 * (length * (pixels - n) * math.log(2 * math.pi * sigma**2) + left / sigma**2)
        total += prior.log_density(A, chol_Q) + prior.count * log_turn
        if total < before - slack * abs(total):
            raise LikelihoodFellError(f"The objective fell from {before} to {total} in iteration {count}.", made(found))
        if count == num_iters or total - before < tol * abs(total):
            break
        before = total
        seen = Transitions(S00, S10, S11, length - 1).plus(prior)
        A = np.linalg.solve(seen.before, seen.cross.T).T
        noise = seen.left(A) / seen.count
        values, vectors = np.linalg.eigh(0.5 * (noise + noise.T))
        chol_Q = noise_factor(vectors * np.sqrt(np.maximum(values, 0.0)))
        C = np.linalg.solve(Szz, means.T @ x).T
        cross = float(np.sum(C * (x.T @ means)))
        sigma = np.sqrt(max(energy - 2 * cross + float(np.sum((C.T @ C) * Szz)), 1e-12 * energy) / (length * pixels))
        C, turn = np.linalg.qr(C)
        prior, log_turn = prior.turned(turn), log_turn + np.linalg.slogdet(turn)[1]
        found = Numbers(C, turn @ A @ np.linalg.inv(turn), turn @ chol_Q, sigma, turn @ m0, turn @ chol_P0)
    return made(found)


@jax.jit
def _expectations(ssm: LinearGaussianSSM, y: Array) -> tuple[Array, ...]:
    s = kalman_smoother(ssm, y)
    second = s.cov + s.mean[:, :, None] * s.mean[:, None, :]
    lag = s.cross_cov + s.mean[1:, :, None] * s.mean[:-1, None, :]
    return s.mean, second[:-1].sum(0), lag.sum(0), second[1:].sum(0), second.sum(0), s.log_likelihood
