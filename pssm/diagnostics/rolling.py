"""One model fitted again and again to longer pasts: the future is missing, so that one compiled program serves all."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.scipy.special import logsumexp
from numpyro.infer import MCMC, NUTS

from pssm._checks import check_choice, is_pandas, unmasked
from pssm._types import Array, Key
from pssm.fitting.draws import flatten_draws, trace_with
from pssm.fitting.fit import fit_svi
from pssm.fitting.loop import run_to_end
from pssm.fitting.ml import ModeEngine, PointEngine
from pssm.fitting.own_arrays import with_own_arrays
from pssm.fitting.point import PointFit
from pssm.fitting.results import posterior_draws
from pssm.infer.exact import one_step
from pssm.infer.predict import forecast
from pssm.infer.task import marginal_site
from pssm.inspection.axes import trace_model
from pssm.times.frames import rows_beside
from pssm.times.labels import check_increasing, label_array

NAMES = ("ml", "map", "nuts")
Draws = dict[str, np.ndarray]
POINTS: dict[str, type[PointEngine]] = {"ml": PointEngine, "map": ModeEngine}


class Ahead(NamedTuple):
    """A forecast of some steps.

    Attributes:
        mean, sd: `(steps, obs)`, of the mixture over posterior draws.
        draws: `(draw, steps, obs)`, independent from step to step.
        log_density: `(steps, obs)`, of what came; NaN where nothing did.
        fit: what was fitted, None where the parameters are those of before.
    """

    mean: np.ndarray
    sd: np.ndarray
    draws: np.ndarray
    log_density: np.ndarray
    fit: Any = None


class Roller:
    """Forecasts of one method from any origin of one series.

    Args:
        method: "ml", "map", "nuts", "svi:mvn" or another guide's name, or a function `(y, **kwargs) -> fit` that is
            given the past alone.
        model: a NumPyro model whose first argument is the data.
        y: data `(time, obs)`, or `(time,)`.
        kwargs: further arguments; arrays along time, such as `u`, cover all steps.
        horizon: steps ahead.
        num_draws: draws of a forecast.
        options: of the fit.
    """

    def __init__(
        self,
        method: str | Callable[..., Any],
        model: Callable[..., Any],
        y: np.ndarray,
        kwargs: dict[str, Any],
        horizon: int,
        num_draws: int,
        options: Mapping[str, Any],
    ):
        self.model, self.y, self.kwargs, self.horizon, self.num_draws = model, y, kwargs, horizon, num_draws
        self.method, self.options = method, dict(options)
        self.double, self._draws, self._engine = False, {}, None
        self._predict = jax.jit(self._predictions)
        if not callable(method):
            self._fit = self._fitter(method)
            trace = trace_model(model, {}, (y,), kwargs)
            if marginal_site(trace) is None:
                raise ValueError(
                    f"`methods`: {method!r} needs a model whose states are integrated out exactly "
                    "(`LinearGaussianMarginal`). Give a function `(y, **kwargs) -> fit` in its place."
                )

    def __call__(self, origin: int, key: Key, refit: bool) -> Ahead:
        """The forecast from the first `origin` observations."""
        fit_key, key = jax.random.split(key)
        if callable(self.method):
            return self._by_function(origin, key)
        known = self.past(origin)
        fit = None
        if refit or not self._draws:
            fit, self._draws = self.fitted(known, fit_key)
        with self.precision:
            mean, cov = (np.asarray(x, float) for x in self._predict(self._draws, known, origin))
        truth = self.y[origin : origin + self.horizon].reshape(self.horizon, -1)
        return mixture(mean, cov, truth, self.num_draws, key)._replace(fit=fit)

    def fitted(self, known: np.ndarray, key: Key, most: int = 200, *, spread: bool = False) -> tuple[Any, Draws]:
        """The fit of a past, and at most `most` posterior draws `(draw, ...)` of its latent sites.

        A point is one draw; with `spread` it is replaced by draws of the normal approximation around it.
        """
        fit = self._fit(known, key)
        if isinstance(fit, PointFit) and spread and fit.converged:
            found = fit.approximate_draws(most, key)
            return fit, {n: found[n] for n in fit.params}
        if isinstance(fit, PointFit):
            return fit, {n: np.asarray(x)[None] for n, x in fit.params.items()}
        draws = fit if isinstance(fit, dict) else posterior_draws(fit, num_samples=most, key=key)
        flat = {n: np.asarray(x) for n, x in flatten_draws(draws).items()}
        count = len(next(iter(flat.values())))
        rows = np.linspace(0, count - 1, min(most, count)).astype(int)
        return fit, {n: x[rows] for n, x in flat.items()}

    @property
    def precision(self) -> AbstractContextManager[Any]:
        """The arithmetic of the fit, for what follows from it."""
        return jax.enable_x64(self.double or bool(jax.config.read("jax_enable_x64")))

    def past(self, origin: int) -> np.ndarray:
        """The data with everything after the origin missing."""
        known = np.array(self.y, float)
        known[origin:] = np.nan
        return known

    def _fitter(self, method: str) -> Callable[[np.ndarray, Key], Any]:
        if method in POINTS:
            return self._point
        if method == "nuts":
            return self._nuts()
        check_choice("methods", method, (*NAMES, "svi:mvn", "svi:normal"))
        guide = method.removeprefix("svi:")

        def fit(y: np.ndarray, key: Key) -> Any:
            return fit_svi(self.model, y, guide=guide, key=key, progress_bar=False, **self.options, **self.kwargs)

        return fit

    def _point(self, y: np.ndarray, key: Key) -> PointFit:
        if self._engine is None:
            options = {"num_starts": 4, **self.options}
            self._engine = POINTS[str(self.method)](self.model, (y,), self.kwargs, traced=True, **options)
            self.double = self._engine.function.double
        engine = self._engine.on((y,), self.kwargs)
        run, ended = run_to_end(engine, engine.start(key), progress_bar=False)
        if ended == "interrupted":
            raise KeyboardInterrupt
        return engine.result(run, ended, key)

    def _nuts(self) -> Callable[[np.ndarray, Key], Draws]:
        options = {"num_warmup": 500, "num_samples": 500, "num_chains": 1, "progress_bar": False, **self.options}
        mcmc = MCMC(NUTS(self.model), jit_model_args=True, chain_method="vectorized", **options)

        def fit(y: np.ndarray, key: Key) -> Draws:
            mcmc.run(key, y, **self.kwargs)
            return mcmc.get_samples(group_by_chain=True)

        return fit

    def _predictions(self, draws: dict[str, Array], y: Array, origin: Array) -> tuple[Array, Array]:
        """Moments of the steps after the origin for each draw: predictions of a filter that sees nothing there."""
        kwargs = {n: np.array(x, float) if _is_floats(x) else x for n, x in self.kwargs.items()}
        model = with_own_arrays(self.model)

        def one(sample: dict[str, Array]) -> tuple[Array, Array]:
            found: Any = marginal_site(trace_with(model, sample, y, **kwargs))
            d, value = found[1], found[2]
            ahead = one_step(d.ssm, value, d.u)
            return tuple(jax.lax.dynamic_slice_in_dim(x, origin, self.horizon, 0) for x in ahead)

        return jax.lax.map(one, draws, batch_size=50)

    def _by_function(self, origin: int, key: Key) -> Ahead:
        """The function's fit of the past alone, and its forecast."""
        method: Any = self.method
        past, future = {}, {}
        for name, x in self.kwargs.items():
            along = np.ndim(x) > 0 and np.shape(x)[0] == len(self.y)
            past[name] = x[:origin] if along else x
            if along and name == "u":
                future["u_future"] = x[origin : origin + self.horizon]
        fit = method(self.y[:origin], **past)
        found = forecast(fit, self.horizon, key=key, most=self.num_draws, **future)
        mean, sd = (x.reshape(self.horizon, -1) for x in (found.mean, found.sd))
        truth = self.y[origin : origin + self.horizon].reshape(self.horizon, -1)
        density = -0.5 * ((truth - mean) / sd) ** 2 - np.log(sd * (2 * np.pi) ** 0.5)
        return Ahead(mean, sd, found.draws.reshape(len(found.draws), self.horizon, -1), density, fit)


def series_of(
    y: Any, time: Any, beside: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Data as floats, NaN where missing, the labels of their steps, and what stands beside them.

    The labels are those given, or the index of a frame, or 0, 1, ...; periods are labelled by their start, times with a
    zone in UTC. Of frames `beside` the data the rows with the same labels are taken.
    """
    if time is None and is_pandas(y):
        time = y.index
    others = {name: rows_beside(y, name, x) for name, x in (beside or {}).items()}
    data = np.asarray(unmasked(y), float)
    if data.ndim not in (1, 2) or not len(data):
        raise ValueError(f"`y` must have shape (time,) or (time, obs), at least one step; got {data.shape}.")
    if time is None:
        return data, np.arange(len(data)), others
    labels = label_array("time", time)
    if len(labels) != len(data):
        raise ValueError(f"`time` must have {len(data)} labels; got {len(labels)}.")
    check_increasing("time", labels)
    return data, labels, others


def mixture(mean: np.ndarray, cov: np.ndarray, truth: np.ndarray, num_draws: int, key: Key) -> Ahead:
    """A forecast from normal moments `(draw, steps, obs)` and `(draw, steps, obs, obs)` for each posterior draw."""
    variance = np.maximum(np.diagonal(cov, axis1=-2, axis2=-1), 0.0)
    spread = np.sqrt(np.maximum(variance, 1e-300))
    each = -0.5 * ((truth - mean) / spread) ** 2 - np.log(spread * (2 * np.pi) ** 0.5)
    density = np.asarray(logsumexp(each, axis=0), float) - np.log(len(mean))
    rows = np.linspace(0, len(mean) - 1, num_draws).round().astype(int)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    eigen, basis = np.linalg.eigh(cov)
    factor = basis * np.sqrt(np.maximum(eigen, 0.0))[..., None, :]
    noise = rng.normal(size=(num_draws, *mean.shape[1:]))
    draws = mean[rows] + np.einsum("ntij,ntj->nti", factor[rows], noise)
    return Ahead(mean.mean(0), np.sqrt(variance.mean(0) + mean.var(0)), draws, density)


def _is_floats(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array) and np.ndim(x) > 0 and np.asarray(x).dtype.kind == "f"
