"""A study as one HTML file: the verdicts first, then the numbers, the figures, and what is needed to run it again.

The file stands alone (styles and figures inside, no script, nothing fetched, which its own content policy forbids
too), and every label in it is escaped: names of methods, columns and files may come from anywhere.
"""

import base64
import io
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pssm import plots

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
    figures = []
    for name, draw, alt, caption in _figures(study):
        try:
            png = _png(draw())
        except Exception as error:  # a long run must not lose its report to one figure
            problems.append(f"The figure {name} could not be drawn: {type(error).__name__}: {error}")
            continue
        _write(folder / name, png)
        figures.append((png, alt, caption))
    path = folder / "report.html"
    _write(path, _page(study, figures, problems).encode("utf-8", errors="replace"))
    return path


# The page


def _page(study: Any, figures: list[tuple[bytes, str, str]], problems: list[str]) -> str:
    title = f"{_label(study.name)}: {_label(study.model_name)}"
    parts = [
        f"<header><h1>{title}</h1>{_what(study)}</header>",
        _section("verdicts", "Verdicts", _verdicts(study)),
        _section("warnings", "Warnings", _list(problems)) if problems else "",
        _section("methods", "The methods side by side", _methods(study)),
        _section("parameters", "The parameters", _parameters(study)),
        _section("figures", "Figures", "".join(_figure(*f) for f in figures)),
        _section("reading", "How to read this", _glossary()),
        _section("settings", "To run it again", _settings(getattr(study, "settings", None) or {})),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style></head>\n<body>\n<main>"
        + "\n".join(parts)
        + "</main>\n</body></html>\n"
    )


def _section(anchor: str, heading: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' if content else ""


def _what(study: Any) -> str:
    """What was compared: the data, the model, how much is missing, the time span."""
    y = np.asarray(study.y, dtype=float)
    y = y[:, None] if y.ndim == 1 else y
    missing, time = int(np.isnan(y).sum()), np.asarray(study.time)
    facts = [
        ("Data", _label(study.column)),
        ("Model", _label(study.model_name)),
        ("Observations", f"{y.shape[0]:,} steps" + (f" × {y.shape[1]} series" if y.shape[1] > 1 else "")),
        ("Missing", f"{missing:,} missing ({missing / y.size:.1%})" if missing else "none"),
    ]
    if len(time):
        facts.append(("Time", f"{_moment(time[0])} to {_moment(time[-1])}"))
    if study.reference:
        facts.append(("Reference", _label(study.reference)))
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def _verdicts(study: Any) -> str:
    items = []
    for result in study.results.values():
        level, word = _level(result)
        sentence = result.verdict or (f"No verdict: {result.status}." if result.status != "done" else "No verdict.")
        details = [_label(result.objective)] if result.objective else []
        times = ((result.seconds_run, "to run"), (result.seconds_compile, "to compile"))
        if result.status in ("done", "interrupted"):
            details += [f"{_seconds(t)} {what}" for t, what in times if _is_number(t) and np.isfinite(t)]
        if result.name == study.reference:
            details.insert(0, "the reference")
        note = f'<p class="note">{_label(result.note)}</p>' if result.note else ""
        items.append(
            f'<li class="{level}"><span class="light"><span class="sign" aria-hidden="true">{_SIGNS[level]}</span> '
            f"<span>{word}</span></span><div><p><strong>{_label(result.name)}</strong> {_label(sentence)}</p>"
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
    if level not in _WORDS:
        level = next((k for k, pattern in _VERDICTS.items() if re.match(pattern, result.verdict.strip(), re.I)), None)
    level = level or _level_of(result.diagnostics or {})
    return level, _WORDS[level]


def _level_of(diagnostics: Mapping[str, Any]) -> str:
    """The marker of a method whose verdict does not say it, by the usual thresholds; "check" if nothing is known."""

    def known(*names: str) -> np.ndarray:
        values = [np.asarray(diagnostics[n], dtype=float).ravel() for n in names if diagnostics.get(n) is not None]
        values = np.concatenate([*values, np.zeros(0)])
        return values[~np.isnan(values)]

    khat, rhat, ess = known("khat"), known("rhat_max", "rhat", "r_hat"), known("ess_min", "ess_bulk", "ess")
    lost = known("divergences", "divergent", "diverging")
    if (khat > 0.7).any() or (rhat > 1.05).any():
        return "bad"
    doubtful = (khat > 0.5).any() or (rhat > 1.01).any() or (ess < 400).any() or (lost > 0).any()
    return "check" if doubtful or not (khat.size or rhat.size) else "good"


_SIGNS = {"good": "●", "check": "▲", "bad": "■", "none": "○"}
_WORDS = {"good": "good", "check": "check", "bad": "not reliable"}
_VERDICTS = {
    "bad": r"(do not|don't|not |never|unreliable|biased|wrong|failed|too (narrow|wide)|reject)",
    "check": r"(check|caution|careful|warning|use with|usable|close|approximate|almost|nearly|wide|narrow)",
    "good": r"(trust|good|ok\b|reliable|agrees|exact|reference|the reference|matches|safe|converged)",
}


# The tables

_NO_VALUE = '<span class="none">–</span>'
# How a column is called, what it means, and how its numbers are written.
_COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "method": ("method", "", str),
    "status": ("status", "", str),
    "seconds_compile": ("compile", "seconds to trace and compile", lambda v: _seconds(v)),
    "seconds_run": ("run", "seconds to run, without compiling", lambda v: _seconds(v)),
    "ess_min": ("ESS, smallest", "effective sample size of the worst parameter", lambda v: f"{v:,.0f}"),
    "ess_bulk": ("ESS", "effective sample size", lambda v: f"{v:,.0f}"),
    "ess_per_second": ("ESS per second", "smallest effective sample size by second", lambda v: _number(v, 3)),
    "rhat_max": ("R-hat, largest", "R-hat of the worst parameter", lambda v: f"{v:.3f}"),
    "r_hat": ("R-hat", "", lambda v: f"{v:.3f}"),
    "elbo": ("ELBO", "lower bound on the log evidence, nats", lambda v: f"{v:,.2f}"),
    "log_evidence": ("log evidence", "nats", lambda v: f"{v:,.2f}"),
    "evidence_kind": ("kind of evidence", "exact, a bound or an estimate", str),
    "khat": ("k-hat", "PSIS k-hat, largest", lambda v: f"{v:.2f}"),
    "elpd_lfo": ("elpd, next step", "leave-future-out expected log predictive density", lambda v: f"{v:,.1f}"),
    "coverage90": (
        "coverage of 90 %",
        "how often the 90 % forecast interval held the value",
        lambda v: f"{100 * v:.1f} %",
    ),
    "error_in_sds": ("error in sds", "difference of the mean to the reference, in its sds", lambda v: f"{v:+.2f}"),
    "sd_ratio": ("sd ratio", "sd over the sd of the reference", lambda v: f"{v:.2f}"),
}
_SHOWN_ABOVE = ("verdict", "note", "objective")


def _methods(study: Any) -> str:
    levels = {str(r.name): _level(r) for r in study.results.values()}

    def method(name: Any) -> str:
        level, word = levels.get(str(name), ("none", ""))
        sign = f'<span class="sign {level}" title="{word}">{_SIGNS[level]}</span> '
        return (sign if str(name) in levels else "") + _label(name)

    rows = [{k: v for k, v in row.items() if k not in _SHOWN_ABOVE} for row in _records(study.table)]
    return _table(rows, {"method": method})


def _parameters(study: Any) -> str:
    """The parameter table, the methods of one parameter next to each other."""
    rows = _records(study.parameters)
    if not rows or "parameter" not in rows[0]:
        return _table(rows)
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(str(row["parameter"]), len(first))
    rows.sort(key=lambda row: first[str(row["parameter"])])
    rows = [{"parameter": row["parameter"], **row} for row in rows]

    def flag(far: Callable[[float], bool], column: str) -> Callable[[Any], str]:
        def cell(value: Any) -> str:
            text = _cell(column, value)
            return f'<strong class="check">▲ {text}</strong>' if _is_number(value) and far(value) else text

        return cell

    cells = {
        "error_in_sds": flag(lambda v: abs(v) > 0.5, "error_in_sds"),
        "sd_ratio": flag(lambda v: not 0.8 <= v <= 1.25, "sd_ratio"),
    }
    legend = "▲ the mean is more than half a posterior sd from the reference, or the sd is off by more than a fifth."
    return _table(rows, cells, group="parameter") + f'<p class="small">{legend}</p>'


def _table(rows: list[dict[str, Any]], cells: Mapping[str, Callable] | None = None, group: str = "") -> str:
    """An HTML table of `rows`; columns without a single value are left out."""
    columns = [c for c in dict.fromkeys(k for row in rows for k in row) if any(not _is_missing(r.get(c)) for r in rows)]
    if not columns:
        return ""
    numeric = {c for c in columns if all(_is_number(r.get(c)) or _is_missing(r.get(c)) for r in rows)}
    head = ""
    for c in columns:
        label, meaning, _ = _COLUMNS.get(c, (str(c).replace("_", " "), "", str))
        hint = f' title="{_label(meaning)}"' if meaning else ""
        head += f'<th scope="col"{_number_class(c in numeric)}{hint}>{_label(label)}</th>'
    body = ""
    for i, row in enumerate(rows):
        new = group and i and row.get(group) != rows[i - 1].get(group)
        body += '<tr class="new">' if new else "<tr>"
        for j, c in enumerate(columns):
            value = row.get(c)
            text = (cells or {}).get(c, lambda v, c=c: _cell(c, v))(value)
            tag = 'th scope="row"' if j == 0 else "td"
            body += f"<{tag}{_number_class(c in numeric)}>{text}</{tag[:2]}>"
        body += "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number_class(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


def _records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame as dicts; a named index (`method`) becomes a column."""
    if frame is None or not len(frame):
        return []
    frame = frame.reset_index() if any(n is not None for n in frame.index.names) else frame
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _cell(column: str, value: Any) -> str:
    if _is_missing(value):
        return _NO_VALUE
    if not _is_number(value):
        return _label(value)
    if column in _COLUMNS and _COLUMNS[column][2] is not str and np.isfinite(value):
        return _COLUMNS[column][2](float(value)).replace("-", "−")
    return _number(value).replace("-", "−")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return value == "" if isinstance(value, str) else _is_number(value) and bool(np.isnan(value))


def _number(value: int | float | np.number, digits: int = 4) -> str:
    """Three or four significant digits, whole numbers as they are."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not np.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "–"
    if 10.0 ** (digits - 1) <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def _seconds(value: int | float | np.number) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def _moment(value: Any) -> str:
    """A time label: a date without its midnight, a whole number without its decimals."""
    if isinstance(value, np.datetime64):
        return str(value.astype("datetime64[s]")).replace("T00:00:00", "").replace("T", " ")
    return _label(f"{value:g}" if isinstance(value, float | np.floating) else value)


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
                lambda tree=tree, name=name: plots.plot_states(tree, title=name, ylabel=str(study.column)),
                f"Data, smoothed signal and forecast by {name}",
                f"{name}: data, smoothed signal and forecast. The band should widen where data are missing (hatched) "
                "and leave no pattern in the points around it; about nine in ten later values should fall in the "
                "forecast's outer band.",
            )
    drawn = {
        name: tree for name, tree in trees.items() if "posterior" in tree.children and len(tree["posterior"].data_vars)
    }
    if drawn:
        listed = list(dict.fromkeys(str(r["parameter"]) for r in _records(study.parameters) if "parameter" in r))

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
    by_method = {str(row.get("method")): row.get("khat") for row in _records(study.table)}
    khats = {}
    for r in results:
        khat = (r.diagnostics or {}).get("khat", by_method.get(r.name))
        if khat is not None and np.size(khat) and not np.isnan(np.asarray(khat, dtype=float)).all():
            khats[r.name] = khat
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


def _file_name(method: str, used: set[str]) -> str:
    """A method's name as part of a file name, on any file system; no two methods get the same."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(method)).strip("-.")[:60] or "method"
    name, k = stem, 1
    while name.lower() in used:
        k += 1
        name = f"{stem}-{k}"
    used.add(name.lower())
    return name


def _figure(png: bytes, alt: str, caption: str) -> str:
    source = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{_label(alt)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{_label(caption)}</figcaption></figure>"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a label
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


# The rest of the page

_GLOSSARY = {
    "R-hat": "Compares Markov chains with each other. Up to 1.01 they agree; above, they have not mixed: run longer.",
    "ESS": "Effective sample size: how many independent draws the chain is worth. Want 400 or more everywhere.",
    "Divergences": "Steps where NUTS lost its way. Any at all can mean that a part of the posterior was missed.",
    "ELBO": "A lower bound on the log evidence, in nats. Higher is tighter; compare only fits of one model and data.",
    "Log evidence": "Log probability of the data under the model. The table says how it was found.",
    "k-hat": "How heavy the tails of the importance weights of an approximation are. Below 0.5 good, "
    "up to 0.7 repairable by the weights, above 0.7 not reliable.",
    "elpd": "Expected log predictive density of data not yet seen; here each step is forecast from the past only. "
    "Higher is better; a difference below about 4 says little.",
    "Coverage": "How often the 90 % interval held the value that came. Far below: overconfident; far above: too wide.",
    "Error in sds, sd ratio": "Distance of a posterior mean from the reference in its sds (0 is perfect), and the sd "
    "over the reference's sd (1 is perfect; below 1 is overconfident).",
}


def _glossary() -> str:
    return '<dl class="words">' + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in _GLOSSARY.items()) + "</dl>"


def _settings(settings: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{_label(k)} {show(v)}" for k, v in value.items())
        if isinstance(value, list | tuple):
            return ", ".join(show(v) for v in value)
        return _label(value)

    rows = "".join(f"<dt>{_label(str(k).replace('_', ' '))}</dt><dd>{show(v)}</dd>" for k, v in settings.items())
    return f'<dl class="words code">{rows}</dl>' if rows else ""


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_label(i)}</li>" for i in items) + "</ul>"


def _label(value: object) -> str:
    """Any text as HTML text or attribute: escaped, without control characters and direction overrides."""
    text = "".join(c for c in str(value) if c in "\n\t" or not _HIDDEN.match(c))
    return escape(text, quote=True)


_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def _write(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2126; --soft: #5b636e; --line: #dfe3e8; --card: #f6f7f9;
  --good: #006d4e; --check: #8a5a00; --bad: #b03a00; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --ink: #e6e8eb; --soft: #a3abb5; --line: #363c44;
  --card: #1e2227; --good: #4cc9a0; --check: #f0b84a; --bad: #ff8c5a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: 0; }
.small, figcaption, .none { color: var(--soft); font-size: .88rem; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .8rem; } .facts dd { margin: 0; font-weight: 600; }
.verdicts { list-style: none; margin: 0; padding: 0; display: grid; gap: .6rem; }
.verdicts li { display: grid; grid-template-columns: 8.5rem 1fr; gap: .8rem; padding: .7rem .9rem;
  background: var(--card); border-left: 5px solid var(--line); border-radius: 4px; }
.verdicts .note { margin-top: .25rem; white-space: pre-line; }
.light { font-weight: 700; white-space: nowrap; }
li.good { border-color: var(--good); } li.check { border-color: var(--check); } li.bad { border-color: var(--bad); }
li.good .light, .sign.good { color: var(--good); } li.bad .light, .sign.bad { color: var(--bad); }
li.check .light, .check > strong, strong.check, .sign.check { color: var(--check); } .sign.none { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem .38rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; color: var(--soft); font-weight: 600; } tbody th { font-weight: 600; }
.num { text-align: right; white-space: nowrap; } tr.new > * { border-top: 2px solid var(--line); }
table + p, .scroll + p { margin-top: .5rem; }
figure { margin: 0 0 1.8rem; break-inside: avoid; }
img { display: block; width: 100%; max-width: 900px; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .4rem; max-width: 46rem; }
.words { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: 0; font-size: .93rem; }
.words dt { font-weight: 600; max-width: 12rem; } .words dd { margin: 0; min-width: 0; }
.code dd { font-family: ui-monospace, monospace; font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 600px) { .verdicts li, .words { grid-template-columns: 1fr; gap: .2rem; } }
@media print { :root { --page: #fff; --ink: #000; --soft: #444; --line: #bbb; --card: #fff; --good: #006d4e;
  --check: #8a5a00; --bad: #b03a00; } body { font-size: 10.5pt; } main { padding: 0; max-width: none; }
  .scroll { overflow: visible; } table { font-size: 8pt; } tr, .verdicts li { break-inside: avoid; }
  h2 { break-after: avoid; } .verdicts li { border: 1px solid var(--line); border-left-width: 5px; } }
"""
