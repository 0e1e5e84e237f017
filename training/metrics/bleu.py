"""BLEU-1 to 4: `evaluate.load("training/metrics/bleu.py").compute(predictions=..., references=...)`."""

from training.lib.metrics import bleu
from training.lib.metrics.as_evaluate import evaluate_metric


def corpus_bleu(predictions, references):
    """BLEU of a corpus of captions (Papineni et al., ACL 2002): `bleu_1` to `bleu_4`."""
    return {f"bleu_{n}": float(score) for n, score in enumerate(bleu(predictions, references), start=1)}


Bleu = evaluate_metric(corpus_bleu)
