"""What is known of the outside: regressors with fixed or moving coefficients, and interventions at known times."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro

from pssm._checks import as_float, check_finite, is_pandas, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.models.components import Block, Scale
from pssm.models.scales import Regressors, Series, known, regressors

KINDS = {"step": (1,), "pulse": (1, 2), "slope": (1,), "ramp": (2,)}  # how many times each of them has


class Regression(NamedTuple):
    """Effect `(1, input)` of the regressors whose coefficients are fixed, these regressors, and the block of others."""

    effect: Array | None = None
    inputs: Regressors | None = None
    moving: Block | None = None


def regression(
    u: ArrayLike | None,
    length: int,
    about: Scale,
    *,
    found: Series | None = None,
    moving: bool | int | str | Sequence[int | str] = False,
    origin: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> Regression:
    """Draws the coefficients of regressors `u` `(time, input)`: the site `beta`, and states for those that move.

    A moving coefficient is a random walk, `beta_t = beta_{t-1} + w_t` with `sigma_beta ~ HalfNormal(0.1 spread /
    sd(u))`, its first value `N(0, (2.5 spread / sd(u))^2)`, as that of a fixed one.

    Args:
        u: regressors, or None.
        length: number of steps.
        about: scales of the priors.
        found: the data. What the prior of a moving coefficient knows of `u` is taken from the steps that they have, so
            that rows appended for a forecast do not change it.
        moving: all of them (True), or the columns meant, by number or by the name that a frame gives them.
        origin: what regressors count from, one number or one for each; by default their first row.
        names: of the columns; by default those of a frame.

    Raises:
        ValueError: there is no such column, or a shape does not fit.
    """
    if u is None:
        for name, given in (("moving", moving or None), ("u_origin", origin), ("u_names", names)):
            if given is not None:
                raise ValueError(f"`{name}` is given without `u`, the regressors that it is about.")
        return Regression()
    inputs = regressors(u, (length,))
    names = _column_names(u) if names is None else [str(name) for name in names]
    size = inputs.u.shape[-1]
    if names is not None and not len(names) == len(set(names)) == size:
        raise ValueError(f"`u_names` must have {size} different names, one for each column of `u`; got {names}.")
    if origin is not None:
        inputs = inputs._replace(origin=_one_for_each(origin, size))
    moves = _columns(moving, size, names)
    fixed = [i for i in range(size) if i not in moves]
    effect, labels = None, [names[i] if names else i for i in range(size)]
    if fixed:
        kept = inputs if not moves else inputs.columns(fixed)
        infer: dict[str, Any] = {"dims": {"beta": ("input",)}}
        if names or moves:
            infer["coords"] = {"input": [labels[i] for i in fixed]}
        width = 2.5 * about.spread / kept.spread
        effect = jnp.asarray(numpyro.sample("beta", Normal(0.0, width).to_event(1), infer=infer))[None]
    else:
        kept = None
    block = _moving_block(inputs.columns(moves), [labels[i] for i in moves], about, found) if moves else None
    return Regression(effect, kept, block)


def _moving_block(inputs: Regressors, labels: list[Any], about: Scale, found: Series | None) -> Block:
    """Coefficients that are random walks; their emission is the regressors."""
    size = len(labels)
    spread = inputs.spread if found is None else _where_seen(inputs, found)
    unit = about.spread / spread
    sigma = numpyro.sample(
        "sigma_beta",
        HalfNormal(0.1 * unit).to_event(1),
        infer={"dims": {"sigma_beta": ("moving_input",)}, "coords": {"moving_input": labels}},
    )
    return Block(
        jnp.zeros(size),
        jnp.diag(jnp.broadcast_to(2.5 * unit, (size,))),
        jnp.eye(size),
        about.noise(jnp.asarray(sigma), size),
        inputs.differences[:, None, :],
        tuple(f"beta_{label}" for label in labels),
        unit,
    )


def _where_seen(inputs: Regressors, found: Series) -> Any:
    """The spread of regressors over the steps at which something was observed."""
    xp: Any = jnp if is_traced(inputs.u) or is_traced(found.values) else np
    seen = ~xp.isnan(found.values).all(-1, keepdims=True)
    apart = xp.where(seen, inputs.u - inputs.origin, 0.0)
    count = xp.maximum(seen.sum(), 1)
    mean = apart.sum(0) / count
    spread = xp.sqrt((xp.where(seen, apart - mean, 0.0) ** 2).sum(0) / count)
    least = 16 * float(jnp.finfo(jnp.result_type(float)).eps) * xp.abs(apart).max(0)
    return xp.asarray(xp.where(spread > least, spread, inputs.spread), jnp.result_type(float))


def _one_for_each(origin: ArrayLike, size: int) -> Any:
    values = known(origin)
    found: Any = as_float("u_origin", origin) if values is None else values
    if np.shape(found) not in ((), (size,)):
        raise ValueError(f"`u_origin` must be one number, or one for each of {size} regressors; got {np.shape(found)}.")
    check_finite("u_origin", jnp.asarray(found))
    return (jnp if values is None else np).broadcast_to(found, (size,))


def _column_names(u: Any) -> list[str] | None:
    """What a frame calls its columns."""
    if not is_pandas(u):
        return None
    names = list(u.columns) if hasattr(u, "columns") else [getattr(u, "name", None)]
    return None if None in names else [str(name) for name in names]


def _columns(moving: Any, size: int, names: list[str] | None) -> list[int]:
    """The columns that `moving` means."""
    if isinstance(moving, bool):
        return list(range(size)) if moving else []
    found = []
    for which in [moving] if isinstance(moving, str | int) else moving:
        if isinstance(which, str):
            if names is None:
                raise ValueError(
                    f"`moving` names {which!r}, but `u` has no names. Give the number of the column, or names of all "
                    "columns as `u_names`."
                )
            if which not in names:
                raise ValueError(f"`moving` must name columns of `u`, which are {names}; got {which!r}.")
            found.append(names.index(which))
        elif isinstance(which, bool) or not 0 <= which < size:
            raise ValueError(f"`moving` must have numbers of columns of `u`, 0 to {size - 1}; got {which!r}.")
        else:
            found.append(int(which))
    return sorted(set(found))


# ------------------------------------------------------------------------------------------------------- interventions


def intervention_effects(
    table: Mapping[str, Sequence[Any]] | None, t: ArrayLike | None, length: int, about: Scale
) -> Array | None:
    """Draws the effects of interventions, the site `effect`, and returns their sum at every step, `(time, 1)`.

    Priors: `N(0, (5 spread)^2)`; `N(0, spread^2)` for a slope, which is per unit of time.

    Args:
        table: a kind and times for each name, see `pssm.models.structural`.
        t: the times of the steps; 0, 1, ... by default.
        length: number of steps.
        about: scales of the priors.

    Raises:
        ValueError: a kind is unknown, or its times do not fit.
    """
    if not table:
        return None
    if not isinstance(table, Mapping):
        raise TypeError(f'`interventions` must be a dict such as {{"law": ("step", 60)}}; got {type(table).__name__}.')
    times: Any = np.arange(float(length)) if t is None else known(t)
    times = as_float("t", t) if times is None and t is not None else times
    columns = [intervention_column(name, spec, times) for name, spec in table.items()]
    xp: Any = jnp if is_traced(times) else np
    X = jnp.asarray(xp.stack(columns, axis=1), jnp.result_type(float))
    size = np.array([1.0 if spec[0] == "slope" else 5.0 for spec in table.values()])
    infer = {"dims": {"effect": ("intervention",)}, "coords": {"intervention": list(table)}}
    effect = numpyro.sample("effect", Normal(0.0, size * about.spread).to_event(1), infer=infer)
    return (X @ effect)[:, None]


def intervention_column(name: str, spec: Sequence[Any], times: Any) -> Any:
    """The regressor `(time,)` of one intervention: 0 before it begins.

    "step" is 1 from its time on; "pulse" is 1 at its time, or from its first to its last one; "slope" is the time that
    has passed since; "ramp" goes from 0 at its first time to 1 at its second one, and stays there.
    """
    kind, at = _checked(name, spec)
    xp: Any = jnp if is_traced(times) else np
    first, last = at[0], at[-1]
    if not is_traced(times):
        _check_times(name, kind, at, times)
    if kind == "step":
        return xp.where(times >= first, 1.0, 0.0)
    if kind == "pulse":
        return xp.where((times >= first) & (times <= last), 1.0, 0.0)
    if kind == "slope":
        return xp.maximum(times - first, 0.0)
    return xp.clip((times - first) / (last - first), 0.0, 1.0)


def _checked(name: str, spec: Any) -> tuple[str, list[float]]:
    where = f"`interventions` {name!r}"
    kind = spec[0] if isinstance(spec, tuple | list) and spec else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f'{where} must be ("step", at), ("pulse", at), ("slope", at) or ("ramp", from, to); got {spec}.'
        )
    at = list(spec[1:])
    if len(at) not in KINDS[kind]:
        raise ValueError(f"{where}: a {kind} has {' or '.join(map(str, KINDS[kind]))} times; got {at}.")
    if any(isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating) for x in at):
        raise ValueError(
            f"{where} must have numbers of steps (0 is the first), or times as in `t`; got {at}. For dates: "
            "`pssm.datasets.interventions(index, table)`."
        )
    found = [float(x) for x in at]
    if not np.isfinite(found).all() or (len(found) == 2 and not found[0] <= found[1]):
        raise ValueError(f"{where} must have finite times, the first before the second; got {at}.")
    if kind == "ramp" and found[0] == found[1]:
        raise ValueError(f'{where}: a ramp needs two different times; got {at}. ("step", at) is one without a length.')
    return kind, found


def _check_times(name: str, kind: str, at: list[float], times: np.ndarray) -> None:
    """Refuses what no effect can be told from: the same at every step, or a pulse between two steps."""
    start = at[-1] if kind in ("ramp", "pulse") else at[0]
    if start <= times[0] if kind in ("step", "ramp") else start < times[0]:
        raise ValueError(
            f"`interventions` {name!r} is over, or the same at every step: the {kind} is at {at}, and the series "
            f"begins at {times[0]:g}. Its effect cannot be told from the level."
        )
    if kind == "pulse" and at[0] <= times[-1] and not ((times >= at[0]) & (times <= at[1 % len(at)])).any():
        raise ValueError(f"`interventions` {name!r}: there is no step at {at}. Give the time of one.")
