"""State paths sampled through a fitted guide's own map: NUTS on the exact posterior, preconditioned."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.reparam import Reparam
from numpyro.primitives import Messenger

from pssm._types import Array
from pssm.distributions import LowRankChain, StatePath
from pssm.guides.auto import AutoStateSpace
from pssm.guides.model_run import ModelRun
from pssm.objectives.conditional_kl import site_log_prob


def transport_reparam(
    model: Callable[..., Any], guide: AutoStateSpace, *, params: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The model with its `StatePath` sites sampled through a fitted guide's map from standard normals.

    A path becomes `z = T(e)`, where `T` takes standard normals to the guide's chain `q` given the other sites. Its
    density is `N(e) p(z) / q(z)`, so the posterior is exactly the model's own; where the guide is good `e` is nearly
    standard normal whatever the other sites are, which is the easiest thing there is for NUTS.

    A guide with `potentials="mode"` finds its potentials for the current values of the other sites: each step costs
    more, and bends more. With `potentials="free"` they are those of the fit, cheap and fixed. The site `name` becomes
    deterministic (in the draws like any other), `name_base` of event shape `(noise_size,)` is what is sampled.

    Args:
        model: a NumPyro model, as a rule `handlers.substitute(model, data=fit.params)`, so that learned parameters
            keep their fitted values.
        guide: an `AutoStateSpace` with a chain, fitted to the same model.
        params: the fit's parameters; by default those that `model` was substituted with.

    Returns:
        A NumPyro model with the same arguments. For predictions pass the draws to the model you started from.

    Raises:
        TypeError: `guide` is not an `AutoStateSpace`.
        ValueError: the guide is moment-matched (no density), has not been run, or subsamples; or its parameters are
            not there.

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
    if not isinstance(guide, AutoStateSpace):
        raise TypeError(f"`guide` must be an AutoStateSpace; got {type(guide).__name__}.")
    if guide.family == "moment_matched":
        raise ValueError('`guide` is of the family "moment_matched", which has no density; fit family="chain".')
    if guide.prototype_trace is None:
        raise ValueError("`guide` has not been run: fit it to the model first (`fit_svi`, or `SVI.run`).")
    params = _substituted(model) if params is None else params
    parts = ("center",) if guide.potentials == "mode" else ("center", "scale", "k", "K")
    needed = {f"{name}_{guide.prefix}_{part}" for name in guide._paths for part in parts}
    missing = sorted(needed - params.keys())
    if missing:
        raise ValueError(f"`params` must hold the guide's own parameters; there is no {', '.join(missing)}.")

    def transported(*args: Any, **kwargs: Any) -> Any:
        if guide.potentials == "free":
            config = {name: _Transport(_fitted_chain(guide, name, params)) for name in guide._paths}
            return handlers.reparam(model, config=config)(*args, **kwargs)
        # The search for the mode needs the other sites, some of which may come after the path: first they alone.
        others = [name for name in guide._latent if name not in guide._paths]
        centers = {name: params[f"{name}_{guide.prefix}_center"] for name in guide._paths}
        # Hidden by name: what a sampler adds for its unconstrained values (their Jacobians) must get through.
        hidden = [name for name in guide.prototype_trace if name not in others]
        first = handlers.block(handlers.substitute(model, data=centers), hide=hidden)
        declared = handlers.trace(first).get_trace(*args, **kwargs)
        values = {name: declared[name]["value"] for name in others}
        run = ModelRun(model, args, kwargs, {})
        config = {name: _Transport(_chain_at_mode(guide, name, run, values, centers[name])) for name in guide._paths}
        rest = handlers.trace(handlers.substitute(handlers.reparam(model, config=config), data=values))
        result = handlers.block(rest, hide=others)(*args, **kwargs)
        for name in others:  # a site whose distribution depends on the path was declared with the path's centre
            numpyro.factor(f"{name}_given_path", site_log_prob(rest.trace[name]) - site_log_prob(declared[name]))
        return result

    return transported


ToChain = Callable[[StatePath], LowRankChain]


def _fitted_chain(guide: AutoStateSpace, name: str, params: dict[str, Any]) -> ToChain:
    """The fit's potentials on whatever prior the path has."""
    with handlers.block(), handlers.substitute(data=params):  # all are there: nothing is asked of the run
        given = guide._parameters(name, ModelRun(guide.model, (), {}, {}), {})

    def chain(prior: StatePath) -> LowRankChain:
        return LowRankChain(prior, given["k"], given["K"], diag=given.get("diag"), center=given["center"])

    return chain


def _chain_at_mode(guide: AutoStateSpace, name: str, run: ModelRun, values: dict[str, Any], start: Array) -> ToChain:
    """Potentials found again at the mode for the other sites' `values`."""
    found = guide._at_mode(name, run, values, start, guide.mode_iters)

    def chain(prior: StatePath) -> LowRankChain:
        return LowRankChain(prior, found.k, found.K, diag=found.diag, center=found.center)

    return chain


def _substituted(model: Any) -> dict[str, Any]:
    """The values that handlers around the model put into it."""
    found: dict[str, Any] = {}
    while isinstance(model, Messenger):
        if isinstance(model, handlers.substitute):
            found = {**(model.data or {}), **found}
        model = model.fn
    return found


class _Transport(Reparam):
    """Samples a path through its chain's map from standard normals."""

    def __init__(self, chain: ToChain):
        self.chain = chain

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Array]:
        prior, shape, _ = self._unwrap(fn)
        if obs is not None or not isinstance(prior, StatePath):
            raise ValueError(f"`{name}` must be an unobserved StatePath, as it was when the guide was fitted.")
        chain = self.chain(prior)
        base = dist.Normal(jnp.zeros(prior.noise_size, prior.m0.dtype), 1.0).to_event(1).expand(shape)
        z = chain.path_from_noise(numpyro.sample(f"{name}_base", base))
        numpyro.factor(f"{name}_ratio", -chain.log_ratio(z))
        return None, z
