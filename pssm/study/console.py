"""What the commands print: a study, a forecast, a texture."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_study(study: Any) -> None:
    """The table of a study, its verdicts, and what to use."""
    console = _console()
    table = Table(title=f"{study.name}, {study.model_name}", title_justify="left")
    shown = ("method", "status", "seconds_compile", "seconds_run", "ess_min", "rhat_max", "elbo", "khat", "coverage90")
    for column in shown:
        table.add_column(
            column.replace("seconds_", "s "), justify="left" if column in ("method", "status") else "right"
        )
    for _, row in study.table.iterrows():
        table.add_row(*[x if isinstance(x, str) else "" if x != x else f"{x:.4g}" for x in (row[c] for c in shown)])
    console.print(table)
    for result in study.results.values():
        console.print(Text(f"{result.name}: {result.verdict}"))
    if study.best:
        console.print(Text(f"\nUse: {study.best}"))


def show_rows(table: Any, title: str, most: int = 24) -> None:
    """The first rows of a table."""
    shown = Table(title=title, title_justify="left")
    for column in table.columns:
        shown.add_column(str(column), justify="left" if column in ("time", "series") else "right")
    for _, row in table.head(most).iterrows():
        shown.add_row(*[f"{x:.5g}" if isinstance(x, float) else str(x).removesuffix(" 00:00:00") for x in row])
    _console().print(shown)
    if len(table) > most:
        print(f"... and {len(table) - most} more in the file")


def show_texture(summary: dict[str, Any], out: Path) -> None:
    """What was learnt of a clip, and how well."""
    size, error = summary["compression"], summary["error_of_a_pixel"]
    print(
        f"{summary['model']['states']} states hold {100 * size['explained']:.1f} % of the variance; the clip has "
        f"{size['ratio']:.2f} times as many numbers as the texture. Spectral radius "
        f"{summary['model']['spectral_radius']:.4f}."
    )
    print(f"Error of a pixel: {error['reconstruction']:.4g}; of the mean frame, {error['mean_frame']:.4g}.")
    if error["forecast"]:
        ahead = len(summary["curves"]["forecast_by_horizon"]["texture"])
        by_name = ", ".join(f"{name} {value:.4g}" for name, value in error["forecast"].items())
        print(f"Error of a forecast over {ahead} frames: {by_name}.")
    for note in summary["notes"]:
        print(f"Note: {note}")
    print(f"Written: {out}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=140)
