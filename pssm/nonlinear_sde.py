"""Nonlinear stochastic differential equations observed at any times, as a `NonlinearSSM`.

    dz = f(z, u) dt + L dW,    Cov(dW) = 1 dt,    y_i ~ p(. | z(t_i))

Between two observations the mean moves along `f` (an Euler step, a Runge-Kutta step, or an adaptive solver), and the
noise `N(0, L L' gap)` comes in at the end: Euler-Maruyama where the mean takes an Euler step. This is a first-order
approximation in the gap, whatever moves the mean. `refine` puts times without observations into long gaps; as they get
short the model becomes the equation.

Source:
    Maruyama 1955; Kloeden & Platen 1992, chapters 10 and 14; Särkkä & Solin 2019, chapter 8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from pssm._checks import as_float, check_choice, unmasked
from pssm._types import Array, ArrayLike, Float
from pssm.nonlinear import NonlinearSSM, takes_two
from pssm.sde import gaps_between

__all__ = ["NonlinearSDE", "refine", "runge_kutta"]

Field = Callable[[Array], Array]
FLOWS = ("euler", "runge_kutta", "diffrax")
MAX_STEPS = 1024  # of the adaptive solver, in one gap


class NonlinearSDE(NamedTuple):
    """An equation of motion, with its start and its emission.

    Attributes:
        drift: `f(z, u) -> (state,)`, per unit of time; `u` is None without inputs. A plain function or a pytree.
        L: diffusion, `(state, noise)`, per square root of time; the same in every state.
        m0: mean of the first state, `(state,)`.
        chol_P0: factor of its covariance, `(state, state)`.
        emission: `g(z)` or `g(z, u)`, a NumPyro distribution over one observation.
    """

    drift: Callable[..., Array]
    L: ArrayLike
    m0: ArrayLike
    chol_P0: ArrayLike
    emission: Callable[..., dist.Distribution]

    def at(self, t: ArrayLike, u: ArrayLike | None = None, *, flow: str = "euler") -> tuple[NonlinearSSM, Array]:
        """The model of observations at the times `t`, and the inputs to give along with it.

        Args:
            t: times `(time,)`, in order; equal times are allowed.
            u: inputs `(time, input)`; row i holds from `t[i - 1]` to `t[i]`.
            flow: how the mean moves over a gap: "euler" and "runge_kutta" take one step; "diffrax" an adaptive solver
                (`Tsit5`), which needs the extra `pssm-numpyro[ode]`.

        Returns:
            `(model, inputs)`. The inputs `(time, 1 + input)` hold the gap before each time, and then `u`: give them as
            `u` to every function that takes the model.

        Raises:
            ValueError: a shape does not fit, or `flow` is unknown.
            ImportError: `flow="diffrax"` without that package.

        Example:
            >>> from pssm import gaussian_filter
            >>> swing = NonlinearSDE(lambda z, u: jnp.stack([z[1], -jnp.sin(z[0])]), [[0.0], [0.1]], [1.0, 0.0],
            ...                      0.1 * jnp.eye(2), lambda z: dist.Normal(z[:1], 0.1).to_event(1))
            >>> model, inputs = swing.at([0.0, 0.1, 0.15, 0.4])
            >>> gaussian_filter(model, [1.0, 1.0, float("nan"), 0.9], inputs).mean.shape
            (4, 2)
        """
        check_choice("flow", flow, FLOWS)
        gaps = gaps_between(t)
        inputs = gaps[:, None]
        if u is not None:
            given = as_float("u", u)
            given = given[:, None] if given.ndim == 1 else given
            if given.ndim != 2 or len(given) != len(gaps):
                raise ValueError(f"`u` must have shape ({len(gaps)}, input); got {given.shape}.")
            inputs = jnp.concatenate([inputs, given], axis=1)
        move = {"euler": _euler, "runge_kutta": runge_kutta, "diffrax": _diffrax}[flow]
        if flow == "diffrax":
            _import_diffrax()
        L = as_float("L", self.L)
        emission = self.emission
        if takes_two(emission):
            emission = jax.tree_util.Partial(_emitted, emission)
        model = NonlinearSSM(
            self.m0,
            self.chol_P0,
            jax.tree_util.Partial(_moved, move, self.drift),
            jnp.sqrt(gaps)[:, None, None] * L,
            emission,
            time_varying=("chol_Q",),
        )
        return model, inputs


def refine(
    t: ArrayLike, y: ArrayLike, max_gap: float, u: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """Times without observations, put evenly into gaps that are longer than `max_gap`.

    Args:
        t: times `(time,)`, in order.
        y: observations `(time, obs)` or `(time,)`.
        max_gap: the longest gap that is left.
        u: inputs `(time, input)`, each held over the gap before its time.

    Returns:
        Times, observations with rows of NaN, inputs or None, and which of the times were there, `(more times,)`.

    Example:
        >>> times, series, _, given = refine([0.0, 1.0, 1.2], [0.5, 0.7, 0.1], 0.5)
        >>> times.tolist(), given.tolist()
        ([0.0, 0.5, 1.0, 1.2], [True, False, True, True])
    """
    if not max_gap > 0:
        raise ValueError(f"`max_gap` must be positive; got {max_gap}.")
    gaps = np.asarray(gaps_between(t))
    times, series = np.asarray(t, float), np.asarray(unmasked(y), float)
    if len(series) != len(times):
        raise ValueError(f"`y` must have {len(times)} time steps, as `t` has; got {len(series)}.")
    pieces = np.maximum(np.ceil(gaps / max_gap * (1 - 1e-6)).astype(int), 1)
    owner = np.repeat(np.arange(len(times)), pieces)  # the time that ends the gap
    last = np.cumsum(pieces) - 1
    given = np.zeros(len(owner), bool)
    given[last] = True
    back = (last[owner] - np.arange(len(owner))) / pieces[owner]
    filled = np.full((len(owner), *series.shape[1:]), np.nan)
    filled[given] = series
    return times[owner] - back * gaps[owner], filled, None if u is None else np.asarray(u)[owner], given


def runge_kutta(field: Field, z: Float[Array, " state"], step: ArrayLike) -> Float[Array, " state"]:
    """One step of the classical Runge-Kutta method along `dz/dt = field(z)`."""
    once = jax.lax.optimization_barrier  # else XLA computes the earlier stages again wherever a later one needs them
    k1 = once(field(z))
    k2 = once(field(once(z + 0.5 * step * k1)))
    k3 = once(field(once(z + 0.5 * step * k2)))
    k4 = once(field(once(z + step * k3)))
    return once(z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))


def _euler(field: Field, z: Array, step: ArrayLike) -> Array:
    return z + step * field(z)


def _diffrax(field: Field, z: Array, step: ArrayLike) -> Array:
    """The flow by an adaptive solver; steps are differentiated as they were taken, forwards or backwards."""
    diffrax = _import_diffrax()
    close = float(jnp.finfo(z.dtype).eps) ** 0.6  # 7e-5 in single precision, 4e-10 in double
    found: Any = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, args: field(z)),
        diffrax.Tsit5(),
        jnp.zeros_like(step),
        step,
        None,
        z,
        stepsize_controller=diffrax.PIDController(rtol=close, atol=close),
        adjoint=diffrax.DirectAdjoint(),
        max_steps=MAX_STEPS,
        throw=False,  # NaN where it took too many steps
    )
    return jnp.where(found.result == diffrax.RESULTS.successful, found.ys[-1], jnp.nan)


def _import_diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ImportError('`flow="diffrax"` needs diffrax: pip install "pssm-numpyro[ode]".') from error
    return diffrax


def _moved(move: Callable[..., Array], drift: Callable[..., Array], z: Array, inputs: Array) -> Array:
    u = inputs[1:] if len(inputs) > 1 else None
    return move(lambda z: drift(z, u), z, inputs[0])


def _emitted(emission: Callable[..., dist.Distribution], z: Array, inputs: Array) -> dist.Distribution:
    return emission(z, inputs[1:])
