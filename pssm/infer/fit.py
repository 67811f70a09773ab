"""Thin fits: NumPyro's own samplers and optimisers, started well, with the result objects NumPyro gives."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro.infer import ELBO, MCMC, NUTS, SVI, Trace_ELBO, init_to_median, init_to_uniform
from numpyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from numpyro.infer.svi import SVIRunResult, SVIState
from numpyro.util import not_jax_tracer

from pssm._checks import check_choice, check_count
from pssm._types import Key
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.guides.paths import BOUND, FAMILIES, PathGuide
from pssm.infer.objective import TraceConditionalKL_ELBO

GUIDES: dict[str, Any] = {"normal": AutoNormal, "mvn": AutoMultivariateNormal}


def as_key(key: Key | int) -> Key:
    """A JAX random key from a key or a whole number."""
    return jax.random.key(key) if isinstance(key, int | np.integer) else key


def fit_nuts(
    model: Callable[..., Any],
    *args: Any,
    key: Key | int = 0,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    progress_bar: bool = True,
    target_accept_prob: float = 0.8,
    dense_mass: bool = False,
    max_tree_depth: int = 10,
    chain_method: str = "vectorized",
    **kwargs: Any,
) -> MCMC:
    """Runs NUTS on a NumPyro model; the same as `MCMC(NUTS(model), ...).run(key, *args, **kwargs)`.

    Args:
        model: a NumPyro model.
        args: the model's positional arguments, such as the data.
        key: random key, or a whole number to make one from.
        num_warmup: adaptation steps for each chain.
        num_samples: draws kept for each chain.
        num_chains: number of chains.
        progress_bar: show NumPyro's progress bar.
        target_accept_prob: as in `numpyro.infer.NUTS`, like the next two.
        dense_mass: as in `numpyro.infer.NUTS`.
        max_tree_depth: as in `numpyro.infer.NUTS`.
        chain_method: as in `numpyro.infer.MCMC`.
        kwargs: the model's keyword arguments.

    Returns:
        NumPyro's `MCMC`, run. Divergent transitions are warned of.

    Raises:
        ValueError: a count is below 1.

    Example:
        >>> from pssm import datasets, models
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=100, num_chains=1, progress_bar=False)
        >>> mcmc.get_samples()["sigma_obs"].shape
        (100,)
    """
    for name, value in (("num_warmup", num_warmup), ("num_samples", num_samples), ("num_chains", num_chains)):
        check_count(name, value)
    kernel = NUTS(
        model,
        target_accept_prob=target_accept_prob,
        dense_mass=dense_mass,
        max_tree_depth=max_tree_depth,
        init_strategy=init_to_uniform,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method if num_chains > 1 else "sequential",
        progress_bar=progress_bar,
    )
    mcmc.run(as_key(key), *args, extra_fields=("energy", "potential_energy", "num_steps", "accept_prob"), **kwargs)
    divergent = int(np.sum(mcmc.get_extra_fields()["diverging"]))
    if divergent:
        warnings.warn(
            f"{divergent} of {num_chains * num_samples} transitions diverged: parts of the posterior may be missing. "
            "Raise `target_accept_prob` (0.95), or integrate the states out.",
            stacklevel=2,
        )
    return mcmc


class SVIFit(SVIRunResult):
    """NumPyro's `SVIRunResult` (`params`, `state`, `losses`) with what made it and whether it converged.

    Attributes:
        svi: the `SVI` object, with its `model` and `guide`.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        objective: what minus the loss is, in words: a bound or a surrogate.
        converged: whether the loss had stopped falling.
        message: the same in words, with the numbers.
    """

    svi: SVI
    objective: str = BOUND
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    converged: bool
    message: str

    @classmethod
    def of(cls, svi: SVI, result: SVIRunResult, *args: Any, **kwargs: Any) -> "SVIFit":
        """A run of NumPyro's own `svi.run(key, num_steps, *args, **kwargs)` as an `SVIFit`."""
        fit = cls(*result)
        fit.svi, fit.args, fit.kwargs = svi, args, kwargs
        fit.objective = getattr(svi.guide, "objective", BOUND)
        fit.converged, fit.message = _convergence(np.asarray(result.losses))
        return fit

    @property
    def surrogate(self) -> bool:
        """Whether the objective can exceed the log evidence."""
        return self.objective.startswith("surrogate")


def fit_svi(
    model: Callable[..., Any],
    *args: Any,
    guide: str | AutoGuide | Callable[..., Any] = "mvn",
    rank: int = 4,
    key: Key | int = 0,
    num_steps: int = 5000,
    learning_rate: float = 0.01,
    optimizer: Any = None,
    loss: Any = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIFit:
    """Fits a guide by stochastic variational inference, from a data-scaled start.

    The automatic guides start at the median of the prior, which pssm's models scale by the data, and not at a random
    point near zero. The step size decays to zero (cosine), so that the end is not noise around the optimum.

    Args:
        model: a NumPyro model.
        args: the model's positional arguments.
        guide: "mvn" (`AutoMultivariateNormal`), "normal" (`AutoNormal`), a family of `AutoStateSpace` ("chain",
            "moment_matched", "diagonal") for a model with `StatePath` sites, or any NumPyro guide.
        rank: of those families.
        key: random key, or a whole number to make one from.
        num_steps: optimisation steps.
        learning_rate: first step size of Adam; not used with `optimizer`.
        optimizer: an optax or NumPyro optimiser instead.
        loss: an ELBO; by default `Trace_ELBO(num_particles=8)`, a lower bound on the log evidence.
        progress_bar: show NumPyro's progress bar.
        kwargs: the model's keyword arguments.

    Returns:
        An `SVIFit`: NumPyro's result with `.converged` and `.message`. Not converged is warned of.

    Raises:
        ValueError: `guide` is unknown, or a count is below 1.
        FloatingPointError: the loss became NaN; says at which step.

    Example:
        >>> from pssm import datasets, models
        >>> fit = fit_svi(models.local_level, datasets.load("nile").y, num_steps=2000, progress_bar=False)
        >>> fit.losses.shape, fit.converged
        ((2000,), True)
    """
    check_count("num_steps", num_steps, least=10)
    if isinstance(guide, str):
        guide = guide_of(model, guide, rank)
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(100.0), optax.adam(schedule)) if optimizer is None else optimizer
    svi = SVI(model, guide, optimizer, default_loss(guide) if loss is None else loss)
    state = _start(svi, as_key(key), args, kwargs)
    result = svi.run(as_key(key), num_steps, *args, progress_bar=progress_bar, init_state=state, **kwargs)
    losses = np.asarray(result.losses)
    if not np.isfinite(losses).all():
        step = int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(
            f"The loss became {losses[step]} at step {step} of {num_steps}. Lower `learning_rate` (now "
            f"{learning_rate}), or look at the model's priors with numpyro.infer.Predictive. A transition that "
            "explodes can be held by AmortizedStateSpace's `limit` or by `nets.Saturated`."
        )
    fit = SVIFit.of(svi, result, *args, **kwargs)
    if progress_bar:
        print(f"Objective: {fit.objective}. {fit.message[0].upper()}{fit.message[1:]}")
    if not fit.converged:
        warnings.warn(f"SVI has not converged: {fit.message} Raise `num_steps` (now {num_steps}).", stacklevel=2)
    return fit


def _start(svi: SVI, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SVIState | None:
    """The state of `svi.init`, compiled as one program: NumPyro compiles its operations one by one, hundreds of them.

    What a guide keeps of its first call must not come from inside a compilation. Of the known guides that is the
    prototype, made here before; for others, and where something cannot be compiled: None, and `svi.run` does it all.
    """
    if not prepare_guide(svi.guide, jax.random.split(key, 3)[2], args, kwargs):
        return None
    try:
        state = jax.jit(lambda key: svi.init(key, *args, **kwargs))(key)
    except jax.errors.JAXTypeError:
        return None
    kept = jax.tree.leaves(svi.constrain_fn.args)  # bounds of parameters that the model computes
    return state if all(not_jax_tracer(x) for x in kept) else None


def prepare_guide(guide: Any, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Makes what a known guide keeps of its first call, so that its start can be compiled; False for other guides."""
    if type(guide) not in (*GUIDES.values(), AutoStateSpace, AmortizedStateSpace):
        return False
    with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=key):
        if guide.prototype_trace is None:
            guide._setup_prototype(*args, **kwargs)
        inner = guide._globals if isinstance(guide, PathGuide) else None
        if inner is not None and type(inner) not in GUIDES.values():
            return False
        if inner is not None and inner.prototype_trace is None:
            inner._setup_prototype(*args, **kwargs)
    return True


def guide_of(model: Callable[..., Any], name: str, rank: int) -> AutoGuide:
    """The guide that `fit_svi` makes of a name."""
    check_choice("guide", name, (*GUIDES, *FAMILIES))
    if name in FAMILIES:
        return AutoStateSpace(model, rank=rank, family=name)
    return GUIDES[name](model, init_loc_fn=init_to_median(num_samples=50), init_scale=0.1)


def default_loss(guide: Any) -> ELBO:
    """The ELBO that `fit_svi` takes for a guide."""
    if not isinstance(guide, PathGuide):
        return Trace_ELBO(num_particles=8)
    return TraceConditionalKL_ELBO(1 if guide.family == "moment_matched" else 8)


def _convergence(losses: np.ndarray) -> tuple[bool, str]:
    """Compares the last tenth of the losses with the second fifth, where the steps were still large.

    Near the end the steps are small, and the loss is flat whether or not it has arrived. Converged: since the second
    fifth the loss fell by less than 0.1 nats, three standard errors of that fall, or 0.3 of the scatter of the loss.
    """
    count = len(losses)
    if count < 10:
        return False, f"{count} steps are too few to tell."
    early, late = losses[count // 5 : 2 * count // 5], losses[-max(count // 10, 2) :]
    fall = float(early.mean() - late.mean())
    scatter = [float(np.mean(np.diff(x) ** 2) / 2) for x in (early, late)]  # by differences: without the trend
    noise = float(np.sqrt(scatter[0] / len(early) + scatter[1] / len(late)))
    return (
        abs(fall) < max(0.1, 3 * noise, 0.3 * np.sqrt(scatter[1])),
        f"between the second fifth and the last tenth of the run the loss fell by {fall:.3g} nats (+- {noise:.2g}).",
    )


def elbo(fit: SVIFit, *, key: Key | int = 0, num_particles: int = 4000) -> tuple[float, float]:
    """The fitted guide's ELBO, a lower bound on the log evidence, by Monte Carlo: `(value, standard error)`."""
    params = fit.svi.get_params(fit.state)

    def one(k: jax.Array) -> jax.Array:
        loss = Trace_ELBO().loss(k, params, fit.svi.model, fit.svi.guide, *fit.args, **fit.kwargs)
        return -jnp.asarray(loss)

    keys = jax.random.split(as_key(key), num_particles)
    values = np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=500))(keys))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(num_particles))


def model_of(fit: MCMC | SVIFit) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model of a fit and the arguments it was run with."""
    if isinstance(fit, MCMC):
        return fit.sampler.model, fit._args, fit._kwargs
    if isinstance(fit, SVIFit):
        return fit.svi.model, fit.args, fit.kwargs
    raise TypeError(f"`fit` must come from `fit_nuts`, `fit_svi` or `MCMC.run`; got {type(fit).__name__}.")


def posterior_draws(fit: MCMC | SVIFit, *, num_samples: int = 4000, key: Key | int = 0) -> dict[str, np.ndarray]:
    """Posterior draws of every latent and deterministic site, with leading axes `(chain, draw)`.

    Draws of an SVI fit are independent and come as one chain. Auxiliary sites are left out.
    """
    if isinstance(fit, MCMC):
        return {name: np.asarray(x) for name, x in fit.get_samples(group_by_chain=True).items()}
    model, args, kwargs = model_of(fit)
    params = fit.svi.get_params(fit.state)
    draw_key, site_key = jax.random.split(as_key(key))
    guide = fit.svi.guide
    if isinstance(guide, AutoGuide):
        latents = guide.sample_posterior(draw_key, params, *args, sample_shape=(num_samples,), **kwargs)
    else:
        latents = numpyro.infer.Predictive(guide, params=params, num_samples=num_samples)(draw_key, *args, **kwargs)

    def deterministic(sample: dict[str, jax.Array]) -> dict[str, jax.Array]:
        trace = trace_with(model, sample, *args, **kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

    extra = jax.lax.map(deterministic, latents, batch_size=500)
    return {name: np.asarray(x)[None] for name, x in {**latents, **extra}.items()}


def trace_with(model: Callable[..., Any], values: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's trace with latent sites set to `values`."""
    seeded = numpyro.handlers.seed(numpyro.handlers.substitute(model, data=values), jax.random.key(0))
    return numpyro.handlers.trace(seeded).get_trace(*args, **kwargs)


def flatten_draws(draws: dict[str, Any]) -> dict[str, jax.Array]:
    """Merges the `(chain, draw)` axes."""
    return {name: jnp.asarray(x).reshape(-1, *jnp.shape(x)[2:]) for name, x in draws.items()}
