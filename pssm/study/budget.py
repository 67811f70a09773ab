"""What a method may cost: its work cut to a budget."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from numpyro.infer.util import initialize_model

from pssm.study.method_names import GUIDE_NAMES, POINTS, Settings


def within_budget(
    name: str, model: Callable[..., Any], y: Any, settings: Settings, **kwargs: Any
) -> tuple[Settings, str, bool]:
    """Settings cut so that the method is expected to stay within the budget: `(settings, what was cut, possible)`.

    The expectation is the measured time of one gradient times a typical number of gradients. With the path among
    NUTS's unknowns that number grows with its length, up to NUTS's limit (1023 for each draw), but not where the path
    is sampled through a fitted chain. A point estimate takes a few climbs, nodes a
    thousand evaluations: they are never cut.
    """
    if settings.budget is None or name in POINTS or name.startswith("nodes"):
        return settings, "", True
    info = initialize_model(jax.random.key(0), model, model_args=(y,), model_kwargs=kwargs)
    gradient = jax.jit(jax.value_and_grad(info.potential_fn))
    z = info.param_info.z
    jax.block_until_ready(gradient(z))
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(gradient(z))
    each = (time.perf_counter() - start) / 3
    if name in GUIDE_NAMES:
        cost = settings.svi_steps * 8 * each
        if cost <= settings.budget:
            return settings, "", True
        steps = int(settings.svi_steps * settings.budget / cost)
        if steps < 500:
            return settings, f"expected to take {cost / 60:.0f} minutes; raise the budget", False
        return (
            replace(settings, svi_steps=steps),
            f"Steps cut from {settings.svi_steps} to {steps} by the budget.",
            True,
        )
    unknowns = sum(int(np.size(x)) for x in z.values())
    leapfrogs = {"nuts:states": min(max(unknowns, 100), 1023), "nuts:transport": 30}.get(name, 12)
    per_iteration = leapfrogs * each * settings.num_chains
    total = settings.num_warmup + settings.num_samples
    if total * per_iteration <= settings.budget:
        return settings, "", True
    chains = min(settings.num_chains, 2)
    share = settings.budget / (leapfrogs * each * chains)
    if share < 300:
        return settings, f"expected to take {total * per_iteration / 60:.0f} minutes; raise the budget", False
    warmup = int(min(settings.num_warmup, share / 2))
    samples = int(min(settings.num_samples, share - warmup))
    note = (
        f"Cut by the budget from {settings.num_chains} x ({settings.num_warmup} + {settings.num_samples}) "
        f"to {chains} x ({warmup} + {samples}) warm-up steps and draws."
    )
    return replace(settings, num_chains=chains, num_warmup=warmup, num_samples=samples), note, True
