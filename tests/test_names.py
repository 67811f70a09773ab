"""Second names of arguments do the same as the first, both at once are an error, and default keys are spoken of."""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import pssm
from pssm import NonlinearSSM, models
from pssm._checks import also_called
from pssm.distributions import GaussianFilterMarginal, StatePath
from pssm.learning import initial_readout

Y = np.random.default_rng(0).normal(size=(20, 3)).astype("float32")
CLIP = np.random.default_rng(1).normal(size=(12, 2, 3))
LEARNED = ("lds", "poisson_lds", "neural_ssm", "deep_markov", "kalman_vae", "extended_kalman_vae")


def first_value(name, **options):
    """A number that depends on the size of the state."""
    trace = handlers.trace(handlers.seed(getattr(models, name), 0)).get_trace(num_steps=4, num_obs=3, **options)
    return sum(x.size for s in trace.values() if s["type"] in ("sample", "param") for x in jax.tree.leaves(s["value"]))


@pytest.mark.parametrize("name", LEARNED)
def test_the_size_of_the_state_has_two_names_in_the_models(name):
    assert first_value(name, n_state=5) == first_value(name, num_states=5) != first_value(name, num_states=6)
    with pytest.raises(TypeError, match="`n_state` and `num_states` are two names"):
        first_value(name, n_state=5, num_states=5)


def test_the_size_of_the_state_has_two_names_in_what_learns_without_inference():
    first, second = (pssm.DynamicTexture.fit(CLIP, **{name: 2}) for name in ("num_states", "n_state"))
    np.testing.assert_array_equal(first.A, second.A)
    sizes = [
        pssm.fit_em(Y, **size, num_iters=1, diagonal=("R",)).ssm.n_state
        for size in ({"num_states": 2}, {"n_state": 2}, {"ssm": 2})
    ]
    assert sizes == [2, 2, 2]
    np.testing.assert_array_equal(initial_readout(Y, n_state=1).C, initial_readout(Y, 1).C)
    for call in (
        lambda: pssm.DynamicTexture.fit(CLIP, 2, n_state=2),
        lambda: pssm.fit_em(Y, 2, num_states=2),
        lambda: initial_readout(Y, 1, n_state=1),
    ):
        with pytest.raises(TypeError, match="two names for one argument"):
            call()


def test_a_filter_marginal_is_linearised_by_either_name():
    model = NonlinearSSM(
        jnp.zeros(1), jnp.eye(1), lambda z, u: jnp.sin(z), jnp.eye(1), lambda z: dist.Poisson(jnp.exp(z)).to_event(1)
    )
    new, old = (GaussianFilterMarginal(model, 4, **{word: "ukf"}) for word in ("linearize", "method"))
    assert new.linearize == old.linearize == new.method == "ukf"
    y = jnp.ones((4, 1))
    np.testing.assert_array_equal(jax.jit(new.log_prob)(y), jax.jit(old.log_prob)(y))
    with pytest.raises(TypeError, match="`method` and `linearize` are two names"):
        GaussianFilterMarginal(model, 4, method="ekf", linearize="ekf")
    with pytest.raises(ValueError, match="`linearize` must be one of"):
        GaussianFilterMarginal(model, 4, method="efk")


def test_a_path_takes_the_names_of_a_linear_model():
    A = 0.5 * jnp.ones((6, 2, 2))
    eye = jnp.eye(2)
    new, old = (StatePath(jnp.zeros(2), eye, A, eye, 6, time_varying=(name,)) for name in ("A", "transition"))
    z = jnp.ones((6, 2))
    assert new.time_varying == old.time_varying == ("transition",)
    np.testing.assert_array_equal(new.log_prob(z), old.log_prob(z))
    with pytest.raises(ValueError, match="`time_varying` must be one of 'chol_Q'"):
        StatePath(jnp.zeros(2), eye, lambda z, u: z, eye, 6, time_varying=("A",))


def test_second_names_are_shown_and_survive_keyword_arguments():
    @also_called(b="a")
    def function(a=1, **rest):
        """Adds."""
        return a, rest

    assert function(b=3, c=4) == (3, {"c": 4})
    assert function(2) == (2, {})
    assert function(2, b=None) == (2, {})  # all arguments bound, with their defaults
    assert list(inspect.signature(function).parameters) == ["a", "b", "rest"]
    assert function.__doc__ == "Adds."


# Keys with a default

ROOMS = (
    "",
    "infer",
    "diagnostics",
    "distributions",
    "guides",
    "models",
    "nets",
    "sde",
    "datasets",
    "learning",
    "filters",
)


def with_a_default_key():
    """Public functions, classes and methods whose `key` or `seed` may be left out."""
    for room in ROOMS:
        module = importlib.import_module(f"pssm.{room}".rstrip("."))
        for name in getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]:
            found = getattr(module, name)
            parts = [(name, found)]
            if inspect.isclass(found):
                parts += [(f"{name}.{n}", f) for n, f in vars(found).items() if callable(f) and not n.startswith("_")]
            for part, function in parts:
                if not callable(function) or inspect.ismodule(function):
                    continue
                try:
                    parameters = inspect.signature(function).parameters
                except (TypeError, ValueError):
                    continue
                if any(
                    parameters[n].default is not inspect.Parameter.empty for n in ("key", "seed") if n in parameters
                ):
                    yield f"{module.__name__}.{part}", function


@pytest.mark.parametrize(
    ("name", "function"),
    [pytest.param(n, f, id=n) for n, f in with_a_default_key()],
)
def test_a_default_key_is_spoken_of(name, function):
    assert re.search("(same|equal) (draws|fit|forecast|paths)", " ".join((inspect.getdoc(function) or "").split())), (
        f"{name}: its docstring must say that the default key gives the same draws in each call"
    )


def test_there_are_such_functions():
    assert len(list(with_a_default_key())) >= 15
