"""Where the states of a fit come from: integrated out, exactly or by a Gaussian filter, or among its draws.

Each kind of source gives, for one posterior draw, moments of states and signal, a path of the states, and the future.
All but the exact one is given by draws, so moments are averages over them.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array, Key
from pssm.distributions import GaussianFilterMarginal, HistoryMarginal, LinearGaussianMarginal, StatePath
from pssm.distributions.in_units import counted, from_origin
from pssm.distributions.unwrap import unwrap
from pssm.filters import forecast as exact_forecast
from pssm.filters import kalman_smoother
from pssm.filters import sample_states as exact_sample_states
from pssm.filters.ahead import draw_future
from pssm.fitting.draws import trace_with
from pssm.infer.horizon import Horizon
from pssm.inspection.axes import Axes, find_axes, is_factor, is_path_noise
from pssm.linalg.random import standard_normal
from pssm.ssm import LinearGaussianSSM, check_inputs

Moments = tuple[Array, Array, Array, Array]  # mean and variance of the state, mean and variance of the signal
Future = tuple[Array, Array, Array]  # mean and variance of the observations, and one path of them


class Source(NamedTuple):
    """A model, its arguments, and the sites that matter: learned parameters are fitted, paths are plain sites.

    `site` is observed, over `num_steps` steps; `path` is the latent site, of batch shape `batch`, or None where the
    states are integrated out. `along` has the time axis and the value of every observed site over these steps, and
    `paths` are all sampled paths over them; `latent` are the sites that are drawn, and `steps` those of them that have
    independent numbers for each step, with how many the first step has: the noise that drives a path, for one.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    site: str
    path: str | None
    num_steps: int
    batch: tuple[int, ...]
    along: dict[str, tuple[int, Any]]
    paths: tuple[str, ...]
    latent: tuple[str, ...]
    steps: tuple[tuple[str, int], ...] = ()

    @property
    def holder(self) -> str:
        """The site that has the states: the path, or the series whose states are integrated out."""
        return self.path or self.site

    def trace(self, sample: dict[str, Array], longer: Horizon | None = None) -> dict[str, Any]:
        """The model's trace at a draw, for the fit's own arguments or longer ones."""
        if longer is None:
            return trace_with(self.model, sample, *self.args, **self.kwargs)
        drawn = {n: x for n, x in sample.items() if n in self.latent}  # deterministic sites follow, in their own length
        return trace_with(self.model, drawn, *longer.args, **longer.kwargs)

    def drawn_on(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> dict[str, Array]:
        """A draw for longer arguments: paths and numbers of each step go on from the known ones, by their priors.

        Raises:
            ValueError: a path does not become longer with the data.
        """
        first = dict(self.steps)
        grow = (*self.paths, *first)
        values = {name: x for name, x in sample.items() if name not in grow}
        for name in (n for n in self.latent if n in grow):  # in the order of the model: one may depend on those before
            site_key, key = jax.random.split(key)
            trace = self.trace(values, ahead)
            if name in first:
                new = trace[name]["fn"].sample(site_key)
                values[name] = _with_new(sample[name], new, first[name], self.num_steps, ahead.known)
                continue
            prior = self.fn(trace, name)
            if prior.num_steps < ahead.known + ahead.num_steps:
                raise ValueError(
                    f"`future`: the path `{name}` has {prior.num_steps} steps also where the data have "
                    f"{ahead.known + ahead.num_steps}. Let its length follow the data in the model, or give "
                    "`future=(args, kwargs)`."
                )
            values[name] = prior.continued(site_key, sample[name][..., : ahead.known, :])
        return values

    def fn(self, trace: dict[str, Any], name: str | None = None) -> Any:
        """The distribution of a site, unwrapped."""
        return unwrap(trace[name or self.site]["fn"])[0]

    def origins(self, sample: dict[str, Array]) -> tuple[Any, Any]:
        """What states and observations are counted from where 32 bits cannot hold them: 64-bit numbers, else 0.

        All that a source gives is counted from there.
        """
        trace = self.trace(sample)
        fn = self.fn(trace)
        infer = [trace[n].get("infer") or {} for n in (self.path, f"{self.path}_base") if n in trace]
        origins = [x["origin"] for x in infer if "origin" in x]
        state = getattr(fn, "state_origin", None) if self.path is None else next(iter(origins), None)
        return tuple(0 if x is None else np.asarray(x) for x in (state, getattr(fn, "origin", None)))


class Longer(NamedTuple):
    """A system over known steps and those of a forecast, the known data, the inputs of both, and known future values.

    All is counted from the model's origins.
    """

    ssm: LinearGaussianSSM
    y: Array
    u: Array | None
    u_future: Array | None
    y_future: Any


class ExactSource(Source):
    """States that a `LinearGaussianMarginal` has integrated out."""

    def series(self, trace: dict[str, Any]) -> Array:
        """The observed series with all batch axes, counted from its origin."""
        return self.fn(trace).differences(trace[self.site]["value"])

    def moments(self, sample: dict[str, Array], key: Key) -> Moments:
        """Of the exact smoother."""
        trace = self.trace(sample)
        d, y = self.fn(trace), self.series(trace)
        s = kalman_smoother(d.ssm, y, d.u)
        factor = d.ssm.with_time_axis("C") @ s.chol
        return s.mean, jnp.sum(s.chol**2, -1), d.ssm.signal(s.mean, d.u), jnp.sum(factor**2, -1)

    def draw(self, sample: dict[str, Array], key: Key) -> Array:
        """A path by forward filtering and backward sampling."""
        trace = self.trace(sample)
        d = self.fn(trace)
        return exact_sample_states(key, d.ssm, self.series(trace), d.u)

    def longer(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> Longer:
        """The system of the known steps and of those of a forecast."""
        trace = self.trace(sample)
        d, y, known = self.fn(trace), self.series(trace)[..., : ahead.known, :], ahead.known
        ssm, u, u_future, stop = d.whole_ssm, d.u, ahead.u_future, known + ahead.num_steps
        if ssm.num_steps is not None and (ssm.num_steps < stop or u_future is not None or self.steps or self.paths):
            longer = self.fn(self.trace(self.drawn_on(sample, key, ahead), ahead))
            ssm, u = longer.whole_ssm, longer.u
            if ahead.why and ssm.num_steps < stop:
                raise ValueError(ahead.why)
            if longer.num_steps >= stop:  # the future inputs are among the arguments, and may be in other places
                u_future = None
        if u_future is not None:
            u_future = from_origin(u_future, d.u_origin)
        elif u is not None and u.shape[-2] >= stop:
            u_future = u[..., known:stop, :]
        u = None if u is None else u[..., :known, :]
        ssm = ssm if ssm.num_steps is None else ssm.steps(0, stop)
        y_future = None if ahead.y_future is None else from_origin(ahead.y_future, d.origin)
        return Longer(ssm, y, u, check_inputs(ssm, u_future, ahead.num_steps, "u_future"), y_future)

    def future(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> Future:
        """Exact moments, and a path from the predicted state on; given the known values of the future, if any."""
        draw_key, key = jax.random.split(key)
        ssm, y, u, u_future, y_future = self.longer(sample, draw_key, ahead)
        found = exact_forecast(ssm, y, ahead.num_steps, u, u_future, y_future=y_future)
        path = draw_future(key, ssm, y, ahead.num_steps, u, u_future, y_future)
        return found.mean, jnp.diagonal(found.cov, axis1=-2, axis2=-1), path


class PathSource(Source):
    """States that are a `StatePath` site among the draws."""

    def moments(self, sample: dict[str, Array], key: Key) -> Moments:
        """Of the draw itself: without a variance of its own."""
        z = self.draw(sample, key)
        signal = _mean_of(self.trace(sample)[self.site])
        return z, jnp.zeros_like(z), signal, jnp.zeros_like(signal)

    def draw(self, sample: dict[str, Array], key: Key) -> Array:
        """The draw's own path."""
        return sample[self.path]

    def future(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> Future:
        """The model's own transition and emission from the last known state on."""
        path_key, key = jax.random.split(key)
        values = self.drawn_on(sample, path_key, ahead)
        return _observed(self.trace(values, ahead)[self.site], key, ahead, self.along[self.site][0])


class NoiseSource(PathSource):
    """States that are a path driven by a site of noise (`NonCenteredPath`): the path follows from the draws."""

    def draw(self, sample: dict[str, Array], key: Key) -> Array:
        """The path of the draw's own noise."""
        return self.trace({n: x for n, x in sample.items() if n in self.latent})[self.holder]["value"]


class FilterSource(Source):
    """States that a `GaussianFilterMarginal` has integrated out, approximately."""

    def moments(self, sample: dict[str, Array], key: Key) -> Moments:
        """Of the Gaussian smoother; the signal of a draw from it at each step."""
        trace = self.trace(sample)
        d = self.fn(trace)
        s = d.smooth(trace[self.site]["value"])
        noise = standard_normal(key, s.mean.shape, s.mean.dtype)
        signal = d.signal(s.mean + jnp.einsum("...ij,...j->...i", s.chol, noise))
        return s.mean, jnp.sum(s.chol**2, -1), signal, jnp.zeros_like(signal)

    def draw(self, sample: dict[str, Array], key: Key) -> Array:
        """There is none: the smoother has moments only."""
        raise ValueError(
            f"`fit` has integrated its states out approximately (site `{self.site}`), and a Gaussian smoother has no "
            'joint draws of them. Fit the model with states="sampled", or use `particle_smoother`.'
        )

    def future(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> Future:
        """The model's own transition and emission from a draw of the filtered state on."""
        y = self.trace(sample)[self.site]["value"][: ahead.known]
        return self.fn(self.trace(sample, ahead)).future(key, y, ahead.num_steps)


class CodesSource(Source):
    """Codes of frames in a `HistoryMarginal`: their states are integrated out, the frames follow from the codes."""

    def moments(self, sample: dict[str, Array], key: Key) -> Moments:
        """Of the exact smoother given the draw's codes."""
        trace = self.trace(sample)
        states = self.fn(trace, self.path).states(sample[self.path]).moments()
        signal = _mean_of(trace[self.site])
        return states.mean, jnp.sum(states.chol**2, -1), signal, jnp.zeros_like(signal)

    def draw(self, sample: dict[str, Array], key: Key) -> Array:
        """A path given the draw's codes."""
        return self.fn(self.trace(sample), self.path).states(sample[self.path]).sample(key)

    def future(self, sample: dict[str, Array], key: Key, ahead: Horizon) -> Future:
        """The frames of codes that the guide has drawn for the longer series."""
        return _observed(self.trace(sample, ahead)[self.site], key, ahead, self.along[self.site][0])


def _with_new(x: Array, new: Array, first: int, steps: int, known: int) -> Array:
    """Numbers of which the first `known` steps are those of `x`, and new ones behind; the first step has `first`."""
    each = (x.shape[-1] - first) // max(steps - 1, 1)
    kept = first + (known - 1) * each
    return jnp.concatenate([x[..., :kept], new[..., kept:]], axis=-1)


def _mean_of(site: dict[str, Any]) -> Array:
    try:
        return counted(site["fn"]).mean
    except NotImplementedError:
        name = type(unwrap(site["fn"])[0]).__name__
        raise ValueError(f"`site`: the distribution of `{site['name']}` ({name}) has no mean, so no signal.") from None


def _observed(site: dict[str, Any], key: Key, ahead: Horizon, axis: int) -> Future:
    """Moments and a draw of the forecast's rows of an observed site."""
    fn = counted(site["fn"])
    y = fn.sample(key)
    try:
        mean, variance = fn.mean, fn.variance
    except NotImplementedError:  # then the moments are those of the draws
        mean, variance = y, jnp.zeros(jnp.shape(y))
    return tuple(ahead.rows(jnp.broadcast_to(x, jnp.shape(y)), axis) for x in (mean, variance, y))


# ------------------------------------------------------------------------------------------------ which source it is


def sources_of(
    model: Callable[..., Any], first: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Source]:
    """Every observed site that has states, with each path that it follows, from a model's first draw.

    Where states are integrated out in some sites, they come first.

    Raises:
        ValueError: the model has no states.
    """
    trace = trace_with(model, first, *args, **kwargs)
    sampled = {n: s for n, s in trace.items() if s["type"] == "sample" and not is_factor(s)}
    observed = {n: s for n, s in sampled.items() if s["is_observed"]}
    latent = {n: s for n, s in sampled.items() if not s["is_observed"]}
    kinds = {n: type(unwrap(s["fn"])[0]) for n, s in sampled.items()}
    exact = [n for n in observed if issubclass(kinds[n], LinearGaussianMarginal)]
    filtered = [n for n in observed if issubclass(kinds[n], GaussianFilterMarginal)]
    paths = [n for n in latent if issubclass(kinds[n], StatePath)]
    paths += [n for n in latent if issubclass(kinds[n], HistoryMarginal)]
    steps = tuple((n, s["infer"]["first"]) for n, s in latent.items() if "first" in (s.get("infer") or {}))
    driven = [n.removesuffix("_base") for n, _ in steps if is_path_noise(latent[n]) and n.endswith("_base")]
    driven = [] if exact or filtered or paths else [n for n in driven if n in trace]
    if not (exact or filtered or paths or driven):
        raise ValueError(
            "`fit`: its model has neither a `LinearGaussianMarginal` nor a `StatePath` site, so there are no states; "
            f"its latent sites are {', '.join(latent) or '(none)'}."
        )
    axes = cache(lambda: find_axes(model, args, kwargs, values=first))

    def along(lead: tuple[int, ...]) -> dict[str, tuple[int, Any]]:
        found = {n: _time_axis(n, np.shape(s["value"]), lead, axes) for n, s in observed.items()}
        return {n: (axis, observed[n]["value"]) for n, axis in found.items() if axis is not None}

    def of(kind: type[Source], site: str, path: str | None, lead: tuple[int, ...]) -> Source:
        together = [n for n in paths if kinds[n] is StatePath and sampled[n]["fn"].event_shape[0] == lead[-1]]
        return kind(
            model, args, kwargs, site, path, lead[-1], lead[:-1], along(lead), tuple(together), tuple(latent), steps
        )

    result = []
    for kind, names in ((ExactSource, exact), (FilterSource, filtered)):
        for name in names:
            fn = observed[name]["fn"]
            result.append(of(kind, name, None, (*fn.batch_shape, fn.event_shape[0])))
    for path in paths:
        fn = latent[path]["fn"]
        lead = (*fn.batch_shape, fn.event_shape[0])
        follow = [n for n in along(lead) if n not in (*exact, *filtered)]
        if len(paths) > 1:
            follow = [
                n
                for n in follow
                if _depends(trace, trace_with(model, {**first, path: first[path] + 1}, *args, **kwargs), n)
            ]
        kind = CodesSource if issubclass(kinds[path], HistoryMarginal) else PathSource
        result += [of(kind, name, path, lead) for name in follow]
    for path in driven:
        lead = np.shape(trace[path]["value"])[:-1]
        result += [of(NoiseSource, name, path, lead) for name in along(lead)]
    return result


def _time_axis(site: str, shape: tuple[int, ...], lead: tuple[int, ...], axes: Callable[[], Axes]) -> int | None:
    """The axis of an observed value along a path's steps: behind the path's batch axes, unless the model says else."""
    last = len(lead) - 1
    fits = shape[: len(lead)] == lead
    if fits and shape.count(lead[-1]) == 1:
        return last
    if lead[-1] not in shape:
        return None
    known = axes().times.get(site)
    if known is not None and shape[place := axes().names[site].index(known)] == lead[-1]:
        return place
    return last if fits else None


def _depends(before: dict[str, Any], after: dict[str, Any], site: str) -> bool:
    """Whether the distribution of a site is another one."""
    pairs = zip(jax.tree.leaves(before[site]["fn"]), jax.tree.leaves(after[site]["fn"]), strict=True)
    return any(not np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def source_of(
    model: Callable[..., Any], first: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], site: str | None
) -> Source:
    """The source of the states of a model's draws, the first of which is given.

    Args:
        model: the model.
        first: its first draw.
        args: its positional arguments.
        kwargs: its keyword arguments.
        site: the observed site, or the path, where there are several.

    Raises:
        ValueError: the model has no states, or several observed sites and none is named by `site`.
    """
    found = sources_of(model, first, args, kwargs)
    named = list(dict.fromkeys(s.site for s in found))
    if site is None:
        kept = [s for s in found if type(s) is type(found[0])]
        if len({s.site for s in kept}) == 1:
            return kept[0]
        raise ValueError(f"`site` must name the observed site; those with states are {named or 'none'}.")
    kept = [s for s in found if site in (s.site, s.path)]
    if not kept:
        raise ValueError(f"`site` must be one of {named}, the observed sites with states; got {site!r}.")
    return kept[0]
