"""The S5 layer: a diagonal linear recurrence of complex states, run over time in parallel.

    x_t = a x_{t-1} + B~ u_t,   y_t = 2 Re(C x_t) + d u_t,    a = exp(lambda dt),   B~ = lambda^{-1} (a - 1) B

Complex states come in conjugate pairs; one of each pair is kept. The start is the normal part of the HiPPO matrix,
whose states hold the past's Legendre coefficients. It mixes a sequence and is no model of one.

Source:
    Smith, Warrington & Linderman 2023 (S5); Gu, Dao, Ermon, Rudra & Re 2020 (HiPPO).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, KeyLike
from pssm.nets.mixers import Outputs, Sequence


def hippo_normal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues with positive imaginary part, `(size / 2,)`, of HiPPO-LegS's normal part, and their eigenvectors.

    With `P_i = sqrt(i + 1/2)`, `A + P P'` is -1/2 on its diagonal and antisymmetric off it, hence normal.
    """
    i = np.arange(size)
    root = np.sqrt(1 + 2 * i)
    A = -(np.tril(root[:, None] * root) - np.diag(i)) + np.sqrt(i + 0.5)[:, None] * np.sqrt(i + 0.5)
    frequencies, vectors = np.linalg.eigh(-1j * (A + 0.5 * np.eye(size)))
    kept = np.argsort(frequencies)[size // 2 :]
    return -0.5 + 1j * frequencies[kept], vectors[:, kept]


class S5(eqx.Module):
    """Layers of S5: norm, recurrence, GELU, a gate, and the input added.

    Args:
        in_size: size of an input.
        size: size of an output.
        n_state: real size of the recurrence (half as many complex states), divisible by `2 blocks`.
        blocks: number of copies of the start's matrix, each of `n_state / blocks` states.
        depth: number of layers.
        dt: range that the step sizes are drawn from, evenly in the logarithm.
        key: random key.
    """

    into: eqx.nn.Linear
    layers: list["S5Layer"]

    causal = True

    def __init__(
        self,
        in_size: int,
        size: int,
        *,
        n_state: int = 64,
        blocks: int = 1,
        depth: int = 1,
        dt: tuple[float, float] = (1e-3, 1e-1),
        key: KeyLike,
    ):
        key = as_key(key)
        first, *keys = jax.random.split(key, check_count("depth", depth) + 1)
        self.into = eqx.nn.Linear(in_size, size, key=first)
        self.layers = [S5Layer(size, n_state, blocks=blocks, dt=dt, key=k) for k in keys]

    @property
    def size(self) -> int:
        """Size of an output."""
        return self.into.out_features

    def start(self) -> list[tuple[Array, Array]]:
        """The states before the first step, real and imaginary parts."""
        return [layer.start() for layer in self.layers]

    def step(self, state: list[tuple[Array, Array]], x: Array) -> tuple[list[tuple[Array, Array]], Array]:
        """One step."""
        x, new = self.into(x), []
        for layer, old in zip(self.layers, state, strict=True):
            own, x = layer.step(old, x)
            new.append(own)
        return new, x

    def __call__(self, x: Sequence) -> Outputs:
        """All steps, by an associative scan: on a parallel machine the time grows with the logarithm of `time`."""
        x = jax.vmap(self.into)(x)
        for layer in self.layers:
            x = layer(x)
        return x


class S5Layer(eqx.Module):
    """One layer of `S5`; complex arrays are stored as real and imaginary parts, which every optimiser understands."""

    log_decay: Array
    frequency: Array
    B: tuple[Array, Array]
    C: tuple[Array, Array]
    d: Array
    log_dt: Array
    norm: eqx.nn.LayerNorm
    gate: eqx.nn.Linear

    def __init__(self, size: int, n_state: int, *, blocks: int, dt: tuple[float, float], key: KeyLike):
        key = as_key(key)
        if check_count("n_state", n_state) % (2 * check_count("blocks", blocks)):
            raise ValueError(f"`n_state` must be divisible by 2 `blocks` ({2 * blocks}); got {n_state}.")
        eigenvalues, vectors = hippo_normal(n_state // blocks)
        keys = jax.random.split(key, 5)
        half, rows = n_state // 2, n_state // blocks
        dtype = jnp.result_type(float)
        self.log_decay = jnp.asarray(np.tile(np.log(-np.real(eigenvalues)), blocks), dtype)
        self.frequency = jnp.asarray(np.tile(np.imag(eigenvalues), blocks), dtype)
        B = jax.random.normal(keys[0], (blocks, rows, size), dtype) / np.sqrt(size)
        B = jnp.einsum("rk,brs->bks", vectors.conj(), B).reshape(half, size)
        C = jax.random.normal(keys[1], (size, blocks, rows), dtype) / np.sqrt(n_state)
        C = jnp.einsum("sbr,rk->sbk", C, vectors).reshape(size, half)
        self.B, self.C = ((jnp.real(M).astype(dtype), jnp.imag(M).astype(dtype)) for M in (B, C))
        self.d = jax.random.normal(keys[2], (size,), dtype)
        low, high = np.log(dt)
        self.log_dt = jax.random.uniform(keys[3], (half,), dtype, low, high)
        self.norm, self.gate = eqx.nn.LayerNorm(size), eqx.nn.Linear(size, size, key=keys[4])

    def start(self) -> tuple[Array, Array]:
        """The state before the first step."""
        zero = jnp.zeros_like(self.frequency)
        return zero, zero

    def step(self, state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        """One step."""
        a, B = self._discrete()
        u = self.norm(x)
        z = jnp.asarray(a * jax.lax.complex(*state) + B @ u)
        return (z.real, z.imag), self._finish(x, u, z)

    def __call__(self, x: Sequence) -> Outputs:
        """All steps."""
        a, B = self._discrete()
        u = jax.vmap(self.norm)(x)

        def after(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
            return then[0] * first[0], then[0] * first[1] + then[1]

        drive = u @ B.T
        z = jax.lax.associative_scan(after, (jnp.broadcast_to(a, drive.shape), drive))[1]
        return jax.vmap(self._finish)(x, u, z)

    def _discrete(self) -> tuple[Array, Array]:
        """`a` and `B~`: the input is held between steps (ZOH)."""
        decay = -jnp.exp(self.log_decay)
        rate = jax.lax.complex(decay, self.frequency)
        a = jnp.exp(rate * jnp.exp(self.log_dt))
        return a, ((a - 1) / rate)[:, None] * jax.lax.complex(*self.B)

    def _finish(self, x: Array, u: Array, z: Array) -> Array:
        y = jax.nn.gelu(2 * (jax.lax.complex(*self.C) @ z).real + self.d * u)
        return x + y * jax.nn.sigmoid(self.gate(y))
