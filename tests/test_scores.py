"""`scores` against closed forms, and what it refuses."""

import numpy as np
import pytest
from scipy.stats import norm

from pssm.diagnostics import scores


def test_crps_of_normal_draws_is_the_closed_form():
    rng = np.random.default_rng(0)
    y = np.array([-1.5, 0.0, 2.0])
    found = scores(3 + 2 * rng.normal(size=(200_000, 3)), y)
    z = (y - 3) / 2
    exact = 2 * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    np.testing.assert_allclose(found.crps[:, 0], exact, atol=0.02)
    np.testing.assert_allclose(found.energy, exact, atol=0.02)  # of one series they are the same
    np.testing.assert_allclose(found.pit[:, 0], norm.cdf(z), atol=0.01)
    np.testing.assert_allclose(found.squared_error[:, 0], (y - 3) ** 2, atol=0.1)


def test_few_draws_are_scored_without_bias():
    """The average over many sets of 3 draws is the score of the distribution."""
    draws = np.random.default_rng(0).normal(size=(3, 4_000))
    found = scores(draws, np.full(4_000, 0.5))
    exact = 0.5 * (2 * norm.cdf(0.5) - 1) + 2 * norm.pdf(0.5) - 1 / np.sqrt(np.pi)
    assert float(found.crps.mean()) == pytest.approx(exact, abs=0.02)
    assert float(found.energy.mean()) == pytest.approx(exact, abs=0.02)


def test_scores_by_hand():
    draws = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 3.0]])[..., None] * np.ones(2)
    y = np.array([[5.0, 2.0], [np.nan, 1.0]])
    found = scores(draws, y, levels=(0.5,), time=[10, 20])
    assert found.crps.sel(time=10, obs=0) == pytest.approx(3 - (2 + 2 + 4) / 3 / 2)
    assert found.absolute_error.sel(time=10, obs=0) == 3
    assert found.interval_score.sel(time=10, obs=0) == pytest.approx(2 + 2 / 0.5 * 2)  # quartiles 1 and 3, miss 2
    assert found.inside.sel(time=10).values.tolist() == [[0.0], [1.0]]
    assert np.isnan(found.crps.sel(time=20, obs=0))
    assert np.isnan(found.inside.sel(time=20, obs=0)).all()
    assert found.pit.sel(time=20, obs=1) == pytest.approx(1 / 3)  # two of three draws equal y: half of them below
    assert found.energy.sel(time=20) == pytest.approx(2 / 3 - (0 + 2 + 2) / 3 / 2)


@pytest.mark.parametrize(
    ("draws", "y", "options", "message"),
    [
        (np.zeros((5, 3)), np.zeros(4), {}, "`draws` must have shape"),
        (np.zeros((1, 3)), np.zeros(3), {}, "at least 2 draws"),
        (np.full((5, 3), np.nan), np.zeros(3), {}, "`draws` must be finite"),
        (np.zeros((5, 3)), np.zeros(3), {"levels": (90,)}, "`levels`"),
        (np.zeros((5, 3)), np.zeros(3), {"time": [1, 2]}, "`time` must have 3 labels"),
    ],
)
def test_wrong_input_is_named(draws, y, options, message):
    with pytest.raises(ValueError, match=message):
        scores(draws, y, **options)
