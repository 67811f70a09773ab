"""`neural_ssm` and `deep_markov`: shapes, trials and minibatches, emissions, parts that are given."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI

from pssm import nets
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.infer import TraceConditionalKL_ELBO
from pssm.models import deep_markov, neural_ssm

KEY = jax.random.key(0)
COUNTS = np.random.default_rng(0).poisson(2.0, (6, 8, 3)).astype(np.float32)
COUNTS[0, 3], COUNTS[1, 2, 1] = np.nan, np.nan


def traced(*args, **options):
    return handlers.trace(handlers.seed(partial(neural_ssm, **options), 0)).get_trace(*args)


def test_shapes_of_trials_and_minibatches():
    trace = traced(COUNTS, emission="poisson", batch_size=2, u=np.ones((8, 1)))
    assert trace["z"]["value"].shape == (2, 8, 2)
    assert trace["y"]["value"].shape == (2, 8, 3)
    assert trace["y"]["scale"] == trace["z"]["scale"] == 3.0
    made = traced(num_steps=5, num_obs=4, num_trials=3, emission="bernoulli")
    assert made["y"]["value"].shape == (3, 5, 4)
    assert set(np.unique(made["y"]["value"])) <= {0, 1}


def test_given_parts_are_used_and_modules_are_parameters():
    C = np.arange(6.0).reshape(3, 2)
    net = nets.GatedTransition(2, 4, key=KEY)
    trace = traced(COUNTS, emission="poisson", readout=C, transition=net)
    assert "C" not in trace
    assert isinstance(trace["transition$params"]["value"], nets.GatedTransition)
    decoder = nets.MLPDecoder(2, 3, hidden=4, key=KEY)
    trace = traced(COUNTS, readout=decoder, transition=lambda z, u: 0.9 * z)
    assert "readout$params" in trace
    assert not {"transition$params", "C", "d"} & set(trace)
    trace = traced(COUNTS[0], weights="random", hidden=4)
    assert trace["transition_in"]["value"].shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"emission": "gamma"}, "`emission` must be one of"),
        ({"readout": np.ones((2, 2))}, "`readout` must have shape"),
        ({"states": "ekf"}, '`states` must be "sampled" for several trials'),
        ({"transition": lambda z, u: z, "weights": "random"}, '`weights="random"` goes with the default'),
    ],
)
def test_what_does_not_fit_is_named(options, match):
    with pytest.raises(ValueError, match=match):
        traced(COUNTS, **options)


def test_an_amortised_guide_trains_it_and_leaves_fixed_parts():
    graph = nets.GraphTransition(np.array([[0.0, 1.0], [1.0, 0.0]]), key=KEY)
    model = partial(neural_ssm, emission="poisson", transition=graph)
    encoder = nets.sequence_encoder(3, 2, 1, size=4, key=KEY)
    guide = AmortizedStateSpace(model, encoder=encoder, rank=1)
    svi = SVI(model, guide, optax.adam(1e-2), TraceConditionalKL_ELBO())
    result = svi.run(KEY, 30, COUNTS, batch_size=3, progress_bar=False)
    assert np.isfinite(result.losses).all()
    found = result.params["transition$params"]
    assert found.graph is None
    assert np.abs(found.theta - graph.theta).max() > 0.01
    assert eqx.combine(found, graph)(jnp.ones(2)).shape == (2,)
    draws = guide.sample_posterior(KEY, result.params, COUNTS[:2], sample_shape=(3,))
    assert draws["z"].shape == (3, 2, 8, 2)
    assert draws["C"].shape == (3, 3, 2)


def test_deep_markov_is_neural_ssm_with_its_networks():
    model = partial(deep_markov, num_states=2, hidden=4, emission="poisson")
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(COUNTS, batch_size=2, u=np.ones((8, 1)))
    assert trace["z"]["value"].shape == (2, 8, 2)
    assert isinstance(trace["transition$params"]["value"], nets.GatedTransition)
    assert isinstance(trace["decoder$params"]["value"], nets.MLPDecoder)
    rate = trace["y"]["fn"].mean
    assert 1.0 < float(rate.mean()) < 4.0  # about the data's
    own = handlers.trace(handlers.seed(partial(model, decoder=lambda z: z, transition=lambda z, u: z), 0)).get_trace(
        num_steps=4, num_obs=2, num_trials=3
    )
    assert own["y"]["value"].shape == (3, 4, 2)
    assert "decoder$params" not in own
    with pytest.raises(TypeError, match="`decoder` must be a function"):
        deep_markov(COUNTS, decoder=np.eye(3))


@pytest.mark.parametrize("amortised", [False, True])
def test_deep_markov_trains_with_the_path_guides(amortised):
    model = partial(deep_markov, num_states=2, hidden=4, emission="poisson")
    encoder = nets.sequence_encoder(3, 2, 0, size=4, key=KEY)
    if amortised:
        guide = AmortizedStateSpace(model, encoder=encoder, rank=0, family="diagonal")
    else:
        guide = AutoStateSpace(model, rank=1)
    svi = SVI(model, guide, optax.adam(1e-2), TraceConditionalKL_ELBO())
    result = svi.run(KEY, 200, COUNTS, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert result.losses[-50:].mean() < result.losses[:50].mean() - 1
    assert np.isfinite(guide.sample_posterior(KEY, result.params, COUNTS)["z"]).all()
