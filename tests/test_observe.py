"""`observe`: NaN entries drop out of the density and of its gradient, for any distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy import stats

from pssm import LinearGaussianSSM, observe
from pssm.distributions import LinearGaussianMarginal, WithMissing

NAN = np.nan
PARAMETERS = np.array([0.3, -0.2, 0.5, 0.1, -0.4, 0.2])
MISSING = np.array([False, True, False, False, True, False])


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


# Independent entries: a distribution with one parameter per entry, and values inside its support.
COUNTS = np.array([0.0, 1, 3, 2, 0, 4])
REALS = np.array([0.4, -1.0, 2.5, 0.0, 1.0, -0.3])
POSITIVE = np.array([0.4, 1.0, 2.5, 0.1, 1.0, 3.0])
UNIT = np.array([0.4, 0.1, 0.5, 0.9, 0.2, 0.3])
SCALAR = {
    "Normal": (lambda p: dist.Normal(p, jnp.exp(p)), REALS),
    "Poisson": (lambda p: dist.Poisson(jnp.exp(p)), COUNTS),
    "Bernoulli": (lambda p: dist.Bernoulli(logits=p), COUNTS % 2),
    "Bernoulli probs": (lambda p: dist.Bernoulli(probs=jax.nn.sigmoid(p)), COUNTS % 2),
    "Binomial": (lambda p: dist.Binomial(5, logits=p), COUNTS),
    "StudentT": (lambda p: dist.StudentT(3 + jnp.exp(p), p, jnp.exp(p)), REALS),
    "Cauchy": (lambda p: dist.Cauchy(p, 1.0), REALS),
    "NegativeBinomial2": (lambda p: dist.NegativeBinomial2(jnp.exp(p), 2.0 + p), COUNTS),
    "Gamma": (lambda p: dist.Gamma(jnp.exp(p), 1.0 + p**2), POSITIVE),
    "LogNormal": (lambda p: dist.LogNormal(p, jnp.exp(p)), POSITIVE),
    "Beta": (lambda p: dist.Beta(jnp.exp(p), 2.0), UNIT),
    "Uniform": (lambda p: dist.Uniform(0.0, 4.0 + p), POSITIVE),
    "TruncatedNormal": (lambda p: dist.TruncatedNormal(p, 1.0, low=0.0), POSITIVE),
    "ZeroInflatedPoisson": (lambda p: dist.ZeroInflatedPoisson(0.3, jnp.exp(p)), COUNTS),
    "Categorical": (lambda p: dist.Categorical(logits=p[:, None] * jnp.arange(3.0)), COUNTS % 3),
    "Mixture": (
        lambda p: dist.MixtureSameFamily(
            dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.stack([p, -p], -1), 1.0)
        ),
        REALS,
    ),
}


def site_log_density(distribution, values):
    return log_density(lambda: observe("y", distribution, values), (), {}, {})[0]


@pytest.mark.parametrize("name", SCALAR)
def test_missing_entries_are_as_if_dropped(name):
    family, values = SCALAR[name]
    with_nan = np.where(MISSING, NAN, values)
    seen = np.flatnonzero(~MISSING)

    def masked(p):
        return site_log_density(family(p), with_nan)

    def dropped(p):
        kept = jnp.asarray(values[seen].astype(int) if family(p).support.is_discrete else values[seen])
        return family(p[seen]).log_prob(kept).sum()

    value, gradient = jax.jit(jax.value_and_grad(masked))(PARAMETERS)
    expected, expected_gradient = jax.jit(jax.value_and_grad(dropped))(PARAMETERS)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-13)
    assert (np.asarray(gradient)[MISSING] == 0).all()


@pytest.mark.parametrize("name", ["Normal", "Poisson", "LogNormal", "Categorical"])
def test_to_event_and_expand(name):
    family, values = SCALAR[name]
    with_nan = np.where(MISSING, NAN, values)
    each = WithMissing(family(PARAMETERS)).log_prob(with_nan)
    assert each.shape == (6,)
    np.testing.assert_array_equal(each[MISSING], 0.0)
    event = WithMissing(family(PARAMETERS).to_event(1))
    assert event.batch_shape == ()
    np.testing.assert_allclose(event.log_prob(with_nan), each.sum(), rtol=1e-12)
    many = np.stack([with_nan, values, np.full(6, NAN)])
    expanded = WithMissing(family(PARAMETERS).to_event(1).expand([3])).log_prob(many)
    np.testing.assert_allclose(expanded[::2], [each.sum(), 0.0], rtol=1e-12)
    assert expanded.shape == (3,)


def test_expand_after_and_before_masks():
    base = dist.Normal(PARAMETERS, 1.0)
    with_nan = np.where(MISSING, NAN, REALS)
    mask = np.array([True, True, False, True, False, True])
    each = np.where(MISSING, 0.0, stats.norm.logpdf(REALS, PARAMETERS))
    np.testing.assert_allclose(WithMissing(base.mask(mask)).log_prob(with_nan), np.where(mask, each, 0), rtol=1e-12)
    np.testing.assert_allclose(WithMissing(base).expand([2, 6]).log_prob(with_nan), [each, each], rtol=1e-12)
    np.testing.assert_allclose(WithMissing(base).to_event(1).log_prob(with_nan), each.sum(), rtol=1e-12)
    np.testing.assert_allclose(WithMissing(dist.Normal(0.0, 1.0).expand([6])).log_prob(with_nan)[MISSING], 0.0)
    np.testing.assert_allclose(WithMissing(base).mask(False).log_prob(with_nan), 0.0)


def test_all_missing_and_none_missing():
    base = dist.Normal(PARAMETERS, 2.0).to_event(1)
    np.testing.assert_allclose(site_log_density(base, REALS), base.log_prob(REALS), rtol=1e-12)
    assert site_log_density(base, np.full(6, NAN)) == 0.0


# --- joint events -----------------------------------------------------------------------------------------------------

COV = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.2], [-0.3, 0.2, 0.5]])
LOC = np.array([0.5, -1.0, 2.0])
ROWS = np.array([[0.1, NAN, 1.0], [NAN, NAN, 0.3], [0.2, -0.4, 0.7], [NAN, NAN, NAN], [NAN, 0.5, 1.5]])


def scipy_marginal(row, loc=LOC, cov=COV):
    seen = ~np.isnan(row)
    return stats.multivariate_normal.logpdf(row[seen], loc[seen], cov[np.ix_(seen, seen)]) if seen.any() else 0.0


@pytest.mark.parametrize("by", ["covariance_matrix", "precision_matrix", "scale_tril"])
def test_multivariate_normal_is_marginalised_exactly(by):
    matrix = {"covariance_matrix": COV, "precision_matrix": np.linalg.inv(COV), "scale_tril": np.linalg.cholesky(COV)}
    base = dist.MultivariateNormal(LOC, **{by: matrix[by]})
    expected = [scipy_marginal(row) for row in ROWS]
    np.testing.assert_allclose(WithMissing(base).log_prob(ROWS), expected, rtol=1e-10)
    np.testing.assert_allclose(site_log_density(base.expand([5]).to_event(1), ROWS), np.sum(expected), rtol=1e-10)


def test_multivariate_normal_batch_of_parameters():
    covs = np.stack([COV, COV[::-1, ::-1], 2 * COV, COV, np.eye(3)])
    locs = LOC + np.arange(5.0)[:, None]
    log_prob = WithMissing(dist.MultivariateNormal(locs, covs)).log_prob(ROWS)
    expected = [scipy_marginal(*each) for each in zip(ROWS, locs, covs, strict=True)]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-10)


def test_multivariate_normal_gradients():
    row = ROWS[0]
    seen = np.flatnonzero(~np.isnan(row))

    def masked(loc, cov):
        return WithMissing(dist.MultivariateNormal(loc, cov)).log_prob(row)

    def dropped(loc, cov):
        return dist.MultivariateNormal(loc[seen], cov[np.ix_(seen, seen)]).log_prob(row[seen])

    gradients = jax.jit(jax.grad(masked, (0, 1)))(LOC, COV)
    expected = jax.jit(jax.grad(dropped, (0, 1)))(LOC, COV)
    np.testing.assert_allclose(gradients[0], expected[0], rtol=1e-9, atol=1e-12)
    # Symmetric parts: an asymmetric change of a covariance has no meaning.
    np.testing.assert_allclose(gradients[1] + gradients[1].T, expected[1] + expected[1].T, rtol=1e-9, atol=1e-12)


WHOLE = {
    "Dirichlet": (lambda p: dist.Dirichlet(jnp.exp(p[:3])), np.array([0.2, 0.3, 0.5])),
    "Multinomial": (lambda p: dist.Multinomial(6, jax.nn.softmax(p[:3])), np.array([1.0, 2.0, 3.0])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_joint_events_are_missing_as_a_whole(name):
    family, value = WHOLE[name]
    rows = np.stack([value, np.full(3, NAN), value[::-1]])

    def masked(p):
        return site_log_density(family(p).expand([3]), rows)

    def dropped(p):
        kept = rows[[0, 2]].astype(int) if name == "Multinomial" else rows[[0, 2]]
        return family(p).log_prob(kept).sum()

    value, gradient = jax.value_and_grad(masked)(PARAMETERS)
    expected, expected_gradient = jax.value_and_grad(dropped)(PARAMETERS)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", WHOLE)
def test_a_partly_missing_joint_event_raises(name):
    family, value = WHOLE[name]
    broken = np.stack([value, np.array([NAN, *value[1:]])])
    with pytest.raises(ValueError, match=f"`obs` .*{name}"):
        site_log_density(family(PARAMETERS).expand([2]), broken)
    with pytest.raises(ValueError, match="`obs`"):
        site_log_density(family(PARAMETERS).expand([2]).to_event(1), broken)


def test_linear_gaussian_marginal_handles_its_own_missing_entries():
    ssm = LinearGaussianSSM(jnp.zeros(1), jnp.eye(1), 0.5 * jnp.eye(1), jnp.eye(1), jnp.ones((2, 1)), jnp.eye(2))
    y = np.array([[0.1, NAN], [NAN, NAN], [0.3, -0.2]])
    marginal = LinearGaussianMarginal(ssm, 3)
    np.testing.assert_allclose(site_log_density(marginal, y), marginal.log_prob(y), rtol=1e-12)
    batch = np.stack([y, np.full((3, 2), NAN)])
    np.testing.assert_allclose(
        site_log_density(marginal.expand([2]).to_event(1), batch), marginal.log_prob(y), rtol=1e-12
    )


# --- as a site --------------------------------------------------------------------------------------------------------


def test_without_observations_it_draws():
    site = numpyro.handlers.seed(lambda: observe("y", dist.Normal(np.arange(3.0), 0.1).to_event(1), None), 0)
    draw = site()
    assert draw.shape == (3,)
    np.testing.assert_allclose(draw, np.arange(3.0), atol=1)
    trace = numpyro.handlers.trace(site).get_trace()
    assert not trace["y"]["is_observed"]


def test_predictive_keeps_the_shape_of_counts():
    def model(counts=None):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        observe("counts", dist.Poisson(rate * jnp.ones((4, 2))).to_event(2), counts)

    draws = Predictive(model, num_samples=5)(jax.random.key(0))["counts"]
    assert draws.shape == (5, 4, 2)
    assert (draws >= 0).all()


def test_plate():
    with_nan = np.where(MISSING, NAN, COUNTS)

    def model(counts):
        with numpyro.plate("steps", 6):
            observe("counts", dist.Poisson(2.0), counts)

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(with_nan)
    assert trace["counts"]["fn"].batch_shape == (6,)
    expected = stats.poisson.logpmf(COUNTS, 2.0)[~MISSING].sum()
    np.testing.assert_allclose(log_density(model, (with_nan,), {}, {})[0], expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda c: log_density(model, (c,), {}, {})[0])(with_nan), expected, rtol=1e-12)


def test_plate_of_vector_events():
    def model(y):
        with numpyro.plate("rows", 5):
            observe("y", dist.MultivariateNormal(LOC, COV), y)

    expected = sum(scipy_marginal(row) for row in ROWS)
    np.testing.assert_allclose(log_density(model, (ROWS,), {}, {})[0], expected, rtol=1e-10)


def test_handlers_scale_and_mask():
    with_nan = np.where(MISSING, NAN, REALS)
    plain = site_log_density(dist.Normal(0.0, 1.0).expand([6]), with_nan)

    def scaled():
        with numpyro.handlers.scale(scale=3.0):
            observe("y", dist.Normal(0.0, 1.0).expand([6]), with_nan)

    def masked():
        with numpyro.handlers.mask(mask=np.arange(6) < 1):
            observe("y", dist.Normal(0.0, 1.0).expand([6]), with_nan)

    np.testing.assert_allclose(log_density(scaled, (), {}, {})[0], 3 * plain, rtol=1e-12)
    np.testing.assert_allclose(log_density(masked, (), {}, {})[0], stats.norm.logpdf(REALS[0]), rtol=1e-12)


def test_refuses_infinite_values_and_text():
    with pytest.raises(ValueError, match="`obs` has an infinite value"):
        site_log_density(dist.Normal(0.0, 1.0).expand([2]), [0.0, np.inf])
    with pytest.raises(TypeError, match="`obs`"):
        site_log_density(dist.Normal(0.0, 1.0).expand([2]), ["a", "b"])


def test_support_is_that_of_the_base_or_nan():
    np.testing.assert_array_equal(
        WithMissing(dist.Poisson(1.0).expand([4])).support(jnp.array([NAN, 2.0, -1.0, 0.5])), [True, True, False, False]
    )
    log_prob = WithMissing(dist.Gamma(2.0, 1.0).expand([2]), validate_args=True).log_prob(jnp.array([NAN, 1.0]))
    np.testing.assert_allclose(log_prob, [0.0, -1.0])


def test_moments_and_pytree():
    base = WithMissing(dist.Normal(jnp.arange(3.0), 2.0))
    np.testing.assert_array_equal(base.mean, np.arange(3.0))
    np.testing.assert_array_equal(base.variance, np.full(3, 4.0))
    leaves, structure = jax.tree.flatten(base)
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.log_prob(jnp.array([0.0, NAN, 1.0])), base.log_prob(jnp.array([0.0, NAN, 1.0])))
    batched = jax.vmap(lambda m: WithMissing(dist.Normal(m, 1.0)))(jnp.arange(2.0))
    np.testing.assert_allclose(batched.base.loc, [0.0, 1.0])


def test_float32():
    with jax.enable_x64(False):
        log_prob = WithMissing(dist.MultivariateNormal(LOC, COV)).log_prob(ROWS)
        assert log_prob.dtype == jnp.float32
        np.testing.assert_allclose(log_prob, [scipy_marginal(row) for row in ROWS], rtol=1e-5)
