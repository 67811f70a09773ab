"""A study as one HTML file: the verdicts first, then the numbers, the figures, and what is needed to run it again.

The file stands alone (styles and figures inside, no script, nothing fetched, which its own content policy forbids
too), and every label in it is escaped: names of methods, columns and files may come from anywhere.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pssm import plots
from pssm.storage.files import write_whole
from pssm.study.method_names import POINTS
from pssm.study.page import (
    bullet_list,
    cell_text,
    document,
    escaped,
    facts_list,
    figure_html,
    glossary,
    is_number,
    moment,
    png_of,
    records,
    seconds,
    section,
    settings_list,
    table,
)
from pssm.study.report_text import SIGNS, VERDICTS, WORDS
from pssm.study.residual_part import CAPTION, residuals_of, words_on_tests

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Figure = Any

__all__ = ["write_report"]


def write_report(study: Any, folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` and its figures into `folder`.

    Each file is written under another name and then moved into place, so that an interruption leaves the old file or
    the new one. The figures are `states_<method>.png` (what is not a letter, digit, `_`, `.` or `-` becomes `-`),
    `posteriors.png`, `khat.png` and `losses.png`, each where there is something to show. A figure that cannot be drawn
    is named in the report and does not stop it.

    The marker of a method follows its verdict: `level` of the result where it has one ("good", "check", "bad"), else
    the words that the verdict starts with, else its diagnostics.

    Args:
        study: a `Study`, as `pssm.compare` returns it.
        folder: created if it is not there.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: `folder` cannot be written to.

    Example:
        >>> write_report(pssm.compare(model, y), "out/")  # doctest: +SKIP
        PosixPath('out/report.html')
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    problems = [str(w) for w in getattr(study, "warnings", None) or []]
    figures, left = [], None
    try:
        left = residuals_of(study)
    except Exception as error:
        problems.append(f"There are no residuals: {type(error).__name__}: {error}")
    drawings = list(_figures(study))
    if left is not None:
        drawings.append(("residuals.png", left.plot, f"One-step residuals of {study.reference}", CAPTION))
    for name, draw, alt, caption in drawings:
        try:
            png = png_of(draw())
        except Exception as error:  # a long run must not lose its report to one figure
            problems.append(f"The figure {name} could not be drawn: {type(error).__name__}: {error}")
            continue
        write_whole(folder / name, png)
        figures.append((png, alt, caption))
    path = folder / "report.html"
    write_whole(path, _page(study, figures, problems, left).encode("utf-8", errors="replace"))
    return path


# The page


def _page(study: Any, figures: list[tuple[bytes, str, str]], problems: list[str], left: Any) -> str:
    title = f"{escaped(study.name)}: {escaped(study.model_name)}"
    parts = [
        f"<header><h1>{title}</h1>{_what(study)}</header>",
        section("verdicts", "Verdicts", _verdicts(study)),
        section("warnings", "Warnings", bullet_list(problems)) if problems else "",
        section("methods", "The methods side by side", _methods(study)),
        section("parameters", "The parameters", _parameters(study)),
        section("residuals", "The residuals", _residuals(left)),
        section("figures", "Figures", "".join(figure_html(*f) for f in figures)),
        section("reading", "How to read this", glossary()),
        section("settings", "To run it again", settings_list(getattr(study, "settings", None) or {})),
    ]
    return document(title, parts)


def _what(study: Any) -> str:
    """What was compared: the data, the model, how much is missing, the time span."""
    y = np.asarray(study.y, dtype=float)
    y = y[:, None] if y.ndim == 1 else y
    missing, time = int(np.isnan(y).sum()), np.asarray(study.time)
    facts = [
        ("Data", escaped(study.column)),
        ("Model", escaped(study.model_name)),
        ("Observations", f"{y.shape[0]:,} steps" + (f" × {y.shape[1]} series" if y.shape[1] > 1 else "")),
        ("Missing", f"{missing:,} missing ({missing / y.size:.1%})" if missing else "none"),
    ]
    if len(time):
        facts.append(("Time", f"{moment(time[0])} to {moment(time[-1])}"))
    if study.reference:
        facts.append(("Reference", escaped(study.reference)))
    return facts_list(facts)


def _verdicts(study: Any) -> str:
    items = []
    for result in study.results.values():
        level, word = _level(result)
        sentence = result.verdict or (f"No verdict: {result.status}." if result.status != "done" else "No verdict.")
        details = [escaped(result.objective)] if result.objective else []
        times = ((result.seconds_run, "to run"), (result.seconds_compile, "to compile"))
        if result.status in ("done", "interrupted"):
            details += [f"{seconds(t)} {what}" for t, what in times if is_number(t) and np.isfinite(t)]
        if result.name == study.reference:
            details.insert(0, "the reference")
        note = f'<p class="note">{escaped(result.note)}</p>' if result.note else ""
        items.append(
            f'<li class="{level}"><span class="light"><span class="sign" aria-hidden="true">{SIGNS[level]}</span> '
            f"<span>{word}</span></span><div><p><strong>{escaped(result.name)}</strong> {escaped(sentence)}</p>"
            f'<p class="small">{" · ".join(details)}</p>{note}</div></li>'
        )
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _level(result: Any) -> tuple[str, str]:
    """The class of the marker and its word."""
    if result.status == "skipped":
        return "none", "not run"
    if result.status in ("failed", "interrupted"):
        return ("bad" if result.status == "failed" else "check"), result.status
    level = getattr(result, "level", None)
    if level not in WORDS:
        level = next((k for k, pattern in VERDICTS.items() if re.match(pattern, result.verdict.strip(), re.I)), None)
    level = level or _level_of(result.diagnostics or {})
    return level, WORDS[level]


def _level_of(diagnostics: Mapping[str, Any]) -> str:
    """The marker of a method whose verdict does not say it, by the usual thresholds; "check" if nothing is known."""
    names = ("khat", "rhat_max", "ess_min", "divergences")
    given = (diagnostics.get(name) for name in names)
    khat, rhat, ess, lost = (np.nan if value is None else float(np.max(value)) for value in given)
    if khat > 0.7 or rhat > 1.05:
        return "bad"
    doubtful = khat > 0.5 or rhat > 1.01 or ess < 400 or lost > 0 or np.isnan([khat, rhat]).all()
    return "check" if doubtful else "good"


# The tables

_SHOWN_ABOVE = ("verdict", "note", "objective")


def _methods(study: Any) -> str:
    levels = {str(r.name): _level(r) for r in study.results.values()}

    def method(name: Any) -> str:
        level, word = levels.get(str(name), ("none", ""))
        sign = f'<span class="sign {level}" title="{word}">{SIGNS[level]}</span> '
        return (sign if str(name) in levels else "") + escaped(name)

    rows = [{k: v for k, v in row.items() if k not in _SHOWN_ABOVE} for row in records(study.table)]
    return table(rows, {"method": method})


def _parameters(study: Any) -> str:
    """The parameter table, the methods of one parameter next to each other."""
    rows = records(study.parameters)
    if not rows or "parameter" not in rows[0]:
        return table(rows)
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(str(row["parameter"]), len(first))
    rows.sort(key=lambda row: first[str(row["parameter"])])
    rows = [{"parameter": row["parameter"], **row} for row in rows]

    def flag(far: Callable[[float], bool], column: str) -> Callable[[Any], str]:
        def cell(value: Any) -> str:
            text = cell_text(column, value)
            return f'<strong class="check">▲ {text}</strong>' if is_number(value) and far(value) else text

        return cell

    cells = {
        "error_in_sds": flag(lambda v: abs(v) > 0.5, "error_in_sds"),
        "sd_ratio": flag(lambda v: not 0.8 <= v <= 1.25, "sd_ratio"),
    }
    legend = "▲ the mean is more than half a posterior sd from the reference, or the sd is off by more than a fifth."
    return table(rows, cells, group="parameter") + f'<p class="small">{legend}</p>'


def _residuals(left: Any) -> str:
    """What the tests of the reference's residuals say, and their numbers."""
    return "" if left is None else bullet_list(words_on_tests(left)) + table(records(left.table))


# The figures


def _figures(study: Any) -> Iterable[tuple[str, Callable[[], Figure], str, str]]:
    """File name, function that draws it, alternative text and caption of every figure there is something for."""
    results = list(study.results.values())
    trees = {r.name: r.tree for r in results if r.tree is not None}
    trees = dict(sorted(trees.items(), key=lambda item: item[0] != study.reference))
    used: set[str] = set()
    for name, tree in trees.items():
        if {"smoothed_states", "forecast"} & set(tree.children) and "observed_data" in tree.children:
            yield (
                f"states_{_file_name(name, used)}.png",
                lambda tree=tree, name=name: plots.plot_states(_as_y(tree), title=name, ylabel=str(study.column)),
                f"Data, smoothed signal and forecast by {name}",
                f"{name}: data, smoothed signal and forecast. The band should widen where data are missing (hatched) "
                "and leave no pattern in the points around it; about nine in ten later values should fall in the "
                "forecast's outer band.",
            )
    drawn = {
        name: tree
        for name, tree in trees.items()
        if "posterior" in tree.children and len(tree["posterior"].data_vars) and name not in POINTS
    }
    if drawn:
        listed = list(dict.fromkeys(str(r["parameter"]) for r in records(study.parameters) if "parameter" in r))

        def posteriors() -> Figure:
            try:
                return plots.plot_posteriors(drawn, listed or None)
            except ValueError:  # the table names none of the variables
                return plots.plot_posteriors(drawn)

        yield (
            "posteriors.png",
            posteriors,
            "Posterior densities of the parameters by method",
            f"Posteriors by method; the filled one is {next(iter(drawn))}. Look for a method that is shifted, or, as "
            "variational fits often are, too narrow. Dot: mean; bar: central 90 %.",
        )
    khats = {r.name: r.diagnostics["khat"] for r in results if (r.diagnostics or {}).get("khat") is not None}
    khats = {name: khat for name, khat in khats.items() if not np.isnan(khat).all()}
    if khats:
        yield (
            "khat.png",
            lambda: plots.plot_khat(khats),
            "PSIS k-hat by method",
            "PSIS k-hat. Left of the first line the approximation is good; between the lines importance weights repair "
            "it; right of the second it is too far from the posterior to rely on.",
        )
    losses = {r.name: r.losses for r in results if r.losses is not None and np.size(r.losses)}
    if losses:
        yield (
            "losses.png",
            lambda: plots.plot_losses(losses),
            "Loss of the variational fits by step",
            "SVI losses: line, the median of a block of steps; band, its middle 80 %. A curve that still falls at the "
            "end wants more steps; a lower end is a tighter bound.",
        )


def _as_y(tree: Any) -> Any:
    """The tree as `plot_states` takes it: the observed site is `y`, with time in front and its series side by side."""
    observed = tree["observed_data"].to_dataset()
    time = str(tree.attrs.get("time_axis", "time"))
    site = next((n for n, x in observed.data_vars.items() if time in x.dims), None)
    if site is None or (site == "y" and observed[site].ndim <= 2 and time == "time"):
        return tree
    groups = {
        "observed_data": observed[[site]].rename({site: "y"}),
        **{n: g.to_dataset() for n, g in tree.children.items() if n in ("smoothed_states", "forecast")},
    }
    return type(tree).from_dict({n: _side_by_side(g, time) for n, g in groups.items()})


def _side_by_side(group: Any, time: str) -> Any:
    """A group with the axes (time or horizon, one other); the axes before these are merged into the last."""
    group = group.rename({time: "time"}) if time in group.dims and time != "time" else group
    found = {}
    for name, x in group.data_vars.items():
        first = "horizon" if "horizon" in x.dims else "time"
        rest = [d for d in x.dims if d != first]
        values = x.transpose(first, *rest).values.reshape(x.sizes[first], -1)
        last = "state" if "state" in rest else "series"
        labels = {last: group[last]} if rest == [last] else {}
        found[name] = type(x)(values, dims=(first, last), coords={first: group[first], **labels})
    return type(group)(found)


def _file_name(method: str, used: set[str]) -> str:
    """A method's name as part of a file name, on any file system; no two methods get the same."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(method)).strip("-.")[:60] or "method"
    name, k = stem, 1
    while name.lower() in used:
        k += 1
        name = f"{stem}-{k}"
    used.add(name.lower())
    return name
