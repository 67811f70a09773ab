"""A model with its paths of states integrated out, approximately: samplers see the parameters only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import handlers

from pssm._checks import check_choice, check_count
from pssm._types import Array, Key
from pssm.distributions import LowRankChain, StatePath
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.guides.model_run import ModelRun
from pssm.guides.plates import apart
from pssm.infer.path_groups import Group, Layout, Series, Stacked, check_series, layout_of, stack
from pssm.infer.reference import Moments, Reference, find_reference, fingerprint, is_known
from pssm.linalg.potential import Potential
from pssm.linalg.random import standard_normal
from pssm.modes.bound import covariances_at, fit_bound
from pssm.modes.marginal import Mode, estimate, expand, find_mode, potential_of
from pssm.modes.newton import LogLik
from pssm.modes.variational import variational_fit

APPROXIMATIONS = ("variational", "laplace", "importance")
WORDS = {
    "laplace": "Laplace's approximation of the paths",
    "variational": "a variational bound over the paths",
    "importance": "an estimate by draws of the paths",
}


class PathPosterior(NamedTuple):
    """The paths given the other latent sites.

    Attributes:
        log_value: the approximation of `log p(data | values)`, `()`; minus infinity where the search has failed.
        chains: the posterior of each path, by name; paths that a site joins are one, called by their names with ", "
            between, whose states are side by side.
        log_joint: `log p(paths, data | values)` of a dict of paths, by the names of the model or of `chains`.
        split: from a dict of paths by the names of `chains` to one by the names of the model.
        converged: whether the search has, `()`.
        series: of each of `chains`, what the parts of `log_value` are.
    """

    log_value: Array
    chains: dict[str, LowRankChain]
    log_joint: Callable[[dict[str, Array]], Array]
    split: Callable[[dict[str, Array]], dict[str, Array]]
    converged: Array
    series: dict[str, Series]


class _Found(NamedTuple):
    """Of one group: the joint path, its posterior, the sum of the values of all series, and which have converged."""

    stacked: Stacked
    centre: Array
    cov: Array | None
    potential: Potential
    total: Array
    converged: Array
    series: Series

    @property
    def chain(self) -> LowRankChain:
        """The posterior of the joint path."""
        return LowRankChain.from_potential(self.stacked.prior, self.potential)


class PathMarginal:
    """The model of `path_marginal`.

    Attributes:
        model: the model with its paths.
        approximation: how the integral is approximated.
        objective: the same in words.
        reference: where the searches begin, a `Reference`; None before there are data.
    """

    def __init__(
        self, model: Callable[..., Any], approximation: str, num_iters: int, num_samples: int, max_search: int
    ):
        self.model = self.plain_model = self.__wrapped__ = model
        self.approximation, self.num_iters = approximation, num_iters
        self.num_samples, self.max_search = num_samples, max_search
        self.reference: Reference | None = None
        self._busy = self._light = False

    @property
    def objective(self) -> str:
        """What its draws are, in words."""
        return f"approximate posterior (Markov chain, {WORDS[self.approximation]})"

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Declares the model's sites but the paths and what depends on them, and one factor for these."""
        if self._stale(args, kwargs):
            self.prepare(*args, **kwargs)
        layout = layout_of(self.model, args, kwargs)
        latent = [n for n in layout.sites if n in layout.latent]
        hidden = [*layout.paths, *layout.deterministic, *(n for n in layout.sites if n not in latent)]
        still = handlers.substitute(self.model, substitute_fn=lambda site: self._start(site, layout))
        declared = handlers.trace(handlers.block(still, hide=hidden)).get_trace(*args, **kwargs)
        values = {n: s["value"] for n, s in declared.items() if s["type"] == "param" or n in layout.latent}
        indices = {n: s["value"] for n, s in declared.items() if s["type"] == "plate"}
        if self._light:
            return

        @jax.jit  # a call with numbers is compiled as a whole
        def integrals(values: dict[str, Array]) -> list[Array]:
            return [self._integrate(args, kwargs, indices, values, layout, g).total for g in layout.groups]

        for group, total in zip(layout.groups, integrals(values), strict=True):
            for name in (n for n in group.sites if n in latent):  # declared above, with another path
                total = total - site_log_prob(declared[name])
            numpyro.factor(f"{group.paths[0]}_marginal", total)

    def prepare(self, *args: Any, **kwargs: Any) -> "PathMarginal":
        """Finds for these arguments where the searches begin; a call with data does it by itself.

        Twice the parameters are moved to the maximum of the approximate posterior, and the moments of the paths there
        are kept. All later searches begin at these, whatever came before, so that the density is a function of the
        parameters alone and a sampler's steps can be reversed.

        Args:
            args: the model's positional arguments, such as the data.
            kwargs: its keyword arguments.

        Returns:
            Itself.
        """
        with apart(), jax.ensure_compile_time_eval():
            self.reference = find_reference(self, args, kwargs)
        return self

    @contextmanager
    def beginning(self, moments: Moments | None, *, parameters_only: bool = False) -> Iterator[None]:
        """For a preparation: searches begin at these moments of the paths; or the paths are left out."""
        before = self.reference, self._busy, self._light
        self.reference = None if moments is None else Reference("", {}, *moments)
        self._busy, self._light = True, parameters_only
        try:
            yield
        finally:
            self.reference, self._busy, self._light = before

    def posterior(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> PathPosterior:
        """The paths given values of all other latent sites.

        Args:
            values: by site, as a user knows them (not unconstrained).
            args: the model's positional arguments.
            kwargs: its keyword arguments.

        Returns:
            A `PathPosterior`.
        """
        if self._stale(args, kwargs):
            self.prepare(*args, **kwargs)
        layout = layout_of(self.model, args, kwargs)
        values = {n: jnp.asarray(x) for n, x in values.items() if n not in layout.paths}
        run = ModelRun(self.model, args, kwargs, {})
        found = {g: self._integrate(args, kwargs, {}, values, layout, g) for g in layout.groups}
        counted = {*layout.observed, *layout.sites, *layout.paths}

        def split(paths: dict[str, Array]) -> dict[str, Array]:
            single = {n: x for n, x in paths.items() if n in layout.paths}
            for group, parts in found.items():
                if group.name in paths:
                    single |= dict(zip(group.paths, parts.stacked.split(paths[group.name]), strict=True))
            return single

        def log_joint(paths: dict[str, Array]) -> Array:
            trace = run.trace({**values, **split(paths)})
            return jnp.sum(jnp.stack([site_log_prob(s) for n, s in trace.items() if n in counted]))

        trace = run.trace({**values, **{n: self._path(s, layout) for n, s in self._paths(run, values, layout).items()}})
        rest = [site_log_prob(trace[n]) for n in layout.observed]
        total = jnp.sum(jnp.stack([*rest, *(parts.total for parts in found.values())]))
        chains = {group.name: parts.chain for group, parts in found.items()}
        converged = jnp.all(jnp.stack([jnp.all(parts.converged) for parts in found.values()]))
        series = {group.name: parts.series for group, parts in found.items()}
        return PathPosterior(total, chains, log_joint, split, converged, series)

    def moments(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        """Centres of the paths given the other latent sites; covariances, where they are known, of the joint paths.

        Both are NaN where the search has failed.
        """
        layout = layout_of(self.model, args, kwargs)
        values = {n: jnp.asarray(x) for n, x in values.items() if n in layout.latent}
        paths, covs = {}, {}
        for group in layout.groups:
            found = self._integrate(args, kwargs, {}, values, layout, group)
            centre = jnp.where(found.converged[..., None, None], found.centre, jnp.nan)
            paths |= dict(zip(group.paths, found.stacked.split(centre), strict=True))
            if found.cov is not None:
                covs[group.name] = found.cov
        return paths, covs

    def complete(self, draws: dict[str, Any], key: Key, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Draws of the other sites `(chain, draw, ...)` with a path for each, and what the model computes from it."""
        if self._stale(args, kwargs):
            self.prepare(*args, **kwargs)
        layout = layout_of(self.model, args, kwargs)
        lead = np.shape(next(iter(draws.values())))[:2] if draws else (1, 1)
        flat = {n: jnp.asarray(x).reshape(-1, *np.shape(x)[2:]) for n, x in draws.items()}
        count = lead[0] * lead[1]

        def one(row: tuple[dict[str, Array], Key]) -> dict[str, Array]:
            values, key = row
            found = self.posterior({n: x for n, x in values.items() if n in layout.latent}, *args, **kwargs)
            keys = jax.random.split(key, len(found.chains))
            paths = found.split({n: q.sample(k) for k, (n, q) in zip(keys, found.chains.items(), strict=True)})
            trace = ModelRun(self.model, args, kwargs, {}).trace({**values, **paths})
            return paths | {n: trace[n]["value"] for n in layout.deterministic}

        rows = flat, jax.random.split(key, count)
        found = jax.jit(lambda rows: jax.lax.map(one, rows, batch_size=min(50, count)))(rows)
        return {**draws, **{n: x.reshape(*lead, *x.shape[1:]) for n, x in found.items()}}

    # -----------------------------------------------------------------------------------------------------------------

    def _stale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the stored start is for other data than these; data that are traced cannot be told."""
        if self._busy or not is_known((args, kwargs)):
            return False
        return self.reference is None or self.reference.data != fingerprint((args, kwargs))

    def _start(self, site: dict[str, Any], layout: Layout) -> Array | None:
        return self._path(site, layout) if site["type"] == "sample" and site["name"] in layout.paths else None

    def _path(self, site: dict[str, Any], layout: Layout) -> Array:
        """A path for a site, without derivatives: the stored one, or the prior's without noise."""
        prior, shape = unwrap(site["fn"])[0], site["fn"].shape()
        if self.reference is not None and site["name"] in self.reference.paths:
            stored = self.reference.paths[site["name"]]
            if stored.shape == shape:
                return jnp.asarray(stored, prior.m0.dtype)
        noise = jnp.zeros((*prior.batch_shape, prior.noise_size), prior.m0.dtype)
        return jax.lax.stop_gradient(jnp.broadcast_to(prior.path_from_noise(noise), shape))

    def _paths(self, run: ModelRun, values: dict[str, Array], layout: Layout) -> dict[str, Any]:
        trace = run.trace(values)
        return {n: trace[n] for n in layout.paths}

    def _integrate(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        indices: dict[str, Array],
        values: dict[str, Array],
        layout: Layout,
        group: Group,
    ) -> _Found:
        """The integral over the paths of a group."""

        def parts(run: ModelRun, values: dict[str, Array]) -> tuple[Stacked, Callable[[Array], Array], Array, Any]:
            sites = self._paths(run, values, layout)
            paths = {n: self._path(s, layout) for n, s in sites.items()}
            own = [sites[n] for n in group.paths]
            stacked = stack(group.paths, [unwrap(s["fn"])[0] for s in own])
            held = {**values, **{n: x for n, x in paths.items() if n not in group.paths}}
            first = group.paths[0]

            def log_lik(z: Array) -> Array:
                single = dict(zip(group.paths, stacked.split(z), strict=True))
                rest = {n: x for n, x in single.items() if n != first}
                return run.log_lik(first, {**held, **rest}, group.sites)(single[first])

            return stacked, log_lik, jnp.concatenate([paths[n] for n in group.paths], axis=-1), own[0]

        frozen = jax.tree.map(_still, (args, kwargs, values))
        stacked, log_lik, start, site = parts(ModelRun(self.model, args, kwargs, indices), values)
        check_series(group, log_lik, start)
        prior, far, _, _ = parts(ModelRun(self.model, *frozen[:2], indices), frozen[2])
        if self.approximation == "variational":
            value, centre, cov, potential = self._bound(group, stacked.prior, log_lik, prior.prior, far, start)
            converged = jnp.isfinite(value)
        else:
            mode = find_mode(prior.prior, far, start, num_iters=self.max_search)
            found = expand(stacked.prior, log_lik, Mode(*jax.lax.stop_gradient(tuple(mode))))
            value, centre, cov, converged = found.value, found.path, None, found.is_mode
            potential = potential_of(found.path, found.slope, found.J)
        if self.approximation == "importance":
            half = (self.num_samples // 2, *start.shape[:-2], stacked.prior.noise_size)
            noise = standard_normal(jax.random.key(0), half, start.dtype)
            value = estimate(stacked.prior, log_lik, found, jnp.concatenate([noise, -noise]))
        _, mask = unwrap(site["fn"])
        counted = value if mask is None else jnp.where(mask, value, 0.0)
        total = jnp.sum(counted) * (1.0 if site["scale"] is None else site["scale"])

        seen = jnp.broadcast_to(True if mask is None else mask, value.shape)
        return _Found(stacked, centre, cov, potential, total, converged, Series(log_lik, value, seen))

    def _bound(
        self, group: Group, prior: StatePath, log_lik: LogLik, far_prior: StatePath, far: LogLik, start: Array
    ) -> tuple[Array, Array, Array, Potential]:
        """The bound and its chain, from the stored moments; where there are none from those at the mode."""
        cov = None if self.reference is None else self.reference.covs.get(group.name)
        if cov is None or cov.shape != (*start.shape, start.shape[-1]):
            start = find_mode(far_prior, far, start, num_iters=self.max_search).path
            cov = covariances_at(far_prior, far, start)
        if prior.is_linear:
            found = fit_bound(prior, log_lik, start, jnp.asarray(cov), num_iters=self.num_iters)
            return found.value, found.path, found.cov, potential_of(found.path, found.slope, found.J)
        fit = variational_fit(
            prior, log_lik, start=(start, jnp.asarray(cov)), num_iters=self.num_iters, line_search=False
        )
        return jnp.where(jnp.isfinite(fit.bound), fit.bound, -jnp.inf), fit.mean, fit.cov, fit.potential


def _still(x: Any) -> Any:
    return jax.lax.stop_gradient(x) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) else x


def path_marginal(
    model: Callable[..., Any],
    *,
    approximation: str = "variational",
    num_iters: int = 4,
    num_samples: int = 8,
    max_search: int = 100,
) -> PathMarginal:
    """The model with every `StatePath` site integrated out, approximately, inside its log density.

        log p(theta) + log p(data that no path enters | theta) + log of the integral over the paths

    A sampler such as NUTS then sees the other latent sites alone. The integral is one `numpyro.factor`, of one of these
    kinds:

    - "laplace": Laplace's value at the mode of the path, which is searched to convergence; neither a bound nor
      unbiased, exact where the posterior of the path is Gaussian;
    - "importance": the average of `num_samples` weights of paths drawn about the mode by fixed random numbers; it
      becomes exact as their number grows;
    - "variational": a lower bound, by a Gaussian chain fitted in `num_iters` steps from stored moments; where the
      transition is a function its average over points, which may be off by some hundredths of a nat either way.

    Derivatives by the parameters are those of the value itself: of the mode, by the implicit function, and of the
    curvature there. Those of "variational" hold all steps but the last fixed (relative error about 1e-3), which a
    sampler's acceptance corrects. Where the path has no mode, or the search ends without one, the log density is minus
    infinity.

    The search begins at the path that belongs to the maximum of the approximate posterior. That is found when the model
    is first called with data that are known numbers, or by `prepare`. It never begins at the last step of a sampler, so
    the density is a function of the parameters alone and the steps can be reversed. With data that are traced (under
    `jit`) and no preparation the search begins at the path that the prior takes without noise.

    What is asked of a fit of it afterwards (`forecast`, `smoothed_states`, `sample_states`, `to_datatree`, `save`)
    works as for the model with its paths sampled: a path is drawn for each draw of the parameters.

    Args:
        model: a NumPyro model with at least one `StatePath` site, alone or in plates. Paths that one site reads
            together are integrated out together.
        approximation: "variational", "laplace" or "importance".
        num_iters: steps of "variational".
        num_samples: draws of "importance", an even number.
        max_search: most steps of the search for the mode.

    Returns:
        A `PathMarginal`: a NumPyro model with the same arguments.

    Raises:
        ValueError: an argument is wrong; when it runs: the model has no path, the prior of one depends on another, or
            several series of a path share a term of the likelihood.

    Example:
        >>> from functools import partial
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_nuts
        >>> y = datasets.load("nile").y[:30]
        >>> model = path_marginal(partial(models.local_level, states="sampled"), approximation="laplace")
        >>> fit = fit_nuts(model, y, num_warmup=30, num_samples=20, num_chains=1, progress_bar=False)
        >>> sorted(fit.get_samples())
        ['sigma_level', 'sigma_obs']

    Source:
        Tierney & Kadane 1986; Kristensen et al. 2016 (TMB); Vihola, Helske & Franks 2020.
    """
    check_choice("approximation", approximation, APPROXIMATIONS)
    check_count("num_iters", num_iters)
    check_count("max_search", max_search)
    if check_count("num_samples", num_samples, least=2) % 2:
        raise ValueError(f"`num_samples` must be even: the draws come in pairs about the mode; got {num_samples}.")
    return PathMarginal(model, approximation, num_iters, num_samples, max_search)
