"""Which sites of a model depend on which of its paths, and several paths as one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax.scipy.linalg import block_diag
from numpyro import handlers

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.guides.model_run import depends_on
from pssm.guides.plates import apart, structure
from pssm.linalg.low_rank import Diagonal


class Group(NamedTuple):
    """Paths that are integrated out together, and the sites whose density depends on one of them."""

    paths: tuple[str, ...]
    sites: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the group."""
        return ", ".join(self.paths)


class Series(NamedTuple):
    """The series of one chain: the log-likelihood of a path and the approximate integral, `(*batch,)` each.

    Attributes:
        log_lik: of paths `(*batch, time, state)`, everything but the path's own density.
        log_value: its integral, approximately.
        counted: whether a series counts: none that a mask takes out.
    """

    log_lik: Callable[[Array], Array]
    log_value: Array
    counted: Array


class Layout(NamedTuple):
    """The groups of a model's paths.

    Attributes:
        groups: the paths, those together that a site joins.
        deterministic: deterministic sites that depend on a path.
        observed: observed sites that depend on none.
        latent: latent sites that are no path.
    """

    groups: tuple[Group, ...]
    deterministic: tuple[str, ...]
    observed: tuple[str, ...]
    latent: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """All paths."""
        return tuple(name for group in self.groups for name in group.paths)

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites whose density depends on a path."""
        return tuple(name for group in self.groups for name in group.sites)


def layout_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """Works out by the program of a model, not by numbers, what depends on its paths.

    Raises:
        ValueError: there is no path, or the prior of one depends on another.
    """
    found = structure(model, args, kwargs)
    sampled = {n: s for n, s in found.items() if s["type"] == "sample"}
    paths = [n for n, s in sampled.items() if s["is_path"] and not s["is_observed"]]
    if not paths:
        raise ValueError(
            "`model` has no `StatePath` site, so there is no path to integrate out; its sites are "
            f'{", ".join(sampled) or "(none)"}. pssm\'s linear models have one with `states="sampled"`; a model that '
            "samples its states step by step gets one by `pssm.guides.scan_path`."
        )
    others = [n for n in found if n not in paths and found[n]["type"] in ("sample", "deterministic")]
    touched: dict[str, set[str]] = {}
    for path in paths:
        names = [n for n in (*paths, *others) if n != path]

        def run(x: Array, path: str = path, names: list[str] = names) -> list[Any]:
            seeded = handlers.seed(model, jax.random.key(0))
            with apart(), numpyro.validation_enabled(False):
                before = handlers.trace(seeded).get_trace(*args, **kwargs)
                held = {n: s["value"] for n, s in before.items() if s["type"] == "sample" and not s["is_observed"]}
                held[path] = x
                trace = handlers.trace(handlers.substitute(seeded, data=held)).get_trace(*args, **kwargs)
            sites = [trace[n] for n in names]
            return [jnp.asarray(_density(s) if s["type"] == "sample" else _sum(s["value"])) for s in sites]

        reached = depends_on(run, jnp.zeros(sampled[path]["shape"]))
        touched[path] = {n for n, hit in zip(names, reached, strict=True) if hit}
        joint = sorted(touched[path] & set(paths))
        if joint:
            raise ValueError(
                f"`model`: the prior of the path `{joint[0]}` depends on the path `{path}`. Write the two as one path "
                "with a joint state and transition, or sample one of them (`NonCenteredPath`)."
            )
    reached_by_any = set().union(*touched.values())
    return Layout(
        tuple(_groups(paths, {p: touched[p] & set(sampled) for p in paths}, list(sampled))),
        tuple(n for n in others if found[n]["type"] == "deterministic" and n in reached_by_any),
        tuple(n for n in others if n in sampled and sampled[n]["is_observed"] and n not in reached_by_any),
        tuple(n for n in others if n in sampled and not sampled[n]["is_observed"]),
    )


def _density(site: dict[str, Any]) -> Array:
    return _sum(site["fn"].log_prob(site["value"]))


def _sum(tree: Any) -> Array:
    return sum((jnp.sum(jnp.asarray(x, float)) for x in jax.tree.leaves(tree)), jnp.zeros(()))


def _groups(paths: list[str], touched: dict[str, set[str]], order: list[str]) -> list[Group]:
    """Paths that have a site in common, directly or through others."""
    groups: list[tuple[list[str], set[str]]] = []
    for path in paths:
        own, sites = [path], set(touched[path])
        for other in [g for g in groups if g[1] & sites]:
            groups.remove(other)
            own, sites = other[0] + own, other[1] | sites
        groups.append((own, sites))
    return [Group(tuple(own), tuple(n for n in order if n in sites)) for own, sites in groups]


def check_series(group: Group, log_lik: Callable[[Array], Array], path: Array) -> None:
    """Refuses a likelihood that several series of a path share."""
    shape, batch = jax.eval_shape(log_lik, path).shape, path.shape[:-2]
    if shape != batch:
        raise ValueError(
            f"`model`: the series of the path `{group.name}`, of batch shape {batch}, share a term of the likelihood "
            f"(its shape is {shape}), so they cannot be integrated out one by one. Write them as one path with a joint "
            "state, or fit the model with its paths sampled."
        )


class Stacked(NamedTuple):
    """Independent paths as one with all of their states.

    Attributes:
        prior: of the joint path.
        sizes: of the states.
    """

    prior: StatePath
    sizes: tuple[int, ...]

    def split(self, path: Array) -> list[Array]:
        """The single paths."""
        cuts = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(path, cuts, axis=-1)


def stack(names: tuple[str, ...], priors: list[StatePath]) -> Stacked:
    """Paths of equal length side by side, with block-diagonal noise.

    Raises:
        ValueError: they differ in length or batch shape.
    """
    sizes = tuple(p.n_state for p in priors)
    if len(priors) == 1:
        return Stacked(priors[0], sizes)
    shapes = {n: (p.batch_shape, p.num_steps) for n, p in zip(names, priors, strict=True)}
    if len({steps for _, steps in shapes.values()}) > 1 or any(batch for batch, _ in shapes.values()):
        raise ValueError(
            "`model`: paths that a site joins are integrated out together, so they need the same number of steps and "
            f"no batch axes; got {shapes} (batch shape, steps). Write them as one path with a joint state."
        )
    steps = priors[0].num_steps
    blocks: list[dict[str, Any]] = []  # the arrays of each path that its transition reads, one row for each step
    for p in priors:
        arrays, _ = p.arrays()
        rows = {n: x for n, x in arrays.items() if n in ("u", "b", "B", "transition")}
        blocks.append(
            {
                n: x if n in p.time_varying or n == "u" else jnp.broadcast_to(x, (steps, *x.shape))
                for n, x in rows.items()
            }
        )
    columns = [x.reshape(steps, -1) for rows in blocks for x in rows.values()]
    inputs = jnp.concatenate(columns, axis=1) if columns else None

    def transition(z: Array, u: Array | None) -> Array:
        means, at, start = [], 0, 0
        for p, rows in zip(priors, blocks, strict=True):
            now: dict[str, Any] = {}
            for name, x in rows.items():
                size = x[0].size
                now[name] = u[at : at + size].reshape(x.shape[1:])  # pyright: ignore[reportOptionalSubscript]
                at += size
            means.append(p.step(now, z[start : start + p.n_state]))
            start += p.n_state
        return jnp.concatenate(means)

    timed = any("chol_Q" in p.time_varying for p in priors)
    factors = [_matrix(p.chol_Q) for p in priors]
    if timed:
        rows = [
            q if "chol_Q" in p.time_varying else jnp.broadcast_to(q, (steps, *q.shape))
            for p, q in zip(priors, factors, strict=True)
        ]
        noise = jax.vmap(block_diag)(*rows)
    else:
        noise = block_diag(*factors)
    start = block_diag(*(_matrix(p.chol_P0) for p in priors))
    m0 = jnp.concatenate([p.m0 for p in priors])
    varying = ("chol_Q",) if timed else ()
    if all(p.is_linear for p in priors):
        A = jax.vmap(block_diag)(*(rows["transition"] for rows in blocks))
        zero = jnp.zeros(steps, A.dtype)
        offsets = jnp.concatenate([_offset(p, rows, zero) for p, rows in zip(priors, blocks, strict=True)], axis=1)
        prior = StatePath(m0, start, A, noise, steps, b=offsets, time_varying=("transition", "b", *varying))
    else:
        prior = StatePath(m0, start, transition, noise, steps, inputs, time_varying=varying)
    return Stacked(prior, sizes)


def _in_time(prior: StatePath, name: str, x: Array) -> Array:
    """An array of a path with an axis of time."""
    return x if name in prior.time_varying else jnp.broadcast_to(x, (prior.num_steps, *x.shape))


def _matrix(factor: Any) -> Array:
    return factor.to_matrix() if isinstance(factor, Diagonal) else factor


def _offset(prior: StatePath, rows: dict[str, Any], zero: Array) -> Array:
    """What a linear transition adds at each step, `(time, state)`."""
    total = rows["b"] if "b" in rows else jnp.zeros((len(zero), prior.n_state), zero.dtype)
    if "B" in rows and "u" in rows:
        total = total + jnp.sum(rows["B"] * rows["u"][:, None, :], axis=-1)
    return total
