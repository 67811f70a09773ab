"""NUTS on the marginal model against a fine-grid quadrature of the exact posterior, in NumPy alone."""

import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from pssm import datasets, models
from pssm.diagnostics import log_evidence
from pssm.infer import fit_nuts, posterior_draws


def quadrature(y, level, noise):
    """Log joint density of data and parameters on a grid: a scalar Kalman recursion for every grid point at once."""
    spread = y.std()
    q, r = np.meshgrid(level**2, noise**2, indexing="ij")
    m, P, total = y[0], (10 * spread) ** 2 + 0 * q, 0.0
    for t, value in enumerate(y):
        P = P + q if t else P
        S = P + r
        total = total - 0.5 * (np.log(2 * np.pi * S) + (value - m) ** 2 / S)
        m, P = m + P / S * (value - m), P * r / S
    prior = -0.5 * (q + r) / spread**2 + 2 * np.log(np.sqrt(2 / np.pi) / spread)
    return total + prior


def test_nuts_has_the_exact_posterior_means():
    y = datasets.load("nile").y
    level, noise = np.linspace(0.05, 200, 800), np.linspace(60, 220, 640)
    log_joint = quadrature(y[:, 0], level, noise)
    weights = np.exp(log_joint - log_joint.max())
    cell = (level[1] - level[0]) * (noise[1] - noise[0])
    exact = {
        "sigma_level": (weights.sum(1) @ level) / weights.sum(),
        "sigma_obs": (weights.sum(0) @ noise) / weights.sum(),
    }
    mcmc = fit_nuts(models.local_level, y, key=1, num_warmup=1000, num_samples=1000, num_chains=4, progress_bar=False)
    draws = posterior_draws(mcmc)
    for name, mean in exact.items():
        x = draws[name]
        assert split_gelman_rubin(x) < 1.01
        assert abs(x.mean() - mean) < 3 * x.std() / np.sqrt(effective_sample_size(x)), name
    found = log_evidence(models.local_level, draws, y, num_particles=4000)
    assert abs(found.log_evidence - (log_joint.max() + np.log(weights.sum() * cell))) < 4 * found.standard_error + 0.01
