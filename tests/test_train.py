"""Training: schedules, clipping, validation, early stopping, stops that keep the last good state, and floors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO

from pssm.fitting import loop
from pssm.infer import TrainingError, fit_svi

Y = np.array([0.5, 1.5, 1.0, 2.0])
quick = pytest.mark.filterwarnings("ignore:SVI has not converged")


def model(y):
    """`mu | y` is normal with mean sum(y) / (n + 1) and variance 1 / (n + 1)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).mask(~jnp.isnan(y)).to_event(1), obs=jnp.nan_to_num(y))


def fit(*args, **kwargs):
    options = {"guide": "normal", "num_steps": 60, "progress_bar": False} | kwargs
    return fit_svi(options.pop("model", model), *(args or (Y,)), **options)


@quick
def test_pieces_do_not_change_the_run(monkeypatch):
    whole = fit()
    monkeypatch.setattr(loop, "FIRST", 7)
    monkeypatch.setattr("pssm.fitting.svi.LONGEST", 11)
    cut = fit()
    np.testing.assert_array_equal(whole.losses, cut.losses)
    np.testing.assert_array_equal(whole.params["mu_auto_loc"], cut.params["mu_auto_loc"])
    assert cut.ended == "num_steps"
    assert cut.run.step == 60
    assert cut.run.seconds > 0


@quick
def test_learning_rate_may_be_a_schedule_and_gradients_are_clipped():
    frozen = fit(learning_rate=optax.constant_schedule(0.0))
    np.testing.assert_allclose(frozen.params["mu_auto_scale"], 0.1, rtol=1e-6)
    moved = fit(learning_rate=optax.constant_schedule(0.01), clip_norm=None)
    assert float(moved.params["mu_auto_scale"]) != pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match="`clip_norm` must be positive"):
        fit(clip_norm=0.0)


def test_kl_weight_gives_the_tempered_posterior():
    """With weight w the best Gaussian has precision 1 + n / w: the likelihood counts 1 / w times."""
    result = fit(kl_schedule=optax.constant_schedule(0.5), num_steps=2000, learning_rate=0.05)
    precision = 1 + 2 * len(Y)
    assert float(result.params["mu_auto_loc"]) == pytest.approx(2 * Y.sum() / precision, abs=0.02)
    assert float(result.params["mu_auto_scale"]) == pytest.approx(precision**-0.5, rel=0.05)


@quick
def test_kl_schedule_ends_at_the_bound_and_convergence_is_judged_there():
    result = fit(kl_schedule=optax.linear_schedule(0.0, 1.0, 40))
    plain = fit(learning_rate=optax.constant_schedule(0.0))
    assert result.losses[0] < plain.losses[0]  # the likelihood alone
    short = fit(kl_schedule=optax.linear_schedule(0.0, 1.0, 55))
    assert short.converged is False
    assert "too few" in short.message


@quick
def test_step_args_change_the_data_of_a_step():
    def masked(step, key, y):
        return jnp.where(step < 30, jnp.full_like(y, jnp.nan), y)

    result = fit(jnp.asarray(Y), step_args=masked, learning_rate=optax.constant_schedule(0.0), num_steps=60)
    early, late = result.losses[:30].mean(), result.losses[30:].mean()
    assert late - early > 3  # without data there is no likelihood


def held_out():
    seen = Y.copy()
    seen[3] = np.nan
    rest = np.full_like(Y, np.nan)
    rest[3] = -3.0  # far from what the others say: the longer the training, the worse
    return seen, rest


def test_best_state_is_restored_and_patience_stops():
    seen, rest = held_out()
    result = fit(seen, validation=(rest,), validate_every=10, patience=3, num_steps=2000, learning_rate=0.05)
    steps, losses = result.validation.T
    assert result.ended == "patience"
    assert result.run.step < 2000
    assert result.run.step - result.run.best_step == 30
    assert steps[np.argmin(losses)] == result.run.best_step
    again = float(result.svi.evaluate(result.state._replace(rng_key=jax.random.key(0)), rest))
    assert again == pytest.approx(losses.min(), rel=1e-5)
    assert "least after" in result.message
    assert result.converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 3}, "`patience` needs `validation=`"),
        ({"validation": (Y,), "patience": 0}, "`patience` must be at least 1"),
        ({"validation": Y}, "`validation` must be a tuple"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fit(**options)


def breaks(y, wall=1.0):
    mu = numpyro.param("mu", 0.0)
    numpyro.factor("wall", jnp.where(mu > wall, jnp.nan, -0.5 * (mu - 5.0) ** 2))


def steep(y):
    """The loss is finite at 0, its gradient is not."""
    mu = numpyro.param("mu", 0.0)
    numpyro.factor("root", jnp.sqrt(jnp.abs(mu)))


def test_first_nan_stops_and_the_error_carries_the_last_good_fit():
    with pytest.raises(TrainingError, match=r"loss became nan at step \d+ of 500.*`learning_rate`") as caught:
        fit(model=breaks, guide=lambda y, wall=1.0: None, loss=Trace_ELBO(), num_steps=500, learning_rate=0.1)
    kept = caught.value.fit
    assert isinstance(caught.value, FloatingPointError)
    assert kept.ended == "loss"
    assert np.isfinite(kept.losses).all()
    assert f"step {len(kept.losses)} of" in str(caught.value)
    assert 0.8 < float(kept.params["mu"]) < 1.2
    assert np.isfinite(float(kept.params["mu"]))


def test_gradient_that_is_not_finite_is_named():
    with pytest.raises(TrainingError, match=r"gradient was not finite at step 0 of 60") as caught:
        fit(model=steep, guide=lambda y: None, loss=Trace_ELBO())
    assert float(caught.value.fit.params["mu"]) == 0.0


class StopsAfter:
    """A clock that acts as the keyboard does, at its nth look."""

    def __init__(self, looks):
        self.left = looks

    def perf_counter(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return 0.0


def test_ctrl_c_returns_what_there_is(monkeypatch):
    monkeypatch.setattr(loop, "time", StopsAfter(6))
    with pytest.warns(UserWarning, match="interrupted after 20 of 2000"):
        result = fit(num_steps=2000)
    assert result.ended == "interrupted"
    assert result.losses.shape == (20,)
    assert result.converged is False


def test_ctrl_c_before_the_first_piece_is_raised(monkeypatch):
    monkeypatch.setattr(loop, "time", StopsAfter(2))
    with pytest.raises(KeyboardInterrupt):
        fit()


@quick
def test_floor_as_a_constraint_keeps_its_gradient():
    """A scale whose best value is 0 comes near its floor and never below, by the transform and not by a clip."""

    def floored(y):
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.greater_than(0.1))
        numpyro.sample("y", dist.Normal(0.0, scale).expand([len(y)]).to_event(1), obs=y)

    result = fit(np.zeros(4), model=floored, guide=lambda y: None, loss=Trace_ELBO(), num_steps=300, learning_rate=0.1)
    assert 0.1 < float(result.params["scale"]) < 0.12
    assert np.isfinite(result.losses).all()
    assert (np.diff(result.losses) < 0).all()
