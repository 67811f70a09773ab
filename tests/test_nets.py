"""Networks: parallel and sequential runs agree, missing data say nothing, fixed parts stay."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from pssm import nets
from pssm.nets.mixers import scan_steps
from pssm.nets.potentials import as_pseudo_observation, potential_size, split_numbers

T, KEY = 12, jax.random.key(0)
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(T, 3)).astype(np.float32)
Y[4], Y[7, 1], Y[-2:] = np.nan, np.nan, np.nan
U = RNG.normal(size=(T, 2)).astype(np.float32)
MIXERS = {
    "gru": lambda: nets.GRU(3, 8, key=KEY),
    "lstm": lambda: nets.LSTM(3, 8, key=KEY),
    "s5": lambda: nets.S5(3, 8, n_state=16, blocks=2, depth=2, key=KEY),
    "attention": lambda: nets.SelfAttention(3, 8, window=5, key=KEY),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("double", [False, True])
def test_a_mixer_all_at_once_is_the_mixer_step_by_step(name, double):
    with jax.enable_x64(double):
        mixer = MIXERS[name]()
        x = jnp.asarray(RNG.normal(size=(40, 3)), jnp.result_type(float))
        both = eqx.filter_jit(lambda m, x: (m(x), scan_steps(m, x)))(mixer, x)
        np.testing.assert_allclose(*both, atol=1e-12 if double else 2e-6)
        assert both[0].shape == (40, 8)
        assert both[0].dtype == x.dtype


def test_s5_keeps_one_of_each_conjugate_pair():
    """Half of the states with twice the real part are the full real recurrence."""
    from pssm.nets.s5 import hippo_normal

    n = 8
    i = np.arange(n)
    root = np.sqrt(1 + 2 * i)
    A = -(np.tril(np.outer(root, root)) - np.diag(i)) + np.outer(np.sqrt(i + 0.5), np.sqrt(i + 0.5))
    values, vectors = hippo_normal(n)
    np.testing.assert_allclose(2 * ((vectors * values) @ vectors.conj().T).real, A, atol=1e-12)
    B, C = RNG.normal(size=(n, 2)), RNG.normal(size=(2, n))
    full = C @ np.linalg.solve(3.0 * np.eye(n) - A, B)
    half = 2 * ((C @ vectors / (3.0 - values)) @ (vectors.conj().T @ B)).real
    np.testing.assert_allclose(half, full, atol=1e-10)


def test_attention_both_ways_sees_the_future_and_a_long_series_needs_a_window():
    x = jnp.asarray(RNG.normal(size=(9, 3)), jnp.float32)
    both = nets.SelfAttention(3, 8, causal=False, key=KEY)
    assert not np.allclose(both(x)[0], both(x.at[-1].add(1.0))[0])
    with pytest.raises(ValueError, match="`window`"):
        both.start()


@pytest.mark.parametrize("mixer", ["gru", "s5"])
def test_causal_encoder_online_equals_batch(mixer):
    encode = nets.sequence_encoder(3, 2, 1, mixer=mixer, size=8, causal=True, n_input=2, data=Y, key=KEY)
    assert encode.causal

    @eqx.filter_jit
    def both(encode, y, u):
        return encode(y, u), jax.lax.scan(lambda s, x: encode.step(s, *x), encode.start(), (y, u))[1]

    batch, online = both(encode, jnp.asarray(Y), jnp.asarray(U))
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(online), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_array_equal(batch.mask, ~np.isnan(Y).all(1))
    with pytest.raises(ValueError, match="`reverse=False`"):
        nets.sequence_encoder(3, 2, 1, size=8, key=KEY).start()


def smoothing(rank_alpha=1, rank_beta=2):
    keys = jax.random.split(KEY, 4)
    local = nets.LocalEncoder(nets.StepMLP(3, 8, key=keys[0]), nets.PotentialHead(8, 2, rank_alpha, key=keys[1]))
    mixer = nets.GRU(local.head.size, 8, key=keys[2])
    return nets.SmoothingEncoder(local, nets.BackwardEncoder(mixer, nets.PotentialHead(8, 2, rank_beta, key=keys[3])))


def test_local_and_backward_parts():
    encode = eqx.filter_jit(smoothing())
    alpha, beta = (p.masked() for p in encode(jnp.asarray(Y)))
    for missing in (4, T - 2, T - 1):  # a step without data has no alpha
        assert float(jnp.abs(alpha.K[missing]).max()) == float(alpha.diag[missing].max()) == 0.0
    assert float(beta.diag[3].max()) > 0  # but others know of it
    for last in (T - 3, T - 2, T - 1):  # nothing is observed after these
        assert float(jnp.abs(beta.K[last]).max()) == float(beta.diag[last].max()) == 0.0
    changed = encode(jnp.asarray(Y).at[5].add(1.0))
    moved = jnp.abs(changed[1].diag - beta.diag).max(-1) > 0
    np.testing.assert_array_equal(moved[:5], True)  # beta is of what comes after
    np.testing.assert_array_equal(np.asarray(changed[1].masked().diag[5:] != beta.diag[5:]).any(), False)
    total = as_pseudo_observation([alpha, beta], 0.3 * jnp.ones((T, 2)), 3, True)
    assert total.K.shape == (T, 2, 3)


def test_a_product_of_pseudo_observations_is_the_product_of_their_densities():
    sd, z = jnp.array([[0.5, 2.0]]) * jnp.ones((T, 1)), jnp.asarray(RNG.normal(size=(2, T, 2)), jnp.float32)
    parts = [split_numbers(jnp.asarray(RNG.normal(size=(T, potential_size(2, r))), jnp.float32), 2, r) for r in (1, 2)]
    parts = [p.in_state_units(sd) for p in parts]
    parts.append(nets.PseudoObservation(jnp.ones((T, 2, 1)), k=jnp.ones((T, 2))))

    def log_density(p, z):
        a = {"center": 0.0, "diag": 0.0, "b": 0.0} | p.arguments()
        x = z - a["center"]
        pull = jnp.einsum("tnr,tn->tr", a["K"], x)
        return jnp.sum(a["k"] * x - 0.5 * a["diag"] * x**2, -1) + jnp.sum(a["b"] * pull - 0.5 * pull**2, -1)

    whole = parts[0] + parts[1] + parts[2]
    each = sum(log_density(p, z[0]) - log_density(p, z[1]) for p in parts)
    np.testing.assert_allclose(log_density(whole, z[0]) - log_density(whole, z[1]), each, rtol=1e-3, atol=1e-3)


def test_rank_zero_is_a_diagonal_alone():
    """For `family="diagonal"`: the tied form has no slope of its own, and there is no column to take its shape from."""
    head = nets.PotentialHead(3, n_state=2, rank=0, key=jax.random.key(0))
    one = head.split(head.numbers(jnp.ones(3)))
    found = one.in_state_units(jnp.ones(2)).arguments()
    assert found["K"].shape == (2, 0)
    np.testing.assert_array_equal(found["k"], [0.0, 0.0])
    both = one.in_state_units(jnp.ones(2)) + nets.PseudoObservation(jnp.zeros((2, 0)), diag=jnp.ones(2), c=jnp.ones(2))
    np.testing.assert_allclose(both.diag, one.diag + 1, rtol=1e-6)
    np.testing.assert_allclose(both.c, (one.diag * one.c + 1) / (one.diag + 1), rtol=1e-5)


def test_what_an_encoder_may_return():
    sd = jnp.ones((T, 2))
    k, K, diag = jnp.ones((T, 2)), jnp.ones((T, 2, 1)), jnp.ones((T, 2))
    assert as_pseudo_observation((k, K, diag), sd, 1, True).k is not None
    assert as_pseudo_observation(jnp.zeros((T, potential_size(2, 1))), sd, 1, True).diag.shape == (T, 2)
    for found, match in (
        ("nothing", "`encoder` must return"),
        ((k, K), "no diagonal, and"),
        ((k, jnp.ones((T, 2, 2)), diag), "`K` of shape"),
        (jnp.zeros((T, 3)), "`encoder` must have shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            as_pseudo_observation(found, sd, 1, True)


def test_front_ends_do_not_see_what_is_missing():
    y, seen = jnp.array([1.0, 5.0, 2.0]), jnp.array([True, False, True])
    for front in (nets.StepMLP(3, 4, data=Y, key=KEY), nets.AdditiveFeatures(3, 4, n_input=2, key=KEY)):
        u = jnp.ones(2) if isinstance(front, nets.AdditiveFeatures) else None
        np.testing.assert_array_equal(front(y, seen, u), front(y.at[1].set(0.0), seen, u))
        assert front(y, seen, u).shape == (4,)
    additive = nets.AdditiveFeatures(3, 4, key=KEY)
    parts = sum(additive(y, jnp.arange(3) == i) for i in (0, 2))
    np.testing.assert_allclose(additive(y, seen), parts, atol=1e-6)
    frame = jnp.ones((8, 8))
    cnn = nets.StridedCNN((8, 8), 4, key=KEY)
    assert cnn(frame, frame > 0).shape == (4,)
    with pytest.raises(ValueError, match="`shape`"):
        nets.StridedCNN((8,), key=KEY)


def test_hiding():
    y = jnp.ones((200, 5))
    hidden = jnp.isnan(nets.hide_entries(0.3)(KEY, y))
    assert 0.2 < float(hidden.mean()) < 0.4
    steps = jnp.isnan(nets.hide_steps(0.3)(KEY, y))
    np.testing.assert_array_equal(steps.all(1), steps.any(1))
    assert 0.2 < float(steps.mean()) < 0.4
    end = jnp.isnan(nets.hide_end(50)(KEY, y))
    assert not end[:50].any()
    seen, scored = nets.coordinated_dropout(KEY, y, 0.25)
    np.testing.assert_array_equal(jnp.isnan(seen), ~jnp.isnan(scored))
    with pytest.raises(ValueError, match="`rate`"):
        nets.hide_steps(1.0)


TRANSITIONS = {
    "gated": lambda: nets.GatedTransition(4, 8, n_input=1, key=KEY),
    "gru": lambda: nets.GRUTransition(4, 8, n_input=1, key=KEY),
    "residual": lambda: nets.ResidualTransition(4, 8, n_input=1, key=KEY),
    "mechanical": lambda: nets.MechanicalTransition(4, 8, n_input=1, key=KEY),
    "mixture": lambda: nets.LocallyLinearTransition(4, 3, n_input=1, key=KEY),
    "graph": lambda: nets.GraphTransition(np.array([[0.0, 1.0], [1.0, 0.0]]), 2, key=KEY),
    "saturated": lambda: nets.Saturated(lambda z, u: z**3, 5.0),
}


@pytest.mark.parametrize("name", TRANSITIONS)
def test_transitions(name):
    f = TRANSITIONS[name]()
    z = jnp.asarray(RNG.normal(size=4), jnp.float32)
    value, slope = eqx.filter_jit(lambda f, z: (f(z, jnp.ones(1)), jax.jacobian(f)(z, jnp.ones(1))))(f, z)
    assert value.shape == (4,)
    assert np.isfinite(slope).all()
    if name == "graph":
        np.testing.assert_allclose(slope, f.matrix, atol=1e-6)
    if name == "mechanical":
        np.testing.assert_allclose(value[:2], z[:2] + value[2:], atol=1e-6)  # places move by the new velocity
        with pytest.raises(ValueError, match="`n_state` must be even"):
            nets.MechanicalTransition(3, key=KEY)
    if name == "saturated":
        assert float(jnp.abs(f(1e6 * z, None)).max()) <= 5.0


def test_decoders():
    z = jnp.ones(3)
    for kind in (nets.LinearDecoder, nets.MLPDecoder):
        assert kind(3, 5, key=KEY)(z).shape == (5,)
        part = kind(3, 5, num_read=2, key=KEY)
        np.testing.assert_array_equal(part(z), part(z.at[2].set(9.0)))
        with pytest.raises(ValueError, match="`num_read`"):
            kind(3, 5, num_read=4, key=KEY)
    assert nets.FrameDecoder(3, (8, 12), key=KEY)(z).shape == (8, 12)


class Readout(eqx.Module):
    H: jax.Array
    bias: jax.Array
    constant: np.ndarray


def test_fixed_parts_do_not_move():
    start = Readout(jnp.ones((2, 2)), jnp.zeros(2), np.ones(2))

    def model(y):
        net = nets.register("readout", start, fixed=lambda m: m.H)
        x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(net.H @ x + net.bias * net.constant, 0.1).to_event(1), obs=y)

    svi = SVI(model, AutoNormal(model), optax.adamw(0.1, weight_decay=0.1), Trace_ELBO())
    result = svi.run(KEY, 5, jnp.array([3.0, -3.0]), progress_bar=False)
    found = result.params["readout$params"]
    assert found.H is None
    assert found.constant is None
    assert np.abs(found.bias).min() > 0.1
    whole = eqx.combine(found, start)
    np.testing.assert_array_equal(whole.H, start.H)
    assert nets.register("none", start, trainable=lambda x: False) is start
