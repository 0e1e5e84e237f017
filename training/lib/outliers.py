"""How unlike the training images an image is, by several scores, and how well each of them tells images apart.

Every score is the higher, the more unlike. Axes: n images, C width of the tower's tokens.
"""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf

from modeling_blip_rbm.rbm import relative_free_energy


RESAMPLES = 2_000


class TrainingImages:
    """Mean tokens of training images, to which others are compared.

    Args:
        pooled (n, C): one row an image.
    """

    def __init__(self, pooled: np.ndarray):
        self.count = len(pooled)
        self.gaussian = LedoitWolf().fit(pooled)  # C is not small beside n: a shrunk covariance
        self.directions = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def distance(self, pooled: np.ndarray) -> np.ndarray:
        """Mahalanobis distance (n,) of rows (n, C) (Lee et al., NeurIPS 2018; of one class, as captions have none)."""
        return np.sqrt(self.gaussian.mahalanobis(pooled))

    def distance_to_nearest(self, pooled: np.ndarray) -> np.ndarray:
        """Cosine distance (n,) of rows (n, C) to the nearest training image."""
        return 1 - (pooled / np.linalg.norm(pooled, axis=1, keepdims=True) @ self.directions.T).max(1)


@torch.no_grad()
def model_scores(model, tokens: torch.Tensor, hidden_input: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores (B,) that need the model alone, and the mean tokens (B, C), of tokens (B, N, C) and hidden input (B, H).

    "class probability" is 1 minus that of the likeliest class of the tower's own head (Hendrycks & Gimpel, ICLR 2017), "class energy" minus
    the logsumexp of its logits (Liu et al., NeurIPS 2020), if the model has that head.
    """
    pooled = tokens.mean(1)
    scores = {
        "pooled": pooled,
        "free energy": model.image_free_energy(vision_hidden_states=tokens),
        "relative free energy": relative_free_energy(model.rbm_parameters(), hidden_input),
    }
    if getattr(model, "class_tokens", None) is not None:
        logits = model.class_tokens.head(pooled)
        scores |= {"class probability": 1 - logits.softmax(-1).amax(-1), "class energy": -logits.logsumexp(-1)}
    return scores


def all_scores(seen: dict[str, np.ndarray], training: TrainingImages, confidence) -> dict[str, np.ndarray]:
    """Every score (n,) of images.

    Args:
        seen: what `model_scores` gives, and "evidence" (n, 2) of their captions. confidence: from evidence to the chance that a caption is right.
    """
    scores = {name: value for name, value in seen.items() if name not in ("pooled", "evidence")}
    return scores | {
        "Mahalanobis distance": training.distance(seen["pooled"]),
        "nearest training image": training.distance_to_nearest(seen["pooled"]),
        "log P of the caption": -seen["evidence"][:, 0],
        "confidence": 1 - confidence(torch.from_numpy(seen["evidence"])).numpy(),
    }


# Scores of a group of images: (n,) by score. Intervals, 95 %, are by bootstrap over images, the same for all scores, so that differences are
# paired. The n-th images of all kinds go together, as they do where they are one photograph, spoiled.


def aucs(inside: dict[str, np.ndarray], outside: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, dict]]:
    """AUC and interval by score and kind: the chance that an image of the kind scores higher than one inside; ties count half."""
    return {
        score: {kind: interval(values, "auc") for kind, values in of_kinds.items()}
        for score, of_kinds in resampled_aucs(inside, outside).items()
    }


def means(inside: dict[str, np.ndarray], outside: dict[str, dict[str, np.ndarray]], baseline: str) -> dict[str, dict]:
    """Mean AUC over the kinds and its interval by score ("auc"), and how far it is above that of the score `baseline` ("difference")."""
    mean = {score: np.mean(list(of.values()), 0) for score, of in resampled_aucs(inside, outside).items()}
    differences = {
        score: interval(values - mean[baseline], "difference") for score, values in mean.items() if score != baseline
    }
    return {"auc": {score: interval(values, "auc") for score, values in mean.items()}, "difference": differences}


def resampled_aucs(inside, outside, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """(1 + RESAMPLES,) AUCs by score and kind, the first as measured. All kinds have as many images."""
    first = next(iter(outside.values()))
    sizes = [len(next(iter(scores.values()))) for scores in (inside, first)]
    rng = np.random.default_rng(seed)
    of_inside, of_kind = (np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)]) / n for n in sizes)
    result = {score: {} for score in inside}
    for kind, scores in outside.items():
        for score, ours in inside.items():
            theirs = scores[score][:, None]
            wins = (theirs > ours) + 0.5 * (theirs == ours)
            result[score][kind] = ((of_kind @ wins) * of_inside).sum(1)
    return result


def interval(values: np.ndarray, name: str) -> dict[str, float]:
    """What was measured, `values[0]`, and its percentile interval over the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {name: float(values[0]), "low": float(low), "high": float(high)}
