"""The engine of MCLMC, microcanonical Langevin Monte Carlo, by BlackJAX: for many unknowns, such as a whole path."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import init_to_median
from numpyro.infer.util import initialize_model

from pssm._checks import check_count
from pssm._types import Array, Key
from pssm.fitting.chains import SITE, ChainEngine, ChainsRun, gather
from pssm.fitting.results import FitRecord

OBJECTIVE = "estimate of the posterior (Markov chain of unadjusted steps: their bias is held small, not removed)"


class _Draws(NamedTuple):
    """All draws, whatever is asked for."""

    draws: dict[str, Any]

    def __call__(self, *_: Any) -> dict[str, Any]:
        return self.draws


class MCLMCEngine(ChainEngine):
    """MCLMC on a model; arguments as in `pssm.infer.fit_mclmc`."""

    kind, longest = "mclmc", 100

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: int):
        check_count("thinning", options["thinning"])
        super().__init__(model, args, kwargs, 0, options)  # the tuning is one piece, before the first step
        try:
            self._mclmc: Any = importlib.import_module("blackjax")  # takes seconds, and is an extra
        except ImportError:
            raise ImportError("MCLMC needs BlackJAX: install `pssm-numpyro[mclmc]`, or `blackjax`.") from None
        self._kernel = self._mclmc.mcmc.mclmc.build_kernel()
        self._info: Any = None
        self._piece: Callable[..., Any] | None = None

    def __reduce__(self) -> Any:
        return _engine, (self.model, self.args, self.kwargs, self.options)

    def _prepared(self, key: Key) -> Any:
        """The model's potential in unconstrained space, and first positions of all chains."""
        keys = jax.random.split(key, self.options["num_chains"])
        call = {"model_args": self.args, "model_kwargs": self.kwargs}
        # A start in the tails, where gradients are huge, is one that the tuning does not survive.
        self._info = initialize_model(keys, self.model, init_strategy=init_to_median(num_samples=50), **call)
        return self._info.param_info.z

    def _log_density(self, position: Any) -> Array:
        return -self._info.potential_fn(position)

    def start(self, key: Key) -> ChainsRun:
        """Tuned chains: BlackJAX finds the length of a step, that of the momentum's memory, and scales."""
        start_key, tune_key = jax.random.split(key)
        positions = self._prepared(start_key)

        def tune(position: Any, key: Key) -> Any:
            first, rest, later = jax.random.split(key, 3)
            state = self._mclmc.mcmc.mclmc.init(position, self._log_density, first)
            steps = self.options["num_warmup"]
            found = self._mclmc.mclmc_find_L_and_step_size(self._kernel, steps, state, rest, self._log_density)
            return found[0], found[1], later

        keys = jax.random.split(tune_key, self.options["num_chains"])
        return ChainsRun(jax.jit(jax.vmap(tune))(positions, keys), [])

    def advance(self, run: ChainsRun, count: int) -> ChainsRun:
        """`count` draws more of each chain, `thinning` steps each."""
        if self._info is None:  # a run from a file
            self._prepared(jax.random.key(0))
        if self._piece is None:
            piece = gather(lambda state: jax.lax.fori_loop(0, self.options["thinning"], self._step, state),
                           self._values, self.longest)  # fmt: skip
            self._piece = jax.jit(jax.vmap(piece, in_axes=(0, None)))
        return run.moved(*self._piece(run.state, count), count)

    def _step(self, _: Array, carry: Any) -> Any:
        state, tuned, key = carry
        key, own = jax.random.split(key)
        scales = tuned.inverse_mass_matrix, tuned.L, tuned.step_size
        return self._kernel(own, state, self._log_density, *scales)[0], tuned, key

    def _values(self, carry: Any) -> dict[str, Array]:
        sites = self._info.postprocess_fn(carry[0].position)
        return {**{SITE + n: jnp.asarray(x) for n, x in sites.items()}, "potential_energy": -carry[0].logdensity}

    def words(self, run: ChainsRun) -> str:
        """The length of a step, on average over the chains."""
        return f"step {float(run.state[1].step_size.mean()):.2g}"

    def result(self, run: ChainsRun, ended: str, seed: Any) -> FitRecord:
        """The fit as a record."""
        found = run.joined()
        draws = {n.removeprefix(SITE): x for n, x in found.items() if n.startswith(SITE)}
        stats = {n: x for n, x in found.items() if not n.startswith(SITE)}
        still = int(np.sum(~(np.asarray(run.state[1].step_size) > 1e-6)))
        stuck = f"{still} chains do not move: their tuning failed. Raise `num_warmup`, or use `fit_nuts`."
        notes = (self.note(run, ended), stuck if still else "")
        return FitRecord("MCLMC", self.model, self.args, self.kwargs, _Draws(draws), OBJECTIVE, ended=ended,
                         warnings=tuple(filter(None, notes)), stats=stats, seed=seed,
                         seconds=run.seconds, run=run, engine=self)  # fmt: skip


def _engine(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> MCLMCEngine:
    """The engine of a pickle."""
    return MCLMCEngine(model, args, kwargs, **options)
