"""Clips in files: videos, animated gifs, folders of images, and arrays.

Videos need PyAV (`pip install "pssm-numpyro[video]"`); the other kinds do not. Frames are decoded one at a time, and a
clip that would not fit into memory goes to a temporary file, so its length is not limited by memory.
"""

import itertools
import math
import mmap
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pssm._checks import check_count
from pssm.storage.files import whole_file

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
READABLE = (*VIDEOS, ".gif", ".npy", ".npz")
IN_MEMORY = 2**29  # bytes of a decoded clip that stay in memory
LUMA = np.array([0.299, 0.587, 0.114])  # brightness of red, green and blue: ITU-R BT.601


class MissingExtraError(ImportError):
    """The file needs a package that is not installed; the message says how to install it."""


class Clip(NamedTuple):
    """Frames and their rate.

    Attributes:
        frames: `(time, height, width)`, or `(time, height, width, 3)` in colour; it may be read-only, or on disk.
        fps: frames a second, None where the file does not say.
    """

    frames: np.ndarray
    fps: float | None


def has_video() -> bool:
    """Whether videos can be read and written: PyAV is installed."""
    try:
        _pyav()
    except MissingExtraError:
        return False
    return True


def read_frames(
    path: str | os.PathLike[str],
    *,
    grey: bool = False,
    num_frames: int | None = None,
    every: int = 1,
    size: int | None = None,
) -> Clip:
    """A clip from a file or a folder.

    Args:
        path: a video (mp4, m4v, mov, avi, mkv, webm), a gif, a folder of images (in the order of their names, 10 after
            9), an `.npy` array, or an `.npz` file whose clip is called `frames` or is its only array of three or four
            axes; a number called `fps` is its rate. Values of arrays are taken as they are.
        grey: brightness in place of colours.
        num_frames: largest number of frames to keep.
        every: keep each frame number 0, `every`, 2 `every`, ...; the rate falls with it.
        size: largest length of the longer side in pixels, by means over square blocks of whole pixels. Rows and columns
            beyond the last whole block are cut off.

    Returns:
        The frames, in the dtype of the file, and their rate.

    Raises:
        FileNotFoundError: `path` is not there.
        MissingExtraError: it is a video, and PyAV is not installed.
        ValueError: it is no clip: another kind of file, broken, without frames, or frames of unequal sizes.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/clip.gif"
        >>> write_frames(path, np.arange(2 * 4 * 6).reshape(2, 4, 6), fps=10)
        >>> clip = read_frames(path, grey=True, size=3)
        >>> clip.frames.shape, clip.fps
        ((2, 2, 3), 10.0)
    """
    path = Path(path)
    every = check_count("every", every)
    stop = None if num_frames is None else check_count("num_frames", num_frames) * every
    size = None if size is None else check_count("size", size)
    if not path.exists():
        raise FileNotFoundError(f"`path` {str(path)!r} is not there: no such file or folder.")
    if path.is_dir():
        images, fps = _open_images(path)
    elif path.suffix.lower() in VIDEOS:
        images, fps = _open_video(path)
    elif path.suffix.lower() == ".gif":
        images, fps = _open_gif(path)
    elif path.suffix.lower() in (".npy", ".npz"):
        array, fps = _load_array(path)
        if (size is None or size >= max(array.shape[1:3])) and not (grey and array.ndim == 4):
            return Clip(array[:stop:every], fps / every if fps else None)  # as it is; perhaps still on disk
        images = (frame for frame in array)
    else:
        raise ValueError(f"`path` {str(path)!r} must end in {', '.join(READABLE)}, or be a folder of images.")
    with closing(images):
        chosen = itertools.islice(images, 0, stop, every)
        frames = _collect((_reduced(image, grey, size) for image in chosen), f"`path` {str(path)!r}")
    return Clip(frames, fps / every if fps else None)


def write_frames(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: float = 25.0,
    *,
    limits: tuple[float, float] = (0.0, 255.0),
) -> None:
    """Writes a clip, over a file that is there; whole or not at all.

    Videos are H.264 in 4:2:0 (webm: VP9), of a quality at which compression is hard to see but does change the values.
    Their sides are even: the last row or column of an odd side is repeated. A gif has at most 256 colours and counts
    time in hundredths of a second; equal frames in a row become a longer one. Arrays are written as they are.

    Args:
        path: ends in one of mp4, m4v, mov, avi, mkv, webm, gif, npy, npz.
        frames: `(time, height, width)` or `(time, height, width, 3)`; also an iterator of frames, which are then not in
            memory together.
        fps: frames a second.
        limits: values shown as black and white; values beyond are clipped. Not for arrays.

    Raises:
        MissingExtraError: a video, and PyAV is not installed.
        ValueError: another ending, no frames, or frames of another or of unequal shapes.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ValueError(f"`path` {str(path)!r} must end in one of {', '.join(READABLE)}.")
    if not 0 < fps < math.inf:
        raise ValueError(f"`fps` must be a positive number; got {fps}.")
    if not -math.inf < limits[0] < limits[1] < math.inf:
        raise ValueError(f"`limits` must be two numbers, the lower one first; got {limits}.")
    with whole_file(path) as partial:
        if suffix in (".npy", ".npz"):
            whole = _collect((np.asarray(frame) for frame in frames), "`frames`")
            if suffix == ".npy":
                np.save(partial, whole)
            else:
                np.savez_compressed(partial, frames=whole, fps=fps)
        else:
            write = _write_gif if suffix == ".gif" else _write_video
            write(partial, _images(frames, limits), fps)


def as_image(frame: np.ndarray, limits: tuple[float, float] = (0.0, 255.0)) -> np.ndarray:
    """A frame as bytes, `(height, width)` or `(height, width, 3)`; `limits` are the values of black and white."""
    frame = np.asarray(frame)
    if frame.ndim == 3 and frame.shape[2] == 1:
        frame = frame[:, :, 0]
    if frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] not in (3, 4)) or not frame.size:
        raise ValueError(f"`frames` must have shape (time, height, width[, 3]); got a frame of shape {frame.shape}.")
    frame = frame[:, :, :3] if frame.ndim == 3 else frame
    if frame.dtype == np.uint8 and tuple(limits) == (0.0, 255.0):
        return frame
    low, high = limits
    return np.rint(np.clip((frame.astype(float) - low) / (high - low), 0.0, 1.0) * 255.0).astype(np.uint8)


# Frames as they are collected


def _reduced(image: np.ndarray, grey: bool, size: int | None) -> np.ndarray:
    """One frame in grey and in a smaller size, in its own dtype."""
    factor = 1 if size is None else -(-max(image.shape[:2]) // size)
    values = image
    if grey and image.ndim == 3:
        values = values @ LUMA
    if factor > 1:
        height, width = (side // factor for side in image.shape[:2])
        if not height or not width:
            raise ValueError(f"`size` {size} leaves nothing of frames of shape {image.shape[:2]}; take a larger one.")
        values = values[: height * factor, : width * factor]
        values = values.reshape(height, factor, width, factor, *values.shape[2:]).mean((1, 3))
    if values.dtype != image.dtype and image.dtype.kind in "iu":
        values = np.rint(values)
    return values.astype(image.dtype, copy=False)


def _collect(images: Iterable[np.ndarray], source: str) -> np.ndarray:
    """All frames of `source` as one array: in memory if it is small, else in a file that is deleted with it."""
    count, shape, dtype = 0, (), np.dtype(np.uint8)
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as file:
        for image in images:
            if not count:
                shape, dtype = image.shape, image.dtype
            elif image.shape != shape:
                raise ValueError(
                    f"{source} must have frames of one shape; frame {count} has {image.shape} after {shape}."
                )
            file.write(image.astype(dtype, copy=False).tobytes())
            count += 1
        if not count or not math.prod(shape):
            raise ValueError(f"{source} must have at least one frame; got none.")
        if count * math.prod(shape) * dtype.itemsize <= IN_MEMORY:
            file.seek(0)
            held = file.read()
        else:
            file.flush()
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # stays when the file is closed
    return np.frombuffer(held, dtype).reshape(count, *shape)


# Reading


def _load_array(path: Path) -> tuple[np.ndarray, float | None]:
    fps = None
    try:
        if path.suffix.lower() == ".npy":
            frames = np.load(path, mmap_mode="r")
        else:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            clips = [name for name, array in arrays.items() if array.ndim in (3, 4)]
            name = "frames" if "frames" in arrays else clips[0] if len(clips) == 1 else None
            if name is None:
                sizes = ", ".join(f"{n} {array.shape}" for n, array in arrays.items()) or "nothing"
                raise ValueError(f"it must have one clip, or call it `frames`; it has {sizes}")
            frames, rate = arrays[name], arrays.get("fps", np.zeros(1))
            fps = float(rate) if rate.ndim == 0 and 0 < rate < math.inf else None
    except (EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"`path` {str(path)!r} cannot be read as an array: {error}.") from None
    if frames.dtype.kind not in "biuf" or frames.ndim not in (3, 4) or (frames.ndim == 4 and frames.shape[3] > 4):
        raise ValueError(
            f"`path` {str(path)!r} must hold numbers of shape (time, height, width[, colour]); got {frames.dtype} of "
            f"shape {frames.shape}."
        )
    if not frames.size:
        raise ValueError(f"`path` {str(path)!r} has no frames; its shape is {frames.shape}.")
    if frames.ndim == 4:
        frames = frames[..., 0] if frames.shape[3] < 3 else frames[..., :3]  # without transparency
    return frames.astype(np.uint8) if frames.dtype.kind == "b" else frames, fps


def _open_images(folder: Path) -> tuple[Iterator[np.ndarray], None]:
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES]
    if not files:
        raise ValueError(f"`path` {str(folder)!r} is a folder without images ({', '.join(IMAGES)}).")

    def order(file: Path) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name)]

    return (image for file in sorted(files, key=order) for image in _decode_images(file)), None


def _open_gif(path: Path) -> tuple[Iterator[np.ndarray], float | None]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            duration = image.info.get("duration", 0)  # of the first frame, in milliseconds
    except OSError as error:
        raise ValueError(f"`path` {str(path)!r} cannot be decoded: {error}.") from None
    return _decode_images(path), 1000.0 / duration if duration else None


def _decode_images(path: Path) -> Iterator[np.ndarray]:
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                as_it_is = frame.mode == "L" or frame.mode.startswith("I;16")
                yield np.array(frame if as_it_is else frame.convert("RGB"))
    except (EOFError, OSError, SyntaxError) as error:
        raise ValueError(f"`path` {str(path)!r} cannot be decoded: {error}.") from None


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise MissingExtraError(
            'Videos need PyAV, which is not installed: pip install "pssm-numpyro[video]". Or use a gif, a folder of '
            "images, or an array (.npy, .npz)."
        ) from None
    return av


def _open_video(path: Path) -> tuple[Iterator[np.ndarray], float | None]:
    av = _pyav()

    def images() -> Iterator[np.ndarray]:
        try:
            with container:
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    yield frame.to_ndarray(format="rgb24")
        except av.error.FFmpegError as error:
            raise ValueError(f"`path` {str(path)!r} cannot be decoded: {error}.") from None

    try:
        container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(f"`path` {str(path)!r} cannot be decoded: {error}.") from None
    if not container.streams.video:
        container.close()
        raise ValueError(f"`path` {str(path)!r} has no pictures, only sound or text.")
    stream = container.streams.video[0]
    rate = stream.average_rate or stream.guessed_rate
    return images(), float(rate) if rate else None


# Writing


def _images(frames: Iterable[np.ndarray], limits: tuple[float, float]) -> Iterator[np.ndarray]:
    """Frames as bytes, all of the shape of the first; at least one."""
    shape = None
    for frame in frames:
        image = as_image(frame, limits)
        shape = shape or image.shape
        if image.shape != shape:
            raise ValueError(f"`frames` must have one shape; got {image.shape} after {shape}.")
        yield image
    if shape is None:
        raise ValueError("`frames` must have at least one frame; got none.")


def _write_gif(path: Path, images: Iterator[np.ndarray], fps: float) -> None:
    from PIL import Image

    pictures = (Image.fromarray(image) for image in images)
    # Grey stays exact. The first guess at 256 colours shows edges in smooth shades; k-means takes them away.
    pictures = (p if p.mode == "L" else p.quantize(256, kmeans=2) for p in pictures)
    hundredths = max(2, round(100.0 / fps))  # viewers play shorter frames slowly
    first = next(pictures)
    first.save(path, save_all=True, append_images=pictures, duration=10 * hundredths, loop=0)


def _write_video(path: Path, images: Iterator[np.ndarray], fps: float) -> None:
    av = _pyav()
    webm = path.suffix.lower() == ".webm"
    first = next(images)
    rate = Fraction(fps).limit_denominator(1001)  # 30000/1001, as cameras have it, too
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libvpx-vp9" if webm else "libx264", rate=rate)
            stream.height, stream.width = (side + side % 2 for side in first.shape[:2])
            stream.pix_fmt = "yuv420p"
            if webm:
                stream.bit_rate = 0  # quality decides
            stream.options = {"crf": "12", "cpu-used": "4"} if webm else {"crf": "12"}
            for image in itertools.chain([first], images):
                image = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
                image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise ValueError(f"`path` {str(path)!r} cannot be encoded: {error}.") from None
