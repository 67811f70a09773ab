"""The engine of corrections: draws from an approximate posterior get unbiased weights, and a path each.

A model whose paths are integrated out approximately (`path_marginal`) gives draws of its other sites from
`p~(theta | y)`. With an unbiased estimate `p^(y | theta)` by `S` paths of a chain, or by a particle filter, the
weights `p^ / p~` make them draws from the exact posterior; so do the paths, one drawn by its weight for each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._types import Array, Key
from pssm.fitting.chains import ChainsRun
from pssm.fitting.loop import Arrays, Parts
from pssm.fitting.nodes import Kept, evidence
from pssm.fitting.path_draws import TOGETHER, by_filter, by_paths, deterministic
from pssm.fitting.results import FitRecord
from pssm.fitting.weights import doubts, effective, normalised, pareto_shape, resampled
from pssm.storage.folder import SavedFitError

PILOT = 32  # draws that tell how uneven the weights of single paths are
UNEVEN = 1.5  # standard deviation of one path's log weight, above which a particle filter takes over
EXACT = "exact posterior up to Monte Carlo error"
INSTEAD = (
    'A method that works here: "nuts:transport" or "nuts:states" in `compare` (`transport_reparam`), '
    "`particle_gibbs`, or `PseudoMarginal`."
)


@dataclass(frozen=True, eq=False)
class CorrectedFit(FitRecord):
    """Draws of parameters and paths after their correction by weights; a fit like any other.

    `draws` gives the same draws in each call.

    Attributes:
        exact: whether the weights can be trusted: then the draws are of the exact posterior, up to Monte Carlo error.
        khat: Pareto shape of the weights.
        ess: effective number of weighted draws, `1 / sum w^2`; `efficiency` is its share of all.
        efficiency: that share.
        effective_draws: the least effective number of draws of a parameter, autocorrelation and weights together.
        log_weight_sd: standard deviation of the log weights.
        path_sd: that of the log weight of one path, given the parameters.
        estimator: by what the likelihood is estimated: "16 paths" or "a filter with 64 particles".
        shifts: how far the correction has moved the mean of each parameter, in posterior standard deviations.
        log_evidence: of the data, and `standard_error`; NaN for a Markov chain.
        standard_error: of it.
        log_weights: of the draws before resampling, normalised, `(chain, draw)` of a Markov chain, `(1, node)` of
            nodes.
        divergences: of the Markov chain.
    """

    exact: bool = False
    khat: float = float("nan")
    ess: float = float("nan")
    efficiency: float = float("nan")
    effective_draws: float = float("nan")
    log_weight_sd: float = float("nan")
    path_sd: float = float("nan")
    estimator: str = ""
    shifts: dict[str, float] = field(default_factory=dict)
    log_evidence: float = float("nan")
    standard_error: float = float("nan")
    log_weights: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    divergences: int = 0


class Source(NamedTuple):
    """The draws to correct.

    Attributes:
        values: latent sites that are no path, `(draw, ...)`.
        base: their log weights before, `(set, draw)`: of one set for a Markov chain, and zero.
        chains: of the Markov chain, 0 for nodes.
        num_samples: equally weighted draws to make.
        effective: the least effective number of draws of a parameter.
        method: in words.
        divergences: of the Markov chain.
    """

    values: Arrays
    base: np.ndarray
    chains: int
    num_samples: int
    effective: float
    method: str
    divergences: int = 0


class CorrectedEngine:
    """Weighs draws one after another; arguments as in `pssm.infer.corrected`."""

    counts, longest, pace, save_every = ("weighed", "num_draws"), TOGETHER, 10.0, 10.0
    kind = "corrected"
    labels: Any = None

    def __init__(
        self,
        model: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: Source,
        *,
        num_paths: int,
        num_particles: int,
    ):
        if not hasattr(model, "posterior"):
            raise ValueError("`model` must be the `path_marginal(...)` that was fitted: give it again.")
        if check_count("num_paths", num_paths, least=2) % 2:
            raise ValueError(f"`num_paths` must be even: paths come in pairs of opposite noise; got {num_paths}.")
        self.model, self.args, self.kwargs, self.source = model, args, kwargs, source
        self.num_paths, self.num_particles = num_paths, check_count("num_particles", num_particles, least=2)
        self.target = self.total = source.base.size
        self.picks = max(1, -(-2 * source.num_samples // self.total)) if not source.chains else 1
        self._programs: dict[bool, Callable[..., Any]] = {}

    def start(self, key: Key) -> ChainsRun:
        """Tries some of the draws: where single paths weigh too unevenly, a particle filter weighs all."""
        chosen = np.unique(resampled(jax.random.fold_in(key, 0), self.source.base.ravel(), min(PILOT, self.total)))
        found = self._weigh(chosen, jax.random.fold_in(key, 1), False)
        sd = float(np.sqrt(np.mean(np.square(found["path_sd"]))))
        filtered = sd > UNEVEN and bool(found["single"].all())
        state = {"key": jax.random.key_data(jax.random.fold_in(key, 2)), "filtered": filtered, "path_sd": sd}
        return ChainsRun({n: np.asarray(x) for n, x in state.items()}, [])

    def advance(self, run: ChainsRun, count: int) -> ChainsRun:
        """Weighs the next draws."""
        rows = np.arange(run.steps, min(run.steps + count, self.total))
        found = self._weigh(rows, jax.random.wrap_key_data(run.state["key"]), bool(run.state["filtered"]))
        return run._replace(draws=[*run.draws, found], steps=run.steps + len(rows))

    def done(self, run: ChainsRun) -> str:
        """Whether all draws are weighed."""
        return "num_draws" if run.steps >= self.total else ""

    def words(self, run: ChainsRun) -> str:
        """How even the weights are."""
        if run.empty:
            return ""
        found = self._log_weights(run).ravel()
        return f"effective share {effective(found) / len(found):.2f}"

    def leaves(self, run: ChainsRun) -> Parts:
        """Key, choice of the estimator, and pieces of weights and paths."""
        return {"state": [run.state], "pieces": run.draws}

    def restore(self, parts: Parts, steps: int, seconds: float) -> ChainsRun:
        """The run that `leaves` was given."""
        if set(parts["state"][0]) != {"key", "filtered", "path_sd"}:
            raise SavedFitError("`path`: the saved fit is no correction.")
        return ChainsRun(parts["state"][0], parts.get("pieces", []), steps, seconds)

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """The draws to correct, and the counts."""
        s = self.source
        numbers = {"num_paths": self.num_paths, "num_particles": self.num_particles, "chains": s.chains}
        words = {"num_samples": s.num_samples, "effective": s.effective, "method": s.method}
        words["divergences"] = s.divergences
        return {"settings": {**numbers, **words}}, {"base": s.base, **{f"source/{n}": x for n, x in s.values.items()}}

    @classmethod
    def reopen(cls, saved: Any) -> "CorrectedEngine":
        """The engine of a saved folder."""
        s, arrays = saved.manifest["settings"], saved.arrays
        values = {n.removeprefix("source/"): x for n, x in arrays.items() if n.startswith("source/")}
        source = Source(
            values,
            arrays["base"],
            int(s["chains"]),
            int(s["num_samples"]),
            float(s["effective"]),
            str(s["method"]),
            int(s["divergences"]),
        )
        options = {n: int(s[n]) for n in ("num_paths", "num_particles")}
        return cls(saved.model, saved.args, saved.kwargs, source, **options)

    def extended(self, run: ChainsRun, target: int | None) -> "CorrectedEngine":
        """The engine of a run that was interrupted."""
        if self.done(run):
            raise ValueError("`fit` has weighed all of its draws; correct a longer fit.")
        return self

    def _log_weights(self, run: ChainsRun) -> np.ndarray:
        """`(set, draw)`, minus infinity for draws that are not weighed yet."""
        found = np.concatenate([piece["log_ratio"] for piece in run.draws])
        found = np.append(found, np.full(self.total - len(found), -np.inf)).reshape(self.source.base.shape)
        known = np.isfinite(self.source.base) & np.isfinite(found)  # elsewhere the approximation has failed
        return np.where(known, self.source.base + np.where(known, found, 0.0), -np.inf)

    def result(self, run: ChainsRun, ended: str, seed: Any) -> CorrectedFit:
        """Resampled draws, with what the weights say about themselves."""
        s, all_weights = self.source, self._log_weights(run)
        weighed = all_weights.ravel()[: run.steps]
        khat, ess = pareto_shape(weighed), effective(weighed)
        efficiency = ess / len(weighed)
        key = jax.random.key(0) if seed is None else seed
        count = s.num_samples if s.chains == 0 else s.chains * (s.num_samples // s.chains)
        chosen = resampled(jax.random.fold_in(key, 3), all_weights, count)
        copies = np.arange(count) - np.searchsorted(chosen, chosen)  # of the same draw, in a row
        paths = {n: np.concatenate([p[n] for p in run.draws]) for n in run.draws[0] if n.startswith("path/")}
        values = {n: x[chosen] for n, x in s.values.items()}
        values |= {n.removeprefix("path/"): x[chosen, copies % self.picks] for n, x in paths.items()}
        values |= deterministic(self.model.plain_model, values, self.args, self.kwargs)
        chains = max(s.chains, 1)
        with np.errstate(divide="ignore"):
            weights = np.log(normalised(all_weights.ravel())).reshape(all_weights.shape)
        draws = {n: x.reshape(chains, -1, *x.shape[1:]) for n, x in values.items()}
        value, error = (float("nan"), float("nan")) if s.chains else evidence(all_weights)
        flaws = doubts(khat, efficiency)
        spread = _spread(weighed, s.base.ravel()[: run.steps])
        filtered = bool(run.state["filtered"])
        estimator = f"a filter with {self.num_particles} particles" if filtered else f"{self.num_paths} paths"
        shifts = _shifts({n: x[: run.steps] for n, x in s.values.items()}, s.base.ravel()[: run.steps], weighed)
        warnings = []
        if flaws:
            warnings.append(
                f"The correction of {s.method} failed: {'; '.join(flaws)}. The draws are not of the exact posterior. "
                + INSTEAD
            )
        if ended == "interrupted":
            warnings.append(f"Interrupted with {run.steps} of {self.total} draws weighed.")
        found = weights.reshape(chains, -1) if s.chains else weights.ravel()[chosen][None]
        return CorrectedFit(
            f"{s.method}, corrected",
            self.model.plain_model,
            self.args,
            self.kwargs,
            Kept(draws),
            f"estimate with uneven weights ({s.method}, not exact)" if flaws else f"{EXACT} ({s.method}, corrected)",
            ended=ended,
            warnings=tuple(warnings),
            message=f"by {estimator} a draw: {100 * efficiency:.0f} % of the draws are effective, k-hat {khat:.2f}, sd "
            f"of log weights {spread:.2f}; the largest shift is {max(shifts.values(), default=0.0):.2f} posterior sds.",
            stats={"log_weight": found, "source_draw": chosen.reshape(chains, -1)},
            seed=seed,
            seconds=run.seconds,
            run=run,
            engine=self,
            exact=not flaws,
            khat=khat,
            ess=ess,
            efficiency=efficiency,
            effective_draws=s.effective * efficiency if s.chains else ess,
            log_weight_sd=spread,
            path_sd=float(run.state["path_sd"]),
            estimator=estimator,
            shifts=shifts,
            log_evidence=value,
            standard_error=error,
            log_weights=weights.reshape(chains, -1),
            divergences=s.divergences,
        )

    # -----------------------------------------------------------------------------------------------------------------

    def _weigh(self, rows: np.ndarray, key: Key, filtered: bool) -> Arrays:
        """Log ratios, spreads and paths of some draws; the program takes `TOGETHER` at once."""
        padded = np.append(rows, np.full(-len(rows) % TOGETHER, rows[-1]))
        pieces = []
        for part in padded.reshape(-1, TOGETHER):
            values = {n: jnp.asarray(x[part]) for n, x in self.source.values.items()}
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(part))
            pieces.append(jax.tree.map(np.asarray, self._program(filtered)(values, keys)))
        return {n: np.concatenate([p[n] for p in pieces])[: len(rows)] for n in pieces[0]}

    def _program(self, filtered: bool) -> Callable[..., Any]:
        if filtered not in self._programs:
            weigh = by_filter if filtered else by_paths
            size = self.num_particles if filtered else self.num_paths
            model, args, kwargs, picks = self.model, self.args, self.kwargs, self.picks

            def one(row: tuple[dict[str, Array], Key]) -> dict[str, Array]:
                values, key = row
                found = model.posterior(values, *args, **kwargs)
                total, sds, single, paths = jnp.zeros(()), [], True, {}
                for i, (name, chain) in enumerate(found.chains.items()):
                    series = found.series[name]
                    ratio, sd, drawn = weigh(jax.random.fold_in(key, i), chain, series.log_lik, size, picks)
                    total = total + jnp.sum(jnp.where(series.counted, ratio - series.log_value, 0.0))
                    sds.append(jnp.max(jnp.where(series.counted, sd, 0.0)))
                    single = single and not chain.batch_shape
                    paths[name] = drawn
                split = jax.vmap(found.split)(paths)
                fields = {"log_ratio": total, "path_sd": jnp.max(jnp.stack(sds)), "single": jnp.asarray(single)}
                return fields | {f"path/{n}": x for n, x in split.items()}

            self._programs[filtered] = jax.jit(lambda v, k: jax.lax.map(one, (v, k), batch_size=TOGETHER))
        return self._programs[filtered]


def _spread(after: np.ndarray, before: np.ndarray) -> float:
    """Standard deviation, over the draws as they were weighted before, of the log ratio that the correction adds."""
    seen = np.isfinite(after)
    if not seen.any():
        return float("nan")
    share, ratio = normalised(before[seen]), (after - np.where(seen, before, 0.0))[seen]
    return float(np.sqrt(share @ (ratio - share @ ratio) ** 2))


def _shifts(values: Arrays, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The largest move of a site's means by the correction, in standard deviations of the corrected draws."""
    old, new = normalised(before), normalised(after)
    found = {}
    for name, x in values.items():
        flat = np.asarray(x, np.float64).reshape(len(old), -1)
        mean = new @ flat
        sd = np.sqrt(np.maximum(new @ (flat - mean) ** 2, 1e-300))
        found[name] = float(np.max(np.abs(mean - old @ flat) / sd, initial=0.0))
    return found
