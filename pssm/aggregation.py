"""Series that are sums or means over periods of the steps: quarterly totals of a monthly state, by a cumulator state.

The signal of such a series, `C_t z_t + d_t + D_t u_t`, adds up within a period and starts anew with the next:

    a_t = phi_t (a_{t-1} + C_{t-1} z_{t-1}) + d_t + D_t u_t,   phi_t = 0 at the first step of a period, 1 at the others
    y_t = w_t (a_t + C_t z_t) + v_t,             w_t = 1 (sum), or 1 / (steps of the period so far) (mean)

The state is `(z_t, a_t)`, the transition varies in time, and all of it is exact. `a_1` is known, whatever the start of
`z` is: a diffuse one too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.ssm import FIELDS, LinearGaussianSSM, check_inputs, check_model, check_num_steps

KINDS = ("sum", "mean", "last")
How = Mapping[int, str] | Sequence[str | None]


def aggregate(
    ssm: LinearGaussianSSM,
    num_steps: int,
    how: How,
    every: int | ArrayLike | Mapping[int, Any],
    *,
    start: int | Mapping[int, int] = 0,
    u: ArrayLike | None = None,
) -> LinearGaussianSSM:
    """The model in which some series are sums or means over periods, such as quarterly totals of a monthly state.

    The figure of a period stands at its last step, the other steps of its column are NaN. A value within a period is
    that of its steps so far (figures of the year to date). `R` is the noise of the figure, not of each step; with
    `R = 0` the smoothed signal of the steps adds up to the figure exactly.

    The state has one number more for each column with a sum or mean, behind the others: what the period's steps before
    this one add up to.

    Args:
        ssm: the model of all series at every step; batch axes are welcome.
        num_steps: number of steps, those of a forecast included.
        how: "sum", "mean" or "last" for a column, `{0: "sum"}`, or one for each column, None for a column of every
            step. "last" is a value at the end of a period: such a column stays as it is, with NaN in between.
        every: number of steps in a period; or a label for each step (its quarter, its month), at least `num_steps`: a
            period begins where the label changes. `{column: ...}` where columns differ.
        start: place of the first step in its period, 0 for the first of `every`; `{column: ...}` where columns differ.
            The figure of a period that began before the series is that of the steps that are there: make it NaN if it
            counts earlier ones.
        u: inputs `(..., time, input)`, where `D` has a share in a sum or mean; only the first row is used, the others
            go to the filter as always.

    Returns:
        A `LinearGaussianSSM` whose `A` (and what else must) varies in time, of length `num_steps`.

    Raises:
        ValueError: a column, kind or period does not fit, or `u` is needed.

    Example:
        >>> import pssm
        >>> one = jnp.eye(1)
        >>> walk = LinearGaussianSSM([0.0], one, one, one, jnp.ones((2, 1)), jnp.diag(jnp.array([0.0, 0.3])))
        >>> both = pssm.aggregate(walk, 6, {0: "sum"}, 3)  # a quarterly total beside a noisy monthly series
        >>> y = jnp.array([[jnp.nan, 1.0], [jnp.nan, 2.0], [9.0, 2.5], [jnp.nan, 4.0], [jnp.nan, 3.0], [12.0, 5.0]])
        >>> months = pssm.kalman_smoother(both, y).mean[:, 0].reshape(2, 3)
        >>> [round(float(quarter), 4) for quarter in months.sum(1)]
        [9.0, 12.0]

    Source:
        Harvey 1989, section 6.3; Harvey & Pierse 1984.
    """
    check_model(ssm)
    check_num_steps(ssm, check_count("num_steps", num_steps), "`num_steps`", or_more=True)
    ssm = ssm if ssm.num_steps in (None, num_steps) else ssm.steps(0, num_steps)
    kinds = kinds_of(how, ssm.n_obs)
    rows = [i for i, kind in enumerate(kinds) if kind in ("sum", "mean")]
    if not rows:
        return ssm
    places = places_of(every, start, rows, num_steps)
    n, k, timed = ssm.n_state, len(rows), ssm.time_varying

    def rows_of(name: str) -> Array | None:
        """A field of the emission with a time axis, of length 1 where it does not vary; its rows of sums and means."""
        if getattr(ssm, name) is None:
            return None
        x = ssm.with_time_axis(name)
        return jnp.take(x, np.array(rows), axis=x.ndim - len(FIELDS[name]))

    C = jnp.take(ssm.with_time_axis("C"), np.array(rows), axis=-2)
    A, d, D = ssm.with_time_axis("A"), rows_of("d"), rows_of("D")
    b = None if ssm.b is None else ssm.with_time_axis("b")
    B = None if ssm.B is None else ssm.with_time_axis("B")
    keep = jnp.asarray(places > 0, ssm.dtype)[..., None]  # (time, column, 1)
    before = C if C.shape[-3] == 1 else jnp.concatenate([C[..., :1, :, :], C[..., :-1, :, :]], axis=-3)
    right = jnp.concatenate([jnp.zeros((num_steps, n, k), ssm.dtype), keep * jnp.eye(k, dtype=ssm.dtype)], axis=-2)
    fields: dict[str, Any] = {"A": _beside(_over(A, keep * before), right)}
    none = jnp.zeros((k, ssm.chol_Q.shape[-1]), ssm.dtype)
    fields["chol_Q"] = _over(ssm.with_time_axis("chol_Q"), none)
    if b is not None or d is not None:
        above = jnp.zeros((1, n), ssm.dtype) if b is None else b
        below = jnp.zeros((1, k), ssm.dtype) if d is None else d
        fields["b"] = _over(above[..., None], below[..., None])[..., 0]
    if B is not None or D is not None:
        above = jnp.zeros((1, n, ssm.n_input), ssm.dtype) if B is None else B
        fields["B"] = _over(above, jnp.zeros((1, k, ssm.n_input), ssm.dtype) if D is None else D)

    total = jnp.zeros(k, ssm.dtype) if d is None else d[..., 0, :]
    if D is not None:
        total = total + jnp.einsum("...ij,...j->...i", D[..., 0, :, :], _first_inputs(ssm, u))
    fields["m0"] = _over(ssm.m0[..., None], total[..., None])[..., 0]
    fields["chol_P0"] = _beside(_over(ssm.chol_P0, jnp.zeros((k, n), ssm.dtype)), jnp.zeros((n + k, k), ssm.dtype))

    weight = np.where([kinds[i] == "mean" for i in rows], 1.0 / (places + 1.0), 1.0)
    weight = weight if (weight != weight[0]).any() else weight[:1]
    own = np.zeros((len(weight), ssm.n_obs, k))
    own[:, rows, np.arange(k)] = weight
    plain = np.array([i not in rows for i in range(ssm.n_obs)], float)[:, None]
    own = jnp.asarray(own, ssm.dtype)
    fields["C"] = _beside(ssm.with_time_axis("C") * plain + own @ C, own)
    if ssm.d is not None:
        fields["d"] = ssm.with_time_axis("d") * plain[:, 0]
    if ssm.D is not None:
        fields["D"] = ssm.with_time_axis("D") * plain
    varies = {"A", *timed}
    for name, x in fields.items():
        if name in ("m0", "chol_P0"):
            continue
        axis = x.ndim - 1 - len(FIELDS[name])
        varies |= {name} if x.shape[axis] > 1 else set()
        whole = (*x.shape[:axis], num_steps, *x.shape[axis + 1 :])
        fields[name] = jnp.broadcast_to(x, whole) if name in varies else jnp.squeeze(x, axis)
    diffuse = (*ssm.diffuse, *(False,) * k) if ssm.diffuse else None
    return ssm.replace(**fields, time_varying=tuple(varies), diffuse=diffuse)


def kinds_of(how: How, n_obs: int) -> list[str | None]:
    """What each column is: "sum", "mean", "last", or None for a series of every step."""
    if isinstance(how, Mapping):
        for column in how:
            if isinstance(column, bool) or not isinstance(column, int | np.integer) or not 0 <= column < n_obs:
                raise ValueError(f"`how` must name columns from 0 to {n_obs - 1}; got {column!r}.")
        kinds = [how.get(i) for i in range(n_obs)]
    else:
        if isinstance(how, str) or len(how) != n_obs:
            raise ValueError(
                f"`how` must be a dict by column, or have one entry for each of {n_obs} columns; got {how}."
            )
        kinds = list(how)
    for kind in kinds:
        if kind is not None:
            check_choice("how", kind, KINDS)
    return kinds


def places_in_periods(every: int | ArrayLike, num_steps: int, start: int = 0) -> np.ndarray:
    """Place of each step among the steps of its period that are there, 0 for the first, `(num_steps,)`.

    Raises:
        ValueError: there are fewer labels than steps, `every` is no positive number, or `start` lies outside.
    """
    steps = np.arange(num_steps)
    if np.ndim(every) == 0:
        length = check_count("every", every)  # pyright: ignore[reportArgumentType]
        if not 0 <= start < length:
            raise ValueError(f"`start` must be from 0 to {length - 1}, the place of the first step; got {start}.")
        begins = (start + steps) % length == 0
    else:
        labels = np.asarray(every)
        if labels.ndim != 1 or len(labels) < num_steps:
            raise ValueError(f"`every` must have a label for each of {num_steps} steps; got shape {labels.shape}.")
        if start:
            raise ValueError(f"`start` goes with a number of steps in `every`, not with labels; got {start}.")
        begins = np.concatenate([[True], labels[1:num_steps] != labels[: num_steps - 1]])
    return steps - np.maximum.accumulate(np.where(begins, steps, 0))


def places_of(every: Any, start: Any, columns: Sequence[int], num_steps: int) -> np.ndarray:
    """The places of each of the columns, `(num_steps, column)`; arguments as in `aggregate`."""
    found = []
    for i in columns:
        if isinstance(every, Mapping) and i not in every:
            raise ValueError(f"`every` must have an entry for column {i}; got {sorted(every)}.")
        length = every[i] if isinstance(every, Mapping) else every
        found.append(places_in_periods(length, num_steps, start.get(i, 0) if isinstance(start, Mapping) else start))
    return np.stack(found, axis=1)


def _first_inputs(ssm: LinearGaussianSSM, u: ArrayLike | None) -> Array:
    if u is None:
        raise ValueError("`u` is needed: the sum of the first period holds `D` times the first inputs.")
    rows = jnp.asarray(u)
    inputs = check_inputs(ssm, rows, rows.shape[-2] if rows.ndim > 1 else len(rows))
    return jnp.asarray(inputs)[..., 0, :]


def _over(a: Array, b: Array) -> Array:
    """Rows of `b` below those of `a`; other axes broadcast."""
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.concatenate([jnp.broadcast_to(x, lead + x.shape[-2:]) for x in (a, b)], axis=-2)


def _beside(a: Array, b: Array) -> Array:
    """Columns of `b` to the right of those of `a`; other axes broadcast."""
    lead = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return jnp.concatenate([jnp.broadcast_to(x, lead + x.shape[-2:]) for x in (a, b)], axis=-1)
