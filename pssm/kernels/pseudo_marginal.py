"""Particle marginal Metropolis-Hastings: exact inference for parameters from an estimate of the likelihood."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro.distributions.distribution import validation_enabled
from numpyro.handlers import seed, trace
from numpyro.infer import init_to_median
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from pssm._checks import check_count, is_traced
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.distributions import StatePath
from pssm.filters import particle_filter
from pssm.filters.particle_sweep import Proposal, check_proposal
from pssm.linalg.random import standard_normal
from pssm.linalg.small import matvec
from pssm.nonlinear import NonlinearSSM
from pssm.ssm import LinearGaussianSSM

FIRST_SCALE = 0.3  # of the first proposals, in the unconstrained space


class PseudoMarginalState(NamedTuple):
    """Where a chain is.

    Attributes:
        i: number of iterations so far.
        z: parameters, unconstrained.
        log_likelihood: the estimate that was made when `z` was proposed; it is kept for as long as `z` is.
        log_prior: log density of the parameters, unconstrained.
        scale: factor of the proposal's covariance; fixed after warm-up.
        accept_prob: of the last proposal.
        mean_accept_prob: over the warm-up, and then over the iterations after it.
        num_warmup: iterations in which `scale` adapts.
        rng_key: random key.
    """

    i: Array
    z: dict[str, Array]
    log_likelihood: Array
    log_prior: Array
    scale: Array
    accept_prob: Array
    mean_accept_prob: Array
    num_warmup: Array
    rng_key: Array


class PseudoMarginal(MCMCKernel):
    """Metropolis-Hastings over the parameters, with a particle filter's likelihood: for `numpyro.infer.MCMC`.

    The filter's estimate is unbiased, and that of the current parameters is kept until others are accepted: the chain
    then has exactly the posterior of the parameters, for any number of particles. How well it moves depends on the
    estimate: its logarithm should vary with a standard deviation of about one (`particle_filter` at a likely value, a
    few seeds). Larger, and the chain sticks where the estimate was lucky; `proposal="guided"` cuts it most.

    Proposals are normal steps in the unconstrained space. During warm-up their covariance adapts to the posterior's and
    to `target_accept_prob`. No gradients are needed.

    Args:
        model: a NumPyro model: of the parameters alone, or the one that NUTS and `particle_gibbs` get, with path and
            observations; the sites in `left_out` then do not count, and hold NaN.
        build: the state-space model from the values of the parameters' sites (and of deterministic ones).
        y: observations `(time, obs)`, NaN where missing.
        u: inputs `(time, input)`.
        num_particles: number of particles.
        proposal: as in `particle_filter`. "guided" finds potentials anew for each value of the parameters.
        left_out: sites of `model` whose part the particle filter takes: the path and the observations.
        target_accept_prob: 0.07 is best for a noisy estimate, 0.23 for an exact one.
        init_strategy: first values of the parameters, as in NUTS.

    Raises:
        ValueError: a choice is unknown; when run, a path or a discrete site is among the parameters, or the likelihood
            at the first values is zero.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pssm
        >>> from numpyro.infer import MCMC
        >>> one = jnp.eye(1)
        >>> def model():
        ...     numpyro.sample("scale", dist.HalfNormal(1.0))
        >>> def build(sites):
        ...     return pssm.NonlinearSSM(jnp.zeros(1), one, lambda z, u: z, sites["scale"] * one,
        ...                              lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> kernel = PseudoMarginal(model, build, [[1.0], [0.0], [2.0]], num_particles=20)
        >>> mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> mcmc.get_samples()["scale"].shape
        (10,)

    Source:
        Andrieu, Doucet & Holenstein 2010; number of particles and rate: Doucet, Pitt, Deligiannidis & Kohn 2015,
        Sherlock, Thiery, Roberts & Rosenthal 2015; adaptation: Vihola 2012.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        build: Callable[[dict[str, Array]], NonlinearSSM | LinearGaussianSSM],
        y: ArrayLike,
        u: ArrayLike | None = None,
        *,
        num_particles: int,
        proposal: Proposal = "bootstrap",
        left_out: tuple[str, ...] = ("z", "y"),
        target_accept_prob: float = 0.15,
        init_strategy: Callable[..., Any] = init_to_median,
    ):
        check_proposal(proposal)
        if not 0 < target_accept_prob < 1:
            raise ValueError(f"`target_accept_prob` must be between 0 and 1; got {target_accept_prob}.")
        self.num_particles = check_count("num_particles", num_particles)
        self._model, self.build, self.y, self.u = model, build, y, u
        self.proposal, self.left_out = proposal, tuple(left_out)
        self.target_accept_prob, self.init_strategy = target_accept_prob, init_strategy
        self._prior: Any = None
        self._constrain: Any = None

    @property
    def model(self) -> Callable[..., Any]:
        """The NumPyro model."""
        return self._model

    @property
    def sample_field(self) -> str:
        """Where the state holds the parameters."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What is collected."""
        return ("z",)

    def get_diagnostics_str(self, state: PseudoMarginalState) -> str:
        """For the progress bar."""
        return f"acc. prob={state.mean_accept_prob:.2f}"

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict[str, Any]) -> Callable[..., dict[str, Array]]:
        """From unconstrained values to those of the model's sites."""
        return self._constrain(*model_args, **(model_kwargs or {}))

    def log_likelihood(self, key: KeyLike, sites: dict[str, Array]) -> Array:
        """The estimate, -inf where it is not a number."""
        key = as_key(key)
        model = self.build(sites)
        options = {"num_particles": self.num_particles, "proposal": self.proposal}
        found = particle_filter(key, model, self.y, self.u, **options).log_likelihood
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    def init(
        self,
        rng_key: Key,
        num_warmup: int,
        init_params: dict[str, Array] | None = None,
        model_args: tuple = (),
        model_kwargs: dict[str, Any] | None = None,
    ) -> PseudoMarginalState:
        """The first state; a batch of keys starts a batch of chains."""
        model_kwargs = model_kwargs or {}
        key = rng_key if is_prng_key(rng_key) else rng_key[0]
        parameters = _Without(self._model, self.left_out)
        _check_parameters(trace(seed(parameters, key)).get_trace(*model_args, **model_kwargs), self.left_out)
        starts = rng_key if is_prng_key(rng_key) else jax.vmap(lambda k: jax.random.split(k)[0])(rng_key)
        info = initialize_model(
            starts,
            parameters,
            init_strategy=self.init_strategy,
            dynamic_args=True,
            model_args=model_args,
            model_kwargs=model_kwargs,
            validate_grad=False,
        )
        self._prior, self._constrain = info.potential_fn, info.postprocess_fn
        z = info.param_info.z if init_params is None else init_params

        def first(z: dict[str, Array], key: Array) -> PseudoMarginalState:
            key, filter_key = jax.random.split(key)
            prior, likelihood = self._density(filter_key, z, model_args, model_kwargs)
            size, dtype = ravel_pytree(z)[0].shape[0], likelihood.dtype
            count, none = jnp.zeros((), int), jnp.zeros((), dtype)
            scale = FIRST_SCALE * jnp.eye(size, dtype=dtype)
            return PseudoMarginalState(
                count, z, likelihood, prior, scale, none, none, jnp.asarray(num_warmup, count.dtype), key
            )

        start = jax.jit(first if is_prng_key(rng_key) else jax.vmap(first))(z, rng_key)
        if not is_traced(start.log_likelihood) and not jnp.isfinite(start.log_likelihood).all():
            raise ValueError(
                "The likelihood at the first parameters is zero or not finite. Give `init_strategy` (such as "
                "`numpyro.infer.init_to_value`) values at which the observations are possible, or more particles."
            )
        return start

    def sample(
        self, state: PseudoMarginalState, model_args: tuple, model_kwargs: dict[str, Any]
    ) -> PseudoMarginalState:
        """One iteration."""
        if state.i.ndim:
            return jax.vmap(lambda one: self._step(one, model_args, model_kwargs))(state)
        return self._step(state, model_args, model_kwargs)

    def _density(
        self, key: Array, z: dict[str, Array], model_args: tuple, model_kwargs: dict[str, Any]
    ) -> tuple[Array, Array]:
        sites = self._constrain(*model_args, **model_kwargs)(z)
        return -self._prior(*model_args, **model_kwargs)(z), self.log_likelihood(key, sites)

    def _step(
        self, state: PseudoMarginalState, model_args: tuple, model_kwargs: dict[str, Any] | None
    ) -> PseudoMarginalState:
        key, move_key, filter_key, accept_key = jax.random.split(state.rng_key, 4)
        now, unravel = ravel_pytree(state.z)
        move = standard_normal(move_key, now.shape, now.dtype)
        z = unravel(now + matvec(state.scale, move))
        prior, likelihood = self._density(filter_key, z, model_args, model_kwargs or {})
        gain = prior + likelihood - state.log_prior - state.log_likelihood
        accept_prob = jnp.where(jnp.isnan(gain), 0.0, jnp.exp(jnp.minimum(gain, 0.0)))
        accepted = jax.random.uniform(accept_key) < accept_prob
        kept = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old),
            (z, likelihood, prior),
            (state.z, state.log_likelihood, state.log_prior),
        )
        i = state.i + 1
        warming = i <= state.num_warmup
        rate = jnp.minimum(1.0, len(now) * i ** (-2.0 / 3.0)) * (accept_prob - self.target_accept_prob)
        scale = jnp.where(warming, _adapted(state.scale, move, rate), state.scale)
        count = jnp.where(warming, i, i - state.num_warmup)
        mean = state.mean_accept_prob * (count > 1)
        mean = mean + (accept_prob - mean) / count
        return PseudoMarginalState(i, *kept, scale, accept_prob, mean, state.num_warmup, key)


def _adapted(scale: Array, move: Array, rate: Array) -> Array:
    """A factor of `S (1 + rate e e') S'` with `e` the direction of the move: longer where steps were accepted."""
    squared = jnp.sum(move**2)
    grow = (jnp.sqrt(1 + rate) - 1) / squared
    return scale + grow * (scale @ move)[:, None] * move


class _Without(Messenger):
    """The model without some of its sites: what is drawn there becomes NaN, and no density is counted."""

    def __init__(self, fn: Callable[..., Any], names: tuple[str, ...]):
        self.names = names
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model; what is NaN must not be checked."""
        with validation_enabled(False):
            return super().__call__(*args, **kwargs)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["name"] in self.names:
            msg["stop"] = True
            if msg["value"] is None:
                fn = msg["fn"]
                msg["value"] = jnp.full(fn.batch_shape + fn.event_shape, jnp.nan)


def _check_parameters(sites: dict[str, Any], left_out: tuple[str, ...]) -> None:
    """Refuses what a random walk cannot move, and sites that hang on what the particle filter takes."""
    for name, site in sites.items():
        if site["type"] != "sample" or name in left_out:
            continue
        if isinstance(site["fn"], StatePath) and not site["is_observed"]:
            raise ValueError(
                f"`left_out` must name the path {name!r}, which the particle filter takes; got {left_out}."
            )
        hint = f"If it is of the observations, whose part the particle filter takes, name it: {(*left_out, name)}."
        if not site["is_observed"] and site["fn"].support.is_discrete:
            raise ValueError(
                f"The site {name!r} is discrete: the random walk of `PseudoMarginal` cannot move it. `left_out` is "
                f"{left_out}. {hint}"
            )
        with validation_enabled(False):
            density = site["fn"].log_prob(site["value"])
        if not is_traced(density) and jnp.isnan(density).any():
            raise ValueError(
                f"The log density of the site {name!r} is not a number where the sites in `left_out`, {left_out}, are "
                f"left out: it depends on them. {hint}"
            )
