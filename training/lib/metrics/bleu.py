"""BLEU-1..4 of captions (Papineni et al., ACL 2002), as COCO computes it: closest reference length, corpus level."""

from collections import Counter

import numpy as np

from training.lib.metrics.tokenizer import tokenize


TINY, SMALL = 1e-15, 1e-9  # pycocoevalcap/bleu/bleu_scorer.py
N = 4


def ngram_counts(tokens: list[str], longest: int = N) -> Counter:
    """How often each n-gram of 1 to `longest` tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def bleu_statistics(candidate: list[str], references: list[list[str]]) -> np.ndarray:
    """(2 + 2N,) length, closest reference length, matches of each order, n-grams of each order. They add up."""
    best = Counter()
    for reference in references:
        best |= ngram_counts(reference)
    matches, guesses = [0] * N, [max(0, len(candidate) - n) for n in range(N)]
    for ngram, count in ngram_counts(candidate).items():
        matches[len(ngram) - 1] += min(count, best[ngram])
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    return np.array([len(candidate), closest, *matches, *guesses], dtype=float)


def bleu_of_statistics(statistics: np.ndarray) -> np.ndarray:
    """(..., 2 + 2N) summed statistics -> (..., N) BLEU-1..N in [0, 1]."""
    length, closest = statistics[..., 0], statistics[..., 1]
    precision = (statistics[..., 2 : 2 + N] + TINY) / (statistics[..., 2 + N :] + SMALL)
    ratio = (length + TINY) / (closest + SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return np.cumprod(precision, -1) ** (1 / np.arange(1, N + 1)) * brevity[..., None]


def bleu(candidates: list[str], references: list[list[str]]) -> np.ndarray:
    """(N,) corpus BLEU-1..N in [0, 1]."""
    rows = [bleu_statistics(tokenize(c), [tokenize(r) for r in rs]) for c, rs in zip(candidates, references)]
    return bleu_of_statistics(np.sum(rows, axis=0))
