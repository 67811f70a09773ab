"""THE loop of every fit: pieces of a run, between which there is time to look, save and stop.

An engine knows one method. The loop knows the clock, the progress bar, Ctrl-C and the folder. The steps of a run must
not depend on how it is cut into pieces: then a run that was stopped and goes on ends as one that was not.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from tqdm.auto import tqdm

from pssm._types import Key
from pssm.fitting.model_record import pack_call
from pssm.fitting.results import TrainingError, record_of, with_labels
from pssm.storage.folder import FitFolder
from pssm.storage.packing import provenance

FIRST = 10  # steps before anything is timed: they are compiled meanwhile
TOGETHER = 100  # steps of a piece where several processes must cut alike, so not by the clock
FAILED = ("loss", "gradient")  # endings where one of these was not finite
UNFINISHED = ("", "interrupted", *FAILED)

Arrays = dict[str, np.ndarray]
Parts = dict[str, list[Arrays]]


class Run(Protocol):
    """Where a run is: a NamedTuple, with fields of the engine's own."""

    seconds: float

    @property
    def steps(self) -> int: ...  # noqa: D102

    @property
    def empty(self) -> bool: ...  # noqa: D102  (no fit can be made of it yet)


class Engine[R](Protocol):
    """One method of inference on one model, with all that does not change during its run.

    `target` is what is asked for, `total` the steps until it is there; `counts` are the names of steps and target in a
    folder, `kind` that of the method. A piece has at most `longest` steps and should take `pace` seconds; `save_every`
    are the seconds between two writings.
    """

    kind: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: int
    total: int
    counts: tuple[str, str]
    longest: int
    pace: float
    save_every: float
    labels: Any  # of the data, where they came as a frame of pandas

    def start(self, key: Key) -> R: ...  # noqa: D102

    def advance(self, run: R, count: int) -> R:
        """The run after at most `count` steps more."""
        ...

    def done(self, run: R) -> str:
        """Why the run is over; empty while it goes on."""
        ...

    def leaves(self, run: R) -> Parts:
        """All that has to be saved: groups of named arrays. A group that is the same object is written once."""
        ...

    def restore(self, parts: Parts, steps: int, seconds: float) -> R:
        """The run whose `leaves` these are."""
        ...

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """Entries of the manifest, and arrays, from which the class method `reopen` makes this engine."""
        ...

    def extended(self, run: R, target: int | None) -> "Engine[R]":
        """The engine with another target, for a run that goes on."""
        ...

    def words(self, run: R) -> str:
        """What stands beside the progress bar."""
        ...

    def result(self, run: R, ended: str, seed: Any) -> Any:
        """The fit that a user gets: something that `record_of` takes."""
        ...


class Saver:
    """Writes a run of an engine, and the run's random key, into a folder."""

    def __init__(self, folder: FitFolder, engine: Engine[Any], seed: Any):
        self.folder, self.engine, self.seed = folder, engine, seed
        self._last = -np.inf

    @classmethod
    def create(cls, path: Any, engine: Engine[Any], seed: Any, *, force: bool = False) -> "Saver":
        """A writer into a new folder; nothing in it counts before the first run is written.

        Raises:
            FileExistsError: there is something at `path`.
        """
        settings, arrays = engine.settings()
        call, arguments = pack_call(engine.model, engine.args, engine.kwargs)
        if engine.labels is not None:
            from pssm.storage.labels import pack_frame  # pandas, which takes a second to import

            call = {**call, "labels": pack_frame(engine.labels, arguments)}
        folder = FitFolder.create(path, {"kind": engine.kind, **call, **settings}, force=force)
        if arguments or arrays:
            folder.put("arguments", {**arguments, **arrays})
        return cls(folder, engine, seed)

    def __call__(self, run: Any, ended: str = "") -> None:
        """Writes the run, if it is time or the run has `ended`, for the reason given."""
        if not ended and time.monotonic() - self._last < self.engine.save_every:
            return
        for part, groups in self.engine.leaves(run).items():
            self.folder.sync(part, groups)
        progress = dict(zip(self.engine.counts, (run.steps, self.engine.target), strict=True))
        notes = provenance(run.seconds, self.seed)
        self.folder.commit(progress=progress, complete=ended not in UNFINISHED, ended=ended, provenance=notes)
        self._last = time.monotonic()


def run_to_end[R](engine: Engine[R], run: R, *, save: Saver | None = None, progress_bar: bool = True) -> tuple[R, str]:
    """Goes on from `run` until the engine is done or Ctrl-C comes; returns the run, and why it ended.

    Raises:
        KeyboardInterrupt: Ctrl-C came before there was anything to return.
    """
    state: Any = run
    together, leader = jax.process_count() > 1, jax.process_index() == 0
    size, timed = min(FIRST, engine.longest), False
    with tqdm(total=engine.total, initial=state.steps, disable=not (progress_bar and leader)) as bar:
        while not (ended := engine.done(state)):
            before, begun = state.steps, time.perf_counter()
            try:
                new: Any = engine.advance(state, min(size, engine.total - before))
                took = time.perf_counter() - begun
                state = new._replace(seconds=state.seconds + took)
                if save is not None:
                    save(state, engine.done(state))
            except KeyboardInterrupt:
                if state.empty:
                    raise
                ended = "interrupted"
                break
            bar.update(state.steps - before)
            bar.set_postfix_str(engine.words(state), refresh=False)
            if together:
                size = min(TOGETHER, engine.longest)
            elif timed:  # the first piece is compiled
                size = int(np.clip(size * engine.pace / max(took, 1e-4), 1, min(4 * size, engine.longest)))
            timed = True
    if save is not None and ended == "interrupted":
        save(state, ended)
    return state, ended


def finish[R](engine: Engine[R], run: R, seed: Any, *, save: Saver | None = None, progress_bar: bool = True) -> Any:
    """Runs to the end, makes the fit that a user gets, and says what is wrong with it.

    Raises:
        TrainingError: a number was not finite; it has the fit before that step.
    """
    run, ended = run_to_end(engine, run, save=save, progress_bar=progress_bar)
    fit = with_labels(engine.result(run, ended, seed), engine.labels)
    record = record_of(fit)
    if ended in FAILED:
        raise TrainingError(record.warnings[0], fit)
    if progress_bar and record.message and jax.process_index() == 0:
        print(f"Objective: {record.objective}. {record.message[0].upper()}{record.message[1:]}")
    for text in record.warnings:
        warnings.warn(text, stacklevel=3)
    return fit


def check_more(name: str, target: int, there: int, what: str) -> None:
    """Raises where a run that goes on has all that is asked for."""
    if there >= target:
        raise ValueError(f"`{name}` must be more than the {there} {what}; got {target}.")
