"""`PathGuide`: what all guides of models with `StatePath` sites share; where their potentials come from differs."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import check_choice, check_count
from pssm._types import Array, Key
from pssm.distributions import ConditionedPath, LowRankChain, LowRankMomentMatched, StatePath
from pssm.guides.model_run import ModelRun, unwrap
from pssm.modes.mode import PotentialsAtMode, mode_path, potentials_at

PathPosterior = LowRankChain | LowRankMomentMatched | ConditionedPath
FAMILIES = ("chain", "moment_matched", "diagonal")
BOUND = "lower bound on the log evidence (ELBO)"
SURROGATE = "surrogate: the published moment-matched objective, which can exceed the log evidence"


class PathGuide(AutoGuide):
    """A guide whose state paths follow a low-rank posterior given the other latent sites, which get a guide of theirs.

    A subclass says where a path's potentials come from (`_potentials`). Arguments as in `AutoStateSpace`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rank: int,
        diagonal: bool = True,
        family: str = "chain",
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        num_samples: int = 25,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ):
        check_choice("family", family, FAMILIES)
        self.rank = 0 if family == "diagonal" else check_count("rank", rank, least=0)
        self.family = family
        self.diagonal = family == "diagonal" or (diagonal and family == "chain")
        if self.rank == 0 and not self.diagonal:
            raise ValueError("`rank` must be at least 1 where there is no diagonal.")
        self.num_samples = num_samples
        init = init_to_median(num_samples=50) if init_loc_fn is None else init_loc_fn
        super().__init__(model, prefix=prefix, init_loc_fn=init, create_plates=create_plates)
        self._global_guide = global_guide
        self._globals: AutoGuide | None = None
        self._paths: list[str] = []
        self._call: tuple[tuple, dict] = ((), {})

    def _potentials(self, name: str, run: ModelRun, values: dict[str, Array], prior: StatePath) -> dict[str, Array]:
        """Arguments of the path's posterior beside its prior, such as `k`, `K`, `diag`, `center`, `b`."""
        raise NotImplementedError(f"{type(self).__name__} must define `_potentials`.")

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
                prior, mask = unwrap(run.trace(values)[name]["fn"])
                q = self._posterior(prior, self._potentials(name, run, values, prior))
                own_prior = getattr(q, "prior", None) is prior
                values[name] = result[name] = _sample_path(name, q, mask, own_prior=own_prior)
        return result

    @property
    def _latent(self) -> list[str]:
        return [n for n, s in self.prototype_trace.items() if s["type"] == "sample" and not s["is_observed"]]

    def _posterior(self, prior: StatePath, given: dict[str, Array]) -> PathPosterior:
        k, K = given["k"], given["K"]
        options = {name: given[name] for name in ("center", "b") if name in given}
        if self.family == "moment_matched":
            return LowRankMomentMatched(prior, k, K, numpyro.prng_key(), self.num_samples, **options)
        return LowRankChain(prior, k, K, diag=given.get("diag"), **options)

    def _at_mode(
        self,
        name: str,
        run: ModelRun,
        values: dict[str, Array],
        start: Array | None,
        num_iters: int,
        rank: int | None = None,
    ) -> PotentialsAtMode:
        options = {"rank": self.rank if rank is None else rank, "diagonal": self.diagonal}

        def parts(values: dict[str, Array]) -> tuple[StatePath, Callable[[Array], Array]]:
            return unwrap(run.trace(values)[name]["fn"])[0], run.log_lik(name, values)

        # The search itself has no gradient; the last step, at the mode, has the mode's.
        path = mode_path(*parts(jax.lax.stop_gradient(values)), start=start, num_iters=num_iters, **options)
        return potentials_at(*parts(values), jax.lax.stop_gradient(path), **options)

    def _frames(self, name: str) -> list[Any]:
        return self.prototype_trace[name]["cond_indep_stack"]

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


def _sample_path(name: str, q: PathPosterior, mask: Any, *, own_prior: bool) -> Array:
    """Samples the site; a chain's KL of the draw comes with it, for `TraceConditionalKL_ELBO`.

    `own_prior`: the guide's prior is the model's, so that nothing is left of their ratio.
    """
    infer: dict[str, Any] = {"prior_from_model": own_prior}
    key = numpyro.prng_key() if isinstance(q, LowRankChain) else None
    masked = q if mask is None else q.mask(mask)
    if key is None or not isinstance(q, LowRankChain):
        return numpyro.sample(name, masked, infer=infer)
    z, kl = jax.jit(q.sample_with_kl)(key)
    infer["draw"] = z, kl
    with handlers.substitute(data={name: z}):
        return numpyro.sample(name, masked, infer=infer)
