"""`PathGuide`: the guide of models with `StatePath` sites, made of a posterior for the paths and one for the rest."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import jax
import numpyro
from numpyro import handlers
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoDelta, AutoGuide, AutoLaplaceApproximation, AutoNormal

from pssm._types import Array
from pssm.distributions.unwrap import unwrap
from pssm.guides.drawn import DrawnGuide
from pssm.guides.model_run import ModelRun, PathSite
from pssm.guides.others import OtherSites
from pssm.guides.plates import plates_of, structure
from pssm.guides.posteriors import FAMILIES, Posterior
from pssm.guides.transport import transported

BOUND = "lower bound on the log evidence (ELBO)"
SURROGATE = "surrogate: the published moment-matched objective, which can exceed the log evidence"

POINT = "log joint density at one point of the guide: no bound on the log evidence"

__all__ = ["BOUND", "FAMILIES", "POINT", "SURROGATE", "PathGuide"]


class PathGuide(DrawnGuide):
    """A guide whose state paths follow a posterior given the other latent sites, which get a guide of theirs.

    `AutoStateSpace`, `AmortizedStateSpace` and `DeepKalmanGuide` are this guide with a posterior made from their
    arguments. A posterior of your own needs one method, see `pssm.guides.posteriors.Posterior`.

    Args:
        model: a NumPyro model with at least one unobserved `StatePath` site.
        posterior: where the distribution of a path comes from.
        global_guide: makes the guide of the other latent sites, from a model: an AutoGuide class or a function.
        prefix: as in NumPyro's guides.
        init_loc_fn: start of the other sites.
        create_plates: as in NumPyro's guides.
        own_site: for a model that samples its path in another way: a function `(path, *args, **kwargs)` to the
            distribution of the model's own site. The path is then an auxiliary site, `{site}_path`.

    Raises:
        ValueError: when first run, if the model has no `StatePath`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior: Posterior,
        *,
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
        create_plates: Callable[..., Any] | None = None,
        own_site: Callable[..., Any] | None = None,
    ):
        init = init_to_median(num_samples=50) if init_loc_fn is None else init_loc_fn
        super().__init__(model, prefix=prefix, init_loc_fn=init, create_plates=create_plates)
        self.posterior = posterior
        self._global_guide, self._own_site = global_guide, own_site
        self._paths: list[str] = []
        self._params: set[str] = set()  # names of the paths' own parameters

    @property
    def family(self) -> str:
        """The family of the paths' posterior."""
        return self.posterior.family

    @property
    def objective(self) -> str:
        """What an ELBO with this guide is, in words."""
        if self._others is not None and isinstance(self._others.guide, AutoDelta | AutoLaplaceApproximation):
            return POINT
        return SURROGATE if self.family == "moment_matched" else BOUND

    def with_posterior(self, posterior: Posterior) -> Any:
        """This guide with another posterior of the paths and the same parameters."""
        guide = copy.copy(self)
        guide.posterior = posterior
        return guide

    def evaluated(self) -> "PathGuide":
        """The guide outside of training."""
        return self.with_posterior(self.posterior.evaluated())

    def of_the_past(self) -> "PathGuide":
        """The guide for data whose end is missing; nothing in it comes from the whole series of the fit."""
        return self.with_posterior(self.posterior.given_past())

    @property
    def _latent(self) -> list[str]:
        sites: Any = self.prototype_trace
        return [n for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        numpyro.prng_key()  # a key is taken, as by NumPyro's guides
        super()._setup_prototype(*args, **kwargs)
        sites: Any = self.prototype_trace
        self._paths = [name for name in self._latent if sites[name]["is_path"]]
        if not self._paths:
            latent, self.prototype_trace = self._latent, None
            raise ValueError(
                "`model` has no unobserved `StatePath` site, so there is no path for this guide; its latent sites are "
                f"{', '.join(latent) or '(none)'}. Use a NumPyro AutoGuide, or sample the states with StatePath."
            )
        sites, self.prototype_trace = self.prototype_trace, None
        self._check_data(sites)  # what is not observed would be taken for a latent site
        self.prototype_trace = sites
        self._series = self._paths[0]
        if len(self._latent) > len(self._paths):
            self._others = OtherSites(self.model, self._paths, self._global_guide, self.prefix, self.init_loc_fn)

    def plates(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, numpyro.plate]:
        """The plates of the model's latent sites for these arguments, whose sizes may be new."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        sites = structure(self.model, args, kwargs)
        self._check_data(sites, self.posterior.reads_data)
        given = () if self.create_plates is None else self.create_plates(*args, **kwargs)
        return plates_of(sites, self._latent, given)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Runs the guide; returns a value for every latent site."""
        plates = self.plates(args, kwargs)
        indices = {name: plate._indices for name, plate in plates.items()}
        result: dict[str, Array] = {}
        if self._others is not None:
            found = self._others(args, kwargs, indices)
            result = {name: found[name] for name in self._latent if name in found}
        run = ModelRun(self.model, args, kwargs, indices)
        values = {**run.expose_params(result), **result}
        for name in self._paths:
            own = run.trace(values)[name]
            prior, mask = unwrap(own["fn"])
            frames = {frame.name: frame for frame in own["cond_indep_stack"]}
            around = tuple((n, f.dim, f.size, plates[n].size) for n, f in frames.items())
            site = PathSite(name, self.prefix, run, values, prior, own["fn"].shape(), around)
            with ExitStack() as stack:
                for plate in frames:
                    stack.enter_context(plates[plate])
                with handlers.trace() as made:
                    q = self.posterior.distribution(site)
                self._params |= {n for n, s in made.items() if s["type"] == "param"}
                values[name] = result[name] = self._sample(name, q, mask, site)
            if self._own_site is not None:
                result[name] = numpyro.sample(name, self._own_site(result[name], *args, **kwargs))
        return result

    def _sample(self, name: str, q: Any, mask: Any, site: PathSite) -> Array:
        """Samples the path; where it is cheap the draw's KL divergence comes along, for `TraceConditionalKL_ELBO`."""
        masked = q if mask is None else q.mask(mask)
        infer: dict[str, Any] = {"prior_from_model": getattr(q, "prior", None) is site.prior}
        if self._own_site is not None:
            name, infer["is_auxiliary"] = f"{name}_path", True
        own_shape = q.batch_shape == site.shape[:-2]  # else one distribution for all series of a plate
        key = numpyro.prng_key() if hasattr(q, "sample_with_kl") and own_shape else None
        if key is None:
            return numpyro.sample(name, masked, infer=infer)
        z, kl = jax.jit(q.sample_with_kl)(key)
        if infer["prior_from_model"]:
            infer["draw"] = z, kl
        with handlers.substitute(data={name: z}):
            return numpyro.sample(name, masked, infer=infer)

    def transport(self, model: Callable[..., Any], params: dict[str, Any] | None = None) -> Callable[..., Any]:
        """The model with its paths sampled through this guide's map from standard normals: `infer.transport_reparam`.

        Args:
            model: a NumPyro model.
            params: the fit's parameters; by default those that `model` was substituted with.

        Returns:
            A NumPyro model with the same arguments.

        Raises:
            ValueError: the guide has no density, or has not been run; or its parameters are not there.
        """
        return transported(self, model, params)
