"""Particle filters against exact evidence, exact smoothers and a fine-grid filter; particle Gibbs against a grid."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import MCMC, NUTS, HMCGibbs
from scipy import stats

import pssm
from pssm.distributions import LowRankChain, StatePath, observe
from pssm.filters import conditional_smc, particle_filter, particle_smoother
from pssm.filters.resampling import RESAMPLERS, ess
from pssm.guides import guided_proposal
from pssm.infer import particle_gibbs

RHO, SIGMA = 0.95, 0.3
START = SIGMA / np.sqrt(1 - RHO**2)
READOUT = {
    "volatility": lambda z: dist.Normal(0.0, jnp.exp(z / 2)).to_event(1),
    "counts": lambda z: dist.Poisson(jnp.exp(1.0 + z)).to_event(1),
}
LOG_DENSITY = {
    "volatility": lambda y, z: stats.norm.logpdf(y, scale=np.exp(z / 2)),
    "counts": lambda y, z: stats.poisson.logpmf(y, np.exp(1.0 + z)),
}


def scalar_model(name):
    one = jnp.eye(1)
    return pssm.NonlinearSSM(jnp.zeros(1), START * one, lambda z, u: RHO * z, SIGMA * one, READOUT[name])


MODELS = {name: scalar_model(name) for name in READOUT}


@cache
def scalar_case(name, steps):
    """Data with a gap, and the log evidence from a grid."""
    rng = np.random.default_rng(0)
    z = np.zeros(steps)
    z[0] = START * rng.normal()
    for t in range(1, steps):
        z[t] = RHO * z[t - 1] + SIGMA * rng.normal()
    y = np.exp(z / 2) * rng.normal(size=steps) if name == "volatility" else rng.poisson(np.exp(1 + z)).astype(float)
    grid = np.linspace(-8, 8, 801)
    kernel = stats.norm.logpdf(grid[:, None], RHO * grid, SIGMA)
    emission = LOG_DENSITY[name](y[:, None], grid)
    emission[2] = 0.0
    y[2] = np.nan
    return y[:, None], oracles.grid_posterior(grid, stats.norm.logpdf(grid, scale=START), kernel, emission)[0]


@cache
def linear_numbers(steps=8):
    rng = np.random.default_rng(0)
    q = oracles.random_model(rng, n=2, p=2, m=1, offsets=True)
    q["chol_R"] = q["chol_R"] + 0.5 * np.eye(2)
    u = rng.normal(size=(steps, 1))
    y = np.asarray(pssm.simulate(jax.random.key(0), pssm.LinearGaussianSSM(**q), steps, u)[1], float)
    return q, oracles.with_holes(rng, y), u


def linear_case():
    """A model of two states and two variables with offsets and inputs, a series with holes, and its log evidence."""
    q, y, u = linear_numbers()
    ssm = pssm.LinearGaussianSSM(**q)
    return ssm, y, u, oracles.log_likelihood(ssm, y, u)


def messages(ssm, y, u=None, scale=1.0):
    h, J = oracles.backward_messages(ssm, y, u)
    return SimpleNamespace(k=scale * h, K=np.sqrt(scale) * oracles.root(J), diag=None, center=None)


@partial(jax.jit, static_argnames=("num_particles", "proposal", "resample"))
def likelihoods(keys, model, y, u, potentials, num_particles, proposal=None, resample="systematic"):
    guide = proposal if potentials is None else SimpleNamespace(**potentials)
    options = {"num_particles": num_particles, "proposal": guide, "resample": resample}
    return jax.vmap(lambda k: particle_filter(k, model, y, u, **options).log_likelihood)(keys)


def assert_unbiased(found, exact):
    ratio = np.exp(np.asarray(found, float) - exact)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(len(ratio))
    assert ratio.std() < 3  # else the line above says nothing


KEYS = 1000


@pytest.mark.parametrize("proposal", [None, "ekf", "potentials"])
def test_evidence_of_a_linear_model_is_unbiased(proposal, x64):
    ssm, y, u, exact = linear_case()
    potentials = vars(messages(ssm, y, u, scale=0.6)) if proposal == "potentials" else None
    proposal = None if proposal == "potentials" else proposal
    keys = jax.random.split(jax.random.key(1), KEYS)
    assert_unbiased(likelihoods(keys, ssm, y, u, potentials, 64, proposal), exact)


@pytest.mark.parametrize("resample", list(RESAMPLERS))
def test_evidence_is_unbiased_with_each_resampling(resample):
    y, exact = scalar_case("counts", 8)
    keys = jax.random.split(jax.random.key(2), KEYS)
    assert_unbiased(likelihoods(keys, MODELS["counts"], y, None, None, 64, resample=resample), exact)


@pytest.mark.parametrize(("name", "proposal"), [("volatility", "guided"), ("counts", "ukf")])
def test_evidence_of_a_scalar_model_is_unbiased(name, proposal):
    y, exact = scalar_case(name, 8)
    potentials = guided_proposal(MODELS[name], y)._asdict() if proposal == "guided" else None
    potentials = None if potentials is None else {k: potentials[k] for k in ("k", "K", "diag", "center")}
    proposal = None if proposal == "guided" else proposal
    keys = jax.random.split(jax.random.key(2), KEYS)
    assert_unbiased(likelihoods(keys, MODELS[name], y, None, potentials, 8 if potentials else 64, proposal), exact)


def test_exact_messages_leave_no_error(x64):
    ssm, y, u, exact = linear_case()
    model = pssm.NonlinearSSM.from_linear(ssm)
    prior = StatePath.from_ssm(ssm, len(y), u)
    given = messages(ssm, y, u)
    at_mode = guided_proposal(model, y, u)
    for proposal in (given, LowRankChain(prior, given.k, given.K), at_mode):
        for seed in range(3):
            found = particle_filter(jax.random.key(seed), model, y, u, num_particles=20, proposal=proposal)
            assert float(found.log_likelihood) == pytest.approx(exact, abs=1e-8)
            np.testing.assert_allclose(found.ess, 20, atol=1e-6)
            total = found.log_weights + found.log_look_ahead
            np.testing.assert_allclose(total - total[:, :1], 0, atol=1e-6)
            assert float(found.log_likelihoods.sum()) == pytest.approx(exact, abs=1e-8)


@partial(jax.jit, static_argnames=("name", "num_particles"))
def guided_and_bootstrap(keys, y, name, num_particles):
    model = MODELS[name]
    guide = guided_proposal(model, y)

    def run(key, proposal):
        return particle_filter(key, model, y, num_particles=num_particles, proposal=proposal).log_likelihood

    return tuple(jax.lax.map(lambda k, p=p: run(k, p), keys) for p in (guide, None))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["volatility", "counts"])
def test_guiding_cuts_the_variance_a_hundredfold(name):
    y, exact = scalar_case(name, 500)
    guided, bootstrap = guided_and_bootstrap(jax.random.split(jax.random.key(0), 100), y, name, 200)
    print(name, "variance", guided.var(ddof=1), bootstrap.var(ddof=1), bootstrap.var(ddof=1) / guided.var(ddof=1))
    assert guided.var(ddof=1) * 100 < bootstrap.var(ddof=1)
    assert float(guided.mean()) == pytest.approx(exact, abs=5 * float(guided.std()) / 10 + float(guided.var()))


# Resampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(RESAMPLERS))
def test_expected_numbers_of_copies_are_the_weights(name):
    weights = np.array([0.4, 0.0, 0.25, 0.1, 0.2, 0.05, 0.0])

    @jax.jit
    def counts(keys):
        chosen = jax.vmap(lambda k: RESAMPLERS[name](k, jnp.log(weights) + 3.0))(keys)
        return jnp.sum(chosen[..., None] == jnp.arange(7), axis=1)

    found = np.asarray(counts(jax.random.split(jax.random.key(0), 20_000)))
    assert (found.sum(1) == 7).all()
    error = 4.5 * found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - 7 * weights) <= error + 1e-6).all()
    if name in ("systematic", "residual"):
        assert (found >= np.floor(7 * weights)).all()
    if name == "systematic":
        assert (found <= np.ceil(7 * weights)).all()


def test_effective_number():
    assert float(ess(jnp.zeros(5) - 1000.0)) == pytest.approx(5)
    assert float(ess(jnp.log(jnp.array([0.5, 0.5, 0.0])))) == pytest.approx(2)
    assert float(ess(jnp.full(3, -jnp.inf))) == 0


def test_resampling_only_where_the_weights_need_it(key):
    y, _ = scalar_case("counts", 8)
    run = partial(particle_filter, key, MODELS["counts"], y, num_particles=64)
    kept = np.arange(64)
    moved = {share: (np.asarray(run(ess_threshold=share).ancestors) != kept).any(1) for share in (0.0, 0.5, 1.0)}
    assert not moved[0.0].any()
    assert moved[1.0][[1, 2, 4, 5, 6, 7]].all()
    assert not moved[1.0][3]  # the step before was missing: the weights are equal still
    found = run(ess_threshold=0.5)
    np.testing.assert_array_equal(moved[0.5][1:], np.asarray(found.ess)[:-1] < 32)


# Missing data, degenerate weights, shapes -----------------------------------------------------------------------------


def test_missing_entries_count_as_if_they_were_not_there(key):
    y = np.random.default_rng(1).normal(size=(7, 2))
    y[:, 1] = np.nan
    y[-2:] = np.nan

    def model(count):
        def emission(z):
            return dist.Normal(z[:count], 0.5).to_event(1)

        return pssm.NonlinearSSM(jnp.zeros(2), jnp.eye(2), lambda z, u: jnp.sin(z), 0.5 * jnp.eye(2), emission)

    found = particle_filter(key, model(2), y, num_particles=50)
    other = particle_filter(key, model(1), y[:, :1], num_particles=50)
    shorter = particle_filter(key, model(1), y[:-2, :1], num_particles=50)
    np.testing.assert_allclose(found.log_weights, other.log_weights, atol=1e-5)
    np.testing.assert_allclose(found.log_likelihood, shorter.log_likelihood, atol=1e-5)
    np.testing.assert_allclose(found.log_likelihoods[-2:], 0.0, atol=1e-5)


def sign_model():
    return pssm.NonlinearSSM(
        jnp.zeros(1), jnp.eye(1), lambda z, u: z, jnp.zeros((1, 1)), lambda z: dist.Delta(jnp.sign(z)).to_event(1)
    )


def test_impossible_observations(key):
    model = sign_model()
    possible = particle_filter(key, model, [1.0, 1.0, 1.0], num_particles=1000)
    assert float(possible.log_likelihood) == pytest.approx(np.log(0.5), abs=0.2)
    assert (np.asarray(possible.particles[1:]) > 0).all()
    found = particle_filter(key, model, [1.0, 5.0, 1.0], num_particles=1000)
    assert found.log_likelihood == -np.inf
    np.testing.assert_array_equal(np.isinf(found.log_likelihoods), [False, True, False])
    assert not any(np.isnan(x).any() for x in jax.tree.map(np.asarray, found))
    exploding = pssm.NonlinearSSM(
        jnp.zeros(1), jnp.eye(1), lambda z, u: jnp.where(z > 0, jnp.inf, z), jnp.eye(1), lambda z: dist.Normal(z, 1.0)
    )
    assert np.isfinite(particle_filter(key, exploding, [0.0, 0.0, 0.0], num_particles=50).log_likelihood)


@pytest.mark.parametrize(
    ("proposal", "wide"),
    [(None, False), pytest.param("ekf", False, marks=pytest.mark.slow), ("messages", False), ("messages", True)],
)
def test_singular_noise_in_both_precisions(proposal, wide):
    with jax.enable_x64(wide):
        dtype = jnp.float64 if wide else jnp.float32
        A, column = jnp.array([[1.2, -0.4], [1.0, 0.0]], dtype), jnp.array([[0.5], [0.0]], dtype)
        one = jnp.ones((1, 1), dtype)
        ssm = pssm.LinearGaussianSSM(
            jnp.zeros(2, dtype), jnp.eye(2, dtype=dtype), A, column, jnp.array([[1.0, 0.0]], dtype), one
        )
        y = np.random.default_rng(0).normal(size=(30, 1)).astype(dtype)
        exact = float(pssm.log_likelihood(ssm, y))
        guided = proposal == "messages"
        guide = messages(ssm, y) if guided else proposal
        found = particle_filter(jax.random.key(0), ssm, y, num_particles=2000, proposal=guide)
        assert found.particles.dtype == dtype
        tolerance = (1e-8 if wide else 1e-3) if guided else 0.4
        assert float(found.log_likelihood) == pytest.approx(exact, abs=tolerance)
        z = np.asarray(found.particles)
        parents = np.take_along_axis(z[:-1], np.asarray(found.ancestors)[1:, :, None], axis=1)
        np.testing.assert_allclose(z[1:, :, 1], parents[:, :, 0], atol=1e-4)


def test_time_varying_noise_and_one_step(x64):
    rng = np.random.default_rng(0)
    q = oracles.random_model(rng, n=2, p=1, steps=6, timed=("chol_Q",))
    y = rng.normal(size=(6, 1))
    for length in (6, 1):
        cut = pssm.LinearGaussianSSM(**(q | {"chol_Q": q["chol_Q"][:length]}))
        guide = messages(cut, y[:length])
        found = particle_filter(jax.random.key(0), cut, y[:length], num_particles=10, proposal=guide)
        assert float(found.log_likelihood) == pytest.approx(oracles.log_likelihood(cut, y[:length]), abs=1e-8)
        assert found.particles.shape == (length, 10, 2)


def equations(jaxpr):
    """Number of equations, those of inner programs included."""
    inner = (x for e in jaxpr.eqns for p in e.params.values() for x in (p if isinstance(p, tuple | list) else [p]))
    return len(jaxpr.eqns) + sum(equations(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "eqns"))


@pytest.mark.parametrize("guided", [False, True])
def test_program_does_not_grow_with_the_series(guided, key):
    def size(steps):
        k = jnp.ones((steps, 1))
        guide = SimpleNamespace(k=k, K=k[..., None], diag=k, center=k) if guided else None
        run = partial(particle_filter, key, MODELS["counts"], num_particles=10, proposal=guide)
        return equations(jax.make_jaxpr(run)(k).jaxpr)

    assert size(500) == size(50) > 100


def test_models_of_the_same_functions_share_a_program(key):
    ssm, y, u, _ = linear_case()
    traces = 0

    @jax.jit
    def run(model):
        nonlocal traces
        traces += 1
        return model.m0

    for scale in (1.0, 2.0):
        run(pssm.NonlinearSSM.from_linear(pssm.LinearGaussianSSM(**(oracles.parameters(ssm)[0] | {"m0": [scale, 0]}))))
    assert traces == 1


def test_bad_inputs_are_named(key):
    y, _ = scalar_case("counts", 8)
    run = partial(particle_filter, key, MODELS["counts"], y)
    with pytest.raises(ValueError, match="`num_particles`"):
        run(num_particles=0)
    with pytest.raises(ValueError, match="`resample`.*systematic"):
        run(num_particles=5, resample="sistematic")
    with pytest.raises(ValueError, match="`ess_threshold`"):
        run(num_particles=5, ess_threshold=2.0)
    with pytest.raises(ValueError, match="`proposal`.*ekf"):
        run(num_particles=5, proposal="efk")
    with pytest.raises(TypeError, match="`proposal`.*guided_proposal"):
        run(num_particles=5, proposal=3.0)
    k = jnp.ones((8, 1))
    with pytest.raises(ValueError, match="`proposal.K` must have shape"):
        run(num_particles=5, proposal=SimpleNamespace(k=k, K=k, diag=None, center=None))
    with pytest.raises(ValueError, match="`proposal.diag` must have shape"):
        run(num_particles=5, proposal=SimpleNamespace(k=k, K=k[..., None], diag=k[:5], center=None))
    with pytest.raises(TypeError, match="`model`"):
        particle_filter(key, 3, y, num_particles=5)
    with pytest.raises(ValueError, match="`rank`"):
        guided_proposal(MODELS["counts"], y, rank=2)
    with pytest.raises(ValueError, match="`reference` is not a path that the noise can make"):
        conditional_smc(key, sign_model(), [1.0, 1.0], jnp.array([[1.0], [-3.0]]), num_particles=5)
    found = particle_filter(key, sign_model(), [1.0, 1.0, 1.0], num_particles=1000)
    with pytest.raises(ValueError, match="`y` must have 3 steps"):
        particle_smoother(key, sign_model(), found, num_paths=5, y=[1.0, 1.0])
    with pytest.raises(TypeError, match="`result`"):
        particle_smoother(key, MODELS["counts"], found._asdict(), num_paths=5)
    with pytest.raises(ValueError, match="`reference`"):
        conditional_smc(key, MODELS["counts"], y, jnp.ones((3, 1)), num_particles=5)
    for proposal in ("guide", "bootstrp"):
        with pytest.raises(ValueError, match="`proposal`.*'bootstrap', 'guided', 'ekf'"):
            conditional_smc(key, MODELS["counts"], y, jnp.ones((8, 1)), num_particles=5, proposal=proposal)
        with pytest.raises(ValueError, match="`proposal`.*'bootstrap', 'guided', 'ekf'"):
            particle_gibbs(level_ssm, y, num_particles=5, proposal=proposal)


def test_guided_by_name_is_guided_by_the_potentials():
    y = jnp.asarray([1.0, 0.0, jnp.nan, 2.0])
    run = partial(particle_filter, jax.random.key(0), MODELS["counts"], y, num_particles=20)
    given, named = run(proposal=guided_proposal(MODELS["counts"], y)), run(proposal="guided")
    np.testing.assert_allclose(given.log_likelihood, named.log_likelihood, rtol=1e-5)
    assert float(named.ess.min()) > 15
    assert run(proposal="bootstrap").log_likelihood == run().log_likelihood


# Whole paths ----------------------------------------------------------------------------------------------------------


def assert_moments(paths, ssm, y, u, slack=0.0):
    """Means, covariances and lag-one covariances of independent paths are those of the exact smoother."""
    exact = oracles.states(ssm, y, u)
    mean, cov = exact["smoothed"]
    paths = np.asarray(paths, float)
    count = len(paths)
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    assert (np.abs(paths.mean(0) - mean) < (4.5 / np.sqrt(count) + slack) * sd).all()
    x = (paths - mean) / sd
    same = np.einsum("sti,stj->tij", x, x) / count
    cross = np.einsum("sti,stj->tij", x[:, 1:], x[:, :-1]) / count
    assert np.abs(same - cov / sd[:, :, None] / sd[:, None]).max() < 4.5 * np.sqrt(2 / count) + slack
    assert np.abs(cross - exact["cross_cov"] / sd[1:, :, None] / sd[:-1, None]).max() < 4.5 * np.sqrt(2 / count) + slack


@pytest.mark.parametrize("guided", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_backward_simulation_gives_the_smoother(guided):
    ssm, y, u, _ = linear_case()
    proposal = messages(ssm, y, u, scale=0.6) if guided else None
    found = particle_filter(jax.random.key(0), ssm, y, u, num_particles=2000, proposal=proposal)
    paths = particle_smoother(jax.random.key(1), ssm, found, u, num_paths=1000)
    assert_moments(paths, ssm, y, u, slack=0.1)  # the filter's own error


@partial(jax.jit, static_argnames="name")
def swept(keys, paths, ssm, y, u, potentials, sweeps, name=None):
    guide = name if potentials is None else SimpleNamespace(**potentials)

    def one(key, path):
        def body(i, path):
            k = jax.random.fold_in(key, i)
            return conditional_smc(k, ssm, y, path, u, num_particles=8, proposal=guide)

        return jax.lax.fori_loop(0, sweeps, body, path)

    return jax.vmap(one)(keys, paths)


@pytest.mark.parametrize("proposal", [None, "ekf", pytest.param("messages", marks=pytest.mark.slow)])
def test_conditional_smc_leaves_the_posterior_as_it_is(proposal):
    """From exact draws eight particles keep the law; from one path, far off, a few sweeps find it."""
    ssm, y, u, _ = linear_case()
    potentials = vars(messages(ssm, y, u, scale=0.6)) if proposal == "messages" else None
    exact = pssm.sample_states(jax.random.key(3), ssm, y, u, sample_shape=(2000,))
    keys = jax.random.split(jax.random.key(4), 2000)
    run = partial(swept, keys, ssm=ssm, y=y, u=u, potentials=potentials, name=proposal)
    after = run(exact, sweeps=3)
    assert np.mean(np.asarray(after == exact).all(-1)) < 0.5
    assert_moments(after, ssm, y, u)
    far = jnp.broadcast_to(exact.mean(0) + 1.0, exact.shape)
    assert_moments(run(far, sweeps=150), ssm, y, u)


def level_model(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    one = jnp.eye(1)
    z = numpyro.sample("z", StatePath(jnp.zeros(1), one, one, scale * one, len(y)))
    observe("y", dist.Normal(z, 0.5).to_event(2), y)


def level_ssm(sites):
    one = jnp.eye(1)
    return pssm.LinearGaussianSSM(jnp.zeros(1), one, one, sites["scale"] * one, one, 0.5 * one)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_particle_gibbs_against_a_grid(proposal):
    rng = np.random.default_rng(0)
    y = (np.cumsum(0.6 * rng.normal(size=20)) + 0.5 * rng.normal(size=20))[:, None]
    y[7] = np.nan
    grid = np.linspace(0.01, 3, 300)
    value = jax.jit(jax.vmap(lambda s: pssm.log_likelihood(level_ssm({"scale": s}), y)))(jnp.asarray(grid))
    log_density = np.asarray(value) - 0.5 * grid**2
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    gibbs = particle_gibbs(level_ssm, y, num_particles=20, proposal=proposal)
    mcmc = MCMC(HMCGibbs(NUTS(level_model), gibbs, ["z"]), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    draws = mcmc.get_samples(group_by_chain=True)["scale"]
    size = float(numpyro.diagnostics.effective_sample_size(np.asarray(draws)))
    assert size > 200
    assert float(draws.mean()) == pytest.approx(mean, abs=4.5 * sd / np.sqrt(size))
    assert float(draws.std()) == pytest.approx(sd, rel=4.5 / np.sqrt(size))
