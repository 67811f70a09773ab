"""Particle Gibbs: the states by conditional SMC, the parameters by NUTS, in NumPyro's `HMCGibbs`."""

from collections.abc import Callable
from typing import Any

from pssm._checks import check_count
from pssm._types import Array, ArrayLike, Key
from pssm.filters import conditional_smc
from pssm.filters.particle_sweep import Proposal, check_proposal
from pssm.nonlinear import NonlinearSSM
from pssm.ssm import LinearGaussianSSM

Sites = dict[str, Array]


def particle_gibbs(
    build: Callable[[Sites], NonlinearSSM | LinearGaussianSSM],
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    num_particles: int,
    proposal: Proposal = "bootstrap",
    site: str = "z",
) -> Callable[[Key, Sites, Sites], Sites]:
    """The `gibbs_fn` that draws a path of states given the parameters, for `numpyro.infer.HMCGibbs`.

    Each call is one sweep of `conditional_smc` from the current path. Together with the inner kernel's step for the
    parameters it leaves the joint posterior invariant, for any number of particles from 2. It needs no gradient of the
    states' density, and the emission may be one that NUTS cannot handle. Where the parameters hang on the states (a
    small noise of the transition), the alternation moves slowly; look at the effective sample sizes.

    Args:
        build: the state-space model from the values of the parameters' sites. It must be the one that the NumPyro model
            describes: same prior of the path, same emission.
        y: the observations, as the NumPyro model gets them.
        u: inputs `(time, input)`.
        num_particles: number of particles, at least 2.
        proposal: as in `particle_filter`. "guided" finds potentials anew for each value of the parameters: dearer, and
            with few particles far better where the observations are informative.
        site: name of the path's site, a `StatePath`.

    Returns:
        A function of `rng_key`, `gibbs_sites` and `hmc_sites`.

    Raises:
        ValueError: `proposal` is unknown; when called, as `conditional_smc`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, pssm
        >>> from numpyro.infer import MCMC, NUTS, HMCGibbs
        >>> y = jnp.array([[1.0], [0.0], [jnp.nan], [2.0], [3.0]])
        >>> one = jnp.eye(1)
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     z = numpyro.sample("z", pssm.distributions.StatePath(jnp.zeros(1), one, one, scale * one, len(y)))
        ...     pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), y)
        >>> def build(sites):
        ...     return pssm.NonlinearSSM(jnp.zeros(1), one, lambda z, u: z, sites["scale"] * one,
        ...                              lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> kernel = HMCGibbs(NUTS(model), particle_gibbs(build, y, num_particles=20), gibbs_sites=["z"])
        >>> mcmc = MCMC(kernel, num_warmup=10, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y)
        >>> mcmc.get_samples()["z"].shape
        (10, 5, 1)

    Source:
        Andrieu, Doucet & Holenstein 2010; Lindsten, Jordan & Schön 2014.
    """
    check_count("num_particles", num_particles, least=2)
    check_proposal(proposal)

    def gibbs_fn(rng_key: Key, gibbs_sites: Sites, hmc_sites: Sites) -> dict[str, Any]:
        model = build(hmc_sites)
        path = gibbs_sites[site]
        new = conditional_smc(rng_key, model, y, path, u, num_particles=num_particles, proposal=proposal)
        return {site: new.astype(path.dtype)}

    return gibbs_fn
