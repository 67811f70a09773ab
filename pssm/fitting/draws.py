"""Where the draws of a fit come from: a chain, a chain with its paths completed, or a guide."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.infer import MCMC, Predictive
from numpyro.infer.autoguide import AutoGuide

from pssm._types import Key
from pssm.fitting.labels import in_parts, with_all_data
from pssm.guides.plates import Whole, WholePlates


class ChainDraws(NamedTuple):
    """The draws of a Markov chain: all of them, whatever is asked for."""

    fit: MCMC

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them, `(chain, draw)`."""
        return self.fit.get_samples(group_by_chain=True)


class CompletedDraws(NamedTuple):
    """The draws of a Markov chain whose model has integrated its paths out, with a path for each; made once."""

    fit: MCMC

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All of them, `(chain, draw)`."""
        draws = self.fit.get_samples(group_by_chain=True)
        kept = getattr(self.fit, "_completed", None)
        if kept is None or kept[0] is not self.fit.last_state:  # the chain may have gone on
            found = self.fit.sampler.model.complete(draws, jax.random.key(0), *self.fit._args, **self.fit._kwargs)
            kept = self.fit.last_state, {n: x for n, x in found.items() if n not in draws}
            vars(self.fit)["_completed"] = kept
        return {**draws, **kept[1]}


class GuideDraws(NamedTuple):
    """The draws of a guide, for any arguments."""

    fit: Any

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """So many, `(1, draw)`."""
        return guide_draws(self.fit, num_samples, key, args, kwargs)


def guide_draws(
    fit: Any, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, jax.Array]:
    """Draws from a fitted guide, of latent and deterministic sites, with axes `(1, draw)`."""
    params, guide = fit.params, fit.svi.guide
    draw_key, _ = jax.random.split(key)
    _, model = with_all_data(fit, "draws of its series" if in_parts(fit) else "")
    with WholePlates() if isinstance(model, Whole) else nullcontext():
        if isinstance(guide, AutoGuide):
            latents = guide.sample_posterior(draw_key, params, *args, sample_shape=(num_samples,), **kwargs)
        else:
            latents = Predictive(guide, params=params, num_samples=num_samples)(draw_key, *args, **kwargs)
    model = handlers.substitute(model, data=params)

    def deterministic(row: tuple[jax.Array, dict[str, jax.Array]]) -> dict[str, jax.Array]:
        trace = trace_with(model, row[1], *args, **kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

    rows = jnp.arange(num_samples), latents  # there may be no latent site: learned parameters alone
    extra = jax.lax.map(deterministic, rows, batch_size=500)
    return {name: x[None] for name, x in {**latents, **extra}.items()}


def trace_with(model: Callable[..., Any], values: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's trace with latent sites set to `values`."""
    seeded = numpyro.handlers.seed(numpyro.handlers.substitute(model, data=values), jax.random.key(0))
    return numpyro.handlers.trace(seeded).get_trace(*args, **kwargs)


def flatten_draws(draws: dict[str, Any]) -> dict[str, jax.Array]:
    """Merges the `(chain, draw)` axes."""
    return {n: jnp.asarray(x).reshape(math.prod(jnp.shape(x)[:2]), *jnp.shape(x)[2:]) for n, x in draws.items()}
