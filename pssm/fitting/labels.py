"""What the objective of a fit by SVI is: a bound, a surrogate, a density at a point. Guide and model on all data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import RenyiELBO
from numpyro.primitives import Messenger

from pssm.distributions.unwrap import unwrap
from pssm.guides.model_run import depends_on
from pssm.guides.paths import BOUND, POINT, SURROGATE
from pssm.guides.plates import Whole, runs_whole, structure, subsampled

MINIBATCHES = f"{BOUND}, estimated on minibatches"


class _FirstRows(Messenger):
    """Plates whose minibatch is no random one."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "plate":
            size, part = msg["args"]
            msg["value"] = jnp.arange(size if part is None else part)


def point_masses(
    guide: Callable[..., Any], params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[str]:
    """The latent sites to which a guide gives one value: `Delta` sites that no random number reaches.

    The `Delta` sites of NumPyro's automatic guides are functions of a random auxiliary site, and no point masses.
    """
    names: list[str] = []

    def run(key: Any) -> list[Any]:
        with handlers.block(), _FirstRows():
            seeded = handlers.substitute(handlers.seed(guide, key), data=params)
            trace = handlers.trace(seeded).get_trace(*args, **kwargs)
        found = {n: s["value"] for n, s in trace.items() if _is_delta(s)}
        names[:] = list(found)
        return list(found.values())

    random = depends_on(run, jax.random.key(0))
    return [name for name, found in zip(names, random, strict=True) if not found]


def _is_delta(site: dict[str, Any]) -> bool:
    latent = site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary")
    return latent and isinstance(unwrap(site["fn"])[0], dist.Delta)


def objective_of(svi: Any, params: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What minus the loss of a fit is, in words."""
    own = getattr(svi.guide, "objective", BOUND)
    if own != BOUND:
        return own
    if point_masses(svi.guide, params, args, kwargs):
        return POINT
    if isinstance(svi.loss, RenyiELBO) and svi.loss.alpha < 0:
        return f"surrogate: Renyi's objective with alpha = {svi.loss.alpha:g}, which can exceed the log evidence"
    return MINIBATCHES if subsampled(structure(svi.model, args, kwargs)) else BOUND


def with_all_data(fit: Any, what: str = "") -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Guide and model of a fit, on all of their data where they take a part of it.

    Args:
        fit: an `SVIFit`.
        what: must have all data, in words; else guide and model stay as they are where they cannot run on all.

    Raises:
        ValueError: they cannot.
    """
    guide, model, args, kwargs = fit.svi.guide, fit.svi.model, fit.args, fit.kwargs
    small = subsampled(structure(model, args, kwargs))
    if not small:
        return guide, model
    why = runs_whole(model, args, kwargs) or runs_whole(handlers.substitute(guide, data=fit.params), args, kwargs)
    if not why:
        return Whole(guide), Whole(model)
    if what:
        raise ValueError(
            f"`fit`: {what} must have all data of the plate `{small[0]}`, which takes a random part of it, and the "
            f"model cannot run on all ({why}). Give the model all data, of which it takes the rows of the plate."
        )
    return guide, model


def in_parts(fit: Any) -> bool:
    """Whether there are latent sites in a plate that takes a part of its data."""
    sites = structure(fit.svi.model, fit.args, fit.kwargs)
    small = set(subsampled(sites))
    latent = (s for s in sites.values() if s["type"] == "sample" and not s["is_observed"])
    return any(frame.name in small for site in latent for frame in site["cond_indep_stack"])


def check_density(fit: Any) -> None:
    """Refuses a fit whose guide has no density: its draws have no weights, and its objective is no ELBO."""
    if fit.objective == SURROGATE:
        raise ValueError('`fit` has a family without a joint density ("moment_matched"): there are no weights.')
    if fit.objective == POINT:
        guide = fit.svi.guide
        names = ", ".join(f"`{name}`" for name in point_masses(guide, fit.params, fit.args, fit.kwargs))
        raise ValueError(
            f"`fit`: its guide ({type(guide).__name__}) gives {names or 'a site'} one value, so there is no ELBO and "
            "there are no weights: minus its loss is the log joint density there, and no bound. Fit "
            '`guide="mvn"`, or `global_guide=AutoMultivariateNormal`.'
        )
