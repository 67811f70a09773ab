"""Kalman autoencoders: frames decoded from codes `a_t` that follow a state-space model, as plain NumPyro functions.

Their guide is `guides.AmortizedFrames`. A frame depends on its code alone; the other parts of the state serve only to
predict.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import also_called, check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions import HistoryMarginal, StatePath, observe
from pssm.distributions.state_path import path_site
from pssm.linalg import Diagonal
from pssm.models.deep import EMISSIONS, emitted, registered_decoder
from pssm.models.several import About, at_each, in_trials, look_at
from pssm.nets import HistoryWeights, LocallyLinearTransition
from pssm.register import register
from pssm.ssm import LinearGaussianSSM

STARTS = ("normal", "hierarchical")


class Bases(eqx.Module):
    """The matrices that `kalman_vae` mixes: `A` near the identity, `B` and `C` small, all different."""

    A: Array
    B: Array
    C: Array

    def __init__(self, num_bases: int, n_state: int, n_obs: int, n_input: int):
        one, two = jax.random.split(jax.random.key(1))
        self.A = jnp.broadcast_to(jnp.eye(n_state), (num_bases, n_state, n_state)) + 0.0
        self.B = 0.05 * jax.random.normal(one, (num_bases, n_state, n_input))
        self.C = 0.05 * jax.random.normal(two, (num_bases, n_obs, n_state))


@also_called(n_state="num_states")
def kalman_vae(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    num_states: int = 4,
    num_codes: int = 2,
    num_bases: int = 3,
    num_obs: int | None = None,
    num_trials: int | None = None,
    batch_size: int | None = None,
    weights: Any = None,
    decoder: Callable[[Array], Array] | None = None,
    emission: str = "gaussian",
    sigma_obs: float | None = None,
    sigma_state: float = 0.28,
    sigma_code: float = 0.17,
    sigma_start: float = 4.5,
    hidden: int = 64,
) -> None:
    """The Kalman variational autoencoder: `y_t ~ p(y | decoder(a_t))`, codes `a` from a mixture of linear systems.

        z_t ~ N(A_t z_{t-1} + B_t u_t, sigma_state^2),   a_t ~ N(C_t z_t, sigma_code^2),   z_1 ~ N(0, sigma_start^2)

    `A_t`, `B_t`, `C_t` are mixtures of `num_bases` matrices with weights from the codes before t (an LSTM). Given the
    codes the states are integrated out exactly: `a` `(time, code)` is the only latent site, a `HistoryMarginal`, and
    the code of a missing frame follows from the dynamics. For the states see `HistoryMarginal.states`. The noises are
    held, which fixes the units of the codes.

    Args:
        y: data `(time, obs)` or `(trial, time, obs)`, a frame's pixels in a row; NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        u: inputs, `(time, input)` or `(trial, time, input)`.
        num_states: size of the state; `n_state` is a second name for it.
        num_codes: size of the code.
        num_bases: number of linear systems.
        num_obs: number of observed variables, needed where `y` is None.
        num_trials: number of trials where `y` is None; None for one series.
        batch_size: number of trials that a step of SVI takes, at random; all by default.
        weights: as `nets.HistoryWeights`, which it is by default.
        decoder: a function of one code: mean, log-rates or logits; by default a perceptron.
        emission: "gaussian", "poisson" (log link) or "bernoulli" (logit link).
        sigma_obs: standard deviation of a Gaussian emission; None to learn one, which starts at the data's.
        sigma_state: standard deviation of the state's noise.
        sigma_code: that of the code's.
        sigma_start: that of the first state.
        hidden: width of the decoder.

    Raises:
        ValueError: an unknown emission, or a shape that does not fit.

    Example:
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(kalman_vae, 0)).get_trace(num_steps=20, num_obs=9)
        >>> trace["a"]["value"].shape, trace["y"]["value"].shape
        ((20, 2), (20, 9))

    Source:
        Fraccaro, Kamronn, Paquet & Winther 2017.
    """
    check_choice("emission", emission, EMISSIONS)
    n, size = check_count("num_states", num_states), check_count("num_codes", num_codes)
    about = look_at(y, num_steps, num_obs, u, num_trials=num_trials)
    n_input = 0 if about.u is None else about.u.shape[-1]
    bases = register("bases", Bases(check_count("num_bases", num_bases), n, size, n_input))
    if weights is None:
        weights = HistoryWeights(size, num_bases, key=jax.random.key(2))
    weights = register("weights", weights)
    read = registered_decoder(decoder, about, size, hidden, emission, jax.random.key(0))
    noise = _noise(sigma_obs, emission, about)
    ssm = LinearGaussianSSM(
        jnp.zeros(n),
        sigma_start * jnp.eye(n),
        bases.A,
        sigma_state * jnp.eye(n),
        bases.C,
        sigma_code * jnp.eye(size),
        B=bases.B if n_input else None,
    )

    def one(inputs: Array | None, data: Array | None) -> None:
        a = numpyro.sample("a", HistoryMarginal(ssm, weights, about.num_steps, inputs))
        observe("y", emitted(emission, at_each(read, a), noise).to_event(2), data)

    in_trials(one, about, batch_size)


@also_called(n_state="num_states")
def extended_kalman_vae(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    num_states: int = 4,
    num_codes: int = 2,
    num_bases: int = 8,
    num_obs: int | None = None,
    num_trials: int | None = None,
    batch_size: int | None = None,
    transition: Callable[..., Array] | None = None,
    decoder: Callable[[Array], Array] | None = None,
    emission: str = "gaussian",
    sigma_obs: float | None = None,
    start: str = "normal",
    hidden: int = 64,
) -> None:
    """The extended Kalman autoencoder: codes are the first states, and the dynamics are locally linear in the state.

        z_t ~ N(F(z_{t-1}, u_t) z_{t-1} + B(z_{t-1}, u_t) u_t, Q),   a_t ~ N((z_t)_{1..code}, R)

    and `y_t ~ p(y | decoder(a_t))`. `F` and `B` are mixtures of `num_bases` matrices with weights that depend on the
    state. Sites: `z` `(time, state)`, a `StatePath`, and `a` `(time, code)`. `Q` and `R` are diagonal and learned
    (`sigma_state`, `sigma_code`); as published `Q` is a mixture too. A frame depends on the code alone: quantities
    that a frame does not show, such as a velocity, are in the rest of the state.

    Args:
        y: data `(time, obs)` or `(trial, time, obs)`, a frame's pixels in a row; NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        u: inputs of the transition, `(time, input)` or `(trial, time, input)`.
        num_states: size of the state, at least `num_codes`; `n_state` is a second name for it.
        num_codes: size of the code.
        num_bases: number of matrices that are mixed.
        num_obs: number of observed variables, needed where `y` is None.
        num_trials: number of trials where `y` is None; None for one series.
        batch_size: number of trials that a step of SVI takes, at random; all by default.
        transition: `f(z, u) -> (state,)` in place of the `nets.LocallyLinearTransition`.
        decoder: a function of one code: mean, log-rates or logits; by default a perceptron.
        emission: "gaussian", "poisson" (log link) or "bernoulli" (logit link).
        sigma_obs: standard deviation of a Gaussian emission; None to learn one, which starts at the data's.
        start: "normal", `z_1 ~ N(0, 1)`; or "hierarchical", `z_1 ~ N(m(zeta), s(zeta)^2)` with networks `m` and `s` and
            a site `zeta ~ N(0, 1)`, a learned prior of the first state.
        hidden: width of the networks.

    Raises:
        ValueError: an unknown emission or start, or a shape that does not fit.

    Example:
        >>> model = numpyro.handlers.seed(extended_kalman_vae, 0)
        >>> trace = numpyro.handlers.trace(model).get_trace(num_steps=9, num_obs=5)
        >>> trace["z"]["value"].shape, trace["a"]["value"].shape, trace["y"]["value"].shape
        ((9, 4), (9, 2), (9, 5))

    Source:
        Klushyn, Kurle, Soelch, Cseke & van der Smagt 2021; the first state: Klushyn et al. 2019.
    """
    check_choice("emission", emission, EMISSIONS)
    check_choice("start", start, STARTS)
    n, size = check_count("num_states", num_states), check_count("num_codes", num_codes)
    if n < size:
        raise ValueError(f"`num_states` must be at least `num_codes` ({size}): the codes are states; got {n}.")
    about = look_at(y, num_steps, num_obs, u, num_trials=num_trials)
    one_key, two_key = jax.random.split(jax.random.key(1))
    if transition is None:
        n_input = 0 if about.u is None else about.u.shape[-1]
        transition = LocallyLinearTransition(n, num_bases, hidden, n_input=n_input, key=one_key)
    move = register("transition", transition)
    read = registered_decoder(decoder, about, size, hidden, emission, jax.random.key(0))
    noise = _noise(sigma_obs, emission, about)
    sigma_state = numpyro.param("sigma_state", 0.1 * jnp.ones(n), constraint=constraints.positive)
    sigma_code = numpyro.param("sigma_code", 0.1 * jnp.ones(size), constraint=constraints.positive)
    first = None
    if start == "hierarchical":
        first = register("start", eqx.nn.MLP(n, 2 * n, hidden, 1, activation=jnp.tanh, key=two_key))

    def one(inputs: Array | None, data: Array | None) -> None:
        m0, sd = jnp.zeros(n), jnp.ones(n)
        if first is not None:
            zeta = numpyro.sample("zeta", dist.Normal(jnp.zeros(n), 1.0).to_event(1))
            m0, sd = jnp.split(at_each(first, zeta), 2, axis=-1)
            sd = jax.nn.softplus(sd)
        path = StatePath(m0, Diagonal(sd), move, Diagonal(sigma_state), about.num_steps, inputs)
        z = path_site("z", path)
        a = numpyro.sample("a", dist.Normal(z[..., :size], sigma_code).to_event(2))
        observe("y", emitted(emission, at_each(read, a), noise).to_event(2), data)

    in_trials(one, about, batch_size)


def _noise(sigma_obs: float | None, emission: str, about: About) -> Any:
    if emission != "gaussian":
        return None
    if sigma_obs is not None:
        return sigma_obs
    return numpyro.param("sigma_obs", jnp.mean(about.scale), constraint=constraints.positive)
