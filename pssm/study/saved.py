"""A study on disk, so that an interrupted one goes on with what is done, and forecasts can be made from it later."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pssm.diagnostics import load_tree
from pssm.fitting.model_record import model_for
from pssm.models.registry import describe
from pssm.storage.folder import FitFolder, SavedFitError
from pssm.storage.labels import pack_labels, unpack_labels
from pssm.storage.packing import UnpackableError, pack, provenance, unpack
from pssm.study.method_names import METHODS, Settings
from pssm.study.methods import MethodResult

FOLDER = "study"
NUMBERS = ("seconds_compile", "seconds_run")
TEXTS = ("status", "note", "objective")


class Plan(NamedTuple):
    """What was asked of `pssm.compare`.

    Attributes:
        model: the model, with its options.
        y: the model's first argument: data `(time, obs)`, or as the model takes them.
        methods: the methods, in their order.
        settings: how much work each may do.
        leave_future_out: whether one-step forecasts were to be scored.
        time: labels of the time steps.
        future_time: labels of the forecast steps, or None.
        name: what is studied.
        columns: the name of the series, or the names of several.
        finished: the methods that are done, failed or could not run, with what they gave.
        dims: names of the axes of sites.
        u_future: inputs of the forecast steps, or None.
    """

    model: Callable[..., Any]
    y: Any
    methods: tuple[str, ...]
    settings: Settings
    leave_future_out: bool
    time: Any
    future_time: Any
    name: str
    columns: tuple[str, ...]
    finished: dict[str, MethodResult]
    dims: dict[str, tuple[str, ...]] | None = None
    u_future: np.ndarray | None = None

    @property
    def column(self) -> str | tuple[str, ...]:
        """The argument `column` of `compare`."""
        return self.columns[0] if len(self.columns) == 1 else self.columns


class StudyFolder:
    """The folder `study` in the folder of the results: what was asked, and what is done.

    Args:
        out: the folder of the results.
        plan: what is asked; its `finished` is what an earlier run has done.
    """

    def __init__(self, out: str | Path, plan: Plan):
        self.out, self.finished = Path(out), dict(plan.finished)
        arrays: dict[str, np.ndarray] = {}
        name, options, function = describe(plan.model)
        try:
            pack(options, {})
        except UnpackableError:
            name = None
        labels = {"time": pack_labels(plan.time, arrays), "future_time": pack_labels(plan.future_time, arrays)}
        manifest = {
            "kind": "study",
            "model": {"name": name, "options": pack(options, arrays) if name else None, "function": function},
            "arguments": {"y": pack(plan.y, arrays), **labels, "u_future": pack(plan.u_future, arrays)},
            "methods": list(plan.methods),
            "settings": dataclasses.asdict(plan.settings),
            "leave_future_out": plan.leave_future_out,
            "name": plan.name,
            "columns": list(plan.columns),
            "dims": {name: list(axes) for name, axes in (plan.dims or {}).items()},
        }
        self.folder = FitFolder.create(self.out / FOLDER, manifest, force=True)
        self.folder.put("arguments", arrays)
        self._write()

    def add(self, result: MethodResult) -> None:
        """Notes that a method is finished; its tree is in the folder of the results already."""
        self.finished[result.name] = result
        self._write()
        FitFolder.remove(self.checkpoint(result.name))

    def checkpoint(self, method: str, *, fresh: bool = False) -> Path:
        """Where a running method may keep what it has reached; with `fresh`, an older one's is removed."""
        path = self.out / "running" / method.replace(":", "-")
        if fresh:
            FitFolder.remove(path)
        return path

    def _write(self) -> None:
        losses = {n: np.asarray(r.losses) for n, r in self.finished.items() if r.losses is not None}
        if losses:
            self.folder.put("losses", losses)
        done = {
            name: {
                **{n: getattr(r, n) for n in TEXTS},
                **{n: _number(getattr(r, n)) for n in NUMBERS},
                "diagnostics": {n: _number(x) for n, x in r.diagnostics.items()},
                "tree": r.tree is not None,
            }
            for name, r in self.finished.items()
        }
        self.folder.commit(finished=done, provenance=provenance(0.0, None))


def tree_path(out: str | Path, method: str) -> Path:
    """The netCDF file of a method's results."""
    return Path(out) / f"{method.replace(':', '-')}.nc"


def is_study(out: str | Path) -> bool:
    """Whether a folder has a saved study."""
    return (Path(out) / FOLDER / "manifest.json").is_file()


def uses_x64(path: str | Path) -> bool:
    """Whether a study, or a fit, was made with 64-bit arithmetic."""
    manifest = FitFolder.open(Path(path) / FOLDER if is_study(path) else path).manifest
    return bool((manifest.get("provenance") or {}).get("x64"))


def load_plan(out: str | Path, model: Callable[..., Any] | None = None) -> Plan:
    """What was asked of a study, and what is done.

    Args:
        out: the folder of the results.
        model: the model, if it is none of `pssm.models`.

    Raises:
        FileNotFoundError: there is no saved study, or a finished method's file is gone.
        SavedFitError: the study cannot be read.
    """
    out = Path(out)
    folder = FitFolder.open(out / FOLDER)
    m = folder.manifest
    groups = folder.read("arguments")
    losses = {n: x for group in folder.read("losses") for n, x in group.items()}
    if m.get("kind") != "study" or not groups:
        raise SavedFitError(f"`path` {out / FOLDER}: no saved study.")
    try:
        labels = [unpack_labels(m["arguments"][n], groups[0]) for n in ("time", "future_time")]
        finished = {str(n): _result(out, n, entry, losses.get(n)) for n, entry in m["finished"].items()}
        return Plan(
            model_for(m, groups[0], model),
            unpack(m["arguments"]["y"], groups[0]),
            tuple(str(x) for x in m["methods"]),
            Settings(**m["settings"]),
            bool(m["leave_future_out"]),
            *labels,
            str(m["name"]),
            tuple(str(x) for x in m["columns"]),
            finished,
            {str(n): tuple(str(a) for a in axes) for n, axes in (m.get("dims") or {}).items()},
            unpack(m["arguments"].get("u_future"), groups[0]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SavedFitError(f"`path` {out / FOLDER}: the study cannot be read: {error!r}") from None


def _result(out: Path, name: str, entry: dict[str, Any], losses: np.ndarray | None) -> MethodResult:
    if name not in METHODS:
        raise SavedFitError(f"`path` {out / FOLDER}: {str(name)[:40]!r} is no method.")
    result = MethodResult(name, **{n: str(entry[n]) for n in TEXTS}, losses=losses)
    for n in NUMBERS:
        setattr(result, n, _float(entry[n]))
    result.diagnostics = {str(n): _float(x) for n, x in entry["diagnostics"].items()}
    if entry["tree"]:
        result.tree = load_tree(tree_path(out, name))
    return result


def _number(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None


def _float(x: Any) -> float:
    return float("nan") if x is None else float(x)
