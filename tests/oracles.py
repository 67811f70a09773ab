"""The truth, slowly: dense joint Gaussians in float64 NumPy, sharing no code with the package."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from scipy.stats import multivariate_normal

ARRAYS = ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")


@dataclass
class Joint:
    """Mean and covariance of `(z_1..z_T, y_1..y_T)` stacked, and the sizes."""

    mean: np.ndarray
    cov: np.ndarray
    steps: int
    n: int
    p: int

    def z(self, t):
        """Indices of the state at time `t`."""
        return np.arange(t * self.n, (t + 1) * self.n)

    def y(self, t):
        """Indices of the observation at time `t`."""
        return self.steps * self.n + np.arange(t * self.p, (t + 1) * self.p)


def parameters(ssm):
    """The fields of a model as float64 NumPy arrays, and its time-varying names."""
    q = {k: None if getattr(ssm, k) is None else np.asarray(getattr(ssm, k), float) for k in ARRAYS}
    return q, ssm.time_varying


def joint(ssm, steps, u=None):
    """Builds the joint by writing every variable as a linear function of independent standard normals."""
    q, timed = parameters(ssm)

    def at(name, t):
        return None if q[name] is None else q[name][t] if name in timed else q[name]

    n, width, p = q["A"].shape[-1], q["chol_Q"].shape[-1], q["C"].shape[-2]
    noise = n + (steps - 1) * width + steps * p
    means, maps = [], []
    mean, weights = q["m0"].copy(), np.zeros((n, noise))
    weights[:, :n] = q["chol_P0"]
    for t in range(steps):
        if t:
            mean = at("A", t) @ mean
            weights = at("A", t) @ weights
            start = n + (t - 1) * width
            weights[:, start : start + width] += at("chol_Q", t)
            if q["b"] is not None:
                mean = mean + at("b", t)
            if q["B"] is not None:
                mean = mean + at("B", t) @ u[t]
        means.append(mean)
        maps.append(weights.copy())
    for t in range(steps):
        mean, weights = at("C", t) @ means[t], at("C", t) @ maps[t]
        start = n + (steps - 1) * width + t * p
        weights[:, start : start + p] += at("chol_R", t)
        if q["d"] is not None:
            mean = mean + at("d", t)
        if q["D"] is not None:
            mean = mean + at("D", t) @ u[t]
        means.append(mean)
        maps.append(weights)
    weights = np.concatenate(maps)
    return Joint(np.concatenate(means), weights @ weights.T, steps, n, p)


def condition(j, want, given, values):
    """Mean and covariance of the entries `want` given the entries `given` (pseudo-inverse: singular is fine)."""
    if len(given) == 0:
        return j.mean[want], j.cov[np.ix_(want, want)]
    gain = j.cov[np.ix_(want, given)] @ np.linalg.pinv(j.cov[np.ix_(given, given)], rcond=1e-13, hermitian=True)
    mean = j.mean[want] + gain @ (values - j.mean[given])
    return mean, j.cov[np.ix_(want, want)] - gain @ j.cov[np.ix_(given, want)]


def seen(j, y, stop):
    """Indices and values of the observed entries before time `stop`."""
    y = np.asarray(y, float)
    index = np.concatenate([j.y(t) for t in range(stop)]) if stop else np.zeros(0, int)
    values = y[:stop].ravel()
    keep = ~np.isnan(values)
    return index[keep], values[keep]


def log_likelihoods(ssm, y, u=None):
    """`log p(y_t | y_{<t})` entry by entry; an entry known exactly beforehand contributes nothing."""
    y = np.asarray(y, float)
    j = joint(ssm, len(y), u)
    scale = np.sqrt(np.diag(j.cov).max(initial=0)) or 1.0
    cov, mean = j.cov.copy(), j.mean.copy()
    out = np.zeros(len(y))
    for t in range(len(y)):
        for k, i in enumerate(j.y(t)):
            if np.isnan(y[t, k]):
                continue
            variance = cov[i, i]
            if variance <= (1e-7 * min(scale, np.sqrt(j.cov[i, i]))) ** 2:
                continue
            error = y[t, k] - mean[i]
            out[t] -= 0.5 * (np.log(2 * np.pi * variance) + error**2 / variance)
            gain = cov[:, i] / variance
            mean = mean + gain * error
            cov = cov - np.outer(gain, cov[i])
    return out


def log_likelihood(ssm, y, u=None):
    """`log p(y_{1:T})` by sequential conditioning in the joint."""
    return log_likelihoods(ssm, y, u).sum()


def states(ssm, y, u=None):
    """Predicted, filtered and smoothed moments and lag-one covariances, each by conditioning the joint."""
    y = np.asarray(y, float)
    steps = len(y)
    j = joint(ssm, steps, u)
    out = {name: [] for name in ("predicted", "filtered", "smoothed")}
    for t in range(steps):
        for name, stop in (("predicted", t), ("filtered", t + 1), ("smoothed", steps)):
            out[name].append(condition(j, j.z(t), *seen(j, y, stop)))
    result = {}
    for name, pairs in out.items():
        result[name] = np.stack([m for m, _ in pairs]), np.stack([c for _, c in pairs])
    cross = []
    for t in range(steps - 1):
        both = np.concatenate([j.z(t + 1), j.z(t)])
        cross.append(condition(j, both, *seen(j, y, steps))[1][: j.n, j.n :])
    result["cross_cov"] = np.array(cross).reshape(steps - 1, j.n, j.n)
    return result


def forecast(ssm, y, num_steps, u=None):
    """Moments of the `num_steps` steps after `y`; `u` covers all steps."""
    y = np.asarray(y, float)
    j = joint(ssm, len(y) + num_steps, u)
    index, values = seen(j, y, len(y))
    future = range(len(y), len(y) + num_steps)
    state = [condition(j, j.z(t), index, values) for t in future]
    obs = [condition(j, j.y(t), index, values) for t in future]
    return tuple(np.stack(x) for x in (*zip(*obs, strict=True), *zip(*state, strict=True)))


def joseph_log_likelihood(q, y):
    """A loop in extended precision with Joseph's form: for long series and ill-conditioned models (no inputs)."""
    long = np.longdouble
    A, C = q["A"].astype(long), q["C"].astype(long)
    Q, R = (q[k].astype(long) @ q[k].astype(long).T for k in ("chol_Q", "chol_R"))
    m, P = q["m0"].astype(long), q["chol_P0"].astype(long) @ q["chol_P0"].astype(long).T
    total, eye = long(0), np.eye(len(m), dtype=long)
    for t, row in enumerate(np.asarray(y, float)):
        if t:
            m, P = A @ m, A @ P @ A.T + Q
        o = np.flatnonzero(~np.isnan(row))
        if not len(o):
            continue
        H, S = C[o], C[o] @ P @ C[o].T + R[np.ix_(o, o)]
        L = _cholesky(S)
        e = _solve(L, row[o] - H @ m)
        total -= (e @ e) / 2 + np.log(np.diag(L)).sum() + len(o) * np.log(2 * long(np.pi)) / 2
        W = _solve(L, H @ P)
        K = _solve_transposed(L, W).T
        m = m + K @ (row[o] - H @ m)
        J = eye - K @ H
        P = J @ P @ J.T + K @ R[np.ix_(o, o)] @ K.T
    return float(total)


def _cholesky(S):
    L = np.zeros_like(S)
    for i in range(len(S)):
        for k in range(i + 1):
            rest = S[i, k] - L[i, :k] @ L[k, :k]
            L[i, k] = np.sqrt(rest) if i == k else rest / L[k, k]
    return L


def _solve(L, x):
    out = np.zeros_like(x, dtype=L.dtype)
    for i in range(len(L)):
        out[i] = (x[i] - L[i, :i] @ out[:i]) / L[i, i]
    return out


def _solve_transposed(L, x):
    return _solve(L.T[::-1, ::-1], x[::-1])[::-1]


def random_model(rng, n=3, p=2, m=0, steps=None, timed=(), width=None, offsets=False):
    """Keyword arguments of a random stable `LinearGaussianSSM`, as float64 NumPy arrays."""
    width = n if width is None else width

    def lead(name):
        return (steps,) if name in timed else ()

    A = rng.normal(size=(*lead("A"), n, n))
    A = A * (0.9 / np.abs(np.linalg.eigvals(A)).max(-1))[..., None, None]
    q = {
        "m0": rng.normal(size=n),
        "chol_P0": rng.normal(size=(n, n)),
        "A": A,
        "chol_Q": 0.5 * rng.normal(size=(*lead("chol_Q"), n, width)),
        "C": rng.normal(size=(*lead("C"), p, n)),
        "chol_R": 0.5 * rng.normal(size=(*lead("chol_R"), p, p)) + 0.3 * np.eye(p),
    }
    if offsets:
        q |= {"b": rng.normal(size=(*lead("b"), n)), "d": rng.normal(size=(*lead("d"), p))}
    if m:
        q |= {"B": rng.normal(size=(*lead("B"), n, m)), "D": rng.normal(size=(*lead("D"), p, m))}
    return q | {"time_varying": tuple(timed)}


def with_holes(rng, y, share=0.2):
    """`y` with a share of its entries, one whole row included, set to NaN."""
    y = np.array(y, float)
    y[rng.random(y.shape) < share] = np.nan
    y[len(y) // 2] = np.nan
    return y


def conditioned(mu, F, K, k, delta=None, c=None, b=None):
    """`N(mu, F F')` times `exp((k + K b)'x - x'(diag(delta) + K K')x / 2)`, `x = z - c`, in the noise that drives it.

    Returns the mean, the covariance, the divergence from `N(mu, F F')`, and the log density ratio as a function of `z`.
    With `z = mu + F e` and `e` standard normal the posterior of `e` is regular, whatever the rank of `F`.
    """
    n, rank = K.shape
    c = np.zeros(n) if c is None else c
    J = K @ K.T + np.diag(np.zeros(n) if delta is None else delta)
    slope = k + K @ (np.zeros(rank) if b is None else b)

    def log_psi(z):
        return slope @ (z - c) - 0.5 * (z - c) @ J @ (z - c)

    cov = np.linalg.inv(np.eye(F.shape[1]) + F.T @ J @ F)
    pull = F.T @ (slope - J @ (mu - c))
    step = cov @ pull
    logdet = np.linalg.slogdet(cov)[1]
    log_z = log_psi(mu) + 0.5 * (pull @ step + logdet)
    kl = 0.5 * (np.trace(cov) - len(cov) + step @ step - logdet)
    return mu + F @ step, F @ cov @ F.T, kl, lambda z: log_psi(z) - log_z


def backward_messages(ssm, y, u=None):
    """`log p(y_{t:T} | z_t) = h'z - z'J z / 2` up to a constant: `h (T, n)`, `J (T, n, n)`; needs a regular `R`."""
    q, timed = parameters(ssm)
    y = np.asarray(y, float)

    def at(name, t):
        return q[name][t] if name in timed else q[name]

    n = q["A"].shape[-1]
    h, J = np.zeros((len(y), n)), np.zeros((len(y), n, n))
    for t in reversed(range(len(y))):
        o = ~np.isnan(y[t])
        shift = np.zeros(len(o)) if q["d"] is None else at("d", t)
        shift = shift if q["D"] is None else shift + at("D", t) @ u[t]
        C, R = at("C", t)[o], (at("chol_R", t) @ at("chol_R", t).T)[np.ix_(o, o)]
        J[t], h[t] = C.T @ np.linalg.solve(R, C), C.T @ np.linalg.solve(R, (y[t] - shift)[o])
        if t + 1 < len(y):
            A, F = at("A", t + 1), at("chol_Q", t + 1)
            offset = np.zeros(n) if q["b"] is None else at("b", t + 1)
            offset = offset if q["B"] is None else offset + at("B", t + 1) @ u[t + 1]
            through = A.T @ np.linalg.inv(np.eye(n) + J[t + 1] @ F @ F.T)
            J[t] += through @ J[t + 1] @ A
            h[t] += through @ (h[t + 1] - J[t + 1] @ offset)
    return h, J


def root(J):
    """`K` with `K K' = J`, for a stack of positive semi-definite matrices."""
    values, vectors = np.linalg.eigh(0.5 * (J + np.swapaxes(J, -1, -2)))
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]


def chain_joint(ssm, potentials):
    """Mean and covariance of the stacked path under a chain of potentials `(K, k, delta, c, b)`; model without inputs.

    Every step is conditioned by `conditioned` at the origin and at the unit vectors: the mean is affine.
    """
    q, _ = parameters(ssm)
    n, steps = len(q["m0"]), len(potentials[0])
    offset = np.zeros(n) if q["b"] is None else q["b"]
    mean, cov = np.zeros(steps * n), np.zeros((steps * n, steps * n))
    for t in range(steps):
        own = [None if x is None else x[t] for x in potentials]
        now, before, past = slice(t * n, (t + 1) * n), slice((t - 1) * n, t * n), slice(0, t * n)
        if t == 0:
            mean[now], cov[now, now] = conditioned(q["m0"], q["chol_P0"], *own)[:2]
            continue
        start, noise = conditioned(offset, q["chol_Q"], *own)[:2]
        M = np.stack([conditioned(offset + a, q["chol_Q"], *own)[0] - start for a in q["A"].T], axis=1)
        mean[now] = start + M @ mean[before]
        cov[now, past] = M @ cov[before, past]
        cov[past, now] = cov[now, past].T
        cov[now, now] = M @ cov[before, before] @ M.T + noise
    return mean, cov


def gaussian_kl(mean, cov, other_mean, other_cov):
    """`KL(N(mean, cov) || N(other_mean, other_cov))`."""
    apart = mean - other_mean
    solved = np.linalg.solve(other_cov, np.column_stack([cov, apart]))
    logdets = np.linalg.slogdet(other_cov)[1] - np.linalg.slogdet(cov)[1]
    return 0.5 * (np.trace(solved[:, :-1]) - len(cov) + apart @ solved[:, -1] + logdets)


def grid_posterior(grid, first, kernel, emission):
    """Evidence, smoothed means and standard deviations of a scalar model, by sums over an even grid.

    `first (G,)`, `kernel (G, G)` (to, from) and `emission (T, G)` are log densities; the tails must be negligible.
    """
    width = grid[1] - grid[0]
    kernel = np.exp(kernel) * width
    steps = len(emission)
    filtered, total = np.zeros((steps, len(grid))), 0.0
    density = np.exp(first)
    for t in range(steps):
        density = density if t == 0 else kernel @ filtered[t - 1]
        top = emission[t].max()
        density = density * np.exp(emission[t] - top)
        size = density.sum() * width
        total += np.log(size) + top
        filtered[t] = density / size
    after = np.ones(len(grid))
    mean, sd = np.zeros(steps), np.zeros(steps)
    for t in reversed(range(steps)):
        weights = filtered[t] * after
        weights = weights / weights.sum()
        mean[t] = weights @ grid
        sd[t] = np.sqrt(weights @ (grid - mean[t]) ** 2)
        after = kernel.T @ (after * np.exp(emission[t] - emission[t].max()))
        after = after / after.max()
    return total, mean, sd


# EM by brute force ----------------------------------------------------------------------------------------------------


def em_step(ssm, ys, us=None, form="augmented"):
    """All parameters after one EM step from sequences `ys`, from dense posterior moments of `(z, missing y)`.

    With the form "observed" each row of the emission is a regression over the steps that have it, `R` diagonal.
    """
    q, _ = parameters(ssm)
    n, p = ssm.n_state, ssm.n_obs
    us = [None] * len(ys) if us is None else us
    second, firsts, first_covs = [], [], []
    for y, u in zip(ys, us, strict=True):
        y = np.asarray(y, float)
        j = joint(ssm, len(y), u)
        mean, cov = condition(j, np.arange(len(j.mean)), *seen(j, y, len(y)))
        second.append((j, mean, cov + np.outer(mean, mean), y, u))
        firsts.append(mean[j.z(0)])
        first_covs.append(cov[np.ix_(j.z(0), j.z(0))])

    def products(lag):
        """Lists over sequences and times of E[(left, right)(left, right)'] with inputs and a one appended."""
        out = []
        for j, mean, moment, y, u in second:
            for t in range(1 if lag else 0, len(y)):
                left, right = (j.z(t), j.z(t - 1)) if lag else (j.y(t), j.z(t))
                index = np.concatenate([left, right])
                known = [*(u[t] if u is not None else []), 1.0]
                E = moment[np.ix_(index, index)]
                side = np.outer(mean[index], known)
                out.append((np.block([[E, side], [side.T, np.outer(known, known)]]), len(left), y[t]))
        return out

    def regress(blocks, size, names):
        """Coefficients and residual covariance; what the model does not have is left out."""
        keep = list(range(size + n))
        m = len(blocks[0]) - size - n - 1
        keep += list(range(size + n, size + n + m)) if q[names[1]] is not None else []
        keep += [size + n + m] if q[names[2]] is not None else []
        S = sum(blocks)[np.ix_(keep, keep)] / len(blocks)
        coef = np.linalg.lstsq(S[size:, size:], S[size:, :size], rcond=None)[0].T
        both = np.hstack([np.eye(size), -coef])
        return coef, both @ S @ both.T

    def named(coef, names):
        m = 0 if q[names[1]] is None else q[names[1]].shape[1]
        found = {names[0]: coef[:, :n]}
        if m:
            found[names[1]] = coef[:, n : n + m]
        if q[names[2]] is not None:
            found[names[2]] = coef[:, n + m]
        return found

    out = {"m0": np.mean(firsts, 0)}
    out["P0"] = np.mean(first_covs, 0) + np.cov(np.transpose(firsts), bias=True).reshape(n, n)
    coef, out["Q"] = regress([b for b, _, _ in products(True)], n, ("A", "B", "b"))
    out |= named(coef, ("A", "B", "b"))
    emission = products(False)
    if form == "augmented":
        coef, out["R"] = regress([b for b, _, _ in emission], p, ("C", "D", "d"))
    else:
        rows, variances = [], []
        for i in range(p):
            keep = [i, *range(p, len(emission[0][0]))]
            blocks = [b[np.ix_(keep, keep)] for b, _, y in emission if not np.isnan(y[i])]
            row, variance = regress(blocks, 1, ("C", "D", "d"))
            rows.append(row[0])
            variances.append(variance[0, 0])
        coef, out["R"] = np.stack(rows), np.diag(variances)
    return out | named(coef, ("C", "D", "d"))


def expected_log_joint(ssm, ys):
    """The M-step's objective for complete sequences, from dense posterior moments: a function of named parameters."""
    pairs = {"initial": [], "transition": [], "emission": []}
    for y in ys:
        y = np.asarray(y, float)
        j = joint(ssm, len(y))
        mean, cov = condition(j, np.arange(len(j.mean)), *seen(j, y, len(y)))
        for t in range(len(y)):
            if t:
                pairs["transition"].append(_second_moment(mean, cov, np.r_[j.z(t), j.z(t - 1)]))
            else:
                pairs["initial"].append(_second_moment(mean, cov, j.z(0)))
            pairs["emission"].append(_second_moment(mean, cov, np.r_[j.y(t), j.z(t)]))

    def objective(p):
        total = 0.0
        for moments, X, S in (
            (pairs["initial"], p["m0"][:, None], p["P0"]),
            (pairs["transition"], jnp.concatenate([p["A"], p["b"][:, None]], 1), p["Q"]),
            (pairs["emission"], jnp.concatenate([p["C"], p["d"][:, None]], 1), p["R"]),
        ):
            both = jnp.concatenate([jnp.eye(len(S)), -X], 1)
            W = both @ sum(moments) @ both.T
            total -= 0.5 * (len(moments) * jnp.linalg.slogdet(S)[1] + jnp.trace(jnp.linalg.solve(S, W)))
        return total

    return objective


def _second_moment(mean, cov, index):
    """`E[(x, 1)(x, 1)']` of the entries `index`."""
    m = np.r_[mean[index], 1.0]
    return np.outer(m, m) + np.pad(cov[np.ix_(index, index)], (0, 1))


def observed_moments(ssm, steps):
    """Mean and covariance of all observations, time after time."""
    j = joint(ssm, steps)
    index = np.concatenate([j.y(t) for t in range(steps)])
    return j.mean[index], j.cov[np.ix_(index, index)]


def path_posterior(ssm, y, part):
    """The posterior of the states `part` at all times, as a SciPy distribution over the flat path."""
    j = joint(ssm, len(y))
    index = np.concatenate([j.z(t)[part] for t in range(len(y))])
    return multivariate_normal(*condition(j, index, *seen(j, y, len(y))))


def log_likelihood_on_subspaces(ssm, y):
    """`log p(y)` with exact sensors: the density of each step in the subspace of its readings, by `eigh`."""
    q, _ = parameters(ssm)
    m, P, total = np.asarray(q["m0"]), q["chol_P0"] @ q["chol_P0"].T, 0.0
    for t, row in enumerate(np.asarray(y, float)):
        if t:
            m, P = q["A"] @ m, q["A"] @ P @ q["A"].T + q["chol_Q"] @ q["chol_Q"].T
        seen = ~np.isnan(row)
        C, R = q["C"][seen], (q["chol_R"] @ q["chol_R"].T)[np.ix_(seen, seen)]
        values, basis = np.linalg.eigh(C @ P @ C.T + R)
        live = values > 1e-12 * max(values.max(initial=0.0), 1e-300)
        values, basis = values[live], basis[:, live]
        innovation = basis.T @ (row[seen] - C @ m)
        total -= 0.5 * np.sum(np.log(2 * np.pi * values) + innovation**2 / values)
        gain = P @ C.T @ basis / values
        m, P = m + gain @ innovation, P - gain @ basis.T @ C @ P
    return total


def diffuse(ssm, y, u=None, want=None):
    """With a diffuse start: the log-likelihood, and `(mean, cov)` of the entries `want(joint)` given all of `y`.

    Every variable is a proper Gaussian plus `X delta`. A rotation `Q` of the readings parts those without `delta` from
    `r` that determine it: `Q1' y = ... + S V' delta`, in the limit with the density `-sum log S`. The rest follows by
    putting `V' delta = (Q1' y - Q1' noise) / S` into what is wanted.
    """
    mask = np.asarray(ssm.diffuse)
    y = np.asarray(y, float)
    j = joint(ssm, len(y), u)
    timed = tuple(name for name in ssm.time_varying if name not in "bdBD")
    one = ssm.replace(b=None, d=None, B=None, D=None, diffuse=None, time_varying=timed)
    X = np.stack(
        [joint(one.replace(m0=1.0 * (np.arange(len(mask)) == i)), len(y)).mean for i in np.flatnonzero(mask)], 1
    )
    index, values = seen(j, y, len(y))
    Q, S, Vt = np.linalg.svd(X[index])
    r = int((S > 1e-10 * S.max(initial=1.0)).sum())
    Q1, Q2, S, V = Q[:, :r], Q[:, r:], S[:r], Vt[:r].T
    noise, mean = j.cov[np.ix_(index, index)], j.mean[index]
    apart, cov = Q2.T @ (values - mean), Q2.T @ noise @ Q2
    log_lik = -np.sum(np.log(S))
    if len(apart):
        eig, vec = np.linalg.eigh(cov)
        live = eig > 1e-12 * eig.max()
        log_lik -= 0.5 * np.sum(np.log(2 * np.pi * eig[live]) + (vec.T @ apart)[live] ** 2 / eig[live])
    if want is None:
        return log_lik, None
    rows = want(j)
    by_y = X[rows] @ V / S @ Q1.T  # what is wanted is `z + by_y (y - noise)`
    turn = np.zeros((len(rows), len(j.mean)))
    turn[np.arange(len(rows)), rows] = 1.0
    turn[:, index] -= by_y
    gain = turn @ j.cov[:, index] @ Q2 @ np.linalg.pinv(cov, rcond=1e-13, hermitian=True) if len(apart) else 0.0
    found = turn @ j.mean + by_y @ values + (gain @ apart if len(apart) else 0.0)
    spread = turn @ j.cov @ turn.T
    return log_lik, (found, spread - (gain @ Q2.T @ j.cov[index] @ turn.T if len(apart) else 0.0))
