"""Simpler things in the place of the RBM, each with what guide and re-rank ask of it.

An RBM tells two things of an image: which words go with it, and, by its hidden causes, which phrases. A stand-in tells the same by other
means. All are fitted on the same training images, with the same losses (`training/lib/rbm_objective.py`) where there is
a loss, and phrases are the same ridge regression on other features.

Axes: n images, m captions of each, V pooled image units, F features, K words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from experiments.few_pairs.systems import bias_of_activity, image_axes
from modeling_blip_rbm.rbm import JointRBM, pointwise_mutual_information
from modeling_blip_rbm.vision_blip_rbm import pool_tokens
from training.lib.contrastive import info_nce
from training.lib.data import CaptionWords
from training.lib.rbm_objective import hidden_words_loss, shown_words
from training.lib.retrieval import recalls


@dataclass
class Images:
    """Some images with their captions, as the stand-ins see them."""

    captions: list[list[str]]
    words: CaptionWords  # which words each caption holds
    pooled: list[torch.Tensor]  # of each view, (n, V): the mean of the image's tokens, standardised on training images
    hidden_input: list[torch.Tensor]  # of each view, a (n, H) of the trained RBM
    tokens: object  # `FeatureStore` of which these images are the `rows`
    rows: np.ndarray
    pooling: str = "tokens"  # of the RBM
    class_evidence: Optional[torch.Tensor] = None  # (n, K) of the tower's own classification head, see `class_evidence`

    @torch.no_grad()
    def hidden_input_of(self, rbm: JointRBM, view: int, count: Optional[int] = None, size: int = 256) -> torch.Tensor:
        """a (n, H) of an RBM, of the first `count` images."""
        rows = self.rows[:count]
        batches = (self.tokens.batch(rows[start : start + size], view) for start in range(0, len(rows), size))
        return torch.cat([rbm(pool_tokens(batch, self.pooling)) for batch in batches])


@dataclass
class StandIn:
    """What stands in the place of the RBM.

    Args:
        features: (n, F) of some images in a view; what phrases are fitted on. None: `phrases` says it all.
        information: PMI (n, m) of the word sets w (n, m, K) with some images. None: there is none to weigh.
        gains: (n, K) of every word for guide, in nats, where they depend on the image alone.
        phrases: in place of a regression: the mean CIDEr vector (n, P) expected of some images, given those of the training images.
    """

    features: Optional[Callable[[Images, int], torch.Tensor]] = None
    information: Optional[Callable[[Images, torch.Tensor], torch.Tensor]] = None
    gains: Optional[Callable[[Images], torch.Tensor]] = None
    phrases: Optional[Callable[[Images, torch.Tensor], torch.Tensor]] = None


class Detector(nn.Module):
    """Words of an image by a linear map of features f(x): log-odds b + A (f(x) - f of the average image). PMI is their sum over the words of a
    caption, without b.

    Args:
        body: (n, V) -> (n, F). centre (F,): features of the average image.
    """

    def __init__(self, body: nn.Module, centre: torch.Tensor, word_share: torch.Tensor):
        super().__init__()
        self.body = body
        self.register_buffer("centre", centre)
        self.weight = nn.Parameter(torch.zeros(len(word_share), len(centre)))
        self.bias = nn.Parameter(torch.logit(word_share.clamp(1e-4, 1 - 1e-4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) - self.centre) @ self.weight.T

    def loss(self, x: torch.Tensor, w: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The two losses of the RBM's stage, words and match, of these gains; noise (n, 1 + K) as there."""
        gains, each = self(x), torch.arange(len(x))
        return hidden_words_loss(self.bias + gains, w, shown_words(w, noise)) + info_nce(gains @ w.T, each, each)


def fit_detector(
    detector: Detector, train: list[torch.Tensor], words: CaptionWords, held: Images, held_features, **settings
):
    """Train a detector on features of the training images, (n, V) in each view, as the RBM is trained: AdamW, one caption an image and epoch, a
    fifth of the units dropped, the epoch of the best retrieval on held-back images.

    Args:
        words: of the training images, in their order.
        settings: epochs, learning_rate, weight_decay, batch_size, dropout, seed.
    """
    settings = {
        "epochs": 30,
        "learning_rate": 1e-3,
        "weight_decay": 1e-2,
        "batch_size": 192,
        "dropout": 0.2,
        "seed": 0,
    } | settings
    generator, rng = torch.Generator().manual_seed(settings["seed"]), np.random.default_rng(settings["seed"])
    optimizer = torch.optim.AdamW(
        detector.parameters(), settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    n, size = len(train[0]), settings["batch_size"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["epochs"] * (n // size))
    best, kept = -1.0, None
    for epoch in tqdm(range(settings["epochs"]), desc="train detector", leave=False):
        order = rng.permutation(n)
        for start in range(0, n - size + 1, size):
            rows = order[start : start + size]
            views = rng.integers(len(train), size=size)
            x = torch.stack([train[view][row] for view, row in zip(views, rows)])
            x = x * (torch.rand(x.shape, generator=generator) >= settings["dropout"])
            w = words.choose(rows, rng.random(size))
            loss = detector.loss(x, w, torch.rand(size, 1 + w.shape[1], generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % 3 == 0:
            quality = retrieval(detector, held_features, held)
            if quality > best:
                best, kept = quality, {name: t.clone() for name, t in detector.state_dict().items()}
    detector.load_state_dict(kept)
    return detector.eval()


@torch.no_grad()
def retrieval(detector: Detector, features: torch.Tensor, images: Images) -> float:
    """R@10 of images and of captions, added."""
    of_image = [images.words[i].float() for i in range(len(images.captions))]
    owner = torch.tensor([i for i, w in enumerate(of_image) for _ in w])
    found = recalls(detector(features) @ torch.cat(of_image).T, owner)
    return found["text_to_image_r10"] + found["image_to_text_r10"]


def of_detector(detector: Detector, features: Callable[[Images, int], torch.Tensor], inputs=None) -> StandIn:
    """Args: features: phrases are fitted on. inputs: of the detector, where they are others."""
    inputs = inputs or features
    with_gains = lambda images: detector(inputs(images, 0)).detach()
    return StandIn(features, lambda images, w: torch.einsum("nmk,nk->nm", w, with_gains(images)), with_gains)


def trained_rbm(rbm: JointRBM) -> StandIn:
    """The RBM itself: its causes, its exact PMI."""
    p = rbm.parameters_fp32
    return StandIn(
        lambda images, view: torch.sigmoid(images.hidden_input[view]),
        lambda images, w: pointwise_mutual_information(p, images.hidden_input[0][:, None], w),
    )


def untrained_rbm(rbm: JointRBM, train: Images, held: Images, share: torch.Tensor, seed: int = 0) -> StandIn:
    """An RBM with random weights of the trained one's lengths, its biases such that the causes are as active; words by a detector on them."""
    generator = torch.Generator().manual_seed(seed)
    random = JointRBM(rbm.visible_size, rbm.word_size, rbm.hidden_size, rbm.visible_type, rbm.tokens)
    random.load_state_dict(rbm.state_dict())
    weight = torch.randn(rbm.image_weight.shape, generator=generator)
    random.image_weight.data = weight * rbm.image_weight.norm(dim=0) / weight.norm(dim=0)
    inputs = train.hidden_input_of(random, 0, 2000)
    wanted = torch.sigmoid(train.hidden_input[0][:2000]).mean(0)
    random.hidden_bias.data += bias_of_activity(inputs, wanted)
    known = {}

    def causes(images: Images, view: int) -> torch.Tensor:
        key = id(images), view
        if key not in known:
            known[key] = torch.sigmoid(images.hidden_input_of(random, view))
        return known[key]

    views = [causes(train, view) for view in range(len(train.pooled))]
    detector = Detector(nn.Identity(), torch.cat(views).mean(0), share)
    return of_detector(fit_detector(detector, views, train.words, held, causes(held, 0)), causes)


def linear(train: Images, held: Images, share: torch.Tensor) -> StandIn:
    """Words and phrases by linear maps of the pooled image: no hidden units at all."""
    detector = Detector(nn.Identity(), torch.zeros(train.pooled[0].shape[1]), share)
    fit_detector(detector, train.pooled, train.words, held, held.pooled[0])
    return of_detector(detector, lambda images, view: images.pooled[view])


def pca(train: Images, held: Images, share: torch.Tensor, components: int) -> StandIn:
    """The same by way of as many principal components as the RBM has causes."""
    axes = image_axes(train.pooled[0], components)
    features = lambda images, view: images.pooled[view] @ axes
    views = [features(train, view) for view in range(len(train.pooled))]
    detector = Detector(nn.Identity(), torch.zeros(components), share)
    return of_detector(fit_detector(detector, views, train.words, held, features(held, 0)), features)


def mlp(train: Images, held: Images, share: torch.Tensor, hidden_size: int) -> StandIn:
    """The same by way of as many hidden units, trained with the detector."""
    body = nn.Sequential(nn.Linear(train.pooled[0].shape[1], hidden_size), nn.Sigmoid())
    nn.init.normal_(body[0].weight, std=0.02)
    detector = Detector(body, torch.full((hidden_size,), 0.5), share)
    nn.init.normal_(detector.weight, std=0.02)
    fit_detector(detector, train.pooled, train.words, held, held.pooled[0])
    body.requires_grad_(False)
    return of_detector(
        detector, lambda images, view: body(images.pooled[view]), lambda images, view: images.pooled[view]
    )


def neighbours(train: Images, share: torch.Tensor, k: int = 100) -> StandIn:
    """What was said of the k nearest training images (cosine): their mean CIDEr vector, their words. Devlin et al., 2015 (arXiv 1505.04467)."""
    bank = F.normalize(train.pooled[0], dim=-1)
    said = torch.stack([train.words[i].float().mean(0) for i in range(len(train.captions))])
    nearest = lambda images: (F.normalize(images.pooled[0], dim=-1) @ bank.T).topk(k, dim=-1).indices

    def gains(images: Images) -> torch.Tensor:
        share_near = torch.stack([said[near].mean(0) for near in nearest(images)])
        return torch.log((k * share_near + 10 * share) / ((k + 10) * share.clamp(min=1e-6)))

    def phrases(images: Images, targets) -> torch.Tensor:
        rows = nearest(images).numpy()
        return torch.from_numpy(np.stack([np.asarray(targets[near].mean(0)).ravel() for near in rows])).float()

    return StandIn(None, lambda images, w: torch.einsum("nmk,nk->nm", w, gains(images)), gains, phrases)


def no_image(train: Images) -> StandIn:
    """Phrases alone, the same for every image: what is usual in captions."""
    return StandIn(
        phrases=lambda images, targets: (
            torch.from_numpy(np.asarray(targets.mean(0))).float().expand(len(images.captions), -1)
        )
    )


def both(rbm: JointRBM) -> StandIn:
    """The RBM with phrases on its causes and on the pooled image: direct connections from the visible units, a semi-restricted machine."""
    ours = trained_rbm(rbm)
    features = lambda images, view: torch.cat([torch.sigmoid(images.hidden_input[view]), 0.2 * images.pooled[view]], -1)
    return StandIn(features, ours.information)


def class_evidence(class_tokens, tokens_mean: torch.Tensor, word_ids: list[int], least: float = 0.01) -> torch.Tensor:
    """(n, K) log P(word's classes | image) less that of the mean over these images, in nats, of the RBM's words that name classes of the tower's own
    head; 0 for the others. `least`: probabilities are not told apart below it."""
    share = class_tokens.word_probabilities(tokens_mean[:, None])
    share = torch.log((share + least) / (share.mean(0) + least))
    evidence, column = torch.zeros(len(share), len(word_ids)), {word: k for k, word in enumerate(word_ids)}
    for number, word in enumerate(class_tokens.word_ids.tolist()):
        if word in column:
            evidence[:, column[word]] = share[:, number]
    return evidence


def with_class_words(rbm: JointRBM) -> StandIn:
    """The RBM, and what the tower's own classification head says of a caption's words, added to its PMI."""
    ours = trained_rbm(rbm)
    evidence = lambda images, w: torch.einsum("nmk,nk->nm", w, images.class_evidence)
    return StandIn(ours.features, lambda images, w: ours.information(images, w) + evidence(images, w))


STAND_INS = {
    "RBM": lambda rbm, train, held, share: trained_rbm(rbm),
    "RBM, phrases on causes and pooled image": lambda rbm, train, held, share: both(rbm),
    "RBM and class words": lambda rbm, train, held, share: with_class_words(rbm),
    "untrained RBM": lambda rbm, train, held, share: untrained_rbm(rbm, train, held, share),
    "linear": lambda rbm, train, held, share: linear(train, held, share),
    "PCA": lambda rbm, train, held, share: pca(train, held, share, rbm.hidden_size),
    "MLP": lambda rbm, train, held, share: mlp(train, held, share, rbm.hidden_size),
    "neighbours": lambda rbm, train, held, share: neighbours(train, share),
    "no image": lambda rbm, train, held, share: no_image(train),
}
