"""Results of filters, smoothers and forecasts: named tuples of arrays, with covariances made from factors."""

from typing import NamedTuple

from pssm._types import Array, Float
from pssm.linalg import outer


class PredictResult(NamedTuple):
    """The state one step ahead, before it is observed. Leading batch axes where the input had them.

    Attributes:
        mean: `E[z_t | y_{1:t-1}]`, `(state,)`.
        chol: lower-triangular factor of `Cov(z_t | y_{1:t-1})`, `(state, state)`.
    """

    mean: Array
    chol: Array

    @property
    def cov(self) -> Array:
        """`Cov(z_t | y_{1:t-1})`, `(state, state)`."""
        return outer(self.chol)


class UpdateResult(NamedTuple):
    """The state after one observation. Leading batch axes where the input had them.

    Attributes:
        mean: `E[z_t | y_{1:t}]`, `(state,)`.
        chol: lower-triangular factor of `Cov(z_t | y_{1:t})`, `(state, state)`.
        log_likelihood: `log p(y_t | y_{1:t-1})`, `()`; 0 where nothing is observed.
    """

    mean: Array
    chol: Array
    log_likelihood: Array

    @property
    def cov(self) -> Array:
        """`Cov(z_t | y_{1:t})`, `(state, state)`."""
        return outer(self.chol)


class FilterResult(NamedTuple):
    """The filtered and predicted moments at each time. Leading batch axes where the input had them.

    Attributes:
        log_likelihood: `log p(y_{1:T})`, exact, over the observed entries, `()`.
        log_likelihoods: `log p(y_t | y_{1:t-1})`, `(time,)`; 0 where all entries are missing.
        mean: `E[z_t | y_{1:t}]`, `(time, state)`.
        chol: lower-triangular factor of `Cov(z_t | y_{1:t})`, `(time, state, state)`.
        predicted_mean: `E[z_t | y_{1:t-1}]`, `(time, state)`.
        predicted_chol: factor of `Cov(z_t | y_{1:t-1})`, `(time, state, state)`.
    """

    log_likelihood: Float[Array, "*batch"]
    log_likelihoods: Float[Array, "*batch time"]
    mean: Float[Array, "*batch time state"]
    chol: Float[Array, "*batch time state state"]
    predicted_mean: Float[Array, "*batch time state"]
    predicted_chol: Float[Array, "*batch time state state"]

    @property
    def cov(self) -> Float[Array, "*batch time state state"]:
        """`Cov(z_t | y_{1:t})`, `(time, state, state)`."""
        return outer(self.chol)

    @property
    def predicted_cov(self) -> Float[Array, "*batch time state state"]:
        """`Cov(z_t | y_{1:t-1})`, `(time, state, state)`."""
        return outer(self.predicted_chol)


class SmootherResult(NamedTuple):
    """The posterior of the states given the whole series.

    Attributes:
        mean: `E[z_t | y_{1:T}]`, `(time, state)`.
        chol: lower-triangular factor of `Cov(z_t | y_{1:T})`, `(time, state, state)`.
        cross_cov: `Cov(z_{t+1}, z_t | y_{1:T})`, `(time - 1, state, state)`: rows belong to the LATER state.
        log_likelihood: `log p(y_{1:T})`, `()`.
    """

    mean: Float[Array, "*batch time state"]
    chol: Float[Array, "*batch time state state"]
    cross_cov: Float[Array, "*batch time-1 state state"]
    log_likelihood: Float[Array, "*batch"]

    @property
    def cov(self) -> Float[Array, "*batch time state state"]:
        """`Cov(z_t | y_{1:T})`, `(time, state, state)`."""
        return outer(self.chol)


class ForecastResult(NamedTuple):
    """Moments of the next `horizon` steps given the whole series.

    Attributes:
        mean: `E[y_{T+h} | y_{1:T}]`, `(horizon, obs)`.
        cov: `Cov(y_{T+h} | y_{1:T})`, `(horizon, obs, obs)`, observation noise included.
        state_mean: `E[z_{T+h} | y_{1:T}]`, `(horizon, state)`.
        state_cov: `Cov(z_{T+h} | y_{1:T})`, `(horizon, state, state)`.
    """

    mean: Float[Array, "*batch horizon obs"]
    cov: Float[Array, "*batch horizon obs obs"]
    state_mean: Float[Array, "*batch horizon state"]
    state_cov: Float[Array, "*batch horizon state state"]
