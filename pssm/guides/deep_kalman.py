"""`DeepKalmanGuide`: the structured posterior of deep Kalman filters, for any model with a state path."""

from collections.abc import Callable
from typing import Any

from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._types import Array
from pssm.guides.encoded import Conditionals
from pssm.guides.paths import PathGuide
from pssm.register import is_trainable


class DeepKalmanGuide(PathGuide):
    """A guide `q(z) = prod_t N(z_t; m(z_{t-1}, h_t), diag s^2(z_{t-1}, h_t))`, `h_t` features of the data from t on.

    As in deep Kalman filters (deep Markov models). A true bound, for any number of trials and minibatches of them. It
    does not use the model's transition: where that is learned, `AmortizedStateSpace` has less to learn.

    Series of different lengths are padded with NaN. After its last step with data a path follows the model's
    transition, which is exact, and with `nets.RecurrentFeatures` the features before are those of the series without
    padding: so padding does not change the bound.

    Args:
        model: a NumPyro model with an unobserved `StatePath` site whose noise is regular.
        encoder: a function `(y, u) -> h (time, size)` of one series, `y` `(time, ...)` with NaN for missing, such as
            `nets.RecurrentFeatures`. Arrays of an Equinox module are parameters. For several paths: a dict by site.
        combiner: a function `(z, h) -> (mean, sd)`, such as `nets.Combiner`; what stands for the state before the first
            is its attribute `start`, or zero. For several paths: a dict by site.
        data: which sites are encoded, as in `AmortizedStateSpace`. Where a site is masked (`numpyro.handlers.mask`),
            the encoder gets NaN.
        lengths: a function of the model's arguments to the number of real steps of each series `(*batch,)`, where
            the padding is not NaN.
        trainable: what of the networks is trained, see `nets.register`.
        global_guide: makes the guide of the other latent sites, from a model.
        prefix: as in NumPyro's guides.
        init_loc_fn: start of the other sites.

    Raises:
        TypeError: `encoder`, `combiner` or `lengths` is no function.
        ValueError: features of another shape.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI
        >>> from pssm import nets
        >>> from pssm.distributions import StatePath, observe
        >>> from pssm.infer import TraceConditionalKL_ELBO
        >>> def model(y, batch_size=None):
        ...     with numpyro.plate("trials", len(y), subsample_size=batch_size) as index:
        ...         z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), 9))
        ...         observe("y", dist.Normal(z, 1.0).to_event(2), y[index])
        >>> one, two, three = jax.random.split(jax.random.key(0), 3)
        >>> encoder = nets.RecurrentFeatures(nets.StepMLP(1, 8, hidden=8, key=one), nets.GRU(8, 8, key=two))
        >>> guide = DeepKalmanGuide(model, encoder=encoder, combiner=nets.Combiner(1, 8, key=three))
        >>> svi = SVI(model, guide, optax.adam(1e-3), TraceConditionalKL_ELBO())
        >>> result = svi.run(jax.random.key(1), 3, jnp.ones((20, 9, 1)), batch_size=5, progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(2), result.params, jnp.zeros((2, 9, 1)))["z"].shape
        (2, 9, 1)

    Source:
        Krishnan, Shalit & Sontag 2017, "Structured inference networks for nonlinear state space models".
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[..., Array] | dict[str, Callable[..., Array]],
        combiner: Callable[..., tuple[Array, Array]] | dict[str, Callable[..., tuple[Array, Array]]],
        data: str | tuple[str, ...] | Callable[..., Array] | None = None,
        lengths: Callable[..., Any] | None = None,
        trainable: Any = is_trainable,
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
    ):
        for name, given in (("encoder", encoder), ("combiner", combiner)):
            for own in given.values() if isinstance(given, dict) else (given,):
                if not callable(own):
                    raise TypeError(f"`{name}` must be a function; got {type(own).__name__}.")
        if lengths is not None and not callable(lengths):
            raise TypeError(f"`lengths` must be a function of the model's arguments; got {type(lengths).__name__}.")
        posterior = Conditionals(encoder, combiner, data, trainable, lengths)
        super().__init__(model, posterior, global_guide=global_guide, prefix=prefix, init_loc_fn=init_loc_fn)
