"""What the objectives share: the mean over draws of the guide, and NumPyro's state of `mutable` sites."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.infer.elbo import ELBO

from pssm._types import Array, Key

State = dict[str, Any] | None


def mutable(sites: dict[str, Any]) -> dict[str, Any]:
    """The values of the `mutable` sites of a trace."""
    return {name: site["value"] for name, site in sites.items() if site["type"] == "mutable"}


def over_draws(elbo: ELBO, key: Key, one: Callable[[Key], tuple[Array, State]]) -> dict[str, Any]:
    """Minus the mean of `one(key)` over an objective's particles; the state is kept where there is one particle."""
    if elbo.num_particles == 1:
        value, state = one(key)
        return {"loss": -value, "mutable_state": state}
    keys = jax.random.split(key, elbo.num_particles)
    values = elbo.vectorize_particles_fn(lambda key: one(key)[0], keys)
    return {"loss": -jnp.mean(values), "mutable_state": None}
