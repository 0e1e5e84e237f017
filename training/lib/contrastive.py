"""Contrastive losses over all pairs of a batch, several texts of an image, computed in pieces.

Similarities are scale * z_i . z_t + bias of image and text embeddings. A text of the same image is never a negative. In
pieces, loss and gradient take memory for `chunk` rows of the matrix of similarities: they are computed once more in the
backward pass. For a batch of 32,768 the whole matrix takes 4 GB.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def sigmoid_loss(z_image, z_text, image_owner, text_owner, scale, bias):
    """Mean over images of the sum over texts of -log sigmoid(+-similarity) (Zhai et al., ICCV 2023), + for an image's
    own texts.

    Args:
        z_image (n, d), z_text (m, d). image_owner (n,), text_owner (m,): numbers of the images. scale, bias: scalars.
    """
    sign = 2.0 * (image_owner[:, None] == text_owner) - 1
    return F.softplus(-sign * (scale * z_image @ z_text.T + bias)).sum() / len(z_image)


def info_nce(similarity, image_owner, text_owner):
    """InfoNCE both ways (nats) of similarities (n, m): an image's texts are each right, and not counted against one
    another.

    Every text's image must be among the images, each of which is there once.
    """
    own = image_owner[:, None] == text_owner
    others = similarity.masked_fill(own, float("-inf"))
    to_text = (
        torch.logaddexp(similarity, others.logsumexp(1, keepdim=True)) - similarity
    )  # each own text against all others
    to_image = similarity.logsumexp(0) - similarity  # images are each there once
    return 0.5 * (to_text[own].mean() + to_image[own].mean())


def pieces(z_image, image_owner, chunk: int):
    """Some images at a time, `chunk` of them."""
    return zip(z_image.split(chunk), image_owner.split(chunk))


def sigmoid_in_pieces(z_image, z_text, image_owner, text_owner, scale, bias, chunk: int):
    """`sigmoid_loss` of the same arguments, `chunk` images at a time."""
    total = 0.0
    for some, owner in pieces(z_image, image_owner, chunk):
        mean = checkpoint(sigmoid_loss, some, z_text, owner, text_owner, scale, bias, use_reentrant=False)
        total = total + len(some) * mean
    return total / len(z_image)


def info_nce_in_pieces(z_image, z_text, image_owner, text_owner, scale, bias, chunk: int):
    """`info_nce` of scale * z_i . z_t + bias, `chunk` images at a time."""
    total, columns = 0.0, []
    for some, owner in pieces(z_image, image_owner, chunk):
        of_images, of_texts = checkpoint(
            info_nce_piece, some, z_text, owner, text_owner, scale, bias, use_reentrant=False
        )
        total = total + of_images
        columns.append(of_texts)
    return 0.5 * (total + torch.stack(columns).logsumexp(0).sum()) / len(z_text)


def info_nce_piece(z_image, z_text, image_owner, text_owner, scale, bias):
    """What some of the images add to both directions: a sum over their own texts, and of each text the log sum exp over
    these images (m,)."""
    similarity = scale * z_image @ z_text.T + bias
    own = image_owner[:, None] == text_owner
    others = similarity.masked_fill(own, float("-inf")).logsumexp(1, keepdim=True)
    return (torch.logaddexp(similarity, others) - 2 * similarity)[own].sum(), similarity.logsumexp(0)
