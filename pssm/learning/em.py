"""Expectation maximisation for linear dynamical systems, from any number of sequences."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from pssm._checks import as_float, check_choice, check_count, check_series
from pssm._types import Array, ArrayLike, Float, Key
from pssm.filters import log_likelihood
from pssm.learning.maximise import PARTS, Constraint, Limits, Structure, maximise
from pssm.learning.moments import expectations
from pssm.learning.polish import polish
from pssm.learning.start import perturbed, subspace_start
from pssm.ssm import LinearGaussianSSM, check_inputs, check_model

COVARIANCES = ("P0", "Q", "R")


class EMResult(NamedTuple):
    """What EM found.

    Attributes:
        ssm: the model.
        log_likelihoods: `log p(y)` of the start, after the first iteration, and so on; the last is that of `ssm`.
        reason: why it stopped: "converged", "num_iters", "polished" or "interrupted".
    """

    ssm: LinearGaussianSSM
    log_likelihoods: np.ndarray
    reason: str


class LikelihoodFellError(RuntimeError):
    """The log-likelihood fell, which exact EM cannot do; `result` is what there was before, of the fit's own type.

    The usual cause is rounding: badly scaled data, or float32 where the problem needs float64.
    """

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


def fit_em(
    y: ArrayLike | list[ArrayLike],
    ssm: LinearGaussianSSM | int,
    *,
    u: ArrayLike | list[ArrayLike] | None = None,
    num_iters: int = 100,
    tol: float = 1e-6,
    fixed: tuple[str, ...] = ("m0", "P0"),
    diagonal: tuple[str, ...] = (),
    isotropic: tuple[str, ...] = (),
    tied: dict[str, list[int]] | None = None,
    constraint: tuple[ArrayLike, ArrayLike] | None = None,
    missing: str = "auto",
    floor: float = 1e-8,
    restarts: int = 0,
    polish_steps: int = 0,
    key: Key | int = 0,
    progress_bar: bool = False,
) -> EMResult:
    """Maximum likelihood by EM, exact: the parameters of a time-invariant model from one or many sequences.

    `fixed=` and the others name parameters as in `LinearGaussianSSM.from_covariances`: `m0`, `P0`, `A`, `B`, `b`, `Q`,
    `C`, `D`, `d`, `R`. What the start does not have (`b`, `d`, `B` or `D` is None) is not fitted. Noise that is zero
    at the start, in any direction, stays zero: companion forms keep their structure, and a start at zero is no start.

    Args:
        y: `(time, obs)`, `(sequence, time, obs)`, or a list of `(time_i, obs)`; NaN entries are missing.
        ssm: where to start, or a number of states: the start is then found by subspace identification, with a mean
            `d`, and with `B` and `D` where there are inputs.
        u: inputs, shaped as `y`, where the model has `B` or `D`.
        num_iters: most iterations.
        tol: stop when an iteration gains less than `tol * (1 + |log-likelihood|)`; 0 for never.
        fixed: what stays as it is. `P0` by default: from one sequence alone it shrinks to zero.
        diagonal: covariances among `P0`, `Q`, `R` that are diagonal.
        isotropic: covariances that are a multiple of the identity.
        tied: for a covariance, the group of each variable; it is diagonal, with one variance for each group.
        constraint: `(f, G)` with `vec(A) = f + G a`, columns of `A` one below the other; `a` is fitted.
        missing: exact form of the update where entries are missing: "augmented" for any `R`, "observed" (fewer
            iterations) for a diagonal one; "auto" takes the second where it can.
        floor: least eigenvalue of a fitted covariance, relative to the scale of the data (`R`) or the states
            (`Q`, `P0`); never more than the least one of the start.
        restarts: further starts, near the first one, of which each gets a fifth of the iterations; the best goes on.
        polish_steps: most steps of L-BFGS after EM, which is slow near the maximum. They do not keep to `floor`.
        key: random key or whole number, for the restarts.
        progress_bar: show one.

    Returns:
        An `EMResult`. Ctrl-C ends the run with what there is.

    Raises:
        LikelihoodFellError: the log-likelihood fell; the error carries the result so far.
        ValueError: a shape does not fit, a name is unknown, or a full `R` has too few data to be fitted.

    Example:
        >>> import jax.numpy as jnp
        >>> from pssm import LinearGaussianSSM, datasets
        >>> one = jnp.eye(1)
        >>> start = LinearGaussianSSM([1000.0], 1000.0 * one, one, 50.0 * one, one, 50.0 * one)
        >>> result = fit_em(datasets.load("nile").y, start, fixed=("m0", "P0", "A", "C"), num_iters=50)
        >>> result.ssm.R.shape
        (1, 1)

    Source:
        Shumway & Stoffer 1982; missing entries with any `R`: Holmes 2013.
    """
    check_count("num_iters", num_iters)
    check_count("restarts", restarts, least=0)
    check_count("polish_steps", polish_steps, least=0)
    if isinstance(ssm, int):
        ssm = _found_start(y, check_count("ssm", ssm), u)
    check_model(ssm)
    if ssm.time_varying or ssm.batch_shape:
        what = "time-varying arrays" if ssm.time_varying else "batch axes"
        raise ValueError(f"`ssm` must be time-invariant and without batch axes; it has {what}.")
    series, inputs, lengths = _sequences(ssm, y, u)
    dtype = jnp.result_type(ssm.dtype, series.dtype)
    ssm, series = ssm.astype(dtype), series.astype(dtype)
    inputs = None if inputs is None else inputs.astype(dtype)
    if series.shape[1] < 2:
        raise ValueError(f"`y` must have a sequence of at least 2 steps to learn a transition; got {series.shape[1]}.")
    structure = _structure(ssm, fixed, diagonal, isotropic, tied or {})
    form = _form(ssm, series, lengths, structure, missing)
    _check_size(series, lengths, structure, ssm.n_state)
    space = None if constraint is None else _affine_space(ssm, *constraint)
    ssm = _conform(ssm, structure, space)
    data = _Data(series, inputs, lengths, _limits(ssm, series, floor), space)

    run = partial(_run, data=data, form=form, structure=structure, tol=tol, progress_bar=progress_bar)
    if restarts:
        seeds = jax.random.split(jax.random.key(key) if isinstance(key, int) else key, restarts)
        starts = [ssm, *(_conform(perturbed(ssm, seed, structure.fixed), structure, space) for seed in seeds)]
        tries = [run(start, num_iters=max(num_iters // 5, 1)) for start in starts]
        best = max(tries, key=lambda r: r.log_likelihoods[-1] if len(r.log_likelihoods) else -np.inf)
        if any(r.reason == "interrupted" for r in tries):
            return best._replace(reason="interrupted")
        ssm = best.ssm
    result = run(ssm, num_iters=num_iters)
    if polish_steps and result.reason != "interrupted":
        polished, value = polish(result.ssm, series, inputs, structure, space, polish_steps)
        if value > result.log_likelihoods[-1]:
            result = EMResult(polished, np.append(result.log_likelihoods, value), "polished")
    return result


class _Data(NamedTuple):
    """What stays the same from one iteration to the next."""

    y: Array
    u: Array | None
    lengths: Array | None
    limits: Limits
    constraint: Constraint | None


def _run(
    ssm: LinearGaussianSSM,
    *,
    data: _Data,
    form: str,
    structure: Structure,
    num_iters: int,
    tol: float,
    progress_bar: bool,
) -> EMResult:
    found: list[float] = []
    evaluated, current, reason = ssm, ssm, "num_iters"
    slack = 1e-9 if ssm.dtype == jnp.float64 else 1e-5
    with tqdm(total=num_iters, disable=not progress_bar, desc="EM") as bar:
        try:
            for count in range(num_iters + 1):
                if count < num_iters:
                    new, value = _iterate(current, data, form=form, structure=structure)
                else:
                    new, value = current, jnp.sum(log_likelihood(current, data.y, data.u))
                value = float(value)
                if not np.isfinite(value) or (found and value < found[-1] - slack * (1 + abs(value))):
                    raise LikelihoodFellError(
                        f"The log-likelihood went from {found[-1] if found else None} to {value} in iteration {count}. "
                        "Rescale the data to unit variance, or use 64-bit arithmetic.",
                        EMResult(evaluated, np.asarray(found), "fell"),
                    )
                found.append(value)
                evaluated = current
                bar.update(count > 0)
                bar.set_postfix_str(f"log-likelihood {value:.6g}", refresh=False)
                if tol > 0 and count and value - found[-2] < tol * (1 + abs(value)):
                    reason = "converged"
                    break
                current = new
        except KeyboardInterrupt:
            reason = "interrupted"
    return EMResult(evaluated, np.asarray(found), reason)


@partial(jax.jit, static_argnames=("form", "structure"))
def _iterate(
    ssm: LinearGaussianSSM, data: _Data, *, form: str, structure: Structure
) -> tuple[LinearGaussianSSM, Float[Array, ""]]:
    """The next model, and the log-likelihood of this one."""
    moments = expectations(ssm, data.y, data.u, data.lengths, form)
    return maximise(ssm, moments, structure, data.limits, data.constraint), moments.log_likelihood


# ---------------------------------------------------------------------------------------------------------------------


def _sequences(
    ssm: LinearGaussianSSM, y: ArrayLike | list[ArrayLike], u: ArrayLike | list[ArrayLike] | None
) -> tuple[Array, Array | None, Array | None]:
    """Series `(sequence, time, obs)`, inputs likewise, and the lengths where these differ."""
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
    if u is not None and (not isinstance(u, list | tuple) or len(u) != len(parts)):
        raise ValueError(f"`u` must be a list of {len(parts)} arrays, as `y` is.")
    given = [None] * len(parts) if u is None else u
    inputs = [check_inputs(ssm, x, len(part), f"u[{i}]") for i, (x, part) in enumerate(zip(given, parts, strict=True))]

    def pad(x: Array, value: float) -> Array:
        return jnp.pad(x, ((0, lengths.max() - len(x)), (0, 0)), constant_values=value)

    series = jnp.stack([pad(x, jnp.nan) for x in parts])
    stacked = None if u is None else jnp.stack([pad(x, 0.0) for x in inputs if x is not None])
    return series, stacked, None if np.ptp(lengths) == 0 else jnp.asarray(lengths)


def _found_start(
    y: ArrayLike | list[ArrayLike], num_states: int, u: ArrayLike | list[ArrayLike] | None
) -> LinearGaussianSSM:
    def as_list(name: str, x: ArrayLike | list[ArrayLike]) -> list[np.ndarray]:
        several = isinstance(x, list | tuple) and all(np.ndim(part) == 2 for part in x)
        parts = [np.asarray(as_float(name, part), float) for part in (x if several else [x])]
        parts = [part[:, None] if part.ndim == 1 else part for part in parts]
        return [row for part in parts for row in (part if part.ndim == 3 else [part])]

    return subspace_start(as_list("y", y), num_states, None if u is None else as_list("u", u))


def _is_list_of_series(y: object, n_obs: int) -> bool:
    if not isinstance(y, list | tuple) or not y:
        return False
    axes = {np.ndim(x) for x in y}
    return axes == {2} or (axes == {1} and n_obs == 1)


def _structure(
    ssm: LinearGaussianSSM,
    fixed: tuple[str, ...],
    diagonal: tuple[str, ...],
    isotropic: tuple[str, ...],
    tied: dict[str, list[int]],
) -> Structure:
    for name, value in (("fixed", fixed), ("diagonal", diagonal), ("isotropic", isotropic)):
        if isinstance(value, str):
            raise TypeError(f"`{name}` must be a tuple of names; got {value!r}. Write ({value!r},).")
        for part in value:
            check_choice(name, part, PARTS if name == "fixed" else COVARIANCES)
    ties: dict[str, tuple[int, ...]] = {}
    for name in COVARIANCES:
        size = ssm.n_obs if name == "R" else ssm.n_state
        if name in diagonal:
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


def _form(ssm: LinearGaussianSSM, y: Array, lengths: Array | None, structure: Structure, missing: str) -> str:
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


def _check_size(y: Array, lengths: Array | None, structure: Structure, n_state: int) -> None:
    """Refuses a full `R` that the data cannot determine: its likelihood has no upper bound."""
    if "R" in structure.fixed or structure.groups("R") is not None:
        return
    steps = y.shape[0] * y.shape[1] if lengths is None else int(np.sum(np.asarray(lengths)))
    n_obs = y.shape[-1]
    if steps <= n_obs + n_state:
        raise ValueError(
            f"`y` has {steps} steps, too few for a full `R` of {n_obs} x {n_obs}: the likelihood grows without bound "
            'as it becomes singular. Pass diagonal=("R",) or isotropic=("R",), or hold it with fixed=(..., "R").'
        )


def _affine_space(ssm: LinearGaussianSSM, offset: ArrayLike, basis: ArrayLike) -> Constraint:
    size = ssm.n_state**2
    f, G = as_float("constraint[0]", offset), as_float("constraint[1]", basis)
    if f.shape != (size,) or G.ndim != 2 or G.shape[0] != size:
        raise ValueError(
            f"`constraint` must be (f, G) of shapes ({size},) and ({size}, free); got {f.shape} and {G.shape}."
        )
    if np.linalg.eigvalsh(np.asarray(ssm.Q)).min() <= 0:
        raise ValueError("`constraint` needs a `Q` without noise-free directions at the start.")
    return Constraint(f.astype(ssm.dtype), G.astype(ssm.dtype))


def _conform(ssm: LinearGaussianSSM, structure: Structure, space: Constraint | None) -> LinearGaussianSSM:
    """The start, brought to the structure that all later models have."""
    fields: dict[str, Array] = {}
    for name, groups in structure.ties:
        if name not in structure.fixed:
            index = jnp.asarray(groups)
            variances = jnp.diagonal(getattr(ssm, name))
            means = jax.ops.segment_sum(variances, index) / jax.ops.segment_sum(jnp.ones_like(variances), index)
            fields[f"chol_{name}"] = jnp.diag(jnp.sqrt(means[index]))
    if space is not None:
        free = jnp.linalg.lstsq(space.basis, ssm.A.T.reshape(-1) - space.offset)[0]
        fields["A"] = (space.offset + space.basis @ free).reshape(ssm.A.shape).T
    return ssm.replace(**fields) if fields else ssm


def _limits(ssm: LinearGaussianSSM, y: Array, floor: float) -> Limits:
    """The floor, or the least eigenvalue of the start where that is below it: EM must not have to leave its start."""
    if not floor >= 0:
        raise ValueError(f"`floor` must not be negative; got {floor}.")
    scales = {"R": float(np.nanmean(np.nanvar(np.asarray(y, float), axis=(0, 1))))}
    limits = {}
    for name in COVARIANCES:
        cov = np.asarray(getattr(ssm, name), float)
        scale = scales.get(name, float(np.trace(cov)) / len(cov))
        least = np.linalg.eigvalsh(cov).min()
        limits[name] = jnp.asarray(max(0.0, min(floor * scale, least)), ssm.dtype)
    return Limits(**limits)
