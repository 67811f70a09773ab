"""The path prior between its centred and its non-centred form."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.reparam import Reparam

from pssm._checks import as_float, is_traced
from pssm._types import Array, ArrayLike, Key
from pssm.batch import map_batch
from pssm.distributions.state_path import StatePath, check_steps
from pssm.linalg import Diagonal, solve_lower, triangularise
from pssm.linalg.low_rank import Factor
from pssm.linalg.random import standard_normal
from pssm.linalg.small import matvec

LOG_2PI = 1.8378770664093453


class PartlyCentredPath(dist.Distribution):
    """`x_t = c_t * mu_t + T_c e_t`, of a path `z_t = mu_t + T e_t` with `mu_t = f(z_{t-1}, u_t)` and `T T' = Q_t`.

    Row i of the triangular `T_c` is `T_ii^{c_i}` on the diagonal and `c_i T_ii^{c_i - 1} T_ij` beside it: the identity
    for `c = 0`, where `x` is the noise, and `T` for `c = 1`, where `x` is the path. `x` and `z` are one to one given
    the parameters, and the density of `x` is `prod_t N(x_t; c_t mu_t, T_c T_c')`, exactly. A row whose pivot `T_ii` is
    zero has `c_i = 0`: noise-free directions stay non-centred. Where the path has units (`StatePath.in_units`), all of
    this is of `(z - centre) / unit`, so that `x` does not depend on units.

    Args:
        path: the prior of the path.
        centered: `c` in [0, 1]; it broadcasts against `(..., time, state)`.
    """

    pytree_data_fields = ("path", "centered")

    def __init__(self, path: StatePath, centered: ArrayLike, *, validate_args: bool | None = None):
        self.path, self.centered = path, jnp.asarray(centered, path.m0.dtype)
        lead = self.centered.shape[:-2] if self.centered.ndim > 2 else ()
        batch = jnp.broadcast_shapes(path.batch_shape, lead)
        super().__init__(batch, path.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All values."""
        return constraints.real_matrix

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of `x`, `sample_shape + batch_shape + (time, state)`."""
        noise = standard_normal(key, (*sample_shape, *self.batch_shape, *self.event_shape), self.path.m0.dtype)
        return self._along(noise, from_noise=True)[0]

    def path_of(self, x: Array) -> Array:
        """The path of `x`."""
        return self._along(x)[1]

    def base_of(self, z: Array) -> Array:
        """The `x` of a path `z` that the noise can make."""
        return self._along(z, from_path=True)[0]

    def log_prob(self, value: Array) -> Array:
        """Log density of `x`, `(..., time, state)`; a scan along the path, which is made of it."""
        return self._along(value)[2]

    def _along(self, given: Array, from_noise: bool = False, from_path: bool = False) -> tuple[Array, Array, Array]:
        """`x`, path and log density of `x`, of any of `x`, the standard normal noise and the path."""
        p = self.path
        batch = jnp.broadcast_shapes(given.shape[:-2], self.batch_shape)

        def visit(mean: Array, factor: Factor, row: dict[str, Array]) -> tuple[Array, Array, Array]:
            v, unit = row["given"], row["unit"]
            mu = (mean - row["centre"]) / unit
            root, partial, live = _roots(factor, unit, row["c"])
            c = jnp.where(live, row["c"], 0.0)
            if from_noise:
                e = v
            elif from_path:
                e = _solve(root, (v - mean) / unit)
            else:
                e = _solve(partial, v - c * mu)
            x = v if not (from_noise or from_path) else c * mu + _times(partial, e)
            pivots = partial if partial.ndim == 1 else jnp.diagonal(partial)
            density = -0.5 * jnp.sum(e**2 + LOG_2PI) - jnp.sum(jnp.log(pivots))
            return x, (v if from_path else mean + unit * _times(root, e)), density

        def one(a: dict[str, Any]) -> tuple[Array, Array, Array]:
            rows = {name: a[name] for name in own}
            first = visit(a["m0"], a["chol_P0"], {name: x[0] for name, x in rows.items()})

            def step(z: Array, xs: tuple) -> tuple[Array, tuple[Array, Array, Array]]:
                row, timed = xs
                now = {**a, **timed}
                found = visit(p.step(now, z), p.factor(now, z), row)
                return found[1], found

            xs = {name: x[1:] for name, x in rows.items()}, p.timed(a)
            later = jax.lax.scan(step, first[1], xs, length=p.num_steps - 1)[1]
            x, z, density = (jnp.concatenate([a[None], b]) for a, b in zip(first, later, strict=True))
            return x, z, jnp.sum(density)

        def wide(x: ArrayLike) -> Array:
            x = jnp.asarray(x, p.m0.dtype)
            return jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, self.event_shape))

        own = {"given": given, "c": wide(self.centered)}
        own |= {"centre": wide(0.0 if p.centre is None else p.centre), "unit": wide(1.0 if p.unit is None else p.unit)}
        arrays, cores = p._arrays()
        return map_batch(one, batch, {**arrays, **own}, {**cores, **dict.fromkeys(own, 2)})


def _roots(factor: Factor, unit: Array, c: Array) -> tuple[Array, Array, Array]:
    """`T`, `T_c` and where the pivots are not zero, in units; of a diagonal noise the diagonals."""
    if isinstance(factor, Diagonal):
        sd = jnp.abs(factor.scale) / unit
        live = sd > 0
        return sd, jnp.where(live, sd, 1.0) ** jnp.where(live, c, 0.0), live
    root = triangularise(factor) / unit[:, None]
    pivots = jnp.diagonal(root)
    live = pivots > 0
    safe, own = jnp.where(live, pivots, 1.0), jnp.where(live, c, 0.0)
    beside = jnp.tril(root, -1) * (own * safe ** (own - 1.0))[:, None]
    return root, beside + jnp.diag(safe**own), live


def _times(root: Array, e: Array) -> Array:
    return root * e if root.ndim == 1 else matvec(root, e)


def _solve(root: Array, x: Array) -> Array:
    """`e` with `root e = x`, zero where a pivot is."""
    if root.ndim == 1:
        return jnp.where(root > 0, x / jnp.where(root > 0, root, 1.0), 0.0)
    return solve_lower(root, x[:, None])[:, 0]


class PartiallyCenteredPath(Reparam):
    """Samples a `StatePath` site between its centred form, `centered=1`, and its non-centred form, `centered=0`.

    The site `name` becomes deterministic; `name_base`, of event shape `(time, state)`, is sampled, with its exact
    density: with the mean `mu_t` of a step and the triangular factor `T` of its noise, `x_t ~ N(c_t mu_t, T_c T_c')`,
    where `T_c` is the identity at `c = 0` and `T` at `c = 1` (`T^c` for a diagonal one). Every weight has the same
    posterior of the path; for NUTS the best one lies near the share of a step's noise that the data tell, which
    `pssm.infer.centering` estimates. Noise-free directions stay non-centred.

    Args:
        centered: weights in [0, 1]: a number, one for each state, or of shape `(..., time, state)`.

    Raises:
        ValueError: `centered` is outside [0, 1], or of another shape.

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> def model():
        ...     numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), jnp.eye(1), 5))
        >>> model = numpyro.handlers.reparam(model, config={"z": PartiallyCenteredPath(0.5)})
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
        >>> trace["z"]["type"], trace["z_base"]["value"].shape
        ('deterministic', (5, 1))

    Source:
        Papaspiliopoulos, Roberts & Sköld 2007; Gorinova, Moore & Hoffman 2020; NumPyro's `LocScaleReparam`.
    """

    def __init__(self, centered: ArrayLike):
        self.centered = as_float("centered", centered)
        if not is_traced(self.centered):
            values = np.asarray(self.centered)
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(f"`centered` must lie in [0, 1]; got values from {values.min()} to {values.max()}.")

    def __call__(self, name: str, fn: dist.Distribution, obs: Array | None) -> tuple[None, Array]:
        """Replaces the site; `obs` must be None."""
        if obs is not None:
            raise ValueError(f"`{name}` is observed: an observed path cannot be reparametrised.")
        path, shape, _ = self._unwrap(fn)
        if not isinstance(path, StatePath):
            raise TypeError(f"`{name}` must be a StatePath to be partly centred; got {type(path).__name__}.")
        wanted = (*shape, *path.event_shape)
        try:
            fits = np.broadcast_shapes(self.centered.shape, wanted) == wanted
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"`centered` must be a number or broadcast against the path {name!r}, {wanted}; got shape "
                f"{self.centered.shape}."
            )
        base = PartlyCentredPath(path, self.centered)
        wide = base if base.batch_shape == tuple(shape) else base.expand(shape)
        x = jnp.asarray(numpyro.sample(f"{name}_base", wide, infer={"path_noise": True}))
        check_steps(f"{name}_base", x, wide, path.num_steps)
        return None, base.path_of(x)
