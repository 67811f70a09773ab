"""EM in units of its own: every sensor about its mean, with a spread near 1, and results in the user's units.

Units are powers of two. A change by them loses no digit, so that what is held keeps every bit, and a fit does not
depend on units. Data and centres are 64-bit NumPy numbers, subtracted before they are rounded to the precision of JAX.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, unmasked
from pssm._types import ArrayLike
from pssm.learning.constraints import COVARIANCES, Pairs, held_entries
from pssm.learning.priors import MatrixNormalInverseWishart, Prior, strength
from pssm.ssm import LinearGaussianSSM

# Which parts change by the sensors' units, and which by those of the inputs.
FIELD = {"R": "chol_R", "Q": "chol_Q", "P0": "chol_P0"}


class Units(NamedTuple):
    """What sensors (`y`) and inputs (`u`) count from, `centre`, and in, `unit`; `count` are observed entries.

    `ratio` is the spread of each sensor in its unit, between 0.7 and 1.5.
    """

    centre: np.ndarray
    unit: np.ndarray
    u_centre: np.ndarray
    u_unit: np.ndarray
    count: np.ndarray
    ratio: np.ndarray

    @property
    def log_jacobian(self) -> float:
        """What is added to a log-likelihood in these units to have that of the data as they came."""
        return -float(np.sum(self.count * np.log(self.unit)))

    def log_prior_change(self, prior: Prior) -> float:
        """The same for the log prior, whose density is over covariances in the user's units."""
        emission = prior.emission
        return 0.0 if emission is None else -float(strength(emission)) * float(np.sum(np.log(self.unit)))

    def data(self, y: Any, name: str = "y") -> Any:
        """Series, or a list of them, in these units."""
        return y if not self.count.size else _each(y, name, self.centre, self.unit)

    def inputs(self, u: Any) -> Any:
        """Inputs likewise."""
        return u if u is None or not self.count.size else _each(u, "u", self.u_centre, self.u_unit)

    def even(self, y: Any) -> Any:
        """Series in these units with the spread of every sensor made 1."""
        if not self.count.size:
            return y
        if isinstance(y, list):
            return [self.even(part) for part in y]
        return jnp.asarray(np.asarray(y, np.float64) / self.ratio, y.dtype)

    def spread(self, ssm: LinearGaussianSSM) -> LinearGaussianSSM:
        """A model of such series as one of the series in these units."""
        if not self.count.size:
            return ssm
        by = {n: _wide(getattr(ssm, n)) for n in ("C", "D", "chol_R")}
        fields = {n: None if x is None else x * self.ratio[:, None] for n, x in by.items()}
        return _replaced(ssm, **fields, d=None if ssm.d is None else _wide(ssm.d) * self.ratio)

    def into(self, ssm: LinearGaussianSSM) -> LinearGaussianSSM:
        """A model of the data as they came as one of the data in these units."""
        if not self.count.size:
            return ssm
        C, D, d, B, b, R = (_wide(x) for x in (ssm.C, ssm.D, ssm.d, ssm.B, ssm.b, ssm.chol_R))
        return _replaced(
            ssm,
            C=C / self.unit[:, None],
            chol_R=R / self.unit[:, None],
            D=None if D is None else D * self.u_unit / self.unit[:, None],
            d=None if d is None else (d - self.centre + (0.0 if D is None else D @ self.u_centre)) / self.unit,
            B=None if B is None else B * self.u_unit,
            b=None if b is None else b + (0.0 if B is None else B @ self.u_centre),
        )

    def back(
        self,
        ssm: LinearGaussianSSM,
        start: LinearGaussianSSM | None,
        fixed: tuple[str, ...],
        pairs: Pairs | None = None,
    ) -> LinearGaussianSSM:
        """The way back; what is held, in `fixed` or in a linear constraint of `pairs`, is as it came, bit by bit."""
        C, D, d, B, b, R = (_wide(x) for x in (ssm.C, ssm.D, ssm.d, ssm.B, ssm.b, ssm.chol_R))
        D = None if D is None else D * self.unit[:, None] / self.u_unit
        B = None if B is None else B / self.u_unit
        found = _replaced(
            ssm,
            C=C * self.unit[:, None],
            chol_R=R * self.unit[:, None],
            D=D,
            d=None if d is None else d * self.unit + self.centre - (0.0 if D is None else D @ self.u_centre),
            B=B,
            b=None if b is None else b - (0.0 if B is None else B @ self.u_centre),
        )
        entries = {name: held_entries(getattr(found, name), pair) for name, pair in (pairs or {}).items()}
        found = _replaced(found, **{name: x for name, x in entries.items() if name not in COVARIANCES})
        if start is None:
            return found
        held = {FIELD.get(name, name) for name in fixed}
        kept = {name: getattr(start, name) for name in held if getattr(start, name) is not None}
        return found.replace(**{name: x.astype(ssm.dtype) for name, x in kept.items()})

    def prior(self, prior: Prior, ssm: LinearGaussianSSM) -> Prior:
        """The prior of the parameters in these units."""
        n, m = ssm.n_state, ssm.n_input
        emission = transition = None
        if prior.transition is not None:
            turn = self._turn(n, m if ssm.B is not None else 0, ssm.b is not None)
            transition = _turned(prior.transition, turn, np.ones(n), 0.0)
        if prior.emission is not None:
            turn = self._turn(n, m if ssm.D is not None else 0, ssm.d is not None)
            shift = np.zeros((len(self.unit), len(turn)))
            if ssm.d is not None:
                shift[:, -1] = self.centre
            emission = _turned(prior.emission, turn, self.unit, shift)
        return prior._replace(transition=transition, emission=emission)

    def pair(self, name: str, f: np.ndarray, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A linear constraint `vec(X) = f + G a` on a parameter in these units."""
        if not self.count.size:
            return f, G
        sizes = {
            "C": lambda k: np.tile(1.0 / self.unit, k),
            "D": lambda k: np.outer(self.u_unit, 1.0 / self.unit).reshape(-1),
            "d": lambda k: 1.0 / self.unit,
            "B": lambda k: np.repeat(self.u_unit, k),
            "R": lambda k: np.outer(1.0 / self.unit, 1.0 / self.unit).reshape(-1),
        }
        if name not in sizes:
            return f, G
        by = sizes[name](len(f) // len(self.u_unit if name == "B" else self.unit))
        return (f - self.centre if name == "d" else f) * by, G * by[:, None]

    def _turn(self, n: int, m: int, constant: bool) -> np.ndarray:
        """`w = T w'` of regressors `(z, u, 1)` as they came and in these units."""
        turn = np.eye(n + m + constant)
        turn[n : n + m, n : n + m] = np.diag(self.u_unit[:m])
        if constant:
            turn[n : n + m, -1] = self.u_centre[:m]
        return turn


NONE = Units(*(np.zeros(0) for _ in range(6)))  # of data that do not fit, which are refused later


def units_of(
    y: Any,
    u: Any,
    ssm: LinearGaussianSSM | None,
    fixed: tuple[str, ...] = (),
    groups: np.ndarray | None = None,
    constrained: frozenset[str] = frozenset(),
) -> Units:
    """Units of the data and inputs of `fit_em`, as they come.

    Sensors count from their means where the model has an offset `d` (or is yet to be found, `ssm` None); inputs from
    theirs where free offsets, neither fixed nor `constrained`, can take up the change. Sensors whose variances are tied
    (`groups`) share a unit.
    """
    rows, inputs = stacked(y, None if ssm is None else ssm.n_obs), None if u is None else stacked(u, None)
    if rows is None or (u is not None and inputs is None):
        return NONE
    size = 0 if inputs is None else inputs.shape[1]
    if ssm is not None and size != ssm.n_input:
        return NONE
    seen = ~np.isnan(rows)
    count = seen.sum(0)
    mean = np.where(seen, rows, 0.0).sum(0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(seen, rows - mean, 0.0) ** 2).sum(0) / np.maximum(count, 1))
    spread = np.where(spread > 1e-14 * np.abs(mean), spread, np.where(mean != 0, np.abs(mean), 1.0))
    if groups is not None and len(groups) == len(spread):
        logs = np.log(spread)
        spread = np.exp([logs[groups == group].mean() for group in groups])
    has_mean = ssm is None or ssm.d is not None
    u_centre, u_unit = np.zeros(size), np.ones(size)
    if inputs is not None:
        width = inputs.std(0)
        u_unit = _power_of_two(np.where(width > 0, width, 1.0))
        moved = ssm is not None and not constrained & {"b", "d"}
        if moved and _free(ssm, "D", "d", fixed) and _free(ssm, "B", "b", fixed):
            u_centre = inputs.mean(0)
    unit = _power_of_two(spread)
    return Units(mean if has_mean else np.zeros_like(mean), unit, u_centre, u_unit, count, spread / unit)


def stacked(x: Any, size: int | None) -> np.ndarray | None:
    """Arrays `(time, size)`, `(sequence, time, size)` or lists of them as rows in 64 bits; None for another shape."""
    try:
        if isinstance(x, list | tuple) and x and all(np.ndim(part) == 2 for part in x):
            rows = np.concatenate([np.asarray(unmasked(part), np.float64) for part in x])
        elif isinstance(x, list | tuple) and x and size == 1 and all(np.ndim(part) == 1 for part in x):
            rows = np.concatenate([np.asarray(unmasked(part), np.float64) for part in x])[:, None]
        else:
            rows = np.asarray(unmasked(x), np.float64)
    except (TypeError, ValueError):
        return None
    rows = rows[:, None] if rows.ndim == 1 else rows
    if rows.ndim not in (2, 3) or (size is not None and rows.shape[-1] != size) or not rows.size:
        return None
    return None if np.isinf(rows).any() else rows.reshape(-1, rows.shape[-1])


def _free(ssm: LinearGaussianSSM, effect: str, offset: str, fixed: tuple[str, ...]) -> bool:
    """Whether the offset can take up a shift of the inputs: it is there, and is free if their effect is."""
    if getattr(ssm, effect) is None:
        return True
    return getattr(ssm, offset) is not None and (offset not in fixed or effect in fixed)


def _power_of_two(x: np.ndarray) -> np.ndarray:
    return np.exp2(np.round(np.log2(x)))


def _each(x: Any, name: str, centre: np.ndarray, unit: np.ndarray) -> Any:
    if isinstance(x, list | tuple) and all(np.ndim(part) in (1, 2) for part in x) and np.ndim(x[0]):
        return [_each(np.asarray(unmasked(part)), f"{name}[{i}]", centre, unit) for i, part in enumerate(x)]
    dtype = as_float(name, x).dtype
    wide = np.asarray(unmasked(x), np.float64)
    if wide.ndim == 1 and len(unit) == 1:
        wide = wide[:, None]
    return jnp.asarray((wide - centre) / unit, dtype)


def _wide(x: ArrayLike | None) -> Any:
    return None if x is None else np.asarray(x, np.float64)


def _replaced(ssm: LinearGaussianSSM, **fields: np.ndarray | None) -> LinearGaussianSSM:
    return ssm.replace(**{name: jnp.asarray(x, ssm.dtype) for name, x in fields.items() if x is not None})


def _turned(
    part: MatrixNormalInverseWishart, turn: np.ndarray, unit: np.ndarray, shift: np.ndarray | float
) -> MatrixNormalInverseWishart:
    """The prior of `X' = S^{-1} (X T - shift)` and of its noise in the units `S`."""
    dtype = jnp.asarray(part.mean).dtype
    mean, precision, scale = (np.asarray(x, np.float64) for x in (part.mean, part.precision, part.scale))
    inverse = np.linalg.inv(turn)
    return MatrixNormalInverseWishart(
        jnp.asarray((mean @ turn - shift) / unit[:, None], dtype),
        jnp.asarray(inverse @ precision @ inverse.T, dtype),
        jnp.asarray(scale / unit / unit[:, None], dtype),
        part.degrees,
    )
