"""The page of results, from the files that `run.py` has written: tables and two figures.

python docs/experiments/report.py [--out results/experiments] [--page docs/experiments/results.md]
                                  [--images docs/images]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

METHODS = {
    "truth": "true parameters",
    "exact": "maximum likelihood",
    "chain": "chain",
    "diagonal": "diagonal",
    "deep_kalman": "deep Kalman",
    "moment_matched": "moment-matched",
    "moment_matched_causal": "moment-matched, causal",
}
MIXERS = {"chain": "GRU", "chain_lstm": "LSTM", "chain_s5": "S5", "chain_attention": "attention"}
COLORS = dict(zip(METHODS, ("#222222", "#767676", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00"), strict=True))
MARKS = dict(zip(METHODS, "_Pos^Dv", strict=True))
SHORT = {
    "lds": "linear",
    "van_der_pol": "Van der Pol, Gaussian",
    "van_der_pol_poisson": "Van der Pol, Poisson",
    "ring_attractor": "ring attractor",
    "pendulum": "pendulum, pixels",
    "bouncing_ball": "bouncing ball, pixels",
    "thalamus": "thalamus",
    "grasshopper": "grasshopper",
}
Results = dict[str, dict[str, dict[str, Any]]]


def read(folder: Path) -> Results:
    """Results by experiment and method, in the order of the tables."""
    found: Results = {}
    for name in SHORT:
        own = {m: folder / f"{name}.{m}.json" for m in (*METHODS, *MIXERS)}
        here = {m: json.loads(path.read_text()) for m, path in own.items() if path.exists()}
        if here:
            found[name] = here
    return found


def number(x: Any, digits: int) -> str:
    """A number, or a dash."""
    return "–" if x is None else f"{x:.{digits}f}" if np.isfinite(x) else "not finite"


def table(own: dict[str, dict[str, Any]]) -> list[str]:
    """The rows of one experiment."""
    states = any("state_r2" in d for d in own.values())
    last = len(next(iter(own.values()))["forecast_r2"])
    steps = sorted({1, (last + 1) // 2, last})
    score = "state R2 | " if states else "forecast gain | "
    head = f"| method | objective | evidence | {score}R2, {', '.join(map(str, steps))} ahead"
    head += " | radius | mean Q | compile s | train s |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for method, label in METHODS.items():
        if method not in own:
            continue
        d = own[method]
        kind = {"surrogate": " (surrogate)", "lower bound": " (bound)", "exact": " (exact)"}.get(
            d.get("bound_kind"), ""
        )
        skipped = d.get("steps_not_finite", 0)
        cells = [label + (f", {skipped} steps not finite" if skipped else ""), number(d.get("bound"), 2) + kind]
        low = d.get("ess_low", 0.0)
        cells += [number(d["evidence"], 2) + (f" ({100 * low:.0f} % low)" if low else "")]
        cells += [number(np.mean(d["state_r2"]), 3) if states else number(d["forecast_gain"], 4)]
        cells += [", ".join(number(d["forecast_r2"][k - 1], 3) for k in steps)]
        q = number(np.mean(d["q"]), 2 if np.mean(d["q"]) >= 0.1 else 5)
        cells += [number(d["radius"], 3), q, number(d.get("compile_seconds"), 0), number(d.get("train_seconds"), 0)]
        lines.append("| " + " | ".join(cells) + " |")
    if states:
        names = len(next(iter(own.values()))["state_r2"])
        lines += ["", f"R2 is the mean over {names} true states."]
    return lines


def mixers(own: dict[str, dict[str, Any]]) -> list[str]:
    """The encoders' mixers, side by side."""
    lines = [
        "| mixer | weights | bound | evidence | state R2 | forecast R2, mean | compile s | train s |",
        "|" + "---|" * 8,
    ]
    for method, label in MIXERS.items():
        if method in own:
            d = own[method]
            cells = [label, f"{d['encoder_weights']:,}", number(d["bound"], 2), number(d["evidence"], 2)]
            cells += [number(np.mean(d["state_r2"]), 3), number(np.mean(d["forecast_r2"]), 3)]
            cells += [number(d["compile_seconds"], 0), number(d["train_seconds"], 0)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdicts(results: Results) -> list[str]:
    """The chain's forecasts beside the others', averaged over the horizon."""
    others = [m for m in METHODS if m not in ("truth", "exact", "chain")]
    shown = ("truth", "chain", *others)
    head = "| experiment | " + " | ".join(METHODS[m] for m in shown) + " | chain minus best surrogate |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for name, own in results.items():
        mean = {m: float(np.mean(own[m]["forecast_r2"])) for m in METHODS if m in own}
        published = [mean[m] for m in others if m.startswith("moment") and m in mean]
        apart = mean["chain"] - max(published) if published and "chain" in mean else None
        cells = [SHORT[name], *(number(mean.get(m), 3) for m in shown)]
        lines.append("| " + " | ".join([*cells, "–" if apart is None else f"{apart:+.3f}"]) + " |")
    return lines


def missing(results: Results) -> list[str]:
    """What has not been run, in words."""
    found = []
    for name, title in SHORT.items():
        own = results.get(name, {})
        wanted = [m for m in METHODS if m not in ("truth", "exact")]
        gone = [METHODS[m] for m in wanted if m not in own]
        gone += [MIXERS[m] for m in MIXERS if name == "van_der_pol_poisson" and m != "chain" and m not in own]
        if gone:
            found.append(f"{title} ({'all' if not own else ', '.join(gone)})")
    return ["", f"Not run: {'; '.join(found)}."] if found else []


def page(results: Results) -> str:
    """The page, in Markdown."""
    first = next(iter(next(iter(results.values())).values()))
    size, machine = first["size"], first["machine"]
    seconds = {name: sum(d["seconds"] for d in own.values()) for name, own in results.items()}
    loads = [d["machine"]["load"] for own in results.values() for d in own.values()]
    lines = [
        f"{size['train']} trials of {size['steps']} steps for training, {size['held']} held out (counts: what there "
        f"is). Forecasts begin after step {size['cut']}. Layers of {size['width']}; {size['draws']} paths. "
        f"jax {machine['jax']}, numpyro {machine['numpyro']}, {machine['cores']} cores, load average {min(loads):g} to "
        f"{max(loads):g}.",
        *missing(results),
        "",
        "### Forecasts, mean R2 over the horizon",
        "",
        *verdicts(results),
    ]
    for name, own in results.items():
        one = next(iter(own.values()))
        lines += ["", f"### {one['title'][0].upper()}{one['title'][1:]}", ""]
        own_size = one["size"]
        updates = f"{own_size['updates']} updates with {own_size['batch']} trials, step size {own_size['rate']:g}"
        lines += [f"Known to the model: {one['known']}. {updates}. {seconds[name] / 60:.0f} minutes in all.", ""]
        lines += table(own)
        if "chain_s5" in own or "chain_lstm" in own:
            lines += ["", "The mixers of the chain's encoder, widths chosen for about equal numbers of weights:", ""]
            lines += mixers(own)
    return "\n".join(lines) + "\n"


def clean(ax: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e3e3e3", lw=0.8)
    ax.set_axisbelow(True)


def legend(figure: Any, handles: list[Any], labels: list[str], columns: int) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2 * columns, 4), frameon=False)


def parameters_figure(results: Results, path: Path) -> None:
    """Learned spectral radius and Q beside the truth."""
    from matplotlib.figure import Figure

    known = [name for name, own in results.items() if "truth" in own]
    if not known:
        return
    figure = Figure(figsize=(2.9 * len(known), 5.2), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(known), squeeze=False)
    for column, name in enumerate(known):
        own = results[name]
        shown = [m for m in METHODS if m in own and m != "truth"]
        for row, (key, label) in enumerate((("radius", "spectral radius"), ("q", "mean Q / true Q"))):
            ax = axes[row, column]
            truth = np.mean(own["truth"][key])
            unit = truth if row else 1.0
            ax.axhline(truth / unit, color="#222222", lw=1.2)
            values = [np.mean(own[m][key]) / unit for m in shown]
            for k, (m, value) in enumerate(zip(shown, values, strict=True)):
                if np.isfinite(value):
                    ax.plot(k, value, MARKS[m], color=COLORS[m], ms=8, label=METHODS[m])
            ax.set_xlim(-0.7, len(shown) - 0.3)
            ax.set_xticks([])
            clean(ax)
            finite = [v for v in values if np.isfinite(v)]
            if row:
                ax.set_yscale("log")
                ax.set_ylim(min(0.4, *finite) / 1.2, max(2.5, *finite) * 1.2)
                ticks = [t for t in (0.01, 0.1, 0.5, 1, 2, 5, 10, 100) if ax.get_ylim()[0] < t < ax.get_ylim()[1]]
                ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
                ax.minorticks_off()
            else:
                ax.set_ylim(min(truth - 0.03, *finite) - 0.01, max(truth + 0.03, *finite) + 0.01)
                ax.set_title(SHORT[name], fontsize=11)
            if not column:
                ax.set_ylabel(label)
    handles = {t: h for ax in axes.ravel() for h, t in zip(*ax.get_legend_handles_labels(), strict=True)}
    line = axes[0, 0].plot([], [], color="#222222", lw=1.2)
    figure.legend(
        [*line, *handles.values()],
        ["truth", *handles],
        loc="outside lower center",
        ncols=min(2 * len(known), 4),
        frameon=False,
    )
    figure.savefig(path)


def forecasts_figure(results: Results, path: Path) -> None:
    """R2 over the horizon."""
    from matplotlib.figure import Figure

    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.6 * rows + 0.6), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(results) :]:
        ax.remove()
    handles: dict[str, Any] = {}
    for k, (ax, (name, own)) in enumerate(zip(axes, results.items(), strict=False)):
        values = []
        for m in METHODS:
            if m in own:
                y = np.asarray(own[m]["forecast_r2"], float)
                style = {"lw": 2.2, "ls": "--"} if m == "truth" else {"lw": 1.5}
                (handles[METHODS[m]],) = ax.plot(1 + np.arange(len(y)), y, color=COLORS[m], **style)
                values.append(y[np.isfinite(y)])
        low = min((v.min() for v in values if v.size), default=0.0)
        ax.set_ylim(max(low, -0.6) - 0.05, 1.05 if "state_r2" in next(iter(own.values())) else None)
        ax.set_title(SHORT[name], fontsize=11)
        clean(ax)
        if k % columns == 0:
            ax.set_ylabel("R2 of forecasts")
        if k >= len(results) - columns:
            ax.set_xlabel("steps ahead")
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(2 * columns, 4), frameon=False
    )
    figure.savefig(path)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/experiments"))
    parser.add_argument("--page", type=Path, default=Path("docs/experiments/results.md"))
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    results = read(args.out)
    if not results:
        raise SystemExit(f"{args.out} has no results; run docs/experiments/run.py first.")
    for folder in (args.page.parent, args.images):
        folder.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(results))
    parameters_figure(results, args.images / "experiments_parameters.png")
    forecasts_figure(results, args.images / "experiments_forecasts.png")
    print(f"{args.page}: {sum(len(own) for own in results.values())} results")


if __name__ == "__main__":
    main()
