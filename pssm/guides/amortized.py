"""`AmortizedStateSpace`: the structured posterior with potentials from a network that reads the data."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.autoguide import AutoGuide, AutoNormal

from pssm._checks import as_float, check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.batch import map_batch
from pssm.distributions.unwrap import unwrap
from pssm.guides.encoded import Encoded
from pssm.guides.model_run import ModelRun, PathSite
from pssm.guides.online import OnlineFilter, online_filter
from pssm.guides.paths import PathGuide
from pssm.guides.posteriors import Form
from pssm.nets.encoders import SmoothingEncoder
from pssm.register import is_trainable

OPTIONS = ("masking", "refine", "refine_rank", "limit", "num_samples")


class AmortizedStateSpace(PathGuide):
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

    posterior: Encoded

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
        for own in encoder.values() if isinstance(encoder, dict) else (encoder,):
            if not callable(own):
                raise TypeError(f"`encoder` must be a function (y, u); got {type(own).__name__}.")
        if check_count("refine", refine, least=0) and causal:
            raise ValueError("`refine` uses all data, so it cannot go with `causal=True`.")
        form = Form.of(family, rank, diagonal, num_samples)
        posterior = Encoded(form, encoder, causal, refine, refine_rank, limit, data, masking, trainable)
        for own in encoder.values() if isinstance(encoder, dict) else (encoder,):
            if causal and getattr(own, "causal", True) is False and not posterior.is_published_causal(own):
                raise ValueError("`causal` is True, but `encoder` sees the future (its `causal` is False).")
        super().__init__(model, posterior, global_guide=global_guide, prefix=prefix, init_loc_fn=init_loc_fn)

    def replace(self, **options: Any) -> "AmortizedStateSpace":
        """This guide with other values of `masking`, `refine`, `limit` and so on, and the same parameters."""
        for name in options:
            if name not in OPTIONS:
                raise ValueError(f"`replace` changes {', '.join(OPTIONS)}; got {name!r}.")
        if "num_samples" in options:
            options["form"] = replace(self.posterior.form, num_samples=options.pop("num_samples"))
        return self.with_posterior(replace(self.posterior, **options))

    def exploded(
        self, rng_key: KeyLike, params: dict[str, Array], *args: Any, num_samples: int = 20, **kwargs: Any
    ) -> float:
        """Share of drawn paths that are not finite, or whose transition reached the `limit` somewhere."""
        rng_key = as_key(rng_key, "rng_key")
        guide, limit = self.evaluated(), self.posterior.limit
        limit = jnp.inf if limit is None else as_float("limit", limit)

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
        posterior, form = self.posterior, self.posterior.form
        if not posterior.causal:
            raise ValueError("`causal=True` is needed to filter online: this guide's potentials know the future.")
        with handlers.block(), handlers.seed(rng_seed=jax.random.key(0)), handlers.substitute(data=params):
            plates = self.plates(args, kwargs)
            if len(self._paths) > 1:
                raise ValueError(f"`model` must have one path to filter online; it has {', '.join(self._paths)}.")
            (name,) = self._paths
            given = dict(values or {})
            if self._others is not None and not given:
                given = self._others.median(params, args, kwargs)
            run = ModelRun(self.model, args, kwargs, {n: p._indices for n, p in plates.items()})
            given = {**run.expose_params(given), **given}
            prior = run.path_prior(name, given)
            site = PathSite(name, self.prefix, run, given, prior, prior.shape())
            encode, rank = site.network("encoder", posterior.encoder, posterior.trainable), form.rank
        if isinstance(encode, SmoothingEncoder):  # the published causal form filters with the local part
            encode = encode.local
            rank = encode.head.rank
        return online_filter(encode, posterior.limited(prior), form.family, rank, form.diagonal, form.num_samples)
