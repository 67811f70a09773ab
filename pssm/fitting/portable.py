"""Fits by SVI in another process: their state without what no pickle can hold, and how it is made again."""

import copy
import dataclasses
from typing import Any

import jax
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide

from pssm.fitting.start import optimizer_of
from pssm.storage.pickling import NotKept, can_pickle


def kept(fit: Any) -> dict[str, Any]:
    """The attributes of an `SVIFit` that a pickle can hold."""
    state = dict(vars(fit))
    svi = copy.copy(fit.svi)
    if not can_pickle(svi.optim):
        svi.optim = NotKept("optimizer", svi.optim.get_params(fit.state.optim_state))
    if not can_pickle(svi.guide) and isinstance(svi.guide, AutoGuide):
        svi.guide = _Prototype(svi.guide)
    state["svi"] = svi
    if fit.settings is not None:
        values = {f.name: getattr(fit.settings, f.name) for f in dataclasses.fields(fit.settings)}
        values["guide"] = svi.guide if values["guide"] is fit.svi.guide else values["guide"]
        lost = {n: NotKept(n) for n, x in values.items() if n != "guide" and not can_pickle(x)}
        state["settings"] = dataclasses.replace(fit.settings, guide=values["guide"], **lost)
    return state


def restore(fit: Any, state: dict[str, Any]) -> None:
    """Sets the attributes again."""
    vars(fit).update(state)
    svi, settings = fit.svi, fit.settings
    if isinstance(svi.guide, _Prototype):
        made = svi.guide
        svi.guide = made.guide(svi.model, fit.args, fit.kwargs)
        if settings is not None and settings.guide is made:
            fit.settings = settings = dataclasses.replace(settings, guide=svi.guide)
    if isinstance(svi.optim, NotKept) and settings is not None and settings.optimizer is None:
        svi.optim = SVI(svi.model, svi.guide, optimizer_of(settings), svi.loss).optim


class _Prototype:
    """One of NumPyro's automatic guides without its prototype, whose functions no pickle can hold."""

    def __init__(self, guide: AutoGuide):
        self.kind, self.prefix = type(guide), guide.prefix
        self.rest = {n: x for n, x in vars(guide).items() if n != "model" and can_pickle(x)}

    def guide(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AutoGuide:
        """The guide, with the prototype of a run at these arguments: its parameters are those of the fit."""
        guide = self.kind(model, prefix=self.prefix)
        vars(guide).update(self.rest)
        with handlers.block(), handlers.seed(rng_seed=jax.random.key(0)):
            guide._setup_prototype(*args, **kwargs)
        return guide
