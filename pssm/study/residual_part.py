"""Residuals in a report: what their tests say in words, and those of a study's reference method."""

from dataclasses import replace
from typing import Any

import numpy as np

from pssm.diagnostics import residuals

ODD = 0.01  # a p-value below which a report says that a test rejects
MEANING = {
    "ljung_box_p": "residuals are correlated in time: something regular is missing in the model",
    "jarque_bera_p": "residuals are not normal: look for outliers",
    "h_p": "the size of the residuals changes along the series",
}
CAPTION = (
    "Standardised one-step residuals, their quantiles beside a normal's, and autocorrelations. A right model leaves "
    "independent standard normal numbers: nineteen in twenty inside of the grey band, on the line, without correlation."
)


def words_on_tests(found: Any) -> list[str]:
    """One sentence for each test that rejects, and for each series of which none does."""
    words = []
    for name, row in found.table.iterrows():
        wrong = [f"{name}: {text} (p {row[test]:.2g})." for test, text in MEANING.items() if row[test] < ODD]
        words += wrong or [f"{name}: no test finds anything wrong with the residuals."]
    return words


def residuals_of(study: Any) -> Any:
    """Residuals of a study's reference method; None without its fit, or without exact predictions."""
    fit = getattr(study.results.get(study.reference), "fit", None)
    if fit is None:
        return None
    try:
        found = residuals(fit, most=50)
    except ValueError:  # a model without exact predictions
        return None
    columns = [study.column] if isinstance(study.column, str) else list(study.column)
    if len(columns) == len(found.names):
        table = found.table.set_axis(columns, axis=0).rename_axis("series")
        found = replace(found, names=tuple(columns), table=table)
    time = np.asarray(study.time)
    return replace(found, time=time) if len(time) == len(found.values) else found
