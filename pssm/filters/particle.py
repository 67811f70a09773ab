"""Particle filters: bootstrap, with linearised proposals, and guided by potentials of the future.

A particle filter carries weighted draws of the state, moves them by a proposal `q`, and weighs them by
`p(y_t | z_t) p(z_t | z_{t-1}) / q(z_t | z_{t-1})`. The product over time of the mean weights is unbiased for the
evidence, whatever the proposal.

Guided by potentials `psi_t(z_t)` that stand for `p(y_{t:T} | z_t)`, particles move by `p(z_t | z_{t-1}) psi_t(z_t) /
Z_t(z_{t-1})`, a Gaussian, and their weights look ahead by `Z_{t+1}(z_t) = int p(z_{t+1} | z_t) psi_{t+1}(z_{t+1})
dz_{t+1}`. What a step then multiplies the weight by is

    p(y_t | z_t) Z_{t+1}(z_t) / psi_t(z_t),

which is one where the potentials are the exact messages: no weight varies, and the estimate has no error.

Source:
    Bootstrap: Gordon, Salmond & Smith 1993. Proposals from linearisation: Doucet, Godsill & Andrieu 2000. Look-ahead by
    potentials (twisting): Whiteley & Lee 2014; Guarniero, Johansen & Lee 2017.
"""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pssm._checks import check_choice, is_traced
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, KeyLike
from pssm.filters.particle_sweep import ParticleResult, Proposal, Task, prepare, sweep
from pssm.filters.resampling import RESAMPLERS
from pssm.nonlinear import NonlinearSSM
from pssm.ssm import LinearGaussianSSM

COLLAPSE = 0.02  # share of effective particles below which a guided estimate is not to be trusted


def particle_filter(
    key: KeyLike,
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    num_particles: int,
    proposal: Proposal = None,
    resample: str = "systematic",
    ess_threshold: float = 0.5,
) -> ParticleResult:
    """Filtering by weighted draws, with an unbiased estimate of the evidence.

    Args:
        key: JAX random key.
        model: the model. `chol_Q` and `chol_P0` may be singular.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`, which `transition` and `emission` get row by row.
        num_particles: number of particles.
        proposal: how particles move. "bootstrap" (or None): by the transition alone. "ekf", "ukf", "cubature",
            "gauss_hermite" or a function as in `gaussian_filter`: by the Gaussian that takes the next observation in,
            linearised for each particle by itself (of use where the observation's mean tells something about the
            state). "guided": by potentials that stand for all later observations, those of
            `pssm.guides.guided_proposal(model, y, u)`; or potentials of your own: a `LowRankChain`, what
            `guided_proposal` gives, or any object with attributes `k`, `K`, `diag` and `center`.
        resample: "systematic", "stratified", "multinomial" or "residual".
        ess_threshold: particles are resampled where their effective number is below this share of `num_particles`; 0
            for never, 1 for (almost) always.

    Returns:
        A `ParticleResult`.

        Outside of `jit` it warns where potentials leave few particles with a weight.

    Raises:
        ValueError: a shape does not fit, or a choice is unknown.
        TypeError: `proposal` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, 0.3 * jnp.eye(1),
        ...                      lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> found = particle_filter(jax.random.key(0), model, [1, 0, float("nan"), 2], num_particles=100)
        >>> found.particles.shape, found.log_likelihood.shape
        ((4, 100, 1), ())
    """
    key = as_key(key)
    check_choice("resample", resample, list(RESAMPLERS))
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"`ess_threshold` must be between 0 and 1, a share of the particles; got {ess_threshold}.")
    task, linearize = prepare(model, y, u, num_particles, proposal)
    found = _run(key, task, ess_threshold, num_particles=num_particles, linearize=linearize, resample=resample)
    guided = proposal == "guided" or not (proposal is None or isinstance(proposal, str) or callable(proposal))
    if guided and num_particles >= 50 and not is_traced(found.ess):
        least, step = float(jnp.min(found.ess)), int(jnp.argmin(found.ess))
        if not least >= COLLAPSE * num_particles:
            warnings.warn(
                f"`proposal`: of {num_particles} particles {least:.1f} are effective at step {step}: "
                "the potentials miss a part of the posterior there, and the estimate of the evidence is as a rule too "
                'low. Look for another mode (`guided_proposal(start=)`), or compare with proposal="bootstrap".',
                stacklevel=2,
            )
    return found


@partial(jax.jit, static_argnames=("num_particles", "linearize", "resample"))
def _run(
    key: Array, task: Task, ess_threshold: Array, *, num_particles: int, linearize: Any, resample: str
) -> ParticleResult:
    return sweep(key, task, num_particles, linearize, RESAMPLERS[resample], ess_threshold)
