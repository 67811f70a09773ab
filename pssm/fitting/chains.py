"""The common part of engines of Markov chains: where a run is, the compiled piece that gathers draws, the files."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._types import Array, Key
from pssm.fitting.loop import Arrays, Parts, check_more
from pssm.storage.packing import pack, pack_leaves, unpack, unpack_leaves

SITE = "z/"  # before the name of a site; other names are fields of the sampler


class ChainsRun(NamedTuple):
    """Where a run of Markov chains is.

    Attributes:
        state: of the sampler after the last step, all chains.
        draws: pieces of gathered values by name, each `(chain, draw, ...)`.
        steps: taken by each chain, warm-up included.
        seconds: time spent.
    """

    state: Any
    draws: list[Arrays]
    steps: int = 0
    seconds: float = 0.0

    @property
    def empty(self) -> bool:
        """Whether there is no draw yet."""
        return not self.draws

    def moved(
        self, state: Any, found: dict[str, Array], count: int, *, warmup: int = 0, thinning: int = 1
    ) -> "ChainsRun":
        """The run after `count` steps more; of the rows that were gathered, every `thinning`-th after the warm-up."""
        step = self.steps + np.arange(1, count + 1) - warmup
        rows = np.flatnonzero((step > 0) & (step % thinning == 0))
        kept = [{n: np.asarray(x)[:, rows] for n, x in found.items()}] if len(rows) else []
        return self._replace(state=state, draws=self.draws + kept, steps=self.steps + count)

    def joined(self) -> Arrays:
        """All draws, `(chain, draw, ...)` by name, of the fields that every piece has."""
        if self.empty:
            raise ValueError("`path`: the run is still in its warm-up; see `pssm.infer.resume`.")
        names = [n for n in self.draws[0] if all(n in d for d in self.draws)]
        return {n: np.concatenate([d[n] for d in self.draws], axis=1) for n in names}


class ChainEngine(ABC):
    """An engine of chains without its sampler: a subclass has `start`, `advance`, `words` and `result`.

    `options` make the engine, `num_samples`, `num_warmup` and `num_chains` among them; `counted_warmup` steps of the
    warm-up are steps of the run.
    """

    kind, counts, pace, save_every = "", ("iterations", "num_samples"), 10.0, 0.0
    thinned = 1  # steps of a run for each draw
    labels: Any = None

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counted_warmup: int,
        options: dict[str, Any],
    ):
        for name in ("num_warmup", "num_samples", "num_chains"):
            check_count(name, options[name])
        self.model, self.args, self.kwargs, self.options = model, args, kwargs, options
        self.counted_warmup, self.target = counted_warmup, options["num_samples"]
        self.total = counted_warmup + self.target

    @abstractmethod
    def start(self, key: Key) -> ChainsRun:
        """The run before the first step."""

    def done(self, run: ChainsRun) -> str:
        """Whether all draws are there."""
        return "num_samples" if run.steps >= self.total else ""

    def leaves(self, run: ChainsRun) -> Parts:
        """State and pieces of draws; a piece is written once."""
        return {"state": [pack_leaves(run.state)], "draws": run.draws}

    def restore(self, parts: Parts, steps: int, seconds: float) -> ChainsRun:
        """The run that `leaves` was given."""
        like = self.extended(None, self.target)  # a sampler that was started under `eval_shape` is of no use to a run
        shapes = jax.eval_shape(lambda key: like.start(key).state, jax.random.key(0))
        return ChainsRun(unpack_leaves(shapes, parts["state"][0]), parts["draws"], steps, seconds)

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """The options."""
        return {"settings": {name: pack(x, {}) for name, x in self.options.items()}}, {}

    @classmethod
    def reopen(cls, saved: Any) -> Any:
        """The engine of a saved folder."""
        options = {name: unpack(x, {}) for name, x in saved.manifest["settings"].items()}
        return cls(saved.model, saved.args, saved.kwargs, **{**options, "num_samples": saved.number(cls.counts[1])})

    def extended(self, run: ChainsRun | None, target: int | None) -> Any:
        """The engine for more draws."""
        target = self.target if target is None else check_count("num_samples", target)
        if run is not None:
            check_more("num_samples", target, run.steps - self.counted_warmup, "draws there are")
        new: Any = type(self)
        return new(self.model, self.args, self.kwargs, **{**self.options, "num_samples": target})

    def note(self, run: ChainsRun, ended: str) -> str:
        """An early end in words."""
        each = self.thinned
        there = f"{(run.steps - self.counted_warmup) // each} of {self.target // each} draws in each chain"
        return f"{self.kind.upper()} was interrupted with {there}." if ended == "interrupted" else ""


def gather(step: Callable[[Any], Any], values: Callable[[Any], dict[str, Array]], longest: int) -> Callable[..., Any]:
    """`piece(state, count) -> (state, rows)` for any count up to `longest`; `values` of each step are a row."""

    def piece(state: Any, count: Array) -> Any:
        room = {n: jnp.zeros((longest, *x.shape), x.dtype) for n, x in jax.eval_shape(values, state).items()}

        def body(i: Array, carry: Any) -> Any:
            state, room = carry
            state = step(state)
            return state, {n: room[n].at[i].set(x) for n, x in values(state).items()}

        return jax.lax.fori_loop(0, count, body, (state, room))

    return piece
