"""`AutoStateSpace`: a guide for any NumPyro model that has `StatePath` sites."""

from collections.abc import Callable
from typing import Any

from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import check_choice
from pssm.guides.paths import PathGuide
from pssm.guides.posteriors import AtMode, Form, Free, Variational


class AutoStateSpace(PathGuide):
    """A guide whose state paths follow the structured low-rank posterior, given the other latent sites.

    Every `StatePath` site of the model gets a `LowRankChain` (or one of the other families) built on the site's own
    prior at the sampled values of the other sites; those get an ordinary guide. The potentials start at the mode of
    the path: on a linear-Gaussian model with `rank` = size of the state that start is the exact posterior.

    Use it with `StickingTheLanding_ELBO` (least noise near the optimum) or another ELBO for the families "chain" and
    "diagonal", whose objective is a lower bound on the log evidence; "moment_matched" is the published recursion, whose
    objective is a surrogate that can exceed it, and needs `TraceConditionalKL_ELBO` or `TraceMeanField_ELBO`.

    Args:
        model: a NumPyro model with at least one unobserved `StatePath` site. Under a plate with subsampling the
            potentials of all trials are parameters ("free"), indexed as NumPyro indexes its own.
        rank: columns of the low-rank factors.
        diagonal: whether a diagonal goes beside them: much sharper at small rank. Not for "moment_matched".
        family: "chain", "moment_matched" or "diagonal" (a chain of rank 0).
        potentials: "free" (trained parameters, started at the mode), or found again at every evaluation for the current
            values of the other sites, nothing of them trained: "mode" (at the mode of the path; gradients flow through
            it) or "variational" (those of the highest bound, `pssm.modes.variational_fit`; up to 64 states).
        global_guide: makes the guide of the other latent sites, from a model: an AutoGuide class or a function.
        num_samples: particles inside "moment_matched".
        mode_iters: steps at every evaluation with `potentials="mode"` or "variational".
        prefix: as in NumPyro's guides; parameters are called `{site}_{prefix}_K` and so on.
        init_loc_fn: start of the other sites.
        create_plates: as in NumPyro's guides.
        own_site: as in `PathGuide`.

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
        own_site: Callable[..., Any] | None = None,
    ):
        check_choice("potentials", potentials, ("free", "mode", "variational"))
        form = Form.of(family, rank, diagonal, num_samples)
        found_again = {"mode": AtMode, "variational": Variational}
        super().__init__(
            model,
            Free(form) if potentials == "free" else found_again[potentials](form, mode_iters),
            global_guide=global_guide,
            prefix=prefix,
            init_loc_fn=init_loc_fn,
            create_plates=create_plates,
            own_site=own_site,
        )
