"""Seasonal patterns: which waves, or which free effects, stand for the periods that a user names."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pssm._checks import check_choice, check_count

FREE = 7  # steps: up to here a pattern is free by default
FORMS = ("dummy", "trigonometric")
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
    seasonal: float | Sequence[float] | None,
    harmonics: int | Sequence[int | None] | None,
    form: str | Sequence[str | None] | None = None,
    *,
    uneven: bool,
) -> list[Pattern]:
    """The patterns of a model, short periods first.

    A wave that a shorter period has too (the seventh of 168 is the first of 24) is that period's alone: the data cannot
    tell the two apart.

    Args:
        seasonal: a period, or several.
        harmonics: numbers of waves, for all or for each; None where the default is wanted.
        form: "dummy" for free effects of each step or "trigonometric" for waves, all of them where `harmonics` does not
            say how many; for all or for each; None where the default is wanted.
        uneven: the observations have times.

    Raises:
        ValueError: a period or a number of waves is out of range, or there are not as many numbers as periods.
    """
    if seasonal is None:
        for name, given in (("harmonics", harmonics), ("pattern", form)):
            if given is not None:
                raise ValueError(f"`{name}` is given without `seasonal`, the number of time steps in a season.")
        return []
    several = np.ndim(seasonal) > 0
    periods = [float(p) for p in np.atleast_1d(np.asarray(seasonal, dtype=float))]
    counts, forms = _for_each("harmonics", harmonics, len(periods)), _for_each("pattern", form, len(periods))
    if len(set(periods)) < len(periods):
        raise ValueError(f"`seasonal` must have different periods; got {seasonal}.")
    found: list[Pattern] = []
    taken: list[float] = []
    for period, count, kind in sorted(zip(periods, counts, forms, strict=True), key=lambda each: each[0]):
        waves = _waves(period, count, kind, uneven=uneven)
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


def _for_each(name: str, given: Any, count: int) -> list[Any]:
    """One value for each period."""
    values = [given] * count if given is None or np.ndim(given) == 0 else list(given)
    if len(values) != count:
        raise ValueError(f"`{name}` must have a value for each of {count} periods; got {len(values)}.")
    return values


def _waves(period: float, harmonics: int | None, form: str | None, *, uneven: bool) -> tuple[int, ...] | None:
    """Multiples of the frequency, or None for a free pattern."""
    if not period >= 2:
        raise ValueError(f"`seasonal` must be a period of at least 2 time steps; got {period:g}.")
    if form is not None:
        check_choice("pattern", form, FORMS)
    whole = period.is_integer() and not uneven
    if form == "dummy":
        if not whole or harmonics is not None:
            why = (
                "`harmonics` are of waves"
                if whole
                else f"it has an effect for each step of a whole period, not {period:g}"
            )
            why = "it counts steps, and does not go with `t`" if uneven else why
            raise ValueError(f'`pattern` "dummy": {why}. Take "trigonometric".')
        return None
    if harmonics is None:
        if whole and form is None and period <= FREE:
            return None
        most = period // 2 if form and whole else min(WAVES, (period - 1e-9) // 2)
        return tuple(range(1, max(1, int(most)) + 1))
    check_count("harmonics", harmonics)
    if 2 * harmonics > period or (uneven and 2 * harmonics == period):
        most = "below" if uneven else "at most"
        raise ValueError(f"`harmonics` must be {most} half the period ({period / 2:g}); got {harmonics}.")
    return tuple(range(1, harmonics + 1))
