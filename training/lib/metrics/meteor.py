"""METEOR of captions (Denkowski & Lavie, WMT 2014) by its authors' program, which needs Java; pycocoevalcap brings the
program."""

import shutil
from typing import Optional

import numpy as np

from training.lib.metrics.tokenizer import tokenize


def meteor(candidates: list[str], references: list[list[str]]) -> Optional[tuple[float, np.ndarray]]:
    """METEOR 1.5 of a corpus as COCO reports it, and of each caption (n,), 0 to 1. None where Java or pycocoevalcap is
    missing."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError:
        return None
    if shutil.which("java") is None:
        return None
    joined = lambda text: " ".join(tokenize(text))
    of_corpus, each = Meteor().compute_score(
        {i: [joined(reference) for reference in of_image] for i, of_image in enumerate(references)},
        {i: [joined(candidate)] for i, candidate in enumerate(candidates)},
    )
    return of_corpus, np.array(each)
