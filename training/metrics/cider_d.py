"""CIDEr-D: `evaluate.load("training/metrics/cider_d.py").compute(predictions=..., references=...)`."""

from training.lib.metrics import CiderD
from training.lib.metrics.as_evaluate import evaluate_metric


def cider_d(predictions, references):
    """CIDEr-D of captions (Vedantam et al., CVPR 2015), mean over images: `cider_d`."""
    return {"cider_d": float(CiderD(references).scores(predictions).mean())}


Cider = evaluate_metric(cider_d)
