"""Amortised potentials against potentials at the mode, on trials that were not trained on.

    python docs/benchmarks/amortised.py [--quick] [--out FILE]

Two systems with known parameters, 400 trials of 50 steps for training and 50 held out: (a) a linear one with two states
and 20 Gaussian channels, (b) the Van der Pol oscillator (our variant of the usual test: q = 1e-2, 20 Poisson channels).
The encoder is a perceptron on every step and a gated recurrent unit of 64 that runs backward, `rank=1` and a diagonal;
minibatches of 32, 4 paths, Adam with a cosine schedule, 3000 steps. Rows: the bound per held-out trial of the encoder,
of the encoder refined by one and two rounds of Gauss-Newton (`refine_rank=2`), and of potentials at the mode
(`AutoStateSpace(potentials="mode")`), which is near-exact here; for (a) also the exact log evidence.
Then the microseconds of an online step with 64 states.
"""

import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from filter import Table, options, print_machine
from numpyro.infer import SVI, Trace_ELBO

import pssm
from pssm import nets
from pssm.distributions import StatePath, observe
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.infer import TraceConditionalKL_ELBO
from pssm.linalg import Diagonal

TRAIN, HELD_OUT, STEPS, CHANNELS, BATCH = 400, 50, 50, 20, 32
RNG = np.random.default_rng(0)
C = jnp.asarray(RNG.normal(size=(CHANNELS, 2)) / 2**0.5, jnp.float32)
TURN = 0.9 * jnp.array([[2**-0.5, -(2**-0.5)], [2**-0.5, 2**-0.5]])


def oscillator(z, u):
    return jnp.stack([z[0] + 0.1 * z[1], z[1] + 0.1 * (1.5 * (1 - z[0] ** 2) * z[1] - z[0])])


def trials(y=None, batch_size=None, count=TRAIN + HELD_OUT, system="lds"):
    """The two systems as NumPyro models."""
    with numpyro.plate("trials", count if y is None else len(y), subsample_size=batch_size) as index:
        data = None if y is None else y[index]
        if system == "lds":
            z = numpyro.sample("z", StatePath(jnp.zeros(2), Diagonal(jnp.ones(2)), TURN, Diagonal(jnp.ones(2)), STEPS))
            return observe("y", dist.Normal(z @ C.T, 1.0).to_event(2), data)
        start, noise = Diagonal(0.5 * jnp.ones(2)), Diagonal(0.1 * jnp.ones(2))  # a wider start explodes
        z = numpyro.sample("z", StatePath(jnp.array([1.0, 0.0]), start, oscillator, noise, STEPS))
        return observe("y", dist.Poisson(jnp.exp(jnp.minimum(z @ C.T, 15.0))).to_event(2), data)


def model_of(system):
    return lambda y=None, batch_size=None: trials(y, batch_size, system=system)


def simulate(system):
    """Training and held-out trials."""
    y = numpyro.handlers.seed(model_of(system), jax.random.key(1))()
    return jnp.asarray(y, jnp.float32)


def bound(model, guide, params, y, num=64, batch=4):
    """ELBO per trial and its standard error; seconds of an evaluation with one draw of each path."""
    loss = Trace_ELBO()
    run = jax.jit(lambda keys: jax.lax.map(lambda k: loss.loss(k, params, model, guide, y), keys, batch_size=batch))
    values = -np.asarray(run(jax.random.split(jax.random.key(2), num))) / len(y)
    start = time.perf_counter()
    jax.block_until_ready(run(jax.random.split(jax.random.key(3), num)))
    return values.mean(), values.std() / num**0.5, (time.perf_counter() - start) / num


def compare(system, table, num_steps, num):
    model, y = model_of(system), simulate(system)
    train, held = y[:TRAIN], y[TRAIN:]
    scale = train if system == "lds" else jnp.log1p(train)
    encoder = nets.sequence_encoder(CHANNELS, 2, 1, data=scale, key=jax.random.key(0))
    guide = AmortizedStateSpace(model, encoder=encoder, rank=1, limit=6.0 if system != "lds" else None)
    optimizer = optax.chain(optax.clip_by_global_norm(1e5), optax.adam(optax.cosine_decay_schedule(2e-3, num_steps)))
    svi = SVI(model, guide, optimizer, TraceConditionalKL_ELBO(4))
    start = time.perf_counter()
    result = svi.run(jax.random.key(0), num_steps, train, BATCH, progress_bar=False)
    training = time.perf_counter() - start
    bad = int((~np.isfinite(np.asarray(result.losses))).sum())
    share = guide.exploded(jax.random.key(4), result.params, held)
    table.note(f"trained in {training:.0f} s; {bad} losses not finite; {share:.3f} of held-out draws explode", system)
    best = AutoStateSpace(model, rank=2, potentials="mode")
    svi = SVI(model, best, optax.sgd(0.0), Trace_ELBO())
    start_params = svi.get_params(svi.init(jax.random.key(0), held))
    target, error, seconds = bound(model, best, start_params, held, num)
    rows = {"encoder": guide}
    for rounds in (1, 2):
        name = f"encoder, {rounds} round{'s' * (rounds > 1)} of Gauss-Newton"
        rows[name] = guide.replace(refine=rounds, refine_rank=2)
    for name, own in rows.items():
        found, own_error, own_seconds = bound(model, own, result.params, held, num)
        below = 100 * (target - found) / abs(target)
        table.line(f"| {system} | {name} | {found:.2f} ± {own_error:.2f} | {below:.3f} | {1e3 * own_seconds:.1f} |")
    table.line(f"| {system} | potentials at the mode | {target:.2f} ± {error:.2f} | 0 | {1e3 * seconds:.1f} |")
    if system == "lds":
        ssm = pssm.LinearGaussianSSM(np.zeros(2), np.eye(2), TURN, np.eye(2), C, np.eye(CHANNELS))
        exact = np.mean(jax.vmap(lambda y: pssm.log_likelihood(ssm, y))(held))
        table.line(f"| {system} | exact log evidence | {exact:.2f} | {100 * (target - exact) / abs(target):.3f} | |")


def online(table, n=64, hidden=64, channels=50, num_samples=25):
    """Microseconds of an online step, compiled, one call after the other from Python."""
    f = nets.ResidualTransition(n, hidden, key=jax.random.key(0))

    def model(y):
        z = numpyro.sample("z", StatePath(jnp.zeros(n), Diagonal(jnp.ones(n)), f, Diagonal(0.3 * jnp.ones(n)), len(y)))
        observe("y", dist.Normal(z[:, :channels], 1.0).to_event(2), y)

    y = jnp.asarray(RNG.normal(size=(20, channels)), jnp.float32)
    encoder = nets.sequence_encoder(channels, n, 4, size=hidden, causal=True, key=jax.random.key(1))
    guide = AmortizedStateSpace(model, encoder=encoder, rank=4, causal=True, num_samples=num_samples)
    run = guide.online({}, y)
    state, _ = run.start(jax.random.key(0), y[0])
    state, _ = run.step(state, y[1])
    each = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            state, belief = run.step(state, y[1])
        jax.block_until_ready(belief)
        each.append((time.perf_counter() - start) / 200)
    fastest = f"{1e6 * min(each):.0f} to {1e6 * max(each):.0f} microseconds"
    table.note(f"online step, {num_samples} particles, gated recurrent unit of {hidden}: {fastest}", f"{n} states")


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--systems", default="lds,van_der_pol")
    args = parser.parse_args()
    table = Table(args.out)
    print_machine(table, ("numpyro", "equinox"))
    table.line("| system | potentials | bound per trial | % below the mode's | ms a draw of 50 trials |")
    table.line("|---|---|---|---|---|")
    for system in args.systems.split(","):
        compare(system, table, 200 if args.quick else 3000, 8 if args.quick else 64)
    online(table)
    table.print_notes()


if __name__ == "__main__":
    main()
