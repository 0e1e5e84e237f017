"""How well similarities find the captions of images, and the images of captions."""

import math

import torch


def ranks(similarity: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks from 0 on: of each image's best caption (n,) among the others' captions, of each caption's image (m,) among the images.

    Args:
        similarity (n, m) of n images and m captions. owner (m,): the image of each caption.
    """
    images, captions = (torch.arange(length, device=owner.device) for length in similarity.shape)
    own = owner[None] == images[:, None]
    best_own = similarity.masked_fill(~own, float("-inf")).amax(1, keepdim=True)
    rank_of_caption = (similarity.masked_fill(own, float("-inf")) > best_own).sum(1)
    return rank_of_caption, (similarity > similarity[owner, captions]).sum(0)


def recalls(similarity: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """R@1, 5, 10 (percent) and median rank (1 is best), image to text (its best caption) and text to image; arguments as of `ranks`."""
    result = {}
    for name, rank in zip(("image_to_text", "text_to_image"), ranks(similarity, owner)):
        for k in (1, 5, 10):
            result[f"{name}_r{k}"] = 100 * (rank < k).float().mean().item()
        result[f"{name}_median_rank"] = 1 + rank.float().median().item()
    return result


def without_hubs(similarity, bank_images, bank_captions, temperature: float = 1.0, weight: float = 1.0) -> torch.Tensor:
    """Similarities (n, m) less what each caption and each image has with a bank of others, log-mean-exp over it /
    temperature.

    A caption that is like most images, a hub, is no sign that an image is its own: querybank normalisation (Bogolin et
    al., CVPR 2022), by the inverted softmax (Smith et al., ICLR 2017).

    Args:
        bank_images (r, m): similarity of the bank's images to these captions. bank_captions (n, s): of these images to
            the bank's captions.
        temperature: the higher, the more only the nearest of the bank count.
    """
    usual = [
        ((temperature * bank).logsumexp(axis, keepdim=True) - math.log(bank.shape[axis])) / temperature
        for axis, bank in ((0, bank_images), (1, bank_captions))
    ]
    return similarity - weight * (usual[0] + usual[1])
