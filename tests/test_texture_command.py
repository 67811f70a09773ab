"""The command `pssm texture`: what it writes is what the library computes, and nothing is written where it fails."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import pssm.study.texture as command
from pssm import DynamicTexture
from pssm.cli import main
from pssm.learning import video
from pssm.learning.video import read_frames, write_frames

WATER = Path(__file__).parents[2] / "shared" / "data" / "water_crop_64x48.npz"
STATES = 3
LENGTH, HELD = 40, 8
FILES = {"mean.png", "components.png", "spectrum.png", "errors.png", "frames.png", "texture.npz", "summary.json"}

needs_video = pytest.mark.skipif(not video.has_video(), reason="PyAV is not installed")


def waves(shape=(12, 16)):
    """A noisy clip of two frequencies, in bytes."""
    rng = np.random.default_rng(0)
    t = np.arange(LENGTH)[:, None]
    phases = rng.uniform(0, 6, size=(2, int(np.prod(shape))))
    frames = 128 + 60 * np.sin(0.4 * t + phases[0]) + 30 * np.sin(0.9 * t + phases[1])
    frames = frames + 6 * rng.normal(size=frames.shape)
    return np.clip(frames, 0, 255).astype(np.uint8).reshape(LENGTH, *shape)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test starts in a folder of its own, where a stray result would be seen."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def clip():
    """A clip in the current folder."""
    write_frames("waves.npz", waves(), fps=10)
    return "waves.npz"


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """One run with a gif: exit code, output folder, summary."""
    folder = tmp_path_factory.mktemp("good")
    write_frames(folder / "waves.npz", waves(), fps=10)
    out = folder / "deep" / "out"
    code = main(["texture", str(folder / "waves.npz"), "--states", "3", "--format", "gif", "--out", str(out)])
    return code, out, json.loads((out / "summary.json").read_text())


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(capsys, argv: list[str]) -> str:
    """Runs a command that must fail with code 2, one message, and no change on disk; returns the message."""
    before = everything_under(Path())
    assert main(["texture", *argv, "--quiet"]) == 2
    captured = capsys.readouterr()
    assert everything_under(Path()) == before
    assert captured.err.startswith("pssm: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


# Runs


def test_a_good_run_writes_everything(good_run):
    code, out, _ = good_run
    assert code == 0
    assert {file.name for file in out.iterdir()} == FILES | {"synthetic.gif"}
    assert [file.name for file in out.parent.iterdir()] == ["out"], "no temporary folder stays"
    for name in FILES:
        if name.endswith(".png"):
            with Image.open(out / name) as image:
                assert np.ptp(np.asarray(image)) > 10, f"{name} shows something"


def test_the_summary_is_what_numpy_says(good_run):
    _, _, summary = good_run
    X = waves().reshape(LENGTH, -1).astype(float)
    s = np.linalg.svd(X - X.mean(0), compute_uv=False)
    assert summary["compression"]["explained"] == pytest.approx(np.sum(s[:3] ** 2) / np.sum(s**2))
    assert summary["clip"] == {"frames": 40, "height": 12, "width": 16, "colours": 1, "fps": 10, "seconds": 4}
    left = np.sqrt(np.append(np.cumsum(s[::-1] ** 2)[::-1], 0)[: STATES + 1] / X.size)
    np.testing.assert_allclose(summary["curves"]["by_components"], left)
    assert summary["error_of_a_pixel"]["mean_frame"] == pytest.approx(left[0])
    train, rest = X[:-HELD], X[-HELD:]
    forecast = summary["curves"]["forecast_by_horizon"]
    np.testing.assert_allclose(forecast["last frame"], np.sqrt(np.mean((rest - train[-1]) ** 2, axis=1)))
    np.testing.assert_allclose(forecast["mean frame"], np.sqrt(np.mean((rest - train.mean(0)) ** 2, axis=1)))


def test_the_errors_are_those_of_the_saved_texture(good_run):
    _, out, summary = good_run
    with jax.enable_x64(True):
        texture = DynamicTexture.load(out / "texture.npz")
        frames = waves().astype(float)
        error = np.sqrt(np.mean((texture.reconstruct(frames) - frames) ** 2, axis=(1, 2)))
        early = DynamicTexture.fit(frames[:-HELD], STATES)
        ahead = np.sqrt(np.mean((early.forecast(frames[:-HELD], HELD) - frames[-HELD:]) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(summary["curves"]["reconstruction_by_frame"], error, rtol=1e-6)
    np.testing.assert_allclose(summary["curves"]["forecast_by_horizon"]["texture"], ahead, rtol=1e-6)
    assert summary["model"]["spectral_radius"] == pytest.approx(texture.spectral_radius)
    assert summary["error_of_a_pixel"]["forecast"]["texture"] < summary["error_of_a_pixel"]["forecast"]["mean frame"]


def test_the_synthetic_clip_looks_like_the_clip(good_run):
    frames, fps = read_frames(good_run[1] / "synthetic.gif", grey=True)
    assert fps == 10
    assert frames.shape == (LENGTH, 240, 320), "each pixel is a block of 20"
    small = frames[:, ::20, ::20]
    np.testing.assert_array_equal(small.repeat(20, 1).repeat(20, 2), frames)
    assert small.astype(float).std() == pytest.approx(waves().astype(float).std(), rel=0.3)
    np.testing.assert_allclose(small[0], waves()[0], atol=60)


def test_options_reach_the_model(clip, capsys):
    options = ["--frames", "36", "--noise", "1", "--holdout", "0", "--length", "5", "--fps", "20", "--size", "8"]
    assert main(["texture", clip, "--states", "3", "--format", "gif", "--out", "out", *options]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["model"]["noise_directions"] == 1
    assert summary["clip"] == {"frames": 36, "height": 6, "width": 8, "colours": 1, "fps": 20, "seconds": 1.8}
    assert summary["error_of_a_pixel"]["forecast"] == {}
    frames, fps = read_frames("out/synthetic.gif")
    assert (len(frames), fps) == (5, 20)
    captured = capsys.readouterr()
    assert "36 frames of 8 x 6 pixels in grey" in captured.err
    assert "Written: out" in captured.out


@needs_video
def test_from_a_video_in_colour_to_a_video(capsys):
    write_frames("waves.mp4", waves((12, 16, 3)), fps=10)
    assert main(["texture", "waves.mp4", "--states", "2", "--method", "em", "--quiet"]) == 0
    out = Path("results/waves-texture")
    assert {file.name for file in out.iterdir()} == FILES | {"synthetic.mp4"}
    assert capsys.readouterr().err == ""
    assert json.loads((out / "summary.json").read_text())["clip"]["colours"] == 3
    assert DynamicTexture.load(out / "texture.npz").mean.shape == (12, 16, 3)
    assert read_frames(out / "synthetic.mp4").frames.shape == (LENGTH, 240, 320, 3)


def test_without_the_extra_the_clip_is_a_gif(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["texture", clip, "--states", "3", "--quiet", "--out", "out"]) == 0
    assert Path("out/synthetic.gif").exists()


def test_numbers_that_are_not_bytes_span_black_to_white():
    np.save("waves.npy", waves() / 255.0 * 1e-3 - 5.0)
    assert main(["texture", "waves.npy", "--states", "3", "--quiet", "--out", "out", "--format", "gif"]) == 0
    frames = read_frames("out/synthetic.gif", grey=True).frames
    assert 80 < frames.mean() < 170
    assert frames.std() > 30


def test_an_unstable_transition_is_noted(capsys):
    growing = 1.06 ** np.arange(LENGTH)[:, None, None] * waves()[0]
    np.save("waves.npy", growing + waves())
    assert main(["texture", "waves.npy", "--states", "3", "--quiet", "--out", "out", "--format", "gif"]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert "unstable" in summary["notes"][0]
    assert summary["model"]["spectral_radius"] < 1
    assert "Note: The transition was unstable" in capsys.readouterr().out


def test_force_writes_over_a_folder(clip):
    Path("out").mkdir()
    Path("out/mean.png").write_text("old")
    Path("out/synthetic.mp4").write_text("of an earlier run")
    Path("out/mine.txt").write_text("mine")
    command_line = ["texture", clip, "--states", "3", "--format", "gif", "--out", "out", "--quiet", "--force"]
    assert main(command_line) == 0
    assert {file.name for file in Path("out").iterdir()} == FILES | {"synthetic.gif", "mine.txt"}
    assert Path("out/mean.png").read_bytes() != b"old"
    assert {file.name for file in Path().iterdir()} == {"out", clip}


def test_the_same_seed_gives_the_same_clip(clip, good_run):
    for seed in (0, 1):
        options = ["--states", "3", "--format", "gif", "--seed", str(seed), "--out", f"out{seed}", "--quiet"]
        assert main(["texture", clip, *options]) == 0
    assert Path("out0/synthetic.gif").read_bytes() == (good_run[1] / "synthetic.gif").read_bytes()
    assert Path("out1/synthetic.gif").read_bytes() != Path("out0/synthetic.gif").read_bytes()


@pytest.mark.skipif(not WATER.exists(), reason="the water clip is not here")
def test_running_water():
    assert main(["texture", str(WATER), "--states", "20", "--out", "out", "--quiet", "--format", "gif"]) == 0
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["clip"]["fps"] == pytest.approx(29.98)
    assert summary["compression"]["explained"] == pytest.approx(0.832, abs=0.001)
    assert summary["compression"]["ratio"] == pytest.approx(4.23, abs=0.01)
    error = summary["error_of_a_pixel"]
    assert error["reconstruction"] < 0.45 * error["mean_frame"]
    assert error["forecast"]["texture"] < 0.75 * error["forecast"]["mean frame"]
    first = {name: np.mean(curve[:5]) for name, curve in summary["curves"]["forecast_by_horizon"].items()}
    assert first["texture"] < first["last frame"], "for a sixth of a second"
    frames = read_frames("out/synthetic.gif", grey=True).frames[:, ::5, ::5].astype(float)
    clip = np.load(WATER)["water"].astype(float)
    assert 0.5 < frames.std(0).mean() / clip.std(0).mean() < 2


# What is refused


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--states", "0"], ["`--states`", "got 0"]),
        (["--states", "40"], ["`--states` 40", "42 frames", "`--holdout`"]),
        (["--noise", "0"], ["`--noise`", "got 0"]),
        (["--states", "2", "--noise", "3"], ["`num_noise`", "at most 2"]),
        (["--method", "emm"], ["`--method`", "'emm'", "Did you mean 'em'"]),
        (["--frames", "-1"], ["`--frames`", "got -1"]),
        (["--every", "0"], ["`--every`", "got 0"]),
        (["--length", "0"], ["`--length`", "got 0"]),
        (["--size", "-3"], ["`--size`", "got -3"]),
        (["--holdout", "1"], ["`--holdout`", "got 1"]),
        (["--holdout", "nan"], ["`--holdout`", "got nan"]),
        (["--fps", "0"], ["`--fps`", "got 0"]),
        (["--frames", "3", "--holdout", "0.4"], ["`--states` 1", "3 frames"]),
    ],
    ids=lambda x: " ".join(x) if x[0].startswith("--") else "",
)
def test_bad_options_are_named(capsys, clip, options, names):
    message = refused(capsys, [clip, *options])
    for name in names:
        assert name in message


def test_files_that_are_no_clip_are_named(capsys):
    Path("notes.txt").write_text("text")
    Path("broken.gif").write_text("text")
    np.save("still.npy", np.ones((20, 4, 5)))
    holes = np.ones((20, 4, 5))
    holes[3] = np.nan
    np.save("holes.npy", holes)
    for argv, words in [
        (["absent.mp4"], "`clip` 'absent.mp4' is not there"),
        (["notes.txt"], "must end in .mp4"),
        (["broken.gif"], "cannot be decoded"),
        (["still.npy"], "does not move"),
        (["holes.npy"], "`frames` must be finite"),
    ]:
        assert words in refused(capsys, argv)


@pytest.mark.parametrize("given", [["--out", "mine"], []], ids=["--out", "the default folder"])
def test_a_folder_that_exists_is_left_alone(capsys, clip, given):
    folder = Path(given[1] if given else "results/waves-texture")
    folder.mkdir(parents=True)
    (folder / "mean.png").write_text("precious")
    message = refused(capsys, [clip, *given])
    assert str(folder) in message
    assert "--force" in message


def test_out_that_is_a_file(capsys, clip):
    Path("taken").write_text("precious")
    assert "`--out` taken is a file" in refused(capsys, [clip, "--out", "taken", "--force"])


def test_mp4_without_the_extra(capsys, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pssm-numpyro[video]" in refused(capsys, [clip, "--format", "mp4"])
    Path("waves.mp4").write_bytes(b"whatever")
    assert "pssm-numpyro[video]" in refused(capsys, ["waves.mp4"])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is full")], ids=["Ctrl-C", "disk"])
def test_a_run_that_is_cut_short_leaves_nothing(capsys, clip, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(command.plots, "plot_frames", fail)
    message = refused(capsys, [clip, "--states", "3", "--format", "gif", "--out", "out"])
    assert "interrupted" in message or "the disk is full" in message
