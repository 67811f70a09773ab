"""Fits on disk: save, load, and go on where a run stopped, with the same draws as if it had not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC

from pssm._checks import check_count
from pssm._keys import as_key
from pssm.fitting.chains import CHUNK, Chains, ChainsState, fill, of_mcmc
from pssm.fitting.devices import local_copy
from pssm.fitting.fit import as_fit, finish_chains, finish_svi
from pssm.fitting.fitted import SVIFit, model_of
from pssm.fitting.model_record import model_for
from pssm.fitting.prepare import build_mcmc, build_svi, state_shapes
from pssm.fitting.record import NutsWriter, SVIWriter, nuts_manifest, remember, run_info, start_folder, svi_manifest
from pssm.fitting.train import Settings, TrainState
from pssm.storage.folder import MAX_BYTES, FitFolder, SavedFitError
from pssm.storage.packing import call_digest, unpack, unpack_leaves

Fit = MCMC | SVIFit


def save(fit: Fit, path: str | Path, *, force: bool = False) -> Path:
    """Writes a fit into a folder: a JSON manifest and `.npz` files, nothing pickled.

    The manifest has the versions of the packages, back end, precision, seed, sha256 of the data, model and options,
    and wall time. A model of `pssm.models` is saved by its name, any other must be given to `load`; data and other
    arguments are saved where they are arrays, numbers, texts, or lists, tuples and dicts of these.

    Args:
        fit: from `fit_nuts`, `fit_svi` or NumPyro's own `MCMC(NUTS(model)).run`.
        path: the folder, made if need be.
        force: write over a saved fit.

    Returns:
        The folder's path.

    Raises:
        FileExistsError: there is something at `path`, and `force` is not given or it is no saved fit.
        TypeError: the kernel is not NUTS.

    Example:
        >>> import tempfile
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_svi
        >>> fit = fit_svi(models.local_level, datasets.load("nile").y, num_steps=2000, progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load(save(fit, folder + "/nile"))
        >>> bool((again.losses == fit.losses).all())
        True
    """
    model, args, kwargs = model_of(fit)
    if isinstance(fit, SVIFit):
        settings, run = _training(fit)
        folder = start_folder(path, *svi_manifest(fit.svi, settings, args, kwargs), force=force)
        SVIWriter(folder, settings, fit.seed)(run, fit.ended)
        return folder.path
    info = run_info(fit)
    run = of_mcmc(fit, info["seconds"])
    folder = start_folder(path, *nuts_manifest(fit, args, kwargs), force=force)
    NutsWriter(folder, fit.num_samples, info["seed"])(run)
    return folder.path


def load(
    path: str | Path,
    model: Callable[..., Any] | str | None = None,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    max_bytes: int = MAX_BYTES,
    **given: Any,
) -> Fit:
    """Reads a fit that `save` or a `checkpoint` has written; runs no code from the folder.

    Args:
        path: the folder.
        model: the model, if it is none of `pssm.models`.
        args: the model's positional arguments, if they could not be saved; must be those of the fit.
        kwargs: the same for its keyword arguments.
        max_bytes: a folder that declares more is refused.
        given: arguments of `fit_svi` that a file cannot hold, if the fit had them: `guide`, `optimizer`, `loss`,
            `learning_rate`, `kl_schedule`, `step_args`, `validation`.

    Returns:
        NumPyro's `MCMC` with its draws and last state, or an `SVIFit`.

    Raises:
        FileNotFoundError: there is no such folder.
        SavedFitError: it is no saved fit, was changed, or is of another model. A `ValueError`.
        ValueError: something that a file cannot hold is not given, the data are others, or 64-bit arithmetic differs.

    Example:
        See `save`.
    """
    return _Saved(path, model, args, kwargs, max_bytes, given).fit()


def resume(
    fit: Fit | str | Path,
    model: Callable[..., Any] | str | None = None,
    *,
    num_samples: int | None = None,
    num_steps: int | None = None,
    args: tuple[Any, ...] | None = None,
    kwargs: dict[str, Any] | None = None,
    progress_bar: bool = True,
    max_bytes: int = MAX_BYTES,
    **given: Any,
) -> Fit:
    """Goes on with a fit, from a folder or in memory, as if it had not stopped.

    From a folder written by `fit_nuts(checkpoint=...)` or `fit_svi(checkpoint=...)` the draws, or the losses, are bit
    for bit those of a run that was not interrupted, on the same machine with the same versions. The folder is kept up
    to date. SVI beyond its first `num_steps` keeps the step size that the schedule ends with.

    Args:
        fit: a folder, or a fit.
        model: the model, if the folder's is none of `pssm.models`.
        num_samples: draws of each chain in the end, those there are included; by default what was asked for at first.
        num_steps: steps of SVI in the end, likewise.
        args: as in `load`, like the next one.
        kwargs: as in `load`.
        progress_bar: show a progress bar.
        max_bytes: as in `load`.
        given: as in `load`.

    Returns:
        NumPyro's `MCMC`, or an `SVIFit`, with all draws or losses.

    Raises:
        ValueError: there is nothing left to do.
        SavedFitError: as in `load`; other errors too.

    Example:
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_nuts
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=50, num_chains=1, progress_bar=False)
        >>> resume(mcmc, num_samples=80, progress_bar=False).get_samples()["sigma_obs"].shape
        (80,)
    """
    if isinstance(fit, MCMC):
        check_count("num_samples", num_samples if num_samples is not None else 0)
        _, own_args, own_kwargs = model_of(fit)
        info = run_info(fit)
        return _more_draws(fit, of_mcmc(fit, info["seconds"]), own_args, own_kwargs, num_samples, info["seed"],
                           None, progress_bar)  # fmt: skip
    if isinstance(fit, SVIFit):
        settings, run = _training(fit)
        settings = _extended(settings, run, num_steps)
        return finish_svi(fit.svi, run, settings, fit.args, fit.kwargs, fit.seed, None, progress_bar)
    saved = _Saved(fit, model, args, kwargs, max_bytes, given)
    return saved.more_draws(num_samples, progress_bar) if saved.kind == "nuts" else saved.train(num_steps, progress_bar)


class _Saved:
    """An open folder, with the model and the arguments of its fit."""

    def __init__(self, path: Any, model: Any, args: Any, kwargs: Any, max_bytes: int, given: dict[str, Any]):
        self.folder = FitFolder.open(path, max_bytes=max_bytes)
        self.manifest, self.given = self.folder.manifest, given
        self.kind = self.manifest.get("kind")
        if self.kind not in ("nuts", "svi"):
            raise SavedFitError(f"`path` {path}: its kind is {str(self.kind)[:40]!r}, not 'nuts' or 'svi'.")
        self._same_precision()
        groups = self.folder.read("arguments")
        self.arrays = groups[0] if groups else {}
        self.model = model_for(self.manifest, self.arrays, model)
        self.spread = (args, kwargs)
        self.args, self.kwargs = self._arguments(*local_copy((args, kwargs)))

    def fit(self) -> Fit:
        """The fit as it was saved."""
        if self.kind == "svi":
            svi, settings, run, key = self._svi()
            reason = str(self.manifest.get("ended") or "interrupted")
            found = as_fit(svi, run, reason, settings, self.args, self.kwargs)
            found.seed = key
            return found
        mcmc, run, key = self._chains()
        if not run.draws:
            raise ValueError(f"`path` {self.folder.path}: the run is still in its warm-up; see `pssm.infer.resume`.")
        remember(mcmc, seed=key, seconds=run.seconds)
        return fill(mcmc, run, self.args, self.kwargs)

    def more_draws(self, num_samples: int | None, progress_bar: bool) -> MCMC:
        mcmc, run, key = self._chains()
        target = num_samples or self._number("progress", "num_samples")
        writer = NutsWriter(self.folder, target, key, saved=len(run.draws))
        return _more_draws(mcmc, run, self.args, self.kwargs, target, key, writer, progress_bar)

    def train(self, num_steps: int | None, progress_bar: bool) -> SVIFit:
        svi, settings, run, key = self._svi()
        settings = _extended(settings, run, num_steps or self._number("progress", "num_steps"))
        writer = SVIWriter(self.folder, settings, key)
        args = self.args if self.spread[0] is None else tuple(self.spread[0])
        kwargs = self.kwargs if self.spread[1] is None else dict(self.spread[1])
        each = writer if jax.process_index() == 0 else None
        return finish_svi(svi, run, settings, args, kwargs, key, each, progress_bar)

    def _chains(self) -> tuple[MCMC, ChainsState, Any]:
        try:
            options = dict(self.manifest["settings"])
            options |= {n: unpack(options[n], {}) for n in ("dense_mass", "max_tree_depth")}
            target = self._number("progress", "num_samples")
            mcmc, like = (build_mcmc(self.model, num_samples=target, progress_bar=False, **options) for _ in range(2))
        except (KeyError, TypeError) as error:
            raise SavedFitError(f"`path` {self.folder.path}: its settings of NUTS cannot be read: {error}") from None
        chains = Chains(like, self.args, self.kwargs)
        shapes = jax.eval_shape(lambda key: chains.start(key).state, jax.random.key(0))
        state = unpack_leaves(shapes, self._state())
        seconds = float((self.manifest.get("provenance") or {}).get("wall_seconds") or 0.0)
        run = ChainsState(state, self.folder.read("draws"), self._number("progress", "iterations"), seconds)
        return mcmc, run, self._seed()

    def _svi(self) -> tuple[Any, Settings, TrainState, Any]:
        settings = self._settings()
        svi = build_svi(self.model, settings)
        key = self._seed()
        shapes = state_shapes(svi, jax.random.key(0) if key is None else key, self.args, self.kwargs)
        parts = {p: self.folder.read(p) for p in ("best", "history")}
        state = unpack_leaves({"state": shapes}, self._state())["state"]
        best = unpack_leaves({"state": shapes}, parts["best"][0])["state"] if parts["best"] else None
        history = parts["history"][0] if parts["history"] else {}
        if set(history) != {"losses", "validation"}:
            raise SavedFitError(f"`path` {self.folder.path}: it has no losses.")
        seconds = float((self.manifest.get("provenance") or {}).get("wall_seconds") or 0.0)
        return svi, settings, TrainState(state, best, history["losses"], history["validation"], seconds), key

    def _settings(self) -> Settings:
        missing = [n for n in self.manifest.get("given", []) if n not in self.given]
        if missing:
            names = ", ".join(f"`{n}`" for n in missing)
            raise ValueError(f"{names} must be given again: a file cannot hold what this fit was run with.")
        known = {f.name for f in dataclasses.fields(Settings)}
        if not set(self.given) <= known:
            raise TypeError(f"`given` has what is no argument of `fit_svi`: {sorted(set(self.given) - known)}.")
        try:
            options = {n: x for n, x in self.manifest["settings"].items() if n in known}
            held_out = {n.removeprefix("validation "): x for n, x in self.arrays.items() if n.startswith("validation ")}
            options["validation"] = unpack(self.manifest["validation"], held_out)
            return Settings(**{**options, **self.given})
        except (KeyError, TypeError, AttributeError) as error:
            raise SavedFitError(f"`path` {self.folder.path}: its settings of SVI cannot be read: {error}") from None

    def _state(self) -> dict[str, np.ndarray]:
        groups = self.folder.read("state")
        if not groups:
            raise SavedFitError(f"`path` {self.folder.path}: it has no state.")
        return groups[0]

    def _seed(self) -> Any:
        seed = (self.manifest.get("provenance") or {}).get("seed")
        if not (isinstance(seed, list) and len(seed) == 2 and all(type(x) is int and 0 <= x < 2**32 for x in seed)):
            return None
        return jax.random.wrap_key_data(np.asarray(seed, np.uint32))

    def _number(self, part: str, name: str) -> int:
        value = (self.manifest.get(part) or {}).get(name)
        if type(value) is not int or value < 0:
            raise SavedFitError(f"`path` {self.folder.path}: `{part}` has no number `{name}`.")
        return value

    def _arguments(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        saved = self.manifest.get("arguments")
        if saved is None and args is None and kwargs is None:
            raise ValueError("`args` must be given: the model's arguments could not be saved with this fit.")
        found = {"args": (), "kwargs": {}} if saved is None else unpack(saved, self.arrays)
        if not isinstance(found, dict) or set(found) != {"args", "kwargs"}:
            raise SavedFitError(f"`path` {self.folder.path}: its arguments cannot be read.")
        if args is None and kwargs is None:
            return found["args"], found["kwargs"]
        args = found["args"] if args is None else tuple(args)
        kwargs = found["kwargs"] if kwargs is None else dict(kwargs)
        if saved is not None and call_digest(args, kwargs) != self.manifest.get("data_sha256"):
            raise ValueError("`args` are not those of the saved fit: their sha256 differs. Leave them out, or refit.")
        return args, kwargs

    def _same_precision(self) -> None:
        saved = (self.manifest.get("provenance") or {}).get("x64")
        if saved is not None and bool(saved) != bool(jax.config.read("jax_enable_x64")):
            raise ValueError(
                f"`path` {self.folder.path} was saved with jax_enable_x64={saved}; set "
                f'jax.config.update("jax_enable_x64", {saved}) first.'
            )


def _more_draws(mcmc, run, args, kwargs, num_samples, key, writer, progress_bar) -> MCMC:
    if run.iterations >= mcmc.num_warmup + num_samples:
        there = run.iterations - mcmc.num_warmup
        raise ValueError(f"`num_samples` must be more than the {there} draws there are; got {num_samples}.")
    if mcmc.sampler._sample_fn is not None:  # a fit in memory keeps its own
        method = mcmc.chain_method if isinstance(mcmc.chain_method, str) else "vectorized"
        mcmc = _twin(mcmc, method)
    chains = Chains(mcmc, args, kwargs, CHUNK)
    chains.start(jax.random.key(0) if key is None else as_key(key))  # makes the kernel ready; the state is replaced
    return finish_chains(chains, run, num_samples, key, writer, progress_bar)


def _twin(mcmc: MCMC, method: str) -> MCMC:
    kernel = mcmc.sampler
    return build_mcmc(
        kernel.model,
        num_warmup=mcmc.num_warmup,
        num_samples=mcmc.num_samples,
        num_chains=mcmc.num_chains,
        chain_method=method,
        target_accept_prob=kernel._target_accept_prob,
        dense_mass=kernel._dense_mass,
        max_tree_depth=kernel._max_tree_depth,
        progress_bar=False,
    )


def _training(fit: SVIFit) -> tuple[Settings, TrainState]:
    """How a fit was trained and where it is, also of a run of NumPyro's own."""
    settings = fit.settings or Settings(
        guide=fit.svi.guide, optimizer=fit.svi.optim, loss=fit.svi.loss, num_steps=max(len(fit.losses), 10)
    )
    run = fit.run or TrainState.start(fit.state)._replace(losses=np.asarray(fit.losses))
    return settings, run


def _extended(settings: Settings, run: TrainState, num_steps: int | None) -> Settings:
    """The settings with more steps, and with the step sizes of the first run."""
    target = settings.num_steps if num_steps is None else num_steps
    if run.step >= target:
        raise ValueError(f"`num_steps` must be more than the {run.step} steps taken; got {target}.")
    every = settings.every if settings.validation is not None else None
    first = settings.schedule_steps or settings.num_steps
    return dataclasses.replace(settings, num_steps=target, schedule_steps=first, validate_every=every)


__all__ = ["SavedFitError", "load", "resume", "save"]
