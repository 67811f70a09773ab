"""The command line: `pssm compare`, `forecast`, `resume`, `texture`, lists. Wrong input: a message and exit code 2."""

import argparse
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pssm.study.commands import Tools, add_commands


class UsageError(Exception):
    """Something the user can mend; its text is all that is shown."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 2 wrong input or interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (UsageError, OSError, ValueError, TypeError, ImportError) as error:
        print(f"pssm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pssm: interrupted before anything was finished", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pssm",
        description="State-space models in NumPyro: compare inference methods on a time series, or learn a video.",
    )
    from pssm.study.model_arguments import add_model, model_options
    from pssm.study.series_arguments import add_series

    commands = parser.add_subparsers(required=True, metavar="command")
    compare = commands.add_parser(
        "compare",
        help="run several inference methods on one series and write a report",
        description="Runs NUTS and SVI on one model of one series, and writes a table, ArviZ files and an HTML report.",
    )
    add_series(compare)
    add_model(compare)
    compare.add_argument(
        "--methods",
        default="nuts,nuts:states,svi:mvn,svi:normal",
        help="comma-separated; the first exact one is the reference; default %(default)s",
    )
    compare.add_argument("--out", help="folder for the results; default results/<data>-<model>")
    compare.add_argument("--force", action="store_true", help="write into a folder that exists, over its files")
    compare.add_argument("--seed", type=int, default=0, help="fixes every random choice; default 0")
    compare.add_argument("--horizon", type=int, help="forecast steps; default two seasons, or a tenth of the series")
    compare.add_argument("--warmup", type=int, default=1000, help="NUTS warm-up steps per chain; default 1000")
    compare.add_argument("--samples", type=int, default=1000, help="NUTS draws per chain; default 1000")
    compare.add_argument("--chains", type=int, default=4, help="NUTS chains; default 4")
    compare.add_argument("--steps", type=int, default=5000, help="SVI steps; default 5000")
    compare.add_argument(
        "--budget",
        type=float,
        default=120.0,
        help="seconds each method may be expected to take; default 120; 0: no limit",
    )
    compare.add_argument("--x64", action="store_true", help="64-bit arithmetic")
    compare.add_argument("--quiet", action="store_true", help="no progress bars")
    compare.set_defaults(run=_compare)
    _add_texture(commands)
    _add_saved(commands)
    add_commands(commands, Tools(model_options, _check_out))
    commands.add_parser("datasets", help="list the embedded data sets").set_defaults(run=_datasets)
    commands.add_parser("models", help="list the models").set_defaults(run=_models)
    return parser


def _add_saved(commands: Any) -> None:
    forecast = commands.add_parser(
        "forecast",
        help="forecast from saved results",
        description="Forecasts from the results of `pssm compare`, or from a saved fit, without running it again.",
    )
    forecast.add_argument("folder", help="results of `pssm compare`, or of pssm.infer.save")
    forecast.add_argument("--horizon", type=int, help="steps; default as in the study, or a tenth of the series")
    forecast.add_argument("--method", help="which of the study's methods; default the one it recommends")
    forecast.add_argument("--out", help="folder for forecast.csv and forecast.png; default <folder>/forecast")
    forecast.add_argument("--force", action="store_true", help="write into a folder that exists, over its files")
    forecast.add_argument("--seed", type=int, default=0, help="fixes the random draws; default 0")
    forecast.set_defaults(run=_forecast)
    resume = commands.add_parser(
        "resume",
        help="go on with an interrupted study or fit",
        description="Runs the methods of an interrupted `pssm compare` that are not finished, or goes on with a fit "
        "that has a checkpoint, in the same folder.",
    )
    resume.add_argument("folder", help="results of `pssm compare`, or a checkpoint of fit_nuts or fit_svi")
    resume.add_argument("--quiet", action="store_true", help="no progress bars")
    resume.set_defaults(run=_resume)


def _add_texture(commands: Any) -> None:
    texture = commands.add_parser(
        "texture",
        help="learn a video clip as a linear dynamical system, and synthesise more of it",
        description="Fits a dynamic texture to a clip and writes a synthesised clip, figures, errors and the model.",
    )
    texture.add_argument("clip", help="a video or gif, a folder of images, or an array (.npy, .npz)")
    texture.add_argument("--states", type=int, help="size of the state; default 30, fewer for short clips")
    texture.add_argument(
        "--method", default="svd", help="svd (closed form) or em (exact likelihood with a weak prior); default svd"
    )
    texture.add_argument("--noise", type=int, help="directions of the transition's noise; default all")
    texture.add_argument("--frames", type=int, help="use at most so many frames")
    texture.add_argument("--every", type=int, default=1, help="use one frame in so many; default 1")
    texture.add_argument(
        "--size",
        type=int,
        default=160,
        help="longest side in pixels, reached by whole blocks; default 160; 0: as it is",
    )
    texture.add_argument("--grey", action="store_true", help="brightness in place of colours")
    texture.add_argument("--fps", type=float, help="frames a second; default what the file says, or 25")
    texture.add_argument(
        "--holdout", type=float, default=0.2, help="share of the clip, its end, that is forecast; default 0.2; 0: none"
    )
    texture.add_argument("--length", type=int, help="frames to synthesise; default as many as the clip has")
    texture.add_argument("--format", choices=("mp4", "gif"), help="of the synthesised clip; default mp4 if possible")
    texture.add_argument("--out", help="folder for the results; default results/<clip>-texture")
    texture.add_argument("--force", action="store_true", help="write into a folder that exists, over its files")
    texture.add_argument("--seed", type=int, default=0, help="fixes the synthesis; default 0")
    texture.add_argument("--quiet", action="store_true", help="no word on what goes on")
    texture.set_defaults(run=_texture)


def _compare(a: argparse.Namespace) -> int:
    import numpy as np

    from pssm.study.model_arguments import model_options
    from pssm.study.series_arguments import input_options, read_series, season_of

    _check_counts(a, "warmup", "samples", "chains", "steps", "horizon", "order", "harmonics", "states")
    if not 0 <= a.budget < float("inf"):
        raise UsageError(f"`--budget` must be a number of seconds, 0 or more; got {a.budget}.")
    series = read_series(a)
    out = Path(a.out) if a.out else Path("results") / f"{series.name}-{a.model}"
    _check_out(out, a.force)
    methods = [m.strip() for m in a.methods.split(",") if m.strip()]

    import jax

    if a.x64:
        jax.config.update("jax_enable_x64", True)
    import pssm
    from pssm import models
    from pssm._checks import check_choice
    from pssm.study.method_names import METHODS

    check_choice("--model", a.model, models.NAMES)
    for method in methods:
        check_choice("--methods", method, METHODS)
    inputs, u_future, horizon = input_options(series, a.model, a.horizon)
    options = {**model_options(a, series), **inputs}
    if horizon is None:
        season = season_of(a, series)
        horizon = round(2 * season) if season else max(10, len(series.y) // 10)
    study = pssm.compare(
        a.model,
        np.asarray(series.y).T if a.model == "panel" else np.asarray(series.y),  # a panel's series stand in rows
        methods,
        seed=a.seed,
        num_warmup=a.warmup,
        num_samples=a.samples,
        num_chains=a.chains,
        svi_steps=a.steps,
        horizon=horizon,
        budget=a.budget or None,
        time=series.time,
        future_time=None if series.future_time is None else series.future_time[:horizon],
        u_future=u_future,
        name=series.name,
        column=series.columns,
        out=out,
        progress=not a.quiet,
        **options,
    )
    study.warnings[:0] = series.notes
    return _report(study, out)


def _report(study: Any, out: Path) -> int:
    from pssm.study.console import show_study

    page = study.report(out)
    show_study(study)
    print(f"\nReport: {page}")
    if study.interrupted:
        print("pssm: interrupted; what was finished is in the report", file=sys.stderr)
        return 2
    if all(r.status != "done" for r in study.results.values()):
        print("pssm: no method finished; the report says why", file=sys.stderr)
        return 2
    return 0


def _saved_folder(path: str) -> Path:
    """The folder, with 64-bit arithmetic on if it was on."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"`folder` {path!r} is not there: no such folder.")
    import jax

    from pssm.study.saved import is_study, uses_x64

    if not is_study(folder) and not (folder / "manifest.json").exists():
        raise UsageError(f"`folder` {path!r} has no saved study and no saved fit.")
    jax.config.update("jax_enable_x64", uses_x64(folder))
    return folder


def _forecast(a: argparse.Namespace) -> int:
    _check_counts(a, "horizon")
    folder = _saved_folder(a.folder)
    out = Path(a.out) if a.out else folder / "forecast"
    _check_out(out, a.force)
    from pssm.study.console import show_rows
    from pssm.study.forecasts import best_method, forecast_saved, write_forecast

    method = a.method or best_method(folder)
    table, tree, method = forecast_saved(folder, a.horizon, method=method, seed=a.seed)
    write_forecast(table, tree, f"forecast, {method}", out)
    show_rows(table, f"Forecast by {method}: {len(table)} rows")
    print(f"\nWritten: {out / 'forecast.csv'}, {out / 'forecast.png'}")
    return 0


def _resume(a: argparse.Namespace) -> int:
    folder = _saved_folder(a.folder)
    from pssm.study.saved import is_study

    if is_study(folder):
        from pssm.study.forecasts import resume_study

        return _report(resume_study(folder, progress=not a.quiet), folder)
    from pssm.infer import record_of, resume

    fit = record_of(resume(folder, progress_bar=not a.quiet))
    draws = next(iter(fit.draws(1).values())).shape[1]
    print(f"Done: {draws} draws a chain" if fit.losses is None else f"Done: {len(fit.losses)} steps")
    return 0


def _check_counts(a: argparse.Namespace, *names: str) -> None:
    for name in names:
        value = getattr(a, name)
        if name == "order" and isinstance(value, tuple):
            continue  # (p, d, q), which may be zero
        if value is not None and min(value if isinstance(value, tuple) else (value,)) < 1:
            raise UsageError(f"`--{name}` must be at least 1; got {value}.")


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise UsageError(f"`--out` {out} exists already; nothing was changed. Choose another folder, or add --force.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"`--out` {out} is a file, not a folder.")


def _texture(a: argparse.Namespace) -> int:
    _check_counts(a, "states", "noise", "frames", "every", "length")
    if a.size < 0:
        raise UsageError(f"`--size` must be a number of pixels, or 0; got {a.size}.")
    if not 0 <= a.holdout < 1:
        raise UsageError(f"`--holdout` must be a share, 0 or more and less than 1; got {a.holdout}.")
    if a.fps is not None and not 0 < a.fps < float("inf"):
        raise UsageError(f"`--fps` must be a positive number; got {a.fps}.")
    clip = Path(a.clip)
    if not clip.exists():
        raise UsageError(f"`clip` {a.clip!r} is not there: no such file or folder.")
    out = Path(a.out) if a.out else Path("results") / f"{clip.resolve().stem}-texture"
    _check_out(out, a.force)

    import jax

    from pssm._checks import check_choice
    from pssm.learning import LikelihoodFellError, MissingExtraError
    from pssm.learning.video import has_video
    from pssm.study.console import show_texture
    from pssm.study.texture import Settings, study_texture, write_study

    check_choice("--method", a.method, ("svd", "em"))
    if a.format == "mp4" and not has_video():
        raise UsageError('`--format mp4` needs PyAV: pip install "pssm-numpyro[video]". Or take --format gif.')
    settings = Settings(
        num_states=a.states,
        method=a.method,
        num_noise=a.noise,
        num_frames=a.frames,
        every=a.every,
        size=a.size or None,
        grey=a.grey,
        holdout=a.holdout,
        length=a.length,
        seed=a.seed,
        fps=a.fps,
        video_format=a.format,
    )
    try:
        with jax.enable_x64(True):  # the states of a clip have a wide range, and cost little
            say = (lambda text: None) if a.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
            study = study_texture(clip, settings, say)
            summary = write_study(study, a.clip, settings, out)
    except (LikelihoodFellError, MissingExtraError, OSError) as error:
        raise UsageError(str(error)) from None
    show_texture(summary, out)
    return 0


def _datasets(_: argparse.Namespace) -> int:
    from pssm import datasets

    for name, length, missing, what in datasets.available():
        print(f"{name:15s} {length:5d} steps {missing:3d} missing        {what}")
    for name, count, longest, what in datasets.available_sequences():
        print(f"{name:15s} {count:5d} sequences of up to {longest:3d}  {what}; `pssm.datasets.load_sequences`")
    return 0


def _models(_: argparse.Namespace) -> int:
    from pssm import models

    for name in models.NAMES:
        print(f"{name:20s} {(inspect.getdoc(getattr(models, name)) or '').splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
