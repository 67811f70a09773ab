"""Series of sums and means over periods in the models of several series: quarterly figures beside monthly ones."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pssm._checks import is_pandas
from pssm._types import ArrayLike
from pssm.aggregation import aggregate, kinds_of, places_in_periods, places_of
from pssm.models.several import About
from pssm.ssm import LinearGaussianSSM


class Periods(NamedTuple):
    """What the columns are over which periods.

    Attributes:
        kinds: "sum", "mean", "last" or None, one for each column.
        every, start: as in `pssm.aggregate`, by the number of the column where columns differ.
        steps: steps in a period of each sum, the median of them, 1 for other columns, `(obs,)`.
        counts: steps of the period so far of each sum, 1 for other columns, `(time, obs)`.
    """

    kinds: list[str | None]
    every: Any
    start: Any
    steps: np.ndarray
    counts: np.ndarray

    def per_step(self, about: About) -> About:
        """Location and scale of the steps: the sum of a period is that many times larger."""
        return about._replace(location=about.location / self.steps, scale=about.scale / self.steps)

    def of(self, ssm: LinearGaussianSSM, about: About) -> LinearGaussianSSM:
        """The model of the figures, from that of the steps.

        Where data count from an origin, the steps of a sum count from its share of it: figures of longer or shorter
        periods, and within a period, are apart by what the steps leave.
        """
        inputs = None if ssm.D is None or about.inputs is None else about.inputs.differences
        found = aggregate(ssm, about.num_steps, self.kinds, self.every, start=self.start, u=inputs)
        apart = self.counts / self.steps - 1.0
        if about.origin is None or not apart.any():
            return found
        shift = jnp.asarray(about.origin * apart, ssm.dtype)
        d = shift if found.d is None else found.with_time_axis("d") + shift
        return found.replace(d=d, time_varying=(*found.time_varying, "d"))

    def names(self, states: Sequence[str], series: Sequence[str]) -> tuple[str, ...]:
        """Names of the states of `of`."""
        sums = (f"before[{name}]" for name, kind in zip(series, self.kinds, strict=True) if kind in ("sum", "mean"))
        return (*states, *sums)


def series_names(names: Sequence[str] | None, y: ArrayLike | None, num_obs: int) -> tuple[str, ...]:
    """Names of the series: those given, those of the columns of a frame, or their numbers."""
    if names is None and y is not None and is_pandas(y) and hasattr(y, "columns"):
        names = [str(name) for name in y.columns]  # pyright: ignore[reportAttributeAccessIssue]
    found = tuple(str(i) for i in range(num_obs)) if names is None else tuple(names)
    if len(found) != num_obs or len(set(found)) != num_obs:
        raise ValueError(f"`names` must have a different name for each of {num_obs} series; got {found}.")
    return found


def labels_of(states: tuple[str, ...], names: Sequence[str] | None) -> dict[str, Any]:
    """What a site says of its axes: names of states, and of series where a user gives them (frames have their own)."""
    return {"state_names": states} | ({} if names is None else {"coords": {"series": tuple(names)}})


def periods_of(how: Any, every: Any, start: Any, names: tuple[str, ...], num_steps: int) -> Periods | None:
    """The periods that a user asks for, by names or numbers of columns; None for series of every step.

    Raises:
        ValueError: a column is unknown, or `every` is absent.
    """
    if how is None:
        if every is not None:
            raise ValueError("`every` is given without `aggregate`, the columns that are sums or means over periods.")
        return None
    kinds = kinds_of(_numbered("aggregate", how, names), len(names))
    summed = [i for i, kind in enumerate(kinds) if kind in ("sum", "mean")]
    if not summed:
        return None
    if every is None:
        raise ValueError("`every` is required with `aggregate`: the number of steps in a period.")
    every, start = _numbered("every", every, names), _numbered("start", start, names)
    steps, counts = np.ones(len(names)), np.ones((num_steps, len(names)))
    for i, places in zip(summed, places_of(every, start, summed, num_steps).T, strict=True):
        if kinds[i] == "sum":
            given = every[i] if isinstance(every, Mapping) else every
            steps[i] = given if np.ndim(given) == 0 else _typical(given)
            counts[:, i] = places + 1
    return Periods(kinds, every, start, steps, counts)


def _typical(labels: ArrayLike) -> float:
    """Steps in a period: the median of those that are over, of all labels, whatever part of them has data."""
    places = places_in_periods(labels, len(np.asarray(labels)))
    ends = places[:-1][places[1:] == 0]
    return float(np.median(ends if len(ends) else places[-1:])) + 1


def _numbered(argument: str, x: Any, names: tuple[str, ...]) -> Any:
    """A dict by names as one by the numbers of the columns; anything else as it is."""
    if not isinstance(x, Mapping):
        return x
    unknown = [key for key in x if key not in names and key not in range(len(names))]
    if unknown:
        raise ValueError(f"`{argument}` must name series among {', '.join(names)}; got {unknown[0]!r}.")
    return {names.index(key) if key in names else int(key): value for key, value in x.items()}
