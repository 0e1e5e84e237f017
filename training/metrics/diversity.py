"""How varied captions are: `evaluate.load("training/metrics/diversity.py").compute(predictions=...,
training_captions=...)`."""

from training.lib.metrics import corpus_diversity
from training.lib.metrics.as_evaluate import evaluate_metric


def diversity(predictions, training_captions=None):
    """Vocabulary, distinct-1 and 2, share of unique and, with the captions of training, of novel captions."""
    return corpus_diversity(predictions, training_captions)


Diversity = evaluate_metric(diversity, references=False)
