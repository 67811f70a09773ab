"""`EncodedGuide`: what guides whose paths a network makes from the data share: new trials, the network, its data."""

from collections.abc import Callable
from typing import Any

import jax
import numpyro
from numpyro import handlers

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.guides.model_run import ModelRun
from pssm.guides.paths import PathGuide
from pssm.register import register


class EncodedGuide(PathGuide):
    """A `PathGuide` for any number of trials, whose networks read the model's data.

    Attributes that a subclass sets: `data`, which sites are encoded, and `trainable`, what of a network is trained;
    both as in `AmortizedStateSpace`.
    """

    data: str | tuple[str, ...] | Callable[..., Array] | None
    trainable: Any

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The plates of the model for these arguments, whose sizes may be new."""
        key = numpyro.prng_key()
        with handlers.block():
            model = handlers.seed(self.model, jax.random.key(0) if key is None else key)
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        for name in self._latent:
            for frame in trace[name]["cond_indep_stack"] if name in trace else ():
                self._prototype_frames[frame.name] = frame
                self._prototype_frame_full_sizes[frame.name] = trace[frame.name]["args"][0]
        return super()._create_plates(*args, **kwargs)

    def _network(self, name: str, part: str, given: Any) -> Any:
        """A network of the path `name`, with its parameters; `given` may be a dict by path."""
        own = given[name] if isinstance(given, dict) else given
        return register(f"{name}_{self.prefix}_{part}", own, trainable=self.trainable)

    def _data(
        self, name: str, run: ModelRun, values: dict[str, Array], prior: StatePath
    ) -> tuple[dict[str, Any], dict[str, int], tuple[int, ...]]:
        """For `map_batch`: the data `y` and, where there are some, the inputs `u`; their core axes; the batch shape."""
        y, batch = run.data(name, values, self.data)
        if prior.u is None:
            return {"y": y}, {"y": y.ndim - len(batch)}, batch
        return {"y": y, "u": prior.u}, {"y": y.ndim - len(batch), "u": 2}, batch
