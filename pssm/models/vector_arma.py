"""Vector autoregressive moving averages as linear-Gaussian systems.

The state is the field's observable form: block `i` holds what the past and the present say of `y_{t+i-1}`,

    a_1 = y_t,   a_{i,t} = A_i a_{1,t-1} + a_{i+1,t-1} + Theta_{i-1} e_t

The map from the first state to the first values of the series has determinant 1, whatever the coefficients. With a
diffuse start the likelihood is therefore that of all values given the first ones, and no more is lost where some of
these are missing.
"""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pssm._types import Array, Float
from pssm.distributions.stable import stationary_vector_autoregression
from pssm.linalg import triangularise

DOUBLINGS = 20  # sums of 2^20 terms: roots up to 1 - 1e-5


def in_units_of(coefficients: Float[Array, "lags k k"], chol: Float[Array, "k k"]) -> Float[Array, "lags k k"]:
    """`chol A_j chol^{-1}`: coefficients of `chol x` from those of `x`."""
    return jax.vmap(lambda a: jsl.solve_triangular(chol, (chol @ a).T, lower=True, trans=1).T)(coefficients)


def observable_form(
    ar: Float[Array, "p k k"], ma: Float[Array, "q k k"], chol: Float[Array, "k k"]
) -> tuple[Array, Array, Array]:
    """`A`, `chol_Q` and `C` of the module's head.

    Args:
        ar: `A_1, ..., A_p`.
        ma: `Theta_1, ..., Theta_q`.
        chol: factor of the covariance of `e_t`.
    """
    k = chol.shape[0]
    blocks = max(len(ar), len(ma) + 1)
    ar = jnp.concatenate([ar, jnp.zeros((blocks - len(ar), k, k), chol.dtype)])
    spread = jnp.concatenate(
        [jnp.eye(k, dtype=chol.dtype)[None], ma, jnp.zeros((blocks - 1 - len(ma), k, k), chol.dtype)]
    )
    A = jnp.eye(blocks * k, k=k, dtype=chol.dtype).at[:, :k].set(ar.reshape(blocks * k, k))
    return A, (spread @ chol).reshape(blocks * k, k), jnp.eye(k, blocks * k, dtype=chol.dtype)


def stationary_factor(A: Float[Array, "n n"], chol_Q: Float[Array, "n q"]) -> Float[Array, "n n"]:
    """A factor of the stationary covariance `P = A P A' + Q` by doubling: each step adds as many terms as there are."""

    def double(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        factor, power = carry
        return (triangularise(jnp.concatenate([factor, power @ factor], axis=1)), power @ power), None

    return jax.lax.scan(double, (triangularise(chol_Q), A), None, length=DOUBLINGS)[0][0]


def stationary_start(
    X: Float[Array, "p k k"], ma: Float[Array, "q k k"], chol: Float[Array, "k k"]
) -> tuple[Array, Array]:
    """`A_1, ..., A_p` from free numbers, and a factor of the stationary covariance of the observable form.

    Args:
        X: as in `stationary_vector_autoregression`, which gives the covariance of neighbours in closed form.
        ma: `Theta_1, ..., Theta_q`; with these the covariance is summed up.
        chol: factor of the covariance of the innovations.
    """
    p, k, _ = X.shape
    unit, lags = stationary_vector_autoregression(X)
    ar = in_units_of(unit, chol)
    if len(ma):
        return ar, stationary_factor(*observable_form(ar, ma, chol)[:2])
    lags = (chol @ lags.reshape(p, k, p * k)).reshape(p * k, p * k)
    # Block i of the state is sum_{j >= i} A_j y_{t-(j-i+1)}; block 1 is y_t.
    rows = jnp.zeros((p, k, p, k), chol.dtype).at[0, :, 0].set(jnp.eye(k, dtype=chol.dtype))
    for i in range(1, p):
        for j in range(i, p):
            rows = rows.at[i, :, j - i + 1].set(ar[j])
    return ar, rows.reshape(p * k, p * k) @ lags
