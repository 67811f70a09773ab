"""A time series with its labels, as files and embedded data sets give it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Shaped


@dataclass(frozen=True, eq=False)
class Series:
    """A time series with its labels: one row per time step, one column per observed variable.

    Attributes:
        name: short name; the file's name without its ending for a user's file.
        y: values `(time, n_obs)` in `units`; NaN = missing.
        time: label of each row `(time,)`: dates (datetime64) or numbers, strictly increasing.
        columns: name of each column of `y`.
        units: units of `y` in words; empty where unknown.
        description: the measured quantity.
        period: observations per seasonal cycle, `None` where there is none or it is unknown.
        source: where the data come from.
        notes: how a file was read, where it could have been read in another way.
        inputs: names of the regressors.
        u: regressors `(time, input)`; None where none were asked for.
        u_future: regressors of the steps after the series `(horizon, input)`, from the rows behind its last value.
        future_time: labels of these steps.
    """

    name: str
    y: Float64[np.ndarray, "time n_obs"]
    time: Shaped[np.ndarray, " time"]
    columns: tuple[str, ...]
    units: str
    description: str
    period: float | None
    source: str
    notes: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    u: Float64[np.ndarray, "time n_input"] | None = None
    u_future: Float64[np.ndarray, "horizon n_input"] | None = None
    future_time: Shaped[np.ndarray, " horizon"] | None = None
