"""Exact sensors that others fix: a density that does not depend on their order, and contradictions refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pssm import LinearGaussianSSM, kalman_filter, kalman_smoother, log_likelihood, log_likelihoods, simulate, update

METHODS = ("auto", "sequential", "square_root", "parallel", "low_memory")
STEPS = 6


def redundant(case):
    """A model with exact sensors that depend on each other, and a series of it."""
    rng = np.random.default_rng(5)
    A, L = np.array([[0.9, 0.2], [0.0, 0.8]]), np.diag([0.5, 0.3])
    C = rng.normal(size=(4, 2))
    noise, start = np.zeros((4, 4)), np.eye(2)
    if case == "two of four":
        pass
    elif case == "a copy beside noisy ones":
        C[1], noise = C[0], np.diag([0.0, 0.0, 0.4, 0.7])
    elif case == "one noise for two":
        C[1] = 2 * C[0]
        noise[0, 0], noise[1, 0], noise[2, 2], noise[3, 3] = 0.5, 1.0, 0.3, 0.2
    elif case == "a state that stands still":
        L, A, noise = np.diag([0.0, 0.3]), np.eye(2), np.diag([0.0, 0.0, 0.5, 0.5])
        C[:2] = [[1.0, 0.0], [-3.0, 0.0]]
    elif case == "a known start":
        start = np.zeros((2, 2))
    ssm = LinearGaussianSSM(np.ones(2), start, A, L, C, noise)
    y = np.array(simulate(jax.random.key(1), ssm, STEPS)[1])
    y[2, 1] = y[4, 3] = np.nan
    y[3] = np.nan
    return ssm, y


CASES = (
    "two of four",
    "a copy beside noisy ones",
    "one noise for two",
    "a state that stands still",
    "a known start",
)


@pytest.mark.parametrize("case", CASES)
def test_the_density_is_that_of_the_subspace_in_any_order(case, x64):
    ssm, y = redundant(case)
    truth = oracles.log_likelihood_on_subspaces(ssm, y)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        turned = ssm.replace(C=ssm.C[np.array(order)], chol_R=ssm.chol_R[np.array(order)])
        for method in METHODS if order[0] == 0 else ("auto",):
            found = log_likelihood(turned, y[:, order], method=method)
            np.testing.assert_allclose(found, truth, rtol=1e-9, err_msg=f"{method} {order}")
        np.testing.assert_allclose(kalman_filter(turned, y[:, order]).log_likelihood, truth, rtol=1e-9)
        both = log_likelihood(turned, np.stack([y[:, order]] * 2))
        np.testing.assert_allclose(both, [truth, truth], rtol=1e-9)


def test_in_32_bits():
    ssm, y = redundant("a copy beside noisy ones")
    truth = oracles.log_likelihood_on_subspaces(ssm, y)
    np.testing.assert_allclose(log_likelihood(ssm, y), truth, rtol=1e-5)


def test_one_step_at_a_time(x64):
    ssm, y = redundant("two of four")
    step = update(ssm, ssm.m0, ssm.chol_P0, y[0])
    np.testing.assert_allclose(step.log_likelihood, log_likelihoods(ssm, y)[0], rtol=1e-12)
    off = update(ssm, ssm.m0, ssm.chol_P0, y[0] + np.array([0.0, 0.0, 1.0, 0.0]))
    assert float(off.log_likelihood) == -np.inf


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_the_slope_does_not_depend_on_the_order(order, x64):
    ssm, y = redundant("two of four")

    def value(factor):
        return log_likelihood(ssm.replace(chol_Q=factor * ssm.chol_Q, C=ssm.C[np.array(order)]), y[:, order])

    def truth(factor):
        return oracles.log_likelihood_on_subspaces(ssm.replace(chol_Q=factor * ssm.chol_Q), y)

    exact = (truth(1 + 1e-5) - truth(1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(1.0), exact, rtol=1e-6)


# name of the case: what is made wrong (step, column), and the column that is named
WRONG = [("two of four", 1, 3, 3), ("a copy beside noisy ones", 4, 0, 1), ("a known start", 0, 0, 0)]


@pytest.mark.parametrize(("case", "step", "column", "named"), WRONG)
def test_a_contradiction_is_refused_by_name(case, step, column, named, x64):
    ssm, y = redundant(case)
    y[step, column] += 1e-3
    for function in (log_likelihood, log_likelihoods, kalman_filter, kalman_smoother):
        with pytest.raises(ValueError, match=rf"`y` contradicts the model at step {step}, column {named}:"):
            function(ssm, y)
    assert jax.jit(log_likelihood)(ssm, y) == -jnp.inf
    with pytest.raises(ValueError, match=rf"step {step}, column {named} of series \(1,\)"):
        log_likelihood(ssm, np.stack([redundant(case)[1], y]))
