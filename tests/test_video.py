"""Clips in files: what is written comes back, exactly or nearly so; what is no clip is named."""

import sys

import numpy as np
import pytest
from PIL import Image

from pssm.learning import video
from pssm.learning.video import MissingExtraError, read_frames, write_frames

needs_video = pytest.mark.skipif(not video.has_video(), reason="PyAV is not installed")


def grey_clip(length=9, height=30, width=44):
    """Smooth moving waves in bytes."""
    t, y, x = np.meshgrid(np.arange(length), np.arange(height), np.arange(width), indexing="ij")
    return (128 + 60 * np.sin(0.5 * t + x / 6) + 50 * np.cos(0.3 * t + y / 5)).astype(np.uint8)


def colour_clip():
    """The same with waves of their own in red, green and blue: swapped colours would be far off."""
    waves = grey_clip()
    return np.stack([waves, 255 - waves, waves // 4], axis=-1)


# What is written comes back


@needs_video
@pytest.mark.parametrize("suffix", ["mp4", "webm", "mov", "avi", "mkv"])
@pytest.mark.parametrize("clip", [grey_clip(), colour_clip()], ids=["grey", "colour"])
def test_videos_come_back_nearly(suffix, clip, tmp_path):
    path = tmp_path / f"clip.{suffix}"
    write_frames(path, clip, fps=12.5)
    frames, fps = read_frames(path, grey=clip.ndim == 3)
    assert frames.shape == clip.shape
    assert frames.dtype == np.uint8
    assert fps == pytest.approx(12.5)
    assert np.abs(frames.astype(float) - clip).mean() < 4, "compression; the waves have an amplitude of 60"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@needs_video
def test_a_video_of_odd_sides_gets_even_ones(tmp_path):
    clip = grey_clip(height=31, width=45)
    write_frames(tmp_path / "clip.mp4", clip)
    frames = read_frames(tmp_path / "clip.mp4", grey=True).frames
    assert frames.shape == (9, 32, 46)
    assert np.abs(frames[:, :31, :45].astype(float) - clip).mean() < 4


def test_a_grey_gif_comes_back_exactly(tmp_path):
    write_frames(tmp_path / "clip.gif", grey_clip(), fps=20)
    frames, fps = read_frames(tmp_path / "clip.gif", grey=True)
    np.testing.assert_array_equal(frames, grey_clip())
    assert fps == 20


def test_a_gif_in_colour_comes_back_nearly(tmp_path):
    write_frames(tmp_path / "clip.gif", colour_clip())
    frames = read_frames(tmp_path / "clip.gif").frames
    assert frames.shape == colour_clip().shape
    assert np.abs(frames.astype(float) - colour_clip()).mean() < 4


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_come_back_exactly(suffix, dtype, tmp_path):
    clip = colour_clip().astype(dtype) / (7 if dtype == np.float32 else 1)
    path = tmp_path / f"clip.{suffix}"
    write_frames(path, clip.astype(dtype), fps=29.97)
    frames, fps = read_frames(path)
    assert frames.dtype == dtype
    np.testing.assert_array_equal(frames, clip.astype(dtype))
    assert fps == (29.97 if suffix == "npz" else None)


def test_an_array_stays_on_disk(tmp_path):
    np.save(tmp_path / "clip.npy", grey_clip())
    assert isinstance(read_frames(tmp_path / "clip.npy", num_frames=5, every=2).frames, np.memmap)


def test_the_only_clip_of_an_npz_is_taken(tmp_path):
    np.savez(tmp_path / "clip.npz", water=grey_clip(), fps=30.0, names=np.array(["a"]))
    frames, fps = read_frames(tmp_path / "clip.npz")
    np.testing.assert_array_equal(frames, grey_clip())
    assert fps == 30


def test_images_come_in_the_order_of_their_numbers(tmp_path):
    for k, frame in enumerate(grey_clip(length=11)):
        Image.fromarray(frame).save(tmp_path / f"frame{k}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    frames, fps = read_frames(tmp_path)
    np.testing.assert_array_equal(frames, grey_clip(length=11))
    assert fps is None


def test_transparency_and_a_single_colour_are_left_out(tmp_path):
    four = np.concatenate([colour_clip(), np.full((9, 30, 44, 1), 255, np.uint8)], axis=-1)
    np.save(tmp_path / "four.npy", four)
    np.save(tmp_path / "one.npy", grey_clip()[..., None])
    np.testing.assert_array_equal(read_frames(tmp_path / "four.npy").frames, colour_clip())
    np.testing.assert_array_equal(read_frames(tmp_path / "one.npy").frames, grey_clip())


# Fewer frames, smaller frames, fewer colours


@pytest.mark.parametrize("suffix", ["gif", "npz", "npy"])
def test_some_frames(suffix, tmp_path):
    path = tmp_path / f"clip.{suffix}"
    write_frames(path, grey_clip(), fps=20)
    frames, fps = read_frames(path, grey=True, num_frames=3, every=2)
    np.testing.assert_array_equal(frames, grey_clip()[[0, 2, 4]])
    assert fps == (None if suffix == "npy" else 10)
    assert len(read_frames(path, grey=True, num_frames=100, every=4).frames) == 3


def test_grey_and_small_frames_are_means(tmp_path):
    clip = colour_clip()
    np.save(tmp_path / "clip.npy", clip)
    brightness = clip @ np.array([0.299, 0.587, 0.114])
    blocks = brightness[:, :28, :44].reshape(9, 7, 4, 11, 4).mean((2, 4))  # 30 rows: the last two are cut off
    frames = read_frames(tmp_path / "clip.npy", grey=True, size=14).frames
    assert frames.shape == (9, 7, 11)
    np.testing.assert_allclose(frames, blocks, atol=0.5 + 1e-9)
    assert read_frames(tmp_path / "clip.npy", size=22).frames.shape == (9, 15, 22, 3)
    assert read_frames(tmp_path / "clip.npy", size=44).frames.shape == clip.shape
    small = read_frames(tmp_path / "clip.npy", size=14).frames
    np.testing.assert_allclose(small[..., 1], clip[:, :28, :, 1].reshape(9, 7, 4, 11, 4).mean((2, 4)), atol=0.5 + 1e-9)


def test_a_long_clip_goes_to_a_file_and_is_the_same(tmp_path, monkeypatch):
    write_frames(tmp_path / "clip.gif", grey_clip())
    monkeypatch.setattr(video, "IN_MEMORY", 4000)  # three frames
    monkeypatch.setattr(video.tempfile, "tempdir", str(tmp_path))
    frames = read_frames(tmp_path / "clip.gif", grey=True).frames
    np.testing.assert_array_equal(frames, grey_clip())
    assert isinstance(memory_below(frames), video.mmap.mmap)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.gif"], "the file has no name that could stay behind"


def memory_below(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_limits_are_black_and_white(tmp_path):
    clip = np.linspace(-1.0, 2.0, 4 * 6).reshape(1, 4, 6)
    write_frames(tmp_path / "clip.gif", clip, limits=(0.0, 1.0))
    found = read_frames(tmp_path / "clip.gif", grey=True).frames
    np.testing.assert_array_equal(found, np.rint(255 * np.clip(clip, 0, 1)))


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("clip.txt", b"text", r"must end in \.mp4.* or be a folder"),
        ("clip.gif", b"text", r"clip\.gif' cannot be decoded"),
        ("clip.npy", b"text", r"clip\.npy' cannot be read as an array"),
        ("clip.npz", b"text", r"clip\.npz' cannot be read as an array"),
        ("clip.npz", b"", r"clip\.npz' cannot be read as an array"),
        pytest.param("clip.mp4", b"text", r"clip\.mp4' cannot be decoded", marks=needs_video),
    ],
    ids=lambda x: x if isinstance(x, str) and x.startswith("clip") else "",
)
def test_a_file_that_is_no_clip_is_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_frames(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": np.zeros((2, 3, 4)), "b": np.zeros((2, 3, 4))}, r"call it `frames`; it has a \(2, 3, 4\), b"),
        ({"a": np.zeros(3)}, "call it `frames`"),
        ({"frames": np.zeros((5, 6))}, r"shape \(time, height, width\[, colour\]\); got float64 of shape \(5, 6\)"),
        ({"frames": np.zeros((5, 6, 7), complex)}, "must hold numbers"),
        ({"frames": np.zeros((5, 6, 7, 8))}, "must hold numbers"),
        ({"frames": np.zeros((0, 6, 7))}, "has no frames"),
    ],
)
def test_arrays_that_are_no_clip_are_named(arrays, words, tmp_path):
    np.savez(tmp_path / "clip.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        read_frames(tmp_path / "clip.npz")


def test_what_is_not_there_and_what_is_empty_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4' is not there"):
        read_frames(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match="a folder without images"):
        read_frames(tmp_path)


def test_images_of_two_sizes_are_named(tmp_path):
    for k in (4, 5):
        Image.fromarray(np.zeros((k, 4), np.uint8)).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match=r"frame 1 has \(5, 4\) after \(4, 4\)"):
        read_frames(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [(dict(every=0), "`every`"), (dict(num_frames=0), "`num_frames`"), (dict(size=0), "`size`")],
    ids=lambda x: str(x),
)
def test_bad_counts_are_named(options, words, tmp_path):
    np.save(tmp_path / "clip.npy", grey_clip())
    with pytest.raises(ValueError, match=f"{words} must be at least 1"):
        read_frames(tmp_path / "clip.npy", **options)


def test_frames_too_narrow_for_the_size(tmp_path):
    np.save(tmp_path / "clip.npy", np.zeros((3, 2, 40)))
    with pytest.raises(ValueError, match="`size` 10 leaves nothing"):
        read_frames(tmp_path / "clip.npy", size=10)


@pytest.mark.parametrize(
    ("name", "frames", "options", "words"),
    [
        ("clip.txt", grey_clip(), {}, "must end in one of"),
        ("clip.gif", grey_clip(), dict(fps=0), "`fps` must be a positive number"),
        ("clip.gif", grey_clip(), dict(limits=(1, 1)), "`limits` must be two numbers"),
        ("clip.gif", [], {}, "at least one frame"),
        ("clip.npy", [], {}, "at least one frame"),
        ("clip.gif", np.zeros((3, 4)), {}, "got a frame of shape"),
        ("clip.gif", [np.zeros((3, 4)), np.zeros((4, 4))], {}, "must have one shape"),
        pytest.param("clip.mp4", [np.zeros((4, 4)), np.zeros((6, 4))], {}, "must have one shape", marks=needs_video),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_written_leaves_nothing_and_keeps_what_was_there(name, frames, options, words, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=words):
        write_frames(tmp_path / name, frames, **options)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "precious")]


def test_without_the_extra_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)  # an import of it fails
    assert not video.has_video()
    (tmp_path / "clip.mp4").write_bytes(b"whatever")
    with pytest.raises(MissingExtraError, match=r'pip install "pssm-numpyro\[video\]"'):
        read_frames(tmp_path / "clip.mp4")
    with pytest.raises(MissingExtraError, match="pssm-numpyro"):
        write_frames(tmp_path / "new.mp4", grey_clip())
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
