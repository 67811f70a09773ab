"""EM on real data: a system for each of nine speakers, who is recognised by the likelihood of new utterances."""

import jax
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import pssm


@pytest.mark.slow
def test_speakers_are_recognised_by_their_systems():
    vowels = pssm.datasets.load_sequences("japanese_vowels")
    frames = np.concatenate(vowels.train)
    train, test = (
        [((x - frames.mean(0)) / frames.std(0)).astype(np.float32) for x in xs] for xs in (vowels.train, vowels.test)
    )
    groups = [[x for x, k in zip(train, vowels.train_labels, strict=True) if k == s] for s in range(9)]
    options = {"fixed": (), "diagonal": ("R",)}
    background = pssm.fit_em(train, 4, num_iters=30, **options).ssm
    fits = [pssm.fit_em(xs, background, num_iters=20, **options) for xs in groups]
    for fit in fits:
        assert fit.log_likelihoods[-1] > fit.log_likelihoods[0]

    padded = np.full((len(test), 32, 12), np.nan, np.float32)
    for row, x in zip(padded, test, strict=True):
        row[: len(x)] = x
    likelihood = jax.jit(pssm.log_likelihood)
    scores = np.stack([np.asarray(likelihood(fit.ssm, padded)) for fit in fits], axis=1)
    right = np.mean(scores.argmax(1) == vowels.test_labels)

    pooled = [np.concatenate(xs).astype(float) for xs in groups]
    static = [multivariate_normal(x.mean(0), np.cov(x.T)) for x in pooled]
    baseline = np.array([[s.logpdf(x).sum() for s in static] for x in test])
    by_baseline = np.mean(baseline.argmax(1) == vowels.test_labels)
    assert by_baseline == pytest.approx(361 / 370)
    assert right > 0.97  # measured: 364 of 370
    assert right > by_baseline
