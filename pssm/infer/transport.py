"""State paths sampled through a fitted guide's own map: NUTS on the exact posterior, preconditioned."""

from collections.abc import Callable
from typing import Any

from pssm.guides import PathGuide


def transport_reparam(
    model: Callable[..., Any], guide: PathGuide, *, params: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The model with its `StatePath` sites sampled through a fitted guide's map from standard normals.

    A path becomes `z = T(e)`, where `T` takes standard normals to the guide's chain `q` given the other sites. Its
    density is `N(e) p(z) / q(z)`, so the posterior is exactly the model's own; where the guide is good `e` is nearly
    standard normal whatever the other sites are, which is the easiest thing there is for NUTS.

    A guide with `potentials="mode"` finds its potentials for the current values of the other sites: each step costs
    more, and bends more; so does one whose networks read the data. With `potentials="free"` they are those of the fit,
    cheap and fixed. The site `name` becomes
    deterministic (in the draws like any other), `name_base` of event shape `(noise_size,)` is what is sampled.

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
