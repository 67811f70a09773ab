"""Triangular factors of covariances, singular ones too: values, derivatives, solves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pssm.linalg import factor_from_covariance, outer, solve_lower, triangularise
from pssm.linalg.small import SMALL, matmul, matvec
from pssm.linalg.square_root import triangularise_once

DTYPES = (np.float32, np.float64)
SIZES = [(1, 1), (1, 4), (3, 2), (4, 4), (5, 9), (SMALL, SMALL), (SMALL + 1, SMALL + 3), (SMALL + 6, 5)]
factorise = jax.jit(triangularise)


@pytest.fixture(autouse=True)
def _both_precisions():
    """Arrays below keep the dtype they are made with."""
    with jax.enable_x64(True):
        yield


def random_factor(seed, rows, cols, rank=None, dtype=np.float64):
    rng = np.random.default_rng(seed)
    if rank is None:
        return rng.normal(size=(rows, cols)).astype(dtype)
    return (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, cols))).astype(dtype)


def covariance(m):
    m = np.asarray(m, np.float64)
    return m @ m.T


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_triangularise_keeps_the_covariance(shape, dtype):
    m = random_factor(sum(shape), *shape, dtype=dtype)
    factor = np.asarray(factorise(m))
    assert factor.dtype == dtype
    assert factor.shape == (shape[0], shape[0])
    np.testing.assert_array_equal(factor, np.tril(factor))
    assert (np.diag(factor) >= 0).all()
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(covariance(factor), covariance(m), rtol=0, atol=tolerance * np.abs(covariance(m)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("rows", [5, SMALL + 2])
def test_triangularise_low_rank(rows, rank, dtype):
    m = random_factor(rank, rows, 6, rank, dtype)
    factor = np.asarray(factorise(m))
    scale = max(np.abs(covariance(m)).max(), 1.0)
    np.testing.assert_allclose(covariance(factor), covariance(m), rtol=0, atol=200 * np.finfo(dtype).eps * scale)
    assert (np.diag(factor)[:rank] > 0).all()


def test_triangularise_full_rank_is_the_cholesky_factor():
    m = random_factor(0, 6, 8)
    np.testing.assert_allclose(factorise(m), np.linalg.cholesky(covariance(m)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [6, SMALL + 4])
def test_triangularise_graded_rows_in_float32(rows):
    """Rows from 1e-5 to 1e5 side by side: every entry of the covariance to float32 relative to its own rows."""
    rng = np.random.default_rng(1)
    scales = np.logspace(-5, 5, rows)
    rng.shuffle(scales)
    m = (scales[:, None] * rng.normal(size=(rows, rows + 2))).astype(np.float32)
    factor = np.asarray(factorise(m))
    exact = np.linalg.cholesky(covariance(m))
    sd = np.sqrt(np.diag(covariance(m)))
    np.testing.assert_allclose(covariance(factor) / np.outer(sd, sd), covariance(m) / np.outer(sd, sd), atol=2e-5)
    np.testing.assert_allclose(np.diag(factor), np.diag(exact), rtol=2e-4)


def test_triangularise_graded_entries_in_float32():
    """Inside one row: a direction of size 1e-5 next to one of 1e5 that the row above already spans is kept."""
    m = np.array([[1e5, 0.0, 0.0], [1e5, 1e-5, 0.0], [1.0, 0.0, 1e-5]], np.float32)
    np.testing.assert_allclose(np.diag(factorise(m)), [1e5, 1e-5, 1e-5], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, SMALL + 4])
def test_duplicate_rows_give_exactly_zero_pivots(rows, dtype):
    m = random_factor(3, rows, rows, dtype=dtype)
    m[2] = m[0]
    m[4] = -2 * m[1]
    m[3] = 0
    factor = np.asarray(factorise(m))
    for row in (2, 3, 4):
        np.testing.assert_array_equal(factor[:, row], 0.0)
    np.testing.assert_allclose(covariance(factor), covariance(m), atol=100 * np.finfo(dtype).eps * rows)


# --- derivatives ------------------------------------------------------------------------------------------------------


def through_factor(m):
    """A function of `L L'` only."""
    p = outer(triangularise(m))
    weights = jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)
    return jnp.sum(jnp.sin(weights * 0.1) * jnp.sin(p)) + 0.3 * jnp.sum(p**2)


def direct(m):
    p = m @ m.T
    weights = jnp.arange(p.size, dtype=p.dtype).reshape(p.shape)
    return jnp.sum(jnp.sin(weights * 0.1) * jnp.sin(p)) + 0.3 * jnp.sum(p**2)


DERIVATIVE_CASES = {
    "full": (4, 5, None),
    "square": (4, 4, None),
    "rank 2": (4, 5, 2),
    "tall": (4, 2, None),
    "zero": (4, 3, 0),
    "large": (SMALL + 2, SMALL + 3, None),
    "large rank 3": (SMALL + 2, 6, 3),
}


@pytest.mark.parametrize("case", DERIVATIVE_CASES)
def test_first_derivatives_of_functions_of_the_covariance(case):
    rows, cols, rank = DERIVATIVE_CASES[case]
    m = 0.4 * random_factor(5, rows, cols, rank)
    direction = random_factor(6, rows, cols)
    both = jax.jit(lambda x, dx: (jax.jvp(through_factor, (x,), (dx,))[1], jax.grad(through_factor)(x)))
    forward, reverse = both(m, direction)
    step = 1e-6
    values = [float(direct(m + sign * step * direction)) for sign in (1, -1)]
    difference = (values[0] - values[1]) / (2 * step)
    np.testing.assert_allclose(forward, difference, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reverse, jax.grad(direct)(m), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.sum(reverse * direction), forward, rtol=1e-9, atol=1e-9)


def test_derivative_of_the_factor_itself_at_full_rank():
    m, direction = random_factor(7, 5, 6), random_factor(8, 5, 6)
    forward = jax.jit(lambda x, dx: jax.jvp(triangularise, (x,), (dx,))[1])(m, direction)
    step = 1e-6
    plus, minus = (np.linalg.cholesky(covariance(m + sign * step * direction)) for sign in (1, -1))
    np.testing.assert_allclose(forward, (plus - minus) / (2 * step), rtol=1e-6, atol=1e-6)


def test_derivative_at_duplicate_rows_is_that_of_the_covariance():
    m = random_factor(9, 4, 4)
    m[2] = m[0]
    np.testing.assert_allclose(jax.grad(through_factor)(m), jax.grad(direct)(m), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [3, pytest.param(SMALL + 1, marks=pytest.mark.slow)])
def test_second_derivative_at_full_rank(rows):
    m = 0.5 * random_factor(10, rows, rows + 1)
    direction = random_factor(11, rows, rows + 1)

    def log_determinant(x):
        return 2 * jnp.sum(jnp.log(jnp.diagonal(triangularise(x)))) + through_factor(x)

    def oracle(x):
        return jnp.linalg.slogdet(x @ x.T)[1] + direct(x)

    def hessian_times(fn):
        return jax.jit(lambda x, dx: jax.jvp(jax.grad(fn), (x,), (dx,))[1])(m, direction)

    np.testing.assert_allclose(hessian_times(log_determinant), hessian_times(oracle), rtol=1e-7, atol=1e-7)


def test_float32_gradient_is_float32():
    m = random_factor(12, 4, 5, 2, np.float32)
    gradient = jax.grad(through_factor)(jnp.asarray(m))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, jax.grad(direct)(m.astype(np.float64)), rtol=1e-3, atol=1e-3)


def test_vmap_equals_a_loop():
    many = np.stack([random_factor(seed, 4, 5, rank) for seed, rank in enumerate((None, 2, 1, 0))])
    np.testing.assert_allclose(
        jax.vmap(triangularise)(many), np.stack([factorise(m) for m in many]), rtol=1e-12, atol=1e-12
    )


# --- solves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [1, 4, SMALL, SMALL + 5])
def test_solve_lower(size, transpose, dtype):
    rng = np.random.default_rng(size)
    factor = (np.tril(rng.normal(size=(size, size)), -1) / size + np.diag(rng.uniform(1, 2, size))).astype(dtype)
    x = rng.normal(size=(size, 3)).astype(dtype)
    exact = np.linalg.solve((factor.T if transpose else factor).astype(np.float64), x)
    solved = solve_lower(factor, x, transpose=transpose)
    assert solved.dtype == dtype
    np.testing.assert_allclose(solved, exact, rtol=200 * np.finfo(dtype).eps, atol=200 * np.finfo(dtype).eps)
    np.testing.assert_allclose(solve_lower(factor, x[:, 0], transpose=transpose), solved[:, 0], rtol=1e-6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("size", [5, SMALL + 3])
def test_solve_lower_skips_zero_pivots(size, transpose):
    """The zero pivots' rows and columns are out of the system; the rest is solved as if they were not there."""
    m = random_factor(13, size, size)
    m[2], m[4] = m[0], m[1] - m[0]
    factor = np.asarray(factorise(m))
    x = random_factor(14, size, 2)
    live = np.diag(factor) > 0
    assert live.sum() == size - 2
    small = factor[np.ix_(live, live)]
    exact = np.zeros_like(x)
    exact[live] = np.linalg.solve(small.T if transpose else small, x[live])
    solved = solve_lower(factor, x, transpose=transpose)
    np.testing.assert_allclose(solved, exact, rtol=1e-9, atol=1e-10)
    gradient = jax.grad(lambda f: jnp.sum(solve_lower(f, x, transpose=transpose)))(jnp.asarray(factor))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("size", [3, SMALL, SMALL + 1])
def test_small_products(size):
    a, b = random_factor(15, size, size + 1), random_factor(16, size + 1, 2)
    np.testing.assert_allclose(matmul(a, b), a @ b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(matvec(a, b[:, 0]), a @ b[:, 0], rtol=1e-12, atol=1e-12)


# --- covariance -> factor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_factor_from_covariance(rank, dtype):
    cov = covariance(random_factor(17, 5, 7, rank)).astype(dtype)
    cov = (cov + cov.T) / 2
    factor = factor_from_covariance("Q", jnp.asarray(cov))
    assert factor.dtype == dtype
    np.testing.assert_allclose(covariance(factor), cov, atol=100 * np.finfo(dtype).eps * max(np.abs(cov).max(), 1))


def test_factor_from_covariance_diagonal_is_exact():
    diagonal = np.array([4.0, 0.0, 1e-12, 9e8])
    factor = factor_from_covariance("Q", jnp.diag(jnp.asarray(diagonal)))
    np.testing.assert_array_equal(factor, np.diag(np.sqrt(diagonal)))


def test_factor_from_covariance_batches():
    covs = np.stack([covariance(random_factor(s, 3, 3, r)) for s, r in ((0, 3), (1, 1))] + [np.diag([1.0, 4.0, 0.0])])
    np.testing.assert_allclose(outer(factor_from_covariance("Q", jnp.asarray(covs))), covs, atol=1e-12)
    np.testing.assert_array_equal(factor_from_covariance("Q", jnp.asarray(covs))[2], np.diag([1.0, 2.0, 0.0]))


@pytest.mark.parametrize(
    ("cov", "message"),
    [
        ([[1.0, 0.5], [0.0, 1.0]], "`Q` must be symmetric"),
        ([[1.0, 2.0], [2.0, 1.0]], "`Q` must be a covariance"),
        ([[1.0, 0.0], [0.0, -1e-3]], "`Q` must be a covariance"),
        ([[1.0, 0.0], [0.0, np.nan]], "`Q` must be finite"),
        ([[np.inf, 0.0], [0.0, 1.0]], "`Q` must be finite"),
    ],
)
def test_factor_from_covariance_refuses(cov, message):
    with pytest.raises(ValueError, match=message):
        factor_from_covariance("Q", jnp.asarray(cov))


def test_factor_from_covariance_takes_rounding_for_zero():
    cov = np.diag([1.0, 0.0, 1.0])
    cov[1, 1] = -1e-15
    cov[0, 2] += 1e-15
    assert np.isfinite(factor_from_covariance("Q", jnp.asarray(cov))).all()


def test_factor_from_covariance_traced_values_pass_and_have_a_derivative():
    cov = covariance(random_factor(18, 4, 6))
    direction = covariance(random_factor(19, 4, 2))
    root, tangent = jax.jit(lambda c, d: jax.jvp(partial(factor_from_covariance, "Q"), (c,), (d,)))(cov, direction)
    np.testing.assert_allclose(tangent @ root.T + root @ tangent.T, direction, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 5), (6, 6), (7, 3)])
def test_one_projection_gives_the_same_factor(shape, x64):
    m = np.random.default_rng(0).normal(size=shape)
    m[2] = 2 * m[0] - m[1]
    m[:, 0] *= 1e6
    found = jax.jit(triangularise_once)(m)
    np.testing.assert_allclose(found, triangularise(jnp.asarray(m)), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found @ found.T, m @ m.T, rtol=1e-12)
    assert (found[:, 2] == 0).all()
    wide = jnp.asarray([[1.0, 1e7], [0.0, 1.0]], jnp.float32)
    np.testing.assert_allclose(triangularise_once(wide), [[1e7, 0.0], [1.0, 1e-7]], rtol=1e-6)
