"""From numbers to words: which method to trust, and why not."""

import warnings
from typing import Any

import numpy as np
import pandas as pd

from pssm.fitting.corrected import INSTEAD
from pssm.fitting.weights import doubts
from pssm.study.method_names import APPROXIMATE, CHAINS, GUIDE_NAMES, POINTS
from pssm.study.methods import MethodResult

# Thresholds of the verdicts.
RHAT_MAX, ESS_MIN = 1.01, 400.0
LEAST_NODES = 100.0  # effective ones: they are spread evenly, unlike draws
KHAT_GOOD, KHAT_MAX = 0.5, 0.7
SD_CLOSE, SD_OFF = 0.10, 0.25  # relative error of a posterior sd
MOST_ENTRIES = 200  # of a site that is in the table of parameters
MEAN_CLOSE, MEAN_OFF = 0.15, 0.5  # error of a posterior mean in posterior sds


def parameter_rows(results: dict[str, MethodResult], reference: str) -> pd.DataFrame:
    """One row per method and parameter: mean, sd, error and sd ratio against the reference, ESS and R-hat."""
    import arviz as az

    parameters = _parameters(results)
    rows: list[dict[str, Any]] = []
    for name, result in results.items() if parameters else ():
        tree: Any = result.tree
        posterior = tree["posterior"].to_dataset()[parameters]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = az.summary(posterior, kind="all", fmt="wide", round_to="none")
        if name in POINTS:
            table["sd"] = _errors(tree, parameters, len(table))
        for parameter, row in table.iterrows():
            is_chain = name in CHAINS
            rows.append(
                {
                    "method": name,
                    "parameter": str(parameter),
                    "mean": float(row["mean"]),
                    "sd": float(row["sd"]),
                    "ess_bulk": float(row["ess_bulk"]) if is_chain else np.nan,
                    "ess_tail": float(row["ess_tail"]) if is_chain else np.nan,
                    "r_hat": float(row["r_hat"]) if is_chain else np.nan,
                }
            )
    frame = pd.DataFrame(rows, columns=["method", "parameter", "mean", "sd", "ess_bulk", "ess_tail", "r_hat"])
    exact = frame[frame["method"] == reference].set_index("parameter")
    mean, sd = (frame["parameter"].map(exact[c]) if len(exact) else np.nan for c in ("mean", "sd"))
    frame.insert(4, "error_in_sds", (frame["mean"] - mean) / sd)
    frame.insert(5, "sd_ratio", frame["sd"] / sd)
    return frame


def _errors(tree: Any, parameters: list[str], count: int) -> np.ndarray:
    """The standard errors of a point estimate, entry by entry."""
    if "standard_errors" not in tree.children:
        return np.full(count, np.nan)
    errors, posterior = tree["standard_errors"].to_dataset(), tree["posterior"].to_dataset()
    shapes = [posterior[n].shape[2:] for n in parameters]
    return np.concatenate(
        [
            np.ravel(errors[n]) if n in errors else np.full(shape, np.nan).ravel()
            for n, shape in zip(parameters, shapes, strict=True)
        ]
    )


def _parameters(results: dict[str, MethodResult]) -> list[str]:
    """Sites that every method has, that do not run over time, and that are not too large for a table."""
    shared: list[str] | None = None
    for result in results.values():
        tree: Any = result.tree
        posterior, time = tree["posterior"], str(tree.attrs.get("time_axis", "time"))
        names = [
            str(n)
            for n, x in posterior.data_vars.items()
            if not any(d in (time, "time") or d.endswith("_time") for d in map(str, x.dims))
            and x.size <= MOST_ENTRIES * x.sizes["chain"] * x.sizes["draw"]
        ]
        shared = names if shared is None else [n for n in shared if n in names]
    return shared or []


def judge(
    results: dict[str, MethodResult], reference: str, parameters: pd.DataFrame, evidence: tuple[float, str]
) -> pd.DataFrame:
    """Sets verdict and level of every result and returns the table, one row per method."""
    rows = []
    for name, result in results.items():
        own = parameters[parameters["method"] == name]
        numbers = result.diagnostics
        if result.status == "done":
            ess = float(own[["ess_bulk", "ess_tail"]].min().min()) if name in CHAINS else np.nan
            rhat = float(own["r_hat"].max()) if name in CHAINS else np.nan
            if name in APPROXIMATE:  # the autocorrelation before, times the share that the weights leave
                ess = float(np.fmin(ess, numbers.get("effective_draws", np.nan)))
            numbers |= {"ess_min": ess, "rhat_max": rhat}
            if name in POINTS:
                result.level, result.verdict = _judge_point(name, own, numbers, reference)
            elif name in GUIDE_NAMES:
                result.level, result.verdict = _judge_guide(
                    GUIDE_NAMES[name], own, numbers, reference, result.objective
                )
            elif name in APPROXIMATE:
                result.level, result.verdict = _judge_corrected(name, own, numbers, reference)
            else:
                result.level, result.verdict = _judge_chain(name, own, numbers, reference)
        else:
            result.level = "bad" if result.status == "failed" else "check"
            result.verdict = f"No result: {result.status} ({result.note})."
        errors = np.abs(np.asarray(own["error_in_sds"]))
        bound = numbers.get("elbo", np.nan)
        rows.append(
            {
                "method": name,
                "status": result.status,
                "level": result.level,
                "objective": result.objective,
                "seconds_compile": result.seconds_compile,
                "seconds_run": result.seconds_run,
                "ess_min": numbers.get("ess_min", np.nan),
                "ess_per_second": numbers.get("ess_min", np.nan) / result.seconds_run,
                "rhat_max": numbers.get("rhat_max", np.nan),
                "divergences": numbers.get("divergences", np.nan),
                "error_max_sds": float(errors.max()) if name != reference and len(errors) else np.nan,
                "log_likelihood": numbers.get("log_likelihood", np.nan),
                "aic": numbers.get("aic", np.nan),
                "bic": numbers.get("bic", np.nan),
                "elbo": bound,
                "log_evidence": evidence[0],
                "evidence_kind": evidence[1],
                "bound_gap": evidence[0] - bound,
                "khat": numbers.get("khat", np.nan),
                "elpd_lfo": numbers.get("elpd_lfo", np.nan),
                "elpd_lfo_se": numbers.get("elpd_lfo_se", np.nan),
                "coverage90": numbers.get("coverage90", np.nan),
                "verdict": result.verdict,
                "note": result.note,
            }
        )
    return pd.DataFrame(rows)


def _judge_chain(name: str, own: pd.DataFrame, numbers: dict[str, float], reference: str) -> tuple[str, str]:
    problems = []
    if not numbers["rhat_max"] < RHAT_MAX:
        worst = own.loc[own["r_hat"].idxmax(), "parameter"] if own["r_hat"].notna().any() else "a parameter"
        problems.append(f"R-hat of {worst} is {numbers['rhat_max']:.3f} (chains disagree)")
    if not numbers["ess_min"] >= ESS_MIN:
        problems.append(f"only {numbers['ess_min']:.0f} effective draws")
    if numbers.get("divergences", 0) > 0:
        problems.append(f"{numbers['divergences']:.0f} divergent transitions")
    if problems:
        return "check", f"{_first_upper('; '.join(problems))}: draw more before you trust its intervals."
    role = "this is the reference" if name == reference else _agreement(own)
    return (
        "good",
        f"Trust it: chains agree (R-hat {numbers['rhat_max']:.3f}, {numbers['ess_min']:.0f} effective draws); {role}.",
    )


def _judge_corrected(name: str, own: pd.DataFrame, numbers: dict[str, float], reference: str) -> tuple[str, str]:
    """Draws that were corrected by weights: as good as exact where the weights say so, else not to be used."""
    weights = (
        f"weights with k-hat {numbers.get('khat', np.nan):.2f}, {100 * numbers.get('efficiency', 0):.0f} % effective"
    )
    if not numbers.get("exact", 0.0):
        flaws = doubts(numbers.get("khat", np.nan), numbers.get("efficiency", np.nan))
        return "bad", f"Do not use: the correction failed ({'; '.join(flaws)}). {INSTEAD}"
    if name in CHAINS:
        level, words = _judge_chain(name, own, numbers, reference)
        return level, f"{words[:-1]}; exact up to Monte Carlo error ({weights})."
    if not numbers["ess_min"] >= LEAST_NODES:
        return "check", f"Only {numbers['ess_min']:.0f} effective nodes ({weights}): take more."
    role = "this is the reference" if name == reference else _agreement(own)
    return "good", f"Trust it: exact up to Monte Carlo error ({weights}); {role}."


def _judge_point(name: str, own: pd.DataFrame, numbers: dict[str, float], reference: str) -> tuple[str, str]:
    """A point is never the method to use for intervals: its forecasts leave out what the parameters do not say."""
    what = "maximum likelihood" if name == "ml" else "the mode of the posterior"
    if not numbers.get("converged", 0.0):
        return "bad", f"Do not use: {what} was not reached, see the note."
    against = ""
    if reference and own["error_in_sds"].notna().any():
        worst = own.loc[own["error_in_sds"].abs().idxmax()]
        against = f" {worst['parameter']} is furthest from the reference's mean, {abs(worst['error_in_sds']):.2f} sds."
    return "check", (
        f"Check its intervals: one point ({what}, {numbers.get('log_likelihood', np.nan):.2f} nats of log-likelihood), "
        f"whose forecasts take the parameters as known.{against}"
    )


def _agreement(own: pd.DataFrame) -> str:
    worst = own.loc[own["error_in_sds"].abs().idxmax()] if own["error_in_sds"].notna().any() else None
    if worst is None:
        return "nothing to measure it against"
    return (
        f"means within {abs(worst['error_in_sds']):.2f} posterior sds of the reference ({worst['parameter']} furthest)"
    )


def _judge_guide(
    guide: str, own: pd.DataFrame, numbers: dict[str, float], reference: str, objective: str
) -> tuple[str, str]:
    k = numbers.get("khat", np.nan)
    weights = f"no k-hat: {objective}" if np.isnan(k) else f"k-hat {k:.2f}"
    if not reference or not own["sd_ratio"].notna().any():
        if k < KHAT_GOOD:
            return "good", f"{guide} passes its own check ({weights}); no exact method ran beside it."
        level = "bad" if k >= KHAT_MAX else "check"
        return level, f"{guide} is doubtful ({weights}), and no exact method ran beside it."
    spread = own.loc[(own["sd_ratio"] - 1).abs().idxmax()]
    centre = own.loc[own["error_in_sds"].abs().idxmax()]
    off, shift = float(spread["sd_ratio"]) - 1, abs(float(centre["error_in_sds"]))
    word = "understates" if off < 0 else "overstates"
    spread_text = f"{guide} {word} the sd of {spread['parameter']} by {_share(abs(off))}"
    shift_text = f"puts the mean of {centre['parameter']} {shift:{'.2f' if shift < 1e3 else '.1g'}} posterior sds off"
    if abs(off) > SD_OFF or shift > MEAN_OFF or k > KHAT_MAX:
        reasons = []
        if abs(off) > SD_OFF:
            reasons.append(spread_text)
        if shift > MEAN_OFF:
            reasons.append(shift_text if reasons else f"{guide} {shift_text}")
        if k > KHAT_MAX:
            reasons.append(
                f"its weights are heavy-tailed ({weights})" if reasons else f"{guide} has {weights} (over 0.7)"
            )
        return "bad", f"{'; '.join(reasons)}: do not use."
    if abs(off) > SD_CLOSE or shift > MEAN_CLOSE or k > KHAT_GOOD:
        return "check", f"{spread_text} and {shift_text} ({weights}): good for means, check its intervals."
    return "good", (
        f"{guide} agrees with the reference (sds within {100 * abs(off):.0f} %, means within {shift:.2f} sds, "
        f"{weights}): safe to use here."
    )


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _share(x: float) -> str:
    """A share in per cent; where it is no more than absurd, as what it is."""
    return f"{100 * x:.0f} %" if x < 10 else "more than 1000 %"
