"""The function that a point estimate maximises: a model's log-likelihood, or log joint density, of one vector.

The vector holds the unconstrained coordinates of all latent sites. A coordinate may be infinite: that is the boundary
of its site's support, such as a scale of zero.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.util import compute_log_probs, constrain_fn

from pssm._types import Array, Key
from pssm.distributions import HistoryMarginal, StatePath
from pssm.fitting.own_arrays import with_own_arrays
from pssm.guides.plates import structure, subsampled
from pssm.inspection.axes import NUMPYRO_PATHS, Axes, core, find_axes, innermost, is_factor, is_path_noise

Values = dict[str, np.ndarray]


class Target:
    """A model's density at one point, compiled once, in 64-bit arithmetic where the model can be traced in it.

    Attributes:
        names: the latent sites, in the order of the model; `shapes` are those of their unconstrained values.
        size: the number of coordinates.
        num_observations: entries that were observed.
        double: whether the arithmetic is 64-bit.

    Args:
        model: a NumPyro model with continuous latent sites, none of which is a path.
        args: its positional arguments.
        kwargs: its keyword arguments.
        joint: the log joint density in place of the log-likelihood.
        traced: data enter the compiled program as arguments, so that `with_arguments` can exchange them.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        joint: bool = False,
        traced: bool = False,
    ):
        self.model, self.joint = model, joint
        self.integrated = hasattr(model, "posterior")  # its paths are integrated out, approximately
        plain: Any = getattr(model, "plain_model", model) if self.integrated else model
        for plate in subsampled(structure(handlers.substitute(plain, substitute_fn=_proper), args, kwargs)):
            raise ValueError(f"`model`: its plate `{plate}` takes a part of the data; a maximum needs all of them.")
        axes = find_axes(plain, args, kwargs)
        self.names = _latent(axes, self.integrated)
        self.num_observations = _observed_entries(axes)
        self.double, self._traced = True, traced
        self._take(args, kwargs)
        try:
            self._compile()
        except TypeError:  # a model with arrays of its own in 32 bits, which a scan does not mix with others
            self.double = False
            self._take(args, kwargs)
            self._compile()
        if not joint and self.size > self.num_observations:
            raise ValueError(
                f"`model` has {self.size} unknowns and {self.num_observations} observations: its likelihood has no "
                "single maximum. Use `fit_map`, or `fit_nuts`."
            )

    def with_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Target":
        """The same model with other data of the same shapes, by the same compiled program (made with `traced`)."""
        other = copy.copy(self)
        other.num_observations = _observed_entries(find_axes(self.model, args, kwargs))
        other._take(args, kwargs)
        return other

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient; minus infinity where the density is not finite."""
        with self._precision():
            (value, _), gradient = self._value_and_grad(jnp.asarray(z), self._data)
            value, gradient = float(value), np.asarray(gradient, np.float64)
        return (value, gradient) if np.isfinite(value) else (-np.inf, np.zeros(self.size))

    def values(self, z: np.ndarray) -> Values:
        """The values of latent and deterministic sites, as a user knows them."""
        with self._precision():
            return {n: np.asarray(x, np.float64) for n, x in self._constrain(jnp.asarray(z), self._data).items()}

    def parts(self, z: np.ndarray) -> tuple[float, float]:
        """The log-likelihood and the log joint density."""
        with self._precision():
            return tuple(float(x) for x in self._value_and_grad(jnp.asarray(z), self._data)[0][1])

    def prior(self, key: Key, count: int) -> np.ndarray:
        """Draws from the prior, `(count, size)`; improper sites at a value of their support."""
        with self._precision():
            found = np.asarray(self._draw(jax.random.split(key, count), self._data), np.float64)
        return np.where(np.isfinite(found), found, 0.0)

    def labels(self) -> list[tuple[str, int]]:
        """Site and number of each coordinate within it."""
        return [(n, i) for n, shape in self.shapes.items() for i in range(int(np.prod(shape)))]

    # -----------------------------------------------------------------------------------------------------------------

    def _precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.double else nullcontext()

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the arguments: arrays of floats that enter as such, and a function that puts them back."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        if self.double:
            leaves = [np.array(x, np.float64) if _is_floats(x) else x for x in leaves]  # copies: see `with_own_arrays`
        places = [i for i, x in enumerate(leaves) if self._traced and _is_floats(x)]
        self._data = [leaves[i] for i in places]

        def rebuild(data: list[Any]) -> Any:
            new = list(leaves)
            for i, x in zip(places, data, strict=True):
                new[i] = x
            return jax.tree.unflatten(structure, new)

        self._rebuild = rebuild

    def _compile(self) -> None:
        rebuild, names, joint = self._rebuild, self.names, self.joint
        own = _own_arrays(self.model)
        model = handlers.seed(own, jax.random.key(0))  # for what is drawn beside the latent sites

        def drawn(key: Key, data: list[Any]) -> dict[str, Array]:
            args, kwargs = rebuild(data)
            seeded = handlers.seed(handlers.substitute(own, substitute_fn=_proper), key)
            trace = handlers.trace(seeded).get_trace(*args, **kwargs)
            return {n: biject_to(trace[n]["fn"].support).inv(trace[n]["value"]) for n in names}

        with self._precision():
            found = jax.eval_shape(drawn, jax.random.key(0), self._data)
        self.shapes = {n: found[n].shape for n in names}
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.size, cuts = sum(sizes), np.cumsum(sizes)[:-1].tolist()
        shapes = self.shapes

        def position(z: Array) -> dict[str, Array]:
            return {n: x.reshape(shapes[n]) for n, x in zip(names, jnp.split(z, cuts), strict=True)}

        def parts(z: Array, data: list[Any]) -> tuple[Array, Array]:
            args, kwargs = rebuild(data)
            values = constrain_fn(model, args, kwargs, position(z))
            found, trace = compute_log_probs(model, args, kwargs, values)
            likelihood = jnp.sum(jnp.stack([x for n, x in found.items() if trace[n]["is_observed"]]))
            return likelihood, jnp.sum(jnp.stack(list(found.values())))

        def density(z: Array, data: list[Any]) -> tuple[Array, tuple[Array, Array]]:
            both = parts(z, data)
            return both[int(joint)], both

        def constrained(z: Array, data: list[Any]) -> dict[str, Array]:
            args, kwargs = rebuild(data)
            return constrain_fn(model, args, kwargs, position(z), return_deterministic=True)

        self._value_and_grad = jax.jit(jax.value_and_grad(density, has_aux=True))
        self._constrain = jax.jit(constrained)
        self._draw = jax.jit(
            jax.vmap(lambda k, data: jnp.concatenate([x.ravel() for x in drawn(k, data).values()]), (0, None))
        )
        with self._precision():  # what cannot be traced says so here
            jax.eval_shape(self._value_and_grad, jnp.zeros(self.size), self._data)


def _proper(site: dict[str, Any]) -> Any:
    """A value of the support for a site that cannot be drawn, since it has no proper prior."""
    if site["type"] != "sample" or not isinstance(core(site["fn"]), dist.ImproperUniform):
        return None
    return core(site["fn"]).support.feasible_like(jnp.zeros(site["fn"].shape()))


def _is_floats(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.Array) and np.ndim(x) > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _observed_entries(axes: Axes) -> int:
    values = [np.asarray(axes.trace[n]["value"]) for n in axes.data if not is_factor(axes.trace[n])]
    return sum(int(np.size(x)) - (int(np.isnan(x).sum()) if x.dtype.kind == "f" else 0) for x in values)


def _own_arrays(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with arrays of its own in other precisions; of one that integrates its paths out, a copy."""
    if not hasattr(model, "posterior"):
        return with_own_arrays(model)
    other: Any = copy.copy(model)
    other.model = with_own_arrays(other.model)
    other.reference = None  # of the session's precision
    return other


def _latent(axes: Axes, integrated: bool) -> tuple[str, ...]:
    """The latent sites, or a refusal; without the paths that are `integrated` out."""
    trace = axes.trace
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    if integrated:
        latent = {n: s for n, s in latent.items() if not isinstance(innermost(s["fn"]), StatePath)}
    if not latent:
        raise ValueError("`model` has no latent site: there is nothing to estimate.")
    if not axes.data:
        raise ValueError("`model` observes nothing: give it its data, and `obs=` to the site that has them.")
    for name, s in trace.items():
        if s["type"] == "param":
            raise ValueError(f"`model` has the parameter `{name}` (`numpyro.param`), which `fit_svi` learns.")
    for name, s in latent.items():
        if s["fn"].support.is_discrete:
            raise ValueError(f"`model`: the site `{name}` is discrete. Sum over it, or use `fit_nuts`, which can.")
        path = isinstance(innermost(s["fn"]), (StatePath, HistoryMarginal, *NUMPYRO_PATHS))
        if path or is_path_noise(s) or name in axes.times:
            raise ValueError(
                f"`model` samples its states (site `{name}`): they grow in number with the series, and a maximum over "
                'them is no estimate of the parameters. Integrate them out: states="marginal" and noise="normal" in '
                "pssm's models, a `LinearGaussianMarginal` or `GaussianFilterMarginal` in your own. Or use `fit_nuts`."
            )
    return tuple(latent)
