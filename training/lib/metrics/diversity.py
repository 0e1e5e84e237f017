"""How varied captions are: over a corpus of single captions, and within the captions of one image.

Div-n and mBLEU as in Wang & Chan, CVPR 2019 (code: ruotianluo, captioning/utils/div_utils.py); novelty as in van
Miltenburg et al., COLING 2018. Vocabulary and distinct-n depend on how many captions there are: compare equal numbers.
"""

from typing import Optional

import numpy as np

from training.lib.metrics.bleu import bleu_of_statistics, bleu_statistics
from training.lib.metrics.tokenizer import tokenize


def _ngrams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def corpus_diversity(captions: list[str], training_captions: Optional[list[str]] = None) -> dict[str, float]:
    """vocabulary (words), distinct-1/2 and unique (shares), mean_length (words), novel: share not seen in training."""
    tokens = [tokenize(caption) for caption in captions]
    result = {
        "vocabulary": len({token for caption in tokens for token in caption}),
        "mean_length": float(np.mean([len(caption) for caption in tokens])),
        "unique": len({tuple(caption) for caption in tokens}) / len(tokens),
    }
    for n in (1, 2):
        grams = [gram for caption in tokens for gram in _ngrams(caption, n)]
        result[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    if training_captions is not None:
        seen = {tuple(tokenize(caption)) for caption in training_captions}
        result["novel"] = float(np.mean([tuple(caption) not in seen for caption in tokens]))
    return result


def set_diversity(caption_sets: list[list[str]]) -> dict[str, float]:
    """Within the captions of each image, averaged over images: div_1, div_2 (high: varied), mbleu_4 (low: varied)."""
    if any(len(captions) < 2 for captions in caption_sets):
        raise ValueError("diversity within an image needs at least 2 captions of every image")
    rows = []
    for captions in caption_sets:
        tokens = [tokenize(caption) for caption in captions]
        words = max(1, sum(len(caption) for caption in tokens))
        div = [len({gram for caption in tokens for gram in _ngrams(caption, n)}) / words for n in (1, 2)]
        others = [bleu_statistics(c, tokens[:i] + tokens[i + 1 :]) for i, c in enumerate(tokens)]
        rows.append([*div, np.mean([bleu_of_statistics(row)[3] for row in others])])
    return dict(zip(("div_1", "div_2", "mbleu_4"), np.mean(rows, axis=0).tolist()))
