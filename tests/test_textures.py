"""Dynamic textures: the corrected closed form, and EM that is the one over all pixels."""

from pathlib import Path

import jax
import numpy as np
import pytest

import pssm
from pssm import DynamicTexture, fit_em
from pssm.learning import MatrixNormalInverseWishart, Prior

WATER = Path(__file__).parents[2] / "shared" / "data" / "water_crop_64x48.npz"


def clip(length=30, height=3, width=4, n=3, noise=0.1, seed=0):
    """Frames of a known system."""
    rng = np.random.default_rng(seed)
    A = 0.95 * np.linalg.qr(rng.normal(size=(n, n)))[0]
    C = rng.normal(size=(height * width, n))
    z, frames = rng.normal(size=n), []
    for _ in range(length):
        frames.append(5.0 + C @ z + noise * rng.normal(size=height * width))
        z = A @ z + 0.3 * rng.normal(size=n)
    return np.reshape(frames, (length, height, width))


def test_the_closed_form_is_that_of_plain_least_squares(x64):
    frames = clip()
    texture = DynamicTexture.fit(frames, 3)
    X = frames.reshape(len(frames), -1)
    left = X - X.mean(0)
    U, s, V = np.linalg.svd(left, full_matrices=False)
    Z = U[:, :3] * s[:3]
    A = Z[1:].T @ np.linalg.pinv(Z[:-1].T)
    W = Z[1:] - Z[:-1] @ A.T
    np.testing.assert_allclose(texture.mean, frames.mean(0), atol=1e-12)
    np.testing.assert_allclose(texture.components @ texture.components.T, V[:3].T @ V[:3], atol=1e-10)
    by_state = texture.components.T @ V[:3].T  # signs
    np.testing.assert_allclose(texture.A, by_state @ A @ by_state.T, atol=1e-10)
    np.testing.assert_allclose(texture.chol_Q @ texture.chol_Q.T, by_state @ (W.T @ W / 29) @ by_state.T, atol=1e-10)
    assert texture.sigma**2 == pytest.approx(np.sum(s[3:] ** 2) / (30 * (12 - 3)))
    assert texture.compression.explained == pytest.approx(np.sum(s[:3] ** 2) / np.sum(s**2))


def test_few_directions_of_noise(x64):
    texture = DynamicTexture.fit(clip(), 3, num_noise=1)
    full = DynamicTexture.fit(clip(), 3)
    assert texture.chol_Q.shape == (3, 1)
    values, vectors = np.linalg.eigh(full.chol_Q @ full.chol_Q.T)
    best = values[-1] * np.outer(vectors[:, -1], vectors[:, -1])
    np.testing.assert_allclose(texture.chol_Q @ texture.chol_Q.T, best, atol=1e-10)


def test_frames_in_pieces_are_frames_at_once(x64, monkeypatch):
    long = clip(length=135, height=8, width=10, noise=0.02)
    monkeypatch.setattr("pssm.learning.textures.PIECE", 64 * 80)
    texture = DynamicTexture.fit(long, 3)
    X = long.reshape(len(long), -1)
    V = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:3].T
    np.testing.assert_allclose(texture.components @ texture.components.T, V @ V.T, atol=1e-4)
    np.testing.assert_allclose(texture.states, texture.project(long), atol=1e-3)


def test_the_likelihood_is_that_of_all_pixels(x64):
    frames = clip()
    texture = DynamicTexture.fit(frames, 3)
    whole = pssm.log_likelihood(texture.ssm, frames.reshape(len(frames), -1))
    assert texture.log_likelihood(frames) == pytest.approx(float(whole), rel=1e-10)


@pytest.mark.parametrize("length", [25, 10], ids=["more frames than pixels", "more pixels than frames"])
def test_em_is_em_over_all_pixels(length, x64):
    frames = clip(length=length)
    start = DynamicTexture.fit(frames, 3)
    pixels = frames.reshape(len(frames), -1)
    found = fit_em(pixels, start.ssm, num_iters=6, tol=0.0, fixed=("m0", "P0", "d"), isotropic=("R",), floor=0.0)
    for count in (1, 6):
        texture = DynamicTexture.fit(frames, 3, method="em", num_iters=count, tol=0.0, prior_frames=0)
        assert texture.log_likelihood(frames) == pytest.approx(found.log_likelihoods[count], rel=1e-9)
    np.testing.assert_allclose(
        np.sort_complex(np.linalg.eigvals(texture.A)), np.sort_complex(np.linalg.eigvals(found.ssm.A)), atol=1e-8
    )
    np.testing.assert_allclose(texture.components.T @ texture.components, np.eye(3), atol=1e-10)
    np.testing.assert_allclose(texture.sigma**2, np.asarray(found.ssm.R)[0, 0], rtol=1e-8)


def test_em_with_its_prior_in_single_precision():
    """Float32 arrives where float64 does: the clip's log-likelihood and the eigenvalues."""
    found = []
    for double in (True, False):
        with jax.enable_x64(double):
            texture = DynamicTexture.fit(clip(), 3, method="em", num_iters=6, tol=0.0)
            assert texture.A.dtype == (np.float64 if double else np.float32)
            found.append((texture.log_likelihood(clip()), np.sort_complex(np.linalg.eigvals(texture.A))))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    np.testing.assert_allclose(found[1][1], found[0][1], atol=1e-3)


def test_frames_of_prior_are_the_conjugate_prior_of_fit_em(x64):
    frames, weight = clip(), 5.0
    start = DynamicTexture.fit(frames, 3)
    before, after = start.states[:-1], start.states[1:]
    own = np.sum(before * after, 0) / np.sum(before**2, 0)
    left = np.mean(after**2, 0) - own**2 * np.mean(before**2, 0)
    prior = MatrixNormalInverseWishart(np.diag(own), weight * np.mean(before**2, 0), weight * left, weight - 7)
    found = fit_em(
        frames.reshape(len(frames), -1),
        start.ssm,
        num_iters=6,
        tol=0.0,
        prior=Prior(transition=prior),
        fixed=("m0", "P0", "d"),
        isotropic=("R",),
        floor=0.0,
    )
    texture = DynamicTexture.fit(frames, 3, method="em", num_iters=6, tol=0.0, prior_frames=weight)
    assert texture.log_likelihood(frames) == pytest.approx(found.log_likelihoods[6], rel=1e-9)
    assert texture.log_likelihood(frames) < start.log_likelihood(frames)
    np.testing.assert_allclose(
        np.sort_complex(np.linalg.eigvals(texture.A)), np.sort_complex(np.linalg.eigvals(found.ssm.A)), atol=1e-8
    )
    np.testing.assert_allclose(texture.sigma**2, np.asarray(found.ssm.R)[0, 0], rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3)], ids=["grey", "colour"])
def test_shapes(shape, key):
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(20, *shape)).astype(np.float32)
    texture = DynamicTexture.fit(frames, 2, stable=True)
    assert texture.mean.shape == shape
    assert texture.synthesize(key, 7).shape == (7, *shape)
    assert texture.reconstruct(frames).shape == frames.shape
    assert texture.forecast(frames, 5).shape == (5, *shape)
    apart = texture.synthesize(key, 7, noise=True) - texture.synthesize(key, 7)
    assert apart.std() == pytest.approx(texture.sigma, rel=0.2)


def test_a_forecast_is_the_systems_own(x64):
    frames = clip(noise=1e-3)
    texture = DynamicTexture.fit(frames, 3)
    exact = pssm.forecast(texture.ssm, frames.reshape(len(frames), -1), 4).mean
    np.testing.assert_allclose(texture.forecast(frames, 4).reshape(4, -1), exact, atol=1e-8)
    smoothed = pssm.kalman_smoother(texture.ssm, frames.reshape(len(frames), -1)).mean
    np.testing.assert_allclose(texture.reconstruct(frames), texture.render(smoothed), atol=1e-8)


def test_an_unstable_transition_is_moved_inside_with_a_warning(x64):
    t = np.arange(60)[:, None]
    growing = 1.03**t * np.cos(0.5 * t + np.arange(12)) + 0.01 * np.random.default_rng(0).normal(size=(60, 12))
    with pytest.warns(UserWarning, match="spectral radius 1.0"):
        texture = DynamicTexture.fit(growing.reshape(60, 3, 4), 2)
    assert texture.spectral_radius == pytest.approx(0.999)
    as_it_is = DynamicTexture.fit(growing.reshape(60, 3, 4), 2, stable=False)
    assert as_it_is.spectral_radius > 1.01


@pytest.mark.parametrize(
    ("frames", "options", "words"),
    [
        (np.zeros((3, 4, 4)), dict(num_states=2), "at least 4 frames"),
        (np.zeros(9), dict(num_states=2), r"`frames` must have shape"),
        (np.full((9, 2, 2), np.nan), dict(num_states=2), "`frames` must be finite"),
        (np.zeros((9, 2, 2)), dict(num_states=2, method="pca"), "`method` must be one of"),
        (np.zeros((9, 2, 2)), dict(num_states=2, num_noise=3), "`num_noise` must be at most 2"),
        (
            clip(),
            dict(num_states=2, method="em", prior_frames=-1),
            "`prior_frames` must be a number of frames, 0 or more",
        ),
        (
            clip(),
            dict(num_states=2, method="em", num_noise=1, prior_frames=3),
            "`prior_frames` must be 0 with `num_noise`",
        ),
        (np.zeros((9, 2, 2)), dict(num_states=5), "`num_states` must be at most 4"),
        (np.zeros((9, 2, 2)), dict(num_states=0), "`num_states` must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(frames, options, words):
    with pytest.raises(ValueError, match=words):
        DynamicTexture.fit(frames, **options)


def test_other_frames_than_those_of_the_clip_are_named():
    texture = DynamicTexture.fit(clip(), 2)
    with pytest.raises(ValueError, match=r"`frames` must have shape \(time, 3, 4\)"):
        texture.reconstruct(np.zeros((5, 4, 4)))


@pytest.mark.skipif(not WATER.exists(), reason="the water clip is not here")
def test_running_water(x64, key):
    """Twenty states: the share of the singular vectors, a long bounded synthesis, EM ahead on frames held out."""
    arrays = np.load(WATER)
    frames = np.asarray(arrays[arrays.files[0]], float)
    train = frames[:70]
    by_svd, by_em = (DynamicTexture.fit(train, 20, method=m) for m in ("svd", "em"))
    most_likely = DynamicTexture.fit(train, 20, method="em", num_iters=30, prior_frames=0)
    X = train.reshape(len(train), -1)
    s = np.linalg.svd(X - X.mean(0), compute_uv=False)
    assert by_svd.compression.explained == pytest.approx(np.sum(s[:20] ** 2) / np.sum(s**2))
    assert most_likely.log_likelihood(train) > by_svd.log_likelihood(train) + 100

    def of_the_rest(texture):
        return texture.log_likelihood(frames) - texture.log_likelihood(train)

    assert of_the_rest(by_em) > of_the_rest(by_svd) + 100
    assert by_em.log_likelihood(frames[70:]) > by_svd.log_likelihood(frames[70:]) + 100
    assert of_the_rest(most_likely) < of_the_rest(by_svd), "what the prior is for"
    one_step = train[1:] - by_svd.render(by_svd.states[:-1] @ np.asarray(by_svd.A).T)
    assert np.std(one_step) < 0.7 * np.std(train - by_svd.mean)
    synthetic = by_svd.synthesize(key, 300)
    assert np.abs(synthetic - by_svd.mean).std() < 3 * np.abs(train - by_svd.mean).std()
    assert synthetic[-50:].std(0).mean() > 0.3 * train.std(0).mean(), "and it still moves"


# Clips with nothing left over, colour in bytes, files


def exact_clip(n=2):
    """Frames of exactly `n` components: nothing is left over for the noise of the pixels."""
    rng = np.random.default_rng(3)
    return (100.0 + rng.normal(size=(20, n)) @ rng.normal(size=(n, 12))).reshape(20, 3, 4)


@pytest.mark.parametrize("num_states", [2, 5], ids=["as many states", "more states"])
def test_a_clip_of_few_components_has_no_density(num_states, x64):
    texture = DynamicTexture.fit(exact_clip(), num_states)
    assert texture.sigma == 0.0
    assert texture.spectral_radius < 1
    assert not texture.states[:, 2:].any(), "components that the clip does not have stand still"
    np.testing.assert_allclose(texture.reconstruct(exact_clip()), exact_clip(), atol=1e-6)
    with pytest.raises(ValueError, match="`sigma` is 0"):
        texture.log_likelihood(exact_clip())
    with pytest.raises(ValueError, match="nothing for the noise"):
        DynamicTexture.fit(exact_clip(), num_states, method="em")
    assert np.isfinite(DynamicTexture.fit(exact_clip(), 1).log_likelihood(exact_clip()))


@pytest.mark.parametrize("method", ["svd", "em"])
def test_bytes_in_colour_are_as_good_as_floats(method, x64, key):
    rng = np.random.default_rng(1)
    waves = np.sin(0.4 * np.arange(30)[:, None] + rng.uniform(0, 6, size=60))
    frames = np.clip(128 + 90 * waves + 5 * rng.normal(size=(30, 60)), 0, 255).astype(np.uint8).reshape(30, 4, 5, 3)
    in_bytes, in_floats = (DynamicTexture.fit(f, 2, method=method, num_iters=5) for f in (frames, frames.astype(float)))
    np.testing.assert_array_equal(in_bytes.A, in_floats.A)
    assert in_bytes.log_likelihood(frames) == in_floats.log_likelihood(frames.astype(float))
    np.testing.assert_array_equal(in_bytes.forecast(frames, 3), in_floats.forecast(frames.astype(float), 3))
    kept = in_bytes.reconstruct(frames)
    assert kept.shape == frames.shape
    assert np.abs(kept - frames).mean() < 8, "the noise and half a grey level, no byte that wrapped round"
    assert in_bytes.synthesize(key, 4, noise=True).shape == (4, 4, 5, 3)


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_a_saved_texture_is_the_same(double, tmp_path, key):
    with jax.enable_x64(double):
        texture = DynamicTexture.fit(clip(), 3, num_noise=2)
        texture.save(tmp_path / "texture")  # no suffix is added
        again = DynamicTexture.load(tmp_path / "texture")
        np.testing.assert_array_equal(again.synthesize(key, 5, noise=True), texture.synthesize(key, 5, noise=True))
        assert again.log_likelihood(clip()) == texture.log_likelihood(clip())
        assert again.compression == texture.compression
        assert again.sigma == texture.sigma


@pytest.mark.parametrize("content", ["text", "array", "arrays"])
def test_a_file_that_is_no_texture_is_named(content, tmp_path):
    path = tmp_path / "clip.npz"
    if content == "text":
        path.write_text("not a zip file")
    elif content == "array":
        with open(path, "wb") as file:
            np.save(file, clip())
    else:
        np.savez(path, mean=clip())
    with pytest.raises(ValueError, match=r"`path` .*clip\.npz' is not a texture"):
        DynamicTexture.load(path)
