"""The nonlinear, non-Gaussian state-space model: dynamics and emission written once, for every method.

    z_1 ~ N(m0, P0),   z_t = f(z_{t-1}, u_t) + w_t,   w_t ~ N(0, Q_t),   y_t ~ p(. | z_t, u_t)

Time runs as in `ssm.py`: the first observation comes from `z_1` itself, and inputs and noise carry the index of the
step that they act into.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pssm._checks import as_float, check_finite, check_shape
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, Key, KeyLike
from pssm.callables import (
    STATE_NOISE,
    check_noise,
    check_step,
    check_takes,
    join_callable,
    split_callable,
    takes_two,
)
from pssm.emission_moments import EmissionMoments, base_of, moments_of, statistic_of
from pssm.events import draw
from pssm.linalg import triangularise
from pssm.linalg.random import standard_normal
from pssm.linalg.small import affine, matvec
from pssm.partly_observed import log_prob_observed
from pssm.ssm import LinearGaussianSSM, check_proper


@jax.tree_util.register_pytree_node_class
class NonlinearSSM:
    """A state-space model with any transition function and any NumPyro distribution as emission.

    A pytree: arrays inside `transition` and `emission` (Equinox modules, `jax.tree_util.Partial`) are its leaves.

    Args:
        m0: mean of the first state, `(state,)`.
        chol_P0: factor of its covariance, `(state, state)`.
        transition: `f(z, u) -> (state,)`; `u` is `(input,)`, or None without inputs. A plain function or a pytree.
        chol_Q: factor of the transition noise, `(state, noise)`, singular or not; `(time, state, noise)` if it is named
            in `time_varying`. Or a function `(z, u) -> (state, noise)`: `z` is the state that the step leaves.
        emission: `g(z)` or `g(z, u)`, a NumPyro distribution over one observation: `(obs,)`, or a scalar.
        time_varying: `("chol_Q",)` where the noise has a time axis. Other things vary through `u`.

    Raises:
        ValueError: a shape does not fit, or a value is not finite.
        TypeError: `transition` or `emission` cannot be called with these arguments.

    Example:
        >>> import numpyro.distributions as dist
        >>> model = NonlinearSSM(
        ...     jnp.zeros(2), jnp.eye(2), lambda z, u: z + 0.1 * jnp.stack([z[1], -jnp.sin(z[0])]), 0.1 * jnp.eye(2),
        ...     lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> model
        NonlinearSSM(n_state=2, n_obs=2)
    """

    def __init__(
        self,
        m0: ArrayLike,
        chol_P0: ArrayLike,
        transition: Callable[..., Array],
        chol_Q: ArrayLike | Callable[..., Array],
        emission: Callable[..., dist.Distribution],
        *,
        time_varying: tuple[str, ...] = (),
    ):
        if tuple(time_varying) not in ((), ("chol_Q",)):
            raise ValueError(f'`time_varying` must be () or ("chol_Q",); got {time_varying!r}.')
        arrays = {"m0": as_float("m0", m0), "chol_P0": as_float("chol_P0", chol_P0)}
        noise = chol_Q if callable(chol_Q) else None
        if noise is None:
            arrays["chol_Q"] = as_float("chol_Q", chol_Q)
        elif time_varying:
            raise ValueError("`chol_Q` is a function and varies through `z` and `u`; drop it from `time_varying`.")
        if arrays["m0"].ndim != 1:
            raise ValueError(f"`m0` must have shape (state,); got {arrays['m0'].shape}. For batches use `jax.vmap`.")
        n = len(arrays["m0"])
        check_shape("chol_P0", arrays["chol_P0"], (n, n), "state, state")
        timed = bool(time_varying)
        if noise is not None:
            check_takes("chol_Q", noise, 2)
        elif arrays["chol_Q"].ndim != 2 + timed or arrays["chol_Q"].shape[-2] != n:
            raise ValueError(
                f"`chol_Q` must have shape ({'time, ' if timed else ''}{n}, noise); got {arrays['chol_Q'].shape}."
            )
        check_takes("transition", transition, 2)
        check_takes("emission", emission, 1, 2)
        dtype = jnp.result_type(*arrays.values())
        for name, x in arrays.items():
            check_finite(name, x)
        self.m0, self.chol_P0 = arrays["m0"].astype(dtype), arrays["chol_P0"].astype(dtype)
        self._chol_Q = arrays["chol_Q"].astype(dtype) if noise is None else None
        self._noise = None if noise is None else split_callable(noise)
        self.time_varying = tuple(time_varying)
        self._transition, self._emission = split_callable(transition), split_callable(emission)
        self._emission_takes_inputs = takes_two(emission)

    m0: Float[Array, " state"]
    chol_P0: Float[Array, "state state"]
    time_varying: tuple[str, ...]

    @classmethod
    def from_linear(cls, ssm: LinearGaussianSSM) -> "NonlinearSSM":
        """The same model as a `LinearGaussianSSM`, time-invariant except for `chol_Q`."""
        check_proper(ssm)
        if ssm.batch_shape or set(ssm.time_varying) - {"chol_Q"}:
            raise ValueError("`ssm` must have no batch axes and no time-varying arrays but `chol_Q`.")
        chol_R = triangularise(ssm.chol_R)
        transition = jax.tree_util.Partial(affine, ssm.A, ssm.b, ssm.B)
        emission = jax.tree_util.Partial(_normal, chol_R, ssm.C, ssm.d, ssm.D)
        model = cls(ssm.m0, ssm.chol_P0, transition, ssm.chol_Q, emission, time_varying=ssm.time_varying)
        model._emission_takes_inputs = True
        return model

    def to_linear(self, about: ArrayLike, u: ArrayLike | None = None) -> LinearGaussianSSM:
        """The linear-Gaussian model that this one is to first order: exact where it is linear.

        About a path, step t is affine about `about[t - 1]` (transition) and `about[t]` (emission), and inputs are
        absorbed in the offsets: give the result to the exact functions without `u`. About one state the result does not
        vary in time, and the inputs keep their own matrices `B` and `D`, the derivatives at `u`.

        Args:
            about: a path `(time, state)`, such as the mean of `gaussian_smoother`, or one state `(state,)`.
            u: inputs `(time, input)` of the path, or the input `(input,)` beside the one state.

        Returns:
            A `LinearGaussianSSM`. The noise of the observations is that at `about`.

        Raises:
            ValueError: a shape does not fit, or the emission is not normal.

        Example:
            >>> import jax.numpy as jnp, numpyro.distributions as dist
            >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: jnp.sin(z), 0.1 * jnp.eye(1),
            ...                      lambda z: dist.Normal(z**2, 0.1).to_event(1))
            >>> model.to_linear(jnp.zeros((5, 1))).time_varying
            ('A', 'C', 'chol_R', 'b', 'd')
        """
        point = as_float("about", about)
        check_shape("about", point, (self.n_state,), "state")
        check_finite("about", point)
        inputs = None if u is None else as_float("u", u)
        if inputs is not None and inputs.shape[:-1] != point.shape[:-1]:
            raise ValueError(f"`u` must have shape {(*point.shape[:-1], 'input')}, as `about`; got {inputs.shape}.")
        if not self.is_gaussian(inputs if inputs is None or point.ndim == 1 else inputs[0]):
            raise ValueError(
                "`to_linear` needs a normal emission; this one is not. `gaussian_smoother` and `laplace_path` take any."
            )
        point = point.astype(self.m0.dtype)
        if point.ndim == 1:
            return _about_state(self, point, inputs)
        return _about_path(self, point, inputs)

    @property
    def n_state(self) -> int:
        """Size of the state."""
        return self.m0.shape[-1]

    @property
    def transition(self) -> Callable[..., Array]:
        """`f(z, u)`."""
        return join_callable(*self._transition)

    def emission(self, z: Array, u: Array | None = None) -> dist.Distribution:
        """`p(y | z, u)`."""
        function = join_callable(*self._emission)
        found = function(z, u) if self._emission_takes_inputs else function(z)
        if not isinstance(found, dist.Distribution):
            raise TypeError(
                f"`emission` must return one NumPyro distribution; got {type(found).__name__}. Variables of several "
                "families need a model with a `StatePath` and one `observe` for each."
            )
        return found

    @property
    def chol_Q(self) -> Float[Array, "*time state noise"]:
        """The factor of the noise; an error where it depends on the state."""
        if self._chol_Q is None:
            raise ValueError(STATE_NOISE)
        return self._chol_Q

    @property
    def noise_function(self) -> Callable[..., Array] | None:
        """`chol_Q` as a function of `(z, u)`, where the noise depends on the state."""
        return None if self._noise is None else join_callable(*self._noise)

    def noise(self, t: Array | int, z: Array, u: Array | None = None) -> Array:
        """`chol_Q` of the step into `t`, from the state `z` with the input `u`."""
        if self.noise_function is not None:
            return self.noise_function(z, u)
        return self.chol_Q[t] if self.time_varying else self.chol_Q

    def noise_columns(self, u: Array | None = None) -> int:
        """Number of columns of the noise's factor."""
        return self.chol_Q.shape[-1] if self.noise_function is None else check_noise(self.noise_function, self.m0, u)

    def log_prob(self, y: Array, z: Array, u: Array | None = None) -> Array:
        """`log p(y | z, u)` of one observation, over its entries that are not NaN."""
        d = self.emission(z, u)
        shape = d.batch_shape + d.event_shape
        return jnp.sum(log_prob_observed(d, y.reshape(shape)))

    def moments(self, z: Array, u: Array | None = None) -> EmissionMoments:
        """Mean and noise of the observation (of its `statistic`) at the state `z`."""
        return moments_of(self.emission(z, u))

    def statistic(self, y: Array, u: Array | None = None) -> Array:
        """`s(y)` of one observation or of a series, as in `EmissionMoments`."""
        return statistic_of(self.emission(self.m0, u), y)

    def is_gaussian(self, u: Array | None = None) -> bool:
        """Whether the emission is normal given the state."""
        return isinstance(base_of(self.emission(self.m0, u)), dist.Normal | dist.MultivariateNormal)

    def check_series(self, y: ArrayLike, u: ArrayLike | None) -> tuple[Array, Array | None]:
        """Data `(time, obs)` and inputs `(time, input)` or None, checked."""
        series = as_float("y", y)
        inputs = None if u is None else as_float("u", u)
        inputs = inputs[:, None] if inputs is not None and inputs.ndim == 1 else inputs
        first = None if inputs is None else inputs[0]
        check_step(self.transition, self.m0, first)
        self.noise_columns(first)
        size = self.emission_size(first)
        series = series[:, None] if series.ndim == 1 and size == 1 else series
        if series.ndim != 2 or series.shape[1] != size or not len(series):
            raise ValueError(f"`y` must have shape (time, {size}) with at least one step; got {series.shape}.")
        check_finite("y", series, allow_nan=True)
        if inputs is not None and (inputs.ndim != 2 or len(inputs) != len(series)):
            raise ValueError(f"`u` must have shape ({len(series)}, input); got {inputs.shape}.")
        if self.time_varying and len(self.chol_Q) != len(series):
            raise ValueError(f"`chol_Q` must have {len(series)} time steps, as `y` has; got {len(self.chol_Q)}.")
        dtype = jnp.result_type(self.m0, series)
        return series.astype(dtype), None if inputs is None else inputs.astype(dtype)

    def emission_size(self, u: Array | None = None) -> int:
        """Number of observed variables."""
        d = jax.eval_shape(lambda: self.emission(self.m0, u))
        shape = d.batch_shape + d.event_shape
        if len(shape) > 1:
            raise ValueError(f"`emission` must give a distribution over a vector or a number; its draws are {shape}.")
        return shape[0] if shape else 1

    def simulate(self, key: KeyLike, num_steps: int, u: ArrayLike | None = None) -> tuple[Array, Array]:
        """Draws states `(time, state)` and observations `(time, obs)`."""
        key = as_key(key)
        inputs = None if u is None else as_float("u", u)
        inputs = inputs[:, None] if inputs is not None and inputs.ndim == 1 else inputs
        if inputs is not None and len(inputs) != num_steps:
            raise ValueError(f"`u` must have {num_steps} time steps; got shape {inputs.shape}.")
        u_first = None if inputs is None else inputs[0]
        check_step(self.transition, self.m0, u_first)
        first, later, seen = jax.random.split(key, 3)
        z = self.m0 + self.chol_P0 @ standard_normal(first, self.m0.shape, self.m0.dtype)
        noise = standard_normal(later, (num_steps, self.noise_columns(u_first)), self.m0.dtype)

        def step(z: Array, t: Array) -> tuple[Array, Array]:
            u = None if inputs is None else inputs[t]
            new = self.transition(z, u) + self.noise(t, z, u) @ noise[t]
            return new, new

        path = jnp.concatenate([z[None], jax.lax.scan(step, z, jnp.arange(1, num_steps))[1]])

        def observed(key: Key, z: Array, u: Array | None) -> Array:
            return jnp.atleast_1d(draw(self.emission(z, u), key)).astype(self.m0.dtype)

        return path, jax.vmap(observed)(jax.random.split(seen, num_steps), path, inputs)

    def __repr__(self) -> str:
        try:
            return f"NonlinearSSM(n_state={self.n_state}, n_obs={self.emission_size()})"
        except Exception:  # noqa: BLE001 - the emission needs inputs, or leaves are not arrays: no sizes to show
            return "NonlinearSSM"

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arrays, and static data."""
        noise = (None, None) if self._noise is None else self._noise
        children = self.m0, self.chol_P0, self._chol_Q, self._transition[0], self._emission[0], noise[0]
        # As leaves and structure: two models of the same functions then share their compiled programs.
        leaves, structure = jax.tree.flatten((self._transition[1], self._emission[1], noise[1]))
        return children, (tuple(leaves), structure, self.time_varying, self._emission_takes_inputs)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> "NonlinearSSM":
        """Rebuilds without checks."""
        model = object.__new__(cls)
        model.m0, model.chol_P0, model._chol_Q, transition, emission, noise = children
        own, seen, noisy = jax.tree.unflatten(static[1], static[0])
        model._transition, model._emission = (transition, own), (emission, seen)
        model._noise = None if noisy is None else (noise, noisy)
        model.time_varying, model._emission_takes_inputs = static[2:]
        return model


def check_nonlinear(model: Any) -> NonlinearSSM:
    """The model, a linear one converted; refuses anything else."""
    if isinstance(model, LinearGaussianSSM):
        return NonlinearSSM.from_linear(model)
    if not isinstance(model, NonlinearSSM):
        raise TypeError(f"`model` must be a NonlinearSSM or a LinearGaussianSSM; got {type(model).__name__}.")
    return model


def _normal(
    chol: Array, C: Array, d: Array | None, D: Array | None, z: Array, u: Array | None
) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(affine(C, d, D, z, u), scale_tril=chol)


def _emission_at(model: NonlinearSSM, z: Array, u: Array | None) -> dict[str, Array]:
    """Slope, offset and noise of a normal emission about `z`."""
    mean, factor = model.moments(z, u)
    C = jax.jacfwd(lambda z: model.moments(z, u).mean)(z)
    return {"C": C, "d": mean - matvec(C, z), "chol_R": jnp.diag(factor) if factor.ndim == 1 else factor}


def _about_state(model: NonlinearSSM, z: Array, u: Array | None) -> LinearGaussianSSM:
    A = jax.jacfwd(model.transition)(z, u)
    found = {"A": A, "b": model.transition(z, u) - matvec(A, z), **_emission_at(model, z, u)}
    if u is not None:
        found["B"] = jax.jacfwd(model.transition, 1)(z, u)
        found["D"] = jax.jacfwd(lambda u: model.moments(z, u).mean)(u)
        found |= {"b": found["b"] - matvec(found["B"], u), "d": found["d"] - matvec(found["D"], u)}
    return LinearGaussianSSM(model.m0, model.chol_P0, chol_Q=model.chol_Q, time_varying=model.time_varying, **found)


def _about_path(model: NonlinearSSM, path: Array, u: Array | None) -> LinearGaussianSSM:
    if model.time_varying and len(model.chol_Q) != len(path):
        raise ValueError(f"`about` must have {len(model.chol_Q)} time steps, as `chol_Q` has; got {len(path)}.")
    before = jnp.concatenate([path[:1], path[:-1]])  # entry 0 is not used

    def into(z: Array, u: Array | None) -> dict[str, Array]:
        A = jax.jacfwd(model.transition)(z, u)
        return {"A": A, "b": model.transition(z, u) - matvec(A, z)}

    found = jax.vmap(into)(before, u) | jax.vmap(lambda z, u: _emission_at(model, z, u))(path, u)
    timed = (*found, *model.time_varying)
    return LinearGaussianSSM(model.m0, model.chol_P0, chol_Q=model.chol_Q, time_varying=timed, **found)
