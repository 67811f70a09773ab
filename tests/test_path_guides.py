"""What every guide of a path can do, wherever its posterior comes from: new data, the past alone, nothing kept."""

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from numpyro.infer.util import log_density

from pssm import nets
from pssm.distributions import StatePath, observe
from pssm.guides import AmortizedFrames, AmortizedStateSpace, AutoStateSpace, DeepKalmanGuide, PathGuide
from pssm.guides.posteriors import AtMode, Form
from pssm.infer import SVIFit, causal_draws, posterior_draws, transport_reparam
from pssm.models import extended_kalman_vae

TRIALS, T = 3, 5
Y = np.random.default_rng(0).normal(size=(TRIALS, T, 1)).astype(np.float32)
Y[1, 2] = np.nan
KEYS = jax.random.split(jax.random.key(0), 4)


def trials(y):
    """A free scale, so that there is another site beside the paths, and one that is deterministic."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    steps = y.shape[1]
    with numpyro.plate("trials", len(y)):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), steps))
        numpyro.deterministic("double", 2 * y)
        observe("y", dist.Normal(z, scale).to_event(2), y)


def encoder():
    return nets.sequence_encoder(n_obs=1, n_state=1, rank=1, size=4, key=KEYS[0])


def features():
    return nets.RecurrentFeatures(nets.StepMLP(1, 4, hidden=4, key=KEYS[0]), nets.GRU(4, 4, key=KEYS[1]))


MADE = {
    "free": lambda: AutoStateSpace(trials, rank=1),
    "mode": lambda: AutoStateSpace(trials, rank=1, potentials="mode", global_guide=AutoMultivariateNormal),
    "encoder": lambda: AmortizedStateSpace(trials, encoder=encoder(), rank=1, masking=nets.hide_steps(0.2)),
    "conditionals": lambda: DeepKalmanGuide(trials, encoder=features(), combiner=nets.Combiner(1, 4, key=KEYS[2])),
    "moment-matched": lambda: AutoStateSpace(trials, rank=1, family="moment_matched", num_samples=5),
}


@pytest.fixture(scope="module")
def started():
    """The guides after their first call, by kind, each with its parameters."""
    made = {}

    def start(kind):
        if kind not in made:
            guide = MADE[kind]()
            guide.prepare(KEYS[0], Y)
            params = jax.jit(lambda key: params_of(guide, key))(KEYS[1])
            made[kind] = guide, params
        return made[kind]

    return start


def params_of(guide, key):
    trace = handlers.trace(handlers.seed(guide, key)).get_trace(Y)
    return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}


def arrays_in(x, seen):
    """All arrays that an object holds: in its attributes, in containers, in the closures of functions."""
    if id(x) in seen or isinstance(x, type | types.ModuleType | str | bytes | int | float):
        return
    seen[id(x)] = x
    if isinstance(x, np.ndarray | jax.Array):
        yield x
        return
    inside = [x.values()] if isinstance(x, dict) else [x] if isinstance(x, list | tuple | set | frozenset) else []
    if isinstance(x, partial):
        inside.append([x.func, x.args, x.keywords])
    if isinstance(x, types.FunctionType):
        inside.append([cell.cell_contents for cell in x.__closure__ or ()])
    if isinstance(x, types.MethodType):
        inside.append([x.__self__, x.__func__])
    if hasattr(x, "__dict__") and not isinstance(x, types.FunctionType):
        inside.append(vars(x).values())
    for values in inside:
        for value in list(values):
            yield from arrays_in(value, seen)


@pytest.mark.parametrize("kind", MADE)
def test_nothing_of_the_data_is_kept(kind, started):
    guide, _ = started(kind)
    assert isinstance(guide, AutoGuide)
    assert not [x for x in arrays_in(guide, {}) if x.size == Y.size]
    guide = MADE[kind]()
    guide.found_by_the_search = partial(lambda y: y, {"y": [Y]})
    assert [x for x in arrays_in(guide, {}) if x.size == Y.size]


@pytest.mark.parametrize("kind", MADE)
def test_new_data(kind, started):
    """Another number of trials, and another length."""
    guide, params = started(kind)
    new = np.zeros((2, T + 2, 1), np.float32)
    draw = partial(guide.sample_posterior, jax.random.key(0), params)
    if kind in ("free", "moment-matched"):
        with pytest.raises(ValueError, match=r"`z_auto_center`.*\(3, 5, 1\).*\(2, 7, 1\)"):
            draw(new)
        return
    found = draw(new, sample_shape=(4,))
    assert {name: x.shape for name, x in found.items()} == {"scale": (4,), "z": (4, 2, T + 2, 1)}
    assert np.isfinite(found["z"]).all()
    with pytest.raises(ValueError, match="a guide keeps no data"):
        draw()


@pytest.mark.parametrize("kind", MADE)
def test_given_the_past(kind, started):
    """The draws do not change with the future, and they do with the past."""
    guide, params = started(kind)
    draw = jax.jit(lambda origin, y: guide.given_past(jax.random.key(0), params, origin, y, sample_shape=(3,))["z"])
    found = draw(3, Y)
    assert found.shape == (3, TRIALS, T, 1)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, draw(3, np.where(np.arange(T)[:, None] < 3, Y, Y + 50)))
    assert np.abs(found - draw(3, np.where(np.arange(T)[:, None] == 2, Y + 5, Y)))[:, :, :3].max() > 1e-3
    assert np.abs(found - draw(4, Y)).max() > 1e-4


def test_data_that_a_function_picks_have_no_known_past():
    guide = AmortizedStateSpace(trials, encoder=encoder(), rank=1, data=lambda y: y)
    with pytest.raises(ValueError, match="`data` is a function"):
        guide.given_past(jax.random.key(0), {}, 2, Y)


@pytest.mark.parametrize("kind", ["encoder", "conditionals"])
def test_transport_through_networks_keeps_the_posterior(kind, started):
    """The density in the new coordinates is the model's own; the Jacobian is that of automatic differentiation."""
    guide, params = started(kind)
    easy = transport_reparam(handlers.substitute(trials, data=params), guide)

    @jax.jit
    def both(e, scale):
        values = {"scale": scale, "z_base": e}

        def path(e):
            model = handlers.seed(handlers.substitute(easy, data={**values, "z_base": e}), 0)
            return handlers.trace(model).get_trace(Y)["z"]["value"].reshape(-1)

        own = {"scale": scale, "z": path(e).reshape(TRIALS, T, 1)}
        jacobian = jax.jacfwd(path)(e).reshape(TRIALS * T, TRIALS * T)
        own = log_density(trials, (Y,), {}, own)[0] + jnp.linalg.slogdet(jacobian)[1]
        return log_density(easy, (Y,), {}, values)[0], own

    found, expected = both(jax.random.normal(jax.random.key(3), (TRIALS, T)), 0.8)
    assert float(found) == pytest.approx(float(expected), abs=1e-3)


def test_a_posterior_of_your_own():
    """One method is enough; here the potentials at the mode, with half of their precision."""

    class Halved(AtMode):
        def distribution(self, site):
            q = super().distribution(site)
            p = q.potential
            return type(q)(q.prior, p.slope, p.factor / np.sqrt(2), diag=p.diagonal / 2, center=p.center)

    form = Form.of("chain", 1, True, 25)
    both = [PathGuide(trials, kind(form)) for kind in (AtMode, Halved)]
    fixed = [handlers.substitute(guide, data={"scale": jnp.ones(())}) for guide in both]
    draws = [jax.jit(lambda key, g=g: handlers.seed(g, key)(Y)["z"])(jax.random.key(1)) for g in fixed]
    assert np.abs(draws[0] - draws[1]).max() > 0.01
    assert both[0].objective.startswith("lower bound")


@pytest.mark.slow
def test_the_guide_of_frames_is_an_automatic_guide():
    frames = np.random.default_rng(1).normal(size=(4, T, 3)).astype(np.float32)
    frames[0, 2] = np.nan
    model = partial(extended_kalman_vae, num_states=2, num_codes=2, num_bases=2, hidden=4)
    own = nets.FrameEncoder(nets.StepMLP(3, 4, hidden=4, key=KEYS[0]), 2, key=KEYS[1])
    guide = AmortizedFrames(model, encoder=own)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 3, frames, progress_bar=False)
    fit = SVIFit.of(svi, result, frames)
    assert isinstance(guide, AutoGuide)
    assert not [x for x in arrays_in(guide, {}) if x.size == frames.size]
    draws = posterior_draws(fit, num_samples=6)
    assert draws["z"].shape == (1, 6, 4, T, 2)
    new = guide.median(result.params, frames[:2, :4], num_samples=20)
    assert {name: x.shape for name, x in new.items()} == {"a": (2, 4, 2), "z": (2, 4, 2)}
    before = causal_draws(fit, [2, 4], num_samples=3)
    fit.args = (np.where(np.arange(T)[:, None] < 2, frames, frames + 9),)
    after = causal_draws(fit, [2, 4], num_samples=3)
    for name in ("a", "z"):
        np.testing.assert_array_equal(before[name][0], after[name][0])
        assert np.abs(before[name][1] - after[name][1]).max() > 1e-3
