"""A pendulum in frames of 16 x 16 pixels: does the extended Kalman autoencoder find the velocity that no frame shows?

    python docs/benchmarks/pendulum.py [seed] [steps]

Three objectives on the same frames: the ELBO with a learned pixel noise, the ELBO with unit noise, and unit noise with
the squared error held at a bound (`constrain`). For each: R^2 of linear regressions, on held-out sequences, of sine,
cosine and velocity on the state, and of the velocity on the code and on the rest of the state; the squared error of a
reconstruction; and that of predictions when all frames after the fifth are missing.
"""

import os
import sys
import time
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

from pssm import nets
from pssm.guides import AmortizedFrames
from pssm.infer import constrain
from pssm.models import extended_kalman_vae

PIXELS, STEPS, CODES, STATES = 16, 15, 2, 3
SEEN, BOUND = 5, 0.003


def swings(rng, count, dt=0.1):
    """Angle and velocity `(count, STEPS)` of driven pendulums from anywhere, and the torque that leads to each step."""
    angle, velocity = rng.uniform(0, 2 * np.pi, count), rng.normal(0, 2, count)
    torque = rng.normal(0, 3, (count, STEPS))
    found = []
    for t in range(STEPS):
        if t:
            for _ in range(20):
                velocity = velocity + dt / 20 * (-9.81 * np.sin(angle) - 0.1 * velocity + torque[:, t])
                angle = angle + dt / 20 * velocity
        found.append((angle, velocity))
    return *np.stack(found, axis=2), torque[..., None]


def rendered(angle):
    """Frames `(..., PIXELS^2)` of a rod from the centre: one minus the distance to it in pixels, in [0, 1]."""
    at = np.arange(PIXELS) - (PIXELS - 1) / 2
    x, y = (p.ravel() for p in np.meshgrid(at, at))
    tip = 0.43 * PIXELS * np.stack([np.sin(angle), -np.cos(angle)], axis=-1)[..., None]
    along = np.clip((tip[..., 0, :] * x + tip[..., 1, :] * y) / (tip**2).sum(-2), 0, 1)
    away = np.hypot(along * tip[..., 0, :] - x, along * tip[..., 1, :] - y)
    return np.clip(1.6 - away, 0, 1).astype(np.float32)


def r2(x, y):
    """Of a linear regression, fitted to the first half of the sequences and scored on the second, from step 3 on."""
    x = np.concatenate([np.ones((*x.shape[:2], 1)), x], axis=-1)[:, 3:]
    fit, score = np.split(x, 2), np.split(y[:, 3:], 2)
    weights = np.linalg.lstsq(fit[0].reshape(-1, x.shape[-1]), score[0].ravel(), rcond=None)[0]
    return 1 - np.mean((score[1] - fit[1] @ weights) ** 2) / np.var(score[1])


def frames_of(model, params, codes, frames, u):
    """The mean frames of draws of the codes."""

    def one(a):
        run = handlers.substitute(handlers.seed(model, 0), data={**params, "a": a})
        return handlers.trace(run).get_trace(frames, u=u)["y"]["fn"].mean

    return np.asarray(jax.jit(lambda codes: jax.lax.map(one, codes))(codes))


def main(seed=0, steps=3000):
    rng = np.random.default_rng(seed)
    angle, velocity, torque = swings(rng, 700)
    frames = rendered(angle)
    train, u_train, test, u_test = frames[:500], torque[:500], frames[500:], torque[500:]
    truth = np.stack([np.sin(angle), np.cos(angle), velocity], axis=-1)[500:]
    blank = ((test - train.mean((0, 1))) ** 2).mean()
    print(
        f"squared error of the mean frame {blank:.4f}, of the fifth frame kept "
        f"{((test[:, SEEN:] - test[:, SEEN - 1 : SEEN]) ** 2).mean((0, 2))[[0, 4, 9]].round(4)} after 1, 5, 10 steps"
    )
    one, two = jax.random.split(jax.random.key(seed))
    front = nets.StepMLP(PIXELS**2, 64, hidden=128, data=train, key=one)
    encoder = nets.FrameEncoder(front, CODES, highest=0.5, key=two)
    options = {"num_states": STATES, "num_codes": CODES, "num_bases": 8}
    for name in ("learned noise", "unit noise", "constrained"):
        plain = partial(extended_kalman_vae, **options, sigma_obs=None if name == "learned noise" else 1.0)
        model = constrain(plain, site="y", bound=BOUND, start=300.0) if name == "constrained" else plain
        guide = AmortizedFrames(plain, encoder=encoder, gaps=False)
        schedule = optax.cosine_decay_schedule(3e-3, steps, 0.02)
        svi = SVI(model, guide, optax.chain(optax.clip_by_global_norm(1e4), optax.adam(schedule)), Trace_ELBO())
        begun = time.perf_counter()
        result = svi.run(jax.random.key(seed), steps, train, u=u_train, batch_size=64, progress_bar=False)
        took = time.perf_counter() - begun
        post = Predictive(guide, params=result.params, num_samples=20)(jax.random.key(1), test, u=u_test)
        z, a = (np.asarray(post[site]).mean(0) for site in ("z", "a"))
        scores = [r2(z, truth[..., i]) for i in range(3)]
        print(
            f"{name}: {took:.0f} s, loss {result.losses[-100:].mean():.0f}, R2 of sin, cos, velocity given z "
            f"{np.round(scores, 3)}, velocity given a {r2(a, truth[..., 2]):.3f}, given the rest of z "
            f"{r2(z[..., CODES:], truth[..., 2]):.3f}",
            flush=True,
        )
        held = test.copy()
        held[:, SEEN:] = np.nan
        ahead = Predictive(AmortizedFrames(plain, encoder=encoder), params=result.params, num_samples=20)(
            jax.random.key(2), held, u=u_test
        )["a"]
        shown = [frames_of(plain, result.params, codes, test, u_test) for codes in (post["a"], ahead)]
        errors = ((shown[1].mean(0) - test) ** 2).mean((0, 2))
        print(
            f"    squared error {((shown[0] - test) ** 2).mean():.4f}, of predictions "
            f"{errors[[SEEN, SEEN + 4, SEEN + 9]].round(4)} after 1, 5, 10 steps"
        )
        if name == "constrained":
            print("    ", {k: round(float(v), 4) for k, v in result.state.mutable_state["y$constraint"].items()})


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
