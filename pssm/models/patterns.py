"""Seasonal patterns: which waves, or which free effects, stand for the periods that a user names."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pssm._checks import check_count

FREE = 7  # steps: up to here a pattern is free by default
WAVES = 3  # by default, for longer periods


class Pattern(NamedTuple):
    """One seasonal pattern.

    Attributes:
        period: time steps in a season.
        waves: multiples of its frequency; None for free effects of each step.
        label: what its parameters and states are called after `seasonal`, where there are several patterns.
    """

    period: float
    waves: tuple[int, ...] | None
    label: str = ""


def patterns(
    seasonal: float | Sequence[float] | None, harmonics: int | Sequence[int | None] | None, *, uneven: bool
) -> list[Pattern]:
    """The patterns of a model, short periods first.

    A wave that a shorter period has too (the seventh of 168 is the first of 24) is that period's alone: the data cannot
    tell the two apart.

    Args:
        seasonal: a period, or several.
        harmonics: numbers of waves, for all or for each; None where the default is wanted.
        uneven: the observations have times.

    Raises:
        ValueError: a period or a number of waves is out of range, or there are not as many numbers as periods.
    """
    if seasonal is None:
        if harmonics is not None:
            raise ValueError("`harmonics` is given without `seasonal`, the number of time steps in a season.")
        return []
    several = np.ndim(seasonal) > 0
    periods = [float(p) for p in np.atleast_1d(np.asarray(seasonal, dtype=float))]
    counts = [harmonics] * len(periods) if harmonics is None or np.ndim(harmonics) == 0 else list(harmonics)  # pyright: ignore[reportArgumentType]
    if len(counts) != len(periods):
        raise ValueError(f"`harmonics` must have a number for each of {len(periods)} periods; got {len(counts)}.")
    if len(set(periods)) < len(periods):
        raise ValueError(f"`seasonal` must have different periods; got {seasonal}.")
    found: list[Pattern] = []
    taken: list[float] = []
    for period, count in sorted(zip(periods, counts, strict=True), key=lambda pair: pair[0]):
        waves = _waves(period, count, uneven=uneven)
        label = f"_{period:g}" if several and len(periods) > 1 else ""
        if waves is not None:
            waves = tuple(k for k in waves if not np.isclose(k / period, taken, rtol=1e-9, atol=0).any())
            if not waves:
                raise ValueError(
                    f"`harmonics` of the period {period:g}: its waves are all among those of shorter periods. Add more."
                )
        found.append(Pattern(period, waves, label))
        taken += [k / period for k in (waves or range(1, int(period) // 2 + 1))]
    return found


def _waves(period: float, harmonics: int | None, *, uneven: bool) -> tuple[int, ...] | None:
    """Multiples of the frequency, or None for a free pattern."""
    if not period >= 2:
        raise ValueError(f"`seasonal` must be a period of at least 2 time steps; got {period:g}.")
    if harmonics is None:
        if period.is_integer() and period <= FREE and not uneven:
            return None
        return tuple(range(1, max(1, min(WAVES, int((period - 1e-9) // 2))) + 1))
    check_count("harmonics", harmonics)
    if 2 * harmonics > period or (uneven and 2 * harmonics == period):
        most = "below" if uneven else "at most"
        raise ValueError(f"`harmonics` must be {most} half the period ({period / 2:g}); got {harmonics}.")
    return tuple(range(1, harmonics + 1))
