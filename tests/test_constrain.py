"""`constrain`: where the weight settles has a closed form for a linear model; states, rules, minibatches, `fit_svi`."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from pssm.distributions import observe
from pssm.infer import constrain, elbo, fit_svi

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Y = jnp.asarray(
    RNG.normal(size=(200, 2)) @ RNG.normal(size=(2, 6)) * 0.5 + 0.1 * RNG.normal(size=(200, 6)), jnp.float32
)


def model(y, batch_size=None):
    C = numpyro.param("C", 0.1 * jax.random.normal(jax.random.key(1), (2, 6)))
    with numpyro.plate("n", len(y), subsample_size=batch_size) as i:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(z @ C, 1.0).to_event(1), obs=y[i])


def guide(y, batch_size=None):
    V = numpyro.param("V", 0.1 * jax.random.normal(jax.random.key(2), (6, 2)))
    s = numpyro.param("s", jnp.ones(2), constraint=dist.constraints.positive)
    with numpyro.plate("n", len(y), subsample_size=batch_size) as i:
        numpyro.sample("z", dist.Normal(y[i] @ V, s).to_event(1))


def trained(batch_size=None, num_steps=2500, **options):
    svi = SVI(constrain(model, site="y", **options), guide, optax.adam(0.02), Trace_ELBO())
    result = svi.run(KEY, num_steps, Y, batch_size=batch_size, progress_bar=False)
    return {name: float(x) for name, x in result.state.mutable_state["y$constraint"].items()}


@pytest.mark.parametrize(("rule", "batch_size"), [("rewo", 50), ("geco", None)])
def test_it_settles_at_the_bound_with_the_weight_of_the_closed_form(rule, batch_size):
    """A weight w is a noise of variance 1/w, and then probabilistic PCA: its squared error is 2/w and what is left."""
    left = np.linalg.eigvalsh(np.asarray(Y.T @ Y) / len(Y))[:4].sum()
    weight = 2 / (6 * 0.05 - left)
    found = trained(rule=rule, bound=0.05, batch_size=batch_size, decay=0.99)
    assert abs(found["distortion"] / 0.05 - 1) < 0.02
    assert abs(found["weight"] / weight - 1) < 0.05
    assert found["met"] == 1


def test_a_bound_that_does_not_bind_leaves_the_elbo():
    assert trained(bound=2.0, num_steps=1500)["weight"] == pytest.approx(1.0, abs=1e-3)


def after_a_step(weight, distortion, met, step=5.0, **options):
    """The state after a run of a model whose squared error is 4."""

    def fixed():
        numpyro.sample("y", dist.Normal(jnp.zeros(3), 1.0).to_event(1), obs=2 * jnp.ones(3))

    state = {"weight": weight, "distortion": distortion, "met": met, "step": step}
    held = constrain(fixed, site="y", **{"bound": 4.0, "decay": 0.0, "rate": 0.1, **options})
    given = {"y$constraint": {name: jnp.asarray(x) for name, x in state.items()}}
    trace = handlers.trace(handlers.substitute(held, data=given)).get_trace()
    return {name: float(x) for name, x in trace["y$constraint"]["value"].items()}, trace


def test_steps_of_the_rules_are_those_of_the_formulas():
    new, trace = after_a_step(10.0, 9.0, 1.0, bound=5.0)  # satisfied by a fifth
    f = np.tanh(2.0 * (1 / 10.0 - 1))
    assert new["weight"] == pytest.approx(10 * np.exp(-0.1 * np.tanh(1 / 10.0 - 1) * -0.2), rel=1e-5)
    assert new["distortion"] == pytest.approx(4.0)
    assert float(trace["y"]["scale"]) == 10.0
    new, _ = after_a_step(10.0, 9.0, 1.0, bound=5.0, sharpness=2.0)
    assert new["weight"] == pytest.approx(10 * np.exp(-0.1 * f * -0.2), rel=1e-5)
    new, _ = after_a_step(10.0, 9.0, 1.0, bound=3.2)  # violated by a quarter
    assert new["weight"] == pytest.approx(10 * np.exp(0.1 * 0.25), rel=1e-5)
    new, _ = after_a_step(10.0, 9.0, 0.0, bound=3.2)  # never met: it waits
    assert (new["weight"], new["met"]) == (10.0, 0.0)
    new, _ = after_a_step(0.5, 9.0, 1.0, bound=5.0, rule="geco")
    assert new["weight"] == pytest.approx(0.5 * np.exp(0.1 * -0.2), rel=1e-5)
    new, _ = after_a_step(9e3, 9.0, 1.0, bound=1e-3, rate=5.0)  # clipped twice
    assert new["weight"] == 1e4
    new, _ = after_a_step(7.0, 9.0, 0.0, rule="linear-anneal", start=4.0, anneal_steps=10)
    assert new["weight"] == pytest.approx(1 / (0.5 + 0.5 / 4))
    new, _ = after_a_step(10.0, 9.0, 0.0, decay=0.75)
    assert new["distortion"] == pytest.approx(0.75 * 9 + 0.25 * 4)


def test_a_state_that_is_new_has_the_weight_of_the_elbo():
    new, trace = after_a_step(10.0, 9.0, 0.0, step=0.0)
    assert float(trace["y"]["scale"]) == 1.0
    assert new == {"weight": 10.0, "distortion": 9.0, "met": 0.0, "step": 1.0}
    params = {"C": jnp.ones((2, 6)), "V": jnp.ones((6, 2)), "s": jnp.ones(2)}
    held = constrain(model, site="y", bound=0.05)
    assert Trace_ELBO().loss(KEY, params, held, guide, Y) == Trace_ELBO().loss(KEY, params, model, guide, Y)


def test_missing_entries_and_plates_do_not_count():
    y = Y[:20].at[3].set(jnp.nan).at[5, 2].set(100.0)

    def gaps(y, batch_size=None):
        with numpyro.plate("n", len(y), subsample_size=batch_size) as i:
            observe("y", dist.Normal(jnp.zeros(6), 2.0).to_event(1), y[i])

    for distortion, expected in (
        ("mse", np.nanmean(np.asarray(y) ** 2)),
        ("nll", np.nanmean(np.asarray(y) ** 2) / 8 + np.log(2) + 0.5 * np.log(2 * np.pi)),
        (lambda fn, value: jnp.nanmax(value), 100.0),
    ):
        held = constrain(gaps, site="y", bound=1.0, distortion=distortion)
        state = {"weight": jnp.array(3.0), "distortion": jnp.zeros(()), "met": jnp.zeros(()), "step": jnp.ones(())}
        run = handlers.substitute(handlers.seed(held, KEY), data={"y$constraint": state})
        trace = handlers.trace(run).get_trace(y)
        assert float(trace["y$constraint"]["value"]["distortion"]) == pytest.approx(expected, rel=1e-5)
    state = dict(state)
    trace = handlers.trace(handlers.substitute(handlers.seed(held, KEY), data={"y$constraint": state})).get_trace(y, 5)
    assert float(trace["y"]["scale"]) == 3.0 * 4  # the weight, and what a minibatch stands for


@pytest.mark.filterwarnings("ignore:SVI has not converged")
def test_fit_svi_carries_the_state_and_validates_the_bound():
    held = constrain(model, site="y", bound=0.05, start=20.0)
    fit = fit_svi(
        held, Y[:100], guide=guide, num_steps=60, validation=(Y[100:],), validate_every=20, progress_bar=False
    )
    assert float(fit.state.mutable_state["y$constraint"]["step"]) > 20
    assert fit.objective.startswith("surrogate: the likelihood of `y` has the weight 20")
    plain = Trace_ELBO().loss(jax.random.split(KEY)[1], fit.params, model, guide, Y[100:])
    assert fit.validation[:, 1].min() == pytest.approx(float(plain), rel=0.05)  # not 20 times as much
    bound, _ = elbo(fit, num_particles=10)
    assert bound == pytest.approx(-float(Trace_ELBO().loss(KEY, fit.params, model, guide, Y[:100])), rel=0.05)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="`site` must be an observed site of the model; got 'x', and it observes y"):
        handlers.trace(handlers.seed(constrain(model, site="x", bound=1.0), KEY)).get_trace(Y)
    with pytest.raises(ValueError, match="`site` must be an observed site"):
        handlers.trace(handlers.seed(constrain(model, site="z", bound=1.0), KEY)).get_trace(Y)
    for options, match in (
        ({"rule": "reco"}, "`rule` must be one of"),
        ({"distortion": "mae"}, "`distortion` must be one of"),
        ({"bound": -1.0}, "`bound` must be positive"),
        ({"start": 0.0}, "`start` must be from"),
        ({"rate": 0.0}, "`rate` must be positive"),
        ({"decay": 1.0}, "`decay` must be"),
    ):
        with pytest.raises(ValueError, match=match):
            constrain(model, **{"site": "y", "bound": 1.0, **options})
    with pytest.raises(TypeError, match="`model` must be"):
        constrain("model", site="y", bound=1.0)
