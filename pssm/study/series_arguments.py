"""The series of a command: what the command line says of a file and of its columns."""

import argparse
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pssm import datasets, models
from pssm.datasets.embedded import NAMES
from pssm.datasets.series import Series
from pssm.models.noise import NOISES
from pssm.models.patterns import FORMS

COMPONENTS = ("pattern", "moving", "noise", "intervention")  # of the structural model

# How a file is read, by the name of the argument of `read_table`.
_READING = ("time", "inputs", "missing", "decimal", "thousands", "dayfirst", "timezone", "sheet")


def add_series(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a series: a data set or a file, its columns, and how the file is read."""
    add = parser.add_argument
    add("data", help="an embedded data set (see `pssm datasets`) or a file: CSV and other text, Excel, Parquet")
    add(
        "--column",
        action="append",
        help="column of the series; needed where a file has several; may be repeated, for models of several series",
    )
    add(
        "--time",
        action="append",
        help="column of the time; repeated where several make it: --time date --time hour, --time year --time month",
    )
    add(
        "--inputs",
        action="append",
        help="columns of regressors, comma-separated; rows behind the last value of the series are the future",
    )
    add("--missing", action="append", help="a text or number that means a missing value, such as -999; may be repeated")
    add("--decimal", help='the decimal mark, "." or ","')
    add("--thousands", help='the mark between thousands, ",", "." or " "')
    add("--dayfirst", choices=("yes", "no"), help="whether 1/2/2001 is in February")
    add("--timezone", help="of times without an offset, such as Europe/Berlin; in UTC afterwards")
    add("--sheet", help="of an Excel file")


def add_seasons(parser: argparse.ArgumentParser) -> None:
    """The arguments that name seasonal patterns: one number, or several with commas between them."""
    parser.add_argument(
        "--period",
        type=numbers_of(float),
        help="time steps in a season, or several: 24,168; known for the embedded data",
    )
    parser.add_argument("--harmonics", type=numbers_of(int), help="sine waves of the seasonal pattern, or of each: 6,3")
    parser.add_argument(
        "--aggregate",
        action="append",
        help="columns that are figures of periods, with --every: gdp=sum,prices=mean,stock=last; other rows are empty",
    )
    parser.add_argument("--every", type=int, help="steps in a period of --aggregate: 3 for quarters of months")
    parser.add_argument("--start", type=int, help="place of the first row in its period, 0 (the default) for its first")


def add_components(parser: argparse.ArgumentParser) -> None:
    """The arguments for further components of the structural model."""
    add = parser.add_argument
    add("--pattern", choices=FORMS, help="structural: the form of seasonal patterns")
    add("--moving", help="structural: columns among the inputs whose coefficients move, comma-separated, or all")
    add("--noise", choices=NOISES, help="structural: noise of the observations; default normal")
    add(
        "--intervention",
        action="append",
        metavar="NAME=KIND,TIME",
        help="structural: law=step,1983-01-31; strike=pulse,FROM,TO; kink=slope,TIME; phase=ramp,FROM,TO; repeatable",
    )


def component_options(a: argparse.Namespace, series: Series) -> dict[str, Any]:
    """Options of the structural model for the components that the arguments name.

    Raises:
        ValueError: another model is meant, or a column or a time is not there.
    """
    given = {name: x for name in COMPONENTS if (x := getattr(a, name, None))}
    if given and a.model != "structural":
        raise ValueError(f"`--{next(iter(given))}` goes with `--model structural`; got {a.model!r}.")
    options = {name: given[name] for name in ("pattern", "noise") if name in given}
    inputs = names_in(getattr(a, "inputs", None))
    if a.model == "structural" and inputs:
        options["u_names"] = tuple(inputs)
    if "moving" in given:
        if not inputs:
            raise ValueError("`--moving` needs `--inputs`, the columns of the regressors.")
        options["moving"] = given["moving"] == "all" or tuple(names_in([given["moving"]]))
    if "intervention" in given:
        table: dict[str, Any] = {}
        for text in given["intervention"]:
            name, equals, spec = text.partition("=")
            if not (name and equals and "," in spec):
                raise ValueError(f"`--intervention` must be NAME=KIND,TIME such as law=step,1983-01-31; got {text!r}.")
            table[name.strip()] = tuple(part.strip() for part in spec.split(","))
        times = series.time if series.future_time is None else np.concatenate([series.time, series.future_time])
        options["interventions"] = datasets.interventions(times, table)
    return options


def numbers_of(kind: type) -> Callable[[str], Any]:
    """Reads one number, or a tuple of numbers with commas between them."""

    def read(text: str) -> Any:
        found = tuple(kind(part) for part in text.split(","))
        return found[0] if len(found) == 1 else found

    read.__name__ = f"number, or several with commas between them: {kind.__name__}"
    return read


def season_of(a: argparse.Namespace, series: Series) -> float | None:
    """The shortest season that the arguments name, or that is known of the series."""
    return series.period if a.period is None else float(np.min(a.period))


def read_series(a: argparse.Namespace) -> Series:
    """The series that the arguments name; what there is to say of its file goes to standard error.

    Raises:
        ValueError: there is no such data set and no such file, or the file cannot be read.
    """
    given = {name: getattr(a, name) for name in _READING if getattr(a, name) is not None}
    if a.data in NAMES:
        if given:
            raise ValueError(f"`--{next(iter(given))}` goes with a file; {a.data!r} is an embedded data set.")
        return datasets.load(a.data, a.column)
    if not (Path(a.data).suffix or Path(a.data).exists()):
        raise ValueError(f"`data` {a.data!r} is neither a data set ({', '.join(sorted(NAMES))}) nor a file.")
    if "inputs" in given:
        given["inputs"] = names_in(given["inputs"])
    if "dayfirst" in given:
        given["dayfirst"] = given["dayfirst"] == "yes"
    if "sheet" in given and given["sheet"].isdigit():
        given["sheet"] = int(given["sheet"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are among the notes
        series = datasets.read_table(a.data, a.column, **given)
    for note in series.notes:
        print(f"pssm: {note}", file=sys.stderr)
    return series


def series_options(a: argparse.Namespace, series: Series) -> dict[str, Any]:
    """Options of a model of several series: their names, and which are figures of periods.

    Raises:
        ValueError: the model knows no periods, or `--aggregate` cannot be read.
    """
    takes = inspect.signature(getattr(models, a.model)).parameters
    if "aggregate" not in takes:
        for flag in ("aggregate", "every", "start"):
            if getattr(a, flag) is not None:
                raise ValueError(f"`--{flag}` does not go with `--model {a.model}`.")
        return {"names": tuple(series.columns)} if a.model == "panel" else {}
    options: dict[str, Any] = {"names": tuple(series.columns)}
    if parts := names_in(a.aggregate):
        if not all(part.count("=") == 1 for part in parts):
            raise ValueError(f"`--aggregate` must be like gdp=sum,prices=mean; got {', '.join(parts)}.")
        options["aggregate"] = dict(part.split("=") for part in parts)
    return options | {n: getattr(a, n) for n in ("every", "start") if getattr(a, n) is not None}


def names_in(lists: list[str] | None) -> list[str]:
    """The names in comma-separated lists."""
    return [name.strip() for names in lists or [] for name in names.split(",") if name.strip()]


def input_options(series: Series, model: str, horizon: int | None) -> tuple[dict[str, Any], Any, int | None]:
    """Options of a model for the regressors of a series, those of its forecast, and the steps of that.

    Raises:
        ValueError: the model takes no regressors, or there are fewer rows of the future than steps.
    """
    if series.u is None:
        return {}, None, horizon
    takers = [name for name in models.NAMES if "u" in inspect.signature(getattr(models, name)).parameters]
    if model not in takers:
        raise ValueError(
            f"`--inputs` does not go with `--model {model}`; models that take inputs: {', '.join(takers)}."
        )
    ahead = 0 if series.u_future is None else len(series.u_future)
    if horizon is not None and horizon > ahead:
        raise ValueError(
            f"`--horizon` {horizon} needs {horizon} rows of inputs behind the last value of the series; there are "
            f"{ahead}. Append them, with an empty {series.columns[0]!r}."
        )
    if not ahead:
        print("pssm: there are no inputs behind the last value of the series, so no forecast", file=sys.stderr)
        return {"u": series.u}, None, 0
    steps = ahead if horizon is None else horizon
    return {"u": series.u}, np.asarray(series.u_future)[:steps], steps
