"""Sites of traces: the distribution inside batches and masks, and the log density with scale and mask."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.util import scale_and_mask

from pssm._types import Array


def unwrap(fn: dist.Distribution) -> tuple[Any, Array | bool | None]:
    """The distribution inside batches and masks, and its mask."""
    mask = None
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else jnp.logical_and(mask, fn._mask)
        fn = fn.base_dist
    return fn, mask


def site_log_prob(site: dict[str, Any]) -> Array:
    """Log density of a site of a trace, summed, with its scale and mask."""
    intermediates = (site["intermediates"],) if site["intermediates"] else ()
    return jnp.sum(scale_and_mask(site["fn"].log_prob(site["value"], *intermediates), site["scale"]))
