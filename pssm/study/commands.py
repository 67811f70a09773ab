"""The commands `pssm fit`, `pssm backtest` and `pssm impact`: their options, and what they write.

Nothing heavy is imported before a command runs.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class Tools(NamedTuple):
    """The command line's own ways, which these commands share: options of a model, and the check of `--out`."""

    model_options: Callable[[argparse.Namespace, Any], dict[str, Any]]
    check_out: Callable[[Path, bool], None]


def add_commands(commands: Any, tools: Tools) -> None:
    """Adds the commands to the parser's."""
    fit = _command(
        commands, "fit", "maximum likelihood of one model, with residuals, forecast and a report", _fit, tools
    )
    _model_flags(fit)
    fit.add_argument("--method", choices=("ml", "map"), default="ml", help="likelihood, or posterior mode; default ml")
    fit.add_argument("--starts", type=int, default=8, help="climbs from different starts; default 8")
    fit.add_argument("--horizon", type=int, help="forecast steps; default two seasons, or a tenth of the series")

    back = _command(commands, "backtest", "score forecasts from many origins in the past", _backtest, tools)
    _model_flags(back)
    back.add_argument("--methods", default="ml", help="comma-separated: ml, map, nuts, svi:mvn, svi:normal; default ml")
    back.add_argument("--horizon", type=int, help="forecast steps; default a season, or a tenth of the series")
    back.add_argument("--origins", type=int, default=20, help="how many; default 20")
    back.add_argument("--refit", default="all", help="all, first, or a number: at every so many origins; default all")

    effect = _command(commands, "impact", "the effect of an intervention, against what would have been", _impact, tools)
    effect.add_argument("--controls", help="comma-separated columns of series that the intervention does not touch")
    effect.add_argument("--from", dest="start", required=True, help="first step with the intervention: a label of time")
    effect.add_argument("--method", default="nuts", help="nuts, ml, map, svi:mvn or svi:normal; default nuts")
    effect.add_argument("--level", type=float, default=0.95, help="of the intervals; default 0.95")
    effect.add_argument("--no-placebo", action="store_true", help="leave out the start that never was")


def _command(commands: Any, name: str, what: str, run: Callable[..., int], tools: Tools) -> Any:
    from pssm.study.series_arguments import add_series

    parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    add_series(parser)
    parser.add_argument("--out", help=f"folder for the results; default results/<data>-{name}")
    parser.add_argument("--force", action="store_true", help="write into a folder that exists, over its files")
    parser.add_argument("--seed", type=int, default=0, help="fixes every random choice; default 0")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=lambda arguments: run(arguments, tools))
    return parser


def _model_flags(parser: Any) -> None:
    from pssm.study.series_arguments import add_seasons

    parser.add_argument("--model", default="local_level", help="a model (see `pssm models`); default local_level")
    add_seasons(parser)
    parser.add_argument("--order", type=int, help="order of the autoregression")
    parser.add_argument("--states", type=int, help="size of the state; default the model's")


def _counts(a: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(a, name, None)
        if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError(f"`--{name}` must be at least 1; got {value}.")


class _Data(NamedTuple):
    """The series, and the columns that go with it."""

    series: Any
    y: Any
    others: Any
    names: tuple[str, ...]
    out: Path


def _read(a: argparse.Namespace, tools: Tools, command: str) -> _Data:
    """The series and the columns of `--inputs`, from one reading of the file."""
    from pssm import datasets
    from pssm.datasets.embedded import NAMES
    from pssm.study.series_arguments import names_in, read_series

    names = names_in(a.inputs)
    if names and not a.column:
        raise ValueError("`--column` is needed beside other columns: the series that is meant.")
    if twice := sorted({*names} & {*(a.column or [])}):
        raise ValueError(f"`--column` and the other columns both name {twice}.")
    if names and a.data in NAMES:
        series = datasets.load(a.data, [*a.column, *names])
        count = len(a.column)
        data = series.y[:, :count], series.y[:, count:], series.columns[:count]
    else:
        series = read_series(a)
        data = series.y, series.u, series.columns
    out = Path(a.out) if a.out else Path("results") / f"{series.name}-{command}"
    tools.check_out(out, a.force)
    return _Data(series, *data, out)


def _model(a: argparse.Namespace, tools: Tools, series: Any) -> tuple[Any, dict[str, Any]]:
    from pssm import models
    from pssm._checks import check_choice

    _counts(a, "period", "harmonics", "order", "states", "horizon", "starts", "origins")
    check_choice("--model", a.model, models.NAMES)
    if a.model == "panel":
        raise ValueError("`--model panel` goes with `pssm compare`, whose NUTS knows populations; or use it in Python.")
    return getattr(models, a.model), tools.model_options(a, series)


def _fit(a: argparse.Namespace, tools: Tools) -> int:
    from pssm.study.analysis import write_fit
    from pssm.study.series_arguments import season_of

    data = _read(a, tools, "fit")
    model, options = _model(a, tools, data.series)
    length = len(data.y)
    season = season_of(a, data.series)
    horizon = a.horizon or (round(2 * season) if season else max(10, length // 10))
    page = write_fit(
        partial(model, **options),
        data.y,
        data.out,
        u=data.others,
        u_future=data.series.u_future,
        future_time=data.series.future_time,
        notes=data.series.notes,
        method=a.method,
        num_starts=a.starts,
        horizon=horizon,
        time=data.series.time,
        names=data.names,
        title=f"{data.series.name}: {a.model}",
        key=a.seed,
        progress_bar=not a.quiet,
    )
    print(f"\nReport: {page}")
    return 0


def _backtest(a: argparse.Namespace, tools: Tools) -> int:
    from pssm.study.analysis import write_backtest
    from pssm.study.series_arguments import season_of

    data = _read(a, tools, "backtest")
    model, options = _model(a, tools, data.series)
    season = season_of(a, data.series)
    refit: Any = {"all": True, "first": False}.get(a.refit, a.refit)
    if isinstance(refit, str):
        if not refit.isdigit():
            raise ValueError(f"`--refit` must be all, first, or a number of origins; got {a.refit!r}.")
        refit = int(refit)
    page = write_backtest(
        partial(model, **options),
        data.y,
        data.out,
        u=data.others,
        horizon=a.horizon or (round(season) if season else max(1, len(data.y) // 10)),
        origins=a.origins,
        refit=refit,
        methods=[m.strip() for m in a.methods.split(",") if m.strip()],
        period=round(season) if season and season >= 1.5 else None,
        time=data.series.time,
        title=f"{data.series.name}: {a.model}",
        key=a.seed,
        progress_bar=not a.quiet,
    )
    print(f"\nReport: {page}")
    return 0


def _moment(text: str, labels: Any, dayfirst: str | None) -> Any:
    """A date of the command line: day or month first as the file has it, where both could be meant the one inside."""
    import pandas as pd

    ways = [dayfirst == "yes"] if dayfirst else [False, True]
    try:
        found = {pd.to_datetime(text, dayfirst=way).to_datetime64() for way in ways}
    except (ValueError, TypeError):
        raise ValueError(f"`--from` must be a date, as the times are; got {text!r}. Write YYYY-MM-DD.") from None
    inside = [x for x in found if labels[0] < x <= labels[-1]] or list(found)
    if len(inside) > 1:
        raise ValueError(f"`--from` {text!r} may have its day or its month first. Write YYYY-MM-DD.")
    return inside[0]


def _impact(a: argparse.Namespace, tools: Tools) -> int:
    from pssm.study.analysis import write_impact
    from pssm.study.series_arguments import names_in

    if a.inputs:
        raise ValueError("`--inputs` are `--controls` here: series that the intervention does not touch.")
    a.inputs = a.controls and [a.controls]
    data = _read(a, tools, "impact")
    if data.y.shape[1] > 1:
        raise ValueError(f"`--column` must name one series; got {list(data.names)}. Controls go to `--controls`.")
    labels = data.series.time
    start: Any = a.start
    if labels.dtype.kind in "iuf":
        try:
            start = float(a.start)
        except ValueError:
            raise ValueError(f"`--from` must be a number, as the times are; got {a.start!r}.") from None
    elif labels.dtype.kind == "M":
        start = _moment(a.start, labels, a.dayfirst)
    page = write_impact(
        data.y[:, 0],
        data.others,
        start,
        data.out,
        names=names_in(a.inputs),
        method=a.method,
        level=a.level,
        placebo=not a.no_placebo,
        time=labels,
        title=f"{data.series.name}: {data.names[0]}",
        key=a.seed,
    )
    print(f"\nReport: {page}")
    return 0
