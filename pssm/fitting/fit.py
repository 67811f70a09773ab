"""Thin fits: NumPyro's own samplers and optimisers, started well, with the result objects NumPyro gives."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS, SVI, init_to_uniform
from numpyro.infer.autoguide import AutoGuide

from pssm._checks import is_pandas, is_rounded, is_traced, unmasked_arguments
from pssm._keys import as_key
from pssm._types import KeyLike
from pssm.devices import is_here
from pssm.fitting.loop import Engine, Saver, finish
from pssm.fitting.mclmc import MCLMCEngine
from pssm.fitting.mcmc import NutsEngine
from pssm.fitting.results import FitRecord, SVIFit, record_of, with_labels
from pssm.fitting.svi import SVIEngine
from pssm.fitting.training import Settings
from pssm.models.scales import counts_from_origin


def fit_nuts(
    model: Callable[..., Any],
    *args: Any,
    key: KeyLike = 0,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    progress_bar: bool = True,
    target_accept_prob: float = 0.8,
    dense_mass: bool = False,
    max_tree_depth: int = 10,
    chain_method: str = "vectorized",
    init_strategy: Callable[..., Any] = init_to_uniform,
    thinning: int = 1,
    extra_fields: tuple[str, ...] = (),
    checkpoint: str | Path | None = None,
    chunk: int | None = None,
    **kwargs: Any,
) -> MCMC:
    """Runs NUTS on a NumPyro model; the same as `MCMC(NUTS(model), ...).run(key, *args, **kwargs)`.

    With `checkpoint` or `chunk` it runs in pieces of at most `chunk` steps (of some ten seconds, where steps are slow):
    Ctrl-C then returns the draws there are, and the folder survives a kill.

    Args:
        model: a NumPyro model.
        args: the model's positional arguments, such as the data. A frame or a series of pandas, as the first of them,
            gives the results its index as time, and its columns' names.
        key: random key, or a whole number to make one from; the same key gives the same draws.
        num_warmup: adaptation steps for each chain.
        num_samples: draws kept for each chain.
        num_chains: number of chains.
        progress_bar: show a progress bar.
        target_accept_prob: as in `numpyro.infer.NUTS`, like the next two.
        dense_mass: as in `numpyro.infer.NUTS`.
        max_tree_depth: as in `numpyro.infer.NUTS`.
        chain_method: as in `numpyro.infer.MCMC`.
        init_strategy: where the chains start, one of NumPyro's, such as `numpyro.infer.init_to_value(values=...)`.
        thinning: steps for each draw that is kept, as in `numpyro.infer.MCMC`: `num_samples` counts the steps.
        extra_fields: further fields of the kernel's state to keep with each draw, such as `("adapt_state.step_size",)`.
        checkpoint: a new folder for state and draws, written after each piece; `pssm.infer.resume` goes on from it.
        chunk: most steps in a piece; 100 with `checkpoint`.
        kwargs: the model's keyword arguments.

    Returns:
        NumPyro's `MCMC`, run; in pieces an `MCMCFit`, which is one that knows its seed, time and end. Divergent
        transitions are warned of.

    Raises:
        ValueError: a count is below 1, or `num_samples` is no multiple of `thinning`.
        TypeError: a keyword that is an option of `numpyro.infer.NUTS` or `MCMC` and no argument of the model.
        FileExistsError: there is something at `checkpoint` already.

    Example:
        >>> from pssm import datasets, models
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=100, num_chains=1, progress_bar=False)
        >>> mcmc.get_samples()["sigma_obs"].shape
        (100,)
    """
    args, kwargs, labels = prepared_arguments("fit_nuts", model, args, kwargs, NUTS, MCMC)
    engine = NutsEngine(
        model,
        args,
        kwargs,
        num_samples=num_samples,
        num_warmup=num_warmup,
        num_chains=num_chains,
        chain_method=chain_method,
        chunk=chunk,
        init_strategy=init_strategy,
        thinning=thinning,
        extra_fields=extra_fields,
        target_accept_prob=target_accept_prob,
        dense_mass=dense_mass,
        max_tree_depth=max_tree_depth,
    )
    if checkpoint is not None or chunk is not None:
        return begin(engine, key, checkpoint, progress_bar, labels)
    mcmc = engine.mcmc(progress_bar=progress_bar)
    mcmc.run(as_key(key), *args, extra_fields=engine.fields, **kwargs)
    for text in record_of(mcmc).warnings:
        warnings.warn(text, stacklevel=2)
    return with_labels(mcmc, labels)


def fit_mclmc(
    model: Callable[..., Any],
    *args: Any,
    key: KeyLike = 0,
    num_warmup: int = 5000,
    num_samples: int = 1000,
    num_chains: int = 4,
    thinning: int = 10,
    checkpoint: str | Path | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> FitRecord:
    """Runs microcanonical Langevin Monte Carlo (BlackJAX) on a NumPyro model: for many unknowns, such as a whole path.

    Two gradients a step, whatever the size of the model. The steps are not adjusted, so the draws have a small bias,
    which the tuning holds below the spread by the error of the energy. Compare with `fit_nuts` where that is in reach.

    Args:
        model: a NumPyro model with at least two unknowns.
        args: the model's positional arguments, such as the data.
        key: random key, or a whole number to make one from; the same key gives the same draws.
        num_warmup: steps of each chain in which step size and scales are found, in one piece.
        num_samples: draws kept for each chain.
        num_chains: number of chains, side by side.
        thinning: steps for each draw.
        checkpoint: a new folder for state and draws; `pssm.infer.resume` goes on from it.
        progress_bar: show a progress bar.
        kwargs: the model's keyword arguments.

    Returns:
        A `FitRecord`; `to_datatree`, `forecast`, `save` and `resume` take it like any other fit.

    Raises:
        ImportError: BlackJAX is not installed (the extra `mclmc`).
        ValueError: a count is below 1, or the model has one unknown only.
        FileExistsError: there is something at `checkpoint` already.

    Example:
        >>> from pssm import datasets, models
        >>> y = datasets.load("nile").y
        >>> fit = fit_mclmc(models.local_level, y, num_warmup=500, num_samples=100, num_chains=2, progress_bar=False)
        >>> fit.draws()["sigma_obs"].shape
        (2, 100)

    Source:
        Robnik, De Luca, Silverstein & Seljak 2023, "Microcanonical Hamiltonian Monte Carlo".
    """
    args, kwargs, labels = prepared_arguments("fit_mclmc", model, args, kwargs)
    options = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains, "thinning": thinning}
    return begin(MCLMCEngine(model, args, kwargs, **options), key, checkpoint, progress_bar, labels)


def fit_svi(
    model: Callable[..., Any],
    *args: Any,
    guide: str | AutoGuide | Callable[..., Any] = "mvn",
    rank: int = 4,
    key: KeyLike = 0,
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
        key: random key, or a whole number to make one from; the same key gives the same fit.
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
    args, kwargs, labels = prepared_arguments("fit_svi", model, args, kwargs, SVI)
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
        validation=unmasked_arguments(validation, {})[0] if isinstance(validation, tuple) else validation,
        validate_every=validate_every,
        patience=patience,
    )
    return begin(SVIEngine(model, args, kwargs, settings), key, checkpoint, progress_bar, labels)


def prepared_arguments(
    function: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *options: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The model's arguments as plain arrays with NaN, and the labels of its data (`_labels_of`).

    An option of NumPyro's classes among them is refused.
    """
    labels = _labels_of(model, args, kwargs)
    own = inspect.signature(model).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values()):
        for kind in options:
            for name in (n for n in kwargs if n not in own and n in inspect.signature(kind).parameters):
                raise TypeError(
                    f"`{name}` is an option of `numpyro.infer.{kind.__name__}` that `{function}` does not have, and no "
                    f"argument of the model. Run NumPyro's own `{kind.__name__}`; pssm takes its results as they are."
                )
    args, kwargs = unmasked_arguments(args, kwargs)
    for text in doubts(model, args, double=function in ("fit_ml", "fit_map")):
        warnings.warn(text, stacklevel=3)
    return args, kwargs, labels


def doubts(model: Callable[..., Any], args: tuple[Any, ...], *, double: bool = False) -> list[str]:
    """What is wrong with a model's data before they are fitted, in words: nothing to learn from, or digits lost.

    The linear models of pssm count such data from an origin, and lose none; nor does a fit in 64 bits (`double`).
    """
    found = []
    leaves = [x for x in jax.tree.leaves(args) if isinstance(x, np.ndarray | jax.Array) and np.ndim(x)]
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating) and not is_traced(x) and is_here(x)]
    if floats and floats[0] is leaves[0] and np.isnan(np.asarray(floats[0])).all():
        found.append("the data have no observed value: the draws are those of the prior.")
    if not double and not counts_from_origin(model) and any(is_rounded(x) for x in floats):
        found.append(
            "the data are 64-bit numbers whose typical step is close to what 32-bit numbers of their size can tell "
            "apart. Subtract a constant from them, or switch on 64-bit arithmetic with "
            'jax.config.update("jax_enable_x64", True).'
        )
    return found


def _labels_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The labels that data, the first argument, and inputs `u` have as frames of pandas; None where neither is one.

    Raises:
        ValueError: the index does not increase, or another frame has other rows than the data.
    """
    try:
        u = inspect.signature(model).bind_partial(*args, **kwargs).arguments.get("u")
    except TypeError:  # which the model will say better
        u = None
    if not args or not (is_pandas(args[0]) or is_pandas(u)):
        return None
    from pssm.times.labels import check_same_index, labels_beside  # pandas, which is there already

    for name, x in {**kwargs, "u": u}.items():
        check_same_index(args[0], name, x)
    return labels_beside(args[0], u)


def begin(
    engine: Engine[Any], key: KeyLike, checkpoint: str | Path | None, progress_bar: bool, labels: Any = None
) -> Any:
    """Runs an engine from its start to its end, with a new folder for what it reaches if there is to be one."""
    seed = as_key(key)
    engine.labels = labels
    save = None
    if checkpoint is not None and jax.process_index() == 0:
        save = Saver.create(checkpoint, engine, seed)
    return finish(engine, engine.start(seed), seed, save=save, progress_bar=progress_bar)
