"""The linear dynamical system with free matrices, and its agreement with EM."""

import warnings

import jax.numpy as jnp
import numpy as np
import numpyro

from pssm._checks import also_called, check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions import StableMatrixNormal
from pssm.distributions.in_units import InverseGamma, Normal, from_origin
from pssm.learning import MatrixNormalInverseWishart, Prior, fit_em
from pssm.linalg import triangularise
from pssm.models.scales import located, regressors
from pssm.models.several import below_diagonal, look_at, observe_series, triangular_loadings
from pssm.models.single import STATES
from pssm.ssm import LinearGaussianSSM

FIRST_SD = 3.0  # of the first state, in units of one step's noise
PERSISTENCE = 0.5  # centre of the prior of `A`, a multiple of the identity
ROOM_A, ROOM_C, ROOM_INPUT, ROOM_MEAN = 4.0, 0.1, 0.01, 0.01  # precisions, in units of the noise
NOISE_SHARE = 0.1  # mode of the prior of a series' noise, in units of its variance


@also_called(n_state="num_states")
def lds(
    y: ArrayLike | None = None,
    *,
    num_states: int = 2,
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> None:
    """A linear dynamical system: `z_t = A z_{t-1} + B v_t + N(0, 1)`, `y_t = C z_t + D v_t + d + N(0, diag(R))`.

    The inputs count from their first values, `v_t = u_t - u_1` (of several sequences, from the mean of these), so that
    nothing depends on where their zero lies.

    `A` is stable, the noise of the states is the identity, and `C` is lower triangular with a positive diagonal, so
    that the basis of the states is determined. Priors are conjugate, and the same as those of `lds_prior`. MAP-EM and
    this model therefore agree: `fit_em` converges to a stationary point of this model's log joint density.

        A ~ N(0.5, 1 / (4 n)) about the identity, stable;    B ~ N(0, 1 / (0.01 var u))
        C_ij ~ N(0, R_i / 0.1),    D_ij ~ N(0, R_i / (0.01 var u_j)),    d_i ~ N(location_i, R_i / 0.01)
        R_i ~ InverseGamma(1 + max(n - i, 0) / 2, 0.2 scale_i^2),  i = 1..p
        z_1 ~ N(0, 9)

    The first few `R_i` have more degrees because of the loadings that are zero: over all rotations of the states, the
    priors of the series are alike.

    Args:
        y: data `(time, obs)`, or `(sequence, time, obs)` for independent sequences of one system; NaN where missing;
            None to predict.
        num_states: size `n` of the state; `n_state` is a second name for it. With more states than series some
            rotations are left open.
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of series, likewise.
        u: inputs `(time, input)`, or `(sequence, time, input)`.
        states: "marginal" (integrated out) or "sampled" (a site `z` of shape `(time, state)`).
        location: centre of the prior of `d`, one for each series; by default the means of the data, 0 without data.
        scale: spread of each series; by default the standard deviations of the data, 1 without data.

    Sites:
        `A`, `C_diagonal`, `C_below`, `R` (variances), `d`; `B`, `D` with inputs; `C` is deterministic.

    Example:
        >>> from numpyro import handlers
        >>> trace = handlers.trace(handlers.seed(lds, 0)).get_trace(num_states=2, num_steps=50, num_obs=5)
        >>> trace["C"]["value"].shape, trace["y"]["value"].shape
        ((5, 2), (50, 5))

    Source:
        Ghahramani & Hinton 1996; the basis: Geweke & Zhou 1996.
    """
    check_choice("states", states, STATES)
    n = check_count("num_states", num_states)
    about = look_at(y, num_steps, num_obs, u, location, scale, from_origin=True)
    p, one = about.num_obs, jnp.eye(n)
    A = numpyro.sample("A", StableMatrixNormal(PERSISTENCE * one, (ROOM_A * n) ** -0.5))
    degrees = 1.0 + 0.5 * jnp.clip(n - 1 - jnp.arange(p), 0)
    R = jnp.asarray(numpyro.sample("R", InverseGamma(degrees, 2 * NOISE_SHARE * about.scale**2).to_event(1)))
    C = triangular_loadings("C", jnp.sqrt(R / ROOM_C), n, about.scale)
    mean = Normal(about.location, jnp.sqrt(R / ROOM_MEAN), unit=about.scale)
    d = located("d", mean.to_event(1), about.origin)
    B = D = None
    if about.u is not None:
        room = (ROOM_INPUT * about.input_scale**2) ** -0.5
        zero, unit = np.zeros(()), about.scale[:, None] / about.input_scale
        B = numpyro.sample("B", Normal(jnp.zeros((n, len(room))), room, centre=zero).to_event(2))
        effect = Normal(jnp.zeros((p, len(room))), jnp.sqrt(R)[:, None] * room, centre=zero, unit=unit)
        D = numpyro.sample("D", effect.to_event(2))
    noise = jnp.diag(jnp.sqrt(R))
    ssm = LinearGaussianSSM(jnp.zeros(n), FIRST_SD * one, A, one, C, noise, B=B, d=d, D=D)
    observe_series(ssm, about, states)


@also_called(n_state="num_states")
def lds_prior(
    y: ArrayLike,
    num_states: int,
    *,
    u: ArrayLike | None = None,
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> Prior:
    """The priors of `lds` for `fit_em`, with `fixed=("m0", "P0", "Q")`, `Q = 1`, and `diagonal=("R",)`.

    EM knows no lower triangle: it finds the same system in a basis that `lds_values` turns. Arguments as in `lds`. Give
    `fit_em` inputs that count from their first row, `u - u[0]`, as `lds` does.
    """
    n, about = check_count("num_states", num_states), look_at(y, None, None, u, location, scale)
    inputs = jnp.zeros(0) if about.u is None else ROOM_INPUT * about.input_scale**2
    m, p = len(inputs), about.num_obs
    transition = MatrixNormalInverseWishart(
        mean=jnp.eye(n, n + m) * PERSISTENCE,
        precision=jnp.concatenate([jnp.full(n, ROOM_A * n), inputs]),
        scale=jnp.ones(n),
        degrees=n + 2.0,
    )
    emission = MatrixNormalInverseWishart(
        mean=jnp.zeros((p, n + m + 1)).at[:, -1].set(about.location),
        precision=jnp.concatenate([jnp.full(n, ROOM_C), inputs, jnp.full(1, ROOM_MEAN)]),
        scale=4 * NOISE_SHARE * about.scale**2,
        degrees=3.0 - p,
    )
    return Prior(transition=transition, emission=emission)


def lds_values(ssm: LinearGaussianSSM, u: ArrayLike | None = None) -> dict[str, Array]:
    """Values of the sites of `lds` that make the system `ssm`, for `numpyro.infer.init_to_value(values=...)`.

    Args:
        ssm: time-invariant, with a regular `Q`; only the diagonal of `R` is used. An unstable `A` is shrunk.
        u: the inputs, where `ssm` takes them as they are, such as one of `lds_start`; without them `ssm` takes inputs
            that count from their first row.

    Raises:
        ValueError: `Q` is singular: there is no basis in which it is the identity; or `ssm` has an offset `b`, and `u`
            is not given.

    Example:
        >>> ssm = LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[0.5]], [[-2.0], [1.0]], jnp.eye(2))
        >>> {name: x.tolist() for name, x in lds_values(ssm).items() if name.startswith("C")}
        {'C_diagonal': [1.0], 'C_below': [-0.5]}
    """
    if ssm.b is not None and u is None:
        raise ValueError("`u` is needed: `ssm` has an offset `b`, so its inputs do not count from their first row.")
    ssm = unit_noise(ssm)
    n, p = ssm.n_state, ssm.n_obs
    k = min(n, p)
    turn = jnp.linalg.qr(ssm.C[:k].T, mode="complete")[0].T
    sign = jnp.where(jnp.diagonal(ssm.C[:k] @ turn[:k].T) < 0, -1.0, 1.0)
    turn = jnp.concatenate([sign[:, None] * turn[:k], turn[k:]])
    C = ssm.C @ turn.T
    values = {
        "A": turn @ ssm.A @ turn.T,
        "C_diagonal": jnp.maximum(jnp.diagonal(C), 1e-6),
        "C_below": C[below_diagonal(p, n)],
        "R": jnp.diagonal(ssm.R),
        "d": jnp.zeros(p) if ssm.d is None else ssm.d,
    }
    if u is not None and ssm.D is not None:
        values["d"] = values["d"] + ssm.D @ jnp.asarray(_first_inputs(u), ssm.dtype)
    if ssm.B is not None or ssm.D is not None:
        m = ssm.n_input
        values["B"] = jnp.zeros((n, m)) if ssm.B is None else turn @ ssm.B
        values["D"] = jnp.zeros((p, m)) if ssm.D is None else ssm.D
    return values


def unit_noise(ssm: LinearGaussianSSM) -> LinearGaussianSSM:
    """The same system in a basis where `Q` is the identity and the first state `N(0, 9)`; `A` shrunk to stable."""
    L = np.asarray(triangularise(ssm.chol_Q))
    scale = np.abs(L).max(initial=0.0)
    if np.diagonal(L).min(initial=np.inf) <= 1e-6 * scale:
        raise ValueError("`ssm` has a singular `Q`: there is no basis in which it is the identity.")
    A = np.linalg.solve(L, np.asarray(ssm.A) @ L)
    radius = np.abs(np.linalg.eigvals(A)).max()
    one = jnp.eye(ssm.n_state, dtype=ssm.dtype)
    fields = {"A": A * min(1.0, 0.995 / radius), "C": ssm.C @ L, "m0": 0.0 * ssm.m0}
    for name in ("B", "b"):
        if getattr(ssm, name) is not None:
            fields[name] = np.linalg.solve(L, getattr(ssm, name))
    return ssm.replace(chol_Q=one, chol_P0=FIRST_SD * one, **{k: jnp.asarray(x, ssm.dtype) for k, x in fields.items()})


@also_called(n_state="num_states")
def lds_start(
    y: ArrayLike, num_states: int, *, u: ArrayLike | None = None, num_iters: int = 100, progress_bar: bool = False
) -> LinearGaussianSSM:
    """A mode of `lds` by EM, from a start by subspace identification. Arguments as in `lds` and `fit_em`.

    The system takes inputs as they are: where these do not begin at zero it has an offset `b`, and `lds_values` needs
    them too.
    """
    n = check_count("num_states", num_states)
    origin = None if u is None else _first_inputs(u)
    inputs = None if u is None or origin is None else from_origin(u, origin)
    with warnings.catch_warnings():  # a start need not be the maximum
        warnings.filterwarnings("ignore", message="`num_iters`")
        first = fit_em(y, n, u=inputs, num_iters=1, diagonal=("R",)).ssm
        result = fit_em(
            y,
            unit_noise(first),
            u=inputs,
            num_iters=num_iters,
            prior=lds_prior(y, n, u=inputs),
            fixed=("m0", "P0", "Q"),
            diagonal=("R",),
            progress_bar=progress_bar,
        )
    ssm = result.ssm
    if origin is None or ssm.B is None or ssm.D is None or ssm.d is None or not np.any(origin):
        return ssm
    zero = jnp.asarray(origin, ssm.dtype)
    return ssm.replace(b=-ssm.B @ zero, d=ssm.d - ssm.D @ zero)


def _first_inputs(u: ArrayLike) -> np.ndarray:
    """What `lds` counts inputs from."""
    return regressors(u, np.shape(u)[:-1] if np.ndim(u) > 1 else np.shape(u)).origin
