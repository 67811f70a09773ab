"""`AmortizedFrames`: the guide of the Kalman autoencoders, a code from each frame and states by the Kalman filter."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.tree_util import Partial
from numpyro.distributions import constraints

from pssm._checks import also_called, check_choice
from pssm._types import Array
from pssm.distributions import HistoryMarginal, ImputedSeries, LinearGaussianPosterior, StatePath
from pssm.distributions.unwrap import unwrap
from pssm.filters.along import along_filter
from pssm.guides.drawn import DrawnGuide
from pssm.guides.model_run import ModelRun
from pssm.guides.plates import plates_of, structure
from pssm.linalg import Diagonal
from pssm.register import is_trainable, register

LINEARIZATIONS = ("local", "jacobian")


class AmortizedFrames(DrawnGuide):
    """Guide of `models.kalman_vae` and `models.extended_kalman_vae`, or of models with the same latent sites.

        q(a, z) = prod_t q(a_t | y_t)  q(z_{1:T} | a_{1:T})

    An encoder gives the code of each frame. The states of `extended_kalman_vae` then follow by an extended Kalman
    filter of the codes and its smoother, as one joint distribution (`LinearGaussianPosterior`): with linear dynamics it
    is exact. Those of `kalman_vae` are integrated out in the model. A frame that is missing altogether (all of it NaN)
    has no code of its own: it is drawn from what the codes of the others say through the (linearised) dynamics
    (`ImputedSeries`), exactly with linear dynamics. The ELBO is a lower bound in every case. Use `Trace_ELBO`: codes
    and states depend on each other, so there is no divergence in closed form.

    Args:
        model: the NumPyro model: a site `a` of codes, and either its states integrated out in a `HistoryMarginal`, or a
            `StatePath` site `z` whose first entries are the means of the codes; perhaps `zeta`, of which `z_1` depends.
        encoder: a function of one frame `(obs,)`, NaN where missing, to location and scale of its code, such as
            `nets.FrameEncoder`. Arrays of an Equinox module are the parameters `{prefix}_encoder$params`.
        gaps: False if no frame is ever missing altogether, which saves time; not checked.
        linearization: of a locally linear transition: "local", its matrices at the filtered mean; or "jacobian", its
            derivative, for any transition. The joint distribution is of the same kind, and the ELBO a bound. A second
            name for it is `linearize`.
        trainable: what of the encoder is trained, see `nets.register`.
        prefix: of the parameters' names.

    Raises:
        ValueError, TypeError: the model has other latent sites, or a transition to be taken "local" has no `affine`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from pssm import models, nets
        >>> one, two = jax.random.split(jax.random.key(0))
        >>> encoder = nets.FrameEncoder(nets.StepMLP(9, 16, hidden=16, key=one), 2, key=two)
        >>> guide = AmortizedFrames(models.extended_kalman_vae, encoder=encoder)
        >>> frames = jnp.zeros((20, 7, 9)).at[:, 3].set(jnp.nan)  # (trial, time, pixel), one frame missing
        >>> svi = SVI(models.extended_kalman_vae, guide, optax.adam(1e-3), Trace_ELBO())
        >>> result = svi.run(jax.random.key(1), 2, frames, batch_size=5, progress_bar=False)
        >>> draws = guide.sample_posterior(jax.random.key(2), result.params, frames, sample_shape=(3,))
        >>> draws["z"].shape, draws["a"].shape
        ((3, 20, 7, 4), (3, 20, 7, 2))

    Source:
        Fraccaro, Kamronn, Paquet & Winther 2017; Klushyn, Kurle, Soelch, Cseke & van der Smagt 2021.
    """

    _series = "a"

    @also_called(linearize="linearization")
    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[[Array], tuple[Array, Array]],
        gaps: bool = True,
        linearization: str = "local",
        trainable: Any = is_trainable,
        prefix: str = "auto",
    ):
        check_choice("linearization", linearization, LINEARIZATIONS)
        if not callable(encoder):
            raise TypeError(f"`encoder` must be a function of a frame; got {type(encoder).__name__}.")
        super().__init__(model, prefix=prefix)
        self.encoder, self.gaps, self.linearization, self.trainable = encoder, gaps, linearization, trainable

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Runs the guide; returns a value for every latent site."""
        sites = structure(self.model, args, kwargs)
        self._check_data(sites)
        latent = [n for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]]
        if "a" not in latent or set(latent) - {"a", "z", "zeta"}:
            raise ValueError(
                "`model` must have the latent sites `a` (codes) and perhaps `z` (states) and `zeta`, and no others; it "
                f"has {', '.join(latent) or 'none'}. Make other unknowns parameters (`numpyro.param`)."
            )
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        with ExitStack() as stack:
            plates = plates_of(sites, ["a"])
            run = ModelRun(self.model, args, kwargs, {name: p._indices for name, p in plates.items()})
            values = run.expose_params({})
            for frame in sites["a"]["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
            return self._sample(run, values)

    def _sample(self, run: ModelRun, values: dict[str, Array]) -> dict[str, Array]:
        trace = run.trace(values)
        y, _ = run.data("a", values)
        encode = register(f"{self.prefix}_encoder", self.encoder, trainable=self.trainable)
        location, scale = jax.vmap(encode)(y.reshape(-1, y.shape[-1]))
        size = trace["a"]["fn"].event_shape[-1]
        if location.shape[-1:] != (size,):
            raise ValueError(f"`encoder` must give a location of shape ({size},); got {location.shape[1:]}.")
        location, scale = (x.reshape(*y.shape[:-1], size) for x in (location, scale))
        seen = ~jnp.isnan(y).all(-1)
        codes = unwrap(trace["a"]["fn"])[0]
        if isinstance(codes, HistoryMarginal):
            return {"a": self._codes(location, scale, seen, Partial(HistoryMarginal.system, codes), codes.u)}
        path, sigma = unwrap(trace["z"]["fn"])[0], codes.scale
        if "zeta" in trace:
            path = self._with_own_start(path)
        if self.linearization == "local" and not hasattr(path.transition, "affine"):
            raise TypeError(
                '`linearization` must be "jacobian": the transition has no method `affine`, as '
                "`nets.LocallyLinearTransition` has."
            )
        sigma = sigma.reshape(-1, size)[0]
        system = Partial(partial(along_filter, linearization=self.linearization), path, sigma)
        found = {"a": self._codes(location, scale, seen, system)}
        series = jnp.where(seen[..., None], found["a"], jnp.nan) if self.gaps else found["a"]
        found["z"] = numpyro.sample("z", LinearGaussianPosterior(system(series), found["a"]))
        if "zeta" in trace:
            found["zeta"] = self._zeta(found["z"][..., 0, :])
        return found

    def _codes(self, location: Array, scale: Array, seen: Array, system: Any, u: Array | None = None) -> Array:
        if self.gaps:
            return numpyro.sample("a", ImputedSeries(location, scale, seen, system, u))
        return numpyro.sample("a", dist.Normal(location, scale).to_event(2))

    def _with_own_start(self, path: StatePath) -> StatePath:
        """The path with a first state of the guide's, for the filter: the model's depends on `zeta`."""
        zero = jnp.zeros(path.n_state)
        mean = numpyro.param(f"{self.prefix}_start_mean", zero)
        scale = numpyro.param(f"{self.prefix}_start_scale", zero + 1.0, constraint=constraints.positive)
        return StatePath(mean, Diagonal(scale), path.transition, path.chol_Q, path.num_steps, path.u)

    def _zeta(self, z: Array) -> Array:
        """`q(zeta | z_1)`, a perceptron."""
        n = z.shape[-1]
        net = eqx.nn.MLP(n, 2 * n, 64, 1, activation=jnp.tanh, key=jax.random.key(3))
        net = register(f"{self.prefix}_zeta", net)
        mean, scale = jnp.split(jax.vmap(net)(z.reshape(-1, n)).reshape(*z.shape[:-1], -1), 2, axis=-1)
        return numpyro.sample("zeta", dist.Normal(mean, jax.nn.softplus(scale)).to_event(1))
