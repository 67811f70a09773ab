"""Reports of the analyst's results, a fit with its residuals, a backtest, an impact: tables, figures, one page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pssm import plots
from pssm.diagnostics import backtest, decompose, impact, residuals, to_datatree
from pssm.infer import fit_map, fit_ml
from pssm.storage.files import write_whole
from pssm.study.console import show_rows
from pssm.study.page import (
    bullet_list,
    document,
    escaped,
    facts_list,
    figure_html,
    moment,
    number,
    png_of,
    records,
    section,
    table,
)
from pssm.study.residual_part import CAPTION, words_on_tests

Drawing = tuple[str, Callable[[], Any], str, str]  # file, figure, what it shows, caption


def write_fit(
    model: Callable[..., Any],
    y: np.ndarray,
    out: Path,
    *,
    u: np.ndarray | None = None,
    u_future: np.ndarray | None = None,
    future_time: np.ndarray | None = None,
    notes: Sequence[str] = (),
    method: str = "ml",
    num_starts: int = 8,
    horizon: int = 10,
    time: np.ndarray,
    names: Sequence[str],
    title: str,
    key: int = 0,
    progress_bar: bool = True,
) -> Path:
    """Fits by maximum likelihood or posterior mode, and writes the report; arguments as in `pssm.infer.fit_ml`."""
    inputs = {} if u is None else {"u": u}
    fitter = fit_ml if method == "ml" else fit_map
    fit = fitter(model, y, num_starts=num_starts, key=key, progress_bar=progress_bar, **inputs)
    notes = [*notes, *fit.warnings]
    estimates = fit.summary()
    show_rows(estimates.reset_index(), title, 60)
    files = {"parameters.csv": estimates.to_csv()}
    found = _attempt(notes, "residuals", lambda: residuals(fit, names=tuple(names), time=time))
    future = {}
    if u is not None:
        horizon = 0 if u_future is None else len(u_future)
        future = {"u_future": u_future, "future_time": future_time} if horizon else {}
    if not horizon:
        notes.append("No forecast: there are no regressors behind the last value of the series.")
    tree = _attempt(notes, "states and forecast", lambda: to_datatree(fit, time=time, states=True, forecast=horizon,
                                                                      log_likelihood=False, **future))  # fmt: skip
    drawings: list[Drawing] = []
    if tree is not None:
        drawings.append(("states.png", lambda: plots.plot_states(tree, ylabel=", ".join(names)), "data and signal",
                         "Data, smoothed signal with its 90 % interval, and the forecast with its 50 and 90 % "
                         "intervals; the parameters are taken as known."))  # fmt: skip
        if horizon:
            files["forecast.csv"] = tree["forecast"].to_dataset().to_dataframe().reset_index().to_csv(index=False)
    parts = _attempt(notes, "components", lambda: decompose(fit, names=tuple(names), time=time, draws=0))
    if parts is not None:
        files["components.csv"] = parts.table.to_csv(index=False)
        caption = (
            "The components of the series given all data, with their 90 % intervals. They add up to the signal; the "
            "irregular is what is left of the data."
        )
        drawings.append(("components.png", parts.plot, "components", caption))
    if found is not None:
        files["residual_tests.csv"] = found.table.to_csv()
        files["residuals.csv"] = pd.DataFrame(found.values, index=pd.Index(time, name="time"), columns=names).to_csv()
        drawings.append(("residuals.png", found.plot, "one-step residuals", CAPTION))
    facts = [
        *_what(y, time),
        ("Method", escaped(fit.method)),
        ("Log-likelihood", f"{fit.log_likelihood:,.4f}"),
        ("Parameters", str(fit.num_parameters)),
        ("AIC, AICc, BIC", ", ".join(f"{x:,.2f}" for x in (fit.aic, fit.aicc, fit.bic))),
    ]
    sections = [
        (
            "verdicts",
            "In words",
            bullet_list([_sentence(fit.message), *(words_on_tests(found) if found is not None else [])]),
        ),
        ("parameters", "The estimates", table(records(estimates))),
        ("residuals", "Tests of the residuals", table(records(found.table)) if found is not None else ""),
    ]
    return _write(out, title, facts, sections, notes, drawings, files)


def write_backtest(
    model: Callable[..., Any], y: np.ndarray, out: Path, *, u: np.ndarray | None = None, time: np.ndarray, title: str,
    **options: Any,
) -> Path:  # fmt: skip
    """Runs `pssm.diagnostics.backtest` and writes the report."""
    inputs = {} if u is None else {"u": u}
    found = backtest(model, y, time=time, **inputs, **options)
    overall = found.overall
    show_rows(overall[[c for c in overall if not c.endswith("_se")]].round(4).reset_index(), title)
    failed = found.origins[found.origins["note"] != ""]
    notes = [f"{row['method']}, {row['known']} known: {row['note']}" for row in records(failed)]
    notes += ["It was interrupted; later origins are missing."] if found.interrupted else []
    own = [name for name in overall.index if name not in ("naive", "seasonal naive")]
    words = [
        f"{name}: {'saves' if overall.skill[name] > 0 else 'adds'} {abs(100 * overall.skill[name]):.1f} % "
        f"{'of' if overall.skill[name] > 0 else 'to'} the naive forecast's CRPS; its 90 % intervals held "
        f"{100 * overall.coverage[name]:.0f} % of what came."
        for name in own
    ]
    facts = [
        *_what(y, time),
        ("Origins", str(found.origins["known"].nunique())),
        ("Steps ahead", str(options["horizon"])),
    ]
    parts = [
        ("verdicts", "In words", bullet_list(words)),
        ("scores", "All steps ahead", table(records(overall))),
        ("steps", "By step ahead", table(records(found.scores), group="method")),
    ]
    drawing = ("backtest.png", found.plot, "forecasts and scores", "Forecasts of the first method with their 90 % "
               "intervals, and the CRPS by step ahead with standard errors over origins.")  # fmt: skip
    files = {
        "scores.csv": found.scores.to_csv(),
        "forecasts.csv": found.table.to_csv(index=False),
        "origins.csv": found.origins.to_csv(index=False),
    }
    return _write(out, title, facts, parts, notes, [drawing], files)


def write_impact(
    y: np.ndarray, controls: np.ndarray | None, start: Any, out: Path, *, names: Sequence[str], time: np.ndarray,
    title: str, **options: Any,
) -> Path:  # fmt: skip
    """Runs `pssm.diagnostics.impact` and writes the report."""
    frame = None if controls is None else pd.DataFrame(controls, columns=list(names))
    found = impact(y, frame, start, time=time, **options)
    words = found.summary().splitlines()
    print("\n".join(words))
    facts = [
        *_what(y, time),
        ("Start", moment(found.start)),
        ("Controls", escaped(", ".join(names)) or "none"),
        ("Method", escaped(found.method)),
        ("Average effect", number(found.effects.effect["average"])),
    ]
    parts = [
        ("verdicts", "In words", bullet_list(words)),
        ("effects", "The effect", table(records(found.effects.rename_axis("effect_of")))),
        ("placebo", "A start that never was", "" if found.placebo is None else
         table(records(found.placebo.rename_axis("effect_of")))),
        ("controls", "The controls", "" if found.coefficients is None else
         table(records(found.coefficients.rename_axis("control")))),
    ]  # fmt: skip
    drawing = ("impact.png", found.plot, "series, effect, cumulative effect", "The series beside its prediction, the "
               "effect of each step, and the cumulative effect, with intervals.")  # fmt: skip
    files = {"effects.csv": found.effects.to_csv(), "steps.csv": found.table.to_csv(index=False)}
    return _write(out, title, facts, parts, list(getattr(found.fit, "warnings", ())), [drawing], files)


def _attempt(notes: list[str], what: str, make: Callable[[], Any]) -> Any:
    """What `make()` returns, or None, with a note: a step behind a fit costs no more than itself."""
    try:
        return make()
    except Exception as error:
        notes.append(f"No {what}: {type(error).__name__}: {error}")
        return None


def _what(y: np.ndarray, time: np.ndarray) -> list[tuple[str, str]]:
    missing = int(np.isnan(y).sum())
    series = f" × {y.shape[1]} series" if y.ndim > 1 and y.shape[1] > 1 else ""
    return [
        ("Observations", f"{len(y):,} steps{series}"),
        ("Missing", f"{missing:,}" if missing else "none"),
        ("Time", f"{moment(time[0])} to {moment(time[-1])}"),
    ]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _write(
    out: Path,
    title: str,
    facts: list[tuple[str, str]],
    parts: list[tuple[str, str, str]],
    notes: list[str],
    drawings: list[Drawing],
    files: dict[str, str],
) -> Path:
    """Files, figures and page; a figure that cannot be drawn is named in the page."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(out / name, text)
    figures = []
    for name, draw, alt, caption in drawings:
        png = _attempt(notes, f"figure {name}", lambda draw=draw: png_of(draw()))
        if png is not None:
            write_whole(out / name, png)
            figures.append(figure_html(png, alt, caption))
    body = [
        f"<header><h1>{escaped(title)}</h1>{facts_list(facts)}</header>",
        *(section(*part) for part in parts),
        section("warnings", "Warnings", bullet_list(map(_sentence, notes)) if notes else ""),
        section("figures", "Figures", "".join(figures)),
    ]
    write_whole(out / "report.html", document(escaped(title), body).encode("utf-8", errors="replace"))
    return out / "report.html"
