"""Diffuse starts against the dense Gaussian with the limit taken in closed form, and against published values."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM, datasets
from pssm.distributions import LinearGaussianMarginal, StatePath
from pssm.linalg import triangularise


def trend(**fields):
    """A level with a slope, read with noise."""
    A = np.array([[1.0, 1.0], [0.0, 1.0]])
    given = dict(m0=np.zeros(2), chol_P0=np.eye(2), A=A, chol_Q=np.diag([0.5, 0.1]), C=np.eye(1, 2), chol_R=np.eye(1))
    return {**given, "diffuse": [True, True], **fields}


def weekly(states=6):
    """A dummy season of a week, `Q` singular, with an autoregression of finite start."""
    A = np.zeros((states + 1, states + 1))
    A[0, :states], A[1:states, : states - 1], A[states, states] = -1.0, np.eye(states - 1), 0.6
    chol_Q = np.zeros((states + 1, 2))
    chol_Q[0, 0], chol_Q[states, 1] = 0.2, 0.4
    C = np.zeros((1, states + 1))
    C[0, 0] = C[0, states] = 1.0
    P0 = np.diag([0.0] * states + [0.5])
    mask = [True] * states + [False]
    return dict(m0=np.zeros(states + 1), chol_P0=P0, A=A, chol_Q=chol_Q, C=C, chol_R=0.3 * np.eye(1), diffuse=mask)


def drawn(seed, mask, **settings):
    return oracles.random_model(np.random.default_rng(seed), n=len(mask), **settings) | {"diffuse": mask}


def exact(model):
    """The same, read without noise."""
    return model | {"chol_R": 0 * model["chol_R"]}


GAPS = {"none": (), "start": (0, 1, 2), "second": (1,), "most": tuple(range(1, 14))}
CASES = {
    "level": (lambda: drawn(0, [True], p=1), 30),
    "level without noise": (lambda: exact(drawn(0, [True], p=1)), 18),
    "trend": (trend, 30),
    "trend that never moves": (lambda: trend(chol_Q=np.zeros((2, 1))), 18),
    "slope alone": (lambda: trend(diffuse=[False, True]), 18),
    "week": (weekly, 45),
    "week without noise": (lambda: exact(weekly()), 45),
    "two sensors": (lambda: drawn(1, [True, False, True], p=2), 40),
    "more sensors than states": (lambda: drawn(2, [True, True], p=4), 18),
    "twins": (lambda: drawn(3, [True, True], p=1) | {"C": np.ones((3, 1)) * [[1.0, 0.3]], "chol_R": np.eye(3)}, 18),
    "varying": (
        lambda: drawn(4, [True, True, False], p=2, m=2, steps=30, timed=("A", "C", "chol_Q", "d"), offsets=True),
        30,
    ),
    "inputs": (lambda: drawn(5, [False, True, True], p=1, m=1, offsets=True), 60),
    "regression": (
        lambda: drawn(6, [True, True], p=1, steps=30, timed=("C",)) | {"A": np.eye(2), "chol_Q": np.zeros((2, 1))},
        30,
    ),
}


def series(name, gaps=()):
    given, steps = CASES[name][0](), CASES[name][1]
    rng = np.random.default_rng(7)
    model = LinearGaussianSSM(**given)
    u = rng.normal(size=(steps, model.n_input)) if model.n_input else None
    started = model.replace(m0=rng.normal(size=model.n_state), diffuse=None)
    y = np.array(pssm.simulate(jax.random.key(1), started, steps, u)[1], float)
    y[list(gaps)] = np.nan
    if model.n_obs > 1:
        y[4, 0] = y[6] = np.nan
    return model, y, u


smoother, filtered = jax.jit(pssm.kalman_smoother), jax.jit(pssm.kalman_filter)


@pytest.mark.parametrize("gaps", GAPS)
@pytest.mark.parametrize("name", CASES)
def test_the_dense_gaussian(name, gaps, x64):
    model, y, u = series(name, GAPS[gaps])
    want, (mean, cov) = oracles.diffuse(model, y, u, lambda j: np.concatenate([j.z(t) for t in range(len(y))]))
    n, steps = model.n_state, len(y)
    found = smoother(model, y, u)
    np.testing.assert_allclose(found.log_likelihood, want, rtol=1e-9)
    np.testing.assert_allclose(pssm.log_likelihood(model, y, u), want, rtol=1e-9)
    size = np.abs(cov).max() ** 0.5 + np.abs(mean).max()
    np.testing.assert_allclose(found.mean.ravel(), mean, atol=1e-7 * max(size, np.abs(mean).max()))
    blocks = cov.reshape(steps, n, steps, n)
    np.testing.assert_allclose(found.cov, blocks[range(steps), :, range(steps)], atol=1e-7 * size**2)
    lagged = blocks[range(1, steps), :, range(steps - 1)]
    np.testing.assert_allclose(found.cross_cov, lagged, atol=1e-7 * size**2)


@pytest.mark.parametrize("name", ["trend", "week", "two sensors", "varying"])
def test_filtered_moments(name, x64):
    """Those of every step are smoothed moments of the series up to it; infinite while the start is open."""
    model, y, u = series(name, (1,))
    found, n = filtered(model, y, u), model.n_state
    np.testing.assert_allclose(found.log_likelihoods.sum(), found.log_likelihood, rtol=1e-12)
    for t in (0, 1, n - 1, n + 1, len(y) - 1):
        seen = np.where(np.arange(len(y))[:, None] <= t, y, np.nan)
        _, (mean, cov) = oracles.diffuse(model, seen, u, lambda j, t=t: j.z(t))
        size = np.abs(cov).max() ** 0.5 + np.abs(mean).max()
        known = ~np.isnan(np.asarray(found.mean[t]))
        assert (np.isinf(np.diagonal(found.cov[t])) == ~known).all()
        assert known.all() or t <= n, t
        if known.any():
            np.testing.assert_allclose(found.mean[t][known], mean[known], atol=1e-8 * size)
            np.testing.assert_allclose(
                found.cov[t][np.ix_(known, known)], cov[np.ix_(known, known)], atol=1e-8 * size**2
            )


@pytest.mark.parametrize("name", ["level without noise", "trend", "week", "more sensors than states", "varying"])
def test_derivatives(name, x64):
    model, y, u = series(name, (0, 1))
    rng = np.random.default_rng(3)
    parts = [k for k in ("A", "C", "chol_Q", "chol_R", "d", "chol_P0") if getattr(model, k) is not None]
    steps = {k: rng.normal(size=np.shape(getattr(model, k))) * (np.asarray(getattr(model, k)) != 0) for k in parts}

    def moved(h):
        return model.replace(**{k: getattr(model, k) + h * x for k, x in steps.items()})

    def value(h):
        return pssm.log_likelihood(moved(h), y, u)

    def slope(h):
        return (oracles.diffuse(moved(h), y, u)[0] - oracles.diffuse(moved(-h), y, u)[0]) / (2 * h)

    want = (4 * slope(5e-5) - slope(1e-4)) / 3
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), want, rtol=2e-5)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(value))(0.0), want, rtol=2e-5)


def test_draws(x64):
    model, y, _ = series("week", (0, 2, 3))
    _, (mean, cov) = oracles.diffuse(model, y, None, lambda j: np.concatenate([j.z(t) for t in range(len(y))]))
    count = 20_000
    paths = pssm.sample_states(jax.random.key(0), model, y, sample_shape=(count,)).reshape(count, -1)
    sd = np.sqrt(np.diagonal(cov))
    np.testing.assert_allclose(paths.mean(0), mean, atol=5 * sd.max() / count**0.5)
    np.testing.assert_allclose(np.cov(paths.T), cov, atol=6 * sd.max() ** 2 / count**0.5)


@pytest.mark.parametrize("name", ["trend", "two sensors"])
def test_disturbances(name, x64):
    """The limit of those with a wide start."""
    model, y, u = series(name, (1,))
    spread = np.diag(1e5 * np.asarray(model.diffuse))
    wide = model.replace(chol_P0=triangularise(jnp.concatenate([model.chol_P0, spread], axis=1)), diffuse=None)
    for got, want in zip(pssm.smooth_disturbances(model, y, u), pssm.smooth_disturbances(wide, y, u), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_forecasts(x64):
    model, y, _ = series("week")
    found = pssm.forecast(model, y, 9)
    longer = np.concatenate([y, np.full((9, 1), np.nan)])
    _, (mean, cov) = oracles.diffuse(
        model, longer, None, lambda j: np.concatenate([j.y(t) for t in range(len(y), len(longer))])
    )
    np.testing.assert_allclose(found.mean[:, 0], mean, atol=1e-8)
    np.testing.assert_allclose(found.cov[:, 0, 0], np.diagonal(cov), atol=1e-8)


@pytest.mark.parametrize("method", ["sequential", "square_root", "parallel", "low_memory"])
def test_methods(method, x64):
    model, y, _ = series("week", (0,))
    want = pssm.log_likelihood(model, y)
    np.testing.assert_allclose(pssm.log_likelihood(model, y, method=method), want, rtol=1e-11)
    if method == "low_memory":
        return
    np.testing.assert_allclose(pssm.kalman_filter(model, y, method=method).log_likelihood, want, rtol=1e-11)
    smoothed = [pssm.kalman_smoother(model, y, method=m) for m in ("auto", method)]
    for a, b in zip(*smoothed, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("name", ["trend", "week without noise", "more sensors than states", "inputs"])
def test_32_bits(name):
    model, y, u = series(name, (1,))
    assert model.dtype == jnp.float32
    found, value = smoother(model, y, u), pssm.log_likelihood(model, y, u)
    want, (mean, _) = oracles.diffuse(model, y, u, lambda j: np.concatenate([j.z(t) for t in range(len(y))]))
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(found.mean.ravel(), mean, atol=2e-4 * np.abs(mean).max())


def test_batches(x64):
    """Series with gaps of their own, and models; one of them needs the whole series to close its start."""
    model, y, _ = series("trend")
    many = np.stack([y, y + 1.0, y])
    many[1, :4], many[2, :25] = np.nan, np.nan
    models = model.replace(chol_R=np.array([1.0, 2.0, 3.0])[:, None, None])
    for batch in (model, models):
        found = pssm.kalman_smoother(batch, many)
        value = pssm.log_likelihood(batch, many)
        for i in range(3):
            one = model if batch is model else model.replace(chol_R=batch.chol_R[i])
            want, (mean, _) = oracles.diffuse(one, many[i], None, lambda j: np.concatenate([j.z(t) for t in range(30)]))
            np.testing.assert_allclose(value[i], want, rtol=1e-10)
            np.testing.assert_allclose(found.mean[i].ravel(), mean, atol=1e-7)


def test_units_of_states_and_readings_do_not_matter(x64):
    """A regression on a constant and a year, in any units: a direction is open or closed by what rounding allows."""
    year = np.arange(1960.0, 2000.0)
    y = 3.0 + 0.2 * (year - 1980.0) + np.random.default_rng(0).normal(size=40)

    def model(level, unit, scale):
        C = np.stack([np.full(40, level), unit * year], axis=1)[:, None, :]
        zero = np.zeros((2, 1))
        return LinearGaussianSSM(
            np.zeros(2),
            np.zeros((2, 2)),
            np.eye(2),
            zero,
            scale * C,
            scale * np.eye(1),
            time_varying=("C",),
            diffuse=[True] * 2,
        )

    want = float(pssm.log_likelihood(model(1.0, 1.0, 1.0), y))
    X = np.stack([np.ones(40), year], axis=1)
    rest = y - X @ np.linalg.lstsq(X, y)[0]
    by_hand = -19 * np.log(2 * np.pi) - 0.5 * rest @ rest - 0.5 * np.linalg.slogdet(X.T @ X)[1]
    np.testing.assert_allclose(want, by_hand, rtol=1e-9)
    for level, unit, scale in ((1e9, 1.0, 1.0), (1.0, 1e-9, 1.0), (1e-6, 1e6, 1e-7)):
        found = pssm.log_likelihood(model(level, unit, scale), scale * y)
        np.testing.assert_allclose(found + 40 * np.log(scale) + np.log(level * unit), want, rtol=1e-8)


NILE = [15098.5, 1469.1]


def nile(variances, **fields):
    R, Q = variances
    return LinearGaussianSSM.from_covariances([0.0], [[np.inf]], [[1.0]], [[Q]], [[1.0]], [[R]], **fields)


def test_nile(x64):
    """Durbin & Koopman's flow of the Nile; and its maximum with steps 21 to 40 and 61 to 80 missing."""
    y = np.array(datasets.load("nile").y, float)
    np.testing.assert_allclose(pssm.log_likelihood(nile((15098.5, 1469.17)), y), -632.5456, atol=5e-5)
    y[20:40] = y[60:80] = np.nan
    np.testing.assert_allclose(pssm.log_likelihood(nile((17889.553, 685.85946)), y), -380.0077, atol=5e-5)


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        (dict(level="lltrend"), [15098.5, 1469.1, 3.0]),
        (dict(level="rtrend"), [15098.5, 100.0]),
        (dict(level="llevel", seasonal=4), [15098.5, 1469.1, 20.0]),
        (dict(level="lltrend", freq_seasonal=[{"period": 12, "harmonics": 2}]), [15098.5, 1469.1, 3.0, 10.0]),
    ],
)
def test_statsmodels(spec, params, x64):
    """Its exact diffuse likelihood has `-log(2 pi) / 2` for every diffuse state besides."""
    from statsmodels.tsa.api import UnobservedComponents

    y = np.array(datasets.load("nile").y, float).ravel()
    y[[2, 5, 6, 50]] = np.nan
    peer = UnobservedComponents(y, **spec, use_exact_diffuse=True)
    want = peer.loglike(params) + peer.k_states * np.log(2 * np.pi) / 2
    part = {name: np.asarray(peer.ssm[name]) for name in ("design", "transition", "selection", "state_cov", "obs_cov")}
    n = peer.k_states
    Q = part["selection"] @ part["state_cov"] @ part["selection"].T
    model = LinearGaussianSSM.from_covariances(
        np.zeros(n), np.diag([np.inf] * n), part["transition"], Q, part["design"], part["obs_cov"]
    )
    np.testing.assert_allclose(pssm.log_likelihood(model, y), want, rtol=1e-9)
    smoothed = peer.smooth(params)
    np.testing.assert_allclose(pssm.kalman_smoother(model, y).mean, smoothed.smoothed_state.T, atol=1e-4)


def test_maximum_likelihood_of_a_users_model(x64):
    import numpyro
    import numpyro.distributions as dist

    y = np.array(datasets.load("nile").y, float)
    y[20:40] = y[60:80] = np.nan

    def model(y=None, num_steps=None):
        s = numpyro.sample("s", dist.HalfNormal(jnp.array([200.0, 100.0])).to_event(1))
        ssm = LinearGaussianSSM([0.0], [[jnp.inf]], jnp.eye(1), s[1] * jnp.eye(1), jnp.eye(1), s[0] * jnp.eye(1))
        numpyro.sample("y", LinearGaussianMarginal(ssm, num_steps), obs=y)

    fit = pssm.infer.fit_ml(model, y, num_steps=100)
    np.testing.assert_allclose(fit.log_likelihood, -380.0077, atol=5e-5)
    np.testing.assert_allclose(fit.params["s"] ** 2, [17889.6, 685.86], rtol=1e-3)


def test_em(x64):
    """Rises to the maximum of the same likelihood; the start of a series stays diffuse."""
    y = np.array(datasets.load("nile").y, float)
    result = pssm.fit_em(y, nile((1e4, 1e3)), fixed=("m0", "P0", "A", "C"), num_iters=300, tol=1e-12)
    assert result.ssm.diffuse == (True,)
    assert (np.diff(result.log_likelihoods) > -1e-8).all()
    np.testing.assert_allclose(pssm.log_likelihood(result.ssm, y), -632.5456, atol=1e-3)
    with pytest.raises(ValueError, match='`fixed` must have "m0" and "P0"'):
        pssm.fit_em(y, nile((1e4, 1e3)), fixed=("A", "C"))


def test_starts_that_the_data_leave_open(x64):
    model = LinearGaussianSSM(**trend())
    with pytest.warns(UserWarning, match=r"does not determine the diffuse start of states \[0, 1\]"):
        found = pssm.kalman_smoother(model, [[3.0], [np.nan], [np.nan]])
    assert np.isnan(found.mean[1]).all()
    assert np.isinf(np.diagonal(found.cov[1])).all()
    np.testing.assert_allclose(found.log_likelihood, 0.0, atol=1e-12)
    assert found.mean[0, 0] == 3.0  # of the level at the first time alone there is something to know
    with pytest.warns(UserWarning, match="diffuse start"):
        pssm.sample_states(jax.random.key(0), model, [[np.nan], [3.0]])


def test_what_a_diffuse_start_is_not(x64):
    model, y, _ = series("trend")
    assert np.isinf(np.diagonal(model.P0)).all()
    assert model.replace(chol_P0=np.eye(2), diffuse=None).diffuse == ()
    assert model.astype(jnp.float32).diffuse == (True, True)
    z, _ = pssm.simulate(jax.random.key(0), model, 3)
    np.testing.assert_array_equal(z[0], model.m0)
    with pytest.raises(ValueError, match="no prior for a path"):
        StatePath.from_ssm(model, 5)
    with pytest.raises(ValueError, match="one step knows nothing"):
        pssm.update(model, model.m0, model.chol_P0, y[0])
    with pytest.raises(ValueError, match="boolean mask"):
        LinearGaussianSSM(**trend(diffuse=[1.0, 0.0]))
    with pytest.raises(ValueError, match="contradicts the model"):
        pssm.log_likelihood(LinearGaussianSSM(**trend(chol_Q=np.zeros((2, 1)), chol_R=[[0.0]])), [1.0, 2.0, 4.0])
