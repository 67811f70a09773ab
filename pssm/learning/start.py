"""The start of EM: subspace identification, by regressions and one singular value decomposition.

The past predicts the future only through the state. The regression of the next few observations on the last few
therefore has rank `state`, up to noise; its leading directions are estimates of the states, and least squares on these
gives the matrices (Larimore 1990; Van Overschee & De Moor 1994).
"""

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Key
from pssm.ssm import LinearGaussianSSM

WIDEST = 200  # more lagged variables than this are cut to their principal components


def subspace_start(
    y: list[np.ndarray], num_states: int, u: list[np.ndarray] | None = None, *, offsets: bool = True
) -> LinearGaussianSSM:
    """A model with `num_states` states, from sequences `(time_i, obs)` in which NaN is missing.

    Missing entries are replaced by the variable's mean. The transition is shrunk where it would be unstable. Inputs,
    where given, enter both equations; `offsets` adds a mean `d` to the observations.
    """
    n, p = num_states, y[0].shape[1]
    together = np.concatenate(y)
    mean = np.nansum(together, axis=0) / np.maximum((~np.isnan(together)).sum(0), 1)
    filled = [np.where(np.isnan(x), mean, x) - (mean if offsets else 0.0) for x in y]
    inputs = [np.zeros((len(x), 0)) for x in y] if u is None else [np.asarray(x, float) for x in u]
    longest = max(len(x) for x in y)
    lags = int(np.clip(-(-n // p) + 1, 2, max(longest // 3, 1)))

    components = np.eye(p)
    if p * lags > WIDEST and p > n:
        components = np.linalg.svd(np.concatenate(filled), full_matrices=False)[2][: max(n, WIDEST // lags)].T
    reduced = [x @ components for x in filled]
    past, future, own, where = [], [], [], []
    for i, (x, v) in enumerate(zip(reduced, inputs, strict=True)):
        for t in range(lags, len(x) - lags + 1):
            past.append(np.concatenate([x[t - lags : t].ravel(), v[t - lags : t].ravel()]))
            future.append(x[t : t + lags].ravel())
            own.append(v[t : t + lags].ravel())
            where.append((i, t))
    states = _states(np.array(past), np.array(future), np.array(own), n) if len(where) > 1 else np.zeros((0, n))
    if len(where) <= n + 1:  # too short for lags: principal components in place of the states
        stacked = np.concatenate(filled)
        states = stacked @ np.linalg.svd(stacked, full_matrices=False)[2][:n].T
        states = np.pad(states, ((0, 0), (0, n - states.shape[1])))
        where = [(i, t) for i, x in enumerate(y) for t in range(len(x))]
    return _regressed(states, where, filled, inputs, mean if offsets else None, None if u is None else inputs)


def _states(past: np.ndarray, future: np.ndarray, own: np.ndarray, n: int) -> np.ndarray:
    """The part of the future that the past predicts, in `n` directions of unit variance."""
    coefficients = np.linalg.lstsq(np.concatenate([past, own], axis=1), future, rcond=1e-3)[0]
    predicted = past @ coefficients[: past.shape[1]]
    left, sizes, _ = np.linalg.svd(predicted, full_matrices=False)
    found = left[:, :n] * np.sqrt(len(left)) * (sizes[:n] > 1e-10 * sizes[0])
    return np.pad(found, ((0, 0), (0, n - found.shape[1])))


def _regressed(
    states: np.ndarray,
    where: list[tuple[int, int]],
    y: list[np.ndarray],
    u: list[np.ndarray],
    mean: np.ndarray | None,
    given: list[np.ndarray] | None,
) -> LinearGaussianSSM:
    n = states.shape[1]
    follows = [k for k in range(1, len(where)) if where[k][0] == where[k - 1][0] and where[k][1] == where[k - 1][1] + 1]
    before, after = states[[k - 1 for k in follows]], states[follows]
    now = np.array([u[where[k][0]][where[k][1]] for k in follows]).reshape(len(follows), -1)
    by_state, Q = _least_squares(np.concatenate([before, now], axis=1), after)
    seen = np.array([y[i][t] for i, t in where])
    held = np.array([u[i][t] for i, t in where]).reshape(len(where), -1)
    by_obs, R = _least_squares(np.concatenate([states, held], axis=1), seen)
    A = by_state[:, :n]
    radius = np.abs(np.linalg.eigvals(A)).max(initial=0.0)
    A = A * min(1.0, 0.99 / radius) if radius > 0 else 0.5 * np.eye(n)
    return LinearGaussianSSM.from_covariances(
        states.mean(0),
        np.cov(states.T).reshape(n, n) + 1e-3 * np.eye(n),
        A,
        Q,
        by_obs[:, :n],
        R,
        d=mean,
        B=None if given is None else by_state[:, n:],
        D=None if given is None else by_obs[:, n:],
    )


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients `(left, right)` and the covariance of the residuals, kept regular."""
    coefficients = np.linalg.lstsq(x, y, rcond=None)[0]
    rest = y - x @ coefficients
    cov = rest.T @ rest / max(len(y), 1)
    scale = np.mean(y**2) if y.size else 1.0
    return coefficients.T, cov + 1e-2 * max(scale, 1e-30) * np.eye(y.shape[1])


def perturbed(ssm: LinearGaussianSSM, key: Key, fixed: frozenset[str], size: float = 0.3) -> LinearGaussianSSM:
    """Another start near this one: `A` and `C` moved at random by `size` times the scale of their entries."""
    fields = {}
    for name, own_key in zip(("A", "C"), jax.random.split(key), strict=True):
        if name not in fixed:
            x = getattr(ssm, name)
            x = x + size * jnp.sqrt(jnp.mean(x**2)) * jax.random.normal(own_key, x.shape, x.dtype)
            radius = float(np.abs(np.linalg.eigvals(np.asarray(x))).max()) if name == "A" else 0.0
            fields[name] = x * min(1.0, 0.99 / radius) if radius > 0 else x
    return ssm.replace(**fields)
