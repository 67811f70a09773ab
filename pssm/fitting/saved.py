"""Fits on disk: save, load, and go on where a run stopped, with the same draws as if it had not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC

from pssm.devices import local_copy
from pssm.fitting.corrected import CorrectedEngine
from pssm.fitting.loop import Engine, Saver, finish
from pssm.fitting.mclmc import MCLMCEngine
from pssm.fitting.mcmc import NutsEngine
from pssm.fitting.ml import ModeEngine, PointEngine
from pssm.fitting.model_record import model_for
from pssm.fitting.nodes import NodesEngine
from pssm.fitting.results import Fit, SVIFit, record_of, with_labels
from pssm.fitting.svi import SVIEngine
from pssm.storage.folder import MAX_BYTES, FitFolder, SavedFitError
from pssm.storage.packing import call_digest, unpack

ENGINES: dict[str, Any] = {
    engine.kind: engine
    for engine in (NutsEngine, SVIEngine, MCLMCEngine, PointEngine, ModeEngine, NodesEngine, CorrectedEngine)
}


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
    engine, run = _engine_of(fit)
    record = record_of(fit)
    save_run = Saver.create(path, engine, record.seed, force=force)
    save_run(run, record.ended or engine.done(run))
    return save_run.folder.path


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
    saved = _Saved(path, model, args, kwargs, max_bytes, given)
    engine, run, seed = saved.run()
    fit = engine.result(run, str(saved.manifest.get("ended") or engine.done(run) or "interrupted"), seed)
    return with_labels(fit, engine.labels)


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
    target = num_samples if num_steps is None else num_steps
    if isinstance(fit, str | Path):
        saved = _Saved(fit, model, args, kwargs, max_bytes, given)
        engine, run, seed = saved.run()
        engine = _extended(engine, run, saved.number(engine.counts[1]) if target is None else target)
        writer = Saver(saved.folder, engine, seed) if jax.process_index() == 0 else None
        return finish(engine, run, seed, save=writer, progress_bar=progress_bar)
    engine, run = _engine_of(fit)
    return finish(_extended(engine, run, target), run, record_of(fit).seed, progress_bar=progress_bar)


def _engine_of(fit: Any) -> tuple[Engine[Any], Any]:
    """What can go on with a fit, and where it is."""
    record = record_of(fit)
    if isinstance(fit, MCMC):
        engine, run = NutsEngine.of(fit)
    elif isinstance(fit, SVIFit):
        engine, run = SVIEngine.of(fit)
    else:
        engine, run = record.engine, record.run
    engine.labels = record.labels
    return engine, run


def _extended(engine: Engine[Any], run: Any, target: int | None) -> Engine[Any]:
    """The engine with another target, and the labels of its data."""
    longer = engine.extended(run, target)
    longer.labels = engine.labels
    return longer


class _Saved:
    """An open folder, with the model and the arguments of its fit: all that an engine is made of again."""

    def __init__(self, path: Any, model: Any, args: Any, kwargs: Any, max_bytes: int, given: dict[str, Any]):
        self.folder = FitFolder.open(path, max_bytes=max_bytes)
        self.manifest, self.given = self.folder.manifest, given
        self.kind = self.manifest.get("kind")
        if self.kind not in ENGINES:
            kinds = ", ".join(repr(kind) for kind in ENGINES)
            raise SavedFitError(f"`path` {path}: its kind is {str(self.kind)[:40]!r}, not one of {kinds}.")
        self._same_precision()
        groups = self.folder.read("arguments")
        self.arrays = groups[0] if groups else {}
        self.model = model_for(self.manifest, self.arrays, model)
        self.args, self.kwargs = self._arguments(*local_copy((args, kwargs)))
        # Arguments that are spread over devices stay where they are; those of the folder were checked against them.
        self.args = self.args if args is None else tuple(args)
        self.kwargs = self.kwargs if kwargs is None else dict(kwargs)

    def run(self) -> tuple[Engine[Any], Any, Any]:
        """The engine, the run and its random key."""
        try:
            engine = ENGINES[self.kind].reopen(self)
        except (KeyError, TypeError, AttributeError) as error:
            if "`given`" in str(error):
                raise
            raise SavedFitError(f"`path` {self.folder.path}: its settings cannot be read: {error}") from None
        if self.manifest.get("labels") is not None:
            from pssm.storage.labels import unpack_frame  # pandas, which takes a second to import

            engine.labels = unpack_frame(self.manifest["labels"], self.arrays)
        parts = {part: self.folder.read(part) for part in self.manifest["files"]}
        if not parts.get("state"):
            raise SavedFitError(f"`path` {self.folder.path}: it has no state.")
        seconds = float((self.manifest.get("provenance") or {}).get("wall_seconds") or 0.0)
        return engine, engine.restore(parts, self.number(engine.counts[0]), seconds), self._seed()

    def number(self, name: str) -> int:
        """A number of the run's progress."""
        value = (self.manifest.get("progress") or {}).get(name)
        if type(value) is not int or value < 0:
            raise SavedFitError(f"`path` {self.folder.path}: `progress` has no number `{name}`.")
        return value

    def _seed(self) -> Any:
        seed = (self.manifest.get("provenance") or {}).get("seed")
        if not (isinstance(seed, list) and len(seed) == 2 and all(type(x) is int and 0 <= x < 2**32 for x in seed)):
            return None
        return jax.random.wrap_key_data(np.asarray(seed, np.uint32))

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
