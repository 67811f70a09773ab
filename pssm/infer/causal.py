"""Filter mode of a guide: the states given the observations up to some step, and nothing of what comes after."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from pssm._keys import as_key
from pssm._types import Array, ArrayLike, KeyLike
from pssm.fitting.results import SVIFit
from pssm.inspection.past import timed_arguments


def causal_draws(
    fit: SVIFit,
    origins: ArrayLike,
    *,
    num_samples: int = 200,
    key: KeyLike = 0,
    batch_size: int = 8,
    dims: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, np.ndarray]:
    """Draws of the latent sites given the observations before `origin` only, for every origin.

    The observations from `origin` on are made NaN, and the path's potentials are those of what is left: found again at
    the mode, or made by the guide's networks. Nothing of the future can reach them: in the path of a draw, row
    `origin - 1` is a filtered state, and the rows from `origin` on are a forecast (by the model's own transition, where
    the potentials say nothing of steps without data). The rows of a smoothed path are neither: they have seen all
    observations. The other latent sites keep the fit's posterior, given the whole series.

    Args:
        fit: from `fit_svi`, with a guide of `pssm.guides`. Which arguments of the model are the data, and which of
            their axes is time, is found out from the model: all that it observes is hidden from `origin` on. Inputs
            are not.
        origins: how many observations are known, each from 0 to `time`.
        num_samples: draws for every origin.
        key: random key, or a whole number; the default too is the same in each call, and gives the same draws.
        batch_size: origins that run at once.
        dims: names of the axes of observed sites, `{"counts": ("time", "region")}`, where the model does not say which
            is time.

    Returns:
        Arrays by site, `(origin, draw, ...)`.

    Raises:
        TypeError: the guide is none of `pssm.guides`.
        ValueError: an origin outside of the series; a model whose time axis is not known, whose missing entries are not
            NaN, or whose data do not come from its arguments; or a guide of which it is not known what of its arguments
            is the future.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from pssm.distributions import StatePath, observe
        >>> from pssm.infer import fit_svi
        >>> def model(y):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), len(y)))
        ...     observe("y", dist.Normal(z, 1.0).to_event(2), y)
        >>> fit = fit_svi(model, jnp.ones((20, 1)), guide="chain", rank=1, num_steps=100, progress_bar=False)
        >>> causal_draws(fit, [5, 10])["z"].shape
        (2, 200, 20, 1)
    """
    guide: Any = fit.svi.guide
    if not hasattr(guide, "given_past"):
        raise TypeError(
            f"`fit` must have an AutoStateSpace or another guide of `pssm.guides`; got {type(guide).__name__}."
        )
    guide.prepare(jax.random.key(0), *fit.args, **fit.kwargs)
    timed = timed_arguments(handlers.substitute(guide.model, data=fit.params), fit.args, fit.kwargs, dims)
    steps, known = timed.steps, np.asarray(origins)
    if known.ndim != 1 or known.size == 0 or known.min() < 0 or known.max() > steps:
        raise ValueError(
            f"`origins` must be a list of numbers from 0 to {steps} (the steps of the data); got {origins}."
        )
    of_the_past = guide.of_the_past()

    def one(xs: tuple[Array, Array]) -> dict[str, Array]:
        origin, own_key = xs
        args, kwargs = timed.past(origin)
        return of_the_past.sample_posterior(own_key, fit.params, *args, sample_shape=(num_samples,), **kwargs)

    keys = jax.random.split(as_key(key), known.size)
    run = jax.jit(lambda xs: jax.lax.map(one, xs, batch_size=min(batch_size, known.size)))
    return {name: np.asarray(x) for name, x in run((jnp.asarray(known), keys)).items()}
