"""The engine of weighted nodes: quasi-random points around the mode of a few parameters, with importance weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer import init_to_median, init_to_value
from numpyro.infer.util import initialize_model

from pssm._checks import check_count
from pssm._types import Key
from pssm.fitting.climb import Rules, ascend, newton
from pssm.fitting.loop import Arrays, Parts
from pssm.fitting.results import FitRecord
from pssm.fitting.target import Values
from pssm.fitting.weights import doubts, effective, normalised, pareto_shape, resampled
from pssm.storage.folder import SavedFitError

MOST = 4  # parameters
SETS = 8  # of nodes, scrambled independently: their spread is the error of the evidence
FREEDOM, WIDER = 4.0, 1.3  # of the t distribution, and of its scale matrix over the inverse curvature
STARTS = 4
ROUNDS, PILOT, EVEN = 4, 128, 0.7  # of looks for a better shape: nodes in each, share of effective ones to stop at
FIELDS = ("mode", "root", "scramble", "points", "log_ratios")
EXACT = "exact posterior up to Monte Carlo error (weighted nodes)"


@dataclass(frozen=True, eq=False)
class NodesFit(FitRecord):
    """Weighted nodes as equally weighted draws; a fit like any other. The same key gives the same fit.

    Attributes:
        log_evidence: of the data, `log p(y)`.
        standard_error: of it, by independent sets of nodes.
        khat: Pareto shape of the weights; below 0.7 they can be trusted.
        ess: effective number of nodes.
        log_weights: of the nodes, `(node,)`, normalised.
        nodes: values of the latent sites there, `(node, ...)`.
        approximate: whether paths are integrated out approximately: then `pssm.infer.corrected` makes it exact.
    """

    log_evidence: float = float("nan")
    standard_error: float = float("nan")
    khat: float = float("nan")
    ess: float = float("nan")
    log_weights: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)
    nodes: Values = field(default_factory=dict, repr=False)
    approximate: bool = False

    def __float__(self) -> float:
        return self.log_evidence


class NodesRun(NamedTuple):
    """Where a run is: centre, root of the scale matrix, seed, points `(set, node, size)` and their log ratios."""

    mode: np.ndarray
    root: np.ndarray
    scramble: np.ndarray
    points: np.ndarray
    log_ratios: np.ndarray
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Sets that are weighed."""
        return len(self.points)

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        return not self.steps


class NodesEngine:
    """Weighs nodes set by set; arguments as in `pssm.infer.nodes`."""

    counts, longest, pace, save_every = ("sets", "num_sets"), 1, 10.0, 5.0
    kind = "nodes"
    labels: Any = None

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        num_nodes: int,
        num_samples: int,
    ):
        if check_count("num_nodes", num_nodes, least=16 * SETS) % SETS:
            raise ValueError(f"`num_nodes` must be a multiple of {SETS}, best a power of two; got {num_nodes}.")
        self.model, self.args, self.kwargs = model, args, kwargs
        self.num_nodes, self.num_samples = num_nodes, check_count("num_samples", num_samples)
        self.target = self.total = SETS
        self._density: _Density | None = None

    def __reduce__(self) -> Any:
        return _engine, (self.model, self.args, self.kwargs, self.num_nodes, self.num_samples)

    @property
    def density(self) -> "_Density":
        """The log joint density of unconstrained parameters, compiled at its first use."""
        if self._density is None:
            self._density = _Density(self.model, self.args, self.kwargs)
        return self._density

    def start(self, key: Key) -> NodesRun:
        """Finds the mode, from the median of the prior and some of its draws."""
        f = self.density
        ends = [ascend(f, z, f.rules) for z in f.starts(key, STARTS)]
        best, value = max(ends, key=lambda end: end[1])
        if not np.isfinite(value):
            raise ValueError(
                "`model`: its log density is not finite at any start. Look at its priors, or scale the data."
            )
        peak = newton(f, best, f.rules)
        matrix = peak.information
        eigen, basis = np.linalg.eigh(np.where(np.isfinite(matrix), matrix, np.eye(f.size)))
        eigen = np.maximum(eigen, 1e-3 * max(eigen.max(initial=0.0), 1e-6))  # a flat direction is given some length
        scramble = np.asarray(jax.random.key_data(key)).ravel()
        centre, root = self._shaped(peak.z, basis / np.sqrt(eigen), scramble)
        none = np.zeros((0, self.num_nodes // SETS))
        return NodesRun(centre, root, scramble, np.zeros((*none.shape, f.size)), none)

    def _shaped(self, centre: np.ndarray, root: np.ndarray, scramble: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Centre and root of the scale: of the mode, or of weighted moments where these give more even weights.

        The moments are those of a few nodes, with the shape before counting as some more.
        """
        best = (0.0, centre, root * np.sqrt(WIDER))
        for i in range(ROUNDS):
            wide = root * np.sqrt(WIDER)
            points, log_q = _scatter(centre, wide, PILOT, [*scramble, SETS + i])
            log_ratios = self.density.many(points) - log_q
            count = effective(log_ratios)
            best = max(best, (count, centre, wide), key=lambda found: found[0])
            if not 1 < count < EVEN * PILOT:
                break
            weights = normalised(log_ratios)
            centre, before = weights @ points, root @ root.T
            spread = (points - centre).T @ (weights[:, None] * (points - centre))
            shares = np.array([count, len(centre) + 2.0]) / (count + len(centre) + 2.0)
            root = np.linalg.cholesky(shares[0] * spread + shares[1] * before)
        return best[1:]

    def advance(self, run: NodesRun, count: int) -> NodesRun:
        """Weighs a set of nodes."""
        points, log_q = _scatter(run.mode, run.root, self.num_nodes // SETS, [*run.scramble, run.steps])
        found = self.density.many(points) - log_q
        return run._replace(
            points=np.append(run.points, points[None], 0), log_ratios=np.append(run.log_ratios, found[None], 0)
        )

    def done(self, run: NodesRun) -> str:
        """Whether all sets are weighed."""
        return "num_nodes" if run.steps >= self.total else ""

    def words(self, run: NodesRun) -> str:
        """The evidence so far."""
        return "" if run.empty else f"log evidence {evidence(run.log_ratios)[0]:.6g}"

    def leaves(self, run: NodesRun) -> Parts:
        """All arrays."""
        return {"state": [{n: np.asarray(getattr(run, n)) for n in FIELDS}]}

    def restore(self, parts: Parts, steps: int, seconds: float) -> NodesRun:
        """The run that `leaves` was given."""
        found = parts["state"][0]
        if set(found) != set(FIELDS) or found["points"].shape[1:] != (self.num_nodes // SETS, len(found["mode"])):
            raise SavedFitError("`path`: the saved fit has no nodes.")
        return NodesRun(*(found[n] for n in FIELDS), seconds)

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """The counts."""
        return {"settings": {"num_nodes": self.num_nodes, "num_samples": self.num_samples}}, {}

    @classmethod
    def reopen(cls, saved: Any) -> "NodesEngine":
        """The engine of a saved folder."""
        s = saved.manifest["settings"]
        options = {n: int(s[n]) for n in ("num_nodes", "num_samples")}
        return cls(saved.model, saved.args, saved.kwargs, **options)

    def extended(self, run: NodesRun, target: int | None) -> "NodesEngine":
        """The engine of a run that was interrupted."""
        if self.done(run):
            raise ValueError("`fit` has all of its nodes; give `num_nodes` to a new one.")
        return self

    def result(self, run: NodesRun, ended: str, seed: Any) -> NodesFit:
        """The draws, with what the weights say about themselves."""
        log_ratios = run.log_ratios.ravel()
        value, error = evidence(run.log_ratios)
        ess, khat = effective(log_ratios), pareto_shape(log_ratios)
        key = jax.random.key(0) if seed is None else seed
        chosen = resampled(jax.random.fold_in(key, 1), log_ratios, self.num_samples)
        with np.errstate(divide="ignore"):
            weights = np.log(normalised(log_ratios))
        nodes = self.density.values(run.points.reshape(len(log_ratios), -1))
        draws = {n: x[chosen][None] for n, x in nodes.items()}
        integrated = hasattr(self.model, "complete")
        sample: Any = Completed(self.model, draws, jax.random.fold_in(key, 2)) if integrated else Kept(draws)
        flaws = doubts(khat, ess / len(log_ratios))
        kind = self.model.objective.replace("Markov chain", "weighted nodes") if integrated else EXACT
        flawed = [f"Do not trust the nodes: {'; '.join(flaws)}. Use a Markov chain (`fit_nuts`)."] if flaws else []
        if ended == "interrupted":
            flawed.append(f"Interrupted with {run.steps} of {SETS} sets of nodes.")
        return NodesFit(
            f"nodes ({self.model.approximation})" if integrated else "nodes",
            getattr(self.model, "plain_model", self.model),
            self.args,
            self.kwargs,
            sample,
            kind if not flaws else f"estimate with uneven weights ({kind})",
            ended=ended,
            message=f"log evidence {value:.6g} +- {error:.2g}; {ess:.0f} of {len(log_ratios)} nodes are effective, "
            f"k-hat {khat:.2f}.",
            warnings=tuple(flawed),
            stats={"log_weight": weights[chosen][None], "node": chosen[None]},
            seed=seed,
            seconds=run.seconds,
            run=run,
            engine=self,
            log_evidence=value,
            standard_error=error,
            khat=khat,
            ess=ess,
            log_weights=weights,
            nodes={n: x for n, x in nodes.items() if n in self.density.names},
            approximate=integrated,
        )


def _engine(model: Any, args: Any, kwargs: Any, num_nodes: int, num_samples: int) -> NodesEngine:
    """The engine of a pickle."""
    return NodesEngine(model, args, kwargs, num_nodes=num_nodes, num_samples=num_samples)


class Kept(NamedTuple):
    """Draws that are there."""

    values: dict[str, Any]

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them, whatever is asked for."""
        return self.values


@dataclass
class Completed:
    """Draws of a model that has integrated its paths out, with a path for each, drawn when first asked for."""

    model: Any
    values: dict[str, Any]
    key: Key
    found: dict[str, Any] | None = None

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them, whatever is asked for."""
        if self.found is None:
            self.found = self.model.complete(self.values, self.key, *args, **kwargs)
        return self.found


def evidence(log_ratios: np.ndarray) -> tuple[float, float]:
    """`log p(y)` from log ratios `(set, node)`, and its standard error by the spread of the sets."""
    top = log_ratios.max(initial=-np.inf)
    if not np.isfinite(top):
        return -np.inf, float("nan")
    ratio = np.exp(log_ratios - top).mean(axis=1)
    error = ratio.std(ddof=1) / np.sqrt(len(ratio)) / ratio.mean() if len(ratio) > 1 else float("nan")
    return float(top + np.log(ratio.mean())), float(error)


def _scatter(mode: np.ndarray, root: np.ndarray, count: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Nodes of a multivariate t by a scrambled Sobol sequence, and their log density."""
    from scipy.special import gammaln
    from scipy.stats import chi2, norm, qmc  # takes half a second

    size = len(mode)
    uniform = qmc.Sobol(size + 1, rng=np.random.default_rng(seed)).random(count)
    uniform = np.clip(uniform, 1e-12, 1 - 1e-12)
    standard = norm.ppf(uniform[:, :size]) * np.sqrt(FREEDOM / chi2.ppf(uniform[:, size], FREEDOM))[:, None]
    constant = gammaln((FREEDOM + size) / 2) - gammaln(FREEDOM / 2) - 0.5 * size * np.log(FREEDOM * np.pi)
    log_q = constant - np.linalg.slogdet(root)[1]
    log_q = log_q - 0.5 * (FREEDOM + size) * np.log1p(np.sum(standard**2, axis=1) / FREEDOM)
    return mode + standard @ root.T, log_q


class _Density:
    """The log joint density of the unconstrained parameters, with the Jacobian: what a sampler sees."""

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]):
        reference = getattr(model, "reference", None)
        self._at = init_to_median if reference is None else init_to_value(values=reference.values)
        options = {"model_args": args, "model_kwargs": kwargs, "validate_grad": False}
        self._model, self._options = model, options
        info = initialize_model(jax.random.key(0), model, init_strategy=self._at, **options)
        trace = info.model_trace
        for name, site in trace.items():
            if site["type"] == "sample" and not site["is_observed"] and site["fn"].support.is_discrete:
                raise ValueError(f"`model`: the site `{name}` is discrete: nodes are for continuous parameters.")
        flat, unravel = ravel_pytree(info.param_info.z)
        self.names, self.size = tuple(info.param_info.z), len(flat)
        if not 1 <= self.size <= MOST:
            raise ValueError(
                f"`model` has {self.size} unconstrained parameters ({', '.join(self.names) or 'none'}); nodes are for "
                f"1 to {MOST}. Use a Markov chain: `fit_nuts(path_marginal(model), ...)`, which is "
                '"nuts:variational" in `compare`.'
            )
        self._centre, self._dtype = np.asarray(flat, np.float64), flat.dtype
        self.rules = Rules(
            self._centre, np.ones(self.size), np.zeros((self.size, 2), bool), bool(jnp.finfo(flat.dtype).bits == 64)
        )
        self._one = jax.jit(jax.value_and_grad(lambda z: -info.potential_fn(unravel(z))))
        self._many = jax.jit(lambda zs: jax.lax.map(lambda z: -info.potential_fn(unravel(z)), zs, batch_size=32))
        self._constrain = jax.jit(lambda zs: jax.lax.map(lambda z: info.postprocess_fn(unravel(z)), zs, batch_size=32))

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = self._one(jnp.asarray(z, self._dtype))
        value, gradient = float(value), np.asarray(gradient, np.float64)
        return (value, gradient) if np.isfinite(value) else (-np.inf, np.zeros(self.size))

    def starts(self, key: Key, count: int) -> list[np.ndarray]:
        """The median of the prior (or what is known to be near the mode), and points around it."""
        noise = np.asarray(jax.random.normal(key, (count - 1, self.size)), np.float64)
        return [self._centre, *(self._centre + noise)]

    def many(self, points: np.ndarray) -> np.ndarray:
        """Of points `(node, size)`; minus infinity where it is no number."""
        found = np.asarray(self._many(jnp.asarray(points, self._dtype)), np.float64)
        return np.where(np.isfinite(found), found, -np.inf)

    def values(self, points: np.ndarray) -> Values:
        """Latent and deterministic sites, as a user knows them."""
        return {n: np.asarray(x) for n, x in self._constrain(jnp.asarray(points, self._dtype)).items()}
