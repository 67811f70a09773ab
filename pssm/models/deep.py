"""State-space models with learned networks, as plain NumPyro model functions."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from pssm._checks import also_called, as_float, check_choice, check_count
from pssm._types import Array, ArrayLike, Key
from pssm.distributions import GaussianFilterMarginal, StatePath, observe
from pssm.distributions.in_units import HalfNormal
from pssm.distributions.state_path import path_site
from pssm.filters.linearize import NAMES
from pssm.linalg import Diagonal
from pssm.models.several import About, at_each, in_trials, look_at
from pssm.nets import GatedTransition, MLPDecoder
from pssm.nonlinear import NonlinearSSM
from pssm.register import register

EMISSIONS = ("gaussian", "poisson", "bernoulli")
STATES = ("sampled", *NAMES)
HIGHEST_LOG_RATE = 15.0


class ResidualMLP(eqx.Module):
    """The default transition, `z + scale h(z, u)`, `h` a perceptron of tanh units: each step is bounded."""

    mlp: eqx.nn.MLP
    scale: float = eqx.field(static=True)

    def __call__(self, z: Array, u: Array | None = None) -> Array:
        """The next state's mean."""
        return z + self.scale * self.mlp(z if u is None else jnp.concatenate([z, u]))


@also_called(n_state="num_states")
def neural_ssm(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    num_states: int = 2,
    num_obs: int | None = None,
    num_trials: int | None = None,
    batch_size: int | None = None,
    transition: Callable[..., Array] | None = None,
    emission: str = "gaussian",
    readout: ArrayLike | Callable[[Array], Array] | None = None,
    weights: str = "learned",
    hidden: int = 16,
    states: str = "sampled",
) -> None:
    """A network as transition, and a readout: `z_t ~ N(f(z_{t-1}, u_t), Q)`, `y_t ~ p(y | C z_t + d)`.

    One series, or many trials, from which minibatches can be drawn. Priors: `sigma_state ~ HalfNormal(0.5)` for each
    state; `z_1 ~ N(0, 1)`; a learned readout `C ~ N(0, s^2 / state)`, `d ~ N(location, s^2)`, where `location` and `s`
    are the data's mean and standard deviation, for "poisson" the logarithm of the mean and 1, for "bernoulli" the logit
    and 1; `sigma_obs ~ HalfNormal(s)`. The basis of the states is not determined.

    Args:
        y: data `(time, obs)` or `(trial, time, obs)`; NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        u: inputs of the transition, `(time, input)` or `(trial, time, input)`.
        num_states: size of the state; `n_state` is a second name for it.
        num_obs: number of observed variables, needed where `y` is None.
        num_trials: number of trials where `y` is None; None for one series.
        batch_size: number of trials that a step of SVI takes, at random; all by default.
        transition: `f(z, u) -> (state,)`. An Equinox module is registered as the parameters `transition$params` (see
            `pssm.nets` for modules, and `nets.register` for their trained parts); a plain function is used as it is. By
            default a residual perceptron.
        emission: "gaussian", "poisson" (log link; log rates above 15 count as 15, so that none overflows) or
            "bernoulli" (logit link).
        readout: None to learn `C` and `d`; a matrix `C` `(obs, state)`, known, with `d` learned; or a function of one
            state, registered as `readout$params` if it is an Equinox module.
        weights: "learned", a network's weights are parameters (SVI finds one value, NUTS leaves them as they start); or
            "random", the default transition's get priors, `N(0, 1)` over the root of their number, for NUTS.
        hidden: width of the default transition.
        states: "sampled", a site `z`; or, for one series, the name of a rule such as "ekf" that integrates the states
            out approximately.

    Raises:
        ValueError: an unknown emission, a shape that does not fit, or a rule with trials.

    Example:
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(neural_ssm, 0)).get_trace(num_steps=20, num_obs=3)
        >>> trace["z"]["value"].shape, trace["y"]["value"].shape
        ((20, 2), (20, 3))
    """
    check_choice("emission", emission, EMISSIONS)
    check_choice("states", states, STATES)
    check_choice("weights", weights, ("learned", "random"))
    n = check_count("num_states", num_states)
    about = look_at(y, num_steps, num_obs, u, num_trials=num_trials)
    f = _transition(transition, n, 0 if about.u is None else about.u.shape[-1], hidden, weights)
    read = _readout(readout, about, n, emission)
    sigma_state = numpyro.sample("sigma_state", dist.HalfNormal(0.5 * jnp.ones(n)).to_event(1))
    sigma_obs = None
    if emission == "gaussian":
        sigma_obs = numpyro.sample("sigma_obs", HalfNormal(about.scale).to_event(1))

    def observed(z: Array) -> dist.Distribution:
        """The distribution of the observations at states `(..., state)`."""
        return emitted(emission, at_each(read, z), sigma_obs)

    m0, start, noise = jnp.zeros(n), Diagonal(jnp.ones(n)), Diagonal(sigma_state)
    if states != "sampled":
        if about.num_sequences is not None:
            raise ValueError(f'`states` must be "sampled" for several trials; got {states!r}.')
        system = NonlinearSSM(m0, jnp.eye(n), f, noise.to_matrix(), lambda z: observed(z).to_event(1))
        numpyro.sample("y", GaussianFilterMarginal(system, about.num_steps, about.u, method=states), obs=about.y)
        return

    def one(inputs: Array | None, data: Array | None) -> None:
        z = path_site("z", StatePath(m0, start, f, noise, about.num_steps, inputs))
        observe("y", observed(z).to_event(2), data)

    in_trials(one, about, batch_size)


@also_called(n_state="num_states")
def deep_markov(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    num_states: int = 4,
    num_obs: int | None = None,
    num_trials: int | None = None,
    batch_size: int | None = None,
    transition: Callable[..., Array] | None = None,
    decoder: Callable[[Array], Array] | None = None,
    emission: str = "gaussian",
    hidden: int = 64,
    states: str = "sampled",
) -> None:
    """The deep Markov model: a gated transition and a perceptron as emission, `y_t ~ p(y | decoder(z_t))`.

    It is `neural_ssm` with these two networks, and takes the same guides. `AmortizedStateSpace(family="diagonal")` with
    an encoder that runs backward is its published smoother, in the form where the network's message is multiplied with
    the transition. The transition's noise is one number for each state, `sigma_state ~ HalfNormal(0.5)`; as published
    it depends on the state, which a `StatePath` does not have. Other priors are those of `neural_ssm`.

    Args:
        y: data `(time, obs)` or `(trial, time, obs)`; NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        u: inputs of the transition, `(time, input)` or `(trial, time, input)`.
        num_states: size of the state; `n_state` is a second name for it.
        num_obs: number of observed variables, needed where `y` is None.
        num_trials: number of trials where `y` is None; None for one series.
        batch_size: number of trials that a step of SVI takes, at random; all by default.
        transition: `f(z, u) -> (state,)` in place of the `nets.GatedTransition`.
        decoder: a function of one state in place of the perceptron: mean, log-rates or logits. The perceptron starts
            about the data's mean, with values of their spread.
        emission: "gaussian", "poisson" (log link) or "bernoulli" (logit link).
        hidden: width of the perceptrons.
        states: as in `neural_ssm`.

    Raises:
        ValueError: an unknown emission, or a shape that does not fit.

    Example:
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(deep_markov, 0)).get_trace(num_steps=20, num_obs=3)
        >>> trace["z"]["value"].shape, trace["y"]["value"].shape
        ((20, 4), (20, 3))

    Source:
        Krishnan, Shalit & Sontag 2017.
    """
    check_choice("emission", emission, EMISSIONS)
    n = check_count("num_states", num_states)
    about = look_at(y, num_steps, num_obs, u)
    one, two = jax.random.split(jax.random.key(0))
    if transition is None:
        transition = GatedTransition(n, hidden, n_input=0 if about.u is None else about.u.shape[-1], key=one)
    neural_ssm(
        about.y,
        num_steps=num_steps,
        u=about.u,
        num_states=n,
        num_obs=num_obs,
        num_trials=num_trials,
        batch_size=batch_size,
        transition=transition,
        emission=emission,
        readout=registered_decoder(decoder, about, n, hidden, emission, two),
        states=states,
    )


def registered_decoder(
    given: Callable[[Array], Array] | None, about: About, size: int, hidden: int, emission: str, key: Key
) -> Callable[[Array], Array]:
    """The decoder as given, or a perceptron that starts about the data's mean; a module's arrays are parameters."""
    if given is not None:
        if not callable(given):
            raise TypeError(f"`decoder` must be a function; got {type(given).__name__}.")
        return register("decoder", given)
    net = MLPDecoder(size, about.num_obs, hidden=hidden, depth=2, key=key)
    location, spread = link_scale(about, emission)
    last = net.mlp.layers[-1]
    start = (spread[:, None] * last.weight, location)
    return register("decoder", eqx.tree_at(lambda m: (m.mlp.layers[-1].weight, m.mlp.layers[-1].bias), net, start))


def emitted(emission: str, drive: Array, sigma_obs: Any) -> dist.Distribution:
    """The distribution of single entries whose mean, logit or log-rate is `drive`."""
    if emission == "gaussian":
        return dist.Normal(drive, sigma_obs)
    if emission == "bernoulli":
        return dist.Bernoulli(logits=drive)
    return dist.Poisson(jnp.exp(jnp.minimum(drive, HIGHEST_LOG_RATE)))


def _transition(given: Callable[..., Array] | None, n: int, n_input: int, hidden: int, weights: str) -> Any:
    if given is not None:
        if not callable(given):
            raise TypeError(f"`transition` must be a function (z, u); got {type(given).__name__}.")
        if weights == "random":
            raise ValueError('`weights="random"` goes with the default transition; give your own its priors yourself.')
        return register("transition", given)
    net = eqx.nn.MLP(n + n_input, n, check_count("hidden", hidden), 1, activation=jnp.tanh, key=jax.random.key(0))
    if weights == "learned":
        return register("transition", ResidualMLP(net, 0.1))

    def normal(name: str, *shape: int) -> Array:
        width = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return numpyro.sample(name, dist.Normal(jnp.zeros(shape), width).to_event())

    first, last = net.layers
    drawn = (
        normal("transition_in", *first.weight.shape),
        normal("transition_in_bias", *first.bias.shape),
        normal("transition_out", *last.weight.shape),
        normal("transition_out_bias", *last.bias.shape),
    )
    places = lambda m: (m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias)  # noqa: E731
    return ResidualMLP(eqx.tree_at(places, net, drawn), 0.1)


def _readout(given: Any, about: About, n: int, emission: str) -> Callable[[Array], Array]:
    """`z -> (obs,)`, the mean, the log-rate or the logit."""
    if callable(given):
        return register("readout", given)
    location, spread = link_scale(about, emission)
    if given is None:
        size = spread[:, None] * n**-0.5
        C = numpyro.sample("C", dist.Normal(jnp.zeros((about.num_obs, n)), size).to_event(2))
    else:
        C = as_float("readout", given)
        if C.shape != (about.num_obs, n):
            raise ValueError(f"`readout` must have shape ({about.num_obs}, {n}) (obs, state); got {C.shape}.")
    d = numpyro.sample("d", dist.Normal(location, spread).to_event(1))
    return lambda z: C @ z + d


def link_scale(about: About, emission: str) -> tuple[Array, Array]:
    """Where the readout's values lie."""
    one = jnp.ones(about.num_obs)
    if emission == "gaussian":
        return about.location, about.scale
    if about.y is None:
        return 0.0 * one, one
    if emission == "poisson":
        return jnp.log(jnp.maximum(about.location, 0.05)), one
    share = jnp.clip(about.location, 0.02, 0.98)
    return jnp.log(share) - jnp.log1p(-share), one
