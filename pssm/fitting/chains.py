"""What engines of Markov chains share: where a run is, and the compiled piece that gathers its draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array
from pssm.fitting.loop import Arrays, Parts
from pssm.storage.packing import pack_leaves

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

    def leaves(self) -> Parts:
        """State and pieces of draws, for a folder; a piece is written once."""
        return {"state": [pack_leaves(self.state)], "draws": self.draws}

    def moved(self, state: Any, found: dict[str, Array], count: int, skipped: int = 0) -> "ChainsRun":
        """The run after `count` steps more; of the rows that were gathered, the first `skipped` are not kept."""
        kept = [{n: np.asarray(x)[:, skipped:count] for n, x in found.items()}] if skipped < count else []
        return self._replace(state=state, draws=self.draws + kept, steps=self.steps + count)

    def joined(self) -> Arrays:
        """All draws, `(chain, draw, ...)` by name, of the fields that every piece has."""
        if self.empty:
            raise ValueError("`path`: the run is still in its warm-up; see `pssm.infer.resume`.")
        names = [n for n in self.draws[0] if all(n in d for d in self.draws)]
        return {n: np.concatenate([d[n] for d in self.draws], axis=1) for n in names}


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
