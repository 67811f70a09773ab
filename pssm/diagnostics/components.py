"""Which states of a model make which component of its series."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pssm._checks import check_choice

# What stands behind the name of a component in those of its further states: `ar_lag1`, `cycle_phase`, `matern_slope`.
_FURTHER = re.compile(r"(_lag\d+|_carry\d+|_phase(_\d+)?|_slope|_curvature)$")
_LABELLED = re.compile(r"^seasonal_([^_]+)_(?:lag|phase_)?\d+$")  # one of several patterns: `seasonal_24_1`
_SERIES = re.compile(r"\[[^\]]*\]$")  # of which series a state is
REST = "other"


def by_name(names: Sequence[str]) -> dict[str, list[int]]:
    """The states of each component, by their names, in the order of the states.

    A slope belongs to its level, a lag or a phase to what it is a lag or a phase of, and all waves of a seasonal
    pattern are one component; of several patterns (`seasonal_24_1`) each is one. The states of several series
    (`level[gdp]`, `level[prices]`) are one component, which contributes to each.

    Example:
        >>> by_name(("level", "slope", "seasonal_1", "seasonal_phase_1", "seasonal_2", "ar", "ar_lag1"))
        {'level': [0, 1], 'seasonal': [2, 3, 4], 'ar': [5, 6]}
    """
    plain = [_SERIES.sub("", name) for name in names]
    labels = {found[1] for name in plain if (found := _LABELLED.match(name)) and found[1] != "phase"}
    result: dict[str, list[int]] = {}
    for i, name in enumerate(plain):
        result.setdefault(_component(name, plain, labels), []).append(i)
    return result


def _component(name: str, names: Sequence[str], labels: set[str]) -> str:
    if name == "slope" and "level" in names:
        return "level"
    parts = name.split("_")
    if parts[0] == "seasonal" and len(parts) > 1:
        if parts[1] in labels:
            return f"seasonal_{parts[1]}"
        return name if labels else "seasonal"
    base = _FURTHER.sub("", name)
    return base if base in names else name


def as_asked(components: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[int]]:
    """The states of each component that a user names, by their names or numbers; the others are `other`.

    Raises:
        ValueError: there is no such state, or it stands in two components.
    """
    result: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for component, states in components.items():
        several = [states] if isinstance(states, str | int | np.integer) else list(states)
        result[str(component)] = []
        for state in several:
            if isinstance(state, str):
                check_choice("components", state, list(names))
                place = list(names).index(state)
            elif not 0 <= state < len(names):
                raise ValueError(f"`components` must have numbers of states from 0 to {len(names) - 1}; got {state}.")
            else:
                place = int(state)
            if place in taken:
                raise ValueError(
                    f"`components` has the state {names[place]!r} in {taken[place]!r} and in {component!r}; give each "
                    "state to one component."
                )
            taken[place] = str(component)
            result[str(component)].append(place)
    rest = [i for i in range(len(names)) if i not in taken]
    return result if not rest else {**result, free_name(REST, result): rest}


def free_name(name: str, taken: Any) -> str:
    """The name, with "_" behind it while it is taken."""
    while name in taken:
        name += "_"
    return name
