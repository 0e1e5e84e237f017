"""Is one captioner better than another, or were the images kind to it? Paired bootstrap over images (Koehn 2004)."""

from typing import Callable

import numpy as np


def paired_bootstrap(
    ours: np.ndarray,
    baseline: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """Difference of two systems on the same images.

    Args:
        ours, baseline: (images,) per-image scores, or (images, S) rows that add up to sufficient statistics.
        statistic: from the mean over images, (..., ) or (..., S), to the score. Corpus BLEU-4:
            `lambda mean: bleu_of_statistics(mean)[..., 3]`.

    Returns:
        difference, low and high end of its 95 % percentile interval, and the two-sided p-value.
    """
    ours, baseline = np.asarray(ours, float), np.asarray(baseline, float)
    if ours.shape != baseline.shape or len(ours) == 0:
        raise ValueError(f"paired scores are needed, but their shapes are {ours.shape} and {baseline.shape}")
    rng = np.random.default_rng(seed)
    n = len(ours)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n  # (resamples, images)
    differences = statistic(counts @ ours) - statistic(counts @ baseline)
    observed = float(statistic(ours.mean(0)) - statistic(baseline.mean(0)))
    low, high = np.percentile(differences, [2.5, 97.5])
    p = min(1.0, 2 * min(np.mean(differences <= 0), np.mean(differences >= 0)))
    return {"difference": observed, "low": float(low), "high": float(high), "p": float(p)}
