"""A model with its paths sampled through a guide's own map from standard normals; see `infer.transport_reparam`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.reparam import Reparam

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.guides.model_run import ModelRun, PathSite
from pssm.guides.posteriors import Posterior


def transported(
    model: Callable[..., Any],
    posterior: Posterior,
    params: dict[str, Any],
    *,
    paths: list[str],
    others: list[str],
    hidden: list[str],
    prefix: str,
) -> Callable[..., Any]:
    """The model with these paths transported.

    Args:
        model: a NumPyro model.
        posterior: of the paths.
        params: the guide's parameters.
        paths: names of the path sites.
        others: names of the other latent sites.
        hidden: names of all sites that are not among `others`.
        prefix: of the guide's parameters.
    """

    def of_site(site: PathSite) -> Any:
        with handlers.block(), handlers.substitute(data=params):
            return posterior.distribution(site)

    def run_model(*args: Any, **kwargs: Any) -> Any:
        run = ModelRun(model, args, kwargs, {})
        if not posterior.needs_values:
            config = {}
            for name in paths:
                config[name] = Transport(
                    lambda prior, shape, name=name: of_site(PathSite(name, prefix, run, {}, prior, shape))
                )
            return handlers.reparam(model, config=config)(*args, **kwargs)

        # The potentials need the other sites, some of which may come after the path: first they alone.
        def still(site: dict[str, Any]) -> Any:
            if site["name"] not in paths or site["type"] != "sample":
                return None
            prior, stored = unwrap(site["fn"])[0], params.get(f"{site['name']}_{prefix}_center")
            shape = site["fn"].shape()
            if stored is not None and jnp.shape(stored) == shape:
                return stored
            noise = jnp.zeros((*prior.batch_shape, prior.noise_size), prior.m0.dtype)
            return jnp.broadcast_to(prior.path_from_noise(noise), shape)

        # Hidden by name: what a sampler adds for its unconstrained values (their Jacobians) must get through.
        first = handlers.block(handlers.substitute(model, substitute_fn=still), hide=hidden)
        declared = handlers.trace(first).get_trace(*args, **kwargs)
        values = {name: declared[name]["value"] for name in others}
        config = {}
        for name, site in run.trace(values).items():
            if name in paths:
                prior, shape = unwrap(site["fn"])[0], site["fn"].shape()
                q = of_site(PathSite(name, prefix, run, values, prior, shape))
                config[name] = Transport(lambda *_, q=q: q, own_prior=getattr(q, "prior", None) is prior)
        rest = handlers.trace(handlers.substitute(handlers.reparam(model, config=config), data=values))
        result = handlers.block(rest, hide=others)(*args, **kwargs)
        for name in others:  # a site whose distribution depends on the path was declared with another path
            numpyro.factor(f"{name}_given_path", site_log_prob(rest.trace[name]) - site_log_prob(declared[name]))
        return result

    return run_model


class Transport(Reparam):
    """Samples a path through its posterior's map from standard normals."""

    def __init__(self, posterior: Callable[[StatePath, tuple[int, ...]], Any], *, own_prior: bool = True):
        self.posterior, self.own_prior = posterior, own_prior

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Array]:
        """Replaces the site."""
        prior, shape, _ = self._unwrap(fn)
        if obs is not None or not isinstance(prior, StatePath):
            raise ValueError(f"`{name}` must be an unobserved StatePath, as it was when the guide was fitted.")
        q = self.posterior(prior, (*shape, *prior.event_shape))
        base = dist.Normal(jnp.zeros(prior.noise_size, prior.m0.dtype), 1.0).to_event(1).expand(shape)
        z = q.path_from_noise(numpyro.sample(f"{name}_base", base))
        numpyro.factor(f"{name}_ratio", -q.log_ratio(z, None if self.own_prior else prior))
        return None, z
