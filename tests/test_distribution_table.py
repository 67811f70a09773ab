"""Every distribution of the package behaves as NumPyro expects: a table with a line for each, the same tests for all.

What a density must be is tested where its distribution is; here it must agree with the draws.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import pssm.distributions
from pssm import LinearGaussianSSM, NonlinearSSM
from pssm.distributions import (
    ConditionedPath,
    GaussianFilterMarginal,
    HistoryMarginal,
    ImputedSeries,
    LinearGaussianMarginal,
    LinearGaussianPosterior,
    LowRankChain,
    LowRankMomentMatched,
    StableMatrixNormal,
    StatePath,
    WithMissing,
)
from pssm.linalg import Diagonal
from pssm.nets import HistoryWeights

STEPS, N, P = 3, 2, 2
TURN = np.array([[0.8, -0.3], [0.3, 0.7]])
ROOT = np.array([[0.9, 0.0], [0.3, 0.6]])
EMISSION = np.array([[1.0, 0.5], [-0.4, 1.0]])
GAPS = np.array([[False, True], [True, True], [False, False]])
WEIGHTS = HistoryWeights(P, 2, 3, key=jax.random.key(3))


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


# Module-level functions, because a lambda cannot be pickled (with plain pickle, whoever wrote the distribution).
def bend(z, u):
    return jnp.tanh(z) if u is None else jnp.tanh(z) + u


def rotate(z, u):
    return jnp.stack([0.8 * z[0] - 0.3 * z[1], 0.3 * z[0] + 0.7 * z[1]])


def see(z):
    return dist.Normal(z, jnp.asarray(0.5, z.dtype)).to_event(1)


def towards(z, h):
    return 0.5 * jnp.tanh(z) + h, 0.3 + 0.2 * jax.nn.sigmoid(z)


def like(p, x):
    """A constant in the precision of the parameters."""
    return jnp.asarray(x, jax.tree.leaves(p)[0].dtype)


def linear(p, timed=()):
    return LinearGaussianSSM(
        p["m0"],
        like(p, ROOT),
        like(p, TURN),
        p["chol_Q"],
        like(p, EMISSION),
        p["chol_R"],
        b=p["m0"] / 2,
        time_varying=timed,
    )


def bases(p):
    return LinearGaussianSSM(
        p["m0"],
        p["chol_Q"],
        jnp.stack([like(p, TURN), 0.5 * like(p, TURN.T)]),
        like(p, ROOT),
        jnp.stack([like(p, EMISSION), like(p, np.eye(2))]),
        0.7 * like(p, np.eye(2)),
    )


def constant_system(ssm, series):
    return ssm


def path(p):
    return StatePath(p["m0"], like(p, ROOT), bend, p["chol_Q"], STEPS)


class Case(NamedTuple):
    """A distribution: `build` makes it from arrays, whose shapes without batch axes are given."""

    name: str
    build: Callable
    shapes: dict[str, tuple[int, ...]]
    of_data: bool = False  # NaN entries are missing
    batches: bool = True  # takes arrays with batch axes itself, not by `vmap` alone
    density: bool = True
    normalised: bool = True
    shrink: float = 0.5  # of the reference normal, beside the spread of the draws


MODEL = {"m0": (N,), "chol_Q": (N, N), "chol_R": (P, P)}
PATH = {"m0": (N,), "chol_Q": (N, N)}
POTENTIALS = {**PATH, "k": (STEPS, N), "K": (STEPS, N, 1)}

TABLE = [
    Case("StatePath", path, PATH),
    Case(
        "StatePath inputs",
        lambda p: StatePath(
            p["m0"], like(p, ROOT), like(p, TURN), p["chol_Q"], STEPS, p["u"], b=p["m0"], B=like(p, EMISSION)
        ),
        {**PATH, "u": (STEPS, 2)},
    ),
    Case(
        "StatePath time-varying",
        lambda p: StatePath(
            p["m0"], Diagonal(p["m0"] ** 2 + 1), bend, p["chol_Q"], STEPS, p["u"], time_varying=("chol_Q",)
        ),
        {"m0": (N,), "chol_Q": (STEPS, N, N), "u": (STEPS, N)},
    ),
    Case("LowRankChain", lambda p: LowRankChain(path(p), p["k"], p["K"]), POTENTIALS),
    Case(
        "LowRankChain every part",
        lambda p: LowRankChain(
            path(p), p["k"], p["K"], diag=p["k"] ** 2, center=p["k"], b=p["K"].sum(-2), validate_args=False
        ),
        POTENTIALS,
    ),
    Case(
        "ConditionedPath",
        lambda p: ConditionedPath(towards, p["h"], like(p, np.ones(N))),
        {"h": (STEPS, N)},
    ),
    Case(
        "ConditionedPath with a prior after the data",
        lambda p: ConditionedPath(
            towards, p["h"], like(p, np.ones(N)), prior=path(p), seen=np.arange(STEPS) < STEPS - 2
        ),
        {**PATH, "h": (STEPS, N)},
    ),
    Case("LinearGaussianPosterior", lambda p: LinearGaussianPosterior(linear(p), p["y"]), {**MODEL, "y": (STEPS, P)}),
    Case("LinearGaussianMarginal", lambda p: LinearGaussianMarginal(linear(p), STEPS), MODEL, of_data=True),
    Case(
        "LinearGaussianMarginal time-varying",
        lambda p: LinearGaussianMarginal(linear(p, ("chol_Q",)), STEPS),
        {**MODEL, "chol_Q": (STEPS, N, N)},
        of_data=True,
    ),
    Case(
        "GaussianFilterMarginal",
        lambda p: GaussianFilterMarginal(NonlinearSSM(p["m0"], like(p, ROOT), rotate, p["chol_Q"], see), STEPS),
        PATH,
        of_data=True,
        batches=False,
    ),
    Case(
        "HistoryMarginal",
        lambda p: HistoryMarginal(bases(p), WEIGHTS, STEPS),
        PATH,
        batches=False,
    ),
    Case(
        "ImputedSeries",
        lambda p: ImputedSeries(
            p["loc"],
            0.5 + p["loc"] ** 2,
            jnp.broadcast_to(jnp.array([True, False, True]), p["loc"].shape[:-1]),
            jax.tree_util.Partial(constant_system, linear(p)),
        ),
        {**MODEL, "loc": (STEPS, P)},
    ),
    Case("StableMatrixNormal", lambda p: StableMatrixNormal(p["loc"] / 5, 0.3), {"loc": (N, N)}, normalised=False,
         shrink=0.15),
    Case(
        "WithMissing entries",
        lambda p: WithMissing(dist.Normal(p["loc"], like(p, 1.5)).to_event(2)),
        {"loc": (STEPS, P)},
        of_data=True,
    ),
    Case(
        "WithMissing normal",
        lambda p: WithMissing(dist.MultivariateNormal(p["m0"], scale_tril=jnp.tril(p["chol_Q"]))),
        PATH,
        of_data=True,
    ),
    Case(
        "WithMissing marginal", lambda p: WithMissing(LinearGaussianMarginal(linear(p), STEPS)), MODEL, of_data=True
    ),
    Case(
        "LowRankMomentMatched",
        lambda p: LowRankMomentMatched(path(p), p["k"], p["K"], jax.random.key(1), 400),
        POTENTIALS,
        density=False,
    ),
]  # fmt: skip
CASES = {case.name: case for case in TABLE}
WITH_DENSITY = [case.name for case in TABLE if case.density]

every_case = pytest.mark.parametrize("name", list(CASES))
every_density = pytest.mark.parametrize("name", WITH_DENSITY)


def parameters(case, batch=(), dtype=np.float64):
    """Random arrays of a case; factors stay near the identity."""
    rng = np.random.default_rng(7)
    found = {}
    for name, shape in case.shapes.items():
        x = 0.4 * rng.normal(size=(*batch, *shape))
        if name.startswith("chol"):
            x = np.eye(shape[-2], shape[-1]) + 0.2 * np.tril(x)
        found[name] = jnp.asarray(x, dtype)
    return found


def a_value(d, seed=0):
    return d.sample(jax.random.key(seed))


@jax.jit
def log_prob(d, x):
    return d.log_prob(x)


@partial(jax.jit, static_argnums=2)
def draw(d, key, shape):
    return d.sample(key, shape)


def close(found, expected, **options):
    np.testing.assert_allclose(found, expected, **{"rtol": 1e-9, "atol": 1e-9, **options})


def test_the_table_is_complete():
    public = {name: getattr(pssm.distributions, name) for name in pssm.distributions.__all__}
    kinds = {name for name, x in public.items() if isinstance(x, type) and issubclass(x, dist.Distribution)}
    assert {name.split()[0] for name in CASES} == kinds


@every_case
def test_shapes(name):
    case = CASES[name]
    for batch in [(), (2,)] if case.batches else [()]:
        d = case.build(parameters(case, batch))
        assert d.batch_shape == batch
        for lead in ((), (2, 3)):
            x = draw(d, jax.random.key(0), lead)
            assert x.shape == (*lead, *batch, *d.event_shape) == d.shape(lead)
            if case.density:
                assert log_prob(d, x).shape == (*lead, *batch)
        if case.density:
            assert np.asarray(d.support(a_value(d))).all()


@every_case
def test_keys_of_both_kinds(name):
    """Typed random keys and the older arrays of numbers draw the same."""
    d = CASES[name].build(parameters(CASES[name]))
    old, new = (draw(d, key, (2, 3)) for key in (jax.random.PRNGKey(0), jax.random.key(0)))
    np.testing.assert_array_equal(old, new)


@every_density
def test_single_precision_stays_single(name):
    """Also where JAX is in 64 bits."""
    case = CASES[name]
    d = case.build(parameters(case, dtype=np.float32))
    x = a_value(d)
    assert "WithMissing" in name or x.dtype == jnp.float32  # NumPyro's own draws have the default precision
    assert log_prob(d, x.astype(jnp.float32)).dtype == jnp.float32


@every_density
def test_a_batch_is_its_elements(name):
    case = CASES[name]
    many = parameters(case, (2,))
    singles = [case.build({name: x[i] for name, x in many.items()}) for i in range(2)]
    x = jnp.stack([a_value(d, i) for i, d in enumerate(singles)])
    expected = [log_prob(d, x[i]) for i, d in enumerate(singles)]
    if case.batches:
        close(log_prob(case.build(many), x), expected)
        close(log_prob(case.build(many), x[0])[0], expected[0])  # one value, many distributions
    close(jax.vmap(lambda p, x: case.build(p).log_prob(x))(many, x), expected)
    stacked = jax.vmap(case.build)(many)  # a distribution as the result, and as the argument, of `vmap`
    close(jax.vmap(lambda d, x: d.log_prob(x))(stacked, x), expected)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jax.vmap(lambda d, key: d.sample(key))(stacked, keys)
    close(drawn, [d.sample(key) for d, key in zip(singles, keys, strict=True)])


@every_density
def test_several_values_are_scored_one_by_one(name):
    case = CASES[name]
    d = case.build(parameters(case))
    x = draw(d, jax.random.key(0), (2, 3))
    flat = [log_prob(d, value) for value in x.reshape(-1, *d.event_shape)]
    close(log_prob(d, x).ravel(), flat)
    close(jax.vmap(lambda x: log_prob(d, x))(x[0]), flat[:3])


@every_density
def test_expand(name):
    case = CASES[name]
    d = case.build(parameters(case))
    wide = d.expand((3,))
    assert wide.batch_shape == (3,)
    assert wide.event_shape == d.event_shape
    x = draw(wide, jax.random.key(0), (4,))
    assert x.shape == (4, 3, *d.event_shape)
    assert len(np.unique(np.asarray(x).reshape(12, -1)[:, 0])) == 12
    close(log_prob(wide, x), log_prob(d, x))
    if case.batches:
        d = case.build(parameters(case, (2,)))
        wide = d.expand((3, 2))
        x = draw(wide, jax.random.key(0), ())
        close(log_prob(wide, x), log_prob(d, x))


@every_density
def test_jit(name):
    """The constructor, the draw and the density inside one compiled function."""
    case = CASES[name]
    p = parameters(case)

    @jax.jit
    def inside(p, key):
        d = case.build(p)
        x = d.sample(key)
        return x, d.log_prob(x), case.build(p)

    x, found, returned = inside(p, jax.random.key(0))
    d = case.build(p)
    close(x, d.sample(jax.random.key(0)))
    close(found, d.log_prob(x))
    close(returned.log_prob(x), found)


@every_density
def test_plate_and_mask(name):
    case = CASES[name]
    p = parameters(case)
    kept = jnp.array([True, False, True])

    def model(x=None, masked=False):
        with numpyro.plate("series", 3):
            d = case.build(p)
            return numpyro.sample("x", d.mask(kept) if masked else d, obs=x)

    x = handlers.seed(model, 0)()
    d = case.build(p)
    assert x.shape == (3, *d.event_shape)
    each = log_prob(d, x)
    close(log_density(model, (x,), {}, {})[0], each.sum())
    close(log_density(model, (x, True), {}, {})[0], each[kept].sum())
    close(log_density(handlers.mask(model, mask=kept), (x,), {}, {})[0], each[kept].sum())
    if case.batches:
        d = case.build(parameters(case, (3,)))
        close(d.mask(kept).log_prob(x), np.where(kept, log_prob(d, x), 0.0))


@every_density
def test_gradients_are_those_of_finite_differences(name):
    case = CASES[name]
    p = parameters(case)
    x = a_value(case.build(p))
    found = jax.jit(jax.grad(lambda p, x: case.build(p).log_prob(x), argnums=(0, 1)))(p, x)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (p, x))
    if "chol_Q" in p and "normal" in name:
        direction[0]["chol_Q"] = jnp.tril(direction[0]["chol_Q"])
    density = jax.jit(lambda p, x: case.build(p).log_prob(x))

    def moved(step):
        return density(*jax.tree.map(lambda a, b: a + step * b, (p, x), direction))

    expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True))
    close(slope, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [case.name for case in TABLE if case.of_data])
def test_missing_entries(name):
    """NaN entries are integrated out: nothing seen has density one, no gradient is NaN, support allows them."""
    case = CASES[name]
    p = parameters(case)
    d = case.build(p)
    x = a_value(d)
    gaps = GAPS[-1 - (d.event_dim == 1)] if d.event_dim == 1 else GAPS
    gaps = np.array([False, True]) if d.event_dim == 1 else gaps
    holes = jnp.where(gaps, jnp.nan, x)
    value, found = jax.jit(jax.value_and_grad(lambda p, x: case.build(p).log_prob(x), argnums=(0, 1)))(p, holes)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(found))
    close(found[1][gaps], 0.0)
    close(log_prob(d, jnp.full_like(x, jnp.nan)), 0.0)
    assert np.asarray(d.support(holes)).all()
    close(log_prob(d, jnp.stack([x, holes])), [log_prob(d, x), value])
    # The missing entries integrated out by draws: p(seen) = E[p(seen, unseen) / q(unseen)] over a wide normal q.
    unseen = 2.0 * np.random.default_rng(0).normal(size=(20_000, int(gaps.sum())))
    filled = jnp.broadcast_to(x, (len(unseen), *x.shape)).at[:, gaps].set(unseen)
    log_q = dist.Normal(0.0, 2.0).log_prob(unseen).sum(-1)
    ratio = np.exp(log_prob(d, filled) - log_q - value)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / np.sqrt(len(ratio)) < 0.2


@every_density
def test_density_is_that_of_the_draws(name):
    """`E[r(x) / p(x)] = 1` over draws `x` from `p`, for three normal densities `r` inside the draws' cloud."""
    case = CASES[name]
    d = case.build(parameters(case))
    x = draw(d, jax.random.key(0), (20_000,))
    flat = np.asarray(x).reshape(len(x), -1)
    mean, cov = flat.mean(0), np.cov(flat.T)
    root = np.linalg.cholesky(cov)
    means, ratios = [], []
    for seed in range(3):
        shift = 0.3 * root @ np.random.default_rng(seed).normal(size=len(mean))
        white = np.linalg.solve(root, (flat - mean - shift).T) / np.sqrt(case.shrink)
        log_r = -0.5 * (white**2 + np.log(2 * np.pi * case.shrink)).sum(0) - np.log(np.diagonal(root)).sum()
        ratio = np.exp(log_r - np.asarray(log_prob(d, x)))
        means.append(ratio.mean())
        ratios.append(ratio.std() / np.sqrt(len(ratio)))
    expected = 1.0 if case.normalised else np.mean(means)
    assert max(ratios) < 0.05 * expected
    close(np.divide(np.array(means) - expected, ratios), 0.0, atol=4.5)


@every_case
def test_tree_and_pickle(name):
    """Through leaves and back, and through bytes, it is the same distribution; equal ones share compiled programs."""
    case = CASES[name]
    for batch in [(), (2,)] if case.batches else [()]:
        d = case.build(parameters(case, batch))
        leaves, structure = jax.tree.flatten(d)
        assert leaves
        assert all(isinstance(leaf, jax.Array | np.ndarray | float | int) for leaf in leaves)
        again = case.build(parameters(case, batch))
        assert jax.tree.structure(again) == structure
        assert hash(jax.tree.structure(again)) == hash(structure)
        key = jax.random.key(0)
        x = draw(d, key, ())
        for other in (
            jax.tree.unflatten(structure, leaves),
            jax.tree.map(lambda a: a, d),
            pickle.loads(pickle.dumps(d)),
        ):
            assert (other.batch_shape, other.event_shape) == (d.batch_shape, d.event_shape)
            close(draw(other, key, ()), x)
            if case.density:
                close(log_prob(other, x), log_prob(d, x))


def test_draws_without_a_density():
    """`LowRankMomentMatched`: draws are its particles, whose mean is the distribution's."""
    case = CASES["LowRankMomentMatched"]
    for batch in ((), (2,)):
        d = case.build(parameters(case, batch))
        x = draw(d, jax.random.key(0), (5000,))
        sd = np.sqrt(np.asarray(d.variance))
        close((x.mean(0) - d.mean) / sd, 0.0, atol=0.3)
        close(x.std(0) / sd, 1.0, atol=0.2)
        with pytest.raises(NotImplementedError, match="TraceConditionalKL_ELBO"):
            d.log_prob(x[0])
