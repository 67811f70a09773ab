"""The series that ship with the package, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pssm._checks import check_choice
from pssm.datasets.read import read_table
from pssm.datasets.series import Series


@dataclass(frozen=True)
class _About:
    default: str
    units: dict[str, str]
    description: str
    period: float | None
    source: str


_DOLLARS = "billions of chained 2005 US dollars, seasonally adjusted annual rate"
_EMBEDDED = {
    "nile": _About(
        "volume", {"volume": "10^8 m^3"}, "yearly flow of the Nile at Aswan, 1871-1970", None,
        "G. W. Cobb (1978), The Problem of the Nile, Biometrika 65.2, 243-51",
    ),
    "sunspots": _About(
        "sunactivity", {"sunactivity": "sunspot number"}, "yearly sunspot number, 1700-2008", None,
        "US National Geophysical Data Center",
    ),
    "co2": _About(
        "co2", {"co2": "ppmv"}, "weekly CO2 in the air at Mauna Loa, 1958-2001, with gaps", 365.25 / 7,
        "C. D. Keeling and T. P. Whorf (2004), Carbon Dioxide Information Analysis Center, Oak Ridge",
    ),
    "elnino": _About(
        "temperature", {"temperature": "degrees Celsius"},
        "monthly sea surface temperature of the Pacific, Nino 1+2 region, 1950-2010", 12.0,
        "US National Weather Service, ERSST.V3B",
    ),
    "macrodata": _About(
        "infl",
        {
            **dict.fromkeys(("realgdp", "realcons", "realinv", "realgovt", "realdpi"), _DOLLARS),
            "cpi": "1982-84 = 100", "m1": "billions of US dollars", "tbilrate": "percent per year",
            "unemp": "percent", "pop": "millions", "infl": "percent per year", "realint": "percent per year",
        },
        "quarterly US macroeconomic series, 1959Q1-2009Q3; the first infl and realint are 0 by convention",
        4.0,
        "Federal Reserve Bank of St. Louis (FRED) and US Bureau of Labor Statistics, compiled by S. Seabold",
    ),
}  # fmt: skip


NAMES = tuple(_EMBEDDED)


def load(name: str, column: str | Sequence[str] | None = None) -> Series:
    """An embedded series by name; see `available` for the names and PROVENANCE.md beside the files for their origin.

    Args:
        name: `nile`, `sunspots`, `co2`, `elnino` or `macrodata`.
        column: one column or several. Default: `infl` for macrodata, the only column of the others.

    Returns:
        A `Series` with `y` of shape `(time, n_obs)`; NaN = missing.

    Raises:
        ValueError: unknown `name` or `column`; the message lists the known ones.

    Example:
        >>> nile = load("nile")
        >>> nile.y.shape, nile.units, int(nile.time[0])
        ((100, 1), '10^8 m^3', 1871)
        >>> load("macrodata", ["infl", "unemp"]).columns
        ('infl', 'unemp')
    """
    check_choice("name", name, list(_EMBEDDED))
    about = _EMBEDDED[name]
    series = read_table(Path(__file__).parent / f"{name}.csv", about.default if column is None else column, "time")
    units = "; ".join(dict.fromkeys(about.units[c] for c in series.columns))
    return replace(series, units=units, description=about.description, period=about.period, source=about.source)


def available() -> list[tuple[str, int, int, str]]:
    """The embedded series.

    Returns:
        One `(name, time steps, missing values, description)` per series; missing values of the default column.

    Example:
        >>> [row[:3] for row in available()][:3]
        [('nile', 100, 0), ('sunspots', 309, 0), ('co2', 2284, 59)]
    """
    every = [load(name) for name in _EMBEDDED]
    return [(s.name, len(s.y), int(np.isnan(s.y).sum()), s.description) for s in every]
