"""Plates of a model's trace: entered again in a guide, subsampled or whole."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK, Messenger

from pssm._types import Key
from pssm.distributions import StatePath
from pssm.distributions.unwrap import unwrap


class WholePlates(Messenger):
    """Plates that take a random part of their data take all of it, in order."""

    def process_message(self, msg: dict[str, Any]) -> None:
        """Sets the indices of a plate."""
        if msg["type"] == "plate":
            size = msg["args"][0]
            msg["args"], msg["value"] = (size, size), jnp.arange(size)


class Whole:
    """A model or guide whose plates are whole; like the function itself in every other respect."""

    def __init__(self, fn: Callable[..., Any]):
        self.fn = self.__wrapped__ = fn  # the second is what `inspect.signature` looks for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        with WholePlates():
            return self.fn(*args, **kwargs)


@contextmanager
def apart() -> Iterator[None]:
    """A run inside of another leaves nothing in it; but where plates are whole outside, they are so inside."""
    with ExitStack() as stack:
        whole = are_whole()
        stack.enter_context(handlers.block())
        if whole:
            stack.enter_context(WholePlates())
        yield


def are_whole() -> bool:
    """Whether a `WholePlates` is at work."""
    return any(isinstance(handler, WholePlates) for handler in _PYRO_STACK)


def structure(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's trace without values and distributions: kinds, shapes and plates of its sites.

    Nothing is computed, if the model can be traced.

    Of a plate `args` is kept: its size and that of a subsample. `is_path` marks the `StatePath` sites.
    """
    found = {}

    def run(key: Key) -> int:
        with apart():
            trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
        for name, site in trace.items():
            kept = {part: site.get(part) for part in ("type", "name", "is_observed", "cond_indep_stack")}
            if site["type"] == "plate":
                kept["args"] = site["args"]
            if site["type"] == "sample":
                kept["shape"], kept["event_dim"] = jnp.shape(site["value"]), site["fn"].event_dim
                kept["is_path"] = isinstance(unwrap(site["fn"])[0], StatePath)
            found[name] = kept
        return 0

    try:
        jax.eval_shape(run, jax.random.key(0))
    except jax.errors.JAXTypeError:  # the model needs values
        run(jax.random.key(0))
    return found


def plates_of(sites: dict[str, dict[str, Any]], names: list[str], given: Any = ()) -> dict[str, numpyro.plate]:
    """The plates that these sites of a `structure` stand in, new ones beside the `given`; to be entered by name."""
    given = [given] if isinstance(given, numpyro.plate) else given
    plates = {plate.name: plate for plate in given}
    frames = {frame.name: frame for name in names if name in sites for frame in sites[name]["cond_indep_stack"]}
    for name, frame in sorted(frames.items()):
        if name not in plates:
            plates[name] = numpyro.plate(name, sites[name]["args"][0], dim=frame.dim, subsample_size=frame.size)
    return plates


def subsampled(sites: dict[str, dict[str, Any]]) -> list[str]:
    """The plates of a `structure` that take a part of their data."""
    return [n for n, s in sites.items() if s["type"] == "plate" and s["args"][1] not in (None, s["args"][0])]


def runs_whole(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> str:
    """Why a model cannot run with its plates whole; empty where it can.

    It cannot where the arguments are a minibatch already, of the plate's subsample size.
    """
    try:
        sites = structure(Whole(model), args, kwargs)
    except (TypeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name, site in sites.items():
        for frame in site["cond_indep_stack"] if site["type"] == "sample" else ():
            rows = site["shape"][frame.dim - site["event_dim"] :][:1]
            if len(site["shape"]) >= site["event_dim"] - frame.dim and rows != (frame.size,):
                return f"`{name}` has {rows[0]} of the {frame.size} rows"
    return ""
