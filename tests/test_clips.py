"""Simulated clips: the mechanics, and that the picture shows the state."""

import numpy as np
import pytest

from pssm.datasets import bouncing_ball, pendulum_clips


def centre(frames):
    """The bright middle of every frame, in the unit square."""
    size = frames.shape[-1]
    grid = (np.arange(size) + 0.5) / size
    total = frames.sum((-2, -1))
    x = (frames.sum(-2) * grid).sum(-1) / total
    y = (frames.sum(-1) * grid[::-1]).sum(-1) / total
    return np.stack([x, y], axis=-1)


def test_a_pendulum_keeps_its_energy_and_the_picture_shows_where_it_is():
    clips = pendulum_clips(20, 40, push=0.0, friction=0.0, seed=1)
    sine, cosine, velocity = np.moveaxis(clips.states, -1, 0)
    np.testing.assert_allclose(sine**2 + cosine**2, 1.0)
    energy = 0.5 * velocity**2 + 3 * 9.81 * cosine  # angle'' = 3 g sin(angle)
    assert np.abs(energy - energy[:, :1]).max() < 0.3  # Euler's method; the velocity reaches 10
    assert np.abs(velocity).max() > 5
    np.testing.assert_allclose(centre(clips.frames), 0.5 + 0.36 * clips.states[..., :2], atol=0.02)
    damped = pendulum_clips(20, 40, push=0.0, friction=1.0, seed=1)
    after = 0.5 * damped.states[:, -1, 2] ** 2 + 3 * 9.81 * damped.states[:, -1, 1]
    assert (after < energy[:, 0]).all()


def test_a_ball_flies_straight_and_turns_at_the_walls():
    clips = bouncing_ball(20, 60, radius=0.15, seed=2)
    place, velocity = clips.states[..., :2], clips.states[..., 2:]
    assert place.min() >= 0.15
    assert place.max() <= 0.85
    speed = np.linalg.norm(velocity, axis=-1)
    np.testing.assert_allclose(speed, speed[:, :1].repeat(60, 1))
    assert 0.05 <= speed.min() < speed.max() <= 0.1
    free = np.abs(velocity[:, 1:] - velocity[:, :-1]).max(-1) == 0
    np.testing.assert_allclose((place[:, 1:] - place[:, :-1])[free], velocity[:, 1:][free], atol=1e-12)
    assert 0.5 < free.mean() < 0.95
    inside = (np.abs(place - 0.5) < 0.15).all(-1)
    np.testing.assert_allclose(centre(clips.frames)[inside], place[inside], atol=0.02)


@pytest.mark.parametrize("make", [pendulum_clips, bouncing_ball])
def test_seeds_and_noise(make):
    one, same, other = make(2, 5, seed=3), make(2, 5, seed=3), make(2, 5, seed=4)
    np.testing.assert_array_equal(one.frames, same.frames)
    assert np.abs(one.states - other.states).max() > 0
    noisy = make(2, 5, seed=3, noise=0.1)
    np.testing.assert_array_equal(noisy.states, one.states)
    assert 0.08 < (noisy.frames - one.frames).std() < 0.12
    with pytest.raises(ValueError, match="`num_clips`"):
        make(0)


def test_a_ball_larger_than_the_box():
    with pytest.raises(ValueError, match="`radius`"):
        bouncing_ball(2, radius=0.6)
