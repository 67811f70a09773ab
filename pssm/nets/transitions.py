"""Learned transitions `f(z, u) -> z'`, Equinox modules for `StatePath`, `NonlinearSSM` and `models.neural_ssm`.

All start close to the identity or to a contraction, so that the first paths stay in range. `Saturated` keeps any
transition in a range, also a polynomial drift, which can otherwise overflow in a few steps.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike

State = Float[Array, " state"]
Input = Float[Array, " input"]


def _join(z: Array, u: Array | None) -> Array:
    return z if u is None else jnp.concatenate([z, u])


class GatedTransition(eqx.Module):
    """Between a linear map and a perceptron, by a gate: `(1 - g) (W z + b) + g h(z, u)`; `W` starts as the identity.

    Args:
        n_state: size of the state.
        hidden: width of the two perceptrons, of `g` and of `h`.
        n_input: number of inputs.
        key: random key.

    Source:
        Krishnan, Shalit & Sontag 2017, equation 11.
    """

    linear: eqx.nn.Linear
    gate: eqx.nn.MLP
    proposal: eqx.nn.MLP

    def __init__(self, n_state: int, hidden: int = 64, *, n_input: int = 0, key: KeyLike):
        key = as_key(key)
        one, two, three = jax.random.split(key, 3)
        size = check_count("n_state", n_state) + n_input
        linear = eqx.nn.Linear(n_state, n_state, key=one)
        start = (jnp.eye(n_state), jnp.zeros(n_state))
        self.linear = eqx.tree_at(lambda m: (m.weight, m.bias), linear, start)
        self.gate = eqx.nn.MLP(size, n_state, hidden, 1, key=two)
        self.proposal = eqx.nn.MLP(size, n_state, hidden, 1, key=three)

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        x = _join(z, u)
        g = jax.nn.sigmoid(self.gate(x))
        return (1 - g) * self.linear(z) + g * self.proposal(x)


class GRUTransition(eqx.Module):
    """A gated recurrent unit between two linear maps: `W_2 GRU(u, W_1 z + b_1) + b_2`.

    Args:
        n_state: size of the state.
        hidden: width of the unit.
        n_input: number of inputs.
        key: random key.
    """

    into: eqx.nn.Linear
    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __init__(self, n_state: int, hidden: int = 64, *, n_input: int = 0, key: KeyLike):
        key = as_key(key)
        one, two, three = jax.random.split(key, 3)
        self.into = eqx.nn.Linear(check_count("n_state", n_state), hidden, key=one)
        self.cell = eqx.nn.GRUCell(max(n_input, 1), hidden, key=two)
        self.out = eqx.nn.Linear(hidden, n_state, key=three)

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        drive = jnp.zeros(1, z.dtype) if u is None else u
        return self.out(self.cell(drive, self.into(z)))


class ResidualTransition(eqx.Module):
    """A perceptron added to the state, `z + scale h(z, u)`; with `tanh` units a step is bounded.

    Args:
        n_state: size of the state.
        hidden: width of the perceptron.
        n_input: number of inputs.
        scale: factor of the step at the start; it is trained.
        key: random key.
    """

    mlp: eqx.nn.MLP
    scale: Array

    def __init__(self, n_state: int, hidden: int = 64, *, n_input: int = 0, scale: float = 0.1, key: KeyLike):
        key = as_key(key)
        size = check_count("n_state", n_state) + n_input
        self.mlp = eqx.nn.MLP(size, n_state, hidden, 1, activation=jnp.tanh, key=key)
        self.scale = jnp.asarray(scale, jnp.result_type(float))

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        return z + self.scale * self.mlp(_join(z, u))


class MechanicalTransition(eqx.Module):
    """Places and velocities: `v' = v + scale h(z, u)`, `x' = x + v'`, with the state `z = [x, v]` and a perceptron `h`.

    For motion with observed places alone, as in frames: with `num_read=state / 2` a decoder reads the places.

    Args:
        n_state: size of the state, even; its second half are the velocities, in places a step.
        hidden: width of the perceptron, of `tanh` units.
        n_input: number of inputs.
        scale: factor of the force at the start; it is trained.
        key: random key.
    """

    force: eqx.nn.MLP
    scale: Array

    def __init__(self, n_state: int, hidden: int = 64, *, n_input: int = 0, scale: float = 0.1, key: KeyLike):
        key = as_key(key)
        if check_count("n_state", n_state) % 2:
            raise ValueError(f"`n_state` must be even, for as many velocities as places; got {n_state}.")
        self.force = eqx.nn.MLP(n_state + n_input, n_state // 2, hidden, 1, activation=jnp.tanh, key=key)
        self.scale = jnp.asarray(scale, jnp.result_type(float))

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        place, velocity = jnp.split(z, 2)
        velocity = velocity + self.scale * self.force(_join(z, u))
        return jnp.concatenate([place + velocity, velocity])


class LocallyLinearTransition(eqx.Module):
    """A mixture of linear maps, `sum_k w_k (A_k z + B_k u)`, whose weights `w(z, u)` depend on state and input.

    Args:
        n_state: size of the state.
        num_bases: number of matrices; each starts near the identity.
        hidden: width of the perceptron that makes the weights.
        n_input: number of inputs.
        key: random key.

    Source:
        Karl, Soelch, Bayer & van der Smagt 2017; Becker et al. 2019.
    """

    A: Array
    B: Array
    weights: eqx.nn.MLP

    def __init__(self, n_state: int, num_bases: int = 8, hidden: int = 32, *, n_input: int = 0, key: KeyLike):
        key = as_key(key)
        one, two = jax.random.split(key)
        n, many = check_count("n_state", n_state), check_count("num_bases", num_bases)
        self.A = jnp.eye(n) + 0.05 * jax.random.normal(one, (many, n, n))
        self.B = jnp.zeros((many, n, n_input))
        self.weights = eqx.nn.MLP(n + n_input, many, hidden, 1, activation=jnp.tanh, key=two)

    def affine(self, z: State, u: Input | None = None) -> tuple[Float[Array, "state state"], State]:
        """`(F, b)` with `F z + b` the next state's mean, the weights being those at `(z, u)`."""
        w = jax.nn.softmax(self.weights(_join(z, u)))
        F = jnp.tensordot(w, self.A, 1)
        return F, jnp.zeros_like(z) if u is None else jnp.tensordot(w, self.B, 1) @ u

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        F, b = self.affine(z, u)
        return F @ z + b


class GraphTransition(eqx.Module):
    """A linear map that follows a graph: `sum_k L^k Z theta_k`, `Z` the state as `(node, feature)`.

    `L` is the symmetrically normalised adjacency, a constant that training does not change (see `nets.register`).

    Args:
        adjacency: weights of the edges, `(node, node)`, not negative; symmetric.
        num_features: features of a node; the state has `node num_features` entries, a node's together.
        hops: highest power of `L`.
        key: random key.
    """

    theta: Array
    graph: np.ndarray

    def __init__(self, adjacency: ArrayLike, num_features: int = 1, hops: int = 1, *, key: KeyLike):
        key = as_key(key)
        weights = np.asarray(as_float("adjacency", adjacency))
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not np.allclose(weights, weights.T):
            raise ValueError(f"`adjacency` must be a symmetric matrix (node, node); got shape {weights.shape}.")
        if weights.min() < 0:
            raise ValueError(f"`adjacency` must not be negative; its smallest entry is {weights.min():.3g}.")
        degree = np.sqrt(np.maximum(weights.sum(1), 1e-12))
        self.graph = weights / degree[:, None] / degree
        noise = jax.random.normal(key, (check_count("hops", hops, least=0) + 1, num_features, num_features))
        self.theta = (0.05 * noise).at[0].add(0.9 * jnp.eye(num_features))

    @property
    def matrix(self) -> Float[Array, "state state"]:
        """The transition as a matrix."""
        power, total = np.eye(len(self.graph)), 0.0
        for theta in self.theta:
            total = total + jnp.kron(jnp.asarray(power, theta.dtype), theta.T)
            power = power @ self.graph
        return jnp.asarray(total)

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        x = z.reshape(len(self.graph), -1)
        total = x @ self.theta[0]
        for theta in self.theta[1:]:
            x = jnp.asarray(self.graph, z.dtype) @ x
            total = total + x @ theta
        return total.ravel()


class Saturated(eqx.Module):
    """Another transition that cannot leave a ball of coordinates: `limit tanh(f(z, u) / limit)`, entry by entry.

    Well inside of the limit it is the transition itself, up to `(f / limit)^2 / 3` of it. It is part of the model.

    Args:
        transition: any transition.
        limit: largest absolute value of an entry, a number or `(state,)`.
    """

    transition: Callable
    limit: np.ndarray

    def __init__(self, transition: Callable, limit: ArrayLike):
        self.transition, self.limit = transition, np.asarray(as_float("limit", limit))
        if not (self.limit > 0).all():
            raise ValueError(f"`limit` must be positive; got {limit}.")

    def __call__(self, z: State, u: Input | None = None) -> State:
        """The next state's mean."""
        mean = self.transition(z, u)
        limit = jnp.asarray(self.limit, mean.dtype)
        return limit * jnp.tanh(mean / limit)
