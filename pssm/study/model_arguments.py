"""The options of a model on the command line: which model takes which, and what each is called there."""

import argparse
from typing import Any

from pssm.study.series_arguments import add_components, add_seasons, component_options, numbers_of, series_options

# What the options of the command line are called by the models that take them.
TAKES = {
    "seasonal": {"period": "period", "harmonics": "harmonics"},
    "structural": {"period": "seasonal", "harmonics": "harmonics", "order": "ar", "damped": "damped"},
    "autoregression": {"order": "order"},
    "sarimax": {"order": "order", "seasonal_order": "seasonal_order", "period": "period", "trend": "trend"},
    "ets": {"period": "period", "trend": "trend", "damped": "damped"},
    "var": {"order": "order", "ma_order": "ma_order", "trend": "trend"},
    "dynamic_factor": {"states": "num_factors"},
    "multivariate_structural": {"period": "seasonal", "harmonics": "harmonics", "states": "rank"},
    "panel": {"period": "seasonal", "harmonics": "harmonics", "order": "ar"},
    **dict.fromkeys(
        ("lds", "poisson_lds", "neural_ssm", "deep_markov", "kalman_vae", "extended_kalman_vae"),
        {"states": "num_states"},
    ),
}
FLAGS = ("period", "harmonics", "order", "seasonal_order", "ma_order", "trend", "damped", "states")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and its options."""
    add = parser.add_argument
    add("--model", default="local_level", help="a model (see `pssm models`); default local_level")
    add_seasons(parser)
    add_components(parser)
    add("--order", type=numbers_of(int), help="lags of an autoregression; of sarimax p,d,q")
    add("--seasonal-order", type=numbers_of(int), help="of sarimax: P,D,Q,s, or P,D,Q with --period")
    add("--ma-order", type=int, help="of var: lags of the moving average")
    add("--trend", help="of sarimax and var n, c or ct; of ets add (the default) or none")
    add("--damped", action="store_true", help="of ets and structural: the slope of the trend dies out")
    add("--states", type=int, help="size of the state, factors of dynamic_factor, rank of trends; default the model's")


def model_options(a: argparse.Namespace, series: Any) -> dict[str, Any]:
    """The options a model takes, from the command line and from what is known of the series.

    Raises:
        ValueError: an option does not go with the model, or one that it needs is not there.
    """
    takes = TAKES.get(a.model, {})
    options: dict[str, Any] = {}
    for flag in FLAGS:
        value = getattr(a, flag)
        if value and flag not in takes:
            raise ValueError(f"`--{flag.replace('_', '-')}` does not go with `--model {a.model}`.")
        if value:
            options[takes[flag]] = value
    if series.period and "period" in takes:
        options.setdefault(takes["period"], series.period)
    if a.model == "seasonal" and "period" not in options:
        raise ValueError("`--period` is required: the number of time steps in a season is not known.")
    options |= series_options(a, series)
    if a.model in ("structural", "multivariate_structural", "panel"):
        options["trend"] = a.model != "panel"
        if "seasonal" not in options and "harmonics" in options:
            raise ValueError("`--harmonics` needs `--period`: the number of time steps in a season is not known.")
    if a.model == "sarimax":
        _seasonal_order(a, options)
    if a.model == "ets":
        _smoothing(a, options)
    return {**options, **component_options(a, series)}


def _seasonal_order(a: argparse.Namespace, options: dict[str, Any]) -> None:
    """The season of `sarimax` goes with its seasonal order."""
    period = options.pop("period", None)
    found = options.get("seasonal_order")
    if found is None:
        if a.period is not None:
            raise ValueError("`--period` of `--model sarimax` needs `--seasonal-order P,D,Q`.")
    elif isinstance(found, tuple) and len(found) == 3:
        if period is None:
            raise ValueError("`--seasonal-order P,D,Q` needs `--period`, or the season as a fourth number.")
        options["seasonal_order"] = (*found, _whole(period))


def _smoothing(a: argparse.Namespace, options: dict[str, Any]) -> None:
    """`ets` has a trend unless told otherwise, and a season where a whole number of steps is known."""
    trend = options.pop("trend", "add")
    if trend != "none":
        options["trend"] = trend
    if "period" not in options:
        return
    if a.period is None and options["period"] != int(options["period"]):
        del options["period"]
        return
    options |= {"seasonal": "add", "period": _whole(options["period"])}


def _whole(period: Any) -> int:
    if isinstance(period, tuple) or period != int(period):
        raise ValueError(f"`--period` must be a whole number of time steps for this model; got {period}.")
    return int(period)
