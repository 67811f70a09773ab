"""The prior over a whole state path as one sample site."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import as_float, check_choice, check_count, check_shape
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.batch import map_batch
from pssm.callables import STATE_NOISE, check_noise, check_step, check_takes, join_callable, split_callable
from pssm.distributions.in_units import real_in_units
from pssm.events import of_events
from pssm.linalg import Diagonal, solve_lower, triangularise
from pssm.linalg.low_rank import Factor, apply_factor, as_factor
from pssm.linalg.random import standard_normal
from pssm.linalg.small import affine
from pssm.nonlinear import NonlinearSSM
from pssm.ssm import LinearGaussianSSM, check_proper

LOG_2PI = 1.8378770664093453
_TIMED = ("transition", "chol_Q", "b", "B")
_CORE = {"m0": 1, "chol_P0": 2, "transition": 2, "chol_Q": 2, "b": 1, "B": 2, "u": 2}
_FACTORS = ("chol_P0", "chol_Q")


class StatePath(dist.Distribution):
    """`p(z_{1:T}) = N(z_1; m0, P0) prod_{t=2}^T N(z_t; f(z_{t-1}, u_t), Q_t)`, event shape `(time, state)`.

    The transition is a matrix, `f(z, u) = A z + b + B u`, or any function of `(z, u)`: a plain function, a
    `jax.tree_util.Partial` or an Equinox module, whose arrays may be learned. Inputs, offsets and time-varying arrays
    carry the destination index: entry `t` acts on the step into `t`, entry 0 is not used.

    A singular `Q` (fewer noise columns than states) is allowed. Its paths have a density only on the set that the
    noise can reach; `log_prob` is then the density of the coordinates with a non-zero pivot, and assumes that
    the path lies on that set. To run MCMC or SVI over such a path sample its non-centred form (`NonCenteredPath`).

    The noise may depend on the state: `chol_Q` is then a function of the state that the step leaves and of the input
    of the step. With such a path work: draws, `log_prob`, NUTS and other kernels (centred or not), particle filters and
    particle Gibbs, the EKF and UKF, and forecasts; guides and the search for a mode need a constant noise, and say so.

    Args:
        m0: mean of the first state, `(..., state)`.
        chol_P0: factor of its covariance, `(..., state, state)`, or a `pssm.linalg.Diagonal`.
        transition: `A` of shape `(..., state, state)`, or a function `(z (state,), u (input,) or None) -> (state,)`.
        chol_Q: factor of the transition noise, `(..., state, noise)`, or a `Diagonal`. A concrete matrix
            that is diagonal (outside of `jit`) is treated as one. Or a function `(z, u) -> (state, noise)`.
        num_steps: length of the path, at least 1.
        u: inputs `(..., time, input)`.
        b: offset `(..., state)`; with a matrix only.
        B: effect of the inputs `(..., state, input)`; with a matrix only.
        time_varying: names among "transition" (or "A", as in a `LinearGaussianSSM`), "chol_Q", "b", "B" that have a
            time axis in front.

    Raises:
        ValueError, TypeError: a shape does not fit; the message names the argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> walk = StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), 0.1 * jnp.eye(1), num_steps=50)
        >>> walk.sample(jax.random.key(0)).shape, walk.event_shape
        ((50, 1), (50, 1))
        >>> pendulum = StatePath(jnp.zeros(2), jnp.eye(2), lambda z, u: jnp.sin(z), 0.1 * jnp.eye(2), num_steps=20)
        >>> pendulum.log_prob(jnp.zeros((20, 2))).shape
        ()
    """

    pytree_data_fields = ("m0", "chol_P0", "_chol_Q", "u", "b", "B", "_dynamic", "_noise_dynamic", "centre", "unit")
    pytree_aux_fields = ("num_steps", "time_varying", "_static", "_noise_static", "noise_columns", "is_linear")
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    m0: Array
    chol_P0: Factor
    noise_columns: int
    u: Array | None
    b: Array | None
    B: Array | None

    def __init__(
        self,
        m0: ArrayLike,
        chol_P0: ArrayLike | Diagonal,
        transition: ArrayLike | Callable[[Array, Array | None], Array],
        chol_Q: ArrayLike | Diagonal | Callable[[Array, Array | None], Array],
        num_steps: int,
        u: ArrayLike | None = None,
        *,
        b: ArrayLike | None = None,
        B: ArrayLike | None = None,
        time_varying: tuple[str, ...] = (),
        validate_args: bool | None = None,
    ):
        self.num_steps = check_count("num_steps", num_steps)
        self.is_linear = not callable(transition)
        if callable(transition):
            check_takes("transition", transition, 2)
        if not self.is_linear and (b is not None or B is not None):
            raise ValueError("`b` and `B` go with a transition matrix; put them into the `transition` function.")
        if isinstance(time_varying, str):
            raise TypeError(f"`time_varying` must be a tuple of names; got the string {time_varying!r}.")
        if self.is_linear:  # a matrix has the name that it has in a LinearGaussianSSM, too
            time_varying = tuple(dict.fromkeys({"A": "transition"}.get(name, name) for name in time_varying))
        for name in time_varying:
            check_choice("time_varying", name, _TIMED if self.is_linear else ("chol_Q",))
        self.time_varying = tuple(time_varying)
        noise = None if isinstance(chol_Q, Diagonal) or not callable(chol_Q) else chol_Q
        if noise is not None:
            check_takes("chol_Q", noise, 2)
            if "chol_Q" in time_varying:
                raise ValueError("`chol_Q` is a function and varies through `z` and `u`; drop it from `time_varying`.")
        given = {"m0": m0, "chol_P0": chol_P0, "chol_Q": chol_Q if noise is None else None, "b": b, "B": B, "u": u}
        if self.is_linear:
            given["transition"] = transition
        arrays: dict[str, Any] = {
            name: as_factor(name, x) if name in _FACTORS else as_float(name, x)
            for name, x in given.items()
            if x is not None
        }
        if "u" in arrays and arrays["u"].ndim == 1:
            arrays["u"] = arrays["u"][:, None]
        batch = self._check(arrays, noise is not None)
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(*jax.tree.leaves(arrays)))
        arrays = jax.tree.map(lambda x: x.astype(dtype), arrays)
        # Functions are seen as one series sees them, without batch axes.
        u_first = jnp.zeros(arrays["u"].shape[-1:], dtype) if "u" in arrays else None
        first = jnp.zeros(arrays["m0"].shape[-1:], dtype), u_first
        if callable(transition):
            check_step(transition, *first)
        self.noise_columns = arrays["chol_Q"].shape[-1] if noise is None else check_noise(noise, *first)
        for name in ("m0", "chol_P0", "b", "B", "u"):
            setattr(self, name, arrays.get(name))
        self._chol_Q = arrays.get("chol_Q")
        self._noise_dynamic, self._noise_static = ((), None) if noise is None else split_callable(noise)
        # Two paths with the same transition share compiled programs: what is static of it is compared by its structure.
        self._dynamic, self._static = (arrays["transition"], None) if self.is_linear else split_callable(transition)
        self.centre = self.unit = None
        super().__init__(batch, (self.num_steps, self.n_state), validate_args=validate_args)

    def _check(self, arrays: dict[str, Any], noise_varies: bool) -> tuple[int, ...]:
        """Shapes of the core axes; returns the batch shape."""
        n = arrays["m0"].shape[-1] if arrays["m0"].ndim else None
        if n is None:
            raise ValueError(f"`m0` must have shape (state,); got {arrays['m0'].shape}.")
        expected = {"m0": (n,), "chol_P0": (n, n), "transition": (n, n), "b": (n,)}
        meaning = {"m0": "state", "chol_P0": "state, state", "transition": "state, state", "b": "state"}
        for name in expected:
            if name in arrays:
                check_shape(name, arrays[name], expected[name], meaning[name])
        if not noise_varies and (arrays["chol_Q"].ndim < 2 or arrays["chol_Q"].shape[-2] != n):
            raise ValueError(f"`chol_Q` must have shape ({n}, noise); got {arrays['chol_Q'].shape}.")
        if "u" in arrays and arrays["u"].shape[-2] != self.num_steps:
            raise ValueError(f"`u` must have {self.num_steps} time steps; got shape {arrays['u'].shape}.")
        if "B" in arrays:
            if "u" not in arrays:
                raise ValueError("`u` is required, of shape (time, input): `B` is given.")
            check_shape("B", arrays["B"], (n, arrays["u"].shape[-1]), "state, input")
        elif self.is_linear and "u" in arrays and not noise_varies:
            raise ValueError("`u` is given, but there is no `B` to use it.")
        batches = []
        for name, x in arrays.items():
            timed = name in self.time_varying
            if timed and (x.ndim < _CORE[name] + 1 or x.shape[-1 - _CORE[name]] != self.num_steps):
                raise ValueError(
                    f"`{name}` is in `time_varying` and needs {self.num_steps} steps; got shape {x.shape}."
                )
            batches.append(x.shape[: x.ndim - _CORE[name] - timed])
        return jnp.broadcast_shapes(*batches)

    @classmethod
    def from_ssm(cls, ssm: LinearGaussianSSM | NonlinearSSM, num_steps: int, u: ArrayLike | None = None) -> "StatePath":
        """The path prior of a model, linear-Gaussian or not."""
        if isinstance(ssm, NonlinearSSM):
            noise = ssm.noise_function or ssm.chol_Q
            return cls(ssm.m0, ssm.chol_P0, ssm.transition, noise, num_steps, u, time_varying=ssm.time_varying)
        check_proper(ssm)
        timed = tuple({"A": "transition"}.get(n, n) for n in ssm.time_varying if n in ("A", "chol_Q", "b", "B"))
        inputs = u if ssm.B is not None else None
        return cls(ssm.m0, ssm.chol_P0, ssm.A, ssm.chol_Q, num_steps, inputs, b=ssm.b, B=ssm.B, time_varying=timed)

    def in_units(self, centre: ArrayLike, unit: ArrayLike) -> "StatePath":
        """The same distribution for a sampler that moves in `(z - centre) / unit`; both broadcast against a path."""
        other = copy.copy(self)
        other.centre, other.unit = centre, unit
        return other

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """All paths."""
        real = constraints.real if self.unit is None else real_in_units(self.centre, self.unit)
        return constraints.independent(real, 2)

    @property
    def n_state(self) -> int:
        """Size of the state."""
        return self.m0.shape[-1]

    @property
    def transition(self) -> Any:
        """The transition matrix or function as given."""
        return self._dynamic if self.is_linear else join_callable(self._dynamic, self._static)

    @property
    def noise_size(self) -> int:
        """Number of standard normal numbers for one path: `state + (time - 1) noise`."""
        return self.n_state + (self.num_steps - 1) * self.noise_columns

    @property
    def chol_Q(self) -> Any:
        """The factor of the noise; an error where it depends on the state."""
        if self.has_state_noise:
            raise ValueError(STATE_NOISE)
        return self._chol_Q

    @property
    def has_state_noise(self) -> bool:
        """Whether the noise depends on the state: `chol_Q` is a function."""
        return self._noise_static is not None

    def factor(self, a: dict[str, Any], z: Array) -> Factor:
        """The factor of the noise of the step from `z`; `a` as for `step`."""
        if self.has_state_noise:
            return join_callable(self._noise_dynamic, self._noise_static)(z, a.get("u"))
        return a["chol_Q"]

    @property
    def mean(self) -> Array:
        """Mean path, `(..., time, state)`; known for a linear transition only."""
        if not self.is_linear:
            raise NotImplementedError("The mean path of a nonlinear transition has no closed form; average draws.")
        return self.path_from_noise(jnp.zeros((*self.batch_shape, self.noise_size), self.m0.dtype))

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Paths of shape `sample_shape + batch_shape + (time, state)`."""
        shape = (*sample_shape, *self.batch_shape, self.noise_size)
        return self.path_from_noise(standard_normal(key, shape, self.m0.dtype))

    def path_from_noise(self, noise: Array) -> Array:
        """The path driven by standard normal `noise` of shape `(..., noise_size)`: the non-centred form.

        The first `state` numbers make `z_1 = m0 + chol_P0 e`, the others are the transitions' noise in time order.
        """
        batch = jnp.broadcast_shapes(noise.shape[:-1], self.batch_shape)

        def one(a: dict[str, Any]) -> Array:
            e = a["noise"]
            first = a["m0"] + apply_factor(a["chol_P0"], e[: self.n_state])
            later = e[self.n_state :].reshape(self.num_steps - 1, self.noise_columns)

            def step(z: Array, xs: tuple) -> tuple[Array, Array]:
                w, timed = xs
                now = {**a, **timed}
                z = self.step(now, z) + apply_factor(self.factor(now, z), w)
                return z, z

            _, path = jax.lax.scan(step, first, (later, self.timed(a)), length=self.num_steps - 1)
            return jnp.concatenate([first[None], path])

        arrays, cores = self._arrays()
        paths = map_batch(one, batch, {**arrays, "noise": noise}, {**cores, "noise": 1})
        return paths.reshape(*batch, self.num_steps, self.n_state)

    def continued(self, key: KeyLike, path: Array) -> Array:
        """A path of all steps that begins with `path` `(..., known, state)` and goes on by the transition."""
        key = as_key(key)
        known, batch = path.shape[-2], jnp.broadcast_shapes(path.shape[:-2], self.batch_shape)
        if not known:
            return self.sample(key)

        def one(a: dict[str, Any]) -> Array:
            def step(z: Array, xs: tuple) -> tuple[Array, Array]:
                noise, timed = xs
                now = {**a, **timed}
                z = self.step(now, z) + apply_factor(self.factor(now, z), noise)
                return z, z

            later = jax.tree.map(lambda x: x[known - 1 :], self.timed(a))
            rows = jax.lax.scan(step, a["z"][-1], (a["noise"], later), length=self.num_steps - known)[1]
            return jnp.concatenate([a["z"], rows])

        arrays, cores = self._arrays()
        noise = standard_normal(key, (*batch, self.num_steps - known, self.noise_columns), path.dtype)
        return map_batch(one, batch, {**arrays, "z": path, "noise": noise}, {**cores, "z": 2, "noise": 2})

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Log density of paths `(..., time, state)`; all time steps at once, no scan."""
        batch = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape)

        def one(a: dict[str, Any]) -> Array:
            z = a["z"]
            first = _normal_log_prob(a["chol_P0"], (z[0] - a["m0"])[:, None])
            if self.num_steps == 1:
                return first[0]
            timed = self.timed(a)
            residual = z[1:] - self.means(a, z)
            if self.has_state_noise or "chol_Q" in timed:
                factors = jax.vmap(lambda x, t: self.factor({**a, **t}, x))(z[:-1], timed)
                later = jax.vmap(lambda c, r: _normal_log_prob(c, r[:, None])[0])
                return first[0] + later(factors, residual).sum()
            return first[0] + _normal_log_prob(a["chol_Q"], residual.T).sum()

        arrays, cores = self._arrays()
        return map_batch(one, batch, {**arrays, "z": value}, {**cores, "z": 2})

    def means(self, a: dict[str, Any], z: Array) -> Array:
        """`f(z_{t-1})` for `t = 2..T` of an unbatched path, `(time - 1, state)`."""
        return jax.vmap(lambda x, t: self.step({**a, **t}, x))(z[:-1], self.timed(a))

    def step(self, a: dict[str, Any], z: Array) -> Array:
        """`f(z, u)`, one transition; `a` as `arrays` gives it, with `timed`'s entries of the step in place."""
        if not self.is_linear:
            return self.transition(z, a.get("u"))
        return affine(a["transition"], a.get("b"), a.get("B"), z, a.get("u"))

    def timed(self, a: dict[str, Any]) -> dict[str, Any]:
        """The arrays that differ between steps: those of the steps into `t = 2..T`."""
        names = (*self.time_varying, *(("u",) if "u" in a else ()))
        return {name: jax.tree.map(lambda x: x[1:], a[name]) for name in names}

    def arrays(self) -> tuple[dict[str, Any], dict[str, int]]:
        """The arrays by name, and the number of core axes of each; the noise is one of them."""
        if self.has_state_noise:
            raise ValueError(STATE_NOISE)
        return self._arrays()

    def _arrays(self) -> tuple[dict[str, Any], dict[str, int]]:
        found = {name: getattr(self, name) for name in ("m0", "chol_P0", "b", "B", "u")}
        found["chol_Q"] = self._chol_Q
        if self.is_linear:
            found["transition"] = self.transition
        found = {name: x for name, x in found.items() if x is not None}
        cores = {name: _CORE[name] + (name in self.time_varying) - isinstance(x, Diagonal) for name, x in found.items()}
        return found, cores


def _normal_log_prob(factor: Factor, residuals: Array) -> Array:
    """Log density of the columns of `residuals` `(state, many)` under `N(0, F F')`, zero pivots left out."""
    if isinstance(factor, Diagonal):
        pivots = jnp.abs(factor.scale)
        live = pivots > 0
        whitened = residuals / jnp.where(live, pivots, 1.0)[:, None]
    else:
        chol = triangularise(factor)
        whitened = solve_lower(chol, residuals)
        pivots = jnp.diagonal(chol)
        live = pivots > 0
    terms = LOG_2PI + 2 * jnp.log(jnp.where(live, pivots, 1.0))[:, None] + whitened**2
    return -0.5 * jnp.sum(jnp.where(live[:, None], terms, 0.0), axis=0)


def path_site(name: str, path: StatePath, **options: Any) -> Array:
    """`numpyro.sample(name, path, **options)` that refuses a given value of other steps than the path has."""
    z = jnp.asarray(numpyro.sample(name, path, **options))
    check_steps(name, z, path, path.num_steps)
    return z


def check_steps(name: str, value: ArrayLike, fn: dist.Distribution, num_steps: int) -> None:
    """Refuses a value of a path's site, or of its noise, that was made for another number of steps.

    NumPyro takes a value that a handler gives to a site as it is: `Predictive` with posterior draws of a path of T
    steps would return T steps for a model of T + H.
    """
    if jnp.shape(value)[-len(fn.event_shape) :] != fn.event_shape:
        raise ValueError(
            f"`{name}` has a given value of shape {jnp.shape(value)}, but the model has {num_steps} steps, an event of "
            f"shape {fn.event_shape}. Draws of a path are no forecast: use `pssm.infer.forecast`, or leave `{name}`"
            " out."
        )
