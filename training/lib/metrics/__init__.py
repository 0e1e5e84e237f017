"""Caption metrics in pure Python and numpy, equal to pycocoevalcap's (tests/training/test_metrics.py); METEOR by its
authors' Java program.

As modules of `evaluate` they are in `training/metrics/`: `evaluate.load("training/metrics/cider_d.py")`.
"""

from training.lib.metrics.bleu import bleu, bleu_of_statistics, bleu_statistics
from training.lib.metrics.bootstrap import paired_bootstrap
from training.lib.metrics.cider_d import CiderD
from training.lib.metrics.diversity import corpus_diversity, set_diversity
from training.lib.metrics.hallucination import chair_of_statistics, hallucination_statistics
from training.lib.metrics.meteor import meteor
from training.lib.metrics.rouge_l import rouge_l
from training.lib.metrics.tokenizer import tokenize


__all__ = [
    "CiderD",
    "bleu",
    "bleu_of_statistics",
    "bleu_statistics",
    "chair_of_statistics",
    "corpus_diversity",
    "hallucination_statistics",
    "meteor",
    "paired_bootstrap",
    "rouge_l",
    "set_diversity",
    "tokenize",
]
