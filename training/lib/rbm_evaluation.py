"""How well an RBM knows images and words."""

import torch

from boltzmann.likelihood import annealed_importance_sampling, base_rate_model, log_prob
from modeling_blip_rbm.rbm import pairwise_mutual_information, word_gains
from training.lib.retrieval import recalls


def average_precision(prob: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(n,) average precision of each row's ranking: prob, target (n, K). Rows without a target have 0."""
    order = prob.argsort(1, descending=True)
    hits = target.gather(1, order).float()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    return (precision * hits).sum(1) / hits.sum(1).clamp(min=1)


@torch.no_grad()
def image_inputs(rbm, store, rows, view: int = 0, size: int = 256) -> torch.Tensor:
    """a (n, H), the hidden input of these rows of a `FeatureStore`, where the RBM is, a few rows at a time: tokens of all fill no memory."""
    device = rbm.hidden_bias.device
    parts = [rbm(store.batch(rows[start : start + size], view).to(device)) for start in range(0, len(rows), size)]
    return torch.cat(parts) if parts else rbm.hidden_bias.new_zeros(0, rbm.hidden_size)


@torch.no_grad()
def evaluate_rbm(rbm, features: torch.Tensor, words: list[torch.Tensor]) -> dict[str, float]:
    """Retrieval by PMI among these images and all their captions, words of images, images of words, idle hidden units.

    Args:
        features (n, V), or tokens (n, N, V): plain views. words: of each image (captions, K).

    Returns:
        `image_to_text_r*`, `text_to_image_r*`: R@1, 5, 10 in percent; `word_ap`: mean over images of the average
        precision of its words among all words; `per_word_ap`: mean over words of that of its images among all images,
        to compare with `per_word_ap_chance`; `dead`, `saturated`: shares of hidden units whose mean activity is below
        0.01, above 0.99.
    """
    p, device = rbm.parameters_fp32, rbm.hidden_bias.device
    a = torch.cat([rbm(part.to(device)) for part in features.split(256)])
    owner = torch.tensor([i for i, of_image in enumerate(words) for _ in of_image], device=device)
    w = torch.cat([of_image.float() for of_image in words]).to(device)
    scores = pairwise_mutual_information(p, a, w)  # (n, captions)
    target = torch.stack([of_image.any(0) for of_image in words]).to(device)
    prob = torch.sigmoid(p.b + word_gains(p, a, order="second"))
    q = torch.sigmoid(a).mean(0)
    said = target.any(0)
    result = {
        "word_ap": average_precision(prob, target).mean().item(),
        "per_word_ap": average_precision(prob.T[said], target.T[said]).mean().item(),
        "per_word_ap_chance": target[:, said].float().mean(0).mean().item(),
    }
    result |= recalls(scores, owner)
    return result | {"dead": (q < 0.01).float().mean().item(), "saturated": (q > 0.99).float().mean().item()}


def _first_captions(rbm, pairs):
    (features, words), device = pairs, rbm.hidden_bias.device
    return rbm.standardise(features.to(device)), torch.stack([of_image[0].float() for of_image in words]).to(device)


def _mean_free_energy(rbm, pairs, size: int = 256) -> float:
    features, words = pairs
    parts = [_first_captions(rbm, (features[i : i + size], words[i : i + size])) for i in range(0, len(words), size)]
    return torch.cat([rbm.free_energy(*part) for part in parts]).mean().item()


@torch.no_grad()
def free_energy_gap(rbm, held_back, seen) -> dict[str, float]:
    """Mean F(x, w) of held-back pairs above that of training pairs (nats): overfitting, no log Z needed (Hinton 2010,
    6)."""
    return {"free_energy_gap": _mean_free_energy(rbm, held_back) - _mean_free_energy(rbm, seen)}


@torch.no_grad()
def log_likelihood(rbm, held_back, seen, temperatures: int = 1000, chains: int = 100) -> dict[str, float]:
    """Mean log P(x, w) of pairs (nats, a density in the standardised image) by annealed importance sampling."""
    p = rbm.parameters_fp32
    x, w = _first_captions(rbm, seen)
    base = base_rate_model(p, x.mean(0), w.mean(0), least=1e-4)
    log_z = annealed_importance_sampling(p, temperatures, chains, base, progress=True).log_z
    return {
        "log_likelihood": log_prob(p, log_z, *_first_captions(rbm, held_back)).mean().item(),
        "log_likelihood_training": log_prob(p, log_z, x, w).mean().item(),
        "log_z": log_z,
    }
