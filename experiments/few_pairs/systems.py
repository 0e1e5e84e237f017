"""What predicts words of images and matches images with captions: an RBM, and its controls of equal parameters.

All share one loss, `System.forward`, and differ in two functions: the log-odds of words, and how much likelier a caption is for an image
than for the average one. An RBM may learn from images and texts that are no pairs; controls learn from them by the axes of largest variance.

Axes: B samples, V image units, K words, H hidden units, R axes of texts, n images, m captions.
"""

from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modeling_blip_rbm.rbm import (
    JointRBM,
    hidden_input,
    pairwise_mutual_information,
    word_gains,
)
from training.lib.contrastive import info_nce
from training.lib.rbm_objective import RBMArguments, cd_loss, hidden_words_loss, shown_words


class Unpaired:
    """Images without captions and captions without images, random batches of each.

    Args:
        store: `FeatureStore` of pooled images. rows: its rows that are used. texts: `CaptionWords` of the texts. seed: of the batches.
    """

    def __init__(self, store, rows, texts, seed: int = 0):
        self.store, self.rows, self.texts, self.rng = store, np.asarray(rows), texts, np.random.default_rng(seed)

    def draw(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled images (size, V) in random views and words (size, K) of texts."""
        rows, views = self.rng.choice(self.rows, size), self.rng.integers(self.store.num_views, size=size)
        numbers = self.rng.integers(len(self.texts.ends) - 1, size=size)
        return self.store.batch(rows, views), self.texts.of_captions(numbers).float()


class System(nn.Module):
    """The shared loss: `words` and `match` of `training/lib/rbm_objective.py`, weighted as `settings` says, and what a system adds.

    Args:
        mean, std (V,): of pooled images. Subclasses take word_share (K,) too, the share of captions with each word: biases start there.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, settings: RBMArguments):
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def standardise(self, pooled: torch.Tensor) -> torch.Tensor:
        return (pooled - self.mean) / self.std

    def word_logits(self, x: torch.Tensor, said: Optional[torch.Tensor] = None, exact: bool = False) -> torch.Tensor:
        """(B, K) log-odds of words given x (B, V) and, for systems that read them, the words said (B, K)."""
        raise NotImplementedError

    def information(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """(n, m) PMI: how much likelier the captions w (m, K) are for the images x (n, V) than for the average image, nats."""
        raise NotImplementedError

    def generative(self, x: torch.Tensor, w: torch.Tensor) -> Optional[torch.Tensor]:
        """The term that learns from x (B, V) and w (B, K) as samples, of weight `settings.cd`."""
        return None

    def forward(self, pooled, w, noise):
        """The loss and its terms, for a batch of `PooledPairs`."""
        settings, full = self.settings, self.standardise(pooled)
        for_words, for_image = noise.split([1 + w.shape[1], pooled.shape[-1]], dim=1)
        x = full * (for_image >= settings.image_dropout).float()
        terms = {}
        if settings.words:
            shown = shown_words(w, for_words)
            terms["words"] = hidden_words_loss(self.word_logits(x, shown), w, shown)
        if settings.match:
            each = torch.arange(len(x))
            terms["match"] = info_nce(self.information(x, w), each, each)
        if settings.cd and (term := self.generative(full, w)) is not None:
            terms["cd"] = term
        return sum(getattr(settings, name) * term for name, term in terms.items()), terms


class RBM(System):
    """The RBM. Its generative term is contrastive divergence of the pairs, p(x, w); with `unpaired` also of images alone, p(x), and of texts
    alone, p(w), each under the machine in which the other block is absent (as of films without a vote in Salakhutdinov, Mnih & Hinton, ICML
    2007)."""

    def __init__(self, mean, std, settings, word_share, unpaired: Optional[Unpaired] = None):
        super().__init__(mean, std, settings)
        self.unpaired, self.rbm = unpaired, JointRBM(len(mean), len(word_share), settings.hidden_size)
        self.rbm.reset_parameters(std=settings.init_std)
        with torch.no_grad():
            self.rbm.word_bias.copy_(torch.logit(word_share.clamp(1e-4, 1 - 1e-4)))

    def word_logits(self, x, said=None, exact=False):
        p = self.rbm.parameters_fp32
        return p.b + word_gains(p, hidden_input(p, x, said), order="exact" if exact else "second")

    def information(self, x, w):
        p = self.rbm.parameters_fp32
        return pairwise_mutual_information(p, hidden_input(p, x), w)

    def generative(self, x, w):
        p, steps = self.rbm.parameters_fp32, self.settings.cd_steps
        loss = cd_loss(p, x, w, steps, False)[0]
        if self.unpaired is None:
            return loss
        pooled, texts = self.unpaired.draw(len(x))
        images = self.standardise(pooled)
        return loss + cd_loss(p, images, None, steps, False)[0] + cd_loss(p, None, texts, steps, False)[0]

    @torch.no_grad()
    def activity(self, x: torch.Tensor) -> dict[str, float]:
        """Mean over units of the mean of q and of the standard deviation of its input, over images x (n, V)."""
        a = self.rbm.hidden_input(x)
        return {"mean": torch.sigmoid(a).mean().item(), "input_std": a.std(0).mean().item()}


class Detector(System):
    """Words by a linear map of features: logits b + z(x, said), PMI the sum over the caption's words of z(x) - z(average image).

    Args:
        features: module (B, V), or (B, V + K) if words said are read, -> (B, width). basis (R, K): the head's rows are combinations of
            these; None: any.
    """

    def __init__(self, mean, std, settings, word_share, features: nn.Module, width: int, basis=None, reads_said=False):
        super().__init__(mean, std, settings)
        self.features, self.reads_said = features, reads_said
        self.register_buffer("basis", basis)
        self.register_buffer("no_word", torch.zeros(len(word_share)))
        self.head_weight = nn.Parameter(torch.zeros(width, len(word_share) if basis is None else len(basis)))
        self.word_bias = nn.Parameter(torch.logit(word_share.clamp(1e-4, 1 - 1e-4)))

    def evidence(self, x, said=None):
        """(B, K) z: what image and said words add to the log-odds of the average image with no word said."""
        if self.reads_said:
            said = self.no_word.expand(len(x), -1) if said is None else said
            x = torch.cat([x, said], -1)
        z = (self.features(x) - self.features(torch.zeros_like(x[:1]))) @ self.head_weight
        return z if self.basis is None else z @ self.basis

    def word_logits(self, x, said=None, exact=False):
        return self.word_bias + self.evidence(x, said)

    def information(self, x, w):
        return self.evidence(x) @ w.T


class HiddenLayer(nn.Module):
    """A trained layer of rectified units."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.randn(inputs, width) / inputs**0.5)
        self.hidden_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.relu(x @ self.hidden_weight + self.hidden_bias)


class Axes(nn.Module):
    """A fixed linear map to `axes` (V, width)."""

    def __init__(self, axes: torch.Tensor):
        super().__init__()
        self.register_buffer("axes", axes)

    def forward(self, x):
        return x @ self.axes


def bias_of_activity(a: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(H,) what to add to inputs a (n, H) of hidden units, so that the mean of q over samples is `wanted` (H,). By bisection, as it rises with the
    bias."""
    low, high = torch.full_like(wanted, -30.0), torch.full_like(wanted, 30.0)
    for _ in range(40):
        bias = (low + high) / 2
        rises = torch.sigmoid(a + bias).mean(0) < wanted
        low, high = torch.where(rises, bias, low), torch.where(rises, high, bias)
    return bias


class RandomCauses(nn.Module):
    """Hidden units of an RBM with random weights, as active as those of a trained one.

    Args:
        x (n, V): images. width: units. activity: of a trained RBM (`RBM.activity`).
    """

    def __init__(self, x: torch.Tensor, width: int, activity: dict[str, float]):
        super().__init__()
        W = torch.randn(x.shape[1], width)
        W *= activity["input_std"] / (x @ W).std(0)
        self.register_buffer("W", W)
        self.register_buffer("c", bias_of_activity(x @ W, torch.full((width,), activity["mean"])))

    def forward(self, x):
        return torch.sigmoid(x @ self.W + self.c)


def image_axes(x: torch.Tensor, width: int) -> torch.Tensor:
    """(V, width) the principal axes of images x (n, V), scaled so that each has variance 1 (PCA, whitened)."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    width = min(width, len(values))
    return vectors[:, -width:] / values[-width:].clamp(min=1e-4).sqrt()


def text_axes(texts, size: int = 8192) -> torch.Tensor:
    """(K, K) log-odds of words along the principal axes of their correlations in `CaptionWords` texts, the last the largest (LSA of a binary
    matrix): an axis moves the log-odds of word k by its covariance with k over the variance of k. Scaled so that the mean row has length 1."""
    count, products, said = len(texts.ends) - 1, 0.0, 0.0
    for start in range(0, count, size):
        w = texts.of_captions(np.arange(start, min(start + size, count))).float()
        products, said = products + (w.T @ w).double(), said + w.sum(0).double()
    share = said / count
    # rare words have hardly a variance to divide by
    deviation = (share * (1 - share)).sqrt().clamp(min=0.01)
    correlation = (products / count - torch.outer(share, share)) / torch.outer(deviation, deviation)
    values, vectors = torch.linalg.eigh(correlation)
    rows = ((vectors * values.clamp(min=0).sqrt()) / deviation[:, None]).T.float()
    return rows / rows.norm(dim=1).mean()
