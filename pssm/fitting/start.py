"""What comes before the first step of SVI: the guide, the optimiser, the objective and a compiled start."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
from numpyro.infer import ELBO, SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.svi import SVIState
from numpyro.util import not_jax_tracer

from pssm._checks import check_choice
from pssm._keys import is_key
from pssm._types import Key
from pssm.fitting.training import Settings
from pssm.guides import AutoStateSpace
from pssm.guides.paths import FAMILIES, PathGuide
from pssm.objectives.conditional_kl import TraceConditionalKL_ELBO
from pssm.objectives.constraint import Constrained
from pssm.objectives.sticking_the_landing import StickingTheLanding_ELBO

GUIDES: dict[str, Any] = {"normal": AutoNormal, "mvn": AutoMultivariateNormal}


def build_svi(model: Callable[..., Any], settings: Settings) -> SVI:
    """NumPyro's `SVI` for a model, from the arguments of `fit_svi`."""
    guide = settings.guide
    if isinstance(guide, str):
        check_choice("guide", guide, (*GUIDES, *FAMILIES))
        if guide in FAMILIES:
            guide = AutoStateSpace(model, rank=settings.rank, family=guide)
        else:
            guide = GUIDES[guide](model, init_loc_fn=init_to_median(num_samples=50), init_scale=0.1)
    return SVI(model, guide, optimizer_of(settings), _loss(model, guide) if settings.loss is None else settings.loss)


def optimizer_of(settings: Settings) -> Any:
    """The optimiser that the settings ask for."""
    if settings.optimizer is not None:
        return settings.optimizer
    import optax  # takes a fifth of a second

    rate, steps = settings.learning_rate, settings.schedule_steps or settings.num_steps
    schedule = rate if callable(rate) else optax.cosine_decay_schedule(rate, steps, alpha=0.01)
    if settings.clip_norm is None:
        return optax.adam(schedule)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(schedule))


def _loss(model: Any, guide: Any) -> ELBO:
    one = isinstance(model, Constrained)  # its state is lost with several particles
    if not isinstance(guide, PathGuide):
        return Trace_ELBO(num_particles=1 if one else 8)
    if one or guide.family == "moment_matched":  # the latter has no density
        return TraceConditionalKL_ELBO()
    return StickingTheLanding_ELBO(8)


def initial_state(svi: SVI, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SVIState:
    """The state of `svi.init`, from one compiled program where that is possible: NumPyro compiles hundreds."""
    return _init(jax.jit, svi, key, args, kwargs)


def state_shapes(svi: SVI, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The state's structure, with shapes in place of values where that needs no compilation; `svi` is then ready."""
    return _init(lambda init: lambda key: jax.eval_shape(init, key), svi, key, args, kwargs)


def _init(through: Any, svi: SVI, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`svi.init`, traced where the guide is known to keep nothing that comes from inside of a trace."""
    if prepared(svi.guide, key, args, kwargs):
        try:
            state = through(lambda key: svi.init(key, *args, **kwargs))(key)
        except jax.errors.JAXTypeError:
            return svi.init(key, *args, **kwargs)
        # Bounds of parameters that the model computes must be numbers.
        if all(not_jax_tracer(x) for x in jax.tree.leaves(svi.constrain_fn.args)):
            return state
    return svi.init(key, *args, **kwargs)


def on_host(tree: Any) -> Any:
    """The pytree as NumPy arrays, which every process may hand to a program that runs on the devices of all.

    Random keys become keys of the older, raw kind.
    """
    return jax.tree.map(lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), tree)


def prepared(guide: Any, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Makes what a known guide keeps of its first call, so that the start can be compiled; False for other guides."""
    if hasattr(guide, "prepare"):
        return guide.prepare(jax.random.split(key, 3)[2], *args, **kwargs)
    if type(guide) not in GUIDES.values():
        return False
    with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=jax.random.split(key, 3)[2]):
        if guide.prototype_trace is None:
            guide._setup_prototype(*args, **kwargs)
    return True
