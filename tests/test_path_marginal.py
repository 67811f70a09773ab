"""`path_marginal` against exact marginals, a grid, finite differences, and with all that takes a fit."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import enable_x64
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density
from scipy.stats import norm

from pssm import LinearGaussianSSM
from pssm.diagnostics import to_datatree
from pssm.distributions import LinearGaussianMarginal, StatePath, observe
from pssm.infer import (
    fit_nuts,
    forecast,
    load,
    path_marginal,
    posterior_draws,
    record_of,
    resume,
    sample_states,
    save,
    smoothed_states,
)

T = 10
KINDS = ("laplace", "variational", "importance")
POINT = {"a": 0.95, "q": 1.2, "r": 0.8}


def system(a, q, r):
    """Two states, one of them without noise of its own, moved by an input and known offsets."""
    A, Q = jnp.array([[1.0, 0.1], [0.0, 0.9]]) * a, jnp.array([[0.3], [0.1]]) * q
    C, R = jnp.array([[1.0, 0.5]]), jnp.array([[0.4]]) * r
    b, B = jnp.array([0.1, -0.1]), jnp.array([[0.2], [0.0]])
    return LinearGaussianSSM(jnp.array([0.1, -0.2]), jnp.eye(2), A, Q, C, R, b=b, B=B)


def parameters():
    """Their priors, and a site that no path enters."""
    a = numpyro.sample("a", dist.Normal(1.0, 0.1))
    q = numpyro.sample("q", dist.LogNormal(0.0, 0.3))
    r = numpyro.sample("r", dist.LogNormal(0.0, 0.3))
    numpyro.sample("other", dist.Normal(a, 1.0), obs=0.3)
    return system(a, q, r)


def exact(y, u):
    """The states integrated out exactly."""
    numpyro.sample("y", LinearGaussianMarginal(parameters(), len(y), u), obs=y)


def sampled(y, u):
    """The same with a path."""
    ssm = parameters()
    z = numpyro.sample("z", StatePath.from_ssm(ssm, len(y), u))
    numpyro.deterministic("last", z[-1])
    observe("y", dist.Normal(z @ ssm.C.T, ssm.chol_R[0, 0]).to_event(2), obs=y)


def linear_data():
    """A series with a gap, and inputs."""
    rng = np.random.default_rng(0)
    y = np.cumsum(rng.normal(size=(T, 1)), axis=0)
    y[3] = np.nan
    return y, rng.normal(size=(T, 1))


def value_and_slopes(model, args, point):
    """The log density and its gradient at a point, compiled."""
    point = {n: jnp.asarray(x) for n, x in point.items()}
    return jax.jit(jax.value_and_grad(lambda p: log_density(model, args, {}, p)[0]))(point)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_models_have_the_exact_marginal(kind):
    """Value and gradient, with a singular noise, a gap, an input; prepared or not."""
    with enable_x64(True):
        args = linear_data()
        right, slopes = value_and_slopes(exact, args, POINT)
        found, found_slopes = value_and_slopes(path_marginal(sampled, approximation=kind), args, POINT)
        np.testing.assert_allclose(found, right, rtol=1e-10)
        for name in POINT:
            np.testing.assert_allclose(found_slopes[name], slopes[name], rtol=1e-8, atol=1e-8)


def test_in_single_precision():
    """To the digits that it has."""
    args = tuple(x.astype(np.float32) for x in linear_data())
    right, slopes = value_and_slopes(exact, args, POINT)
    found, found_slopes = value_and_slopes(path_marginal(sampled, approximation="laplace"), args, POINT)
    np.testing.assert_allclose(found, right, rtol=1e-5)
    for name in POINT:
        np.testing.assert_allclose(found_slopes[name], slopes[name], rtol=1e-3, atol=1e-3)


def volatility(y, num_steps=40):
    """Stochastic volatility with two parameters."""
    phi = numpyro.sample("phi", dist.Beta(20.0, 2.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    one = jnp.ones((1, 1))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), one, phi * one, sigma * one, num_steps))
    observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), obs=y)


@cache
def returns():
    """A series of it."""
    rng, z, y = np.random.default_rng(4), 0.0, []
    for _ in range(40):
        z = 0.95 * z + 0.4 * rng.normal()
        y.append(np.exp(z / 2) * rng.normal())
    y[7] = np.nan
    return np.array(y)[:, None]


def by_grid(y, phi, sigma):
    """The evidence by a filter on a grid, and the smoothed means."""
    grid = np.linspace(-7.0, 7.0, 1401)
    width = grid[1] - grid[0]
    moves = norm.pdf(grid[:, None], phi * grid[None], sigma) * width
    seen = [np.ones_like(grid) if np.isnan(v) else norm.pdf(v, 0.0, np.exp(grid / 2)) for v in y[:, 0]]
    density, total, filtered = norm.pdf(grid), 0.0, []
    for t, likelihood in enumerate(seen):
        density = (moves @ density if t else density) * likelihood
        scale = density.sum() * width
        density, total = density / scale, total + np.log(scale)
        filtered.append(density)
    later, means = np.ones_like(grid), []
    for t in reversed(range(len(seen))):
        weight = filtered[t] * later
        means.append((grid * weight).sum() / weight.sum())
        later = moves.T @ (later * seen[t])
        later /= later.max()
    return total, np.array(means[::-1])


@pytest.mark.parametrize(("kind", "close"), [("laplace", 0.06), ("variational", 0.06), ("importance", 0.1)])
def test_the_value_is_close_to_that_of_a_grid(kind, close):
    """Stochastic volatility; the bound lies below, and the gradient is that of differences."""
    with enable_x64(True):
        y, point = returns(), {"phi": 0.94, "sigma": 0.35}
        right, means = by_grid(y, **point)
        model = path_marginal(volatility, approximation=kind, num_samples=64, num_iters=8)
        found = model.posterior(point, y)
        assert bool(found.converged)
        assert abs(float(found.log_value) - right) < close
        if kind == "variational":
            assert float(found.log_value) < right
            paths = found.chains["z"].sample(jax.random.key(0), (4000,))
            np.testing.assert_allclose(np.mean(paths[..., 0], axis=0), means, atol=0.06)
        density = jax.jit(lambda p: log_density(model, (y,), {}, p)[0])
        _, slopes = value_and_slopes(model, (y,), point)
        for name in point:
            up, down = ({**point, name: point[name] + h} for h in (1e-5, -1e-5))
            slope = (density(up) - density(down)) / 2e-5
            # Of the bound the steps before the last are held fixed, which counts to second order.
            np.testing.assert_allclose(slopes[name], slope, atol=1e-3 if kind == "variational" else 1e-6)


def test_the_joint_density_is_what_the_chain_approximates():
    """On a linear model the ratio of the two is the evidence, for every path."""
    with enable_x64(True):
        args = linear_data()
        model = path_marginal(sampled, approximation="laplace")
        found = model.posterior(POINT, *args)
        paths = found.chains["z"].sample(jax.random.key(1), (3,))
        ratios = [found.log_joint({"z": z}) - found.chains["z"].log_prob(z) for z in paths]
        np.testing.assert_allclose(ratios, np.full(3, found.log_value), rtol=1e-8)


def bent(y):
    """A nonlinear transition, counts, and noise that is singular in one direction."""
    pull = numpyro.sample("pull", dist.Normal(0.8, 0.1))
    z = numpyro.sample(
        "z", StatePath(jnp.zeros(2), jnp.eye(2), partial(swing, pull), jnp.array([[0.3], [0.0]]), len(y))
    )
    observe("y", dist.Poisson(jnp.exp(0.5 + z[:, :1])).to_event(2), obs=y)


def swing(pull, z, u):
    """Of a pendulum, roughly."""
    return jnp.stack([pull * z[0] + 0.2 * jnp.sin(z[1]), 0.9 * z[1] + 0.1 * z[0]])


def test_nonlinear_transitions():
    """The mode, its value and its derivative, against the noise's own density maximised and expanded densely."""
    with enable_x64(True):
        y, at = np.array([[1.0], [3.0], [np.nan], [2.0], [4.0], [0.0]]), 0.75
        model = path_marginal(bent, approximation="laplace")

        def joint(e, pull):
            prior = StatePath(jnp.zeros(2), jnp.eye(2), partial(swing, pull), jnp.array([[0.3], [0.0]]), len(y))
            rate = jnp.exp(0.5 + prior.path_from_noise(e)[:, 0])
            terms = jnp.where(np.isnan(y[:, 0]), 0.0, dist.Poisson(rate).log_prob(np.nan_to_num(y[:, 0])))
            return jnp.sum(terms) - jnp.sum(e**2) / 2

        def laplace(pull):
            def newton(_, e):
                return e - jnp.linalg.solve(jax.hessian(joint)(e, pull), jax.grad(joint)(e, pull))

            e = jax.lax.fori_loop(0, 30, newton, jnp.zeros(2 + len(y) - 1))
            return joint(e, pull) - 0.5 * jnp.linalg.slogdet(-jax.hessian(joint)(e, pull))[1]

        right, h = jax.jit(laplace), 1e-5
        slope = (right(at + h) - right(at - h)) / (2 * h)
        found, slopes = value_and_slopes(model, (y,), {"pull": at})
        prior = dist.Normal(0.8, 0.1)
        np.testing.assert_allclose(found - prior.log_prob(at), right(at), rtol=1e-9)
        np.testing.assert_allclose(slopes["pull"] - jax.grad(prior.log_prob)(at), slope, atol=1e-6)


def two_paths(y, u=None):
    """A level and a season-like cycle, added up; a third path alone; in a plate a panel."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    one = jnp.ones((1, 1))
    level = numpyro.sample("level", StatePath(jnp.zeros(1), one, one, 0.3 * scale * one, T))
    turn = jnp.array([[0.8, 0.6], [-0.6, 0.8]])
    cycle = numpyro.sample("cycle", StatePath(jnp.zeros(2), jnp.eye(2), turn, 0.2 * jnp.eye(2), T))
    alone = numpyro.sample("alone", StatePath(jnp.zeros(1), one, 0.5 * one, one, T))
    observe("y", dist.Normal(level + cycle[:, :1], 0.5).to_event(2), obs=y[0])
    observe("x", dist.Normal(alone, scale).to_event(2), obs=y[1])
    with numpyro.plate("series", 2):
        panel = numpyro.sample("panel", StatePath(jnp.zeros(1), one, 0.7 * one, scale * one, T))
        observe("p", dist.Normal(panel, 0.6).to_event(2), obs=y[2:])


def two_paths_exact(y):
    """The same, integrated out exactly."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    one, turn = jnp.ones((1, 1)), jnp.array([[0.8, 0.6], [-0.6, 0.8]])
    A = jnp.zeros((3, 3)).at[0, 0].set(1.0).at[1:, 1:].set(turn)
    Q = jnp.diag(jnp.array([0.3, 0.2, 0.2])) * jnp.where(jnp.arange(3) == 0, scale, 1.0)
    ssm = LinearGaussianSSM(jnp.zeros(3), jnp.eye(3), A, Q, jnp.array([[1.0, 1.0, 0.0]]), 0.5 * one)
    numpyro.sample("y", LinearGaussianMarginal(ssm, T), obs=y[0])
    single = partial(LinearGaussianSSM, jnp.zeros(1), one)
    numpyro.sample("x", LinearGaussianMarginal(single(0.5 * one, one, one, scale * one), T), obs=y[1])
    for i in (2, 3):
        numpyro.sample(f"p{i}", LinearGaussianMarginal(single(0.7 * one, scale * one, one, 0.6 * one), T), obs=y[i])


@pytest.mark.parametrize("kind", ["laplace", "variational"])
def test_several_paths_and_plates(kind):
    """Paths that a site joins are one; others have their own factor; the series of a plate are added up."""
    with enable_x64(True):
        y, point = np.random.default_rng(2).normal(size=(4, T, 1)), {"scale": 1.3}
        y[2, 4] = np.nan
        model = path_marginal(two_paths, approximation=kind)
        right, slopes = value_and_slopes(two_paths_exact, (y,), point)
        found, found_slopes = value_and_slopes(model, (y,), point)
        np.testing.assert_allclose(found, right, rtol=1e-9)
        np.testing.assert_allclose(found_slopes["scale"], slopes["scale"], rtol=1e-7)
        posterior = model.posterior(point, y)
        assert set(posterior.chains) == {"level, cycle", "alone", "panel"}
        draw = posterior.split({n: q.sample(jax.random.key(0)) for n, q in posterior.chains.items()})
        assert {n: x.shape for n, x in draw.items()} == {
            "level": (T, 1), "cycle": (T, 2), "alone": (T, 1), "panel": (2, T, 1)
        }  # fmt: skip


def test_plain_numpyro_and_a_fit_of_pssm():
    """Draws agree with those of the exact marginal, and all that takes a fit takes this one."""
    args = tuple(x.astype(np.float32) for x in linear_data())
    model = path_marginal(sampled, approximation="laplace")
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=200, progress_bar=False)
    mcmc.run(jax.random.key(0), *args)
    assert set(mcmc.get_samples()) == {"a", "q", "r"}
    assert record_of(mcmc).objective.startswith("approximate")
    draws = posterior_draws(mcmc)
    assert draws["z"].shape == (1, 200, T, 2)
    assert draws["last"].shape == (1, 200, 2)
    np.testing.assert_array_equal(draws["last"], draws["z"][..., -1, :])
    np.testing.assert_array_equal(draws["z"], posterior_draws(mcmc)["z"])
    rest = {n: jnp.asarray(x[0]) for n, x in draws.items() if n in POINT}
    means = jax.vmap(lambda p: LinearGaussianMarginal(system(**p), T, args[1]).smooth(args[0]).mean)(rest)
    sd = draws["z"].std((0, 1))
    np.testing.assert_allclose(draws["z"].mean((0, 1)), means.mean(0), atol=0.3 * sd.max())
    assert smoothed_states(mcmc).state.mean.shape == (T, 2)
    assert sample_states(mcmc, most=50).shape == (50, T, 2)
    longer = np.concatenate([args[0], np.full((3, 1), np.nan, np.float32)]), np.ones((T + 3, 1), np.float32)
    assert forecast(mcmc, 3, future=(longer, {}), most=50).mean.shape == (3, 1)
    tree = to_datatree(mcmc)
    assert {"posterior", "observed_data", "log_likelihood"} <= set(tree.children)
    assert tree["posterior"]["z"].dims[2:] == ("time", "state")


@pytest.mark.filterwarnings("ignore:.*transitions diverged")  # the warm-up is short
def test_a_fit_is_saved_and_goes_on(tmp_path):
    """The same draws after a break, and paths for each of them."""
    y = returns().astype(np.float32)[:12]
    model = partial(volatility, num_steps=12)
    options = {"num_warmup": 20, "num_chains": 1, "progress_bar": False}
    whole = fit_nuts(path_marginal(model, approximation="laplace"), y, num_samples=20, **options)
    part = fit_nuts(path_marginal(model, approximation="laplace"), y, num_samples=10, **options)
    again = load(save(part, tmp_path / "fit"), path_marginal(model, approximation="laplace"))
    longer = resume(again, num_samples=20, progress_bar=False)
    np.testing.assert_array_equal(longer.get_samples()["phi"], whole.get_samples()["phi"])
    assert posterior_draws(longer)["z"].shape == (1, 20, 12, 1)


def test_traced_data_and_no_preparation():
    """The density is a function of the parameters alone, whatever was called before."""
    with enable_x64(True):
        y, point = returns(), {"phi": jnp.asarray(0.94), "sigma": jnp.asarray(0.35)}
        model = path_marginal(volatility, approximation="laplace")
        traced = jax.jit(lambda y: log_density(model, (y,), {}, point)[0])(y)
        assert model.reference is None
        known = log_density(model, (y,), {}, point)[0]
        assert model.reference is not None
        np.testing.assert_allclose(traced, known, rtol=1e-10)


def heavy(y):
    """Student-t noise about a random walk: no log-concave likelihood."""
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    one = jnp.ones((1, 1))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), 2.0 * one, one, sigma * one, len(y)))
    observe("y", dist.StudentT(3.0, z, numpyro.sample("scale", dist.LogNormal(0.0, 0.5))).to_event(2), obs=y)


def explosive(y):
    """A transition that may leave all bounds."""
    push = numpyro.sample("push", dist.Normal(1.0, 1.0))
    one = jnp.ones((1, 1))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), one, lambda z, u: push * z + 0.1 * z**3, 0.3 * one, len(y)))
    observe("y", dist.Normal(z, 0.5).to_event(2), obs=y)


@pytest.mark.parametrize("model", [volatility, heavy, explosive, bent])
def test_over_the_prior_no_number_is_wrong_in_silence(model):
    """Each value is minus infinity, or the path is a mode: there the density is stationary and falls to all sides."""
    with enable_x64(True):
        y = returns() if model is volatility else np.abs(np.round(3 * np.nan_to_num(returns()[:15])))
        marginal = path_marginal(model, approximation="laplace").prepare(y)

        def at(key):
            trace = handlers.trace(handlers.seed(model, key)).get_trace(y)
            sites = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
            values = {n: x for n, x in sites.items() if n != "z"}
            found = marginal.posterior(values, y)
            chain = found.chains["z"]
            path = chain.potential.center
            moved = path + 1e-3 * jax.random.normal(key, (8, *path.shape)) * chain.conditional_variance() ** 0.5
            here = found.log_joint({"z": path})
            return found.log_value, found.converged, here, jax.vmap(lambda z: found.log_joint({"z": z}))(moved)

        keys = jax.random.split(jax.random.key(3), 200)
        value, converged, here, around = jax.jit(lambda ks: jax.lax.map(at, ks, batch_size=50))(keys)
        assert np.array_equal(np.isfinite(value), converged)
        assert not np.isnan(value).any()
        if model is not bent:  # whose noise is singular: a moved path breaks its equations
            assert (np.asarray(around - here[:, None])[converged] < 1e-6).all()
        assert np.mean(converged) > (0.5 if model is explosive else 0.95)


def nothing(y):
    """No path."""
    numpyro.sample("y", dist.Normal(numpyro.sample("m", dist.Normal()), 1.0), obs=y)


def nested(y):
    """The noise of a path depends on another path."""
    one = jnp.ones((1, 1))
    h = numpyro.sample("h", StatePath(jnp.zeros(1), one, one, one, T))
    noise = jnp.exp(h)[..., None] * one
    z = numpyro.sample("z", StatePath(jnp.zeros(1), one, one, noise, T, time_varying=("chol_Q",)))
    observe("y", dist.Normal(z, 1.0).to_event(2), obs=y)


def shared(y):
    """A sum over the series of a plate."""
    one = jnp.ones((1, 1))
    with numpyro.plate("series", 2):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), one, one, one, T))
    observe("y", dist.Normal(z.sum(0), 1.0).to_event(2), obs=y)


@pytest.mark.parametrize(
    ("model", "words"), [(nothing, "no `StatePath`"), (nested, "depends on the path `h`"), (shared, "share a term")]
)
def test_models_that_are_refused(model, words):
    """With the reason."""
    with pytest.raises(ValueError, match=words):
        path_marginal(model, approximation="laplace").prepare(np.zeros((T, 1)))


def test_arguments_that_are_refused():
    """By name."""
    with pytest.raises(ValueError, match="`approximation`"):
        path_marginal(volatility, approximation="exact")
    with pytest.raises(ValueError, match="`num_samples`"):
        path_marginal(volatility, num_samples=7)
