"""Posteriors that networks make from the data, for any number of trials: potentials of an encoder, and conditionals."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from pssm._checks import as_float
from pssm._types import Array, ArrayLike, Key
from pssm.batch import map_batch
from pssm.distributions import ConditionedPath, LowRankChain, LowRankMomentMatched, StatePath
from pssm.guides.model_run import PathSite
from pssm.guides.online import Clipped
from pssm.guides.posteriors import FromPotentials, Posterior
from pssm.linalg.potential import Potential
from pssm.modes.mode import noise_scale
from pssm.nets.encoders import SmoothingEncoder
from pssm.nets.potentials import as_pseudo_observation

Data = str | tuple[str, ...] | Callable[..., Array] | None


@dataclass(frozen=True, eq=False)
class Encoded(FromPotentials):
    """Potentials that an encoder makes from a path's data. Attributes are as in `AmortizedStateSpace`."""

    encoder: Any
    causal: bool
    refine: int
    refine_rank: int | None
    limit: ArrayLike | None
    data: Data
    masking: Callable[[Key, Array], Array] | None
    trainable: Any

    def distribution(self, site: PathSite) -> LowRankChain | LowRankMomentMatched:  # noqa: D102
        encode = site.network("encoder", self.encoder, self.trainable)
        arrays, cores, batch = site.data(self.data)
        arrays["sd"], cores["sd"] = noise_units(site.prior), 2
        key = numpyro.prng_key() if self.masking is not None else None
        if key is not None:
            arrays["key"], cores["key"] = jax.random.split(key, batch) if batch else key, jnp.ndim(key)

        def one(a: dict[str, Any]) -> tuple[Potential, Potential | None]:
            seen = self.masking(a["key"], a["y"]) if "key" in a and self.masking is not None else a["y"]
            found = encode(seen, a.get("u"))
            if self.is_published_causal(encode):
                alpha, beta = (as_pseudo_observation(p, a["sd"], p.rank, False).psi() for p in found)
                return alpha, beta
            return as_pseudo_observation(found, a["sd"], self.form.rank, self.form.diagonal).psi(), None

        potential, backward = map_batch(one, batch, arrays, cores)
        prior = self.limited(site.prior)
        if self.refine:
            start = jax.lax.stop_gradient(LowRankChain.from_potential(prior, potential).central_path())
            rank = self.form.rank if self.refine_rank is None else self.refine_rank
            potential = site.at_mode(rank, self.form.diagonal, start=start, num_iters=self.refine - 1)
        return self.form.distribution(prior, potential, backward)

    @property
    def reads_data(self) -> bool:  # noqa: D102
        return self.refine > 0 or not callable(self.data)

    def evaluated(self) -> "Encoded":  # noqa: D102
        return replace(self, masking=None)

    def given_past(self) -> "Encoded":  # noqa: D102
        check_past(self.data)
        return self.evaluated()

    def is_published_causal(self, encode: Any) -> bool:
        """Whether the local part filters and the backward part smooths."""
        return self.causal and self.family == "moment_matched" and isinstance(encode, SmoothingEncoder)

    def limited(self, prior: StatePath) -> StatePath:
        """The prior with the transition's image inside of the `limit`."""
        if self.limit is None or prior.is_linear:
            return prior
        p = prior
        transition = Clipped(p.transition, as_float("limit", self.limit).astype(p.m0.dtype))
        return StatePath(p.m0, p.chol_P0, transition, p.chol_Q, p.num_steps, p.u, time_varying=p.time_varying)


@dataclass(frozen=True, eq=False)
class Conditionals(Posterior):
    """Conditionals that a network makes from the state before and features of the data; as in `DeepKalmanGuide`."""

    encoder: Any
    combiner: Any
    data: Data
    trainable: Any
    lengths: Callable[..., Any] | None = None

    @property
    def family(self) -> str:  # noqa: D102
        return "chain"

    @property
    def reads_data(self) -> bool:  # noqa: D102
        return not callable(self.data)

    def distribution(self, site: PathSite) -> ConditionedPath:  # noqa: D102
        encode = site.network("encoder", self.encoder, self.trainable)
        combine = site.network("combiner", self.combiner, self.trainable)
        prior = site.prior

        def one(a: dict[str, Any]) -> Array:
            h = encode(a["y"], a.get("u"))
            if jnp.ndim(h) != 2 or len(h) != prior.num_steps:
                raise ValueError(f"`encoder` must give features of shape ({prior.num_steps}, size); got {h.shape}.")
            return h

        arrays, cores, batch = site.data(self.data)
        y = arrays["y"]
        if self.lengths is None:  # up to the last step with data; after it the prior is exact
            some = ~jnp.isnan(y).all(tuple(range(len(batch) + 1, y.ndim)))
            seen = jnp.flip(jnp.cumsum(jnp.flip(some, -1), -1), -1) > 0
        else:
            seen = jnp.arange(prior.num_steps) < site.lengths(self.lengths)[..., None]
            arrays["y"] = jnp.where(seen.reshape(*seen.shape, *(1,) * (y.ndim - seen.ndim)), y, jnp.nan)
        h = map_batch(one, batch, arrays, cores)
        start = getattr(combine, "start", jnp.zeros(prior.n_state, prior.m0.dtype))
        return ConditionedPath(combine, h, start, prior=prior, seen=seen)

    def given_past(self) -> "Conditionals":  # noqa: D102
        check_past(self.data)
        return self


def check_past(data: Data) -> None:
    """Refuses data of which it is not known where the future is."""
    if callable(data):
        raise ValueError(
            "`data` is a function of the model's arguments, so it is not known which of them hold the future: draws "
            "given the past need `data` to be None or the name of an observed site."
        )


def noise_units(prior: StatePath) -> Array:
    """Units of relative potentials `(..., time, state)`: the transition noise's scale, at the first step the second's.

    An encoder need not know which step is the first.
    """
    sd = jax.lax.stop_gradient(noise_scale(prior))
    return sd if prior.num_steps == 1 else jnp.concatenate([sd[..., 1:2, :], sd[..., 1:, :]], axis=-2)
