"""What a fit is: the result objects, their convergence in words, and draws from them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIRunResult

from pssm._keys import as_key
from pssm._types import Key
from pssm.guides.paths import BOUND

if TYPE_CHECKING:
    from pssm.fitting.train import Settings, TrainState


class SVIFit(SVIRunResult):
    """NumPyro's `SVIRunResult` (`params`, `state`, `losses`) with what made it and whether it converged.

    Attributes:
        svi: the `SVI` object, with its `model` and `guide`.
        args: the model's positional arguments.
        kwargs: the model's keyword arguments.
        objective: what minus the loss is, in words: a bound or a surrogate.
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
    run: "TrainState | None" = None
    settings: "Settings | None" = None
    seed: Any = None
    ended: str = "num_steps"

    @classmethod
    def of(cls, svi: SVI, result: SVIRunResult, *args: Any, **kwargs: Any) -> "SVIFit":
        """A run of NumPyro's own `svi.run(key, num_steps, *args, **kwargs)` as an `SVIFit`."""
        fit = cls(*result)
        fit.svi, fit.args, fit.kwargs = svi, args, kwargs
        fit.objective = getattr(svi.guide, "objective", BOUND)
        fit.converged, fit.message = _convergence(np.asarray(result.losses))
        return fit

    @property
    def surrogate(self) -> bool:
        """Whether the objective can exceed the log evidence."""
        return self.objective.startswith("surrogate")

    @property
    def validation(self) -> np.ndarray:
        """Rows of (steps taken, validation loss), `(count, 2)`; none without held-out arguments."""
        return np.zeros((0, 2)) if self.run is None else self.run.validation


class TrainingError(FloatingPointError):
    """The loss or a gradient was not finite; `fit` is an `SVIFit` of the last good state, None where there is none."""

    def __init__(self, message: str, fit: SVIFit | None):
        super().__init__(message)
        self.fit = fit


def _convergence(losses: np.ndarray) -> tuple[bool, str]:
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
        f"between the second fifth and the last tenth of the run the loss fell by {fall:.3g} nats (+- {noise:.2g}).",
    )


def elbo(fit: SVIFit, *, key: Key | int = 0, num_particles: int = 4000) -> tuple[float, float]:
    """The fitted guide's ELBO, a lower bound on the log evidence, by Monte Carlo: `(value, standard error)`."""
    params = fit.svi.get_params(fit.state)

    def one(k: jax.Array) -> jax.Array:
        loss = Trace_ELBO().loss(k, params, fit.svi.model, fit.svi.guide, *fit.args, **fit.kwargs)
        return -jnp.asarray(loss)

    keys = jax.random.split(as_key(key), num_particles)
    values = np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=500))(keys))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(num_particles))


def model_of(fit: MCMC | SVIFit) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The model of a fit and the arguments it was run with."""
    if isinstance(fit, MCMC):
        return fit.sampler.model, fit._args, fit._kwargs
    if isinstance(fit, SVIFit):
        return fit.svi.model, fit.args, fit.kwargs
    raise TypeError(f"`fit` must come from `fit_nuts`, `fit_svi` or `MCMC.run`; got {type(fit).__name__}.")


def posterior_draws(fit: MCMC | SVIFit, *, num_samples: int = 4000, key: Key | int = 0) -> dict[str, np.ndarray]:
    """Posterior draws of every latent and deterministic site, with leading axes `(chain, draw)`.

    Draws of an SVI fit are independent and come as one chain. Auxiliary sites are left out.
    """
    if isinstance(fit, MCMC):
        return {name: np.asarray(x) for name, x in fit.get_samples(group_by_chain=True).items()}
    model, args, kwargs = model_of(fit)
    params = fit.svi.get_params(fit.state)
    draw_key, site_key = jax.random.split(as_key(key))
    guide = fit.svi.guide
    if isinstance(guide, AutoGuide):
        latents = guide.sample_posterior(draw_key, params, *args, sample_shape=(num_samples,), **kwargs)
    else:
        latents = numpyro.infer.Predictive(guide, params=params, num_samples=num_samples)(draw_key, *args, **kwargs)

    def deterministic(sample: dict[str, jax.Array]) -> dict[str, jax.Array]:
        trace = trace_with(model, sample, *args, **kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

    extra = jax.lax.map(deterministic, latents, batch_size=500)
    return {name: np.asarray(x)[None] for name, x in {**latents, **extra}.items()}


def trace_with(model: Callable[..., Any], values: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The model's trace with latent sites set to `values`."""
    seeded = numpyro.handlers.seed(numpyro.handlers.substitute(model, data=values), jax.random.key(0))
    return numpyro.handlers.trace(seeded).get_trace(*args, **kwargs)


def flatten_draws(draws: dict[str, Any]) -> dict[str, jax.Array]:
    """Merges the `(chain, draw)` axes."""
    return {name: jnp.asarray(x).reshape(-1, *jnp.shape(x)[2:]) for name, x in draws.items()}
