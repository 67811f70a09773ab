"""The engine of NUTS: one compiled program takes any number of steps of all chains."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, NUTS, init_to_uniform

from pssm._checks import check_choice, check_count
from pssm._types import Array, Key
from pssm.fitting.chains import SITE, ChainEngine, ChainsRun, gather
from pssm.fitting.results import MCMCFit

EXTRA_FIELDS = ("energy", "potential_energy", "num_steps", "accept_prob")
CHUNK = 100  # steps in a piece, at most
METHODS = ("vectorized", "sequential", "parallel")


class NutsEngine(ChainEngine):
    """NUTS on a model. The kernel's state says what comes next, so pieces and breaks change no draw.

    Arguments as in `fit_nuts`; `nuts` are options of `numpyro.infer.NUTS`.
    """

    kind = "nuts"

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        num_samples: int,
        num_warmup: int,
        num_chains: int,
        chain_method: str = "vectorized",
        chunk: int | None = None,
        thinning: int = 1,
        extra_fields: tuple[str, ...] = (),
        init_strategy: Callable[..., Any] = init_to_uniform,
        **nuts: Any,
    ):
        if num_samples % check_count("thinning", thinning):
            raise ValueError(f"`num_samples` must be a multiple of `thinning` ({thinning}); got {num_samples}.")
        if isinstance(extra_fields, str):
            raise TypeError(f"`extra_fields` must be a tuple of names; got the string {extra_fields!r}.")
        check_choice("chain_method", chain_method, METHODS)
        chain_method = chain_method if num_chains > 1 else "sequential"
        plain = {"num_samples": num_samples, "num_warmup": num_warmup, "num_chains": num_chains}
        plain |= {"chain_method": chain_method, "thinning": thinning, "extra_fields": tuple(extra_fields)}
        super().__init__(model, args, kwargs, num_warmup, {**plain, **nuts})
        self.thinned, self.fields = thinning, tuple(dict.fromkeys((*EXTRA_FIELDS, *extra_fields)))
        self.num_warmup, self.num_chains, self.chain_method, self.nuts = num_warmup, num_chains, chain_method, nuts
        self.longest = check_count("chunk", CHUNK if chunk is None else chunk)
        self.init_strategy = init_strategy  # of the start alone: a run that goes on, from a file too, has none
        self.kernel = NUTS(model, init_strategy=init_strategy, **nuts)
        self._advance: Callable[..., Any] | None = None

    @classmethod
    def of(cls, fit: MCMC, chunk: int | None = None) -> tuple["NutsEngine", ChainsRun]:
        """The engine and the run of an `MCMC` that has been run.

        Raises:
            TypeError: its kernel is not NUTS.
        """
        kernel, states = fit.sampler, fit._states
        if type(kernel) is not NUTS or kernel.model is None:
            raise TypeError(f"`fit` must be of NUTS with a model; its kernel is {type(kernel).__name__}.")
        if states is None or fit.last_state is None:
            raise ValueError("`fit` has not been run: it has no draws.")
        engine = cls(
            kernel.model,
            fit._args,
            fit._kwargs,
            num_samples=fit.num_samples,
            num_warmup=fit.num_warmup,
            num_chains=fit.num_chains,
            chain_method=fit.chain_method if isinstance(fit.chain_method, str) else "vectorized",
            chunk=chunk,
            thinning=fit.thinning,
            extra_fields=tuple(n for n in states if n not in ("z", "diverging", *EXTRA_FIELDS)),
            target_accept_prob=float(kernel._target_accept_prob),
            dense_mass=kernel._dense_mass,
            max_tree_depth=kernel._max_tree_depth,
        )
        draws = {SITE + n: np.asarray(x) for n, x in states["z"].items()}
        draws |= {n: np.asarray(x) for n, x in states.items() if n != "z"}
        steps = fit.num_warmup + fit.thinning * next(iter(draws.values())).shape[1]
        return engine, ChainsRun(fit.last_state, [draws], steps, getattr(fit, "seconds", float("nan")))

    def mcmc(self, *, num_samples: int | None = None, **options: Any) -> MCMC:
        """NumPyro's `MCMC` with the same settings, not run; `options` are its own."""
        return MCMC(
            NUTS(self.model, init_strategy=self.init_strategy, **self.nuts),
            num_warmup=self.num_warmup,
            num_samples=self.target if num_samples is None else num_samples,
            num_chains=self.num_chains,
            chain_method=self.chain_method,
            thinning=self.thinned,
            **options,
        )

    def start(self, key: Key) -> ChainsRun:
        """The run before the first step."""
        return ChainsRun(self._first_state(key), [])

    def advance(self, run: ChainsRun, count: int) -> ChainsRun:
        """`count` steps more of every chain; draws are kept after the warm-up."""
        if self._advance is None:
            self._advance = self._compiled(run.state)
        state, found = self._advance(run.state, count)
        return run.moved(state, found, count, warmup=self.num_warmup, thinning=self.thinned)

    def words(self, run: ChainsRun) -> str:
        """The phase of the run."""
        return "warm-up" if run.steps < self.num_warmup else "sampling"

    def result(self, run: ChainsRun, ended: str, seed: Any) -> MCMCFit:
        """NumPyro's `MCMC` with the draws."""
        return MCMCFit(
            self.kernel,
            run.joined(),
            run.state,
            (self.args, self.kwargs),
            seed=seed,
            seconds=run.seconds,
            ended=ended,
            note=self.note(run, ended),
            num_warmup=self.num_warmup,
            num_chains=self.num_chains,
            thinning=self.thinned,
            chain_method="vectorized" if self.chain_method == "vectorized" else "sequential",
        )

    def _first_state(self, key: Key) -> Any:
        def init(key: Key) -> Any:
            return self.kernel.init(key, self.num_warmup, None, model_args=self.args, model_kwargs=self.kwargs)

        if self.num_chains == 1:
            return init(key)
        keys = jax.random.split(key, self.num_chains)
        return init(keys) if self.chain_method == "vectorized" else _stack([init(k) for k in keys])

    def _compiled(self, state: Any) -> Callable[[Any, int], tuple[Any, dict[str, Array]]]:
        """`(state, count) -> (state, fields)`, fields `(chain, longest, ...)`; compiled once for every count."""
        kernel, args, kwargs = self.kernel, self.args, self.kwargs
        if kernel._sample_fn is None:  # a run from a file: the kernel has not been started
            self._first_state(jax.random.key(0))
        constrain = kernel.postprocess_fn(args, kwargs)
        together = self.num_chains > 1 and self.chain_method == "vectorized"
        constrain = jax.vmap(constrain) if together else constrain

        def collect(state: Any) -> dict[str, Array]:
            fields = {n: attrgetter(n)(state) for n in ("diverging", *self.fields)}
            return {**{SITE + n: jnp.asarray(x) for n, x in constrain(state.z).items()}, **fields}

        piece = gather(lambda state: kernel.sample(state, args, kwargs), collect, self.longest)
        compiled = jax.jit(piece)
        if self.num_chains == 1:
            return lambda state, count: _with_fields(compiled(state, count), lambda x: x[None])
        if together:
            return lambda state, count: _with_fields(compiled(state, count), lambda x: jnp.swapaxes(x, 0, 1))
        if self.chain_method == "parallel" and jax.local_device_count() >= self.num_chains:
            return jax.pmap(piece, in_axes=(0, None))

        def one_by_one(states: Any, count: int) -> Any:
            chains = range(self.num_chains)
            return _stack([compiled(jax.tree.map(lambda x, i=i: x[i], states), count) for i in chains])

        return one_by_one


def _with_fields(found: tuple[Any, dict[str, Array]], change: Callable[[Array], Array]) -> tuple[Any, dict[str, Array]]:
    return found[0], {n: change(x) for n, x in found[1].items()}


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)
