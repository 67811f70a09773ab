"""Nodes and corrections by weights, against brute force over parameters and paths."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm, poisson

import pssm
from pssm.diagnostics import to_datatree
from pssm.distributions import LinearGaussianMarginal, LowRankChain, StatePath
from pssm.fitting.weights import doubts, effective, pareto_shape, resampled
from pssm.guides.guided_filter import guided_paths
from pssm.infer import corrected, fit_nuts, forecast, load, nodes, path_marginal, resume, save, smoothed_states

pytestmark = pytest.mark.usefixtures("x64")
ONE = jnp.eye(1)
COUNTS = np.array([[2.0], [np.nan], [5.0]])


def counts(y=None, num_steps=3):
    """Poisson counts whose path has an unknown noise."""
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, 0.9 * ONE, q * ONE, num_steps if y is None else len(y)))
    numpyro.deterministic("end", z[-1, 0])
    pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), obs=y)


def linear(y=None, states="sampled", num_steps=12):
    """A linear model, whose approximations are exact."""
    q, r = (numpyro.sample(n, dist.LogNormal(-1.0, 0.5)) for n in "qr")
    steps = num_steps if y is None else len(y)
    ssm = pssm.LinearGaussianSSM(jnp.zeros(1), ONE, 0.9 * ONE, q * ONE, ONE, r * ONE)
    if states == "sampled":
        z = numpyro.sample("z", StatePath.from_ssm(ssm, steps))
        pssm.observe("y", dist.Normal(z, r).to_event(2), obs=y)
    else:
        numpyro.sample("y", LinearGaussianMarginal(ssm, steps), obs=y)


def brute() -> tuple[float, float, float]:
    """Log evidence of `COUNTS`, posterior means of `q` and of the last state, by quadrature in noise coordinates."""
    x, w = np.polynomial.hermite_e.hermegauss(40)
    w = w / w.sum()
    e = np.stack(np.meshgrid(x, x, x, indexing="ij"))
    weight = w[:, None, None] * w[:, None] * w
    q, dq = np.linspace(1e-4, 5.0, 400, retstep=True)
    value = np.zeros(len(q))
    last = np.zeros(len(q))
    for i, sd in enumerate(q):
        z1 = e[0]
        z3 = 0.9 * (0.9 * z1 + sd * e[1]) + sd * e[2]
        p = weight * poisson.pmf(2, np.exp(z1)) * poisson.pmf(5, np.exp(z3)) * 2 * norm.pdf(sd)
        value[i], last[i] = p.sum(), (p * z3).sum()
    total = value.sum() * dq
    return np.log(total), (value * q).sum() * dq / total, last.sum() * dq / total


@pytest.fixture(scope="module")
def approximate():
    with jax.enable_x64(True):
        return nodes(counts, COUNTS, approximation="laplace", progress_bar=False)


@pytest.fixture(scope="module")
def exact(approximate):
    with jax.enable_x64(True):
        return corrected(approximate, num_paths=64, progress_bar=False)


def test_corrected_nodes_meet_brute_force(approximate, exact):
    value, q, last = brute()
    assert exact.exact
    assert exact.khat < 0.7
    assert exact.objective.startswith("exact posterior up to Monte Carlo error")
    assert "approximate" in approximate.objective
    assert abs(exact.log_evidence - value) < 4 * exact.standard_error < 0.1
    draws = exact.draws()
    assert draws["z"].shape == (1, 1000, 3, 1)
    np.testing.assert_allclose(draws["q"].mean(), q, atol=0.04)
    np.testing.assert_allclose(draws["z"][..., -1, 0].mean(), last, atol=0.08)
    np.testing.assert_array_equal(draws["end"], draws["z"][..., -1, 0])
    assert abs(approximate.log_evidence - value) > 2 * exact.standard_error  # there was something to correct


def test_what_follows_a_fit_takes_corrected_nodes(exact, tmp_path):
    tree = to_datatree(exact, states=True, forecast=2)
    assert {"posterior", "sample_stats", "smoothed_states", "forecast"} <= set(tree.children)
    assert tree["sample_stats"]["log_weight"].shape == (1, 1000)
    assert forecast(exact, 2).mean.shape == (2, 1)
    assert smoothed_states(exact).state.mean.shape == (3, 1)
    folder = save(exact, tmp_path / "fit")
    again = load(folder, path_marginal(counts, approximation="laplace"))
    for name, x in exact.draws().items():
        np.testing.assert_array_equal(again.draws()[name], x)
    assert again.log_evidence == exact.log_evidence
    assert again.exact
    with pytest.raises(ValueError, match="has weighed all of its draws"):
        resume(folder, path_marginal(counts, approximation="laplace"), progress_bar=False)
    with pytest.raises(ValueError, match=r"`model` must be the `path_marginal"):
        load(folder, counts)


def test_nodes_are_saved_and_loaded(approximate, tmp_path):
    again = load(save(approximate, tmp_path / "fit"), path_marginal(counts, approximation="laplace"))
    np.testing.assert_array_equal(again.log_weights, approximate.log_weights)
    np.testing.assert_array_equal(again.draws()["z"], approximate.draws()["z"])


def test_weights_of_a_linear_model_are_equal():
    y = np.array([[0.3], [np.nan], [-0.2], [0.5], [0.1], [0.8]])
    options = {"num_nodes": 128, "num_samples": 300, "progress_bar": False}
    known = nodes(linear, y, states="marginal", **options)
    found = nodes(linear, y, approximation="laplace", **options)
    np.testing.assert_allclose(found.log_weights, known.log_weights, atol=1e-6)
    np.testing.assert_allclose(found.log_evidence, known.log_evidence, atol=1e-8)
    after = corrected(found, num_paths=4, progress_bar=False)
    assert after.log_weight_sd < 1e-8
    assert after.path_sd < 1e-8
    assert max(after.shifts.values()) < 1e-8
    np.testing.assert_allclose(after.log_evidence, known.log_evidence, atol=1e-8)
    np.testing.assert_allclose(after.draws()["z"].mean(1)[0], smoothed_states(known).state.mean, atol=0.1)


def test_corrected_chain_keeps_its_chains():
    marginal = path_marginal(counts, approximation="laplace")
    options = {"num_warmup": 200, "num_samples": 150, "num_chains": 2, "progress_bar": False}
    fit = fit_nuts(marginal, COUNTS, **options)
    after = corrected(fit, progress_bar=False)
    assert after.draws()["z"].shape == (2, 150, 3, 1)
    assert after.log_weights.shape == (2, 150)
    assert 0 < after.effective_draws <= 300
    assert after.efficiency > 0.8
    where = np.asarray(after.stats["source_draw"]).ravel()
    assert (np.diff(where) >= 0).all()
    before = np.asarray(fit.get_samples()["q"])
    np.testing.assert_array_equal(after.draws()["q"].ravel(), before[where])


def test_filter_takes_over_from_uneven_paths():
    prior = StatePath(jnp.zeros(1), ONE, 0.8 * ONE, 0.7 * ONE, 6)
    y = jnp.array([0.4, -0.1, jnp.nan, 1.0, 0.2, 0.9])
    chain = LowRankChain(prior, jnp.zeros((6, 1)), jnp.zeros((6, 1, 0)))  # the prior: knows nothing of the data

    def log_lik(z):
        return jnp.sum(jnp.where(jnp.isnan(y), 0.0, dist.Normal(z[:, 0], 0.5).log_prob(jnp.nan_to_num(y))))

    ssm = pssm.LinearGaussianSSM(jnp.zeros(1), ONE, 0.8 * ONE, 0.7 * ONE, ONE, 0.5 * ONE)
    keys = jax.random.split(jax.random.key(1), 400)
    run = jax.jit(jax.vmap(lambda k: guided_paths(k, chain, log_lik, 64, 2, 1)))
    value, _, paths = run(keys)
    ratio = np.exp(np.asarray(value) - float(pssm.log_likelihood(ssm, y[:, None])))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20
    smoothed = pssm.kalman_smoother(ssm, y[:, None])
    mean = np.average(np.asarray(paths)[:, 0, :, 0], axis=0, weights=ratio)
    np.testing.assert_allclose(mean, smoothed.mean[:, 0], atol=4 * float(jnp.sqrt(smoothed.cov.max())) / 18)
    spread = np.average((np.asarray(paths)[:, 0, :, 0] - mean) ** 2, axis=0, weights=ratio)
    np.testing.assert_allclose(spread, smoothed.cov[:, 0, 0], rtol=0.35)


def test_weights_that_cannot_be_trusted_say_so():
    even = np.random.default_rng(0).normal(size=1000) * 0.1
    heavy = np.random.default_rng(0).standard_cauchy(1000)
    assert not doubts(pareto_shape(even), effective(even) / 1000)
    found = doubts(pareto_shape(np.abs(heavy)), effective(np.abs(heavy)) / 1000)
    assert len(found) == 2
    assert "k-hat" in found[0]
    assert effective(np.full(4, -np.inf)) == 0
    assert pareto_shape(np.array([0.0, np.nan, 1.0])) == float("inf")
    index = resampled(jax.random.key(0), np.array([-0.7, -np.inf, -0.7]), 10)
    np.testing.assert_array_equal(np.bincount(index, minlength=3), [5, 0, 5])


def five(y=None):
    numpyro.sample("theta", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_refusals():
    with pytest.raises(ValueError, match=r"has 5 unconstrained parameters.*nuts:variational"):
        nodes(five, 1.0, progress_bar=False)
    with pytest.raises(ValueError, match="multiple of 8"):
        nodes(linear, np.zeros((3, 1)), num_nodes=130, progress_bar=False)
    fit = nodes(linear, np.zeros((3, 1)), states="marginal", num_nodes=128, progress_bar=False)
    with pytest.raises(TypeError, match="paths are integrated out approximately"):
        corrected(fit)
