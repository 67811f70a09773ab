"""What a fit is: NumPyro's results with how they came about, and one record that stands for any of them."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.svi import SVIRunResult

from pssm._keys import as_key
from pssm._types import KeyLike
from pssm.fitting.draws import ChainDraws, CompletedDraws, GuideDraws
from pssm.fitting.labels import check_density, objective_of, with_all_data
from pssm.fitting.portable import kept, restore
from pssm.fitting.training import Settings, TrainState
from pssm.guides.paths import BOUND
from pssm.storage.pickling import Copied, dumps

EXACT = "exact posterior (Markov chain)"


class MCMCFit(MCMC):
    """NumPyro's `MCMC` with its draws, as `fit_nuts`, `load` and `resume` return it.

    Attributes:
        seed: the random key that it was started with; the same key gives the same draws.
        seconds: time spent.
        ended: "num_samples" or "interrupted".
        note: an early end in words; empty where there was none.
    """

    def __init__(
        self,
        kernel: Any,
        draws: dict[str, Any],
        last_state: Any,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        *,
        seed: Any = None,
        seconds: float = float("nan"),
        ended: str = "num_samples",
        note: str = "",
        **options: Any,
    ):
        sites = {n.removeprefix("z/"): jnp.asarray(x) for n, x in draws.items() if n.startswith("z/")}
        fields = {n: jnp.asarray(x) for n, x in draws.items() if not n.startswith("z/")}
        steps = options.get("thinning", 1) * next(iter(sites.values())).shape[1]
        super().__init__(kernel, num_samples=steps, **options)
        self._args, self._kwargs = call
        self._states, self._last_state = {"z": sites, **fields}, last_state
        self.seed, self.seconds, self.ended, self.note = seed, seconds, ended, note


class SVIFit(Copied, SVIRunResult):
    """NumPyro's `SVIRunResult` (`params`, `state`, `losses`) with what made it and whether it converged.

    Attributes:
        svi: the `SVI` object, with its `model` and `guide`.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        objective: the meaning of minus the loss: a bound, a surrogate, or a log joint density at a point.
        converged: whether the loss had stopped falling.
        message: the same in words, with the numbers.
        run: where `fit_svi` stopped: the last state, the best one, validation losses, seconds.
        settings: how `fit_svi` trained.
        seed: the random key it was started with.
        ended: why it stopped: "num_steps", "patience", "interrupted", "loss" or "gradient" (these two: not finite).
    """

    svi: SVI
    objective: str = BOUND
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    converged: bool
    message: str
    run: TrainState | None = None
    settings: Settings | None = None
    seed: Any = None
    ended: str = "num_steps"

    @classmethod
    def of(cls, svi: SVI, result: SVIRunResult, *args: Any, **kwargs: Any) -> "SVIFit":
        """A run of NumPyro's own `svi.run(key, num_steps, *args, **kwargs)` as an `SVIFit`."""
        fit = cls(*result)
        fit.svi, fit.args, fit.kwargs = svi, args, kwargs
        fit.objective = objective_of(svi, fit.params, args, kwargs)
        fit.converged, fit.message = convergence(np.asarray(result.losses))
        return fit

    def __reduce__(self) -> Any:
        return _svi_fit, (type(self), dumps((tuple(self), kept(self))))

    @property
    def surrogate(self) -> bool:
        """Whether the objective can exceed the log evidence."""
        return self.objective.startswith("surrogate")

    @property
    def is_bound(self) -> bool:
        """Whether minus the loss is a lower bound on the log evidence (on minibatches: an unbiased estimate of one)."""
        return self.objective.startswith(BOUND)

    @property
    def validation(self) -> np.ndarray:
        """Rows of (steps taken, validation loss), `(count, 2)`; none without held-out arguments."""
        return np.zeros((0, 2)) if self.run is None else self.run.validation


def _svi_fit(kind: type, data: bytes) -> SVIFit:
    """The fit of a pickle."""
    values, state = pickle.loads(data)
    fit = kind(*values)
    restore(fit, state)
    return fit


class TrainingError(FloatingPointError):
    """The loss or a gradient was not finite; `fit` is an `SVIFit` of the last good state, None where there is none."""

    def __init__(self, message: str, fit: SVIFit | None):
        super().__init__(message)
        self.fit = fit


def convergence(losses: np.ndarray) -> tuple[bool, str]:
    """Compares the last tenth of the losses with the second fifth, where the steps were still large.

    Near the end the steps are small, and the loss is flat whether or not it has arrived. Converged: since the second
    fifth the loss fell by less than 0.1 nats, three standard errors of that fall, or 0.3 of the scatter of the loss.
    """
    count = len(losses)
    if count < 10:
        return False, f"{count} steps are too few to tell."
    early, late = losses[count // 5 : 2 * count // 5], losses[-max(count // 10, 2) :]
    fall = float(early.mean() - late.mean())
    scatter = [float(np.mean(np.diff(x) ** 2) / 2) for x in (early, late)]  # by differences: without the trend
    noise = float(np.sqrt(scatter[0] / len(early) + scatter[1] / len(late)))
    return (
        abs(fall) < max(0.1, 3 * noise, 0.3 * np.sqrt(scatter[1])),
        "between the second fifth and the last tenth of the run the loss "
        f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.3g} nats (+- {noise:.2g}).",
    )


@dataclass(frozen=True, eq=False)
class FitRecord(Copied):
    """A fit of any method: all that predictions, diagnostics and files need of it.

    Attributes:
        method: in words: "NUTS", "SVI (AutoNormal)".
        model: the NumPyro model, its learned parameters (`params`) not substituted; `args`, `kwargs`: its arguments.
        sample: `(num_samples, key, args, kwargs) -> draws` by site, with leading axes `(chain, draw)`; a Markov chain
            gives all it has, a guide draws for these arguments.
        objective: the meaning of its numbers: exact, a bound, an estimate, a surrogate.
        ended: why the run ended, "interrupted" where Ctrl-C did; `message`: the same in words.
        warnings: its flaws in words; spoken where the fit is made.
        guide: the guide; None for a Markov chain, which has `stats` of its sampler, `(chain, draw)` by name.
        losses: of each optimisation step.
        seed: the random key that it was started with (the same key gives the same draws); `seconds`: time spent.
        run: where the run is, and `engine`: what can go on with it; None for a run of NumPyro's own.
        labels: of time and series, where the data came as a frame of pandas (`pssm.times.labels.FrameLabels`).
    """

    method: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: Callable[..., dict[str, Any]] = field(repr=False)
    objective: str
    ended: str = ""
    message: str = ""
    warnings: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict, repr=False)
    guide: Any = field(default=None, repr=False)
    stats: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    losses: np.ndarray | None = field(default=None, repr=False)
    seed: Any = field(default=None, repr=False)
    seconds: float = float("nan")
    run: Any = field(default=None, repr=False)
    engine: Any = field(default=None, repr=False)
    labels: Any = field(default=None, repr=False)

    def __reduce__(self) -> Any:
        state = dict(vars(self))
        if isinstance(self.sample, GuideDraws) and self.sample.fit.svi.guide is self.guide:
            state["guide"] = None  # which goes with the fit
        return _record, (type(self), dumps(state))

    def draws(self, num_samples: int = 4000, key: KeyLike = 0) -> dict[str, np.ndarray]:
        """Posterior draws of all sites, as of `posterior_draws`; the same key gives the same draws."""
        found = self.sample(num_samples, as_key(key), self.args, self.kwargs)
        return {name: np.asarray(x) for name, x in found.items()}


def _record(kind: type, data: bytes) -> FitRecord:
    """The record of a pickle."""
    state = pickle.loads(data)
    if isinstance(state["sample"], GuideDraws) and state["guide"] is None:
        state["guide"] = state["sample"].fit.svi.guide
    return kind(**state)


Fit = MCMC | SVIFit | FitRecord


def with_labels(fit: Any, labels: Any) -> Any:
    """The fit with the labels of its data, which `record_of` finds again."""
    if labels is None:
        return fit
    if isinstance(fit, FitRecord):
        return replace(fit, labels=labels)
    fit.labels = labels  # NumPyro's own results have room for an attribute
    return fit


def record_of(fit: Any) -> FitRecord:
    """The record of a fit: from `fit_nuts`, `fit_svi`, another engine, or a run of NumPyro's own `MCMC`.

    Raises:
        TypeError: it is no fit.
        ValueError: an `MCMC` that has not been run.
    """
    if isinstance(fit, FitRecord):
        return fit
    if isinstance(fit, MCMC):
        return _of_mcmc(fit)
    if isinstance(fit, SVIFit):
        return _of_svi(fit)
    hint = " Wrap NumPyro's result of SVI: `SVIFit.of(svi, result, *args)`." if isinstance(fit, SVIRunResult) else ""
    raise TypeError(f"`fit` must come from `fit_nuts`, `fit_svi` or `MCMC.run`; got {type(fit).__name__}.{hint}")


def _of_mcmc(fit: MCMC) -> FitRecord:
    if fit.last_state is None:
        raise ValueError("`fit` has not been run: it has no draws.")
    stats = {n: np.asarray(x) for n, x in fit.get_extra_fields(group_by_chain=True).items()}
    diverging = np.asarray(stats.get("diverging", np.zeros(1, bool)))
    known = {n: getattr(fit, n) for n in ("seed", "seconds", "ended") if isinstance(fit, MCMCFit)}
    warnings = [fit.note] if isinstance(fit, MCMCFit) and fit.note else []
    if diverging.any():
        warnings.append(
            f"{int(diverging.sum())} of {diverging.size} transitions diverged: parts of the posterior may be missing. "
            "Raise `target_accept_prob` (0.95), or integrate the states out."
        )
    method, model, kind, draws = type(fit.sampler).__name__, fit.sampler.model, EXACT, ChainDraws(fit)
    if hasattr(model, "complete"):  # the paths are integrated out, and drawn for whoever asks
        method, kind, draws = f"{method} ({model.approximation})", model.objective, CompletedDraws(fit)
        model = model.plain_model
    return FitRecord(
        method,
        model,
        fit._args,
        fit._kwargs,
        draws,
        kind,
        warnings=tuple(warnings),
        stats=stats,
        labels=getattr(fit, "labels", None),
        **known,
    )


def _of_svi(fit: SVIFit) -> FitRecord:
    return FitRecord(
        f"SVI ({type(fit.svi.guide).__name__})",
        with_all_data(fit)[1],
        fit.args,
        fit.kwargs,
        GuideDraws(fit),
        fit.objective,
        ended=fit.ended,
        message=fit.message,
        warnings=() if fit.converged else (_unconverged(fit),),
        params=fit.params,
        guide=fit.svi.guide,
        losses=np.asarray(fit.losses),
        seed=fit.seed,
        seconds=float("nan") if fit.run is None else fit.run.seconds,
        run=fit.run,
        labels=getattr(fit, "labels", None),
    )


def _unconverged(fit: SVIFit) -> str:
    steps, taken = (len(fit.losses) if fit.settings is None else fit.settings.num_steps), len(fit.losses)
    if fit.ended in ("loss", "gradient"):
        trouble = f"The loss became {fit.run.last_loss}" if fit.ended == "loss" else "The gradient was not finite"
        return (
            f"{trouble} at step {taken} of {steps}. Lower `learning_rate` (now {fit.settings.learning_rate}), "
            "or look at the model's priors with numpyro.infer.Predictive. A transition that explodes can be held by "
            "AmortizedStateSpace's `limit` or by `nets.Saturated`. The error's `.fit` is the fit before it."
        )
    advice = "" if fit.ended == "interrupted" else f" Raise `num_steps` (now {steps})."
    return f"SVI has not converged: {fit.message}{advice}"


def posterior_draws(fit: Fit, *, num_samples: int = 4000, key: KeyLike = 0) -> dict[str, np.ndarray]:
    """Posterior draws of every latent and deterministic site, with leading axes `(chain, draw)`.

    A Markov chain gives all its draws. Draws from a guide are independent and come as one chain; the same `key` gives
    the same draws. Auxiliary sites are left out.
    """
    return record_of(fit).draws(num_samples, key)


def elbo(fit: SVIFit, *, key: KeyLike = 0, num_particles: int = 4000) -> tuple[float, float]:
    """The fitted guide's ELBO, a lower bound on the log evidence, by Monte Carlo: `(value, standard error)`.

    The same `key` gives the same draws, and so the same value. With a plate that takes a part of its data it is that of
    all data; where the model cannot run on all, the average over minibatches, which is unbiased.

    Args:
        fit: from `fit_svi`.
        key: random key, or a whole number.
        num_particles: draws.

    Raises:
        ValueError: the guide has no density: it has a point mass (`AutoDelta`), or is moment-matched.
    """
    check_density(fit)
    guide, model = with_all_data(fit)

    def one(k: jax.Array) -> jax.Array:
        loss = Trace_ELBO().loss(k, fit.params, model, guide, *fit.args, **fit.kwargs)
        return -jnp.asarray(loss)

    keys = jax.random.split(as_key(key), num_particles)
    values = np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=500))(keys))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(num_particles))


def model_of(fit: Fit) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model of a fit and the arguments it was run with."""
    record = record_of(fit)
    return record.model, record.args, record.kwargs
