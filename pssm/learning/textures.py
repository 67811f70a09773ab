"""Dynamic textures: moving water, smoke or leaves as a linear dynamical system over pixels.

A frame of `D` pixels is `x_t = mean + C z_t + v_t` with `v_t ~ N(0, sigma^2 1)` and `z_t = A z_{t-1} + w_t`. Where `C`
has orthonormal columns, the `n` numbers `C'(x_t - mean)` are a sufficient statistic for the state, for any `D`; so no
array here is larger than the frames themselves.

Source:
    Doretto, Chiuso, Wu & Soatto 2003. The printed least-squares formula for `A` and the names of the two residuals are
    corrected: `A` regresses each state on the one before, `w_t = z_{t+1} - A z_t` makes `Q`, and the residual of the
    frames, which has rank at most the number of frames, makes a multiple of the identity (Tipping & Bishop 1999).
"""

import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import also_called, check_choice, check_count
from pssm._keys import as_key
from pssm._types import ArrayLike, KeyLike
from pssm.filters import kalman_filter, kalman_smoother, simulate
from pssm.filters import log_likelihood as log_likelihood_of
from pssm.learning.texture_em import Numbers, improve, own_autoregressions
from pssm.linalg.random import standard_normal
from pssm.ssm import LinearGaussianSSM
from pssm.storage.files import whole_file

PIECE = 2**25  # numbers read at once, in whole frames
LARGEST = 0.999  # modulus of an eigenvalue that was 1 or more
OVERSAMPLE = 10  # additional directions while frames come in pieces
ROUNDING = 1e-13  # share of the clip's energy that is taken for rounding, and not for noise
FORMAT = "pssm.DynamicTexture 1"  # in every saved file
SAVED = ("mean", "components", "A", "chol_Q", "sigma", "m0", "chol_P0", "states")


class Compression(NamedTuple):
    """The size of a texture, compared with its clip.

    Attributes:
        numbers: parameters of the model: mean, components, transition, noise.
        ratio: numbers of the clip over `numbers`.
        explained: share of the clip's variance that the components hold.
    """

    numbers: int
    ratio: float
    explained: float


class DynamicTexture:
    """A clip as a linear dynamical system; made by `DynamicTexture.fit`.

    Attributes:
        mean: the mean frame, of the shape of a frame.
        components: orthonormal columns `C`, `(pixels, state)`.
        A: transition `(state, state)`.
        chol_Q: factor of the noise, `(state, noise)`.
        sigma: standard deviation of a pixel's noise.
        m0: first state, `(state,)`.
        chol_P0: factor of its covariance.
        states: states of the clip it was fitted to, `(time, state)`.
    """

    def __init__(
        self,
        mean: np.ndarray,
        components: np.ndarray,
        A: ArrayLike,
        chol_Q: ArrayLike,
        sigma: float,
        m0: ArrayLike,
        chol_P0: ArrayLike,
        states: np.ndarray,
        energy: float,
    ):
        self.mean, self.components, self.sigma = mean, components, float(sigma)
        self.A, self.chol_Q = jnp.asarray(A), jnp.asarray(chol_Q)
        self.m0, self.chol_P0 = jnp.asarray(m0), jnp.asarray(chol_P0)
        self.states, self._energy = states, energy

    @classmethod
    @also_called(n_state="num_states")
    def fit(
        cls,
        frames: Any,
        num_states: int,
        *,
        num_noise: int | None = None,
        method: str = "svd",
        stable: bool = True,
        num_iters: int = 50,
        tol: float = 1e-6,
        prior_frames: float | None = None,
    ) -> "DynamicTexture":
        """A texture from a clip.

        Args:
            frames: `(time, height, width)` or `(time, height, width, colour)`, at least `num_states + 2` frames; any
                array with slices, of any real dtype, so that a `numpy.memmap` may be larger than memory.
            num_states: size of the state, at most the number of pixels; `n_state` is a second name for it.
            num_noise: directions of the transition's noise; all of them by default.
            method: "svd" (closed form) or "em" (exact likelihood, started at the former; see `prior_frames`).
            stable: move eigenvalues of an unstable transition inside the unit circle, with a warning.
            num_iters: most iterations of EM.
            tol: relative gain of its objective at which EM stops.
            prior_frames: weight, in frames, of EM's prior that each component of the clip moves by itself, as an
                autoregression. 0 is maximum likelihood, which overfits a short clip. Default: as many frames as
                states; 0 with `num_noise`.

        Raises:
            ValueError: too few frames or pixels, values that are not finite, an unknown method, or EM on a clip that
                `num_states` components hold wholly.

        Example:
            >>> import numpy as np, jax
            >>> t = np.arange(40)[:, None, None]
            >>> clip = 0.98**t * np.sin(0.3 * t + np.linspace(0, 3, 48).reshape(6, 8) ** 2)
            >>> texture = DynamicTexture.fit(clip, 2)
            >>> texture.synthesize(jax.random.key(0), 100).shape
            (100, 6, 8)
        """
        check_choice("method", method, ("svd", "em"))
        n = check_count("num_states", num_states)
        shape = np.shape(frames)
        if len(shape) < 2:
            raise ValueError(f"`frames` must have shape (time, height, width[, colour]); got {shape}.")
        if shape[0] < n + 2:
            raise ValueError(f"`frames` must have at least {n + 2} frames for {n} states; got {shape[0]}.")
        if math.prod(shape[1:]) < n:
            raise ValueError(f"`num_states` must be at most {math.prod(shape[1:])}, the number of pixels; got {n}.")
        if num_noise is not None and check_count("num_noise", num_noise) > n:
            raise ValueError(f"`num_noise` must be at most {n}, the number of states; got {num_noise}.")
        mean, components, states, energy = _principal(frames, n)
        pixels = len(components)
        A, chol_Q = _transition(states, num_noise)
        left = energy - float(np.sum(states**2))
        left = left if left > ROUNDING * energy else 0.0
        sigma = math.sqrt(left / (shape[0] * max(pixels - n, 1)))
        texture = cls(
            mean.reshape(shape[1:]),
            components,
            A,
            chol_Q,
            sigma,
            states[0],
            max(sigma, 1e-6) * np.eye(n),
            states,
            energy,
        )
        if method == "em":
            if sigma == 0:
                raise ValueError(
                    f"`frames` leave nothing for the noise: {n} components hold them wholly, and the likelihood has no "
                    'maximum. Take fewer states, or method="svd".'
                )
            texture = texture._improved(frames, num_noise, prior_frames, num_iters, tol)
        return texture._stabilised() if stable else texture

    def _improved(
        self, frames: Any, num_noise: int | None, prior_frames: float | None, num_iters: int, tol: float
    ) -> "DynamicTexture":
        """By EM. `C` stays within the span of the frames, so all of it happens in their principal coordinates."""
        length, (pixels, n) = len(frames), self.components.shape
        weight = float((n if num_noise is None else 0) if prior_frames is None else prior_frames)
        if num_noise is not None and weight:
            raise ValueError("`prior_frames` must be 0 with `num_noise`: the prior needs noise in all directions.")
        if not 0 <= weight < math.inf:
            raise ValueError(f"`prior_frames` must be a number of frames, 0 or more; got {weight:g}.")
        _, basis, x, energy = _principal(frames, min(length - 1, pixels))
        arrays = (np.asarray(v, float) for v in (self.A, self.chol_Q, self.sigma, self.m0, self.chol_P0))
        prior = own_autoregressions(self.states, weight)

        def texture(found: Numbers) -> DynamicTexture:
            C, *rest = found
            return DynamicTexture(self.mean, basis @ C, *rest, x @ C, self._energy)

        return improve(
            x,
            energy,
            pixels,
            Numbers(basis.T @ self.components, *arrays),
            prior,
            noise_factor=partial(_noise_factor, num_noise=num_noise),
            num_iters=num_iters,
            tol=tol,
            slack=1e-9 if self.A.dtype == jnp.float64 else 1e-5,
            made=texture,
        )

    @property
    def spectral_radius(self) -> float:
        """The largest modulus of an eigenvalue of `A`; below 1 a synthesised clip of any length stays bounded."""
        return float(np.abs(np.linalg.eigvals(np.asarray(self.A))).max())

    @property
    def ssm(self) -> LinearGaussianSSM:
        """The model over pixels, with a noise matrix `(pixels, pixels)`: for small frames."""
        C = jnp.asarray(self.components, self.A.dtype)
        noise = self.sigma * jnp.eye(len(C), dtype=C.dtype)
        d = jnp.asarray(self.mean.reshape(-1), C.dtype)
        return LinearGaussianSSM(self.m0, self.chol_P0, self.A, self.chol_Q, C, noise, d=d)

    @property
    def reduced(self) -> LinearGaussianSSM:
        """The model of `C'(x - mean)`, `(state,)` numbers for each frame: the same posterior, another likelihood."""
        eye = jnp.eye(len(self.A), dtype=self.A.dtype)
        return LinearGaussianSSM(self.m0, self.chol_P0, self.A, self.chol_Q, eye, self.sigma * eye)

    @property
    def compression(self) -> Compression:
        """Size of the model, compared with its clip."""
        pixels, n = self.components.shape
        numbers = pixels * (n + 1) + n * n + self.chol_Q.size + n + 1
        held = float(np.sum(self.states**2)) / self._energy if self._energy else 1.0
        return Compression(numbers, len(self.states) * pixels / numbers, held)

    def project(self, frames: Any) -> np.ndarray:
        """`C'(x - mean)` of frames, `(time, state)`, read in pieces."""
        _check_frames(frames, self.mean.shape)
        pieces = [(x - self.mean.reshape(-1)) @ self.components for x in _pieces(frames)]
        return np.concatenate(pieces)

    def render(self, states: ArrayLike) -> np.ndarray:
        """Frames `mean + C z` of states `(time, state)`, without noise."""
        pixels = np.asarray(states) @ self.components.T + self.mean.reshape(-1)
        return pixels.reshape(-1, *self.mean.shape)

    def synthesize(self, key: KeyLike, num_frames: int, *, noise: bool = False) -> np.ndarray:
        """New frames `(num_frames, ...)`, drawn from the model; `noise` adds that of the pixels."""
        key = as_key(key)
        state_key, pixel_key = jax.random.split(key)
        states, _ = simulate(state_key, self.reduced, check_count("num_frames", num_frames))
        frames = self.render(states)
        if noise:
            frames = frames + self.sigma * np.asarray(standard_normal(pixel_key, frames.shape, self.A.dtype))
        return frames

    def reconstruct(self, frames: Any) -> np.ndarray:
        """The frames as reconstructed from the smoothed states."""
        return self.render(self.smoothed_states(frames))

    def smoothed_states(self, frames: Any) -> np.ndarray:
        """Means of the states given a whole clip, `(time, state)`."""
        y = jnp.asarray(self.project(frames), self.A.dtype)
        return np.asarray(kalman_smoother(self.reduced, y).mean)

    def forecast(self, frames: Any, num_frames: int) -> np.ndarray:
        """Mean of the `num_frames` frames that follow a clip."""
        return self.render(self.forecast_states(frames, num_frames))

    def forecast_states(self, frames: Any, num_frames: int) -> np.ndarray:
        """Means of the states of the `num_frames` frames that follow a clip, `(num_frames, state)`."""
        y = jnp.asarray(self.project(frames), self.A.dtype)
        z = np.asarray(kalman_filter(self.reduced, y).mean[-1])
        states = []
        for _ in range(check_count("num_frames", num_frames)):
            z = np.asarray(self.A) @ z
            states.append(z)
        return np.stack(states)

    def log_likelihood(self, frames: Any, *, start: tuple[ArrayLike, ArrayLike] | None = None) -> float:
        """`log p(frames)` over all pixels.

        Args:
            frames: `(time, ...)`, each of the shape of `mean`.
            start: mean and factor of the first state, where it differs from that of the clip.

        Raises:
            ValueError: other shapes, or `sigma` is 0: then all frames lie in `state` dimensions, and have no density.
        """
        if self.sigma == 0:
            raise ValueError(
                "`log_likelihood` needs noise of the pixels, but `sigma` is 0: the components hold the clip that was "
                "fitted wholly, and frames have no density. Fit fewer states."
            )
        y = self.project(frames)
        model = self.reduced if start is None else self.reduced.replace(m0=start[0], chol_P0=start[1])
        value = float(log_likelihood_of(model, jnp.asarray(y, self.A.dtype)))
        pixels, n = self.components.shape
        energy = sum(float(np.sum((x - self.mean.reshape(-1)) ** 2)) for x in _pieces(frames))
        left = max(energy - float(np.sum(y**2)), 0.0)
        constant = len(y) * (pixels - n) * math.log(2 * math.pi * self.sigma**2)
        return value - 0.5 * (constant + left / self.sigma**2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the texture to an `.npz` file, over one that is there; `DynamicTexture.load` reads it.

        Raises:
            OSError: `path` cannot be written to.
        """
        arrays = {name: np.asarray(getattr(self, name)) for name in SAVED}
        with whole_file(path) as partial, partial.open("wb") as file:  # a file: NumPy might add ".npz" to a name
            np.savez_compressed(file, format=FORMAT, energy=self._energy, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DynamicTexture":
        """The texture that `save` has written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (EOFError, TypeError, ValueError, zipfile.BadZipFile):  # TypeError: it is a single array, as in .npy
            arrays = {}
        if str(arrays.pop("format", "")) != FORMAT:
            raise ValueError(f"`path` {os.fspath(path)!r} is not a texture; expected a file of `DynamicTexture.save`.")
        return cls(**arrays | {"sigma": float(arrays["sigma"]), "energy": float(arrays["energy"])})

    def _stabilised(self) -> "DynamicTexture":
        radius = self.spectral_radius
        if radius < 1:
            return self
        warnings.warn(
            f"The transition has spectral radius {radius:.4f}: synthesis would diverge. Its eigenvalues outside of the "
            f"circle of radius {LARGEST} are moved onto it; pass stable=False to keep them.",
            stacklevel=3,
        )
        values, vectors = np.linalg.eig(np.asarray(self.A, float))
        values = values * np.minimum(1.0, LARGEST / np.maximum(np.abs(values), LARGEST))
        self.A = jnp.asarray(np.real(vectors * values @ np.linalg.inv(vectors)), self.A.dtype)
        return self


def _check_frames(frames: Any, shape: tuple[int, ...]) -> None:
    if np.shape(frames)[1:] != shape:
        raise ValueError(f"`frames` must have shape (time, {', '.join(map(str, shape))}); got {np.shape(frames)}.")


def _pieces(frames: Any) -> Iterator[np.ndarray]:
    """Frames as rows of float64, some at a time."""
    step = _piece_length(frames)
    for first in range(0, len(frames), step):
        x = np.asarray(frames[first : first + step], float)
        if not np.isfinite(x).all():
            raise ValueError(f"`frames` must be finite; frames {first} to {first + len(x) - 1} are not.")
        yield x.reshape(len(x), -1)


def _piece_length(frames: Any) -> int:
    return max(1, PIECE // math.prod(np.shape(frames)[1:]))


def _principal(frames: Any, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Mean, the first `n` principal components, the frames' coordinates along them, and the energy about the mean.

    One singular value decomposition for a clip that fits into one piece; else an incremental one (Brand 2002), with
    some additional directions. Components have their largest entry positive.
    """
    length = len(frames)
    mean = sum(x.sum(0) for x in _pieces(frames)) / length
    keep = length if length <= _piece_length(frames) else n + OVERSAMPLE
    basis = np.zeros((len(mean), 0))
    coordinates = np.zeros((0, 0))
    energy = 0.0
    for x in _pieces(frames):
        x = x - mean
        energy += float(np.sum(x**2))
        along = x @ basis
        rest, triangle = np.linalg.qr((x - along @ basis.T).T)
        wide = np.block([[coordinates, np.zeros((len(coordinates), rest.shape[1]))], [along, triangle.T]])
        left, sizes, right = np.linalg.svd(wide, full_matrices=False)
        count = min(keep, len(sizes))
        basis = np.concatenate([basis, rest], axis=1) @ right[:count].T
        coordinates = left[:, :count] * sizes[:count]
    basis, coordinates = basis[:, :n], coordinates[:, :n]
    coordinates[:, np.linalg.norm(coordinates, axis=0) ** 2 <= ROUNDING * energy] = 0.0  # not in the clip
    sign = np.sign(basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])])
    return mean, basis * sign, coordinates * sign, energy


def _transition(states: np.ndarray, num_noise: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of each state on the one before, and a factor of the residuals' covariance."""
    A = np.linalg.lstsq(states[:-1], states[1:], rcond=None)[0].T
    return A, _noise_factor((states[1:] - states[:-1] @ A.T).T / math.sqrt(len(states) - 1), num_noise)


def _noise_factor(factor: np.ndarray, num_noise: int | None) -> np.ndarray:
    left, sizes, _ = np.linalg.svd(factor, full_matrices=False)
    count = min(len(sizes), num_noise or len(sizes))
    return left[:, :count] * sizes[:count]
