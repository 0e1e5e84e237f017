"""ROUGE-L: `evaluate.load("training/metrics/rouge_l.py").compute(predictions=..., references=...)`."""

import numpy as np

from training.lib.metrics import rouge_l
from training.lib.metrics.as_evaluate import evaluate_metric


def mean_rouge_l(predictions, references):
    """ROUGE-L of captions (Lin, ACL 2004), mean over images: `rouge_l`."""
    return {"rouge_l": float(np.mean([rouge_l(c, of_image) for c, of_image in zip(predictions, references)]))}


RougeL = evaluate_metric(mean_rouge_l)
