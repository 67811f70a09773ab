"""The start of a readout: the known loadings, gaps, the closed form of probabilistic PCA, and refusals."""

import numpy as np
import pytest

from pssm.learning import initial_readout

RNG = np.random.default_rng(0)
C = np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.5], [1.0, 0.0], [0.5, -1.0]])
R = np.array([0.1, 0.2, 0.3, 0.4, 0.3, 0.2])


def data(gaps=0.0):
    z = RNG.normal(size=(4, 150, 2))
    y = 3.0 + z @ C.T + np.sqrt(R) * RNG.normal(size=(4, 150, 6))
    return np.where(RNG.random(y.shape) < gaps, np.nan, y)


@pytest.mark.parametrize("gaps", [0.0, 0.3])
def test_factor_analysis_finds_loadings_and_noise(gaps):
    y = data(gaps=gaps)
    found = initial_readout(y, 2, num_iters=100)
    np.testing.assert_allclose(found.C @ found.C.T + np.diag(found.R), C @ C.T + np.diag(R), atol=0.5)
    np.testing.assert_allclose(found.R, R, atol=0.15)
    np.testing.assert_allclose(found.d, 3.0, atol=0.25)
    across = np.asarray(found.C.T @ found.C)
    assert abs(across[0, 1]) < 1e-3 * across[0, 0]
    assert across[0, 0] > across[1, 1]
    np.testing.assert_allclose(found.explained, (C**2).sum(1) / ((C**2).sum(1) + R), atol=0.1)


def test_pca_is_the_closed_form():
    y = data().reshape(-1, 6)
    found = initial_readout(y.reshape(4, 150, 6), 2, method="pca", num_iters=300)
    values, vectors = np.linalg.eigh(np.cov(y.T, bias=True))
    noise = values[:4].mean()
    np.testing.assert_allclose(found.R, noise, rtol=0.03)
    expected = vectors[:, 4:] * (values[4:] - noise) @ vectors[:, 4:].T
    np.testing.assert_allclose(found.C @ found.C.T, expected, atol=0.05)


def test_units_do_not_matter():
    y = data()
    plain, small = initial_readout(y, 2), initial_readout(y * 1e-6, 2)
    np.testing.assert_allclose(small.C, np.asarray(plain.C) * 1e-6, rtol=0.02, atol=2e-8)


@pytest.mark.parametrize(
    ("y", "states", "message"),
    [
        (np.zeros(5), 1, "`y` must have shape"),
        (np.zeros((5, 2)), 3, "`num_states` must be at most"),
        (np.array([[1.0, np.nan], [2.0, np.nan]]), 1, "no value in column 1"),
        (np.array([[1.0, np.inf]]), 1, "infinite"),
    ],
)
def test_what_does_not_fit(y, states, message):
    with pytest.raises(ValueError, match=message):
        initial_readout(y, states)


def test_unknown_method():
    with pytest.raises(ValueError, match="`method` must be one of 'fa', 'pca'"):
        initial_readout(np.zeros((5, 2)), 1, method="ica")
