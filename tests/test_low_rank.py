"""Diagonal-plus-low-rank conditioning against dense algebra, its gradients, float32, and what it never builds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from pssm.distributions import LowRankChain, StatePath
from pssm.linalg import low_rank
from pssm.linalg.low_rank import Diagonal, Potential

N, LARGE = 5, 400
FACTORS = ("diagonal", "noise-free", "general", "singular")
FORMS = {"bare": (), "diagonal": ("delta",), "tied": ("b",), "centred": ("c",), "all": ("delta", "c", "b")}


@pytest.fixture(autouse=True)
def _both_precisions():
    """Arrays below keep the dtype they are made with."""
    with jax.enable_x64(True):
        yield


def draw_factor(rng, kind, n=N):
    """A factor and its matrix."""
    if kind in ("general", "singular"):
        matrix = rng.normal(size=(n, n if kind == "general" else n - 2))
        return jnp.asarray(matrix), matrix
    scale = rng.uniform(0.5, 2.0, n)
    if kind == "noise-free":
        scale[[0, n // 2]] = 0.0
    return Diagonal(jnp.asarray(scale)), np.diag(scale)


def draw_potential(rng, form, rank, n=N, size=1.0):
    parts = {"K": size * rng.normal(size=(n, rank)), "k": rng.normal(size=n)}
    optional = {"delta": rng.uniform(0.0, 3.0, n), "c": rng.normal(size=n), "b": size * rng.normal(size=rank)}
    if form == "tied":
        parts["k"] = np.zeros(n)
    return Potential(**parts, **{name: optional[name] for name in FORMS[form]})


def dense(mu, matrix, potential):
    parts = (getattr(potential, name) for name in ("factor", "slope", "diagonal", "center", "factor_slope"))
    return oracles.conditioned(mu, matrix, *(None if x is None else np.asarray(x, float) for x in parts))


@jax.jit
def evaluate(factor, potential, mu, z):
    update = low_rank.condition(factor, potential)
    noise = jnp.zeros(factor.shape[-1], mu.dtype), jnp.zeros(update.columns, mu.dtype)
    draw = lambda e: low_rank.posterior_sample(update, factor, mu, *e)  # noqa: E731
    mapped = lambda e: low_rank.posterior_map(update, low_rank.map_gain(update), factor, mu, e)  # noqa: E731
    root = jax.jacfwd(mapped)(noise[0])
    return {
        "mean": low_rank.posterior_mean(update, mu),
        "slope": low_rank.posterior_slope(update, mu),
        "draw without noise": draw(noise),
        "loading": jnp.concatenate(jax.jacfwd(draw)(noise), axis=1),
        "mapped mean": mapped(noise[0]),
        "mapped covariance": root @ root.T,
        "variance": low_rank.posterior_variance(update, factor),
        "covariance": low_rank.posterior_covariance(update, factor),
        "kl": low_rank.kl(update, factor, mu),
        "log ratio": low_rank.log_ratio(update, factor, mu, z),
        "half logdet": update.half_logdet,
    }


@jax.jit
def gradients(*point):
    return {name: jax.grad(lambda p, n=name: evaluate(*p)[n])(point) for name in ("kl", "log ratio")}


@pytest.mark.parametrize("rank", [0, 1, N])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", FACTORS)
def test_conditioning_is_the_dense_one(kind, form, rank):
    if form == "tied" and rank == 0:
        pytest.skip("nothing to tie")
    rng = np.random.default_rng(rank)
    factor, matrix = draw_factor(rng, kind)
    potential = draw_potential(rng, form, rank)
    mu = rng.normal(size=N)
    z = mu + matrix @ rng.normal(size=matrix.shape[1])
    mean, cov, kl, ratio = dense(mu, matrix, potential)
    found = {name: np.asarray(x) for name, x in evaluate(factor, potential, mu, z).items()}
    expected = {"mean": mean, "draw without noise": mean, "covariance": cov, "kl": kl, "log ratio": ratio(z)}
    expected |= {"variance": np.diag(cov), "mapped mean": mean, "mapped covariance": cov}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(found["loading"] @ found["loading"].T, cov, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(matrix @ matrix.T @ found["slope"], mean - mu, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["general", "singular"])
def test_a_diagonal_matrix_and_a_diagonal_agree(kind):
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.5, 2.0, N)
    matrix = np.diag(scale)
    if kind == "singular":
        scale[3] = 0.0
        matrix = np.delete(np.diag(scale), 3, axis=1)
    potential = draw_potential(rng, "all", 2)
    mu, z = rng.normal(size=(2, N))
    given, other = (evaluate(f, potential, mu, z) for f in (Diagonal(jnp.asarray(scale)), jnp.asarray(matrix)))
    for name in set(given) - {"loading"}:
        np.testing.assert_allclose(given[name], other[name], rtol=1e-10, atol=1e-12, err_msg=name)


def test_log_ratio_is_the_ratio_of_two_normal_densities():
    rng = np.random.default_rng(3)
    factor, matrix = draw_factor(rng, "general")
    potential = draw_potential(rng, "all", 2)
    mu, z = rng.normal(size=(2, N))
    mean, cov, _, _ = dense(mu, matrix, potential)

    def log_normal(x, m, c):
        return -0.5 * ((x - m) @ np.linalg.solve(c, x - m) + np.linalg.slogdet(2 * np.pi * c)[1])

    expected = log_normal(z, mean, cov) - log_normal(z, mu, matrix @ matrix.T)
    np.testing.assert_allclose(evaluate(factor, potential, mu, z)["log ratio"], expected, rtol=1e-9)


@pytest.mark.parametrize("kind", FACTORS)
def test_entropy_counts_the_directions_that_have_noise(kind):
    factor, matrix = draw_factor(np.random.default_rng(1), kind)
    if kind == "singular":  # the density of the first coordinates, which determine the rest
        matrix = matrix[: matrix.shape[1]]
    live = np.flatnonzero(np.abs(matrix).sum(1))
    cov = (matrix @ matrix.T)[np.ix_(live, live)]
    expected = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov)[1]
    np.testing.assert_allclose(low_rank.gaussian_entropy(factor), expected, rtol=1e-10)


def test_a_matrix_of_diagonal_values_becomes_a_diagonal():
    assert isinstance(low_rank.as_factor("chol_Q", np.diag([1.0, 0.0, 2.0])), Diagonal)
    assert isinstance(low_rank.as_factor("chol_Q", np.stack([np.eye(2)] * 3)), Diagonal)
    assert not isinstance(low_rank.as_factor("chol_Q", np.tri(2)), Diagonal)
    assert not isinstance(low_rank.as_factor("chol_Q", np.eye(3)[:, :2]), Diagonal)
    shapes = jax.eval_shape(lambda x: low_rank.as_factor("chol_Q", x), jnp.eye(3))
    assert not isinstance(shapes, Diagonal)


@pytest.mark.parametrize("zero", [False, True], ids=["", "delta=0"])
@pytest.mark.parametrize("kind", FACTORS)
def test_gradients_are_finite_differences(kind, zero):
    rng = np.random.default_rng(7)
    factor, _ = draw_factor(rng, kind)
    potential = draw_potential(rng, "all", 2)
    if zero:
        potential = replace(potential, diagonal=np.zeros(N))
    mu, z = rng.normal(size=(2, N))
    point = jax.tree.map(jnp.asarray, (factor, potential, mu, z))
    for name, gradient in gradients(*point).items():
        for leaf, (part, slope) in enumerate(zip(jax.tree.leaves(point), jax.tree.leaves(gradient), strict=True)):
            assert np.isfinite(slope).all()
            direction = rng.normal(size=part.shape)

            def moved(h, leaf=leaf, direction=direction, name=name):
                leaves, tree = jax.tree.flatten(point)
                leaves[leaf] = leaves[leaf] + h * direction
                return float(evaluate(*jax.tree.unflatten(tree, leaves))[name])

            h = 1e-5
            if part is point[1].delta:  # not negative: one-sided, of second order
                direction = np.abs(direction)
                values = [moved(step, direction=direction) for step in (0.0, h, 2 * h)]
                expected = (-3 * values[0] + 4 * values[1] - values[2]) / (2 * h)
            else:
                expected = (moved(h) - moved(-h)) / (2 * h)
            np.testing.assert_allclose(np.sum(slope * direction), expected, rtol=1e-6, atol=1e-7, err_msg=f"{leaf}")


def draw_large(seed, rank, size, form, near=None):
    """A float32 case with `|K|` about `size`; `near`: how far the columns of `K` are from one another."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 1.0, LARGE)
    potential = draw_potential(rng, form, rank, LARGE)
    K = rng.normal(size=(LARGE, rank))
    if near is not None:
        K = K[:, :1] + near * K
    K = size * K / np.linalg.norm(K, axis=0)
    potential = replace(potential, factor=K)
    mu = rng.normal(size=LARGE)
    if potential.b is not None:  # pseudo-observations near what is predicted, as an encoder gives them
        c = 0.0 if potential.c is None else potential.c
        potential = replace(potential, factor_slope=K.T @ (mu - c) + 0.3 * size * rng.normal(size=rank))
    if potential.c is not None:
        potential = replace(
            potential, center=mu + 0.1 * rng.normal(size=LARGE), factor_slope=0.3 * size * rng.normal(size=rank)
        )
    case = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (scale, potential, mu))
    scale, potential, mu = case
    matrix = np.diag(np.asarray(scale, float))
    mean, cov, kl, ratio = dense(np.asarray(mu, float), matrix, potential)
    z = jnp.asarray(mean + np.linalg.cholesky(cov + 1e-12 * np.eye(LARGE)) @ rng.normal(size=LARGE), jnp.float32)
    found = {n: np.asarray(x, float) for n, x in evaluate(Diagonal(scale), potential, mu, z).items()}
    sd = np.sqrt(np.diag(cov))
    return {
        "mean": np.max(np.abs(found["mean"] - mean) / sd),
        "variance": np.max(np.abs(found["variance"] / sd**2 - 1)),
        "kl": abs(found["kl"] / kl - 1),
        "log ratio": abs(found["log ratio"] - ratio(np.asarray(z, float))) / abs(kl),
    }


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("form", ["tied", "centred", "all"])
def test_float32_keeps_its_digits_where_the_potential_is_sharp(form, rank):
    for size in (1.0, 30.0, 1e3):
        errors = draw_large(0, rank, size, form)
        assert max(errors.values()) < 1e-4, (size, errors)


@pytest.mark.parametrize("near", [1e-2, 1e-4])
def test_float32_with_columns_that_nearly_coincide(near):
    """Right to 1e-4 up to |K| sd = 10, to a few percent at 100; beyond, the coinciding columns are rounding."""
    assert max(draw_large(0, 4, 10.0, "tied", near).values()) < 1e-4
    assert max(draw_large(0, 4, 100.0, "tied", near).values()) < 0.03


def shapes_of(jaxpr):
    """Shapes of everything that a program computes, loops and calls included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield from (x.aval.shape for x in equation.outvars if hasattr(x.aval, "shape"))
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(part, "jaxpr", part), "eqns"):
                    yield from shapes_of(part)


def builds_a_matrix(function, *args, n=300):
    return any(list(shape).count(n) > 1 for shape in shapes_of(jax.make_jaxpr(function)(*args)))


def test_a_diagonal_never_becomes_a_matrix():
    n, rank = 300, 3
    rng = np.random.default_rng(0)
    potential = draw_potential(rng, "all", rank, n)
    scale, mu, z = rng.uniform(0.5, 1, n), *rng.normal(size=(2, n))

    def everything(scale, potential, mu, z):
        factor = Diagonal(scale)
        update = low_rank.condition(factor, potential)
        draw = low_rank.posterior_sample(update, factor, mu, z, potential.b)
        divergence = low_rank.kl(update, factor, mu) + low_rank.log_ratio(update, factor, mu, draw)
        return divergence + low_rank.posterior_variance(update, factor).sum() + low_rank.gaussian_entropy(factor)

    assert not builds_a_matrix(jax.grad(everything, (0, 1, 2, 3)), scale, potential, mu, z)
    assert builds_a_matrix(lambda s: jnp.sum(Diagonal(s).to_matrix()), scale)  # the walk can find one


def test_a_chain_with_an_elementwise_transition_never_builds_a_matrix():
    n, rank, steps = 300, 3, 4
    rng = np.random.default_rng(0)

    def chain(k, K, delta):
        sd = Diagonal(jnp.ones(n))
        prior = StatePath(jnp.zeros(n), sd, lambda z, u: jnp.tanh(z), sd, steps)
        return LowRankChain(prior, k, K, diag=delta, center=k, b=K[:, 0])

    def everything(k, K, delta):
        q = chain(k, K, delta)
        z = q.sample(jax.random.key(0), (2,))
        return (q.log_prob(z) + q.kl_given(z)).sum() + q.entropy() + q.conditional_variance().sum()

    potential = rng.normal(size=(steps, n)), rng.normal(size=(steps, n, rank)), rng.uniform(size=(steps, n))
    assert not builds_a_matrix(jax.grad(everything, (0, 1, 2)), *potential)
