"""`lds` and `dynamic_factor`: their priors are those of EM, their basis is one, and their draws what they say."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import pssm
from pssm import LinearGaussianSSM, fit_em, models
from pssm.learning import Prior


def series(seed=0, steps=60, p=4, holes=True):
    rng = np.random.default_rng(seed)
    z = np.zeros((steps, 2))
    for t in range(1, steps):
        z[t] = [[0.9, 0.2], [-0.2, 0.7]] @ z[t - 1] + rng.normal(size=2)
    y = z @ rng.normal(size=(2, p)) + 0.5 * rng.normal(size=(steps, p)) + 3.0
    if holes:
        y[5, 1] = y[20:23] = np.nan
    return y


@pytest.fixture(scope="module")
def mode():
    """Data, inputs and a converged MAP-EM."""
    with jax.enable_x64(True):
        y, u = series(), np.sin(np.arange(60.0))[:, None]
        prior = models.lds_prior(y, 2, u=u)
        start = models.lds_start(y, 2, u=u, num_iters=20)
        result = fit_em(
            y,
            start,
            u=u,
            prior=prior,
            fixed=("m0", "P0", "Q"),
            diagonal=("R",),
            num_iters=20_000,
            tol=1e-13,
            polish_steps=2000,
        )
        return y, u, prior, result


def test_the_mode_of_em_is_stationary_for_the_model(mode, x64):
    y, u, prior, result = mode
    values = models.lds_values(result.ssm)

    @jax.jit
    def joint(values):
        return log_density(partial(models.lds, num_states=2), (y,), {"u": u}, values)[0]

    gradients = jax.jit(jax.grad(joint))(values)
    for name, g in gradients.items():
        sizes = np.maximum(np.abs(values[name]), 0.1)
        np.testing.assert_allclose(g * sizes, 0.0, atol=2e-2, err_msg=name)
    # The two objectives differ by a constant only, wherever they are compared.
    other = result.ssm.replace(A=0.9 * result.ssm.A, chol_R=1.2 * result.ssm.chol_R, D=result.ssm.D + 0.1)
    from pssm.learning.priors import checked, log_prior

    def climbed(ssm):
        return pssm.log_likelihood(ssm, y, u) + log_prior(ssm, checked(prior, ssm))

    apart = joint(models.lds_values(other)) - joint(values)
    assert apart == pytest.approx(float(climbed(other) - climbed(result.ssm)), abs=1e-7)
    assert apart < -1.0


def test_values_are_the_same_system_in_the_models_basis(x64):
    rng = np.random.default_rng(3)
    q = oracles.random_model(rng, n=3, p=4, m=1, offsets=True)
    q["A"] = 0.5 * q["A"] / np.abs(np.linalg.eigvals(q["A"])).max()
    q["chol_R"] = np.diag([0.5, 0.6, 0.7, 0.8])
    q["b"] = None
    q["m0"] = np.zeros(3)
    q["chol_Q"] = rng.normal(size=(3, 3))
    q["chol_P0"] = 3.0 * q["chol_Q"]
    ssm = LinearGaussianSSM(**q)
    y, u = rng.normal(size=(7, 4)), rng.normal(size=(7, 1))
    u[0] = 0.0  # the model counts its inputs from there
    values = models.lds_values(ssm)
    model = handlers.substitute(partial(models.lds, y, num_states=3, u=u), data=values)
    fn = handlers.trace(model).get_trace()["y"]["fn"]
    assert float(fn.log_prob(y)) == pytest.approx(oracles.log_likelihood(ssm, y, u), abs=1e-8)
    assert (np.triu(fn.ssm.C, 1) == 0).all()
    with pytest.raises(ValueError, match="singular `Q`"):
        models.lds_values(ssm.replace(chol_Q=np.ones((3, 1))))


def test_a_step_of_map_em_is_the_maximum_of_its_objective(x64):
    """Dense moments, the prior's density written out, and a general optimiser that must not find anything better."""
    rng = np.random.default_rng(1)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, n=2, p=3, offsets=True))
    ys = [rng.normal(size=(6, 3)), rng.normal(size=(4, 3))]
    part = pssm.learning.MatrixNormalInverseWishart
    prior = Prior(
        initial=part(rng.normal(size=2), [2.0], np.eye(2) + 0.3, 4.0),
        transition=part(rng.normal(size=(2, 3)), 2 * np.eye(3) + 0.5, np.diag([1.0, 2.0]), 5.0),
        emission=part(rng.normal(size=(3, 3)), [1.0, 2.0, 0.5], [1.0, 2.0, 3.0], 6.0),
    )
    found = fit_em(ys, ssm, num_iters=1, fixed=(), prior=prior).ssm
    expected = oracles.expected_log_joint(ssm, ys)
    names = ("m0", "P0", "A", "b", "Q", "C", "d", "R")
    parameters = {name: jnp.asarray(getattr(found, name)) for name in names}

    def objective(p):
        total = expected(p)
        for X, cov, own in (
            (p["m0"][:, None], p["P0"], prior.initial),
            (jnp.concatenate([p["A"], p["b"][:, None]], 1), p["Q"], prior.transition),
            (jnp.concatenate([p["C"], p["d"][:, None]], 1), p["R"], prior.emission),
        ):
            mean = jnp.reshape(own.mean, X.shape)
            precision = jnp.asarray(own.precision)
            precision = jnp.diag(precision) if precision.ndim == 1 else precision
            scale = jnp.asarray(own.scale)
            scale = jnp.diag(scale) if scale.ndim == 1 else scale
            left, right = X.shape
            logdet = jnp.linalg.slogdet(cov)[1]
            inverse = jnp.linalg.inv(cov)
            total -= 0.5 * (right * logdet + jnp.trace(inverse @ (X - mean) @ precision @ (X - mean).T))
            total -= 0.5 * ((own.degrees + left + 1) * logdet + jnp.trace(inverse @ scale))
        return total

    for name, g in jax.grad(objective)(parameters).items():
        np.testing.assert_allclose(g, 0.0, atol=1e-8, err_msg=name)


def test_single_precision_agrees():
    """A step of MAP-EM, and the density of `lds` with its gradient."""
    found = {}
    y = series(steps=20)
    for wide in (False, True):
        with jax.enable_x64(wide):
            one = jnp.eye(2)
            C = jnp.array([[1.0, 0.0], [0.5, 0.7], [-0.3, 0.2], [0.1, 0.4]])
            start = LinearGaussianSSM(jnp.zeros(2), 3.0 * one, 0.6 * one, one, C, 0.8 * jnp.eye(4), d=3.0 * jnp.ones(4))
            prior = models.lds_prior(jnp.asarray(y), 2)
            fit = fit_em(y, start, prior=prior, num_iters=3, tol=0.0, fixed=("m0", "P0", "Q"), diagonal=("R",))
            values = models.lds_values(start)
            joint = jax.jit(
                jax.value_and_grad(lambda v: log_density(partial(models.lds, num_states=2), (y,), {}, v)[0])
            )
            found[wide] = fit.log_joint, fit.ssm.A, fit.ssm.R, *jax.tree.leaves(joint(values))
    assert found[False][1].dtype == jnp.float32
    for a, b in zip(found[False], found[True], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_with_a_prior_the_sum_rises_and_holds_what_the_likelihood_cannot(x64):
    y = series(steps=12)
    options = dict(fixed=("m0", "P0", "Q"), diagonal=("R",))
    likely = fit_em(y, models.lds_start(y, 2, num_iters=2), num_iters=60, **options)
    result = fit_em(y, likely.ssm, prior=models.lds_prior(y, 2), num_iters=60, **options)
    assert (np.diff(result.log_joint) >= -1e-9).all()
    assert result.log_likelihoods[-1] < result.log_likelihoods[0] - 0.1, "it is not the likelihood that rises"
    # Four series in four steps: without a prior the likelihood of a full R is unbounded, and it is refused.
    few = series(steps=5, holes=False)
    with pytest.raises(ValueError, match="too few for a full `R`"):
        fit_em(few, 2)
    assert np.isfinite(fit_em(few, result.ssm, prior=models.lds_prior(few, 2), tol=0.0).log_joint).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(mean=np.zeros((2, 2))), r"`prior.emission.mean` must have shape \(4, 3\)"),
        (dict(precision=np.ones(2)), r"`prior.emission.precision` must have shape \(3, 3\) or \(3,\)"),
        (dict(scale=np.zeros(4)), "`prior.emission.scale` must be positive definite"),
        (dict(precision=-np.ones(3)), "`prior.emission.precision` must be positive semi-definite"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_prior_that_does_not_fit_is_named(change, words):
    y = series(steps=12)
    prior = models.lds_prior(y, 2)
    with pytest.raises(ValueError, match=words):
        fit_em(y, 2, prior=prior._replace(emission=prior.emission._replace(**change)), diagonal=("R",))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("error_order", [0, 2])
def test_a_factor_model_has_the_covariances_it_says(order, error_order, x64):
    """Autocovariances of the series from the sites, by a long sum of impulse responses."""
    model = partial(models.dynamic_factor, num_factors=2, factor_order=order, error_order=error_order)
    trace = handlers.trace(handlers.seed(model, 1)).get_trace(num_steps=6, num_obs=3)
    ssm = trace["y"]["fn"].ssm
    mean, cov = oracles.observed_moments(ssm, 6)
    values = {name: np.asarray(site["value"]) for name, site in trace.items()}

    def responses(coefficients, length=4000):
        out = [np.eye(coefficients.shape[-1])]
        for t in range(1, length):
            out.append(sum(coefficients[i] @ out[t - 1 - i] for i in range(min(t, len(coefficients)))))
        return np.array(out)

    psi = responses(values["phi"])
    for lag in range(3):
        factor_cov = np.einsum("tij,tkj->ik", psi[lag:], psi[: len(psi) - lag])  # Cov(f_{t+lag}, f_t)
        wanted = values["loadings"] @ factor_cov @ values["loadings"].T
        if not error_order:
            wanted = wanted + (lag == 0) * np.diag(values["sigma_obs"] ** 2)
        else:
            r1, r2 = values["error_partial"].T
            for i in range(3):
                e = responses(np.array([[[r1[i] * (1 - r2[i])]], [[r2[i]]]]))[:, 0, 0]
                wanted[i, i] += values["sigma_obs"][i] ** 2 * (e[lag:] * e[: len(e) - lag]).sum()
        block = cov.reshape(6, 3, 6, 3)[lag, :, 0]
        np.testing.assert_allclose(block, wanted, atol=1e-7)
    np.testing.assert_allclose(mean.reshape(6, 3), np.tile(values["d"], (6, 1)), atol=1e-12)


def test_sampled_factors_and_marginal_ones_are_one_model(x64):
    """`log p(y) = log p(y | z) + log p(z) - log p(z | y)` at any path, here with autoregressive errors."""
    y = series(steps=8, p=3)
    model = partial(models.dynamic_factor, y, num_factors=1, error_order=1)
    marginal = handlers.trace(handlers.seed(model, 0)).get_trace()
    values = {name: s["value"] for name, s in marginal.items() if s["type"] == "sample" and name != "y"}
    sampled = handlers.trace(
        handlers.seed(handlers.substitute(partial(model, states="sampled"), values), 1)
    ).get_trace()
    z = sampled["z"]["value"]
    ssm = marginal["y"]["fn"].ssm
    # The factors' posterior: the other states are a function of factor and data where these are seen.
    posterior = oracles.path_posterior(ssm, y, slice(0, 1)).logpdf(z.ravel())
    found = float(sampled["y"]["fn"].log_prob(y) + sampled["z"]["fn"].log_prob(z) - posterior)
    assert found == pytest.approx(float(marginal["y"]["fn"].log_prob(y)), abs=1e-7)


@pytest.mark.parametrize("states", ["marginal", "sampled"])
def test_sequences_are_scored_one_by_one(states, x64):
    y = np.stack([series(seed, steps=10) for seed in range(3)])
    model = handlers.seed(partial(models.lds, num_states=2, states=states), 0)
    trace = handlers.trace(model).get_trace(y)
    assert trace["y"]["fn"].log_prob(y).shape == (3,)
    values = {name: s["value"] for name, s in trace.items() if s["type"] == "sample" and name not in ("y", "sequences")}
    alone = []
    for i in range(3):
        own = values | ({"z": values["z"][i]} if states == "sampled" else {})
        about = dict(location=np.nanmean(y, (0, 1)), scale=np.ones(4))
        one = handlers.trace(handlers.substitute(partial(models.lds, y[i], num_states=2, states=states, **about), own))
        alone.append(float(one.get_trace()["y"]["fn"].log_prob(y[i])))
    np.testing.assert_allclose(trace["y"]["fn"].log_prob(y), alone, atol=1e-8)


TWO = np.arange(10.0).reshape(5, 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.lds(num_steps=5), "`num_steps` and `num_obs` are required"),
        (lambda: models.lds(np.ones((5, 2)), num_obs=3), "`num_obs` is 3, but `y` has 2"),
        (lambda: models.lds(TWO, u=np.ones((4, 1))), r"`u` must have shape \(5, input\)"),
        (lambda: models.lds(np.ones((5, 2)), num_states=0), "`num_states` must be at least 1"),
        (
            lambda: models.dynamic_factor(TWO, num_factors=3),
            "`num_factors` must be at most 2",
        ),
        (lambda: models.dynamic_factor(np.ones((5, 2)), states="both"), "`states` must be one of"),
        (
            lambda: models.dynamic_factor(TWO, error_order=-1),
            "`error_order` must be at least 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=words):
        call()
