"""`AmortizedStateSpace`: the structured posterior with potentials from a network that reads the data."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import as_float, check_count
from pssm._types import Array, ArrayLike, Key
from pssm.batch import map_batch
from pssm.distributions import LowRankChain, LowRankMomentMatched, StatePath
from pssm.guides.encoded import EncodedGuide
from pssm.guides.model_run import ModelRun, unwrap
from pssm.guides.online import Clipped, OnlineFilter, online_filter
from pssm.guides.paths import PathGuide
from pssm.modes.mode import noise_scale
from pssm.nets.encoders import SmoothingEncoder
from pssm.nets.potentials import as_pseudo_observation
from pssm.register import is_trainable

OPTIONS = ("masking", "refine", "refine_rank", "limit", "num_samples")


class AmortizedStateSpace(EncodedGuide):
    """A guide like `AutoStateSpace` whose potentials an encoder makes from the data, for any number of trials.

    The encoder is trained with the bound, on all trials or on minibatches of them (`plate(subsample_size)`). A trial
    that was not trained on then takes one forward pass: call `sample_posterior`, or the ELBO, with its data. The other
    latent sites get an ordinary guide. What is a bound and what is not: as for `AutoStateSpace`.

    The data are found in the model's own trace: its observed sites of shape `(*batch, time, ...)`, where `batch` is
    that of the path; with subsampling these are the minibatch. Inputs are those of the `StatePath`.

    Args:
        model: a NumPyro model with an unobserved `StatePath` site.
        encoder: a function `(y, u) -> potentials` of one series, `y` `(time, ...)` with NaN for missing and `u`
            `(time, input)` or None. See `pssm.nets`; any callable will do. Potentials: a `nets.PseudoObservation`, a
            tuple `(k, K, diag)`, or numbers that `nets.potentials.split_numbers` takes apart. Arrays of an Equinox
            module are the parameters `{site}_{prefix}_encoder$params`. For several paths: a dict by site.
        rank: columns of the low-rank factors that the encoder gives.
        family: "chain", "moment_matched" (no diagonal) or "diagonal" (rank 0). With `causal`, "moment_matched" and a
            `nets.SmoothingEncoder` the published causal form: the local part filters, the backward part smooths.
        causal: the encoder knows the past only: each step's potential depends on the data up to it, so a path's row t
            is drawn given those, and `online` runs the same step by step.
        diagonal: whether the potentials have a diagonal. Not for "moment_matched".
        refine: rounds of Gauss-Newton from the encoder's central path, whose potentials then stand in for the
            encoder's. The bound is one all the same, with `refine_rank` = size of the state close to that of
            `AutoStateSpace(potentials="mode")`, at the cost of as many linearised smoothers a call. No gradient reaches
            the encoder through it: train with 0, then use `guide.replace(refine=1)`. Not causal.
        refine_rank: columns of the refined potentials; by default `rank`.
        limit: a bound on the size of the transition's image in the guide's own draws, a number or `(state,)`, for
            transitions that can explode (a cubic drift leaves float32 in a few steps). The model stays as it is, and
            the objective a bound: inside of the limit nothing changes, outside draws get their low density. For
            nonlinear transitions.
        data: the observed site that is encoded, or a tuple of several, put side by side; or a function of the model's
            arguments that returns the data of all trials. By default all sites of the right shape.
        masking: hides data from the encoder in training, a function `(key, y) -> y` of one series, such as
            `nets.hide_steps(0.2)`. `sample_posterior` and `online` do without.
        trainable: what of the encoder is trained, see `nets.register`.
        global_guide: makes the guide of the other latent sites, from a model.
        num_samples: particles inside "moment_matched", and of `online`.
        prefix: as in NumPyro's guides.
        init_loc_fn: start of the other sites.

    Raises:
        ValueError, TypeError: an unknown family, an encoder that is not causal where it has to be, or potentials of
            another shape.

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
        >>> encoder = nets.sequence_encoder(n_obs=1, n_state=1, rank=1, size=8, key=jax.random.key(0))
        >>> guide = AmortizedStateSpace(model, encoder=encoder, rank=1)
        >>> svi = SVI(model, guide, optax.adam(1e-3), TraceConditionalKL_ELBO())
        >>> result = svi.run(jax.random.key(1), 3, jnp.ones((20, 9, 1)), batch_size=5, progress_bar=False)
        >>> new = jnp.zeros((2, 9, 1))
        >>> guide.sample_posterior(jax.random.key(2), result.params, new, sample_shape=(3,))["z"].shape
        (3, 2, 9, 1)

    Source:
        The potentials: Dowling, Zhao & Park 2024. Semi-amortised: Kim, Wiseman, Miller, Sontag & Rush 2018.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        encoder: Callable[..., Any] | dict[str, Callable[..., Any]],
        rank: int,
        family: str = "chain",
        causal: bool = False,
        diagonal: bool = True,
        refine: int = 0,
        refine_rank: int | None = None,
        limit: ArrayLike | None = None,
        data: str | tuple[str, ...] | Callable[..., Array] | None = None,
        masking: Callable[[Key, Array], Array] | None = None,
        trainable: Any = is_trainable,
        global_guide: Callable[..., AutoGuide] = AutoNormal,
        num_samples: int = 25,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] | None = None,
    ):
        super().__init__(
            model,
            rank=rank,
            diagonal=diagonal,
            family=family,
            global_guide=global_guide,
            num_samples=num_samples,
            prefix=prefix,
            init_loc_fn=init_loc_fn,
        )
        self.causal, self.data, self.masking, self.trainable = causal, data, masking, trainable
        self.refine, self.refine_rank = check_count("refine", refine, least=0), refine_rank
        self.limit = limit
        self.encoder = encoder
        for own in encoder.values() if isinstance(encoder, dict) else (encoder,):
            if not callable(own):
                raise TypeError(f"`encoder` must be a function (y, u); got {type(own).__name__}.")
            if causal and getattr(own, "causal", True) is False and not self._published_causal(own):
                raise ValueError("`causal` is True, but `encoder` sees the future (its `causal` is False).")
        if causal and refine:
            raise ValueError("`refine` uses all data, so it cannot go with `causal=True`.")

    def replace(self, **options: Any) -> "AmortizedStateSpace":
        """This guide with other values of `masking`, `refine`, `limit` and so on, and the same parameters."""
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"`replace` changes {', '.join(OPTIONS)}; got {name!r}.")
        guide = copy.copy(self)
        for name, value in options.items():
            setattr(guide, name, value)
        return guide

    def sample_posterior(
        self, rng_key: Key, params: dict[str, Array], *args: Any, sample_shape: tuple[int, ...] = (), **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of every latent site, for the trials in `args`, trained on or not; see `AutoStateSpace`."""
        guide = self if self.masking is None else self.replace(masking=None)
        return PathGuide.sample_posterior(guide, rng_key, params, *args, sample_shape=sample_shape, **kwargs)

    def exploded(
        self, rng_key: Key, params: dict[str, Array], *args: Any, num_samples: int = 20, **kwargs: Any
    ) -> float:
        """Share of drawn paths that are not finite, or whose transition reached the `limit` somewhere."""
        guide = self if self.masking is None else self.replace(masking=None)

        def one(key: Key) -> Array:
            with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
                with handlers.trace() as trace:
                    guide(*args, **kwargs)
            bad = []
            for name in self._paths:
                z, prior = trace[name]["value"], unwrap(trace[name]["fn"])[0].prior
                arrays, cores = prior.arrays()
                xs, own = {**arrays, "z": z}, {**cores, "z": 2}
                mean = map_batch(lambda a, p=prior: p.means(a, a["z"]), z.shape[:-2], xs, own)
                limit = jnp.inf if self.limit is None else as_float("limit", self.limit)
                ok = jnp.isfinite(z).all((-2, -1)) & (jnp.abs(mean) < limit).all((-2, -1))
                bad.append(1.0 - ok.mean())
            return jnp.max(jnp.stack(bad))

        return float(jax.jit(jax.vmap(one))(jax.random.split(rng_key, num_samples)).mean())

    def online(
        self, params: dict[str, Array], *args: Any, values: dict[str, Array] | None = None, **kwargs: Any
    ) -> OnlineFilter:
        """The filter that takes one observation at a time; its steps are those of the batch, draw by draw.

        Args:
            params: from `SVI.get_params`.
            args: arguments of the model, for its shapes; no value of the data is used.
            values: the other latent sites; by default their medians under the guide.
            kwargs: keyword arguments of the model.

        Returns:
            An `OnlineFilter` with `start` and `step`.

        Raises:
            ValueError: the guide is not causal, or the model's path is not the same at every step.
        """
        if not self.causal:
            raise ValueError("`causal=True` is needed to filter online: this guide's potentials know the future.")
        with handlers.block(), handlers.seed(rng_seed=jax.random.key(0)), handlers.substitute(data=params):
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            if len(self._paths) > 1:
                raise ValueError(f"`model` must have one path to filter online; it has {', '.join(self._paths)}.")
            (name,) = self._paths
            given = dict(values or {})
            if self._globals is not None and not given:
                given = dict(self._globals.median(params))
            plates = self._create_plates(*args, **kwargs)
            run = ModelRun(self.model, args, kwargs, {n: p._indices for n, p in plates.items()})
            given = {**run.expose_params(given), **given}
            prior = self._limited(run.path_prior(name, given))
            encode = self._network(name, "encoder", self.encoder)
        rank = self.rank
        if isinstance(encode, SmoothingEncoder):  # the published causal form filters with the local part
            encode = encode.local
            rank = encode.head.rank
        return online_filter(encode, prior, self.family, rank, self.diagonal, self.num_samples)

    # -----------------------------------------------------------------------------------------------------------------

    def _potentials(self, name: str, run: ModelRun, values: dict[str, Array], prior: StatePath) -> dict[str, Array]:
        encode = self._network(name, "encoder", self.encoder)
        arrays, cores, batch = self._data(name, run, values, prior)
        arrays["sd"], cores["sd"] = noise_units(prior), 2
        key = numpyro.prng_key() if self.masking is not None else None
        if key is not None:
            arrays["key"], cores["key"] = jax.random.split(key, batch) if batch else key, jnp.ndim(key)

        def one(a: dict[str, Any]) -> dict[str, Array]:
            seen = self.masking(a["key"], a["y"]) if "key" in a and self.masking is not None else a["y"]
            found = encode(seen, a.get("u"))
            if self._published_causal(encode):
                alpha, beta = (as_pseudo_observation(p, a["sd"], p.K.shape[-1], False).arguments() for p in found)
                slope = beta["k"] + jnp.einsum("tnr,tr->tn", beta["K"], beta["b"]) if "b" in beta else beta["k"]
                return {**alpha, "k_back": slope, "K_back": beta["K"]}
            return as_pseudo_observation(found, a["sd"], self.rank, self.diagonal).arguments()

        found = map_batch(one, batch, arrays, cores)
        if not self.refine:
            return found
        chain = LowRankChain(self._limited(prior), found["k"], found["K"], **_rest(found, "diag", "center", "b"))
        start = jax.lax.stop_gradient(chain.central_path())
        return self._at_mode(name, run, values, start, self.refine - 1, self.refine_rank)._asdict()

    def _posterior(self, prior: StatePath, given: dict[str, Array]) -> LowRankChain | LowRankMomentMatched:
        prior = self._limited(prior)
        if "K_back" not in given:
            return super()._posterior(prior, given)
        back, key = (given["k_back"], given["K_back"]), numpyro.prng_key()
        options = _rest(given, "center", "b")
        return LowRankMomentMatched(prior, given["k"], given["K"], key, self.num_samples, backward=back, **options)

    def _published_causal(self, encode: Any) -> bool:
        return self.causal and self.family == "moment_matched" and isinstance(encode, SmoothingEncoder)

    def _limited(self, prior: StatePath) -> StatePath:
        if self.limit is None or prior.is_linear:
            return prior
        transition = Clipped(prior.transition, as_float("limit", self.limit).astype(prior.m0.dtype))
        return StatePath(
            prior.m0,
            prior.chol_P0,
            transition,
            prior.chol_Q,
            prior.num_steps,
            prior.u,
            time_varying=prior.time_varying,
        )


def _rest(given: dict[str, Array], *names: str) -> dict[str, Array]:
    return {name: given[name] for name in names if name in given}


def noise_units(prior: StatePath) -> Array:
    """Units of relative potentials `(..., time, state)`: the transition noise's scale, at the first step the second's.

    An encoder need not know which step is the first.
    """
    sd = jax.lax.stop_gradient(noise_scale(prior))
    return sd if prior.num_steps == 1 else jnp.concatenate([sd[..., 1:2, :], sd[..., 1:, :]], axis=-2)
