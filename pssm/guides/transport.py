"""A model with its paths sampled through a guide's own map from standard normals."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.reparam import Reparam
from numpyro.primitives import Messenger

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.guides.model_run import ModelRun, PathSite
from pssm.guides.plates import structure


def transported(guide: Any, model: Callable[..., Any], params: dict[str, Any] | None) -> Callable[..., Any]:
    """The model with the paths of a `PathGuide` transported; see `PathGuide.transport`."""
    if guide.family == "moment_matched":
        raise ValueError('`guide` is of the family "moment_matched", which has no density; fit family="chain".')
    if guide.prototype_trace is None:
        raise ValueError("`guide` has not been run: fit it to the model first (`fit_svi`, or `SVI.run`).")
    given = _substituted(model) if params is None else params
    missing = sorted(guide._params - given.keys())
    if missing:
        raise ValueError(f"`params` must hold the guide's own parameters; there is no {', '.join(missing)}.")
    posterior, prefix, paths = guide.posterior.evaluated().with_derivatives(), guide.prefix, guide._paths
    others = [name for name in guide._latent if name not in paths]
    hidden = [name for name in guide.prototype_trace if name not in others]

    def of_site(site: PathSite) -> Any:
        with handlers.block(), handlers.substitute(data=given):
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

        guide._check_data(structure(model, args, kwargs), posterior.reads_data)

        # The potentials need the other sites, some of which may come after the path: first they alone.
        def still(site: dict[str, Any]) -> Any:
            if site["name"] not in paths or site["type"] != "sample":
                return None
            prior, stored = unwrap(site["fn"])[0], given.get(f"{site['name']}_{prefix}_center")
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

    run_model.plain_model = model  # for states and forecasts of the fit
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
        z = q.path_from_noise(numpyro.sample(f"{name}_base", base, infer={"path_noise": True}))
        numpyro.factor(f"{name}_ratio", -q.log_ratio(z, None if self.own_prior else prior))
        return None, z


def _substituted(model: Any) -> dict[str, Any]:
    """The values that handlers around the model put into it."""
    found: dict[str, Any] = {}
    while isinstance(model, Messenger):
        if isinstance(model, handlers.substitute):
            found = {**(model.data or {}), **found}
        model = model.fn
    return found


def transport_reparam(
    model: Callable[..., Any], guide: Any, *, params: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The model with its `StatePath` sites sampled through a fitted guide's map from standard normals.

    A path becomes `z = T(e)`, where `T` takes standard normals to the guide's chain `q` given the other sites. Its
    density is `N(e) p(z) / q(z)`, so the posterior is exactly the model's own; where the guide is good `e` is nearly
    standard normal whatever the other sites are, which is the easiest thing there is for NUTS.

    A guide with `potentials="mode"` or "variational" finds its potentials for the current values of the other sites:
    each step costs more, and bends more; so does one whose networks read the data. With `potentials="free"` they are
    those of the fit, cheap and fixed. The site `name` becomes deterministic (in the draws like any other), `name_base`
    of event shape `(noise_size,)` is what is sampled.

    Args:
        model: a NumPyro model, as a rule `handlers.substitute(model, data=fit.params)`, so that learned parameters
            keep their fitted values.
        guide: an `AutoStateSpace`, `AmortizedStateSpace` or `DeepKalmanGuide` with a density, fitted to the same model.
        params: the fit's parameters; by default those that `model` was substituted with.

    Returns:
        A NumPyro model with the same arguments. For predictions pass the draws to the model you started from.

    Raises:
        TypeError: `guide` is no guide of state paths.
        ValueError: the guide is moment-matched (no density), or has not been run; or its parameters are not there.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro import handlers
        >>> from numpyro.infer import MCMC, NUTS
        >>> from pssm.distributions import StatePath, observe
        >>> from pssm.infer import fit_svi
        >>> def model(y):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), len(y)))
        ...     observe("y", dist.Poisson(jnp.exp(z)).to_event(2), y)
        >>> y = jnp.ones((10, 1))
        >>> fit = fit_svi(model, y, guide="chain", rank=1, num_steps=50, progress_bar=False)
        >>> easy = transport_reparam(handlers.substitute(model, data=fit.params), fit.svi.guide)
        >>> mcmc = MCMC(NUTS(easy), num_warmup=20, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y)
        >>> mcmc.get_samples()["z"].shape
        (10, 10, 1)

    Source:
        Hoffman et al. 2019, "NeuTra-lizing bad geometry", with the chain in place of a flow.
    """
    if not hasattr(guide, "transport"):
        raise TypeError(
            f"`guide` must be an AutoStateSpace, or another guide with a path to transport; got {type(guide).__name__}."
        )
    return guide.transport(model, params)
