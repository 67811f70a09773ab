"""Models and data on which filters break, and the truth about them in 110-digit decimal arithmetic.

The oracle shares nothing with the package, nor with the dense one of `oracles.py`: a covariance filter and the adjoint
(de Jong) smoother, which inverts no state covariance, so singular `P0`, `Q`, `R` need no care. An observed entry whose
variance given everything before it is zero contributes nothing.
"""

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

DIGITS = 110
ZERO = Decimal("1e-60")  # relative to an entry's own variance before the entries above it are known
NAMES = ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")


# ---------------------------------------------------------------------------------------------------- the oracle


class Decimals:
    """110 digits: derivatives by central differences keep more of them than float64 has."""

    zero, step = ZERO, Decimal("1e-34")

    @staticmethod
    def array(x):
        x = np.asarray(x, float)
        out = np.empty(x.shape, object)
        for i in np.ndindex(x.shape):
            out[i] = Decimal(float(x[i]))
        return out

    @staticmethod
    def log(x):
        return x.ln()

    @staticmethod
    def sqrt(x):
        return x.sqrt()

    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


class LongDoubles:
    """Extended precision: for models too large for `Decimal`, all of them well conditioned."""

    zero, step = np.longdouble(1e-30), np.longdouble(1e-6)
    two_pi = 2 * np.longdouble(np.pi) + np.longdouble(2.4492935982947064e-16)

    @staticmethod
    def array(x):
        return np.asarray(x, np.longdouble)

    log, sqrt = np.log, np.sqrt


def _live_cholesky(num, S):
    """Cholesky factor over the entries that are not determined by those before them, and their indices."""
    S, prior, live = S.copy(), S.diagonal().copy(), []
    L = S * 0
    for i in range(len(S)):
        if S[i, i] <= num.zero * prior[i]:
            continue
        L[i:, i] = S[i:, i] / num.sqrt(S[i, i])
        S[i:, i:] = S[i:, i:] - np.outer(L[i:, i], L[i:, i])
        live.append(i)
    return L[np.ix_(live, live)], live, L[:, live]


def _solve(L, x):
    """`(L L')^-1 x`."""
    x = x.copy()
    for i in range(len(L)):
        x[i] = (x[i] - L[i, :i] @ x[:i]) / L[i, i] if i else x[i] / L[i, i]
    for i in reversed(range(len(L))):
        x[i] = (x[i] - L[i + 1 :, i] @ x[i + 1 :]) / L[i, i] if i + 1 < len(L) else x[i] / L[i, i]
    return x


def _filter(num, q, timed, y, u, keep=False):
    def at(name, t):
        return q[name][t] if name in timed else q[name]

    def add(mean, offset, matrix, t):
        mean = mean if q[offset] is None else mean + at(offset, t)
        return mean if q[matrix] is None else mean + at(matrix, t) @ u[t]

    m, P = q["m0"], q["chol_P0"] @ q["chol_P0"].T
    terms, steps, dead = [], [], 0
    for t, row in enumerate(np.asarray(y, float)):
        if t:
            A = at("A", t)
            m, P = add(A @ m, "b", "B", t), A @ P @ A.T + at("chol_Q", t) @ at("chol_Q", t).T
        o = np.flatnonzero(~np.isnan(row))
        C, R = at("C", t), at("chol_R", t)[o]
        v = num.array(row[o]) - add(C @ m, "d", "D", t)[o]
        C = C[o]
        L, live, columns = _live_cholesky(num, C @ P @ C.T + R @ R.T) if len(o) else (None, [], None)
        dead += len(o) - len(live)
        predicted, term = (m, P), num.array(0.0)[()]
        weighted, gain, information = m * 0, P * 0, P * 0
        if live:
            C, v = C[live], v[live]
            Sv, SC = _solve(L, v), _solve(L, C)
            weighted, information = C.T @ Sv, C.T @ SC
            gain = P @ information
            m, P = m + P @ weighted, P - gain @ P
            P = (P + P.T) / 2
            volume = L  # of the step's innovations, in the subspace that they can move in
            if len(live) < len(o):
                volume = _live_cholesky(num, columns.T @ columns)[0]
            term = -(v @ Sv + sum(2 * num.log(x) + num.log(num.two_pi) for x in volume.diagonal())) / 2
        terms.append(term)
        if keep:
            steps.append((predicted, (m, P), weighted, information, np.eye(len(m), dtype=int) - gain))
    return terms, steps, dead


def _convert(num, params, u):
    q = {k: None if params.get(k) is None else num.array(params[k]) for k in NAMES}
    return q, params.get("time_varying", ()), None if u is None else num.array(u)


def _float(x):
    return np.array(x, dtype=object).astype(float)


def exact(case):
    """Everything the filter and the smoother of the package return, as float64; and `dead`, the entries skipped."""
    num = case.get("number", Decimals)
    with localcontext() as context:
        context.prec = DIGITS
        q, timed, u = _convert(num, case["params"], case["u"])
        terms, steps, dead = _filter(num, q, timed, case["y"], u, keep=True)
        r, N = q["m0"] * 0, q["chol_P0"] * 0
        smoothed, cross = [], []
        for t in reversed(range(len(steps))):
            (m, P), _, weighted, information, J = steps[t]
            if t + 1 < len(steps):
                A = q["A"][t + 1] if "A" in timed else q["A"]
                later = steps[t + 1][0][1]
                cross.append((np.eye(len(m), dtype=int) - later @ N) @ A @ J @ P)
                r, N = J.T @ (A.T @ r), J.T @ A.T @ N @ A @ J
            r, N = weighted + r, information + N
            smoothed.append((m + P @ r, P - P @ N @ P))
        smoothed, n = smoothed[::-1], len(q["m0"])
        return {
            "log_likelihood": float(sum(terms)),
            "log_likelihoods": _float(terms),
            "predicted_mean": _float([s[0][0] for s in steps]),
            "predicted_cov": _float([s[0][1] for s in steps]),
            "mean": _float([s[1][0] for s in steps]),
            "cov": _float([s[1][1] for s in steps]),
            "smoothed_mean": _float([s[0] for s in smoothed]),
            "smoothed_cov": _float([s[1] for s in smoothed]),
            "cross_cov": _float(cross[::-1]).reshape(-1, n, n),
            "dead": dead,
        }


def slope(case, name, direction):
    """Derivative of the log-likelihood in `params[name]` along `direction`, by central differences."""
    num = case.get("number", Decimals)
    with localcontext() as context:
        context.prec = DIGITS
        q, timed, u = _convert(num, case["params"], case["u"])
        size = max(float(np.abs(case["params"][name]).max()), 1e-12)
        h = num.step * num.array(size)[()]
        values = []
        for sign in (1, -1):
            moved = q | {name: q[name] + sign * h * num.array(direction)}
            values.append(sum(_filter(num, moved, timed, case["y"], u)[0]))
        return float((values[0] - values[1]) / (2 * h))


# ---------------------------------------------------------------------------------------------------- the cases


def rounded(case, dtype):
    """The case as the package sees it in `dtype`."""
    params = {k: v if k == "time_varying" else np.asarray(v).astype(dtype) for k, v in case["params"].items()}
    u = None if case["u"] is None else np.asarray(case["u"]).astype(dtype)
    return case | {"params": params, "y": np.asarray(case["y"], float).astype(dtype), "u": u}


@cache
def truth(name, dtype):
    """A case rounded to `dtype` and everything exact about it; read only."""
    made = rounded(CASES[name](), dtype)
    return made, exact(made)


def simulate(rng, params, steps, u=None):
    """One series from the model, in float64 NumPy."""
    timed = params.get("time_varying", ())

    def at(name, t):
        x = params.get(name)
        return None if x is None else np.asarray(x, float)[t] if name in timed else np.asarray(x, float)

    z = at("m0", 0) + at("chol_P0", 0) @ rng.normal(size=len(at("m0", 0)))
    y = []
    for t in range(steps):
        if t:
            z = at("A", t) @ z + at("chol_Q", t) @ rng.normal(size=at("chol_Q", t).shape[1])
            z = z if at("b", t) is None else z + at("b", t)
            z = z if at("B", t) is None else z + at("B", t) @ u[t]
        mean = at("C", t) @ z
        mean = mean if at("d", t) is None else mean + at("d", t)
        mean = mean if at("D", t) is None else mean + at("D", t) @ u[t]
        y.append(mean + at("chol_R", t) @ rng.normal(size=len(mean)))
    return np.array(y)


def system(rng, n, p, **changes):
    """A stable model with unit noise, and the changes that make it nasty."""
    A = rng.normal(size=(n, n))
    params = {
        "m0": rng.normal(size=n),
        "chol_P0": np.eye(n),
        "A": 0.9 * A / np.abs(np.linalg.eigvals(A)).max(),
        "chol_Q": 0.5 * np.eye(n),
        "C": rng.normal(size=(p, n)),
        "chol_R": 0.7 * np.eye(p),
    }
    return params | changes


CASES = {}


def case(function):
    """Registers a generator of `(params, y)`, `(params, y, u)` or `(params, y, u, extras)` under its name."""

    def make():
        params, y, *rest = function(np.random.default_rng(sum(function.__name__.encode())))
        u, extras = (*rest, None, {})[:2] if len(rest) < 2 else rest
        return {"name": function.__name__, "params": params, "y": y, "u": u, **(extras or {})}

    CASES[function.__name__] = make
    return function


def _plain(rng, n=2, p=1, steps=25, **changes):
    params = system(rng, n, p, **changes)
    return params, simulate(rng, params, steps)


def _start(rng, sd, noise, n=2, steps=25):
    """A vague start: the truth lies near zero, the model does not know."""
    params = system(rng, n, 1, chol_R=noise * np.eye(1))
    y = simulate(rng, params, steps)
    return params | {"chol_P0": sd * np.eye(n)}, y


@case
def ordinary(rng):
    return _plain(rng)


@case
def tiny_r_1e8_wide(rng):
    return _plain(rng, p=4, chol_R=1e-4 * np.eye(4))


@case
def tiny_r_1e12_wide(rng):
    return _plain(rng, p=4, chol_R=1e-6 * np.eye(4))


@case
def tiny_r_1e8(rng):
    return _plain(rng, chol_R=1e-4 * np.eye(1))


@case
def correlated_r(rng):
    L = np.linalg.cholesky(np.full((4, 4), 0.999) + 0.001 * np.eye(4))
    return _plain(rng, p=4, chol_R=0.5 * L)


@case
def correlated_r_rotated_factor(rng):
    """A factor that is not triangular and has negative pivots: only `chol_R chol_R'` may matter."""
    params, y = _plain(rng, p=4)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    return params | {"chol_R": -(0.5 * np.linalg.cholesky(np.full((4, 4), 0.9) + 0.1 * np.eye(4))) @ q}, y


@case
def duplicated_sensors(rng):
    params = system(rng, 2, 4)
    params["C"] = np.tile(params["C"][:1], (4, 1))
    return params, simulate(rng, params, 25)


@case
def vague_1e6(rng):
    return _start(rng, 1e3, 0.1)


@case
def vague_1e8(rng):
    return _start(rng, 1e4, 0.1)


@case
def vague_1e10(rng):
    return _start(rng, 1e5, 0.1)


@case
def vague_1e8_tiny_r(rng):
    return _start(rng, 1e4, 1e-3)


def _companion(phi, sd=0.7):
    n = len(phi)
    A = np.zeros((n, n))
    A[0], A[1:, :-1] = phi, np.eye(n - 1)
    q = np.zeros((n, 1))
    q[0] = sd
    return {"A": A, "chol_Q": q, "C": np.eye(1, n)}


@case
def companion_ar3(rng):
    return _plain(rng, n=3, **_companion([0.5, -0.3, 0.2]))


@case
def companion_ar3_exact(rng):
    return _plain(rng, n=3, chol_R=np.zeros((1, 1)), **_companion([0.5, -0.3, 0.2]))


@case
def companion_ar3_exact_known_start_gap(rng):
    params, y = _plain(rng, n=3, chol_R=np.zeros((1, 1)), chol_P0=np.zeros((3, 3)), **_companion([0.5, -0.3, 0.2]))
    y[[0, 6, 7, 12]] = np.nan
    return params, y


@case
def seasonal_exact_zero_sum(rng):
    A = np.zeros((3, 3))
    A[0], A[1, 0], A[2, 1] = -1.0, 1.0, 1.0
    return _plain(rng, n=3, A=A, chol_Q=np.array([[0.3], [0], [0]]), C=np.eye(1, 3), chol_R=0.2 * np.eye(1))


@case
def exact_observation(rng):
    return _plain(rng, chol_R=np.zeros((1, 1)))


@case
def known_entries(rng):
    """A known start and a sensor seen twice, both without noise: `y_1` is sure, and the copies are on a line."""
    params, y = _plain(rng, n=3, chol_P0=np.zeros((3, 3)), chol_R=np.zeros((1, 1)), **_companion([0.5, -0.3, 0.2]))
    m0 = np.array([0.25, -0.5, 1.0])
    y[0] = m0[0]
    return params | {"m0": m0, "C": np.tile(params["C"], (2, 1)), "chol_R": np.zeros((2, 2))}, np.tile(y, (1, 2))


@case
def known_start(rng):
    return _plain(rng, chol_P0=np.zeros((2, 2)))


@case
def deterministic(rng):
    return _plain(rng, chol_Q=np.zeros((2, 2)))


@case
def known_start_deterministic(rng):
    return _plain(rng, chol_P0=np.zeros((2, 2)), chol_Q=np.zeros((2, 2)))


@case
def unstable_visible(rng):
    return _plain(rng, A=np.array([[1.15, 0.2], [0.0, 0.8]]), C=np.array([[1.0, 0.5]]))


@case
def unstable_hidden(rng):
    return _plain(rng, A=np.array([[1.15, 0.0], [0.0, 0.8]]), C=np.array([[0.0, 1.0]]))


@case
def many_sensors(rng):
    params, y = _plain(rng, n=5, p=200, steps=3)
    return params, y, None, {"number": LongDoubles}


@case
def many_states(rng):
    params, y = _plain(rng, n=50, p=3, steps=5)
    return params, y, None, {"number": LongDoubles}


@case
def missing_rows_and_entries(rng):
    params, y = _plain(rng, p=4)
    y[rng.random(y.shape) < 0.3] = np.nan
    y[[0, 1, 9, 10, 11, 24]] = np.nan
    return params, y


@case
def missing_correlated_noise(rng):
    params, y = _plain(rng, p=4, chol_R=np.tril(rng.normal(size=(4, 4))))
    y[rng.random(y.shape) < 0.4] = np.nan
    return params, y


@case
def missing_everything_but_one(rng):
    params, y = _plain(rng, p=4)
    y[:] = np.where(np.arange(25)[:, None] * 4 + np.arange(4) == 50, y, np.nan)
    return params, y


@case
def missing_everything(rng):
    params, y = _plain(rng, p=4)
    return params, np.full_like(y, np.nan)


def _units(rng, c_state, c_obs):
    params, y = _plain(rng, p=4)
    c_state, c_obs = np.ones(2) * c_state, np.ones(4) * c_obs
    for name in ("m0", "chol_P0", "chol_Q"):
        params[name] = (params[name].T * c_state).T
    params["A"] = c_state[:, None] * params["A"] / c_state
    params["C"] = c_obs[:, None] * params["C"] / c_state
    params["chol_R"] = c_obs[:, None] * params["chol_R"]
    return params, y * c_obs


@case
def units_1e6(rng):
    return _units(rng, 1e6, 1e6)


@case
def units_1em6(rng):
    return _units(rng, 1e-6, 1e-6)


@case
def units_mixed(rng):
    return _units(rng, [1e6, 1e-6], [1e-6, 1.0, 1e6, 1e3])


@case
def outlier_1e4_sd(rng):
    params, y = _plain(rng)
    y[12] += 1e4 * 0.7
    return params, y


@case
def one_step(rng):
    return _plain(rng, p=4, steps=1)


@case
def two_steps(rng):
    return _plain(rng, p=4, steps=2)


@case
def as_many_steps_as_series(rng):
    return _plain(rng, p=4, steps=4)


@case
def inputs_offsets_gaps(rng):
    params = system(
        rng,
        3,
        2,
        b=rng.normal(size=3),
        d=rng.normal(size=2),
        B=rng.normal(size=(3, 2)),
        D=rng.normal(size=(2, 2)),
        chol_Q=rng.normal(size=(3, 2)),
        chol_P0=rng.normal(size=(3, 3)),
        chol_R=rng.normal(size=(2, 2)),
    )
    u = rng.normal(size=(8, 2))
    y = simulate(rng, params, 8, u)
    y[2, 0] = y[4] = np.nan
    return params, y, u


@case
def everything_varies_in_time(rng):
    steps, n, p, m = 6, 3, 2, 1
    params = system(rng, n, p) | {
        "A": 0.5 * rng.normal(size=(steps, n, n)),
        "chol_Q": rng.normal(size=(steps, n, 2)),
        "C": rng.normal(size=(steps, p, n)),
        "chol_R": rng.normal(size=(steps, p, p)),
        "b": rng.normal(size=(steps, n)),
        "d": rng.normal(size=(steps, p)),
        "B": rng.normal(size=(steps, n, m)),
        "D": rng.normal(size=(steps, p, m)),
        "time_varying": ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D"),
    }
    u = rng.normal(size=(steps, m))
    y = simulate(rng, params, steps, u)
    y[3, 1] = np.nan
    return params, y, u
