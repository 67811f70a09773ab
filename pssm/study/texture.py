"""What the command `pssm texture` does: a clip in, a dynamic texture and its figures out."""

import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pssm.filters import simulate
from pssm.learning import DynamicTexture
from pssm.learning.textures import PIECE
from pssm.learning.video import Clip, as_image, has_video, read_frames, write_frames
from pssm.study import texture_plots as plots

FORMATS = ("mp4", "gif")
SHOWN = 320  # a written clip or image is enlarged, by whole factors, up to this many pixels
FIGURES = ("mean.png", "components.png", "spectrum.png", "errors.png", "frames.png")
FILES = (*FIGURES, "texture.npz", "summary.json", *(f"synthetic.{kind}" for kind in FORMATS))


@dataclass(frozen=True)
class Settings:
    """The options of the command.

    Attributes:
        num_states: size of the state; None: 30, fewer for short clips.
        method: "svd" or "em".
        num_noise: directions of the transition's noise; None: all.
        num_frames: frames kept of the clip; None: all.
        every: one frame in so many is kept.
        size: longest side in pixels; None: as it is.
        grey: brightness in place of colours.
        holdout: share of the frames, the last ones, that are forecast.
        length: frames to synthesise; None: as many as the clip has.
        seed: fixes the synthesis.
        fps: frames a second; None: what the file says, or 25.
        video_format: "mp4" or "gif"; None: mp4 where PyAV is installed.
    """

    num_states: int | None = None
    method: str = "svd"
    num_noise: int | None = None
    num_frames: int | None = None
    every: int = 1
    size: int | None = None
    grey: bool = False
    holdout: float = 0.2
    length: int | None = None
    seed: int = 0
    fps: float | None = None
    video_format: str | None = None


@dataclass
class TextureStudy:
    """A fitted clip and how well the texture shows it. Errors are root mean squares over the values of a frame.

    Attributes:
        clip: the frames that were fitted.
        texture: the texture of the whole clip.
        states: smoothed states of the clip, `(time, state)`.
        reconstruction: error of each frame, `(time,)`.
        deviation: the same for the mean frame in place of the texture, `(time,)`.
        by_components: error of the whole clip with 0, 1, ..., `state` components.
        extrapolation: errors of each held-out frame by "texture", "last frame" and "mean frame"; empty without any.
        fps: frames a second.
        seconds: what reading and fitting took.
        notes: what the user should know.
    """

    clip: Clip
    texture: DynamicTexture
    states: np.ndarray
    reconstruction: np.ndarray
    deviation: np.ndarray
    by_components: np.ndarray
    extrapolation: dict[str, np.ndarray]
    fps: float
    seconds: dict[str, float]
    notes: list[str]


def study_texture(path: str | Path, settings: Settings, say: Callable[[str], None] = lambda text: None) -> TextureStudy:
    """Reads a clip, fits it and measures errors; `say` is told what goes on.

    Raises:
        FileNotFoundError: `path` is not there.
        MissingExtraError: a video, and PyAV is not installed.
        ValueError: no clip, a clip that does not move, or too short for the states and the share held out.
    """
    started = time.perf_counter()
    clip = read_frames(
        path, grey=settings.grey, num_frames=settings.num_frames, every=settings.every, size=settings.size
    )
    frames, length = clip.frames, len(clip.frames)
    fps = settings.fps or clip.fps or 25.0
    read = time.perf_counter()
    colour = "in colour" if frames.ndim == 4 else "in grey"
    say(f"{length} frames of {frames.shape[2]} x {frames.shape[1]} pixels {colour}, {fps:.4g} a second")

    held = round(settings.holdout * length)
    num_states = settings.num_states or max(1, min(30, (length - held) // 3))
    if length - held < num_states + 2:
        raise ValueError(
            f"`--states` {num_states} needs at least {num_states + 2} frames to fit; the clip has {length}, of which "
            f"`--holdout` {settings.holdout:g} takes {held}. Take fewer states, more frames, or hold fewer out."
        )
    notes: list[str] = []
    say(f"fitting {num_states} states ({settings.method})")
    texture = _fit(frames, num_states, settings, notes, "")
    states = texture.smoothed_states(frames)
    deviation = _errors(texture, frames, np.zeros_like(states))
    if not deviation.any():
        raise ValueError(f"`path` {str(path)!r} does not move: its {length} frames are all the same.")
    extrapolation = {}
    if held:
        say(f"forecasting the last {held} frames from the first {length - held}")
        train, rest = frames[: length - held], frames[length - held :]
        early = _fit(train, num_states, settings, notes, " of the first part, for the forecast,")
        still = np.zeros((held, num_states))
        last = (np.asarray(train[-1], float) - early.mean).reshape(-1)
        extrapolation = {
            "texture": _errors(early, rest, early.forecast_states(train, held)),
            "last frame": _errors(early, rest, still, last),
            "mean frame": _errors(early, rest, still),
        }
    sizes = np.linalg.svd(texture.states, compute_uv=False)
    left = np.maximum(np.sum(deviation**2) / length - np.cumsum([0.0, *sizes**2]) / (length * texture.mean.size), 0.0)
    seconds = {"read": read - started, "fit": time.perf_counter() - read}
    reconstruction = _errors(texture, frames, states)
    return TextureStudy(
        clip, texture, states, reconstruction, deviation, np.sqrt(left), extrapolation, fps, seconds, notes
    )


def _fit(frames: np.ndarray, num_states: int, settings: Settings, notes: list[str], which: str) -> DynamicTexture:
    """A texture; what it warns of becomes a note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        texture = DynamicTexture.fit(frames, num_states, method=settings.method, num_noise=settings.num_noise)
    if any("spectral radius" in str(w.message) for w in caught):
        notes.append(
            f"The transition{which} was unstable; its eigenvalues were moved inside the unit circle. Fewer states or "
            "more frames may mend it."
        )
    return texture


def _errors(
    texture: DynamicTexture, frames: np.ndarray, states: np.ndarray, shift: np.ndarray | float = 0.0
) -> np.ndarray:
    """Root mean square of `frames` less those of `states` and a `shift`, frame by frame; read in pieces."""
    step = max(1, PIECE // texture.mean.size)
    squares = []
    for first in range(0, len(frames), step):
        shown = texture.render(states[first : first + step]).reshape(-1, texture.mean.size) + shift
        apart = np.asarray(frames[first : first + step], float).reshape(shown.shape) - shown
        squares.append(np.mean(apart**2, axis=1))
    return np.sqrt(np.concatenate(squares))


# Writing


def write_study(study: TextureStudy, source: str | Path, settings: Settings, out: str | Path) -> dict[str, Any]:
    """Writes everything into the folder `out`, or nothing; returns what `summary.json` holds.

    All is written into a folder beside `out`, which then takes its name. Where `out` is there already, the files move
    into it one by one, over those of an earlier run; other files stay.

    Raises:
        MissingExtraError: mp4 is asked for, and PyAV is not installed.
        OSError: the folder cannot be written to.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.partial")
    temporary.mkdir()
    try:
        summary = _write_files(study, str(source), settings, temporary)
        if out.exists():
            written = {file.name for file in temporary.iterdir()}
            for name in sorted(written):
                os.replace(temporary / name, out / name)
            for name in set(FILES) - written:  # left by an earlier run: not of this clip
                (out / name).unlink(missing_ok=True)
        else:
            temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary


def _write_files(study: TextureStudy, source: str, settings: Settings, folder: Path) -> dict[str, Any]:
    from PIL import Image

    texture, frames = study.texture, study.clip.frames
    limits, shape = _limits(frames), frames.shape[1:]
    length = settings.length or len(frames)
    states = np.asarray(simulate(jax.random.key(settings.seed), texture.reduced, length)[0])
    kind = settings.video_format or ("mp4" if has_video() else "gif")
    synthetic = f"synthetic.{kind}"
    write_frames(folder / synthetic, (_enlarged(f, limits) for f in _rendered(texture, states)), study.fps)
    Image.fromarray(_enlarged(texture.mean, limits)).save(folder / "mean.png")
    texture.save(folder / "texture.npz")

    # EM leaves the components in no order: shown are the principal ones of their span.
    sizes, turn = np.linalg.svd(texture.states, full_matrices=False)[1:]
    sign = np.sign(turn[np.arange(len(turn)), np.abs(turn).argmax(1)])
    components = texture.components @ (sign[:, None] * turn).T
    shares = sizes**2 / (np.sum(study.deviation**2) * texture.mean.size)
    at, drawn_at = (np.unique(np.linspace(0, n - 1, 6).astype(int)) for n in (len(frames), length))
    drawn_at = np.resize(drawn_at, len(at))  # a synthesis shorter than six frames starts again
    rows = {
        "clip": [as_image(frames[t], limits) for t in at],
        "compressed": [as_image(f, limits) for f in texture.render(study.states[at])],
        "synthetic": [as_image(f, limits) for f in texture.render(states[drawn_at])],
    }
    errors = (study.reconstruction, study.deviation, study.by_components, study.extrapolation)
    for name, figure in (
        ("components.png", plots.plot_components(components, shares, shape)),
        ("spectrum.png", plots.plot_spectrum(np.asarray(texture.A), study.fps)),
        ("errors.png", plots.plot_errors(*errors)),
        ("frames.png", plots.plot_frames(rows, [f"frame {t + 1}" for t in at])),
    ):
        figure.savefig(folder / name, dpi=160, metadata={"Software": None})
    summary = _summary(study, source, settings) | {
        "synthesis": {"file": synthetic, "frames": length, "fps": study.fps, "seed": settings.seed}
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False), encoding="utf-8")
    return summary


def _summary(study: TextureStudy, source: str, settings: Settings) -> dict[str, Any]:
    texture, frames = study.texture, study.clip.frames
    size = texture.compression
    return {
        "schema_version": 1,
        "source": source,
        "clip": {
            "frames": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "colours": frames.shape[3] if frames.ndim == 4 else 1,
            "fps": study.fps,
            "seconds": len(frames) / study.fps,
        },
        "model": {
            "method": settings.method,
            "states": len(texture.A),
            "noise_directions": texture.chol_Q.shape[1],
            "sigma": texture.sigma,
            "spectral_radius": texture.spectral_radius,
        },
        "compression": {"numbers": size.numbers, "ratio": size.ratio, "explained": size.explained},
        "error_of_a_pixel": {
            "mean_frame": float(np.sqrt(np.mean(study.deviation**2))),
            "reconstruction": float(np.sqrt(np.mean(study.reconstruction**2))),
            "forecast": {name: float(np.sqrt(np.mean(e**2))) for name, e in study.extrapolation.items()},
        },
        "curves": {
            "reconstruction_by_frame": study.reconstruction.tolist(),
            "mean_frame_by_frame": study.deviation.tolist(),
            "by_components": study.by_components.tolist(),
            "forecast_by_horizon": {name: e.tolist() for name, e in study.extrapolation.items()},
        },
        "seconds": study.seconds,
        "settings": asdict(settings),
        "notes": study.notes,
    }


def _limits(frames: np.ndarray) -> tuple[float, float]:
    """Values of black and white: bytes are what they are, anything else spans the range of the clip."""
    if frames.dtype == np.uint8:
        return 0.0, 255.0
    return min(float(frame.min()) for frame in frames), max(float(frame.max()) for frame in frames)


def _rendered(texture: DynamicTexture, states: np.ndarray) -> Iterator[np.ndarray]:
    """Frames of states one at a time, made in pieces."""
    step = max(1, PIECE // texture.mean.size)
    for first in range(0, len(states), step):
        yield from texture.render(states[first : first + step])


def _enlarged(frame: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """A frame as bytes, with each pixel as a block where the frame is small."""
    factor = max(1, SHOWN // max(frame.shape[:2]))
    return as_image(frame, limits).repeat(factor, axis=0).repeat(factor, axis=1)
