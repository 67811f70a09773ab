"""The guide for models that sample their states step by step, in NumPyro's `scan`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.primitives import Messenger

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.guides.auto import AutoStateSpace
from pssm.guides.model_run import depends_on
from pssm.linalg import Diagonal


def scan_path(model: Callable[..., Any], site: str) -> Callable[..., Any]:
    """The same model with a latent site inside `numpyro.contrib.control_flow.scan` as one `StatePath` site.

    The density is the same; the site's value is the whole path, `(time, state)` (`state` = 1 for a scalar one). What
    works for a `StatePath` then works for the model: `AutoStateSpace`, `NonCenteredPath`, `importance_bound`.

    The scan's body must sample `site` from a `Normal` (a scalar or a vector) or a `MultivariateNormal` whose scale does
    not depend on the state, and return the sampled value as a leaf of its carry. Other leaves of the carry (a counter)
    may change with time, but not with the state. Steps without observations and NaN belong to the body as before.

    Args:
        model: a NumPyro model.
        site: name of the site.

    Returns:
        A NumPyro model with the same arguments.

    Raises:
        ValueError: when the model runs, if the body is not of this form; says why.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.contrib.control_flow import scan
        >>> def walk(y):
        ...     def step(z, y_t):
        ...         z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
        ...         numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
        ...         return z, None
        ...     scan(step, 0.0, y)
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(scan_path(walk, "z"), 0)).get_trace(jnp.ones(20))
        >>> trace["z"]["value"].shape, trace["y"]["fn"].batch_shape
        ((20, 1), (20,))
    """
    return _PathModel(model, site)


class _PathModel:
    """The model of `scan_path`."""

    def __init__(self, model: Callable[..., Any], site: str):
        self.model = self.__wrapped__ = model
        self.site = site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        messenger = _PathOfScan(self.site)
        with messenger:
            out = self.model(*args, **kwargs)
        if not messenger.found:
            raise ValueError(f"`site`: the model has no scan whose body samples {self.site!r}.")
        return out


class _PathOfScan(Messenger):
    """Replaces the scan that holds the site by one that is given the path."""

    def __init__(self, site: str):
        super().__init__(None)
        self.site, self.found = site, False

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow" and msg["fn"] is scan_wrapper:
            msg["fn"] = self._run

    def _run(self, f: Any, init: Any, xs: Any, length: int | None, reverse: bool, **kwargs: Any) -> Any:
        length = jax.tree.leaves(xs)[0].shape[0] if length is None else length
        init = jax.tree.map(jnp.asarray, init)
        first = _trace_body(f, init, jax.tree.map(lambda x: x[0], xs))[0]
        if self.site not in first:
            return scan_wrapper(f, init, xs, length, reverse, **kwargs)
        if reverse:
            raise ValueError(f"`site`: {self.site!r} is sampled in a scan that runs backward.")
        self.found = True
        prior, is_scalar = _prior(f, init, xs, length, self.site)
        path = jnp.asarray(numpyro.sample(self.site, prior))
        given = ("substitute", {self.site: path[:, 0] if is_scalar else path})
        stack = [(kind, _without(values, self.site)) for kind, values in kwargs.get("substitute_stack") or []]
        kwargs["substitute_stack"] = [*stack, given]
        out, (sites, ys) = scan_wrapper(f, init, xs, length, reverse, **kwargs)
        del sites.trace[self.site]
        return out, (sites, ys)


def _without(values: Any, site: str) -> Any:
    """What a handler around the model sets, by name or by function, the site left out: the path has it already."""
    if callable(values):
        return lambda msg: None if msg["name"] == site else values(msg)
    return {name: x for name, x in values.items() if name != site}


def _trace_body(f: Any, carry: Any, x: Any, values: dict[str, Array] | None = None) -> tuple[dict[str, Any], Any]:
    """The sites of one step and its new carry, without effects outside."""
    with handlers.block(), handlers.trace() as trace:
        body = handlers.substitute(handlers.seed(f, jax.random.key(0)), data=values or {})
        carry, _ = body(carry, x)
    return trace, carry


def _gaussian(site: dict[str, Any], name: str) -> tuple[Array, Any]:
    """Mean and factor of a Gaussian site with at most one axis."""
    fn = site["fn"]
    shape = jnp.shape(site["value"])
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if len(shape) > 1 or not isinstance(fn, dist.Normal | dist.MultivariateNormal):
        raise ValueError(
            f"`site`: {name!r} must be a scalar or a vector from a Normal or a MultivariateNormal; "
            f"it has shape {shape} at every step and comes from a {type(fn).__name__}."
        )
    size = shape or (1,)
    if isinstance(fn, dist.Normal):
        return jnp.broadcast_to(fn.loc, size), Diagonal(jnp.broadcast_to(fn.scale, size))
    return jnp.broadcast_to(fn.loc, size), fn.scale_tril


def _prior(f: Any, init: Any, xs: Any, length: int, name: str) -> tuple[StatePath, bool]:
    """The path prior that the scan's body stands for, and whether its state is a scalar."""
    first_x = jax.tree.map(lambda x: x[0], xs)
    start, carry = _trace_body(f, init, first_x)
    value = start[name]["value"]
    is_scalar = jnp.ndim(value) == 0
    leaves, structure = jax.tree.flatten(carry)
    own = [i for i, leaf in enumerate(leaves) if leaf is value]
    if not own:
        raise ValueError(f"`site`: the body that samples {name!r} must return its value in the carry.")
    if structure != jax.tree.structure(init):
        raise ValueError(f"`site`: the carry of the body that samples {name!r} changes its structure.")

    def carries(path: Array) -> Any:
        """The carry before every step, for a given path."""

        def step(carry: Any, xs: tuple) -> tuple[Any, Any]:
            z, x = xs
            return _trace_body(f, carry, x, {name: z})[1], carry

        init_leaves = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), init, carry)
        return jax.lax.scan(step, init_leaves, (path, xs), length=length)[1]

    def input_of(carry: Any, x: Any) -> Array:
        """All that a step is given, the state apart, as one vector."""
        rest = [leaf for i, leaf in enumerate(jax.tree.leaves(carry)) if i not in own]
        return ravel_pytree((rest, x))[0]

    path = jnp.zeros((length, *jnp.shape(value)), jnp.result_type(value))
    rest = [leaf for i, leaf in enumerate(jax.tree.leaves(init)) if i not in own]
    unravel = ravel_pytree((rest, first_x))[1]
    u = jax.vmap(input_of)(carries(path), xs)

    def carry_of(z: Array, rest: list[Array]) -> list[Array]:
        others = iter(rest)
        return [z if i in own else next(others) for i in range(len(leaves))]

    def gaussian(z: Array, u: Array) -> tuple[Array, Any]:
        rest, x = unravel(u)
        carry = carry_of(z[0] if is_scalar else z, rest)
        return _gaussian(_trace_body(f, jax.tree.unflatten(structure, carry), x)[0][name], name)

    def rest_after(z: Array) -> list[Array]:
        carry = _trace_body(f, jax.tree.unflatten(structure, carry_of(z, rest)), first_x, {name: z})[1]
        return [leaf for i, leaf in enumerate(jax.tree.leaves(carry)) if i not in own]

    if _depends(lambda z: gaussian(jnp.atleast_1d(z), u[0])[1], path[0]):
        raise ValueError(f"`site`: the scale of {name!r} depends on the state; a path prior needs one that does not.")
    if _depends(rest_after, path[0]):
        raise ValueError(f"`site`: a leaf of the carry beside {name!r} depends on the state.")
    m0, chol_P0 = _gaussian(start[name], name)
    factors = jax.vmap(lambda u: gaussian(jnp.zeros_like(m0), u)[1])(u)
    prior = StatePath(
        m0,
        chol_P0,
        lambda z, u: gaussian(z, u)[0],
        factors,
        length,
        u if u.shape[1] else None,
        time_varying=("chol_Q",),
    )
    return prior, is_scalar


def _depends(fn: Callable[[Array], Any], x: Array) -> bool:
    """Whether any array of the result is computed from `x`."""
    return any(depends_on(lambda x: jax.tree.leaves(fn(x)), x))


class AutoScanStateSpace(AutoStateSpace):
    """`AutoStateSpace` for a model that samples its states step by step in NumPyro's `scan`.

    The path follows the structured posterior in an auxiliary site, `{site}_path`; the model's own site is a `Delta` at
    its values. Pair it with the model itself, and with any ELBO that takes auxiliary sites (`Trace_ELBO`,
    `TraceConditionalKL_ELBO`). For importance weights by blocks, and for the ELBO with the closed-form KL, use
    `scan_path(model, site)` with `AutoStateSpace` instead.

    Args:
        model: a NumPyro model whose states are sampled in a `scan`; see `scan_path` for what its body may do.
        site: name of the states' site.
        rank: as in `AutoStateSpace`, like the other options. Not for the family "moment_matched".
        options: of `AutoStateSpace`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.contrib.control_flow import scan
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> def walk(y):
        ...     def step(z, y_t):
        ...         z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
        ...         numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
        ...         return z, None
        ...     scan(step, 0.0, y)
        >>> guide = AutoScanStateSpace(walk, site="z", rank=1)
        >>> svi = SVI(walk, guide, optax.adam(1e-2), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 10, jnp.ones(20), progress_bar=False)
        >>> guide.sample_posterior(jax.random.key(1), result.params, jnp.ones(20), sample_shape=(3,))["z"].shape
        (3, 20)
    """

    def __init__(self, model: Callable[..., Any], *, site: str, rank: int, **options: Any):
        if options.get("family") == "moment_matched":
            raise ValueError('`family`: "moment_matched" has no joint density, so it cannot be an auxiliary site.')
        own_site = _OwnSite(model, site)
        super().__init__(scan_path(model, site), rank=rank, own_site=own_site, **options)


class _OwnSite:
    """The model's own site at a path: a `Delta` of the shape that the site has in the model."""

    def __init__(self, model: Callable[..., Any], site: str):
        self.model, self.site = model, site
        self._axes: tuple[int, int] | None = None

    def __call__(self, path: Array, *args: Any, **kwargs: Any) -> dist.Delta:
        if self._axes is None:
            with handlers.block():
                seeded = handlers.seed(self.model, jax.random.key(0))
                own = handlers.trace(seeded).get_trace(*args, **kwargs)[self.site]
            self._axes = jnp.ndim(own["value"]), own["fn"].event_dim
        ndim, event_dim = self._axes
        return dist.Delta(path if ndim == 2 else path[..., 0], event_dim=event_dim)
