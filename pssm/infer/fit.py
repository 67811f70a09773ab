"""Thin fits: NumPyro's own samplers and optimisers, started well, with the result objects NumPyro gives."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS, init_to_uniform
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIRunResult

from pssm._checks import check_count
from pssm._types import Key
from pssm.infer.devices import local_copy, partition
from pssm.infer.fitted import (
    SVIFit,
    TrainingError,
    _convergence,
    as_key,
    elbo,
    flatten_draws,
    model_of,
    posterior_draws,
    trace_with,
)
from pssm.infer.prepare import GUIDES, build_svi, initial_state, on_host
from pssm.infer.train import Outcome, Settings, TrainState, train


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


def fit_svi(
    model: Callable[..., Any],
    *args: Any,
    guide: str | AutoGuide | Callable[..., Any] = "mvn",
    rank: int = 4,
    key: Key | int = 0,
    num_steps: int = 5000,
    learning_rate: float | Callable[[Any], Any] = 0.01,
    clip_norm: float | None = 100.0,
    optimizer: Any = None,
    loss: Any = None,
    kl_schedule: Callable[[Any], Any] | None = None,
    step_args: Callable[..., Any] | None = None,
    validation: tuple[Any, ...] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> SVIFit:
    """Fits a guide by stochastic variational inference, from a data-scaled start.

    The automatic guides start at the median of the prior, which pssm's models scale by the data, and not at a random
    point near zero. The step size decays to zero (cosine), so that the end is not noise around the optimum. Ctrl-C
    ends the run with what there is, and a step that is not finite is not taken: it ends the run with an error that
    carries the fit before it.

    Args:
        model: a NumPyro model.
        args: the model's positional arguments.
        guide: "mvn" (`AutoMultivariateNormal`), "normal" (`AutoNormal`), a family of `AutoStateSpace` ("chain",
            "moment_matched", "diagonal") for a model with `StatePath` sites, or any NumPyro guide.
        rank: of those families.
        key: random key, or a whole number to make one from.
        num_steps: optimisation steps.
        learning_rate: first step size of Adam, or an optax schedule; not used with `optimizer`.
        clip_norm: gradients longer than this are shortened to it; None for never. Not used with `optimizer`.
        optimizer: an optax or NumPyro optimiser instead.
        loss: an ELBO; by default `Trace_ELBO(num_particles=8)`, a lower bound on the log evidence.
        kl_schedule: the weight of the KL divergence at a step (traced), 1 at the end for a bound:
            `optax.linear_schedule(0.1, 1.0, 500)`. The losses are those of the weighted objective; convergence is
            judged where the weight has its last value. Validation has the weight 1.
        step_args: `(step, key, *args) -> args`, traced: the model's positional arguments at each step, of the same
            shapes. For a minibatch, or for a masking schedule: entries made NaN are missing.
        validation: positional arguments of the model that are held out, `(y_held_out,)`; the fit's state is then that
            with the least validation loss, and `.validation` has the losses. A guide with parameters for every trial
            needs the same trials: hold out entries, as NaN in one array and kept in the other.
        validate_every: steps between two validations; by default a fiftieth of `num_steps`.
        patience: stop after so many validations without a new best one.
        progress_bar: show a progress bar.
        kwargs: the model's keyword arguments.

    Returns:
        An `SVIFit`: NumPyro's result with `.converged` and `.message`. Not converged is warned of.

    Raises:
        ValueError: `guide` is unknown, a count is below 1, or `patience` is without `validation`.
        TrainingError: the loss or a gradient was not finite; says at which step, and has the last good fit as `.fit`.
            It is a `FloatingPointError`.

    Example:
        >>> from pssm import datasets, models
        >>> fit = fit_svi(models.local_level, datasets.load("nile").y, num_steps=2000, progress_bar=False)
        >>> fit.losses.shape, fit.converged
        ((2000,), True)
    """
    settings = Settings(
        guide=guide,
        rank=rank,
        num_steps=num_steps,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        optimizer=optimizer,
        loss=loss,
        kl_schedule=kl_schedule,
        step_args=step_args,
        validation=validation,
        validate_every=validate_every,
        patience=patience,
    )
    return run_svi(model, args, kwargs, settings, as_key(key), progress_bar=progress_bar)


def run_svi(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    settings: Settings,
    key: Key,
    *,
    progress_bar: bool = True,
) -> SVIFit:
    """What `fit_svi` does with its arguments."""
    own_args, own_kwargs = local_copy((args, kwargs))
    svi = build_svi(model, settings)
    state = initial_state(svi, key, own_args, own_kwargs)
    spread = bool(partition((args, kwargs, settings.validation))[0])
    run = TrainState.start(on_host(state) if spread else state)
    outcome = train(svi, run, settings, args, kwargs, progress_bar=progress_bar)
    if spread:
        outcome = outcome._replace(run=jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), outcome.run))
    return svi_fit(svi, outcome, settings, own_args, own_kwargs, progress_bar=progress_bar)


def svi_fit(
    svi: Any, outcome: Outcome, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any], *, progress_bar: bool
) -> SVIFit:
    """The fit of a run that has ended; speaks of an end that is not as it should be."""
    run, reason, last = outcome
    chosen = run.chosen
    fit = SVIFit.of(svi, SVIRunResult(svi.get_params(chosen), chosen, jnp.asarray(run.losses)), *args, **kwargs)
    fit.run, fit.settings, fit.ended = run, settings, reason
    schedule = settings.kl_schedule
    if schedule is not None:
        weights = np.asarray(jax.vmap(lambda i: jnp.asarray(schedule(i), float))(jnp.arange(run.step)))
        end = settings.weight(settings.num_steps)
        changing = np.flatnonzero(weights != end)
        fit.converged, fit.message = _convergence(run.losses[changing[-1] + 1 if changing.size else 0 :])
        if end != 1.0:
            fit.objective = f"surrogate: the KL divergence has the weight {end:g}"
    if reason == "patience":
        fit.converged = True
        fit.message = f"the validation loss was least after {run.best_step} steps and has not fallen since."
    if reason == "interrupted":
        fit.converged, fit.message = False, f"it was interrupted after {run.step} of {settings.num_steps} steps."
    if reason in ("loss", "gradient"):
        what = f"The loss became {last}" if reason == "loss" else "The gradient was not finite"
        raise TrainingError(
            f"{what} at step {run.step} of {settings.num_steps}. Lower `learning_rate` (now {settings.learning_rate}), "
            "or look at the model's priors with numpyro.infer.Predictive. The error's `.fit` is the fit before it.",
            fit,
        )
    if progress_bar and jax.process_index() == 0:
        print(f"Objective: {fit.objective}. {fit.message[0].upper()}{fit.message[1:]}")
    if not fit.converged:
        advice = "" if reason == "interrupted" else f" Raise `num_steps` (now {settings.num_steps})."
        warnings.warn(f"SVI has not converged: {fit.message}{advice}", stacklevel=4)
    return fit


__all__ = [
    "GUIDES",
    "SVIFit",
    "TrainingError",
    "as_key",
    "elbo",
    "fit_nuts",
    "fit_svi",
    "flatten_draws",
    "model_of",
    "posterior_draws",
    "trace_with",
]
