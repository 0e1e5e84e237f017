"""Which weights of guide and re-rank: no more of them than the held-back images can tell apart.

A weight that is off has the first of its values. A *rule* is a set of weights that may be on, at most `most_weights` of them. Each rule is
judged by cross-validation over images: its values are chosen on all parts of them but one, and measured on that. Of all rules that
are within one standard error of the best the one with the fewest weights is taken (the "one standard error" rule of Breiman, Friedman,
Olshen & Stone, Classification and Regression Trees, 1984), and its values are then chosen on all images. The more
weights are tuned, the more their values owe to the images that they were tuned on.
"""

import itertools
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from modeling_blip_rbm import DecodingSettings
from training.lib.captions import chosen_by_rerank
from training.lib.metrics import tokenize


RERANK_VALUES = {
    "rbm_rerank_length_penalty": (1.0, 0.0, 0.5),
    "rbm_rerank_pmi": (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    "rbm_rerank_consensus": (0.0, 2.0, 4.0, 8.0, 16.0),
    "rbm_rerank_cider": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
}
ALWAYS = {"rbm_rerank_similarity": "overlap", "rbm_rerank_rarity": 0.0}
RARITY = tuple(step / 128 for step in range(25))  # nats of rarity by expected CIDEr-D


class Choices:
    """What re-rank would choose among the candidates of some images.

    Args:
        captions, parts, cider: text, parts of the score and sentence CIDEr-D of each candidate, (images, n) all of
            them. Parts that are missing cannot be weighed.
    """

    def __init__(self, captions: list[list[str]], parts: dict[str, np.ndarray], cider: np.ndarray):
        self.parts, self.cider = parts, cider
        words = CountVectorizer(analyzer=tokenize, binary=True, dtype=bool)
        self.said = words.fit_transform(text for of_image in captions for text in of_image)  # (images * n, words)

    def chosen(self, weights: dict) -> np.ndarray:
        """(images,) number of the candidate that is taken with these weights of re-rank."""
        return chosen_by_rerank(self.parts, DecodingSettings(**weights))

    def outcome(self, weights: dict) -> dict:
        """The weights with mean CIDEr-D and vocabulary of what they choose."""
        images, n = self.cider.shape
        chosen = np.arange(images) * n + self.chosen(weights)
        vocabulary = int((self.said[chosen].sum(0) > 0).sum())
        return weights | {"cider": 100 * self.cider.flat[chosen].mean(), "vocabulary": vocabulary}

    def grid(self) -> dict[str, tuple]:
        """The values of the weights of those parts that there are."""
        part = {"rbm_rerank_pmi": "pmi", "rbm_rerank_cider": "cider"}
        return {name: v if part.get(name, "length") in self.parts else v[:1] for name, v in RERANK_VALUES.items()}

    def all_scores(self) -> tuple[list[dict], np.ndarray]:
        """All settings of the grid, and the CIDEr-D (settings, images) of what each chooses, in points."""
        grid = self.grid()
        settings = [dict(zip(grid, values)) | ALWAYS for values in itertools.product(*grid.values())]
        images = np.arange(len(self.cider))
        scores = [self.cider[images, self.chosen(weights)] for weights in settings]
        return settings, 100 * np.array(scores, np.float32)

    def with_rarity(self, setting: dict) -> list[dict]:
        """The outcomes of a setting with more and more weight on rarity: shares of the weight of CIDEr-D."""
        weights = {name: setting[name] for name in (*RERANK_VALUES, *ALWAYS)}
        steps = [weights["rbm_rerank_cider"] * share for share in RARITY]
        return [self.outcome(weights | {"rbm_rerank_rarity": step}) for step in steps]


class Rule(NamedTuple):
    weights: tuple[str, ...]  # that may be on
    values: dict  # chosen on all images
    cider: float  # of them, on the same images
    held_out: np.ndarray  # (images,) CIDEr-D of each by values that were chosen without it


def best_rule(weights, settings: list[dict], scores: np.ndarray, off: dict, fold: np.ndarray) -> Rule:
    """The rule of these weights: of the settings in which all others are off, scores (settings, images)."""
    of_rule = [i for i, s in enumerate(settings) if all(s[name] == off[name] for name in off if name not in weights)]
    held_out = np.empty(scores.shape[1])
    for number in np.unique(fold):
        left_out = fold == number
        best = max(of_rule, key=lambda i: scores[i, ~left_out].mean())
        held_out[left_out] = scores[best, left_out]
    best = max(of_rule, key=lambda i: scores[i].mean())
    return Rule(tuple(weights), settings[best], float(scores[best].mean()), held_out)


def simplest_rule(
    guides: list[tuple[dict, Choices]], fold: np.ndarray, most_weights: int = 3
) -> tuple[dict, list[dict]]:
    """The setting to decode with, and a report of the rules, the best first.

    Args:
        guides: weights of guide, the first of which are off, and what re-rank chooses among the candidates that each gives.
        fold: (images,) in which part of the images each is.
    """
    settings, scores = [], []
    for guide, choices in guides:
        of_guide, of_images = choices.all_scores()
        settings += [guide | weights for weights in of_guide]
        scores.append(of_images)
    scores = np.concatenate(scores)
    off = {name: settings[0][name] for name in (*guides[0][0], *RERANK_VALUES)}
    may_be_on = [name for name in off if len({setting[name] for setting in settings}) > 1]
    rules = [
        best_rule(weights, settings, scores, off, fold)
        for count in range(min(most_weights, len(may_be_on)) + 1)
        for weights in itertools.combinations(may_be_on, count)
    ]
    best = max(rules, key=lambda rule: rule.held_out.mean())
    below = lambda rule: best.held_out - rule.held_out
    error = lambda rule: below(rule).std() / np.sqrt(len(fold))
    good = [rule for rule in rules if below(rule).mean() <= error(rule)]
    chosen = min(good, key=lambda rule: (len(rule.weights), -rule.held_out.mean()))
    report = [
        {
            "weights": rule.weights,
            "cider_held_out": float(rule.held_out.mean()),
            "below_best": float(below(rule).mean()),
            "standard_error": float(error(rule)),
            "cider": rule.cider,
            "values": rule.values,
        }
        for rule in sorted(rules, key=lambda rule: -rule.held_out.mean())
    ]
    return chosen.values, report
