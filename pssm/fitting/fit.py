"""Thin fits: NumPyro's own samplers and optimisers, started well, with the result objects NumPyro gives."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIRunResult

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Key
from pssm.fitting.chains import CHUNK, EXTRA_FIELDS, Chains, ChainsState, fill, run_chains, warn_of_divergences
from pssm.fitting.devices import local_copy, partition
from pssm.fitting.fitted import (
    SVIFit,
    TrainingError,
    _convergence,
    elbo,
    flatten_draws,
    model_of,
    posterior_draws,
    trace_with,
)
from pssm.fitting.prepare import GUIDES, build_mcmc, build_svi, initial_state, on_host
from pssm.fitting.record import NutsWriter, SVIWriter, nuts_manifest, remember, start_folder, svi_manifest
from pssm.fitting.train import Settings, TrainState, train
from pssm.objectives.constraint import constraint_weights


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
    checkpoint: str | Path | None = None,
    chunk: int | None = None,
    **kwargs: Any,
) -> MCMC:
    """Runs NUTS on a NumPyro model; the same as `MCMC(NUTS(model), ...).run(key, *args, **kwargs)`.

    With `checkpoint` or `chunk` it runs in pieces of at most `chunk` steps (of some ten seconds, where steps are slow):
    Ctrl-C then returns the draws there are, and what is in the folder survives a kill.

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
        chain_method: as in `numpyro.infer.MCMC`; in pieces, "parallel" chains run one after the other.
        checkpoint: a new folder for state and draws, written after each piece; `pssm.infer.resume` goes on from it.
        chunk: most steps in a piece; 100 with `checkpoint`.
        kwargs: the model's keyword arguments.

    Returns:
        NumPyro's `MCMC`, run. Divergent transitions are warned of.

    Raises:
        ValueError: a count is below 1.
        FileExistsError: there is something at `checkpoint` already.

    Example:
        >>> from pssm import datasets, models
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=100, num_chains=1, progress_bar=False)
        >>> mcmc.get_samples()["sigma_obs"].shape
        (100,)
    """
    mcmc = build_mcmc(
        model,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        target_accept_prob=target_accept_prob,
        dense_mass=dense_mass,
        max_tree_depth=max_tree_depth,
        progress_bar=progress_bar,
    )
    key = as_key(key)
    if checkpoint is None and chunk is None:
        begun = time.perf_counter()
        mcmc.run(key, *args, extra_fields=EXTRA_FIELDS, **kwargs)
        remember(mcmc, seed=key, seconds=time.perf_counter() - begun)
        warn_of_divergences(mcmc)
        return mcmc
    each = None
    if checkpoint is not None:
        folder = start_folder(checkpoint, *nuts_manifest(mcmc, args, kwargs))
        each = NutsWriter(folder, num_samples, key)
    chains = Chains(mcmc, args, kwargs, check_count("chunk", CHUNK if chunk is None else chunk))
    return finish_chains(chains, chains.start(key), num_samples, key, each, progress_bar)


def finish_chains(
    chains: Chains, run: ChainsState, num_samples: int, key: Any, each: NutsWriter | None, progress_bar: bool
) -> MCMC:
    """Runs chains from where they are to `num_samples` draws, and returns NumPyro's `MCMC` with them."""
    run, interrupted = run_chains(chains, run, num_samples, progress_bar=progress_bar, each=each)
    mcmc = fill(chains.mcmc, run, chains.args, chains.kwargs)
    remember(mcmc, seed=key, seconds=run.seconds, interrupted=interrupted)
    if interrupted:
        warnings.warn(
            f"NUTS was interrupted with {mcmc.num_samples} of {num_samples} draws in each chain.", stacklevel=3
        )
    warn_of_divergences(mcmc, stacklevel=4)
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
    checkpoint: str | Path | None = None,
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
        checkpoint: a new folder for the state, written every few seconds; `pssm.infer.resume` goes on from it.
        progress_bar: show a progress bar.
        kwargs: the model's keyword arguments.

    Returns:
        An `SVIFit`: NumPyro's result with `.converged` and `.message`. Not converged is warned of.

    Raises:
        ValueError: `guide` is unknown, a count is below 1, or `patience` is without `validation`.
        FileExistsError: there is something at `checkpoint` already.
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
    own_args, own_kwargs = local_copy((args, kwargs))
    key = as_key(key)
    svi = build_svi(model, settings)
    each = None
    if checkpoint is not None and jax.process_index() == 0:
        folder = start_folder(checkpoint, *svi_manifest(svi, settings, own_args, own_kwargs))
        each = SVIWriter(folder, settings, key)
    run = TrainState.start(initial_state(svi, key, own_args, own_kwargs))
    return finish_svi(svi, run, settings, args, kwargs, key, each, progress_bar)


def finish_svi(
    svi: SVI,
    run: TrainState,
    settings: Settings,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: Any,
    each: SVIWriter | None,
    progress_bar: bool,
) -> SVIFit:
    """Trains from where a run is to its end, and returns the fit."""
    spread = bool(partition((args, kwargs, settings.validation))[0])
    run = on_host(run) if spread else run
    outcome = train(svi, run, settings, args, kwargs, progress_bar=progress_bar, each=each)
    if each is not None:
        each(outcome.run, outcome.reason)
    if spread:
        args, kwargs = local_copy((args, kwargs))
        outcome = outcome._replace(run=jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), outcome.run))
    fit = as_fit(svi, outcome.run, outcome.reason, settings, args, kwargs)
    fit.seed = key
    _speak(fit, outcome.loss, progress_bar=progress_bar)
    return fit


def as_fit(
    svi: SVI, run: TrainState, reason: str, settings: Settings, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> SVIFit:
    """The fit of a run that has ended for a reason, with its convergence in words."""
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
    for site, weight in constraint_weights(chosen.mutable_state).items():
        fit.objective = f"surrogate: the likelihood of `{site}` has the weight {float(weight):.3g}"
    if reason == "patience":
        fit.converged = True
        fit.message = f"the validation loss was least after {run.best_step} steps and has not fallen since."
    if reason == "interrupted":
        fit.converged, fit.message = False, f"it was interrupted after {run.step} of {settings.num_steps} steps."
    return fit


def _speak(fit: SVIFit, last: float, *, progress_bar: bool) -> None:
    """Says how a run ended; raises where something was not finite."""
    reason, settings, step = fit.ended, fit.settings, len(fit.losses)
    if reason in ("loss", "gradient"):
        what = f"The loss became {last}" if reason == "loss" else "The gradient was not finite"
        raise TrainingError(
            f"{what} at step {step} of {settings.num_steps}. Lower `learning_rate` (now {settings.learning_rate}), "
            "or look at the model's priors with numpyro.infer.Predictive. A transition that explodes can be held by "
            "AmortizedStateSpace's `limit` or by `nets.Saturated`. The error's `.fit` is the fit before it.",
            fit,
        )
    if progress_bar and jax.process_index() == 0:
        print(f"Objective: {fit.objective}. {fit.message[0].upper()}{fit.message[1:]}")
    if not fit.converged:
        advice = "" if reason == "interrupted" else f" Raise `num_steps` (now {settings.num_steps})."
        warnings.warn(f"SVI has not converged: {fit.message}{advice}", stacklevel=4)


__all__ = [
    "GUIDES",
    "SVIFit",
    "TrainingError",
    "elbo",
    "fit_nuts",
    "fit_svi",
    "flatten_draws",
    "model_of",
    "posterior_draws",
    "trace_with",
]
