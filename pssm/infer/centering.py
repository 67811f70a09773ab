"""Which form of a path suits a gradient-based sampler: the information of the data beside that of the transition."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer import init_to_median

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.distributions.unwrap import unwrap
from pssm.guides.model_run import ModelRun
from pssm.inspection.axes import is_factor
from pssm.modes.mode import noise_sd, sites
from pssm.modes.path import mode_path


def centering(
    model: Callable[..., Any], *args: Any, values: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, Array]:
    """Weights for `PartiallyCenteredPath`, by site: how much the data say about each step's own noise.

    With `J_t` the curvature of the observations' log density in `z_t` at the mode of the path, and `Q_t` the variance
    of the noise,

        c_t = J_t Q_t / (1 + J_t Q_t),

    state by state: the share of the variance of the noise of step t that the observation of step t takes away. Near 1
    the data determine the states, and the centred form suits; near 0 (no data, or weak ones) the states follow the
    noise and its scale, and the non-centred form does. Missing observations count as none. Neighbours are not counted:
    where many weak observations determine a smooth path together, the rule gives less than is best.

    Args:
        model: a NumPyro model with `StatePath` sites, not yet reparametrised.
        *args: its arguments, with data.
        values: of the other latent sites, such as the end of a short run or `fit_map(...)`; those that are not given
            are set to medians of the prior, which for scales can be far from the posterior.
        **kwargs: its keyword arguments.

    Returns:
        For each `StatePath` site weights `(..., time, state)`.

    Raises:
        ValueError: the model has no `StatePath` site.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, pssm
        >>> def model(y):
        ...     one = jnp.eye(1)
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), one, one, 0.5 * one, len(y)))
        ...     pssm.observe("y", dist.Normal(z, 0.5).to_event(2), y)
        >>> print(centering(model, jnp.array([[1.0], [2.0], [jnp.nan]]))["z"].ravel())
        [0.8 0.5 0. ]

    Source:
        Papaspiliopoulos, Roberts & Sköld 2003, "Non-centered parameterisations for hierarchical models".
    """
    given = dict(values or {})

    def start(site: dict[str, Any]) -> Any:
        return given[site["name"]] if site["name"] in given else init_to_median(site)

    seeded = handlers.substitute(handlers.seed(model, jax.random.key(0)), substitute_fn=start)
    trace = handlers.trace(seeded).get_trace(*args, **kwargs)
    samples = {n: s for n, s in trace.items() if s["type"] == "sample" and not is_factor(s)}
    paths = [n for n, s in samples.items() if isinstance(unwrap(s["fn"])[0], StatePath) and not s["is_observed"]]
    if not paths:
        raise ValueError("`model` must have a `StatePath` site that is sampled; it has none.")
    known = {n: s["value"] for n, s in trace.items() if s["type"] == "param"}
    known |= {n: s["value"] for n, s in samples.items() if not s["is_observed"] and n not in paths}
    run = ModelRun(model, args, kwargs, {})
    found: dict[str, Array] = {}
    for name in paths:
        others = {n: trace[n]["value"] for n in paths if n != name}
        found[name] = _weights(run, name, {**known, **others}, jnp.shape(trace[name]["value"]))
    return found


def _weights(run: ModelRun, name: str, values: dict[str, Array], shape: tuple[int, ...]) -> Array:
    prior, log_lik = run.path_prior(name, values), run.log_lik(name, values)
    start = prior.path_from_noise(jnp.zeros((*prior.batch_shape, prior.noise_size), prior.m0.dtype))
    start = jnp.broadcast_to(start, shape)
    path = mode_path(prior, log_lik, rank=prior.n_state, start=start, strict=False)
    curvature = jnp.diagonal(sites(log_lik, path)[1], axis1=-2, axis2=-1)
    information = jnp.maximum(curvature, 0.0) * noise_sd(prior) ** 2
    return jnp.broadcast_to(information / (1.0 + information), shape)
