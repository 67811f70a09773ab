"""The guide of the latent sites beside the paths: any NumPyro guide, run in the plates and with the data of ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from numpyro import handlers
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuide, AutoMultivariateNormal, AutoNormal

from pssm._types import Array
from pssm.guides.plates import WholePlates, are_whole

PREPARED = (AutoNormal, AutoMultivariateNormal, AutoDiagonalNormal, AutoDelta)  # keep nothing but their prototype


class OtherSites:
    """The latent sites of a model beside its paths, and their guide.

    NumPyro's automatic guides keep the arguments of their first call. They are called without any: the model gets those
    of the call that is going on.
    """

    def __init__(
        self, model: Callable[..., Any], paths: list[str], make: Callable[..., Any], prefix: str, init_loc_fn: Any
    ):
        self.model = model
        self._call: tuple[tuple, dict[str, Any]] = ((), {})
        self._made_by = model, paths, make, prefix, init_loc_fn
        self._used_before = False  # in another process

        def hide(site: dict[str, Any]) -> bool:
            is_other = site["type"] == "sample" and (site["name"] in paths or site.get("is_observed", False))
            return is_other or site["type"] == "deterministic"

        rest = handlers.block(handlers.seed(self._model, jax.random.key(0)), hide_fn=hide)
        self.guide = make(rest, prefix=prefix, init_loc_fn=init_loc_fn)

    def __getstate__(self) -> tuple[Any, ...]:
        """What makes it again: the guide's own prototype has functions that no pickle can hold."""
        return self._made_by

    def __setstate__(self, made_by: tuple[Any, ...]) -> None:
        self.__init__(*made_by)
        self._used_before = True

    def _model(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = (args, kwargs) if args or kwargs else self._call
        return self.model(*args, **kwargs)

    @contextmanager
    def at(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """The model's arguments, for as long as a call lasts."""
        before, self._call = self._call, (args, kwargs)
        try:
            yield
        finally:
            self._call = before

    def __call__(self, args: tuple, kwargs: dict[str, Any], indices: dict[str, Array]) -> dict[str, Array]:
        """Runs the guide; `indices` are those of the plates that are there already."""
        self._set_up_again(args, kwargs)
        plates = {name: {"type": "plate", "value": x} for name, x in indices.items()}
        whole = WholePlates() if are_whole() else nullcontext()  # what is hidden does not hear one outside
        with self.at(args, kwargs), handlers.block(hide=list(plates)), handlers.replay(trace=plates), whole:
            return self.guide() if isinstance(self.guide, AutoGuide) else self.guide(*args, **kwargs)

    def prepare(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Makes the guide's prototype; False for guides that may keep more than that."""
        if type(self.guide) not in PREPARED:
            return False
        if self.guide.prototype_trace is None:
            with self.at(args, kwargs):
                self.guide._setup_prototype()
        return True

    def median(self, params: dict[str, Array], args: tuple, kwargs: dict[str, Any]) -> dict[str, Array]:
        """The guide's medians."""
        self._set_up_again(args, kwargs)
        with self.at(args, kwargs):
            return dict(self.guide.median(params))

    def _set_up_again(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """The prototype of a guide that was pickled; apart, so that it takes no random key of the draws."""
        if self._used_before and getattr(self.guide, "prototype_trace", ()) is None:
            with self.at(args, kwargs), handlers.block(), handlers.seed(rng_seed=jax.random.key(0)):
                self.guide._setup_prototype()
