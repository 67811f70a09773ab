"""`constrain`: SVI whose reconstruction error is held at a bound, the rest of the objective being minimised."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.primitives import Messenger, mutable

from pssm._checks import check_choice, check_count
from pssm._types import Array
from pssm.partly_observed import log_prob_observed

RULES = ("rewo", "geco", "linear-anneal")
DISTORTIONS = ("mse", "nll")
LEAST, MOST = 1e-3, 1e4
SUFFIX = "$constraint"


class Constrained:
    """A model whose likelihood of one site is weighted; made by `constrain`, and called like the model itself."""

    def __init__(self, model: Callable[..., Any], site: str, bound: float, rule: str, distortion: Any, **options: Any):
        self.model, self.site, self.bound, self.rule, self.distortion = model, site, bound, rule, distortion
        self.options = options
        self.__name__ = getattr(model, "__name__", type(model).__name__)

    @property
    def state_site(self) -> str:
        """Name of the `mutable` site that keeps the weight."""
        return f"{self.site}{SUFFIX}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model, the site weighted, and takes a step of the weight's rule."""
        zero = jnp.zeros(())
        # In a state that nothing was learned in, as in the first run or outside of SVI, the weight is 1: the ELBO's.
        fresh = {"weight": zero + self.options["start"], "distortion": zero, "met": zero, "step": zero}
        state: Any = mutable(self.state_site, fresh)  # pyright: ignore[reportArgumentType]
        begun = state["step"] > 0
        watched = _Weighted(self.site, jnp.where(begun, state["weight"], 1.0))
        with watched:
            value = self.model(*args, **kwargs)
        if watched.found is None:
            raise ValueError(
                f"`site` must be an observed site of the model; got {self.site!r}, and it observes "
                f"{', '.join(watched.observed) or 'nothing'}."
            )
        distortion = jax.lax.stop_gradient(self._distortion(watched.found)).astype(zero.dtype)
        new = self._moved(state, distortion)
        state.update({name: jnp.where(begun, new[name], state[name]) for name in ("weight", "distortion", "met")})
        state["step"] = state["step"] + 1.0
        return value

    def _distortion(self, site: dict[str, Any]) -> Array:
        """The reconstruction's error in a draw, on average over the observed entries; a plate's scale has no say."""
        fn, value = site["fn"], site["value"]
        if callable(self.distortion):
            return jnp.asarray(self.distortion(fn, value))
        seen = ~jnp.isnan(value)
        if self.distortion == "mse":
            squares = jnp.where(seen, (jnp.where(seen, value, 0.0) - fn.mean) ** 2, 0.0)
            return squares.sum() / jnp.maximum(seen.sum(), 1)
        return -log_prob_observed(fn, value).sum() / jnp.maximum(seen.sum(), 1)

    def _moved(self, state: dict[str, Array], distortion: Array) -> dict[str, Array]:
        """The state after a step, with the distortion of its draw."""
        o, weight = self.options, state["weight"]
        first = state["step"] <= 1
        average = jnp.where(first, distortion, o["decay"] * state["distortion"] + (1 - o["decay"]) * distortion)
        met = jnp.maximum(state["met"], (average <= self.bound).astype(average.dtype))
        if self.rule == "linear-anneal":
            share = jnp.clip(state["step"] / o["anneal_steps"], 0.0, 1.0)
            return {"weight": 1 / (share + (1 - share) / o["start"]), "distortion": average, "met": met}
        apart = jnp.clip((average - self.bound) / abs(self.bound), -1.0, 1.0)
        if self.rule == "geco":
            pull = jnp.ones_like(weight)
        else:  # up where violated; else towards 1; nothing before the bound was met for the first time
            pull = met * jnp.where(apart > 0, 1.0, -jnp.tanh(o["sharpness"] * (1 / weight - 1)))
        weight = jnp.clip(weight * jnp.exp(o["rate"] * pull * apart), LEAST, MOST)
        return {"weight": weight, "distortion": average, "met": met}


def constrain(
    model: Callable[..., Any],
    *,
    site: str,
    bound: float,
    rule: str = "rewo",
    distortion: str | Callable[[Any, Array], Array] = "mse",
    start: float | None = None,
    rate: float = 0.02,
    decay: float = 0.95,
    sharpness: float = 1.0,
    anneal_steps: int = 1000,
) -> Constrained:
    """A model trained under a constraint: the least KL divergence among the fits whose distortion is at most a bound.

    SVI then minimises `R + w D`, with the rate `R` (the KL divergence), the distortion `D` (minus the expected
    log-likelihood of `site`) and a weight `w` that adapts at each step to a running average of the distortion. A weight
    of 1 is the ELBO. The weight is kept in NumPyro's `mutable` state, so `svi.update`, `svi.run`, `jit` and `fit_svi`
    work as ever, for any model and guide. Three things to know:

    - The noise of the site must not be learned: it would be a weight of its own, and the constraint without force.
    - The objective takes one particle, `Trace_ELBO()`: NumPyro drops the state of several. `fit_svi` does so by itself.
    - The guide is made from the plain model. The loss is no bound unless the weight is 1; evaluate the plain model, or
      this one outside of SVI, where the weight is 1 (so are `validation` losses of `fit_svi`, and `elbo`).

    Args:
        model: a NumPyro model.
        site: name of an observed site.
        bound: the largest distortion; positive for "mse". Reachable, or the weight grows (rule "geco") or the start is
            never left ("rewo"): take 1.2 to 1.5 times what a plain autoencoder, or a fit with a large weight, reaches.
        rule: "rewo": the weight stays at `start` until the bound is first met; from then on it grows where the bound is
            violated, and goes to 1 where it is not. "geco": it grows or shrinks with the violation from the start, and
            may stay below 1. "linear-anneal": no constraint, the KL divergence's weight `1/w` goes from `1/start` to 1
            in `anneal_steps`.
        distortion: "mse", the squared error of the site's mean for each observed entry; "nll", minus the log density
            for each observed entry; or a function of the site's distribution and value.
        start: the first weight; 100 by default, for "geco" 1.
        rate: how fast the weight moves, on the logarithmic scale, where the distortion is off by the bound itself.
        decay: of the running average, for each step.
        sharpness: of the return to 1 in "rewo".
        anneal_steps: for "linear-anneal".

    Returns:
        A model. `svi_state.mutable_state[f"{site}$constraint"]` has the current `weight`, the average `distortion`,
        whether the bound was ever `met`, and the `step`.

    Raises:
        ValueError: an unknown rule or distortion, a number out of range; when it runs: no such observed site.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
        ...     numpyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)
        >>> held = constrain(model, site="y", bound=0.1)
        >>> svi = SVI(held, AutoNormal(model), optax.adam(0.01), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 5, jnp.ones(4), progress_bar=False)
        >>> sorted(result.state.mutable_state["y$constraint"])
        ['distortion', 'met', 'step', 'weight']

    Source:
        Rezende & Viola 2018 ("geco"); Klushyn et al. 2019 ("rewo") and 2021.
    """
    check_choice("rule", rule, RULES)
    if not callable(model):
        raise TypeError(f"`model` must be a NumPyro model; got {type(model).__name__}.")
    if not callable(distortion):
        check_choice("distortion", distortion, DISTORTIONS)
    if bound == 0 or (distortion == "mse" and not bound > 0):
        raise ValueError(f"`bound` must be positive (for an nll: not zero); got {bound}.")
    first = (1.0 if rule == "geco" else 100.0) if start is None else start
    if not LEAST <= first <= MOST:
        raise ValueError(f"`start` must be from {LEAST:g} to {MOST:g}; got {first}.")
    for name, x in (("rate", rate), ("sharpness", sharpness)):
        if not x > 0:
            raise ValueError(f"`{name}` must be positive; got {x}.")
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be from 0 to below 1; got {decay}.")
    options = {"start": first, "rate": rate, "decay": decay, "sharpness": sharpness}
    options["anneal_steps"] = check_count("anneal_steps", anneal_steps)
    return Constrained(model, site, bound, rule, distortion, **options)


def constraint_weights(mutable_state: dict[str, Any] | None) -> dict[str, Array]:
    """The weights of the constraints in a state of SVI, by site."""
    found = {n.removesuffix(SUFFIX): x for n, x in (mutable_state or {}).items() if n.endswith(SUFFIX)}
    return {name: x["weight"] for name, x in found.items()}


def without_constraints(mutable_state: dict[str, Any] | None) -> dict[str, Any] | None:
    """A state in which constraints are new, so that their weights are 1."""
    if not constraint_weights(mutable_state):
        return mutable_state
    return {n: {**x, "step": 0.0 * x["step"]} if n.endswith(SUFFIX) else x for n, x in mutable_state.items()}


class _Weighted(Messenger):
    """Scales the log density of one observed site, and remembers it; also the names of all others."""

    def __init__(self, site: str, weight: Array):
        super().__init__(None)
        self.site, self.weight = site, weight
        self.found: dict[str, Any] | None = None
        self.observed: list[str] = []

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and msg["name"] == self.site:
            msg["scale"] = self.weight if msg["scale"] is None else self.weight * msg["scale"]

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            self.observed.append(msg["name"])
            if msg["name"] == self.site:
                self.found = msg


__all__ = ["Constrained", "constrain", "constraint_weights", "without_constraints"]
