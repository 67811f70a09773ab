"""What is measured of a learned model and its posterior, the same for every method; nothing here knows the method.

A method comes as `draw(key, y) -> (draws, trials, time, state)`, its posterior of trials given all of `y`, and as the
learned `Parts`. Forecasts start from the belief given the steps up to the cut only: `draw` gets the first `cut` steps.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from systems import Experiment, Linear, Parts, Size, emit, linear_system, system_of

import pssm
from pssm.distributions import LowRankChain, StatePath
from pssm.filters import particle_filter
from pssm.guides import guided_proposal
from pssm.modes.mode import PotentialsAtMode

DRAWS = 32
Draw = Callable[[jax.Array, jax.Array], jax.Array]


class Measures:
    """The measures of one experiment; their compiled functions are shared by all methods."""

    def __init__(self, e: Experiment, size: Size):
        self.e, self.size = e, size
        self.linear = isinstance(e.transition, Linear)

        def potentials(parts: Parts, y: jax.Array, start: jax.Array | None = None) -> PotentialsAtMode:
            system = system_of(e, parts)

            def one(xs: tuple[jax.Array, jax.Array | None]) -> PotentialsAtMode:
                return guided_proposal(system, xs[0], num_iters=10, num_rounds=1, start=xs[1])

            return jax.lax.map(one, (y, start), batch_size=10)

        def evidence(parts: Parts, y: jax.Array, proposals: PotentialsAtMode) -> tuple[jax.Array, jax.Array]:
            system = system_of(e, parts)

            def one(xs: tuple[jax.Array, jax.Array, PotentialsAtMode]) -> tuple[jax.Array, jax.Array]:
                key, y, proposal = xs
                found = particle_filter(key, system, y, num_particles=size.particles, proposal=proposal)
                return found.log_likelihood, found.ess.min()

            return jax.lax.map(one, (jax.random.split(jax.random.key(3), len(y)), y, proposals), batch_size=10)

        def filtered(key: jax.Array, parts: Parts, y: jax.Array, proposals: PotentialsAtMode) -> jax.Array:
            system = system_of(e, parts)

            def one(xs: tuple[jax.Array, jax.Array, PotentialsAtMode]) -> jax.Array:
                key, y, proposal = xs
                found = particle_filter(key, system, y, num_particles=size.particles, proposal=proposal)
                chosen = jax.random.categorical(jax.random.fold_in(key, 1), found.log_weights[-1], shape=(DRAWS,))
                return found.particles[-1, chosen]

            drawn = jax.lax.map(one, (jax.random.split(key, len(y)), y, proposals), batch_size=10)
            return jnp.moveaxis(drawn, 0, 1)

        def chains(key: jax.Array, parts: Parts, p: PotentialsAtMode) -> jax.Array:
            prior = StatePath.from_ssm(system_of(e, parts), p.k.shape[1])
            return LowRankChain(prior, p.k, p.K, diag=p.diag, center=p.center).sample(key, (DRAWS,))

        def exact(parts: Parts, y: jax.Array) -> jax.Array:
            return pssm.log_likelihood(linear_system(e, parts), y)

        def rollout(key: jax.Array, parts: Parts, z: jax.Array) -> jax.Array:
            def step(z: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
                z = jax.vmap(jax.vmap(parts.transition))(z)
                z = z + parts.sd * jax.random.normal(key, z.shape)
                return z, z

            return jax.lax.scan(step, z, jax.random.split(key, size.steps - size.cut))[1]

        def slopes(parts: Parts, z: jax.Array) -> jax.Array:
            return jax.vmap(jax.jacfwd(parts.transition))(z)

        def counts(parts: Parts, z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            drive = jax.vmap(jax.vmap(jax.vmap(parts.readout)))(z)
            found = emit(e.emission, drive, parts.sigma)
            return found.mean.mean(1), jax.nn.logsumexp(found.log_prob(y[:, None]), 1) - jnp.log(z.shape[1])

        self.potentials, self.evidence, self.filtered = map(eqx.filter_jit, (potentials, evidence, filtered))
        self.chains, self.exact, self.rollout, self.slopes, self.counts = map(
            eqx.filter_jit, (chains, exact, rollout, slopes, counts)
        )

    def __call__(self, draw: Draw, parts: Parts, y: jax.Array, new: jax.Array) -> dict[str, Any]:
        """All measures, for training trials `y` and held-out trials `new`."""
        e, size, held = self.e, self.size, len(new)
        keys = jax.random.split(jax.random.key(4), 5)
        smoothed = np.asarray(draw(keys[0], new).mean(0))
        known = new[:, : size.cut]
        future = self.rollout(keys[2], parts, draw(keys[1], known)[:, :, -1])  # (horizon, draws, trials, state)
        found: dict[str, Any] = {
            "radius": self._radius(parts, smoothed),
            "q": (np.asarray(parts.sd) ** 2).tolist(),
            "sigma": None if parts.sigma is None else float(parts.sigma),
        }
        if self.linear:
            values = np.asarray(self.exact(parts, new))
            found |= {"evidence": float(values.mean()), "evidence_kind": "exact"}
        else:
            proposals = self.potentials(parts, new, jnp.asarray(smoothed))
            values, ess = (np.asarray(x) for x in self.evidence(parts, new, proposals))
            found |= {"evidence": float(values.mean()), "evidence_kind": "guided particle filter"}
            found["ess_low"] = float((ess < 0.05 * size.particles).mean())
        if e.states is None:
            ahead = jnp.moveaxis(new[:, size.cut :], 1, 0)
            mean, log_prob = (np.asarray(x) for x in self.counts(parts, future, ahead))
            base = emit(e.emission, _constant(e.emission, y), None)
            gain = log_prob - np.asarray(base.log_prob(ahead))
            found |= {"forecast_r2": r2(mean, np.asarray(ahead)).mean(-1).tolist(), "forecast_gain": float(gain.mean())}
            return found
        halves = zip(keys[3:], (y[:held], y[held : 2 * held]), strict=True)
        fitted = np.concatenate([draw(key, half).mean(0) for key, half in halves])
        states, truth = e.states[: 2 * held], e.states[-held:]
        read = probe(fitted, states)
        flat = (-1, truth.shape[-1])
        found["state_r2"] = r2(read(smoothed).reshape(flat), truth.reshape(flat)).tolist()
        ahead = np.moveaxis(truth[:, size.cut :], 1, 0)
        by_step = r2(read(np.asarray(future).mean(1)), ahead)
        return found | {"forecast_r2": by_step.mean(-1).tolist(), "forecast_r2_each": by_step.mean(0).tolist()}

    def draw_truth(self) -> Draw:
        """The posterior under the true parts: of whole trials the chain at the mode, of beginnings the filter's last.

        (A draw of the chain may leave the cycle where few steps are known, and the oscillator then explodes.)
        """

        def draw(key: jax.Array, y: jax.Array) -> jax.Array:
            p = self.potentials(self.e.truth, y)
            if y.shape[1] == self.size.steps:
                return self.chains(key, self.e.truth, p)
            return self.filtered(key, self.e.truth, y, p)[:, :, None]

        return draw

    def draw_exact(self, parts: Parts) -> Draw:
        """The exact smoother of the linear experiment."""
        ssm = linear_system(self.e, parts)
        one = jax.vmap(lambda key, y: pssm.sample_states(key, ssm, y, sample_shape=(DRAWS,)), out_axes=1)
        return jax.jit(lambda key, y: one(jax.random.split(key, len(y)), y))

    def _radius(self, parts: Parts, z: np.ndarray) -> float:
        """Mean spectral radius of the transition's Jacobian at posterior means."""
        slopes = np.asarray(self.slopes(parts, jnp.asarray(z[:, ::5].reshape(-1, z.shape[-1]))), float)
        if not np.isfinite(slopes).all():
            return float("nan")
        return float(np.abs(np.linalg.eigvals(slopes)).max(-1).mean())


def _constant(emission: str, y: jax.Array) -> jax.Array:
    """The readout's number that gives the training data's mean."""
    mean = y.mean()
    return jnp.log(mean / (50 - mean)) if emission == "binomial" else jnp.log(mean)


def probe(z: np.ndarray, states: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares from posterior means `(trial, time, state)`, and a constant, to true states."""
    flat = np.nan_to_num(z.reshape(-1, z.shape[-1]).astype(float), posinf=0.0, neginf=0.0)
    rows = np.concatenate([flat, np.ones((len(flat), 1))], axis=1)
    weights = np.linalg.lstsq(rows, states.reshape(-1, states.shape[-1]), rcond=None)[0]
    return lambda z: z @ weights[:-1] + weights[-1]


def r2(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`1 - error / variance` over the axis before the last, `(..., size)`."""
    error = ((found - truth) ** 2).sum(-2)
    return 1.0 - error / np.maximum(((truth - truth.mean(-2, keepdims=True)) ** 2).sum(-2), 1e-12)
