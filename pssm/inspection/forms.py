"""Forms of one model: its path as a site, as noise, or integrated out."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpyro
from numpyro import handlers

from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath
from pssm.inspection.axes import innermost, is_factor, trace_model


def sampled_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The model with its path as a non-centred site, or None where it has no such form."""
    model = _with_states(model)
    trace = trace_model(model, {}, args, kwargs)
    paths = [n for n, s in trace.items() if s["type"] == "sample" and isinstance(innermost(s["fn"]), StatePath)]
    if not paths and "z" not in trace:
        return None
    return numpyro.handlers.reparam(model, config={n: NonCenteredPath() for n in paths}) if paths else model


def path_model(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The model with its path as a `StatePath` site, or None where it has no such form.

    A path whose noise is singular is sampled through that noise, and has none.
    """
    model = _with_states(model)
    return model if has_path(model, args, kwargs) else None


def has_path(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a `StatePath` is among the latent sites."""
    trace = trace_model(model, {}, args, kwargs)
    sites = (s for s in trace.values() if s["type"] == "sample" and not s["is_observed"])
    return any(isinstance(innermost(s["fn"]), StatePath) for s in sites)


def _with_states(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with its states sampled, where it has the option."""
    option = inspect.signature(model).parameters.get("states")
    return model if option is None or not isinstance(option.default, str) else partial(model, states="sampled")


def plain_model(model: Any) -> Callable[..., Any]:
    """The model before its paths were reparametrised (`NonCenteredPath`, `transport_reparam`)."""
    while isinstance(model, handlers.reparam) or hasattr(model, "plain_model"):
        model = model.fn if isinstance(model, handlers.reparam) else model.plain_model
    return model


def integrated(
    model: Callable[..., Any], first: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """A linear model of pssm whose states were sampled, with the states integrated out; None for others."""
    try:
        option = inspect.signature(model).parameters.get("states")
    except (TypeError, ValueError):
        return None
    if option is None or kwargs.get("states", option.default) != "sampled":
        return None
    exact = partial(model, states="marginal")
    rest = {name: x for name, x in kwargs.items() if name != "states"}
    try:
        trace = trace_model(exact, first, args, rest)
    except (ValueError, TypeError):  # a model that has no such form
        return None
    samples = {n: s for n, s in trace.items() if s["type"] == "sample"}
    if any(n not in first for n, s in samples.items() if not s["is_observed"] and not is_factor(s)):
        return None  # it has unknowns that were not drawn
    sites = [s for s in samples.values() if s["is_observed"]]
    return (exact, rest) if any(isinstance(innermost(s["fn"]), LinearGaussianMarginal) for s in sites) else None
