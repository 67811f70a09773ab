"""The engine of point estimates: maximum likelihood, and the mode of the posterior, from several starts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from pssm._checks import check_count
from pssm._types import Key
from pssm.fitting.climb import Peak, Rules, ascend, to_the_top
from pssm.fitting.loop import Arrays, Parts, check_more
from pssm.fitting.point import LIKELIHOOD, MODE, PointFit, point_fit
from pssm.fitting.target import Target
from pssm.storage.folder import SavedFitError

DRAWS = 200  # of the prior, for centres and scales of the coordinates
TRIED = 40  # draws among which the starts are chosen
FIELDS = ("starts", "points", "values", "centre", "scale", "ends")


class PointRun(NamedTuple):
    """Where a run is.

    Attributes:
        starts: `(num_starts, size)` in unconstrained coordinates.
        points: where the climbs that are over have ended, `(steps, size)`.
        values: of the objective there.
        rules: of the coordinates.
        peak: the maximum, once all climbs are over.
        seconds: time spent.
    """

    starts: np.ndarray
    points: np.ndarray
    values: np.ndarray
    rules: Rules
    peak: Peak | None = None
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Climbs that are over, and one more for the maximum."""
        return len(self.values) + (self.peak is not None)

    @property
    def empty(self) -> bool:
        """Whether no climb is over."""
        return not np.isfinite(self.values).any()


class PointEngine:
    """Climbs from several starts, then Newton's steps at the best end; arguments as in `pssm.infer.fit_ml`.

    With `traced`, `on` gives an engine for other data of the same shapes that needs no compilation.
    """

    counts, longest, pace, save_every = ("climbs", "num_starts"), 1, 10.0, 5.0
    kind, objective = "ml", LIKELIHOOD
    labels: Any = None

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_starts: int,
        *,
        traced: bool = False,
        target_function: Target | None = None,
    ):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.target = check_count("num_starts", num_starts)
        self.total = self.target + 1
        self.traced, self._function = traced, target_function

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.args, self.kwargs, self.target)  # without the compiled program

    @property
    def function(self) -> Target:
        """What is maximised, compiled at its first use."""
        if self._function is None:
            joint = self.objective == MODE
            self._function = Target(self.model, self.args, self.kwargs, joint=joint, traced=self.traced)
        return self._function

    def on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "PointEngine":
        """The engine for other data of the same shapes."""
        function = self.function.with_arguments(args, kwargs)
        return type(self)(self.model, args, kwargs, self.target, traced=True, target_function=function)

    def start(self, key: Key) -> PointRun:
        """Starts: the median of the prior, and the best of its draws by what is maximised."""
        function = self.function
        draws = function.prior(key, max(DRAWS, self.target))
        centre = np.median(draws, axis=0)
        low, high = np.quantile(draws, [0.16, 0.84], axis=0)
        scale = np.where(high - low > 0, (high - low) / 2, 1.0)
        rules = Rules(centre, scale, _ends(function, centre), function.double)
        tried = draws[: max(TRIED, self.target)] if self.target > 1 else draws[:0]
        order = np.argsort([-function(z)[0] for z in tried], kind="stable")
        starts = np.concatenate([centre[None], tried[order[: self.target - 1]]])
        return PointRun(starts, np.zeros((0, function.size)), np.zeros(0), rules)

    def advance(self, run: PointRun, count: int) -> PointRun:
        """One climb more; the last step is that to the maximum."""
        done = len(run.values)
        if done < self.target:
            z, value = ascend(self.function, run.starts[done], run.rules)
            return run._replace(points=np.append(run.points, z[None], 0), values=np.append(run.values, value))
        return run._replace(peak=self._peak(run))

    def _peak(self, run: PointRun) -> Peak:
        return to_the_top(self.function, run.points[np.nanargmax(run.values)], run.rules)

    def done(self, run: PointRun) -> str:
        """Whether the maximum is there."""
        return "num_starts" if run.peak is not None else ""

    def words(self, run: PointRun) -> str:
        """The best value."""
        return (
            "" if run.empty else f"{'log joint' if self.objective == MODE else 'log-likelihood'} {run.values.max():.6g}"
        )

    def leaves(self, run: PointRun) -> Parts:
        """Starts, ends and the maximum."""
        fields = dict(zip(FIELDS, (run.starts, run.points, run.values, *run.rules[:3]), strict=True))
        parts: Parts = {"state": [{n: np.asarray(x) for n, x in fields.items()}]}
        if run.peak is not None:
            parts["peak"] = [{n: np.asarray(x) for n, x in run.peak._asdict().items()}]
        return parts

    def restore(self, parts: Parts, steps: int, seconds: float) -> PointRun:
        """The run that `leaves` was given."""
        found = parts["state"][0]
        if set(found) != set(FIELDS):
            raise SavedFitError("`path`: the saved fit has no starts.")
        size = self.function.size
        if found["starts"].shape[1:] != (size,):
            raise SavedFitError(f"`path`: the saved fit has {found['starts'].shape[-1]} unknowns, the model {size}.")
        rules = Rules(found["centre"], found["scale"], found["ends"].astype(bool), self.function.double)
        peak = None
        if parts.get("peak"):
            p = parts["peak"][0]
            peak = Peak(p["z"], float(p["value"]), p["gradient"], p["information"], float(p["decrement"]))
        return PointRun(found["starts"], found["points"], found["values"], rules, peak, seconds)

    def settings(self) -> tuple[dict[str, Any], Arrays]:
        """The number of starts."""
        return {"settings": {"num_starts": self.target}}, {}

    @classmethod
    def reopen(cls, saved: Any) -> "PointEngine":
        """The engine of a saved folder."""
        return cls(saved.model, saved.args, saved.kwargs, saved.number("num_starts"))

    def extended(self, run: PointRun, target: int | None) -> "PointEngine":
        """The engine of a run that goes on: it was interrupted, for the starts are chosen at its beginning."""
        check_more(
            "num_starts", self.target if target is None else target, len(run.starts) - (run.peak is None), "starts"
        )
        return type(self)(self.model, self.args, self.kwargs, self.target, target_function=self._function)

    def result(self, run: PointRun, ended: str, seed: Any) -> PointFit:
        """The fit, with its errors and what is odd about it."""
        peak = self._peak(run) if run.peak is None else run.peak
        return point_fit(self, run, peak, ended, seed)


class ModeEngine(PointEngine):
    """The mode of the posterior."""

    kind, objective = "map", MODE


def _ends(function: Target, centre: np.ndarray) -> np.ndarray:
    """`(size, 2)`: whether a coordinate at minus or plus infinity has a finite value of its site."""
    found = np.zeros((len(centre), 2), bool)
    inside = function.values(centre)
    with np.errstate(all="ignore"), jax.debug_nans(False):
        for i, (site, _) in enumerate(function.labels()):
            if inside[site].size != int(np.prod(function.shapes[site])):
                continue  # the coordinates of a simplex or a correlation matrix are none of its entries
            for end, far in enumerate((-np.inf, np.inf)):
                z = centre.copy()
                z[i] = far
                found[i, end] = bool(np.isfinite(function.values(z)[site]).all())
    return found
