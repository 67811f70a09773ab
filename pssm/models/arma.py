"""Autoregressive moving averages as linear-Gaussian systems, for one series and in closed form.

`w_t` with `phi(L) w_t = theta(L) e_t` is a moving sum of a pure autoregression: `w = theta(L) v` with `phi(L) v = e`.
So the state is `(v_t, ..., v_{t-n+1})`, read by `C = (1, theta_1, ...)` without noise, and the covariance of its
stationary start is that of neighbours in an autoregression, for which the Durbin-Levinson recursion gives a triangular
factor. No Lyapunov equation is solved, which 32 bits would not bear near a unit root.

Sums of differences are undone by states: with `delta(L) = (1 - L)^d (1 - L^s)^D`, `x_t = sum_j delta_j x_{t-j} + w_t`,
the lags `x_{t-1}, ...` stand beside the `v`, and their start is diffuse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array, ArrayLike, Float


class Orders(NamedTuple):
    """Orders of a seasonal autoregressive integrated moving average, `(p, d, q) x (P, D, Q)_s`."""

    p: int
    d: int
    q: int
    P: int = 0
    D: int = 0
    Q: int = 0
    s: int = 0

    @property
    def lags(self) -> int:
        """Lags in the product of the differences: the states with a diffuse start."""
        return self.d + self.s * self.D

    @property
    def memory(self) -> int:
        """Neighbours `v` in the state of the stationary part."""
        return max(self.p + self.s * self.P, self.q + self.s * self.Q + 1)


class Arima(NamedTuple):
    """A system of one series: `m0`, `chol_P0`, `A`, `chol_Q`, `C`, `b`, and which states have a diffuse start."""

    m0: Array
    chol_P0: Array
    A: Array
    chol_Q: Array
    C: Array
    b: Array
    diffuse: np.ndarray
    names: tuple[str, ...]


def differences(orders: Orders) -> np.ndarray:
    """Coefficients `delta_1, ...` of `x_t = sum_j delta_j x_{t-j} + w_t`, whole numbers."""
    poly = np.ones(1)
    for _ in range(orders.d):
        poly = np.convolve(poly, [1.0, -1.0])
    for _ in range(orders.D):
        poly = np.convolve(poly, np.concatenate([[1.0], np.zeros(orders.s - 1), [-1.0]]))
    return -poly[1:]


def times_seasonal(near: Float[Array, "near"], far: Float[Array, "far"], s: int, sign: float) -> Float[Array, "lags"]:
    """Coefficients of `(1 + sign sum_i near_i L^i)(1 + sign sum_j far_j L^(s j))`, without the one and the sign."""
    if not len(far):
        return near
    one = jnp.ones(1, near.dtype)
    spaced = jnp.zeros(s * len(far), near.dtype).at[s - 1 :: s].set(far)
    return sign * jnp.convolve(jnp.concatenate([one, sign * near]), jnp.concatenate([one, sign * spaced]))[1:]


def coefficients(partial: Float[Array, "order"]) -> Float[Array, "order"]:
    """`phi` of a stationary autoregression from its partial autocorrelations, each within (-1, 1).

    Source:
        Barndorff-Nielsen & Schou 1973; Monahan 1984.
    """
    phi = partial[:0]
    for r in partial:
        phi = jnp.concatenate([phi - r * phi[::-1], r[None]])
    return phi


def invertible(partial: Float[Array, "order"]) -> Float[Array, "order"]:
    """`theta` of an invertible moving average, whose last coefficient is the last number; of order 1, the number."""
    return -coefficients(-partial)


def partial_autocorrelations(phi: Float[Array, "order"]) -> Float[Array, "order"]:
    """The inverse of `coefficients`, for a stationary `phi`: the Durbin-Levinson recursion run down.

    Outside of the stationary region some entry has a modulus of 1 or more.
    """
    n = phi.shape[0]
    place = jnp.arange(n)

    def down(phi: Array, k: Array) -> tuple[Array, Array]:
        r = phi[k]
        mirrored = jnp.where(place < k, phi[jnp.clip(k - 1 - place, 0)], 0.0)
        return jnp.where(place < k, phi + r * mirrored, 0.0) / (1 - r**2), r

    _, partial = jax.lax.scan(down, phi, jnp.arange(n - 1, -1, -1))
    return partial[::-1]


def neighbours(phi: Float[Array, "n"], sigma: ArrayLike, partial: Float[Array, "n"]) -> Float[Array, "n n"]:
    """Lower-triangular factor of the covariance of `n` neighbours in a stationary autoregression of order `n` or less.

    Args:
        phi: its coefficients, padded with zeros.
        sigma: standard deviation of the innovations.
        partial: its partial autocorrelations, padded with zeros.
    """
    n = phi.shape[0]
    place = jnp.arange(n)
    sds = sigma * jnp.sqrt(jnp.cumprod((1 / (1 - partial**2))[::-1])[::-1])  # given none, one, ... neighbours

    def up(carry: tuple[Array, Array], xs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        found, rows = carry
        k, r, sd = xs
        mirrored = jnp.where(place < k, found[jnp.clip(k - 1 - place, 0)], 0.0)
        found = jnp.where(place == k, r, found - r * mirrored)
        # x_{k+1} = found_1 x_k + ... + found_k x_1 + sd e, with found now of order k + 1
        weights = jnp.where(place <= k, found[jnp.clip(k - place, 0)], 0.0)
        row = weights @ rows + jnp.where(place == k + 1, sd, 0.0)
        rows = jnp.where((place == k + 1)[:, None], row, rows)
        return (found, rows), None

    first = jnp.where((place == 0)[:, None] & (place == 0), sds[0], 0.0)
    xs = jnp.arange(n - 1), partial[: n - 1], sds[1:]
    (_, rows), _ = jax.lax.scan(up, (jnp.zeros_like(phi), first), xs)
    return rows


def arima(
    orders: Orders,
    phi: Float[Array, "p"],
    theta: Float[Array, "q"],
    seasonal_phi: Float[Array, "P"],
    seasonal_theta: Float[Array, "Q"],
    sigma: Array,
    drift: Array | None = None,
    slope: Array | None = None,
    partial: Float[Array, "p"] | None = None,
) -> Arima:
    """The system of `phi(L) Phi(L^s) (delta(L) x_t - drift - slope (t - 1)) = theta(L) Theta(L^s) e_t`.

    Args:
        orders: of all parts.
        phi: coefficients of the autoregression, `w_t = phi_1 w_{t-1} + ...`.
        theta: of the moving average, `e_t + theta_1 e_{t-1} + ...`.
        seasonal_phi: likewise, at multiples of the season.
        seasonal_theta: likewise.
        sigma: standard deviation of `e_t`.
        drift: mean of the differenced series, at the first step.
        slope: change of that mean in a step.
        partial: partial autocorrelations of `phi`, where they are known and there is no seasonal part.

    Returns:
        An `Arima`; `chol_P0` is zero for the states whose start is diffuse.
    """
    dtype = jnp.result_type(sigma)
    m, n, timed = orders.lags, orders.memory, slope is not None
    size = m + n + timed
    ar = jnp.pad(times_seasonal(phi, seasonal_phi, orders.s, -1.0), (0, n - orders.p - orders.s * orders.P))
    ma = times_seasonal(theta, seasonal_theta, orders.s, 1.0)
    known = partial is not None and not orders.P
    partials = jnp.pad(partial, (0, n - orders.p)) if known else partial_autocorrelations(ar)  # pyright: ignore[reportArgumentType]
    drift = jnp.zeros((), dtype) if drift is None else drift
    C = jnp.zeros(size, dtype).at[:m].set(differences(orders)).at[m].set(1.0).at[m + 1 : m + 1 + len(ma)].set(ma)
    A = jnp.eye(size, k=-1, dtype=dtype).at[m].set(0.0).at[m, m : m + n].set(ar)
    b = jnp.zeros(size, dtype)
    m0 = jnp.zeros(size, dtype)
    if timed:
        C, m0, b = C.at[-1].set(1.0), m0.at[-1].set(drift), b.at[-1].set(slope)
        A = A.at[-1].set(0.0).at[-1, -1].set(1.0)
    if m:
        A = A.at[0].set(C)
        b = b if timed else b.at[0].set(drift)
    chol = jnp.zeros((size, size), dtype).at[m : m + n, m : m + n].set(neighbours(ar, sigma, partials)[::-1])
    names = (
        *(f"lag{i}" for i in range(1, m + 1)),
        "arma",
        *(f"arma_lag{i}" for i in range(1, n)),
        *(["drift"] * timed),
    )
    noise = jnp.zeros((size, 1), dtype).at[m, 0].set(sigma)
    return Arima(m0, chol, A, noise, C[None], b, np.arange(size) < m, names)
