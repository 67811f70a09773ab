"""The arguments of `fit_em`, checked and converted to the form that its iterations use."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_choice, check_series
from pssm._types import Array, ArrayLike
from pssm.learning.constraints import COVARIANCES, Pairs, Spaces, on_spaces, only_diagonal
from pssm.learning.maximise import PARTS, Limits, Structure
from pssm.learning.start import subspace_start
from pssm.linalg import factor_from_covariance
from pssm.ssm import LinearGaussianSSM, check_inputs

ROUNDED = 16  # steps
MOST_FOR_A_START = 10**6  # observed values, up to which a start from the data is tried beside the given one


def sequences(
    ssm: LinearGaussianSSM, y: ArrayLike | list[ArrayLike], u: ArrayLike | list[ArrayLike] | None
) -> tuple[Array, Array | None, Array | None]:
    """Series `(sequence, time, obs)`, inputs likewise, and the lengths where these differ.

    Unequal lengths are padded to a multiple of `ROUNDED`, so that the fits of several groups share a program.
    """
    if not _is_list_of_series(y, ssm.n_obs):
        series = check_series(y, ssm.n_obs)
        if series.ndim > 3:
            raise ValueError(f"`y` must have shape (time, obs) or (sequence, time, obs); got {series.shape}.")
        inputs = check_inputs(ssm, u, series.shape[-2])
        batch = series.shape[:-2] or (1,)
        inputs = None if inputs is None else jnp.broadcast_to(inputs, (*batch, *inputs.shape[-2:]))
        return series.reshape(-1, *series.shape[-2:]), inputs, None
    parts = [check_series(x, ssm.n_obs, f"y[{i}]") for i, x in enumerate(y)]
    lengths = np.asarray([len(x) for x in parts])
    equal = np.ptp(lengths) == 0
    padded = lengths.max() if equal else -(-lengths.max() // ROUNDED) * ROUNDED
    if u is not None and (not isinstance(u, list | tuple) or len(u) != len(parts)):
        raise ValueError(f"`u` must be a list of {len(parts)} arrays, as `y` is.")
    given = [None] * len(parts) if u is None else u
    inputs = [check_inputs(ssm, x, len(part), f"u[{i}]") for i, (x, part) in enumerate(zip(given, parts, strict=True))]

    def pad(x: Array, value: float) -> Array:
        return jnp.pad(x, ((0, padded - len(x)), (0, 0)), constant_values=value)

    series = jnp.stack([pad(x, jnp.nan) for x in parts])
    stacked = None if u is None else jnp.stack([pad(x, 0.0) for x in inputs if x is not None])
    return series, stacked, None if equal else jnp.asarray(lengths)


def found_start(
    y: ArrayLike | list[ArrayLike],
    num_states: int,
    u: ArrayLike | list[ArrayLike] | None,
    *,
    offsets: bool = True,
) -> LinearGaussianSSM:
    """A start with so many states, from the data."""

    def as_list(name: str, x: ArrayLike | list[ArrayLike]) -> list[np.ndarray]:
        several = isinstance(x, list | tuple) and all(np.ndim(part) == 2 for part in x)
        parts = [np.asarray(as_float(name, part), float) for part in (x if several else [x])]
        parts = [part[:, None] if part.ndim == 1 else part for part in parts]
        return [row for part in parts for row in (part if part.ndim == 3 else [part])]

    series = as_list("y", y)
    longest = max(len(x) for x in series)
    if longest < 2:
        raise ValueError(f"`y` must have a sequence of at least 2 steps to learn a transition; got {longest}.")
    return subspace_start(series, num_states, None if u is None else as_list("u", u), offsets=offsets)


def start_like(ssm: LinearGaussianSSM, y: Any, u: Any, structure: Structure) -> LinearGaussianSSM | None:
    """A start from the data with the parts that `ssm` has; None where it would be another kind of model, or costly."""
    free = not ssm.diffuse and structure.fixed <= {"m0", "P0"} and (ssm.B is None) == (ssm.D is None)
    size = sum(np.size(part) for part in (y if isinstance(y, list | tuple) else [y]))
    if not free or size > MOST_FOR_A_START or ssm.chol_Q.shape[-1] < ssm.n_state:
        return None
    if min(np.linalg.eigvalsh(np.asarray(x, float)).min() for x in (ssm.P0, ssm.Q, ssm.R)) <= 0:
        return None
    found = found_start(y, ssm.n_state, u, offsets=ssm.d is not None)
    return found.replace(b=jnp.zeros(ssm.n_state, found.dtype)) if ssm.b is not None else found


def _is_list_of_series(y: object, n_obs: int) -> bool:
    if not isinstance(y, list | tuple) or not y:
        return False
    axes = {np.ndim(x) for x in y}
    return axes == {2} or (axes == {1} and n_obs == 1)


def make_structure(
    ssm: LinearGaussianSSM,
    fixed: tuple[str, ...],
    diagonal: tuple[str, ...],
    isotropic: tuple[str, ...],
    tied: dict[str, list[int]],
    constrained: tuple[str, ...] = (),
) -> Structure:
    """The structure that the arguments `fixed`, `diagonal`, `isotropic` and `tied` describe, `constrained` aside."""
    for name, value in (("fixed", fixed), ("diagonal", diagonal), ("isotropic", isotropic)):
        if isinstance(value, str):
            raise TypeError(f"`{name}` must be a tuple of names; got {value!r}. Write ({value!r},).")
        for part in value:
            check_choice(name, part, PARTS if name == "fixed" else COVARIANCES)
    ties: dict[str, tuple[int, ...]] = {}
    for name in COVARIANCES:
        size = ssm.n_obs if name == "R" else ssm.n_state
        if name in diagonal or (size == 1 and name not in constrained):  # a single variance is diagonal
            ties[name] = tuple(range(size))
        if name in isotropic:
            ties[name] = (0,) * size
    for name, groups in tied.items():
        check_choice("tied", name, COVARIANCES)
        size = ssm.n_obs if name == "R" else ssm.n_state
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        if len(index) != size:
            raise ValueError(f"`tied[{name!r}]` must have a group for each of {size} variables; got {len(index)}.")
        ties[name] = tuple(int(i) for i in index)
    return Structure(frozenset(fixed), tuple(sorted(ties.items())))


def tied_noise(size: int, isotropic: tuple[str, ...], tied: dict[str, list[int]]) -> np.ndarray | None:
    """The group of each sensor, where the variances of `R` are tied."""
    if "R" in tied:
        return np.unique(np.asarray(tied["R"]), return_inverse=True)[1]
    return np.zeros(size, int) if "R" in isotropic else None


def choose_form(ssm: LinearGaussianSSM, y: Array, lengths: Array | None, structure: Structure, missing: str) -> str:
    """Which form the sums over observations take: "complete", "observed" or "augmented"."""
    check_choice("missing", missing, ("auto", "augmented", "observed"))
    R = np.asarray(ssm.R)
    is_diagonal = structure.groups("R") is not None or ("R" in structure.fixed and not (R - np.diag(np.diag(R))).any())
    if missing == "observed" and not is_diagonal:
        raise ValueError('`missing="observed"` needs a diagonal `R`: pass diagonal=("R",), or missing="augmented".')
    holes = np.isnan(np.asarray(y))
    if holes.all():
        raise ValueError("`y` has no observed value.")
    counted = np.ones(y.shape[:2], bool) if lengths is None else np.arange(y.shape[1]) < np.asarray(lengths)[:, None]
    if not holes[counted].any():
        return "complete"
    return "augmented" if missing == "augmented" or not is_diagonal else "observed"


def check_size(y: Array, lengths: Array | None, structure: Structure, n_state: int, pairs: Pairs) -> None:
    """Refuses a full `R` that the data cannot determine: its likelihood has no upper bound."""
    if "R" in structure.fixed or structure.groups("R") is not None:
        return
    if "R" in pairs and only_diagonal(pairs["R"], y.shape[-1]):
        return
    steps = y.shape[0] * y.shape[1] if lengths is None else int(np.sum(np.asarray(lengths)))
    n_obs = y.shape[-1]
    if steps <= n_obs + n_state:
        raise ValueError(
            f"`y` has {steps} steps, too few for a full `R` of {n_obs} x {n_obs}: the likelihood grows without bound "
            'as it becomes singular. Pass diagonal=("R",) or isotropic=("R",), or hold it with fixed=(..., "R").'
        )


def conform(ssm: LinearGaussianSSM, structure: Structure, spaces: Spaces) -> LinearGaussianSSM:
    """The start, projected on the structure that all later models have."""
    fields: dict[str, Array | None] = {}
    if "Q" not in structure.fixed and ssm.chol_Q.shape[1] != ssm.n_state:
        fields["chol_Q"] = factor_from_covariance("Q", ssm.Q)  # square, as the factors to come are
    for name, groups in structure.ties:
        if name not in structure.fixed:
            index = jnp.asarray(groups)
            variances = jnp.diagonal(getattr(ssm, name))
            means = jax.ops.segment_sum(variances, index) / jax.ops.segment_sum(jnp.ones_like(variances), index)
            fields[f"chol_{name}"] = jnp.diag(jnp.sqrt(means[index]))
    fields |= on_spaces(ssm, spaces)
    return ssm.replace(**fields) if fields else ssm


def make_limits(ssm: LinearGaussianSSM, y: Array, floor: float) -> Limits:
    """The floor, or the least eigenvalue of the start where that is below the floor: the start must be feasible."""
    if not floor >= 0:
        raise ValueError(f"`floor` must not be negative; got {floor}.")
    seen = np.asarray(y, float).reshape(-1, y.shape[-1])
    seen = seen[:, ~np.isnan(seen).all(0)]
    scales = {"R": float(np.mean(np.nanvar(seen, axis=0))) if seen.size else 0.0}
    if floor and ssm.dtype != jnp.float64:
        floor = max(floor, 16 * float(jnp.finfo(ssm.dtype).eps))  # below it the filter's rounding decides
    limits = {}
    for name in COVARIANCES:
        cov = np.asarray(getattr(ssm, name), float)
        scale = scales.get(name, float(np.trace(cov)) / len(cov))
        least = np.linalg.eigvalsh(cov).min()
        limits[name] = jnp.asarray(max(0.0, min(floor * scale, least)), ssm.dtype)
    return Limits(**limits)
