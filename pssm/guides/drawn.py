"""`DrawnGuide`: what guides whose posterior is known by draws share; nothing of the data is kept."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide

from pssm._checks import as_float
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.guides.others import OtherSites
from pssm.guides.plates import Whole, runs_whole, structure
from pssm.storage.pickling import Copied, reduced

CHUNK = 500  # draws at once


class DrawnGuide(Copied, AutoGuide):
    """An AutoGuide that answers by draws, for any arguments of the model.

    Of its first call it keeps the model's structure, in `prototype_trace`: names, shapes and plates.
    """

    _series: str = ""  # name of a site with the axes (..., time, state)
    _bare = False  # whether the first call had no arguments
    _others: OtherSites | None = None  # what has a guide of its own

    def __reduce__(self) -> Any:
        return reduced(self, {n: x for n, x in vars(self).items() if n != "plates"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.prototype_trace = structure(self.model, args, kwargs)
        self._bare = not args and not kwargs

    def prepare(self, key: KeyLike, *args: Any, **kwargs: Any) -> bool:
        """Makes what the guide keeps of its first call, outside of a compilation, so that the start can be compiled.

        Returns:
            Whether all of it could be made; False where a guide of other sites is of a kind that is not known.
        """
        key = as_key(key)
        with handlers.block(), handlers.seed(rng_seed=key):
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            return self._others is None or self._others.prepare(args, kwargs)

    def _check_data(self, sites: dict[str, dict[str, Any]], reads: bool = True) -> None:
        """Refuses a call without the data that the posterior is made from.

        The model would make up data of its own, and the posterior would be that of these.

        Args:
            sites: the model's `structure` for the call.
            reads: whether the posterior is made from the observed sites, at each call again.
        """
        seen, known = (
            {n for n, s in x.items() if s.get("is_observed")} for x in (sites, self.prototype_trace or sites)
        )
        if not reads and known:
            return
        missing = sorted(known - seen)
        if missing or not seen:
            what = f"does not observe `{missing[0]}`, as it did in the fit" if missing else "observes nothing"
            raise ValueError(
                f"`args`: with them the model {what}, and a guide keeps no data. Give the data of the fit, or others "
                "with NaN where missing. For predictions, first draw given the data: `Predictive(model, "
                "guide.sample_posterior(key, params, *args, sample_shape=(100,)))(key)`."
            )

    def evaluated(self) -> "DrawnGuide":
        """The guide outside of training."""
        return self

    def of_the_past(self) -> "DrawnGuide":
        """The guide for data whose end is missing; nothing in it comes from the whole series of the fit."""
        return self.evaluated()

    def sample_posterior(
        self,
        rng_key: KeyLike,
        params: dict[str, Array],
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws of every latent site; paths are whole trajectories.

        Of a plate that takes a part of its data (`subsample_size`) all series are drawn, in order, where the arguments
        have the data of all.

        Args:
            rng_key: random key.
            params: from `SVI.get_params`.
            args: the model's arguments, those of the fit or new ones: trials that were not trained on, where the guide
                has no parameters for each trial.
            sample_shape: leading shape of the draws.
            kwargs: the model's keyword arguments.
        """
        rng_key = as_key(rng_key, "rng_key")
        if self.prototype_trace is not None and not (self._bare or args or kwargs):
            raise ValueError("`args`: a guide keeps no data; give the model's arguments, those of the fit or new ones.")
        guide: Any = self.evaluated()
        if not runs_whole(self.model, args, kwargs):
            guide = Whole(guide)

        def one(key: Key) -> dict[str, Array]:
            with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
                return guide(*args, **kwargs)

        count = math.prod(sample_shape)
        every = jax.vmap(one) if count <= CHUNK else lambda keys: jax.lax.map(one, keys, batch_size=CHUNK)
        draws = jax.jit(every)(jax.random.split(rng_key, count))
        return {name: x.reshape(*sample_shape, *x.shape[1:]) for name, x in draws.items()}

    def given_past(
        self,
        rng_key: KeyLike,
        params: dict[str, Array],
        origin: ArrayLike,
        *args: Any,
        sample_shape: tuple[int, ...] = (),
        **kwargs: Any,
    ) -> dict[str, Array]:
        """Draws of every latent site, the paths given the observations before step `origin` alone.

        The model's first argument must be the data, and all of them, `(*batch, time, ...)` with the batch axes of the
        path in front; what they hold from step `origin` on counts as missing. For other arguments there is
        `pssm.infer.causal_draws`. Arguments as in `sample_posterior`.

        Raises:
            ValueError: the first argument has other axes.
        """
        self.prepare(jax.random.key(0), *args, **kwargs)
        axis = self.time_axis
        lead = tuple(structure(self.model, args, kwargs)[self._series]["shape"][: axis + 1])
        if not args or jnp.shape(args[0])[: axis + 1] != lead:
            got = jnp.shape(args[0]) if args else "no argument"
            raise ValueError(
                f"`args`: the model's first argument must be the data, of shape {lead} (batch, time) in front; got "
                f"{got}. `causal_draws` finds out which arguments are the data, and which of their axes is time."
            )
        y = as_float("args[0]", args[0])
        seen = (jnp.arange(y.shape[axis]) < origin).reshape(-1, *(1,) * (y.ndim - axis - 1))
        past = jnp.where(seen, y, jnp.nan)
        return self.of_the_past().sample_posterior(
            rng_key, params, past, *args[1:], sample_shape=sample_shape, **kwargs
        )

    @property
    def time_axis(self) -> int:
        """The axis of time in the data: as many as the path has batch axes. Known after the first call."""
        return len(self.prototype_trace[self._series]["shape"]) - 2

    def median(self, params: dict[str, Array], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Posterior medians; see `quantiles`."""
        return {name: x[0] for name, x in self.quantiles(params, [0.5], *args, **kwargs).items()}

    def quantiles(
        self, params: dict[str, Array], quantiles: list[float], *args: Any, num_samples: int = 4000, **kwargs: Any
    ) -> dict[str, Array]:
        """Quantiles of every latent site, from `num_samples` draws: marginals of a path have no closed form.

        Arrays have shape `(len(quantiles), ...)`. Arguments as in `sample_posterior`.
        """
        draws = self.sample_posterior(jax.random.key(0), params, *args, sample_shape=(num_samples,), **kwargs)
        return {name: jnp.quantile(x, jnp.asarray(quantiles), axis=0) for name, x in draws.items()}
