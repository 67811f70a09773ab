"""The experiments: data, model and true system of each. `run.py` trains and measures, `report.py` writes the page.

All share one model: `z_1 ~ N(m0, diag sd0^2)`, `z_t ~ N(f(z_{t-1}), diag sd^2)`, `y_t ~ p(readout(z_t))`. Transition
and `sd` are learned in all of them; the readout is known where the text of an experiment says so, which fixes the
basis of the states (and with it what `sd` should be), and learned elsewhere.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints

import pssm
from pssm import datasets, nets
from pssm.distributions import StatePath, observe
from pssm.linalg import Diagonal

CHANNELS = 20
HIGHEST_LOG_RATE = 15.0


class Size(NamedTuple):
    """How large a study is; times in steps, `cut` the last step that a forecast knows, `rate`
    the first step size of Adam."""

    train: int = 320
    held: int = 64
    steps: int = 50
    cut: int = 25
    width: int = 64
    updates: int = 1000
    batch: int = 32
    draws: int = 5
    particles: int = 300
    rate: float = 1e-2


# Frames cost more, and of the counts there are few.
OWN: dict[str, dict[str, float]] = {
    "pendulum": {"batch": 16, "updates": 5000, "rate": 3e-3},
    "bouncing_ball": {"batch": 16, "updates": 5000, "rate": 3e-3},
    "thalamus": {"updates": 400},
    "grasshopper": {"updates": 400},
}
QUICK = Size(24, 8, 12, 6, 8, 20, 8, 3, 30)


class Absent(Exception):
    """Data that are not there; the message says which."""


class Experiment(NamedTuple):
    """Data and model of one experiment.

    Attributes:
        title: in words.
        y: observations, `(trial, time, obs)`, those for training in front.
        states: true states `(trial, time, size)`, or None.
        emission: "gaussian", "poisson" or "binomial" (of 50).
        transition: the network that is learned, at its start.
        readout: a function of the state; its JAX arrays are learned, its NumPy arrays known.
        start: mean and standard deviations of the first state.
        sd: standard deviations of the transition noise where learning starts.
        rank: columns of the chain's potentials; the published family has as many as there are states, twice.
        truth: what made the data, or None.
        known: what the model is told, in words.
    """

    title: str
    y: np.ndarray
    states: np.ndarray | None
    emission: str
    transition: Any
    readout: Any
    start: tuple[np.ndarray, np.ndarray]
    sd: float
    rank: int
    truth: Any
    known: str

    @property
    def n_state(self) -> int:
        return len(self.start[0])


class Linear(eqx.Module):
    """`A z`."""

    A: Any

    def __call__(self, z: jax.Array, u: jax.Array | None = None) -> jax.Array:
        return jnp.asarray(self.A, z.dtype) @ z


class Known(eqx.Module):
    """`C z + d`, both known."""

    C: np.ndarray
    d: np.ndarray

    def __call__(self, z: jax.Array) -> jax.Array:
        return jnp.asarray(self.C, z.dtype) @ z + jnp.asarray(self.d, z.dtype)


def emit(kind: str, drive: jax.Array, sigma: Any) -> dist.Distribution:
    """The observations' distribution, of `(..., obs)` numbers of the readout."""
    if kind == "gaussian":
        return dist.Normal(drive, sigma)
    if kind == "binomial":
        return dist.Binomial(50, logits=drive)
    return dist.Poisson(jnp.exp(jnp.minimum(drive, HIGHEST_LOG_RATE)))


class Emission(eqx.Module):
    """`p(y_t | z_t)` of one state."""

    readout: Any
    sigma: Any
    kind: str = eqx.field(static=True)

    def __call__(self, z: jax.Array) -> dist.Distribution:
        return emit(self.kind, self.readout(z), self.sigma).to_event(1)


class Parts(NamedTuple):
    """What is learned: transition, readout, `sd` and, for Gaussian data, their standard deviation."""

    transition: Any
    readout: Any
    sd: jax.Array
    sigma: jax.Array | None


def parts(e: Experiment) -> Parts:
    """The parameters of the model; to be called inside of it."""
    floor = constraints.greater_than(1e-3)
    sd = numpyro.param("sd", jnp.full(e.n_state, e.sd), constraint=floor)
    sigma = numpyro.param("sigma", jnp.array(0.5), constraint=floor) if e.emission == "gaussian" else None
    return Parts(nets.register("transition", e.transition), nets.register("readout", e.readout), sd, sigma)


def model_of(e: Experiment) -> Callable[..., None]:
    """The NumPyro model of trials `y`."""

    def model(y: jax.Array) -> None:
        p = parts(e)
        m0, sd0 = (jnp.asarray(x, jnp.float32) for x in e.start)
        with numpyro.plate("trials", len(y)):
            path = StatePath(m0, Diagonal(sd0), p.transition, Diagonal(p.sd), y.shape[1])
            z = numpyro.sample("z", path)
            drive = jax.vmap(p.readout)(z.reshape(-1, e.n_state)).reshape(*z.shape[:-1], -1)
            observe("y", emit(e.emission, drive, p.sigma).to_event(2), y)

    return model


def exact_model_of(e: Experiment) -> Callable[..., None]:
    """The linear experiment's likelihood with the states integrated out: nothing is left for a guide."""

    def model(y: jax.Array) -> None:
        ssm = linear_system(e, parts(e))
        with numpyro.plate("trials", len(y)):
            numpyro.factor("y", pssm.log_likelihood(ssm, y))

    return model


def linear_system(e: Experiment, p: Parts) -> pssm.LinearGaussianSSM:
    m0, sd0 = (jnp.asarray(x, jnp.float32) for x in e.start)
    C, d = (jnp.asarray(x, jnp.float32) for x in (p.readout.C, p.readout.d))
    A = jnp.asarray(p.transition.A, jnp.float32)
    return pssm.LinearGaussianSSM(m0, jnp.diag(sd0), A, jnp.diag(p.sd), C, p.sigma * jnp.eye(len(C)), d=d)


def learned_parts(e: Experiment, params: dict[str, Any]) -> Parts:
    with handlers.block(), handlers.substitute(data=params):
        return parts(e)


def system_of(e: Experiment, p: Parts) -> pssm.NonlinearSSM:
    m0, sd0 = (jnp.asarray(x, jnp.float32) for x in e.start)
    return pssm.NonlinearSSM(m0, jnp.diag(sd0), p.transition, jnp.diag(p.sd), Emission(p.readout, p.sigma, e.emission))


# --- simulated systems ------------------------------------------------------------------------------------------------


def _simulated(
    title: str,
    seed: int,
    size: Size,
    truth: Parts,
    start: tuple,
    emission: str,
    learned: Any,
    *,
    before: int = 0,
    believed: tuple | None = None,
    **rest: Any,
) -> Experiment:
    """Data of a system: trials begin `before` steps after `start`, and the model begins with `believed`."""
    blank = Experiment(title, None, None, emission, learned, truth.readout, start, truth=truth, **rest)
    system = system_of(blank, truth)
    key, noise = jax.random.split(jax.random.key(seed))
    path = StatePath.from_ssm(system, before + size.steps)
    z = jax.jit(lambda k: path.sample(k, (size.train + size.held,))[:, before:])(key)
    y = emit(emission, jax.vmap(jax.vmap(truth.readout))(z), truth.sigma).sample(noise)
    blank = blank._replace(start=start if believed is None else believed)
    return blank._replace(y=np.asarray(y, np.float32), states=np.asarray(z))


def _loadings(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(CHANNELS, n)) / n**0.5


def lds(size: Size, folder: Path) -> Experiment:
    turn = 0.9 * np.array([[2**-0.5, -(2**-0.5)], [2**-0.5, 2**-0.5]])
    truth = Parts(Linear(turn), Known(_loadings(0, 2), np.zeros(CHANNELS)), jnp.ones(2), jnp.ones(()))
    return _simulated(
        "linear, 2 states, 20 Gaussian channels",
        1,
        size,
        truth,
        (np.zeros(2), np.ones(2)),
        "gaussian",
        Linear(0.5 * jnp.eye(2)),
        sd=0.5,
        rank=1,
        known="readout and start",
    )


def oscillator(z: jax.Array, u: jax.Array | None = None) -> jax.Array:
    return jnp.stack([z[0] + 0.1 * z[1], z[1] + 0.1 * (1.5 * (1 - z[0] ** 2) * z[1] - z[0])])


def van_der_pol(size: Size, folder: Path, emission: str = "gaussian") -> Experiment:
    q, sigma = (1e-3, jnp.asarray(0.1**0.5)) if emission == "gaussian" else (1e-2, None)
    truth = Parts(oscillator, Known(_loadings(0, 2), np.zeros(CHANNELS)), jnp.full(2, q**0.5), sigma)
    return _simulated(
        f"Van der Pol, 20 {emission.title()} channels, Q = {q:g}",
        2,
        size,
        truth,
        (np.array([1.0, 0.0]), np.array([0.5, 0.5])),  # a wider start leaves float32
        emission,
        nets.ResidualTransition(2, 32, key=jax.random.key(10)),
        before=200,  # by then on the cycle, anywhere: else all trials would end in the same phase
        believed=(np.zeros(2), np.full(2, 1.5)),
        sd=0.3,
        rank=1,
        known="readout and start",
    )


def van_der_pol_poisson(size: Size, folder: Path) -> Experiment:
    return van_der_pol(size, folder, "poisson")


def ring(z: jax.Array, u: jax.Array | None = None) -> jax.Array:
    """The radius goes to 1 by a tenth of the way, the angle stays; smoothed at the origin, where there is no angle."""
    radius = jnp.sqrt(jnp.sum(z**2) + 0.01)
    return z * (0.9 + 0.1 / radius)


def ring_attractor(size: Size, folder: Path) -> Experiment:
    truth = Parts(ring, Known(_loadings(3, 2), np.zeros(CHANNELS)), jnp.full(2, 5e-3**0.5), jnp.asarray(0.1**0.5))
    return _simulated(
        "ring attractor, 20 Gaussian channels, Q = 0.005",
        3,
        size,
        truth,
        (np.zeros(2), np.ones(2)),
        "gaussian",
        nets.ResidualTransition(2, 32, key=jax.random.key(11)),
        sd=0.3,
        rank=1,
        known="readout and start",
    )


def _clips(title: str, size: Size, n: int, make: Callable[..., datasets.Clips]) -> Experiment:
    clips = make(size.train + size.held, size.steps, noise=0.1, seed=4)
    y = clips.frames.reshape(*clips.frames.shape[:2], -1).astype(np.float32)
    decoder = nets.MLPDecoder(n, y.shape[-1], hidden=size.width, num_read=n // 2, key=jax.random.key(12))
    mean = jnp.asarray(y[: size.train].mean((0, 1)))
    decoder = eqx.tree_at(lambda m: m.mlp.layers[-1].bias, decoder, mean)
    return Experiment(
        title,
        y,
        clips.states,
        "gaussian",
        nets.MechanicalTransition(n, size.width, key=jax.random.key(13)),
        decoder,
        (np.zeros(n), np.repeat([1.0, 0.3], n // 2)),
        sd=0.1,
        rank=2,
        truth=None,
        known="start; half of the states are velocities, which the readout does not see",
    )


def pendulum(size: Size, folder: Path) -> Experiment:
    return _clips("pendulum, 16 x 16 pixels, 4 states", size, 4, datasets.pendulum_clips)


def bouncing_ball(size: Size, folder: Path) -> Experiment:
    return _clips("bouncing ball, 16 x 16 pixels, 4 states", size, 4, datasets.bouncing_ball)


# --- counts -----------------------------------------------------------------------------------------------------------


def _counts(title: str, y: np.ndarray, size: Size, emission: str, link: Callable[[float], float]) -> Experiment:
    """Pieces of a series of counts `(piece, time)`, in random order."""
    order = np.random.default_rng(5).permutation(len(y))
    y = y[order][:, : size.steps, None].astype(np.float32)
    decoder = nets.LinearDecoder(2, 1, key=jax.random.key(14))
    held = min(size.held, len(y) // 4)
    decoder = eqx.tree_at(lambda m: m.d, decoder, jnp.asarray([link(float(y[:-held].mean()))]))
    return Experiment(
        title,
        y,
        None,
        emission,
        nets.ResidualTransition(2, 32, key=jax.random.key(15)),
        decoder,
        (np.zeros(2), np.ones(2)),
        sd=0.3,
        rank=1,
        truth=None,
        known="start",
    )


def thalamus(size: Size, folder: Path) -> Experiment:
    path = folder / "particles_pkg" / "thaldata.csv"
    if not path.exists():
        raise Absent(f"{path} is not there")
    y = np.loadtxt(path, delimiter=",").reshape(-1, 50)
    title = "thalamus, 60 pieces of 50 ms, of 50 trials how many had a spike in a millisecond"
    return _counts(title, y, size, "binomial", lambda mean: np.log(mean / (50 - mean)))


def grasshopper(size: Size, folder: Path) -> Experiment:
    paths = [folder / "nitime_pkg" / f"grasshopper_spike_times{k}.txt" for k in (1, 2)]
    if not all(path.exists() for path in paths):
        raise Absent(f"{paths[0]} or its second part is not there")
    edges = np.arange(2001) * 5e3  # ten seconds in bins of 5 ms
    y = [np.histogram(np.loadtxt(path, comments="#"), edges)[0] for path in paths]
    title = "grasshopper receptor, 80 pieces of 50 bins of 5 ms, Poisson"
    return _counts(title, np.concatenate(y).reshape(-1, 50), size, "poisson", np.log)


EXPERIMENTS: dict[str, Callable[[Size, Path], Experiment]] = {
    "lds": lds,
    "van_der_pol": van_der_pol,
    "van_der_pol_poisson": van_der_pol_poisson,
    "ring_attractor": ring_attractor,
    "pendulum": pendulum,
    "bouncing_ball": bouncing_ball,
    "thalamus": thalamus,
    "grasshopper": grasshopper,
}
