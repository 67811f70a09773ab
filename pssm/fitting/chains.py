"""NUTS in pieces: one compiled program takes any number of steps, and between two pieces there is time to save."""

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from tqdm.auto import tqdm

from pssm._checks import check_choice
from pssm._types import Array, Key

EXTRA_FIELDS = ("energy", "potential_energy", "num_steps", "accept_prob")
CHUNK = 100  # steps in a piece, at most
SECONDS = 10.0  # that a piece should take


class ChainsState(NamedTuple):
    """Where a run of NUTS is.

    Attributes:
        state: the kernel's state after the last step, all chains.
        draws: pieces of collected fields, each `(chain, draw, ...)` by name: `z/` before a site's name, or a field's.
        iterations: steps taken by each chain, warm-up included.
        seconds: time spent.
    """

    state: Any
    draws: list[dict[str, np.ndarray]]
    iterations: int
    seconds: float


class Chains:
    """A kernel, a model's arguments and the compiled piece of a run.

    The kernel's state says what comes next, so neither the sizes of the pieces nor a break between them changes a draw.

    Args:
        mcmc: NumPyro's object; its `num_warmup`, `num_chains` and `chain_method` count. Chains that are not
            "vectorized" run one after the other.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        chunk: most steps in a piece.
    """

    def __init__(self, mcmc: MCMC, args: tuple[Any, ...], kwargs: dict[str, Any], chunk: int = CHUNK):
        check_choice("chain_method", mcmc.chain_method, ("vectorized", "sequential", "parallel"))
        self.mcmc, self.args, self.kwargs, self.chunk = mcmc, args, kwargs, chunk
        self.together = mcmc.num_chains == 1 or mcmc.chain_method == "vectorized"
        self._piece: Callable[..., Any] | None = None

    def start(self, key: Key) -> ChainsState:
        """The state before the first step."""
        m = self.mcmc
        keys = key if m.num_chains == 1 else jax.random.split(key, m.num_chains)

        def init(key: Key) -> Any:
            return m.sampler.init(key, m.num_warmup, None, model_args=self.args, model_kwargs=self.kwargs)

        state = init(keys) if self.together else _stack([init(k) for k in keys])
        return ChainsState(state, [], 0, 0.0)

    def advance(self, run: ChainsState, count: int) -> ChainsState:
        """`count` steps more of every chain; draws are kept after the warm-up."""
        begun = time.perf_counter()
        piece = self._compiled()
        if self.together:
            state, found = piece(run.state, count)
            lead = (lambda x: x[None]) if self.mcmc.num_chains == 1 else (lambda x: np.swapaxes(x, 0, 1))
            draws = {n: lead(np.asarray(x)[:count]) for n, x in found.items()}
        else:
            states = [jax.tree.map(lambda x, i=i: x[i], run.state) for i in range(self.mcmc.num_chains)]
            ends = [piece(state, count) for state in states]
            state = _stack([state for state, _ in ends])
            draws = {n: np.stack([np.asarray(found[n])[:count] for _, found in ends]) for n in ends[0][1]}
        skipped = max(self.mcmc.num_warmup - run.iterations, 0)
        kept = [{n: x[:, skipped:] for n, x in draws.items()}] if skipped < count else []
        seconds = run.seconds + time.perf_counter() - begun
        return ChainsState(state, run.draws + kept, run.iterations + count, seconds)

    def _compiled(self) -> Callable[..., Any]:
        if self._piece is not None:
            return self._piece
        kernel, args, kwargs = self.mcmc.sampler, self.args, self.kwargs
        constrain = kernel.postprocess_fn(args, kwargs)
        if self.together and self.mcmc.num_chains > 1:
            constrain = jax.vmap(constrain)

        def collect(state: Any) -> dict[str, Array]:
            fields = {n: getattr(state, n) for n in ("diverging", *EXTRA_FIELDS)}
            return {**{f"z/{n}": jnp.asarray(x) for n, x in constrain(state.z).items()}, **fields}

        @jax.jit
        def piece(state: Any, count: Array) -> Any:
            room = {n: jnp.zeros((self.chunk, *x.shape), x.dtype) for n, x in jax.eval_shape(collect, state).items()}

            def body(i: Array, carry: Any) -> Any:
                state, room = carry
                state = kernel.sample(state, args, kwargs)
                return state, {n: room[n].at[i].set(x) for n, x in collect(state).items()}

            return jax.lax.fori_loop(0, count, body, (state, room))

        self._piece = piece
        return piece


def run_chains(
    chains: Chains,
    run: ChainsState,
    num_samples: int,
    *,
    progress_bar: bool = True,
    each: Callable[[ChainsState], None] | None = None,
) -> tuple[ChainsState, bool]:
    """Goes on from `run` to `num_samples` draws of each chain; the second value says whether Ctrl-C ended it.

    Raises:
        KeyboardInterrupt: Ctrl-C came during the warm-up, when there are no draws to return.
    """
    warmup, size, timed = chains.mcmc.num_warmup, min(10, chains.chunk), False
    total = warmup + num_samples
    with tqdm(total=total, initial=run.iterations, disable=not progress_bar) as bar:
        while run.iterations < total:
            count = min(size, total - run.iterations)
            begun = time.perf_counter()
            try:
                run = chains.advance(run, count)
                if each is not None:
                    each(run)
            except KeyboardInterrupt:
                if not run.draws:
                    raise
                return run, True
            bar.update(count)
            bar.set_description("warmup" if run.iterations < warmup else "sample", refresh=False)
            if timed:
                size = int(np.clip(size * SECONDS / (time.perf_counter() - begun), 1, chains.chunk))
            timed = True
    return run, False


def fill(mcmc: MCMC, run: ChainsState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MCMC:
    """Puts draws and state where NumPyro's own `run` puts them."""
    names = [n for n in run.draws[0] if all(n in d for d in run.draws)]  # a run of NumPyro's own has fewer fields
    joined = {n: jnp.asarray(np.concatenate([d[n] for d in run.draws], axis=1)) for n in names}
    sites = {n.removeprefix("z/"): x for n, x in joined.items() if n.startswith("z/")}
    fields = {n: x for n, x in joined.items() if not n.startswith("z/")}
    mcmc._args, mcmc._kwargs = args, kwargs
    mcmc._states, mcmc._states_flat, mcmc._last_state = {"z": sites, **fields}, None, run.state
    mcmc.num_samples = next(iter(joined.values())).shape[1]
    return mcmc


def of_mcmc(mcmc: MCMC, seconds: float = float("nan")) -> ChainsState:
    """The state of a run that NumPyro, or `fill`, has made."""
    states = mcmc._states
    if states is None or mcmc.last_state is None:
        raise ValueError("`fit` has not been run: it has no draws.")
    draws = {f"z/{n}": np.asarray(x) for n, x in states["z"].items()}
    draws |= {n: np.asarray(x) for n, x in states.items() if n != "z"}
    count = next(iter(draws.values())).shape[1]
    return ChainsState(mcmc.last_state, [draws], mcmc.num_warmup + count, seconds)


def warn_of_divergences(mcmc: MCMC, stacklevel: int = 3) -> None:
    """Warns where transitions diverged."""
    diverging = np.asarray(mcmc.get_extra_fields()["diverging"])
    if diverging.any():
        warnings.warn(
            f"{int(diverging.sum())} of {diverging.size} transitions diverged: parts of the posterior may be missing. "
            "Raise `target_accept_prob` (0.95), or integrate the states out.",
            stacklevel=stacklevel,
        )


def _stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *states)
