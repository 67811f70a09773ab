"""The potential: a Gaussian-shaped factor on the state, the one form in which guides, modes and filters pass it on.

    psi(z) = exp((slope + factor factor_slope)'x - x'(diag(diagonal) + factor factor' + precision)x / 2), x = z - center

It stands for what data say about the state, such as a backward message `p(y_{t:T} | z_t)`. In formulas `k` is the
slope, `K` the factor, `b` the slope along the columns of the factor. In the tied form there is no `slope`: as with the
messages of a likelihood, the slope then lies in the range of the precision, and nothing large cancels in float32.
"""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import as_float, check_shape
from pssm._types import Array

CORES = {  # with time
    "factor": 3, "slope": 2, "diagonal": 2, "center": 2, "factor_slope": 2, "scale": 2, "mask": 1, "precision": 3
}  # fmt: skip
ARGUMENTS = {
    "slope": "k", "factor": "K", "diagonal": "diag", "center": "center", "factor_slope": "b", "precision": "precision"
}  # fmt: skip
OLD_NAMES = {"K": "factor", "k": "slope", "diag": "diagonal", "delta": "diagonal", "c": "center", "b": "factor_slope"}


class Potential(eqx.Module):
    """Potentials of all steps of a path, or of one step (without the time axis); a pytree.

    The product of two potentials is their sum, `p + q`. Values are taken as they are: how far a diagonal or a precision
    may be negative is for the user of a potential to decide.

    Attributes:
        factor: factors of the precision, `(..., time, state, rank)`; rank 0 is allowed.
        diagonal: diagonal of the precision, `(..., time, state)`; None for zero.
        factor_slope: slopes along the columns of `factor`, `(..., time, rank)`; None for zero.
        center: the point that the potential is written around, `(..., time, state)`; None for zero.
        slope: slope at the center, `(..., time, state)`; None for zero (the tied form).
        mask: whether the step's potential says anything, `(..., time)`; None for all.
        relative: lengths are in units of the transition noise: `factor` and `slope` are times its standard deviation,
            `diagonal` times its variance. `factor_slope` has no unit, `center` that of the state.
        scale: conditional standard deviations of the posterior with these potentials, a natural unit of the state,
            `(..., time, state)`; where they are known.
        precision: a symmetric matrix beside the two, of any sign, `(..., time, state, state)`; None for zero. It is for
            small states: curvature in all directions, some of it negative, cannot be a diagonal plus a factor.

    The names `K`, `k`, `diag`, `delta`, `c` and `b` stand for `factor`, `slope`, `diagonal` (twice), `center` and
    `factor_slope`, as arguments and as attributes.

    Example:
        >>> p = Potential(jnp.ones((5, 2, 1)), diagonal=jnp.ones((5, 2)), slope=jnp.zeros((5, 2)))
        >>> p.rank, (p + p).factor.shape, p.K is p.factor
        (1, (5, 2, 2), True)
    """

    factor: Any
    diagonal: Any
    factor_slope: Any
    center: Any
    slope: Any
    mask: Any
    relative: bool = eqx.field(static=True)
    scale: Any
    precision: Any

    def __init__(
        self,
        factor: Any = None,
        diagonal: Any = None,
        factor_slope: Any = None,
        center: Any = None,
        slope: Any = None,
        mask: Any = None,
        relative: bool = False,
        scale: Any = None,
        precision: Any = None,
        **old_names: Any,
    ):
        given = {"factor": factor, "diagonal": diagonal, "factor_slope": factor_slope, "center": center, "slope": slope}
        for name, x in old_names.items():
            if name not in OLD_NAMES:
                raise TypeError(f"`{name}` is no part of a potential; the parts are {', '.join(CORES)}.")
            if x is not None:
                given[OLD_NAMES[name]] = x
        if given["factor"] is None:
            raise TypeError("`factor` is required, of shape (..., time, state, rank); its rank may be 0.")
        for name, x in given.items():
            setattr(self, name, x)
        self.mask, self.relative, self.scale, self.precision = mask, relative, scale, precision

    K = property(lambda self: self.factor)
    k = property(lambda self: self.slope)
    diag = property(lambda self: self.diagonal)
    delta = property(lambda self: self.diagonal)
    c = property(lambda self: self.center)
    b = property(lambda self: self.factor_slope)

    @property
    def rank(self) -> int:
        """Columns of `factor`."""
        return self.factor.shape[-1]

    @property
    def cores(self) -> "Potential":
        """For `map_batch`: how many axes of each array, time included, belong to one path."""
        return jax.tree_util.tree_map_with_path(lambda path, _: CORES[path[0].name], self)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The axes in front of time, broadcast."""
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(self.cores), strict=True)
        return jnp.broadcast_shapes(*(x.shape[: x.ndim - core] for x, core in pairs))

    def __add__(self, other: "Potential") -> "Potential":
        """The product of the two factors: ranks and precisions add up, centers are averaged by the diagonals."""
        if self.relative or other.relative:
            raise ValueError("`relative`: bring both into the units of the state first, with `in_state_units`.")
        x, y = self.masked(), other.masked()
        zero = jnp.zeros(x.factor.shape[:-1], x.factor.dtype)
        centers = [zero if p.center is None else p.center for p in (x, y)]
        diagonals = [zero if p.diagonal is None else p.diagonal for p in (x, y)]
        total = diagonals[0] + diagonals[1]
        weight = jnp.where(total != 0, diagonals[1] / jnp.where(total != 0, total, 1.0), 0.5)
        center = centers[0] + weight * (centers[1] - centers[0])
        along = []
        for p, own in zip((x, y), centers, strict=True):
            b = jnp.zeros_like(p.factor[..., 0, :]) if p.factor_slope is None else p.factor_slope
            along.append(b + jnp.einsum("...nr,...n->...r", p.factor, own - center))
        slopes = [p.slope for p in (x, y) if p.slope is not None]
        for p, own, d in zip((x, y), centers, diagonals, strict=True):
            if p.precision is not None:
                slopes.append(jnp.einsum("...nm,...m->...n", p.precision, own - center))
            if x.diagonal is not None and y.diagonal is not None:  # diagonals that cancel have no common center
                slopes.append(jnp.where(total != 0, 0.0, d * (own - center)))
        precisions = [p.precision for p in (x, y) if p.precision is not None]
        return Potential(
            jnp.concatenate([x.factor, y.factor], axis=-1),
            None if x.diagonal is None and y.diagonal is None else total,
            jnp.concatenate(along, axis=-1),
            center,
            sum(slopes) if slopes else None,
            None if x.mask is None or y.mask is None else x.mask | y.mask,
            precision=sum(precisions) if precisions else None,
        )

    def masked(self) -> "Potential":
        """The same with factors of one where `mask` is false."""
        if self.mask is None:
            return self
        names = [name for name in ("factor", "diagonal", "slope", "precision") if getattr(self, name) is not None]

        def kept(name: str) -> Array:
            axes = tuple(range(1 - CORES[name], 0))
            return jnp.where(jnp.expand_dims(self.mask, axes), getattr(self, name), 0.0)

        return replace(self, **{name: kept(name) for name in names})

    def in_state_units(self, sd: Array) -> "Potential":
        """The same, not relative, for transition noise of standard deviation `sd` `(..., time or 1, state)`."""
        if not self.relative:
            return self
        diagonal = None if self.diagonal is None else self.diagonal / sd**2
        slope = None if self.slope is None else self.slope / sd
        matrix = None if self.precision is None else self.precision / (sd[..., None] * sd[..., None, :])
        changed = {"diagonal": diagonal, "slope": slope, "precision": matrix}
        return replace(self, factor=self.factor / sd[..., None], relative=False, **changed)

    def psi(self) -> "Potential":
        """What makes the density alone: masked, without the mask and the scale."""
        if self.relative:
            raise ValueError("`relative`: bring it into the units of the state first, with `in_state_units`.")
        p = self.masked()
        return Potential(p.factor, p.diagonal, p.factor_slope, p.center, p.slope, precision=p.precision)

    def arguments(self) -> dict[str, Array]:
        """Arguments of `LowRankChain` beside its prior: `k`, `K`, `diag`, `center`, `b`, `precision`, where given."""
        p = self.psi()
        found = {old: getattr(p, name) for name, old in ARGUMENTS.items()}
        found["k"] = jnp.zeros(p.factor.shape[:-1], p.factor.dtype) if p.slope is None else p.slope
        return {name: x for name, x in found.items() if x is not None}

    def _asdict(self) -> dict[str, Any]:
        """By the names of earlier versions, in which this was a named tuple."""
        return {**{"diag": None, "center": None}, **self.arguments(), "scale": self.scale}


def as_potential(given: Any, num_steps: int, n_state: int, dtype: Any, prefix: str = "") -> Potential:
    """A potential for paths of this shape from anything with attributes `k`, `K` and perhaps `diag`, `center`, `b`.

    Args:
        given: a `Potential`, a `LowRankChain`, or an object with these attributes.
        num_steps: steps of the path.
        n_state: size of the state.
        dtype: of the result.
        prefix: of the arguments' names in error messages.

    Raises:
        ValueError, TypeError: a shape does not fit; the message names the argument.
    """
    given = given.psi() if isinstance(given, Potential) else given
    found: dict[str, Any] = {}
    for name, argument in ARGUMENTS.items():
        x = getattr(given, argument, None)
        found[name] = None if x is None else as_float(f"{prefix}{argument}", x).astype(dtype)
    K = found["factor"]
    if K is None:
        raise ValueError(f"`{prefix}K` is required, of shape ({num_steps}, {n_state}, rank) (time, state, rank).")
    if K.ndim < 3 or K.shape[-3:-1] != (num_steps, n_state):
        raise ValueError(
            f"`{prefix}K` must have shape ({num_steps}, {n_state}, rank) (time, state, rank); got {K.shape}."
        )
    for name, argument in ARGUMENTS.items():
        if found[name] is not None and name != "factor":
            size, meaning = (K.shape[-1], "rank") if name == "factor_slope" else (n_state, "state")
            shape, meaning = (num_steps, size), f"time, {meaning}"
            if name == "precision":
                shape, meaning = (num_steps, n_state, n_state), "time, state, state"
            check_shape(f"{prefix}{argument}", found[name], shape, meaning)
    return Potential(**found)
