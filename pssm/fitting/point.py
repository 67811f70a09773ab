"""A fit that is one point: the maximum of a likelihood or of a posterior, with standard errors and what limits them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Key, KeyLike
from pssm.fitting.climb import Peak, depends
from pssm.fitting.path_draws import paths_at
from pssm.fitting.profile import Profile, profile_of
from pssm.fitting.results import FitRecord
from pssm.fitting.target import Values

if TYPE_CHECKING:
    import pandas as pd

LIKELIHOOD = "log-likelihood at its maximum: one point, no posterior"
MODE = "log joint density at its maximum: one point, no bound on the log evidence"
INTEGRALS = {
    "laplace": "by Laplace's approximation of the paths",
    "variational": "a lower bound over the paths",
    "importance": "an estimate by draws of the paths",
}
PATHS = 1000  # draws of the paths at the point, at most
FLAT = 1e-6  # of the curvature that a prior would give: the density may not depend on the coordinate
WIDE = 7.0  # standard error of a logarithm that is none: a factor of a thousand either way
Z95 = 1.959963984540054
MANY = 60  # entries of a site: beyond that it is no row of a summary


@dataclass(frozen=True, eq=False)
class PointFit(FitRecord):
    """A maximum, with the numbers that are read off it; a fit like any other, whose posterior is one draw.

    The same key gives the same fit.

    Attributes:
        params: the estimates by latent site, in the user's units.
        derived: the deterministic sites there.
        log_likelihood: of the observed sites there.
        log_joint: likelihood times prior density there.
        num_parameters: unconstrained coordinates.
        num_observations: entries that were observed.
        errors: standard errors by site, latent and deterministic, from the observed information; NaN where there is
            none: at the boundary, and where the density does not depend on a parameter.
        joint_covariance: the matrix of `covariance`.
        low, high: an interval of 95 % by site, symmetric in unconstrained coordinates where a site has one for each of
            its entries.
        at_boundary: entries that are at the boundary of their support, such as a variance that is zero.
        unidentified: entries on which the density does not depend.
        converged: whether the maximum was reached.
        decrement: nats that a further step would gain.
        starts: the end of the climb from each start, in nats.
    """

    derived: Values = field(default_factory=dict, repr=False)
    log_likelihood: float = float("nan")
    log_joint: float = float("nan")
    num_parameters: int = 0
    num_observations: int = 0
    errors: Values = field(default_factory=dict, repr=False)
    joint_covariance: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)
    low: Values = field(default_factory=dict, repr=False)
    high: Values = field(default_factory=dict, repr=False)
    at_boundary: tuple[str, ...] = ()
    unidentified: tuple[str, ...] = ()
    converged: bool = False
    decrement: float = float("nan")
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0), repr=False)

    @property
    def covariance(self) -> "pd.DataFrame":
        """Covariances of the entries of the latent sites, in the user's units, by name."""
        import pandas as pd  # takes half a second

        names = [label for n, x in self.params.items() for label in entries(n, x)]
        return pd.DataFrame(self.joint_covariance, index=names, columns=names)

    @property
    def aic(self) -> float:
        """Akaike's criterion, `2 k - 2 log L`."""
        return 2 * self.num_parameters - 2 * self.log_likelihood

    @property
    def aicc(self) -> float:
        """Akaike's criterion for short series; infinite where there are too few observations."""
        k, n = self.num_parameters, self.num_observations
        return self.aic + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else float("inf"))

    @property
    def bic(self) -> float:
        """Schwarz's criterion, `k log n - 2 log L`."""
        return self.num_parameters * float(np.log(self.num_observations)) - 2 * self.log_likelihood

    def approximate_draws(self, num_samples: int = 1000, key: KeyLike = 0) -> Values:
        """Draws of all sites from the normal approximation around the maximum, `(draw, ...)`.

        The normal is that of the unconstrained coordinates, with the inverse information as covariance. Coordinates at
        the boundary, or on which the density does not depend, stay where they are.

        Args:
            num_samples: number of draws.
            key: random key, or a whole number; the same key gives the same draws.

        Returns:
            Draws by site.

        Raises:
            ValueError: the fit is at no maximum, so there is no information to invert.
        """
        function, peak = self.engine.function, self.run.peak
        covariance, flat, sound = _covariance(function, peak, self.run.rules)
        if not sound:
            raise ValueError("`fit` has not converged to one maximum: there is no normal approximation around it.")
        kept = np.flatnonzero(peak.free & ~flat)
        points = np.tile(peak.z, (check_count("num_samples", num_samples), 1))
        noise = np.asarray(jax.random.normal(as_key(key), (num_samples, len(kept))), np.float64)
        points[:, kept] += noise @ np.linalg.cholesky(covariance[np.ix_(kept, kept)]).T
        found = [function.values(z) for z in points]
        return {n: np.stack([x[n] for x in found]) for n in found[0]}

    def profile(self, name: str, level: float = 0.95) -> Profile:
        """The interval by the profile likelihood of one parameter, and the likelihood along it.

        Its ends are where the maximum over all other parameters has fallen by half the quantile of chi-squared with
        one degree of freedom. Unlike `low` and `high` it need not be symmetric in any coordinates, and may end at the
        boundary of the support.

        Args:
            name: an entry as `summary` names it, such as "sigma_obs" or "phi[0]".
            level: of confidence.

        Returns:
            A `Profile`: `.estimate`, `.low`, `.high`, `.values`, `.log_likelihoods`.

        Raises:
            ValueError: there is no such entry, it has no coordinate of its own, or the fit has not converged.

        Example:
            >>> from pssm import datasets, models
            >>> from pssm.infer import fit_ml
            >>> fit = fit_ml(models.local_level, datasets.load("nile").y, progress_bar=False)
            >>> found = fit.profile("sigma_level")
            >>> bool(found.low < fit.params["sigma_level"] < found.high)
            True

        Source:
            Pawitan 2001, section 3.4.
        """
        labels = [
            (entries(n, np.zeros(self.engine.function.shapes[n]))[i], n, i) for n, i in self.engine.function.labels()
        ]
        return profile_of(self.engine.function, self.run.peak, self.run.rules, labels, name, level)

    def summary(self) -> "pd.DataFrame":
        """One row for each entry of latent and deterministic sites: estimate, standard error, interval, note."""
        import pandas as pd

        notes = dict.fromkeys(self.unidentified, "not identified") | dict.fromkeys(self.at_boundary, "at the boundary")
        rows = []
        for name, value in {**self.params, **self.derived}.items():
            if np.size(value) > MANY:
                continue
            parts = (value, self.errors[name], self.low[name], self.high[name])
            flat = [np.ravel(x) for x in parts]
            rows += [
                (label, *(x[i] for x in flat), notes.get(label, "")) for i, label in enumerate(entries(name, value))
            ]
        columns = ["parameter", "estimate", "standard_error", "low_95", "high_95", "note"]
        return pd.DataFrame(rows, columns=columns).set_index("parameter")


class _Point(NamedTuple):
    """The one draw."""

    values: Values

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        return {n: x[None, None] for n, x in self.values.items()}


class _Paths(NamedTuple):
    """Paths given the parameters: of the chain of an approximate marginal, by their weights."""

    values: Values
    params: tuple[str, ...]
    model: Any

    def __call__(self, num_samples: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        count = min(num_samples, PATHS)
        given = {n: np.asarray(x, jnp.result_type(float)) for n, x in self.values.items()}
        return paths_at(self.model, {n: given[n] for n in self.params}, count, key, args, kwargs)


def entries(name: str, value: np.ndarray) -> list[str]:
    """Names of the entries of a site: `phi[0]`, `phi[1]`."""
    if not np.ndim(value):
        return [name]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(*np.shape(value))]


def point_fit(engine: Any, run: Any, peak: Peak, ended: str, seed: Any) -> PointFit:
    """The fit of a run whose maximum is `peak`."""
    function, rules, z = engine.function, run.rules, peak.z
    values = function.values(z)
    labels = [entries(n, np.zeros(function.shapes[n]))[i] for n, i in function.labels()]
    at_boundary = tuple(label for label, inside in zip(labels, peak.free, strict=True) if not inside)
    covariance, flat, sound = _covariance(function, peak, rules)
    spread = np.sqrt(np.where(np.isnan(covariance), 0.0, np.diagonal(covariance)[:, None]).max(1, initial=0.0))
    unidentified = tuple(label for label, free, f in zip(labels, peak.free, flat, strict=True) if free and f)
    slopes = {n: np.zeros((len(z), x.size)) for n, x in values.items()}
    ends = {n: [np.full(x.shape, np.nan), np.full(x.shape, np.nan)] for n, x in values.items()}
    for i, (site, place) in enumerate(function.labels()):
        if not peak.free[i] or flat[i]:
            continue
        step = rules.step * (spread[i] or rules.scale[i])
        up, down = (function.values(_moved(z, i, sign * step)) for sign in (1.0, -1.0))
        for n in values:
            slopes[n][i] = (up[n] - down[n]).ravel() / (2 * step)
        if values[site].size == int(np.prod(function.shapes[site])) and sound:
            for side, sign in enumerate((-Z95, Z95)):
                ends[site][side].ravel()[place] = function.values(_moved(z, i, sign * spread[i]))[site].ravel()[place]
    fixed = np.where(np.isnan(covariance), 0.0, covariance)
    errors, low, high = {}, {}, {}
    for n, x in values.items():
        variance = np.einsum("ik,ij,jk->k", slopes[n], fixed, slopes[n]).reshape(x.shape)
        errors[n] = np.where((variance > 0) & sound, np.sqrt(variance), np.nan)
        found = [np.sort(np.stack(ends[n]), axis=0)[side] for side in (0, 1)]
        wald = x - Z95 * errors[n], x + Z95 * errors[n]
        low[n], high[n] = (np.where(np.isnan(f), w, f) for f, w in zip(found, wald, strict=True))
    names = function.names
    jacobian = np.concatenate([slopes[n] for n in names], axis=1)
    joint = jacobian.T @ fixed @ jacobian
    none = ~(np.diagonal(joint) > 0) | (not sound)
    joint[none], joint[:, none] = np.nan, np.nan
    likelihood, density = _both(engine, z, peak.value)
    converged = bool(ended != "interrupted" and sound and peak.decrement < (1e-6 if rules.double else 1e-3))
    reached = int(np.sum(run.values > peak.value - 0.01))
    what = "log-likelihood" if engine.objective == LIKELIHOOD else "log joint density"
    message = f"the {what} is {peak.value:.10g} at its maximum, which {reached} of {len(run.values)} starts reached."
    warnings = []
    if ended == "interrupted":
        warnings.append(f"interrupted with {len(run.values)} of {engine.target} starts.")
    elif not converged:
        warnings.append(_unconverged(peak, sound, what))
    if at_boundary:
        message += f" At the boundary of their support: {', '.join(at_boundary)}."
    if unidentified:
        warnings.append(
            f"the {what} does not depend on {', '.join(unidentified)} here: no standard error. "
            + ("The component has vanished: leave it out of the model." if at_boundary else "Fix it in the model.")
        )
    sample: Any = _Point(values)
    objective = engine.objective
    if function.integrated:
        kind = INTEGRALS[engine.model.approximation]
        sample = _Paths(values, tuple(names), engine.model)
        objective = f"{objective} (the likelihood is {kind})"
        message += f" The likelihood, and so AIC and BIC, is {kind}: exact for linear models with normal noise only."
    method = "maximum likelihood" if engine.objective == LIKELIHOOD else "posterior mode"
    return PointFit(
        method, getattr(engine.model, "plain_model", engine.model) if function.integrated else engine.model,
        engine.args, engine.kwargs, sample, objective, ended=ended,
        message=message, warnings=tuple(warnings), params={n: values[n] for n in names}, seed=seed, seconds=run.seconds,
        run=run._replace(peak=peak), engine=engine, derived={n: x for n, x in values.items() if n not in names},
        log_likelihood=likelihood, log_joint=density, num_parameters=function.size,
        num_observations=function.num_observations, errors=errors,
        joint_covariance=joint, low=low, high=high, at_boundary=at_boundary,
        unidentified=unidentified, converged=converged, decrement=peak.decrement, starts=run.values,
    )  # fmt: skip


def _both(engine: Any, z: np.ndarray, value: float) -> tuple[float, float]:
    """Log-likelihood and log joint density at a point, one of which is known."""
    parts = engine.function.parts(z)
    return (value, parts[1]) if engine.objective == LIKELIHOOD else (parts[0], value)


def _moved(z: np.ndarray, i: int, by: float) -> np.ndarray:
    moved = z.copy()
    moved[i] += by
    return moved


def _covariance(function: Any, peak: Peak, rules: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    """The inverse information of the coordinates that matter, those that do not, and whether it is a maximum."""
    size = len(peak.z)
    found, flat = np.full((size, size), np.nan), np.zeros(size, bool)
    curvature = np.diagonal(peak.information) * rules.scale**2
    weak = ~(np.abs(curvature) > FLAT) | (rules.ends.any(1) & ~(np.abs(np.diagonal(peak.information)) > WIDE**-2))
    for i in np.flatnonzero(peak.free & weak):
        flat[i] = not depends(function, peak.z, peak.value, i, rules)
        if not flat[i] and rules.ends[i].any():  # it goes on to infinity: there is no maximum
            return found, flat, False
    kept = np.flatnonzero(peak.free & ~flat)
    matrix = peak.information[np.ix_(kept, kept)]
    if not (np.isfinite(matrix).all() and np.diagonal(matrix).all()):  # a zero: no curvature, at least in one direction
        return found, flat, False
    unit = 1 / np.sqrt(np.abs(np.diagonal(matrix)))
    eigen, basis = np.linalg.eigh(matrix * unit[:, None] * unit)
    if kept.size and eigen.min() <= 1e-9:
        return found, flat, False
    found[np.ix_(kept, kept)] = (basis / eigen) @ basis.T * unit[:, None] * unit
    return found, flat, True


def _unconverged(peak: Peak, sound: bool, what: str) -> str:
    if not np.isfinite(peak.value):
        return f"not converged: the {what} is not finite at any start. Look at the model's priors, or scale the data."
    if not sound:
        return (
            f"not converged to one maximum: the {what} is flat, or rises, along some direction of the parameters, so "
            "there are no standard errors. Fix or leave out a parameter, or give more starts (`num_starts`)."
        )
    return f"not converged: a further step would gain {peak.decrement:.2g} nats. Raise `num_starts`, or scale the data."
