"""Numbers of trials as inputs, which are floats; and kernels whose sites have other names than `z` and `y`."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import seed, trace
from numpyro.infer import MCMC

import pssm
from pssm.distributions import StatePath
from pssm.events import draw
from pssm.kernels import PseudoMarginal

ONE = jnp.eye(1)
TRIALS = np.array([10.0, 3.0, 10.0, 5.0, 8.0, 7.0])[:, None]
COUNTS = np.array([1.0, 2.0, 3.0, np.nan, 2.0, 4.0])[:, None]
EMISSIONS = {
    "logits": lambda z, u: dist.Binomial(total_count=u, logits=z).to_event(1),
    "probs": lambda z, u: dist.Binomial(total_count=u, probs=jax.nn.sigmoid(z)).to_event(1),
    "beta": lambda z, u: dist.BetaBinomial(jnp.exp(z), 2.0 + 0 * z, total_count=u).to_event(1),
    "zero_inflated": lambda z, u: dist.ZeroInflatedDistribution(
        dist.Binomial(total_count=u, logits=z), gate=0.1 + 0 * z
    ).to_event(1),
}


def model(emission):
    return pssm.NonlinearSSM(jnp.zeros(1), ONE, lambda z, u: z, 0.3 * ONE, emission)


@pytest.mark.parametrize("name", EMISSIONS)
def test_trials_as_inputs(name, x64):
    """Float inputs give the draws and the estimates of integers that the emission holds itself."""
    given = model(EMISSIONS[name])
    held = model(lambda z, u: EMISSIONS[name](z, u.astype(int)))
    y = jax.jit(lambda u: pssm.simulate(jax.random.key(0), given, 6, u)[1])(TRIALS)
    np.testing.assert_array_equal(y, pssm.simulate(jax.random.key(0), held, 6, TRIALS)[1])
    assert (y <= TRIALS).all()
    assert (y >= 0).all()
    one, two = (
        pssm.particle_filter(jax.random.key(0), m, COUNTS, TRIALS, num_particles=50).log_likelihood
        for m in (given, held)
    )
    assert np.isfinite(one)
    assert float(one) == pytest.approx(float(two), abs=1e-10)


def test_binomials_with_float_trials_in_the_gaussian_filter():
    found = pssm.gaussian_filter(model(EMISSIONS["logits"]), COUNTS, TRIALS).log_likelihood
    assert np.isfinite(found)


def test_draws_look_into_wrappers():
    key = jax.random.key(1)
    n, p = jnp.array([4.0, 9.0]), jnp.array([[0.2, 0.8], [0.5, 0.5]])
    many = dist.Multinomial(n, p, total_count_max=9)
    np.testing.assert_array_equal(draw(many, key).sum(-1), n)
    assert (draw(dist.Binomial(n, 0.5).expand([3, 2]).to_event(2), key, (5,)) <= n).all()
    assert (draw(dist.Binomial(n, 0.5).mask(jnp.array([True, False])), key) <= n).all()

    np.testing.assert_array_equal(draw(dist.Normal(n, 1.0), key), dist.Normal(n, 1.0).sample(key))
    with pytest.raises(ValueError, match="`total_count` of BinomialProbs must be whole numbers; got 2.5"):
        draw(dist.BinomialProbs(0.5, jnp.array([2.0, 2.5]), validate_args=False).to_event(1), key)


def counts_model(counts=None, trials=TRIALS):
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    path = numpyro.sample("level", StatePath(jnp.zeros(1), ONE, ONE, sd * ONE, len(trials)))
    pssm.observe("counts", dist.Binomial(total_count=jnp.asarray(trials), logits=path).to_event(2), counts)


def test_a_numpyro_model_draws_with_float_trials():
    drawn = trace(seed(counts_model, 0)).get_trace()["counts"]["value"]
    assert ((drawn >= 0) & (drawn <= TRIALS)).all()


def test_sites_of_other_names_are_pointed_to():
    def build(sites):
        emission = EMISSIONS["logits"]
        return pssm.NonlinearSSM(jnp.zeros(1), ONE, lambda z, u: z, sites["sd"] * ONE, emission)

    def run(left_out, *args):
        kernel = PseudoMarginal(counts_model, build, COUNTS, TRIALS, num_particles=20, left_out=left_out)
        mcmc = MCMC(kernel, num_warmup=2, num_samples=3, progress_bar=False)
        mcmc.run(jax.random.key(0), *args)
        return mcmc.get_samples()["sd"]

    with pytest.raises(ValueError, match=r"`left_out` must name the path 'level'"):
        run(("z", "y"))
    with pytest.raises(ValueError, match=r"'counts' is discrete.*name it: \('level', 'counts'\)"):
        run(("level",))
    with pytest.raises(ValueError, match=r"log density of the site 'counts'.*name it: \('level', 'counts'\)"):
        run(("level",), COUNTS)
    assert np.isfinite(run(("level", "counts"), COUNTS)).all()
