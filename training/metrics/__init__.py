"""Caption metrics in pure Python and numpy, equal to pycocoevalcap's (tests/test_metrics.py); METEOR by its authors' Java program.

Each file of a metric in Python is also a local `evaluate` module: `evaluate.load("training/metrics/cider_d.py")`.
"""

from training.metrics.bleu import bleu, bleu_of_statistics, bleu_statistics
from training.metrics.bootstrap import paired_bootstrap
from training.metrics.cider_d import CiderD
from training.metrics.diversity import corpus_diversity, set_diversity
from training.metrics.meteor import meteor
from training.metrics.rouge_l import rouge_l
from training.metrics.tokenizer import tokenize


__all__ = [
    "CiderD",
    "bleu",
    "bleu_of_statistics",
    "bleu_statistics",
    "corpus_diversity",
    "meteor",
    "paired_bootstrap",
    "rouge_l",
    "set_diversity",
    "tokenize",
]
