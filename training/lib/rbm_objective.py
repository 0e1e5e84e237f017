"""What an RBM is trained on: images with the words of one of their captions, and the terms of the loss."""

from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from modeling_blip_rbm.rbm import (
    GibbsState,
    bernoulli,
    free_energy,
    gibbs,
    hidden_input,
    pairwise_mutual_information,
    pooled_input,
    prob_h_given_v,
    token_free_energy,
    token_gibbs,
    token_input,
    word_gains,
)
from training.lib.arguments import bf16_is_fast
from training.lib.data import CaptionWords
from training.lib.distributed import from_all_processes


@dataclass
class RBMArguments:
    model: str = field(metadata={"help": "folder or Hub id of the captioner"})
    output_dir: str = field(metadata={"help": "where log, state and the captioner with its RBM go"})
    hidden_size: int = field(default=512, metadata={"help": "H, hidden causes"})
    num_words: int = field(default=1000, metadata={"help": "K, the most frequent content word-pieces"})
    pooling: Optional[str] = field(
        default=None,
        metadata={"help": "of image tokens: mean, cls_mean, mean_max, or tokens: none; default: the model's"},
    )
    epochs: int = field(default=100, metadata={"help": "an epoch shows each image once, with one of its captions"})
    batch_size: int = field(default=256, metadata={"help": "images a step, over all processes"})
    learning_rate: float = field(default=1e-3, metadata={"help": "warmed up for one epoch, then cosine"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or sgd", "choices": ["adamw", "sgd"]})
    momentum: float = field(default=0.9, metadata={"help": "of sgd"})
    weight_decay: float = field(default=1e-2, metadata={"help": "on the weights only; decoupled in adamw"})
    image_dropout: float = field(default=0.2, metadata={"help": "share of image units set to the average image's"})
    init_std: float = field(default=0.02, metadata={"help": "of the weights at the start"})
    words: float = field(default=1.0, metadata={"help": "weight of the held-out words' log-likelihood"})
    match: float = field(default=1.0, metadata={"help": "weight of InfoNCE over PMI"})
    cd: float = field(
        default=0.0,
        metadata={
            "help": "weight of contrastive divergence; of tokens, which repeat each other but count as so many images, say 1/N of it"
        },
    )
    cd_steps: int = field(default=1, metadata={"help": "Gibbs steps of contrastive divergence"})
    cd_clamp_image: bool = field(default=False, metadata={"help": "contrastive divergence for P(w | x) only"})
    cd_persistent: bool = field(
        default=False, metadata={"help": "PCD: chains go on from step to step, image not clamped"}
    )
    sparsity_target: Optional[float] = field(default=None, metadata={"help": "mean activity hidden units are drawn to"})
    sparsity_cost: float = field(default=1.0, metadata={"help": "weight of the cross entropy to the sparsity target"})
    eval_every: int = field(default=5, metadata={"help": "epochs between evaluations"})
    ais_every: int = field(default=0, metadata={"help": "epochs between log-likelihoods by AIS; 0: never"})
    patience: Optional[int] = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})


class PooledPairs(torch.utils.data.Dataset):
    """Images in a random view, pooled or all tokens, the words of one of their captions, and the random numbers of a step.

    All chance is drawn from (seed, epoch, image): a step is the same in whatever process its images are, and after a
    stop.

    Args:
        store: `FeatureStore`. rows: its rows that belong to the set. words: of all its rows.
    """

    def __init__(self, store, rows, words: CaptionWords, seed: int = 0):
        self.store, self.rows, self.words, self.seed, self.epoch = store, np.asarray(rows), words, seed, 0

    def __len__(self):
        return len(self.rows)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        """A whole batch: pooled (B, V) or tokens (B, N, V), w (B, K), noise (B, 1 + V + K) uniform in [0, 1)."""
        rows = self.rows[np.asarray(indices)]
        size = 3 + self.store.shape[-1] + self.words.num_words
        chance = np.stack(
            [np.random.default_rng([self.seed, self.epoch, row]).random(size, np.float32) for row in rows]
        )
        views = (chance[:, 0] * self.store.num_views).astype(np.int64)
        return {
            "pooled": self.store.batch(rows, views),
            "w": self.words.choose(rows, chance[:, 1]),
            "noise": torch.from_numpy(chance[:, 2:]),
        }


def whole_batch(batch: dict) -> dict:  # what `PooledPairs` gives is collated already
    return batch


def shown_words(w, noise):
    """A random share of the words w (B, K) of each caption, as noise (B, 1 + K), uniform in [0, 1), says."""
    return w * (noise[:, 1:] < noise[:, :1]).float()


def hidden_words_loss(logits, w, shown):
    """-log P of the words w (B, K) that are not shown, by their logits (B, K): mean over captions (nats per caption)."""
    loss = F.binary_cross_entropy_with_logits(logits, w, reduction="none")
    return (loss * (1 - shown)).sum(-1).mean()


def words_loss(p, a_image, w, noise):
    """-log P(w_k | x, some of the other words), mean over captions (nats per caption): what guide relies on.

    A random share of the words is shown, as noise (B, 1 + K), uniform in [0, 1), says; each hidden word's conditional
    is sigmoid(b_k + gain_k), which is exact for the RBM (gains to second order, for speed: `benchmarks/guidance.py`
    measures the difference).
    """
    shown = shown_words(w, noise)
    return hidden_words_loss(p.b + word_gains(p, a_image + shown @ p.U, order="second"), w, shown)


def match_loss(p, a_image, w):
    """InfoNCE over s_ij = PMI(w_j; x_i), both ways (BLIP's ITC with the RBM as the similarity), in nats.

    Under several processes the images and captions of all of them are each other's negatives, as if they were one
    batch.
    """
    all_images, all_words = from_all_processes(a_image), from_all_processes(w)
    to_words = pairwise_mutual_information(p, a_image, all_words)  # (b, B)
    if len(all_images) == len(a_image):
        to_images = to_words.T
    else:
        to_images = pairwise_mutual_information(p, all_images, w).T
    first = 0 if len(all_images) == len(a_image) else dist.get_rank() * len(a_image)
    target = torch.arange(first, first + len(a_image), device=w.device)
    return 0.5 * (F.cross_entropy(to_words, target) + F.cross_entropy(to_images, target))


def cd_loss(p, x, w, steps, clamp_image, chains=None):
    """<F>_data - <F>_model with the samples held fixed: its gradient is that of contrastive divergence.

    Args:
        chains: where persistent chains stand; None: they start at the data.

    Returns:
        the loss, and where the chains ended.
    """
    with torch.no_grad():
        if chains is None:
            chains = GibbsState(bernoulli(prob_h_given_v(p, x, w)), x, w)
        chains = gibbs(p, chains, steps, clamp=("x",) if clamp_image else ())
    return free_energy(p, x, w).mean() - free_energy(p, chains.x, chains.w).mean(), chains


def token_cd_loss(p, x, w, steps, clamp_image):
    """As `cd_loss`, for tokens x (B, N, V) and chains from the data."""
    with torch.no_grad():
        chains = token_gibbs(p, x, w, steps, clamp=("x",) if clamp_image else ())
    return token_free_energy(p, x, w).mean() - token_free_energy(p, *chains).mean()


def sparsity_loss(a, target: float):
    """Cross entropy between the target and each hidden unit's mean activity, mean over units (Lee et al. 2007)."""
    mean_q = torch.sigmoid(a).mean(0).clamp(1e-6, 1 - 1e-6)
    return F.binary_cross_entropy(mean_q, torch.full_like(mean_q, target))


class RBMObjective(torch.nn.Module):
    """The loss as a module, so that every process and precision that Accelerate knows can run it."""

    def __init__(self, rbm, settings: RBMArguments, processes: int = 1):
        super().__init__()
        if settings.cd_persistent and settings.cd_clamp_image:
            raise ValueError("cd_persistent and cd_clamp_image exclude each other: a chain has one image, a batch many")
        if settings.cd_persistent and rbm.tokens:
            raise ValueError("cd_persistent keeps chains of pooled images alone: leave it out with --pooling tokens")
        self.rbm, self.settings = rbm.requires_grad_(True), settings  # a captioner's RBM is frozen
        if settings.cd and settings.cd_persistent:  # buffers: saved and resumed with the rest
            n = settings.batch_size // processes
            self.register_buffer("chain_h", torch.full((n, rbm.hidden_size), 0.5).bernoulli())
            self.register_buffer("chain_x", torch.randn(n, rbm.visible_size))
            self.register_buffer("chain_w", torch.sigmoid(rbm.word_bias.detach()).expand(n, -1).bernoulli())

    def cd_term(self, p, x, w):
        settings = self.settings
        if self.rbm.tokens:
            return token_cd_loss(p, x, w, settings.cd_steps, settings.cd_clamp_image)
        if not settings.cd_persistent:
            return cd_loss(p, x, w, settings.cd_steps, settings.cd_clamp_image)[0]
        loss, chains = cd_loss(p, x, w, settings.cd_steps, False, GibbsState(self.chain_h, self.chain_x, self.chain_w))
        self.chain_h, self.chain_x, self.chain_w = chains
        return loss

    def fast_products(self, device):
        """In bf16 where that is faster: of tokens they are nearly all of a step's time."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.rbm.tokens and bf16_is_fast())

    def forward(self, pooled, w, noise):
        """The loss and its terms, for a batch of `PooledPairs`. Image dropout drops a channel of all tokens of an image."""
        p, settings = self.rbm.parameters_fp32, self.settings
        full = self.rbm.standardise(pooled)
        for_words, for_image = noise.split([1 + w.shape[1], pooled.shape[-1]], dim=1)
        kept = (for_image >= settings.image_dropout).float()
        x = full * (kept[:, None] if self.rbm.tokens else kept)
        with self.fast_products(x.device):
            a = pooled_input(token_input(p, x)) if self.rbm.tokens else hidden_input(p, x)
        terms = {}
        if settings.words:
            terms["words"] = words_loss(p, a, w, for_words)
        if settings.match:
            terms["match"] = match_loss(p, a, w)
        if settings.cd:
            with self.fast_products(x.device):
                terms["cd"] = self.cd_term(p, full, w)
        loss = sum(getattr(settings, name) * term for name, term in terms.items())
        if settings.sparsity_target is not None:
            terms["sparsity"] = sparsity_loss(from_all_processes(a + w @ p.U), settings.sparsity_target)
            loss = loss + settings.sparsity_cost * terms["sparsity"]
        return loss, terms
