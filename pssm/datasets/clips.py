"""Simulated clips, small grey frames of a moving object, with its states."""

from typing import NamedTuple

import numpy as np

from pssm._checks import check_count


class Clips(NamedTuple):
    """Clips and their states.

    Attributes:
        frames: brightness between 0 and 1, before noise, `(clip, time, size, size)`.
        states: `(clip, time, state)`.
        names: names of the states.
    """

    frames: np.ndarray
    states: np.ndarray
    names: tuple[str, ...]


def pendulum_clips(
    num_clips: int,
    num_steps: int = 50,
    *,
    size: int = 16,
    dt: float = 0.05,
    friction: float = 0.1,
    push: float = 0.1,
    noise: float = 0.0,
    seed: int = 0,
) -> Clips:
    """A rod that swings about the frame's middle, drawn as a blob at its end; a frame does not show the velocity.

    Mass and length 1, moment of inertia 1/3: `angle'' = 3 (9.81 sin(angle) - friction angle')`, the angle from the top.
    It starts at rest, at any angle, and after each frame a normal number of standard deviation `push` is added to the
    velocity. States: sine and cosine of the angle, and the velocity.

    Args:
        num_clips: number of clips.
        num_steps: frames of a clip.
        size: pixels of a side.
        dt: time between frames.
        friction: of the hinge.
        push: standard deviation of the random change of the velocity after each frame.
        noise: standard deviation of the noise of pixels; 0 for none.
        seed: seed of the random numbers; the default too gives the same draws in each call.

    Example:
        >>> clips = pendulum_clips(3, 20)
        >>> clips.frames.shape, clips.states.shape, clips.names
        ((3, 20, 16, 16), (3, 20, 3), ('sine', 'cosine', 'velocity'))

    Source:
        The mechanics: Becker, Pandya, Gebhardt, Zhao, Taylor & Neumann 2019. The drawing is ours: a blob a tenth of the
        frame wide, since a thin rod in 16 x 16 pixels says little about the angle.
    """
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0.0, 2 * np.pi, check_count("num_clips", num_clips))
    velocity = np.zeros(num_clips)
    fine, states = 50, []
    for _ in range(check_count("num_steps", num_steps)):
        states.append(np.stack([np.sin(angle), np.cos(angle), velocity], axis=-1))
        for _ in range(fine):
            velocity = velocity + dt / fine * 3.0 * (9.81 * np.sin(angle) - friction * velocity)
            angle = angle + dt / fine * velocity
        velocity = velocity + push * rng.normal(size=num_clips)
    found = np.stack(states, axis=1)
    frames = _blobs(0.5 + 0.36 * found[..., :2], size, 0.1)
    return Clips(frames + noise * rng.normal(size=frames.shape), found, ("sine", "cosine", "velocity"))


def bouncing_ball(
    num_clips: int,
    num_steps: int = 50,
    *,
    size: int = 16,
    radius: float = 0.15,
    speed: tuple[float, float] = (0.05, 0.1),
    noise: float = 0.0,
    seed: int = 0,
) -> Clips:
    """A ball in a box with elastic walls: a straight line, folded. A frame does not show the velocity.

    States: place and velocity, in sides of the box and in sides a frame. There is no noise in the motion.

    Args:
        num_clips: number of clips.
        num_steps: frames of a clip.
        size: pixels of a side.
        radius: of the ball, in sides; it is drawn as a blob of that width.
        speed: least and largest speed, in sides a frame.
        noise: standard deviation of the noise of pixels; 0 for none.
        seed: seed of the random numbers; the default too gives the same draws in each call.

    Example:
        >>> clips = bouncing_ball(3, 20)
        >>> clips.frames.shape, clips.states.shape, clips.names
        ((3, 20, 16, 16), (3, 20, 4), ('x', 'y', 'x velocity', 'y velocity'))
    """
    if not 0 < radius < 0.5:
        raise ValueError(f"`radius` must be between 0 and 0.5, half of the box; got {radius}.")
    rng = np.random.default_rng(seed)
    room = 1.0 - 2 * radius
    start = rng.uniform(0.0, room, (check_count("num_clips", num_clips), 1, 2))
    way = rng.uniform(0.0, 2 * np.pi, (num_clips, 1))
    velocity = rng.uniform(*speed, (num_clips, 1, 1)) * np.stack([np.cos(way), np.sin(way)], axis=-1)
    # A straight line in the plane, mirrored at the walls: a triangular wave of period 2 room.
    straight = np.mod(start + np.arange(check_count("num_steps", num_steps))[:, None] * velocity, 2 * room)
    back = straight > room
    place = radius + np.where(back, 2 * room - straight, straight)
    states = np.concatenate([place, np.where(back, -velocity, velocity)], axis=-1)
    frames = _blobs(place, size, radius / 1.5)
    return Clips(frames + noise * rng.normal(size=frames.shape), states, ("x", "y", "x velocity", "y velocity"))


def _blobs(place: np.ndarray, size: int, width: float) -> np.ndarray:
    """Frames `(..., size, size)`, rows from the top, with a blob at places `(..., 2)` of the unit square."""
    grid = (np.arange(check_count("size", size)) + 0.5) / size
    across = np.exp(-0.5 * ((grid - place[..., :1]) / width) ** 2)
    up = np.exp(-0.5 * ((1.0 - grid - place[..., 1:2]) / width) ** 2)
    return up[..., :, None] * across[..., None, :]
