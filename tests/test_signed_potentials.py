"""Potentials with negative curvature: the chain against a dense Gaussian that is built step by step in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pssm.distributions import LowRankChain, StatePath
from pssm.linalg import Diagonal
from pssm.linalg.potential import Potential

STEPS, N = 4, 3
TOLERANCE = {jnp.float64: 1e-9, jnp.float32: 2e-4}


def case(kind, seed=0):
    """Arrays of a linear prior and of signed potentials, in float64 NumPy."""
    rng = np.random.default_rng(seed)
    A, m0, P0 = 0.5 * rng.normal(size=(N, N)), rng.normal(size=N), np.tril(rng.normal(size=(N, N))) + np.eye(N)
    F = {
        "dense": np.tril(0.4 * rng.normal(size=(N, N))) + 0.7 * np.eye(N),
        "diagonal": np.diag([0.5, 1.2, 0.8]),
        "singular diagonal": np.diag([0.5, 0.0, 0.8]),
        "one column": 0.5 * rng.normal(size=(N, 1)),
    }[kind]
    k, c = rng.normal(size=(2, STEPS, N))
    K, b = rng.normal(size=(STEPS, N, 2)), rng.normal(size=(STEPS, 2))
    diag, M = np.zeros((STEPS, N)), np.zeros((STEPS, N, N))
    for t in range(STEPS):
        G = P0 if t == 0 else F
        top = np.linalg.eigvalsh(G.T @ G)[-1]
        diag[t] = np.array([-0.3, 0.7, -0.1]) / top
        skew = rng.normal(size=(N, N))
        M[t] = skew + skew.T
        M[t] *= 0.5 / top / np.abs(np.linalg.eigvalsh(M[t])).max()
    return m0, P0, A, F, dict(k=k, K=K, diag=diag, center=c, b=b), M


def dense(m0, P0, A, F, parts, M):
    """Mean, covariance and the conditional pieces: per step the factor, R, and the slope at zero."""
    mean, weights, pieces = [], [], []
    total = N + (STEPS - 1) * F.shape[1]
    m, W, at = None, None, 0
    for t in range(STEPS):
        G = P0 if t == 0 else F
        mu, carried = (m0, np.zeros((N, total))) if t == 0 else (A @ m, A @ W)
        K, c = parts["K"][t], parts["center"][t]
        R = np.diag(parts["diag"][t]) + K @ K.T + M[t]
        inner = np.linalg.inv(np.eye(G.shape[1]) + G.T @ R @ G)
        V = G @ inner @ G.T
        slope = parts["k"][t] + K @ parts["b"][t] + R @ c
        m = mu + V @ (slope - R @ mu)
        W = carried - V @ R @ carried
        W[:, at : at + G.shape[1]] += G @ np.linalg.cholesky(inner)
        at += G.shape[1]
        mean.append(m)
        weights.append(W.copy())
        pieces.append((G, R, slope))
    weights = np.concatenate(weights)
    return np.concatenate(mean), weights @ weights.T, pieces


def ratio(pieces, prior_means, z):
    """`log q - log p` of a reachable path, by the noise that drives it."""
    total = 0.0
    for (G, R, slope), mu, x in zip(pieces, prior_means, z, strict=True):
        e = np.linalg.lstsq(G, x - mu, rcond=None)[0]
        precision = np.eye(G.shape[1]) + G.T @ R @ G
        centre = np.linalg.solve(precision, G.T @ (slope - R @ mu))
        total += 0.5 * np.linalg.slogdet(precision)[1] - 0.5 * (e - centre) @ precision @ (e - centre) + 0.5 * e @ e
    return total


@pytest.mark.parametrize(
    ("kind", "with_matrix", "dtype"),
    [
        ("dense", False, jnp.float64),
        ("singular diagonal", False, jnp.float64),
        ("diagonal", True, jnp.float64),
        ("one column", True, jnp.float64),
        ("diagonal", False, jnp.float32),
        ("dense", True, jnp.float32),
    ],
)
def test_a_signed_chain_is_the_dense_gaussian(x64, kind, with_matrix, dtype):
    m0, P0, A, F, parts, M = case(kind)
    M = M if with_matrix else 0 * M
    mean, cov, pieces = dense(m0, P0, A, F, parts, M)
    tolerance = TOLERANCE[dtype]

    def as_dtype(x):
        return jnp.asarray(x, dtype)

    @jax.jit
    def of_chain(parts, M, P0, F):
        chol_Q = Diagonal(jnp.diagonal(F)) if "diagonal" in kind else F
        chol_P0 = P0
        prior = StatePath(as_dtype(m0), chol_P0, as_dtype(A), chol_Q, STEPS)
        q = LowRankChain(prior, **parts, precision=M if with_matrix else None)
        noise = jnp.eye(prior.noise_size, dtype=dtype)
        zero = q.path_from_noise(jnp.zeros(prior.noise_size, dtype))
        moves = (q.path_from_noise(noise) - zero).reshape(prior.noise_size, -1)
        draws, kls = q.sample_with_kl(jax.random.key(0), (4000,))
        z = draws[0]
        later = jax.vmap(lambda x: as_dtype(A) @ x)(z[:-1])
        return dict(
            mean=q.mean, cov=q.covariance(), drawn=moves.T @ moves, zero=zero, z=z,
            prior_means=jnp.concatenate([as_dtype(m0)[None], later]), ratio=q.log_ratio(z), draws=draws, kls=kls,
            ratios=q.log_ratio(draws), var=q.conditional_variance(), entropy=q.entropy(), lp=q.log_prob(z),
            moved=q.conditional_mean(z),
        )  # fmt: skip

    found = of_chain({n: as_dtype(x) for n, x in parts.items()}, as_dtype(M), as_dtype(P0), as_dtype(F))
    found = {n: np.asarray(x, float) for n, x in found.items()}
    np.testing.assert_allclose(found["mean"].ravel(), mean, atol=tolerance)
    np.testing.assert_allclose(found["zero"].ravel(), mean, atol=tolerance)
    blocks = np.stack([cov[t * N : (t + 1) * N, t * N : (t + 1) * N] for t in range(STEPS)])
    np.testing.assert_allclose(found["cov"], blocks, atol=tolerance)
    np.testing.assert_allclose(found["drawn"], cov, atol=tolerance)
    scatter = np.cov(found["draws"].reshape(4000, -1).T)
    assert np.abs(scatter - cov).max() < 6 * np.abs(cov).max() / np.sqrt(4000) * 2
    right = ratio(pieces, found["prior_means"], found["z"])
    np.testing.assert_allclose(found["ratio"], right, atol=10 * tolerance)
    assert abs(np.mean(found["ratios"] - found["kls"])) < 5 * np.std(found["ratios"] - found["kls"]) / np.sqrt(4000)
    variances = [np.diag(G @ np.linalg.inv(np.eye(G.shape[1]) + G.T @ R @ G) @ G.T) for G, R, _ in pieces]
    np.testing.assert_allclose(found["var"], np.stack(variances), atol=tolerance)
    if kind in ("dense", "diagonal"):
        sign, logdet = np.linalg.slogdet(2 * np.pi * np.e * cov)
        np.testing.assert_allclose(found["entropy"], logdet / 2, atol=10 * tolerance)
        rest = found["z"].ravel() - mean
        whole = -0.5 * np.linalg.slogdet(2 * np.pi * cov)[1] - 0.5 * rest @ np.linalg.solve(cov, rest)
        np.testing.assert_allclose(found["lp"], whole, atol=30 * tolerance)


def test_a_step_without_a_positive_definite_conditional_is_named(x64):
    prior = StatePath(jnp.zeros(2), jnp.eye(2), 0.5 * jnp.eye(2), jnp.eye(2), 3)
    diag = jnp.zeros((3, 2)).at[1, 0].set(-1.5)
    with pytest.raises(ValueError, match="`diag` must leave .* step 1"):
        LowRankChain(prior, None, jnp.zeros((3, 2, 0)), diag=diag)
    lost = jax.jit(lambda d: LowRankChain(prior, None, jnp.zeros((3, 2, 0)), diag=d).mean)(diag)
    assert np.isnan(lost).any()
    matrix = jnp.zeros((3, 2, 2)).at[2].set(-1.1 * jnp.eye(2))
    with pytest.raises(ValueError, match="`precision` must leave .* step 2"):
        LowRankChain(prior, None, jnp.zeros((3, 2, 0)), precision=matrix)


def test_products_of_signed_potentials_are_their_sums(x64):
    rng = np.random.default_rng(1)

    def draw():
        M = rng.normal(size=(1, 2, 2))
        return Potential(
            jnp.zeros((1, 2, 0)), rng.normal(size=(1, 2)), center=rng.normal(size=(1, 2)), precision=M + M.mT
        )

    def log(p, x):
        x = x - p.center[0]
        M = np.diag(p.diagonal[0]) + (0 if p.precision is None else p.precision[0])
        return -0.5 * x @ M @ x + (0 if p.slope is None else p.slope[0] @ x)

    for p, q in [(draw(), draw()) for _ in range(3)]:
        q.diagonal[0, 0] = -p.diagonal[0, 0]  # diagonals that cancel
        z = rng.normal(size=(4, 2))
        gaps = [log(p + q, x) - log(p, x) - log(q, x) for x in z]
        np.testing.assert_allclose(gaps, gaps[0], atol=1e-10)
