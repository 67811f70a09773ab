"""The vocabulary: the linear-Gaussian state-space model.

    z_1 ~ N(m0, P0)
    z_t = A_t z_{t-1} + b_t + B_t u_t + w_t,   w_t ~ N(0, Q_t),   t = 2..T
    y_t = C_t z_t + d_t + D_t u_t + v_t,       v_t ~ N(0, R_t),   t = 1..T

Covariances enter as factors, `Q = chol_Q chol_Q'`: any matrix with that product, triangular or not, and singular is
normal. The first observation comes from `z_1` itself: no transition stands before it. An entry of a time-varying array
acts on the step INTO its time, so entry 0 of `A`, `b`, `B` and `chol_Q` is never used.

A state may have a diffuse start: `P0 -> kappa` times the identity on such states, and `kappa -> infinity`, exactly. The
log-likelihood of data is then the limit of `log p(y) + (r / 2) log(2 pi kappa)`, with `r` the number of directions of
the start that the data determine: all of the diffuse states, in a series that is long enough.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_choice, check_finite, check_shape, is_traced
from pssm._types import Array, ArrayLike, Float
from pssm.fields import FIELDS as FIELDS
from pssm.fields import TRANSITION as TRANSITION
from pssm.fields import checked, split_diffuse
from pssm.linalg import factors_from_covariances, outer
from pssm.linalg.small import along_time


@jax.tree_util.register_pytree_with_keys_class
class LinearGaussianSSM:
    """A linear-Gaussian state-space model, `p(z_{1:T}, y_{1:T} | u_{1:T})` of the module's head.

    A pytree: it passes through `jit`, `grad` and `vmap`. Leading axes in front of those listed are batch axes and
    broadcast against each other; so a plate of models is one object.

    Args:
        m0: mean of the first state, `(state,)`.
        chol_P0: factor of its covariance, `(state, state)`.
        A: transition, acts from the left: `(state, state)`.
        chol_Q: factor of the transition noise, `(state, noise)`; fewer columns than rows is a singular `Q`.
        C: emission, `(obs, state)`.
        chol_R: factor of the observation noise, `(obs, obs)`.
        b: offset of the transition, `(state,)`.
        d: offset of the emission, `(obs,)`.
        B: effect of the inputs on the state, `(state, input)`.
        D: effect of the inputs on the observation, `(obs, input)`.
        time_varying: names of the arguments that carry a time axis in front of the axes above, as in
            `time_varying=("A", "C")`. Never guessed from the number of axes.
        diffuse: which states have a diffuse start, a boolean mask `(state,)`, see the module's head; what `chol_P0`
            says of them does not count. An infinite entry on the diagonal of `chol_P0` says the same, unless it is
            computed inside of `jit`, where nobody sees it. They count from their `m0`; the prior has no draws of them,
            so `simulate` starts them there.

    Raises:
        ValueError: a shape does not fit, a value is not finite, or `time_varying` names something else.
        TypeError: an argument is not numeric.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.eye(1)
        >>> LinearGaussianSSM(jnp.zeros(1), 1e3 * one, one, 38.3 * one, one, 122.9 * one)
        LinearGaussianSSM(n_state=1, n_obs=1, n_input=0)
        >>> LinearGaussianSSM(jnp.zeros(1), 0 * one, one, 38.3 * one, one, 122.9 * one, diffuse=[True])
        LinearGaussianSSM(n_state=1, n_obs=1, n_input=0, diffuse=(True,))
    """

    def __init__(
        self,
        m0: ArrayLike,
        chol_P0: ArrayLike,
        A: ArrayLike,
        chol_Q: ArrayLike,
        C: ArrayLike,
        chol_R: ArrayLike,
        *,
        b: ArrayLike | None = None,
        d: ArrayLike | None = None,
        B: ArrayLike | None = None,
        D: ArrayLike | None = None,
        time_varying: tuple[str, ...] = (),
        diffuse: ArrayLike | None = None,
    ):
        given = dict(m0=m0, chol_P0=chol_P0, A=A, chol_Q=chol_Q, C=C, chol_R=chol_R, b=b, d=d, B=B, D=D)
        fields, self.time_varying, self.diffuse = checked(given, time_varying, diffuse)
        for name, x in fields.items():
            setattr(self, name, x)
        _ = self.batch_shape  # raises where batch axes do not broadcast

    m0: Float[Array, "*batch state"]
    chol_P0: Float[Array, "*batch state state"]
    A: Float[Array, "*batch state state"]
    chol_Q: Float[Array, "*batch state noise"]
    C: Float[Array, "*batch obs state"]
    chol_R: Float[Array, "*batch obs obs"]
    b: Float[Array, "*batch state"] | None
    d: Float[Array, "*batch obs"] | None
    B: Float[Array, "*batch state input"] | None
    D: Float[Array, "*batch obs input"] | None
    time_varying: tuple[str, ...]
    diffuse: tuple[bool, ...]

    @classmethod
    def from_covariances(
        cls,
        m0: ArrayLike,
        P0: ArrayLike,
        A: ArrayLike,
        Q: ArrayLike,
        C: ArrayLike,
        R: ArrayLike,
        *,
        b: ArrayLike | None = None,
        d: ArrayLike | None = None,
        B: ArrayLike | None = None,
        D: ArrayLike | None = None,
        time_varying: tuple[str, ...] = (),
        diffuse: ArrayLike | None = None,
    ) -> "LinearGaussianSSM":
        """The same model from covariances `P0`, `Q`, `R` (singular welcome; at a zero, derivatives are one-sided).

        In `time_varying` say `"Q"` and `"R"`, or `"chol_Q"` and `"chol_R"`. States with an infinite variance in `P0`
        have a diffuse start.

        Raises:
            ValueError: a covariance has the wrong shape, is asymmetric or has a negative eigenvalue.

        Example:
            >>> LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
            LinearGaussianSSM(n_state=1, n_obs=1, n_input=0)
        """
        found = {}
        n_obs = np.shape(C)[-2] if np.ndim(C) >= 2 else None
        n_state = np.shape(A)[-1] if np.ndim(A) >= 2 else None
        for name, cov, size in (("P0", P0, n_state), ("Q", Q, n_state), ("R", R, n_obs)):
            array = as_float(name, cov)
            if array.ndim < 2 or array.shape[-1] != array.shape[-2] or (size is not None and array.shape[-1] != size):
                raise ValueError(
                    f"`{name}` must be a covariance matrix of shape ({size}, {size}); got shape {array.shape}."
                )
            found[name] = array
        if n_state is not None:
            diffuse, found["P0"] = split_diffuse(diffuse, P0, found["P0"], n_state, covariance=True)
        factors = factors_from_covariances(found, as_float("C", C))
        renamed = tuple({"Q": "chol_Q", "R": "chol_R"}.get(name, name) for name in time_varying)
        factors = factors["P0"], A, factors["Q"], C, factors["R"]
        return cls(m0, *factors, b=b, d=d, B=B, D=D, time_varying=renamed, diffuse=diffuse)

    @property
    def n_state(self) -> int:
        """Size of the state."""
        return self.A.shape[-1]

    @property
    def n_obs(self) -> int:
        """Number of observed variables."""
        return self.C.shape[-2]

    @property
    def n_input(self) -> int:
        """Number of input variables; 0 where neither `B` nor `D` is given."""
        return next((x.shape[-1] for x in (self.B, self.D) if x is not None), 0)

    @property
    def num_steps(self) -> int | None:
        """Length of the time-varying arrays; None for a time-invariant model."""
        for name in self.time_varying:
            return getattr(self, name).shape[-1 - len(FIELDS[name])]
        return None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch of models; `()` for one."""
        shapes = {name: self.batch_dims(name) for name in FIELDS if getattr(self, name) is not None}
        try:
            return jnp.broadcast_shapes(*shapes.values())
        except ValueError:
            found = ", ".join(f"`{name}` {shape}" for name, shape in shapes.items() if shape)
            raise ValueError(
                f"Leading (batch) axes do not broadcast: {found}. An array with a time axis must be named in "
                "`time_varying`."
            ) from None

    def batch_dims(self, name: str) -> tuple[int, ...]:
        """Batch axes of one field."""
        x = getattr(self, name)
        return x.shape[: x.ndim - len(FIELDS[name]) - (name in self.time_varying)]

    @property
    def P0(self) -> Array:
        """Covariance of the first state; infinite where its start is diffuse."""
        both = np.asarray(self.diffuse or False)
        return jnp.where(both & np.eye(self.n_state, dtype=bool), jnp.inf, outer(self.chol_P0))

    @property
    def Q(self) -> Array:
        """Covariance of the transition noise."""
        return outer(self.chol_Q)

    @property
    def R(self) -> Array:
        """Covariance of the observation noise."""
        return outer(self.chol_R)

    @property
    def dtype(self) -> Any:
        """Floating-point type of the model."""
        return self.A.dtype

    def replace(self, **fields: ArrayLike) -> "LinearGaussianSSM":
        """A copy with some fields replaced, checked again."""
        for name in fields:
            check_choice("field", name, [*FIELDS, "time_varying", "diffuse"])
        current = {name: getattr(self, name) for name in (*FIELDS, "time_varying", "diffuse")}
        return LinearGaussianSSM(**{**current, **fields})

    def astype(self, dtype: Any) -> "LinearGaussianSSM":
        """The model in another floating-point type."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def steps(self, start: int, stop: int) -> "LinearGaussianSSM":
        """The model with its time-varying arrays cut to `start:stop`."""
        fields = {name: getattr(self, name) for name in FIELDS}
        cut = {
            name: jax.lax.slice_in_dim(fields[name], start, stop, axis=fields[name].ndim - 1 - len(FIELDS[name]))
            for name in self.time_varying
        }
        return rebuild({**fields, **cut}, self.time_varying, self.diffuse)

    def with_time_axis(self, name: str) -> Array:
        """A field with a time axis in front of its own axes, of length 1 where it does not vary: for broadcasting."""
        x = getattr(self, name)
        return x if name in self.time_varying else jnp.expand_dims(x, -1 - len(FIELDS[name]))

    def signal(self, z: ArrayLike, u: ArrayLike | None = None) -> Float[Array, "*batch time obs"]:
        """`C_t z_t + d_t + D_t u_t` for whole paths: what is observed, without the noise.

        Args:
            z: paths `(..., time, state)`.
            u: inputs `(..., time, input)`, where the model has `D`.

        Returns:
            `(..., time, obs)`. Batch axes of model, paths and inputs broadcast against each other.

        Raises:
            ValueError: `z`, `u` and the time-varying arrays are not of one length, or `u` is absent where it is needed.

        Example:
            >>> import jax.numpy as jnp
            >>> one = jnp.eye(1)
            >>> trend = LinearGaussianSSM([0.0], one, one, one, one, one, d=[[1.0], [2.0], [3.0]], time_varying=("d",))
            >>> trend.signal(jnp.zeros((3, 1)))[:, 0].tolist()
            [1.0, 2.0, 3.0]
        """
        path = as_float("z", z)
        num_steps = path.shape[-2] if path.ndim > 1 else 1
        check_shape("z", path, (num_steps, self.n_state), "time, state")
        check_num_steps(self, num_steps, "`z`")
        mean = along_time(self.C, path, "C" in self.time_varying)
        if self.d is not None:
            mean = mean + self.with_time_axis("d")
        if self.D is None:
            return mean
        inputs = check_inputs(self, u, num_steps)
        return mean + along_time(self.D, inputs, "D" in self.time_varying)

    def at(self, values: dict[str, Array]) -> "LinearGaussianSSM":
        """The model at one time: time-varying fields replaced by the step's `values`, nothing checked (for scans).

        It stands for itself, without what is said of the start of a series.
        """
        return rebuild({**{name: getattr(self, name) for name in FIELDS}, **values}, ())

    def at_time(self, t: Array | int) -> "LinearGaussianSSM":
        """The model of one step, as `predict` and `update` take it: transition INTO time `t` and emission at it.

        Args:
            t: the time, 0 for the first observation.

        Raises:
            ValueError: `t` lies outside of the time-varying arrays; at a traced `t`, in a scan, they are NaN.
        """
        if self.num_steps is None:
            return self.at({})
        inside = (t >= 0) & (t < self.num_steps)
        if not is_traced(t) and not inside:
            raise ValueError(f"`t` must be from 0 to {self.num_steps - 1}; got {t}.")
        values = {}
        for name in self.time_varying:
            x = getattr(self, name)
            x = jax.lax.dynamic_index_in_dim(x, t, x.ndim - 1 - len(FIELDS[name]), keepdims=False)
            values[name] = jnp.where(inside, x, jnp.nan)
        return self.at(values)

    def starting_at(self, mean: Array, chol: Array) -> "LinearGaussianSSM":
        """The model with another first state, of finite spread; nothing checked (for scans)."""
        return rebuild(
            {name: getattr(self, name) for name in FIELDS} | {"m0": mean, "chol_P0": chol}, self.time_varying
        )

    def __repr__(self) -> str:
        timed = f", time_varying={self.time_varying}" if self.time_varying else ""
        timed += f", diffuse={self.diffuse}" if self.diffuse else ""
        try:
            batch = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
            return (
                f"LinearGaussianSSM(n_state={self.n_state}, n_obs={self.n_obs}, n_input={self.n_input}{batch}{timed})"
            )
        except (AttributeError, IndexError):  # leaves that are not arrays, as in a tree of vmap axes
            return f"LinearGaussianSSM({', '.join(f'{name}={getattr(self, name)}' for name in FIELDS)}{timed})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[tuple, tuple]]:
        """Fields in the order of `FIELDS`; `time_varying` and `diffuse` are static."""
        leaves = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in FIELDS]
        return leaves, (self.time_varying, self.diffuse)

    @classmethod
    def tree_unflatten(cls, static: tuple[tuple, tuple], leaves: tuple[Any, ...]) -> "LinearGaussianSSM":
        """Rebuilds without checks: leaves may be tracers, axes numbers or placeholders."""
        return rebuild(dict(zip(FIELDS, leaves, strict=True)), *static)


def rebuild(fields: dict[str, Any], time_varying: tuple[str, ...], diffuse: tuple[bool, ...] = ()) -> Any:
    """A model from its fields as they are: nothing is converted or checked, leaves may be tracers or placeholders."""
    model = object.__new__(LinearGaussianSSM)
    for name, x in fields.items():
        setattr(model, name, x)
    model.time_varying, model.diffuse = time_varying, diffuse
    return model


def check_model(ssm: Any) -> None:
    """Refuses what is not a `LinearGaussianSSM`."""
    if not isinstance(ssm, LinearGaussianSSM):
        raise TypeError(f"`ssm` must be a LinearGaussianSSM; got {type(ssm).__name__}.")


def check_proper(ssm: LinearGaussianSSM) -> None:
    """Refuses a diffuse start where a prior of the states is needed."""
    if ssm.diffuse:
        raise ValueError(
            "`ssm` has a diffuse start, which is no prior for a path. Integrate the states out "
            "(`LinearGaussianMarginal`, `kalman_smoother`), or give them a finite `chol_P0` and `diffuse=None`."
        )


def check_inputs(ssm: LinearGaussianSSM, u: ArrayLike | None, num_steps: int, name: str = "u") -> Array | None:
    """Inputs `u` of shape `(..., num_steps, n_input)`, present exactly where the model has `B` or `D`."""
    if u is None:
        if ssm.n_input:
            raise ValueError(f"`{name}` is required, of shape ({num_steps}, {ssm.n_input}): the model has `B` or `D`.")
        return None
    if not ssm.n_input:
        raise ValueError(f"`{name}` is given, but the model has neither `B` nor `D` to use it.")
    inputs = as_float(name, u)
    if inputs.ndim == 1 and ssm.n_input == 1:
        inputs = inputs[:, None]
    check_shape(name, inputs, (num_steps, ssm.n_input), "time, input")
    check_finite(name, inputs)
    return inputs


def check_num_steps(ssm: LinearGaussianSSM, num_steps: int, source: str, *, or_more: bool = False) -> None:
    """Compares the length of time-varying arrays with the number of steps at hand."""
    length = ssm.num_steps
    if length is None or length == num_steps or (or_more and length > num_steps):
        return
    names = ", ".join(f"`{name}`" for name in ssm.time_varying)
    least = "at least " if or_more else ""
    raise ValueError(f"{names} must have {least}{num_steps} time steps, as {source} has; got {length}.")
