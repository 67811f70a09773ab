"""Pieces of the report's HTML: sections, tables, numbers and labels, everything escaped."""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from pssm.study.report_text import CSS, GLOSSARY, POLICY

_NO_VALUE = '<span class="none">–</span>'
# How a column is called, what it means, and how its numbers are written.
_COLUMNS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "method": ("method", "", str),
    "status": ("status", "", str),
    "seconds_compile": ("compile", "seconds to trace and compile", lambda v: seconds(v)),
    "seconds_run": ("run", "seconds to run, without compiling", lambda v: seconds(v)),
    "ess_min": ("ESS, smallest", "effective sample size of the worst parameter", lambda v: f"{v:,.0f}"),
    "ess_bulk": ("ESS", "effective sample size", lambda v: f"{v:,.0f}"),
    "ess_per_second": ("ESS per second", "smallest effective sample size by second", lambda v: number(v, 3)),
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


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page that stands alone: styles inside, nothing fetched. `title` and parts are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style></head>\n<body>\n<main>"
        + "\n".join(parts)
        + "</main>\n</body></html>\n"
    )


def facts_list(facts: Iterable[tuple[str, str]]) -> str:
    """Names and values (HTML) side by side, for the head of a page."""
    return '<dl class="facts">' + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts) + "</dl>"


def png_of(figure: Any) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # an emoji in a label
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def section(anchor: str, heading: str, content: str) -> str:
    """A section with a heading; nothing where there is no content."""
    return f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>' if content else ""


def figure_html(png: bytes, alt: str, caption: str) -> str:
    """A picture, inside the page, with its caption."""
    source = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escaped(alt)}" src="data:image/png;base64,{source}">'
    return f"<figure>{image}<figcaption>{escaped(caption)}</figcaption></figure>"


def glossary() -> str:
    """What the numbers mean."""
    return '<dl class="words">' + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in GLOSSARY.items()) + "</dl>"


def settings_list(settings: Mapping[str, Any]) -> str:
    """Settings as a list of names and values."""

    def show(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{escaped(k)} {show(v)}" for k, v in value.items())
        if isinstance(value, list | tuple):
            return ", ".join(show(v) for v in value)
        return escaped(value)

    rows = "".join(f"<dt>{escaped(str(k).replace('_', ' '))}</dt><dd>{show(v)}</dd>" for k, v in settings.items())
    return f'<dl class="words code">{rows}</dl>' if rows else ""


def bullet_list(items: Iterable[str]) -> str:
    """A plain list of texts."""
    return "<ul>" + "".join(f"<li>{escaped(i)}</li>" for i in items) + "</ul>"


def escaped(value: object) -> str:
    """Any text as HTML text or attribute: escaped, without control characters and direction overrides."""
    text = "".join(c for c in str(value) if c in "\n\t" or not _HIDDEN.match(c))
    return escape(text, quote=True)


_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


# Tables


def table(rows: list[dict[str, Any]], cells: Mapping[str, Callable] | None = None, group: str = "") -> str:
    """An HTML table of `rows`; columns without a single value are left out."""
    columns = [c for c in dict.fromkeys(k for row in rows for k in row) if any(not is_missing(r.get(c)) for r in rows)]
    if not columns:
        return ""
    numeric = {c for c in columns if all(is_number(r.get(c)) or is_missing(r.get(c)) for r in rows)}
    head = ""
    for c in columns:
        heading, meaning, _ = _COLUMNS.get(c, (str(c).replace("_", " "), "", str))
        hint = f' title="{escaped(meaning)}"' if meaning else ""
        head += f'<th scope="col"{_number_class(c in numeric)}{hint}>{escaped(heading)}</th>'
    body = ""
    for i, row in enumerate(rows):
        new = group and i and row.get(group) != rows[i - 1].get(group)
        body += '<tr class="new">' if new else "<tr>"
        for j, c in enumerate(columns):
            value = row.get(c)
            text = (cells or {}).get(c, lambda v, c=c: cell_text(c, v))(value)
            tag = 'th scope="row"' if j == 0 else "td"
            body += f"<{tag}{_number_class(c in numeric)}>{text}</{tag[:2]}>"
        body += "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number_class(numeric: bool) -> str:
    return ' class="num"' if numeric else ""


def records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame as dicts; a named index (`method`) becomes a column."""
    if frame is None or not len(frame):
        return []
    frame = frame.reset_index() if any(n is not None for n in frame.index.names) else frame
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def cell_text(column: str, value: Any) -> str:
    """A value as HTML: numbers as their column wants them, a dash where there is none."""
    if is_missing(value):
        return _NO_VALUE
    if not is_number(value):
        return escaped(value)
    if column in _COLUMNS and _COLUMNS[column][2] is not str and np.isfinite(value):
        return _COLUMNS[column][2](float(value)).replace("-", "−")
    return number(value).replace("-", "−")


def is_number(value: Any) -> bool:
    """True for whole and real numbers, Python's and NumPy's."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def is_missing(value: Any) -> bool:
    """True for None, NaN, NaT, NA and the empty text."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return value == "" if isinstance(value, str) else is_number(value) and bool(np.isnan(value))


def number(value: int | float | np.number, digits: int = 4) -> str:
    """Three or four significant digits, whole numbers as they are."""
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if not np.isfinite(value):
        return "∞" if value > 0 else "-∞" if value < 0 else "–"
    if 10.0 ** (digits - 1) <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def seconds(value: int | float | np.number) -> str:
    """A duration."""
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def moment(value: Any) -> str:
    """A time label: a date without its midnight, a whole number without its decimals."""
    if isinstance(value, np.datetime64):
        return str(value.astype("datetime64[s]")).replace("T00:00:00", "").replace("T", " ")
    return escaped(f"{value:g}" if isinstance(value, float | np.floating) else value)
