"""`AutoStateSpace`: a guide for any NumPyro model that has `StatePath` sites."""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import check_choice, check_count
from pssm._types import Array, Key
from pssm.distributions import LowRankChain, LowRankMomentMatched, StatePath
from pssm.guides.mode import PotentialsAtMode, mode_path, noise_scale, potentials_at

FAMILIES = ("chain", "moment_matched", "diagonal")
BOUND = "lower bound on the log evidence (ELBO)"
SURROGATE = "surrogate: the published moment-matched objective, which can exceed the log evidence"


class AutoStateSpace(AutoGuide):
    """A guide whose state paths follow the structured low-rank posterior, given the other latent sites.

    Every `StatePath` site of the model gets a `LowRankChain` (or one of the other families) built on the site's own
    prior at the sampled values of the other sites; those get an ordinary guide. The potentials start at the mode of
    the path: on a linear-Gaussian model with `rank` = size of the state that start is the exact posterior.

    Use it with `Trace_ELBO` or `TraceConditionalKL_ELBO` (lower variance) for the families "chain" and "diagonal",
    whose objective is a lower bound on the log evidence; "moment_matched" is the published recursion, whose objective
    is a surrogate that can exceed it, and needs `TraceConditionalKL_ELBO` or `TraceMeanField_ELBO`.

    Args:
        model: a NumPyro model with at least one unobserved `StatePath` site. Under a plate with subsampling the
            potentials of all trials are parameters ("free"), indexed as NumPyro indexes its own.
        rank: columns of the low-rank factors.
        diagonal: whether a diagonal goes beside them: much sharper at small rank. Not for "moment_matched".
        family: "chain", "moment_matched" or "diagonal" (a chain of rank 0).
        potentials: "free" (trained parameters, started at the mode) or "mode" (found again at every evaluation for the
            current values of the other sites; nothing of them is trained, gradients flow through the mode).
        global_guide: makes the guide of the other latent sites, from a model: an AutoGuide class or a function.
        num_samples: particles inside "moment_matched".
        mode_iters: Gauss-Newton steps at every evaluation with `potentials="mode"`.
        prefix: as in NumPyro's guides; parameters are called `{site}_{prefix}_K` and so on.
        init_loc_fn: start of the other sites.

    Raises:
        ValueError: an unknown family, or a model without a `StatePath`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from pssm.distributions import StatePath, observe
        >>> def model(counts):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), 20))
        ...     observe("counts", dist.Poisson(jnp.exp(z)).to_event(2), counts)
        >>> guide = AutoStateSpace(model, rank=1)
        >>> result = SVI(model, guide, optax.adam(1e-2), Trace_ELBO()).run(
        ...     jax.random.key(0), 10, jnp.ones((20, 1)), progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(1), result.params, jnp.ones((20, 1)), sample_shape=(3,))["z"].shape
        (3, 20, 1)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rank: int,
        diagonal: bool = True,
        family: str = "chain",
        potentials: str = "free",
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        num_samples: int = 25,
        mode_iters: int = 4,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ):
        check_choice("family", family, FAMILIES)
        check_choice("potentials", potentials, ("free", "mode"))
        self.rank = 0 if family == "diagonal" else check_count("rank", rank, least=0)
        self.family, self.potentials = family, potentials
        self.diagonal = family == "diagonal" or (diagonal and family == "chain")
        if self.rank == 0 and not self.diagonal:
            raise ValueError("`rank` must be at least 1 where there is no diagonal.")
        self.num_samples, self.mode_iters = num_samples, mode_iters
        init = init_to_median(num_samples=50) if init_loc_fn is None else init_loc_fn
        super().__init__(model, prefix=prefix, init_loc_fn=init, create_plates=create_plates)
        self._global_guide = global_guide
        self._globals: AutoGuide | None = None
        self._paths: list[str] = []
        self._call: tuple[tuple, dict] = ((), {})

    @property
    def objective(self) -> str:
        """What an ELBO with this guide is, in words."""
        return SURROGATE if self.family == "moment_matched" else BOUND

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        key = numpyro.prng_key()
        with handlers.block():
            seeded = handlers.seed(self.model, jax.random.key(0) if key is None else key)
            self.prototype_trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        latent = {n: s for n, s in self.prototype_trace.items() if s["type"] == "sample" and not s["is_observed"]}
        self._paths = [n for n, s in latent.items() if isinstance(unwrap(s["fn"])[0], StatePath)]
        if not self._paths:
            raise ValueError(
                "`model` has no unobserved `StatePath` site, so there is no path for this guide; its latent sites are "
                f"{', '.join(latent) or '(none)'}. Use a NumPyro AutoGuide, or sample the states with StatePath."
            )
        for site in latent.values():
            for frame in site["cond_indep_stack"]:
                self._prototype_frames[frame.name] = frame
        for name, site in self.prototype_trace.items():
            if site["type"] == "plate":
                self._prototype_frame_full_sizes[name] = site["args"][0]
        self._call = (args, kwargs)
        if len(latent) > len(self._paths):
            paths = set(self._paths)

            def hide(site: dict[str, Any]) -> bool:
                return site["type"] == "sample" and (site["name"] in paths or site.get("is_observed", False))

            rest = handlers.block(handlers.seed(self.model, jax.random.key(0)), hide_fn=hide)
            self._globals = self._global_guide(rest, prefix=self.prefix, init_loc_fn=self.init_loc_fn)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Runs the guide; returns a value for every latent site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result: dict[str, Array] = {}
        if self._globals is not None:
            self._globals.create_plates = lambda *a, **k: list(plates.values())
            found = self._globals(*args, **kwargs)
            result = {name: found[name] for name in self._latent if name in found}
        run = ModelRun(self.model, args, kwargs, {n: p._indices for n, p in plates.items()})
        values = {**run.expose_params(result), **result}
        for name in self._paths:
            with ExitStack() as stack:
                for frame in self.prototype_trace[name]["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                given = self._parameters(name, run, values)
                if self.potentials == "mode":
                    given = self._at_mode(name, run, values, given["center"], self.mode_iters)._asdict()
                prior, mask = unwrap(run.trace(values)[name]["fn"])
                q = self._posterior(prior, given)
                values[name] = result[name] = _sample_path(name, q, mask)
        return result

    @property
    def _latent(self) -> list[str]:
        return [n for n, s in self.prototype_trace.items() if s["type"] == "sample" and not s["is_observed"]]

    @property
    def path_params(self) -> set[str]:
        """Names of the paths' own parameters."""
        return {
            f"{name}_{self.prefix}_{part}" for name in self._paths for part in ("center", "scale", "k", "K", "diag")
        }

    def at_mode(self) -> "AutoStateSpace":
        """This guide, once run, with a chain whose potentials are found at the mode for whatever it is called with."""
        guide = copy.copy(self)
        guide.family, guide.potentials, guide.mode_iters = "chain", "mode", 1
        return guide

    def _posterior(self, prior: StatePath, given: dict[str, Array]) -> dist.Distribution:
        k, K, diag = given["k"], given["K"], given.get("diag")
        if self.family == "moment_matched":
            key = numpyro.prng_key()
            return LowRankMomentMatched(prior, k, K, key, self.num_samples, center=given["center"])
        return LowRankChain(prior, k, K, diag=diag, center=given["center"])

    def _parameters(self, name: str, run: "ModelRun", values: dict[str, Array]) -> dict[str, Array]:
        """The potentials of a path site from their parameters.

        `k` and `K` are trained in units of the posterior's conditional scale at the start; that scale and the centre
        are parameters too, so that a fit's `params` hold all there is, but no gradient reaches them.
        """
        made: list[dict[str, Array]] = []

        def param(part: str, constraint: Any = constraints.real) -> Array:
            def init(_: Key) -> Array:
                if not made:
                    made.append(self._initial(name, run, values))
                return made[0][part]

            event_dim = 3 if part == "K" else 2
            value = numpyro.param(f"{name}_{self.prefix}_{part}", init, constraint=constraint, event_dim=event_dim)
            return jnp.asarray(value)

        given = {"center": jax.lax.stop_gradient(param("center"))}
        if self.potentials == "mode":
            return given
        scale = jax.lax.stop_gradient(param("scale"))
        given |= {"k": param("k") / scale, "K": param("K") / scale[..., None]}
        if self.diagonal:
            given["diag"] = param("diag", constraints.positive)
        return given

    def _initial(self, name: str, run: "ModelRun", values: dict[str, Array]) -> dict[str, Array]:
        """Start of the parameters, for all trials of a plate, the subsampled ones in turn."""
        sizes = {f.name: (f.size, self._prototype_frame_full_sizes[f.name]) for f in self._frames(name)}
        small = {n: both for n, both in sizes.items() if both[0] != both[1]}
        if len(small) > 1:
            raise ValueError(f"`model` subsamples `{name}` in more than one plate: {', '.join(small)}.")

        @jax.jit  # one program: piece by piece it would be hundreds
        def at_mode(values: dict[str, Array], indices: dict[str, Array]) -> dict[str, Array]:
            # Values of other sites in the same plate belong to the first minibatch: a start only.
            own = run.with_indices(indices)
            return self._scaled(self._at_mode(name, own, values, None, 30), unwrap(own.trace(values)[name]["fn"])[0])

        if not small:
            return at_mode(values, {})
        (plate, (size, full)), dim = (
            next(iter(small.items())),
            next(f.dim for f in self._frames(name) if f.name in small),
        )
        rows = [jnp.arange(first, first + size) % full for first in range(0, full, size)]
        parts = [at_mode(values, {plate: indices}) for indices in rows]

        def join(part_name: str) -> Array:
            axis = dim - (3 if part_name == "K" else 2)
            joined = jnp.concatenate([p[part_name] for p in parts], axis=axis)
            return jax.lax.slice_in_dim(joined, 0, full, axis=axis)

        return {part_name: join(part_name) for part_name in parts[0]}

    def _scaled(self, found: PotentialsAtMode, prior: StatePath) -> dict[str, Array]:
        parts = {"center": found.center}
        if self.potentials == "mode":
            return parts
        floor = 1e-6 / jnp.broadcast_to(noise_scale(prior), found.scale.shape) ** 2
        scale = jnp.where(found.scale > 0, found.scale, 1.0)
        parts |= {"scale": scale, "k": found.k * scale, "K": found.K * scale[..., None]}
        if self.diagonal:
            parts["diag"] = jnp.maximum(found.diag, floor)
        return parts

    def _at_mode(
        self, name: str, run: "ModelRun", values: dict[str, Array], start: Array | None, num_iters: int
    ) -> PotentialsAtMode:
        options = {"rank": self.rank, "diagonal": self.diagonal}

        def parts(values: dict[str, Array]) -> tuple[StatePath, Callable[[Array], Array]]:
            return unwrap(run.trace(values)[name]["fn"])[0], run.log_lik(name, values)

        # The search itself has no gradient; the last step, at the mode, has the mode's.
        path = mode_path(*parts(jax.lax.stop_gradient(values)), start=start, num_iters=num_iters, **options)
        return potentials_at(*parts(values), jax.lax.stop_gradient(path), **options)

    def _frames(self, name: str) -> list[Any]:
        return self.prototype_trace[name]["cond_indep_stack"]

    # -----------------------------------------------------------------------------------------------------------------

    def sample_posterior(
        self, rng_key: Key, params: dict[str, Array], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of every latent site; paths are whole trajectories.

        Args:
            rng_key: random key.
            params: from `SVI.get_params`.
            args: the model's arguments; those of the first call where none are given.
            sample_shape: leading shape of the draws.
            kwargs: the model's keyword arguments.
        """
        if not args and not kwargs:
            args, kwargs = self._call

        def one(key: Key) -> dict[str, Array]:
            with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
                return self(*args, **kwargs)

        draws = jax.jit(jax.vmap(one))(jax.random.split(rng_key, math.prod(sample_shape)))
        return {name: x.reshape(*sample_shape, *x.shape[1:]) for name, x in draws.items()}

    def median(self, params: dict[str, Array], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Posterior medians; see `quantiles`."""
        return {name: x[0] for name, x in self.quantiles(params, [0.5], *args, **kwargs).items()}

    def quantiles(
        self, params: dict[str, Array], quantiles: list[float], *args: Any, num_samples: int = 4000, **kwargs: Any
    ) -> dict[str, Array]:
        """Quantiles of every latent site, from `num_samples` draws: marginals of a chain have no closed form.

        Arrays have shape `(len(quantiles), ...)`.
        """
        draws = self.sample_posterior(jax.random.key(0), params, *args, sample_shape=(num_samples,), **kwargs)
        return {name: jnp.quantile(x, jnp.asarray(quantiles), axis=0) for name, x in draws.items()}


def _sample_path(name: str, q: dist.Distribution, mask: Any) -> Array:
    """Samples the site; a chain's KL of the draw comes with it, for `TraceConditionalKL_ELBO`."""
    infer: dict[str, Any] = {"prior_from_model": True}
    key = numpyro.prng_key() if isinstance(q, LowRankChain) else None
    masked = q if mask is None else q.mask(mask)
    if key is None or not isinstance(q, LowRankChain):
        return numpyro.sample(name, masked, infer=infer)
    z, kl = jax.jit(q.sample_with_kl)(key)
    infer["draw"] = z, kl
    with handlers.substitute(data={name: z}):
        return numpyro.sample(name, masked, infer=infer)


class ModelRun:
    """A model with its arguments, run inside a guide without leaving anything in the guide's trace."""

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], indices: dict[str, Array]):
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, indices

    def with_indices(self, indices: dict[str, Array]) -> "ModelRun":
        """The same with other subsample indices in some plates."""
        return ModelRun(self.model, self.args, self.kwargs, {**self.indices, **indices})

    def expose_params(self, values: dict[str, Array]) -> dict[str, Array]:
        """Runs the model with its `param` sites in the open, as the guide's own; returns their values."""
        hidden = handlers.block(self._prepared(values), hide_fn=lambda site: site["type"] not in ("param", "mutable"))
        trace = handlers.trace(hidden).get_trace(*self.args, **self.kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    def trace(self, values: dict[str, Array]) -> dict[str, Any]:
        """The model's trace with the given sites and parameters set."""
        with handlers.block():
            return handlers.trace(self._prepared(values)).get_trace(*self.args, **self.kwargs)

    def log_lik(self, path: str, values: dict[str, Array]) -> Callable[[Array], Array]:
        """Log density of everything but the path itself, as a function of it; of the path's batch shape.

        Weights that the path shares (a plate's scale) are divided out.
        """
        own = self.trace(values)[path]
        batch, own_scale = own["fn"].batch_shape, own["scale"]

        def log_lik(z: Array) -> Array:
            total = jnp.zeros((), z.dtype)
            for name, site in self.trace({**values, path: z}).items():
                if site["type"] != "sample" or name == path:
                    continue
                term = site["fn"].log_prob(site["value"])
                scale = 1.0 if site["scale"] is None else site["scale"]
                term = term * (scale / (1.0 if own_scale is None else own_scale))
                if term.ndim >= len(batch) and term.shape[term.ndim - len(batch) :] == batch:
                    term = term.sum(tuple(range(term.ndim - len(batch))))
                elif site["is_observed"]:
                    term = term.sum()
                else:
                    continue  # a site outside the path's plate: no function of the path
                total = total + term
            return total

        return log_lik

    def _prepared(self, values: dict[str, Array]) -> Callable[..., Any]:
        plates = {name: {"type": "plate", "value": x} for name, x in self.indices.items()}
        model = handlers.substitute(handlers.replay(self.model, plates), data=values)
        return handlers.seed(model, jax.random.key(0))


def unwrap(fn: dist.Distribution) -> tuple[Any, Array | bool | None]:
    """The distribution inside batches and masks, and its mask."""
    mask = None
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else jnp.logical_and(mask, fn._mask)
        fn = fn.base_dist
    return fn, mask
