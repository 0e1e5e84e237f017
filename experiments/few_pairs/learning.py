"""Data, training and measures that every question of this experiment shares."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from experiments.few_pairs.systems import (
    RBM,
    Axes,
    Detector,
    HiddenLayer,
    RandomCauses,
    System,
    Unpaired,
    image_axes,
    text_axes,
)
from training.lib.data import CaptionWords
from training.lib.distributed import new_accelerator
from training.lib.metrics import CiderD
from training.lib.metrics.bootstrap import paired_bootstrap
from training.lib.rbm_evaluation import average_precision
from training.lib.rbm_objective import PooledPairs, RBMArguments
from training.lib.rbm_training import prepared, train_epoch
from training.lib.retrieval import ranks


EVALUATIONS = 8  # of a training, evenly spaced; the best one is kept
RERANK_WEIGHTS = (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# What each system's tries are drawn from. `width` is that of fixed axes, and `cd` of RBMs alone.
SHARED_SPACE = {
    "learning_rate": (1e-3, 3e-3, 1e-2),
    "weight_decay": (0.01, 0.3, 1.0, 3.0),
    "image_dropout": (0.0, 0.2, 0.5),
}
SPACE = {
    "rbm": {"cd": (0.0, 0.03, 0.1, 0.3, 1.0), "init_std": (0.02, 0.1)},
    "rbm, unpaired": {"cd": (0.03, 0.1, 0.3, 1.0), "init_std": (0.02, 0.1)},
    "random rbm": {},
    "linear": {},
    "mlp": {},
    "linear, PCA": {"width": (64, 128, 1024)},
    "linear, PCA and LSA": {"width": (64, 128, 1024), "text_width": (32, 128, 512)},
}


@dataclass
class World:
    """Images that no system has seen: pooled features (n, V), of each its captions' words (captions, K), and candidates if there are any
    (`read_candidates`)."""

    features: torch.Tensor
    words: list[torch.Tensor]
    candidates: Optional[dict] = None


@dataclass
class Material:
    """All that systems learn from.

    Args:
        store: `FeatureStore` of pooled images. rows: its training rows. words: `CaptionWords` of all its rows. texts: of captions alone.
        held_back: on which all is tuned. worlds: on which all is measured. hidden_size: H, so that an RBM has as many weights as a linear map.
    """

    store: object
    rows: np.ndarray
    words: CaptionWords
    texts: CaptionWords
    held_back: World
    worlds: dict[str, World]
    settings: RBMArguments

    def __post_init__(self):
        images = torch.cat([self.store.batch(part) for part in np.array_split(self.rows, 1 + len(self.rows) // 4096)])
        self.mean, self.std = images.mean(0), images.std(0).clamp(min=1e-6)
        self.images = (images - self.mean) / self.std

    @property
    def sizes(self) -> tuple[int, int]:
        """V and K."""
        return len(self.mean), self.words.num_words

    @cached_property
    def text_axes(self) -> torch.Tensor:
        return text_axes(self.texts)

    def equal_hidden_size(self) -> int:
        """H with which an RBM, or an MLP, has as many weights as a linear map: H (V + K) = V K."""
        V, K = self.sizes
        return max(2, round(V * K / (V + K)))


def tries(system: str, count: int, seed: int = 0) -> list[dict]:
    """As many settings for each system, drawn from its space; no two are the same if it has as many."""
    space = SHARED_SPACE | SPACE[system]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(50 * count):
        setting = {name: values[rng.integers(len(values))] for name, values in space.items()}
        if setting not in drawn:
            drawn.append(setting)
        if len(drawn) == count:
            break
    return drawn


def build(system: str, material: Material, rows, settings: RBMArguments, setting: dict, activity=None) -> System:
    """A new system by its name in `SPACE`.

    Args:
        rows: the pairs, whose share of words the biases start from. activity: of the trained RBM; the random one has as much.
    """
    V, _ = material.sizes
    common = (material.mean, material.std, settings, material.words.share(rows))
    if system == "rbm":
        return RBM(*common)
    if system == "rbm, unpaired":
        return RBM(*common, Unpaired(material.store, material.rows, material.texts, settings.seed))
    if system == "linear":
        return Detector(*common, torch.nn.Identity(), V)
    if system == "mlp":
        return Detector(*common, HiddenLayer(V, settings.hidden_size), settings.hidden_size)
    if system == "random rbm":
        features = RandomCauses(material.images, settings.hidden_size, activity)
        return Detector(*common, features, settings.hidden_size)
    axes = image_axes(material.images, setting["width"])
    basis = material.text_axes[-setting["text_width"] :] if "text_width" in setting else None
    return Detector(*common, Axes(axes), axes.shape[1], basis)


def fit(system: System, store, words, rows, quality: Callable[[System], float], steps: int) -> float:
    """Train a system on these rows for about `steps` steps. The weights of the best of `EVALUATIONS` evaluations stay; gives its quality."""
    settings = system.settings
    batch_size = min(settings.batch_size, len(rows))
    epochs = math.ceil(steps / (len(rows) // batch_size))
    settings = replace(settings, batch_size=batch_size, epochs=epochs)
    set_seed(settings.seed)
    accelerator, pairs = new_accelerator(settings.seed), PooledPairs(store, rows, words, settings.seed)
    objective, optimizer, loader, schedule = prepared(accelerator, system, pairs, settings)
    best, weights = -math.inf, None
    wanted = {math.ceil(epochs * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        loader.set_epoch(epoch)
        train_epoch(accelerator, objective, optimizer, loader, schedule)
        if epoch + 1 in wanted and (found := quality(system)) > best:
            best, weights = found, {name: t.clone() for name, t in system.state_dict().items()}
    if weights is None:
        raise FloatingPointError(f"{type(system).__name__} diverged with {settings}: lower the learning rate")
    system.load_state_dict(weights)
    return best


def first_captions(world: World) -> World:
    """Of each image the first caption alone: enough to tune on, in a fifth of the time."""
    return World(world.features, [of_image[:1] for of_image in world.words])


def overall_quality(world: World) -> Callable[[System], float]:
    """What settings and epochs are chosen by, alike for all systems: percent, word AP plus the mean of R@10 both ways."""
    world = first_captions(world)

    def quality(system: System) -> float:
        found = measure(system, world)
        return float(
            100 * (found["word_ap"].mean() + (found["image_to_text_r10"] + found["text_to_image_r10"]).mean() / 2)
        )

    return quality


@torch.no_grad()
def measure(system: System, world: World) -> dict[str, np.ndarray]:
    """Of each image (n,): `word_ap`; `log_likelihood` of a caption's words given the image alone, nats a caption; hits of retrieval,
    `image_to_text_r1`, ..., `text_to_image_r10` (mean over the image's captions). Of each word that is said (words,): `per_word_ap`."""
    x = system.standardise(world.features)
    owner = torch.tensor([i for i, of_image in enumerate(world.words) for _ in of_image])
    w = torch.cat([of_image.float() for of_image in world.words])
    logits = system.word_logits(x)
    target = torch.stack([of_image.any(0) for of_image in world.words])
    said = target.any(0)
    likelihood = -F.binary_cross_entropy_with_logits(logits[owner], w, reduction="none").sum(-1)
    result = {
        "word_ap": average_precision(logits, target),
        "per_word_ap": average_precision(logits.T[said], target.T[said]),
        "log_likelihood": mean_of_images(likelihood, owner),
    }
    of_caption, of_image = ranks(system.information(x, w), owner)
    for k in (1, 5, 10):
        result[f"image_to_text_r{k}"] = (of_caption < k).float()
        result[f"text_to_image_r{k}"] = mean_of_images((of_image < k).float(), owner)
    return {name: value.double().numpy() for name, value in result.items()}


def mean_of_images(values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """(n,) means over each image's captions of values (m,)."""
    return torch.zeros(int(owner.max()) + 1).index_add_(0, owner, values) / torch.bincount(owner)


def read_candidates(file: str | Path, word_ids: list[int], processor, references: dict[int, list[str]]) -> dict:
    """Candidates of `torch.save({"sequences": (n, C, T), "log_prob": (n, C), "length": (n, C)})`, as `World` has them: with `words` (n, C, K)
    and `rows` (n,), the images' places among `references`.

    The file may hold "cider" (n, C), else CIDEr-D is computed here, in points; and "rows" (n,), keys of `references`, if not all are there.

    Args:
        references: of each image its captions, by the row of its data set.

    Raises:
        ValueError: if a part is missing, or the file speaks of other images.
    """
    found = torch.load(file, weights_only=True)
    if missing := {"sequences", "log_prob", "length"} - set(found):
        raise ValueError(f"{file} has no {', '.join(sorted(missing))}: it must be a file of candidates")
    places = {row: place for place, row in enumerate(references)}
    rows = torch.as_tensor(found.get("rows", list(references))).tolist()
    if len(rows) != len(found["sequences"]) or not set(rows) <= set(places):
        raise ValueError(
            f"{file} has candidates of {len(found['sequences']):,} images, which are not those of the {len(references):,} measured"
        )
    rows = torch.tensor([places[row] for row in rows])
    if "cider" not in found:
        scorer, texts = CiderD(list(references.values())), processor.captions(found["sequences"].flatten(0, 1))
        each = rows.repeat_interleave(found["sequences"].shape[1]).tolist()
        scores = [100 * scorer.score(row, text) for row, text in zip(each, texts)]
        found["cider"] = torch.tensor(scores).view_as(found["log_prob"])
    words = CaptionWords(found["sequences"].tolist(), word_ids, len(processor.tokenizer))
    chosen = {name: torch.as_tensor(found[name]).float() for name in ("log_prob", "length", "cider")}
    return chosen | {"rows": rows, "words": torch.stack([words[i] for i in range(len(words))]).float()}


@torch.no_grad()
def candidate_information(system: System, world: World) -> torch.Tensor:
    """(n, C) PMI of the candidates with their images."""
    x = system.standardise(world.features[world.candidates["rows"]])
    return torch.cat([system.information(row[None], w) for row, w in zip(x, world.candidates["words"])])


def reranked(information: torch.Tensor, candidates: dict, weight: float) -> np.ndarray:
    """(n,) CIDEr-D of the candidates with the best log-probability a token + weight * PMI."""
    score = candidates["log_prob"] / candidates["length"].clamp(min=1) + weight * information
    return candidates["cider"].gather(1, score.argmax(1, keepdim=True))[:, 0].double().numpy()


def measure_everywhere(system: System, material: Material) -> dict[str, np.ndarray]:
    """`measure` of all worlds, one after the other, and `rerank_cider` of those with candidates; its weight is chosen on held-back images."""
    parts = [measure(system, world) for world in material.worlds.values()]
    result = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if material.held_back.candidates is None:
        return result
    information = candidate_information(system, material.held_back)
    weight = max(RERANK_WEIGHTS, key=lambda w: reranked(information, material.held_back.candidates, w).mean())
    worlds = [world for world in material.worlds.values() if world.candidates is not None]
    if worlds:
        ciders = [reranked(candidate_information(system, world), world.candidates, weight) for world in worlds]
        result |= {"rerank_cider": np.concatenate(ciders), "rerank_weight": np.array([weight])}
    return result


def differences(ours: dict[str, np.ndarray], other: dict[str, np.ndarray], resamples: int) -> dict[str, dict]:
    """Paired bootstrap over images (over words for `per_word_ap`) of what both have measured."""
    shared = [name for name in ours if name in other and name != "rerank_weight"]
    return {name: paired_bootstrap(ours[name], other[name], resamples=resamples) for name in shared}
