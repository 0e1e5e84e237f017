"""Contrastive losses over all pairs of a batch, several texts of an image, computed in pieces.

Similarities are scale * z_i . z_t + bias of image and text embeddings. A text of the same image is never a negative. In pieces, the loss
and its gradient take memory for `chunk` rows of the matrix of similarities, not for all of it: a batch of 32,768 would need 4 GB a matrix.
"""

import torch
import torch.nn.functional as F


def sigmoid_loss(z_image, z_text, image_owner, text_owner, scale, bias):
    """Mean over images of the sum over texts of -log sigmoid(+-similarity) (Zhai et al., ICCV 2023), + for an image's own texts.

    Args:
        z_image (n, d), z_text (m, d). image_owner (n,), text_owner (m,): numbers of the images. scale, bias: scalars.
    """
    sign = 2.0 * (image_owner[:, None] == text_owner) - 1
    return F.softplus(-sign * (scale * z_image @ z_text.T + bias)).sum() / len(z_image)


def info_nce(similarity, image_owner, text_owner):
    """InfoNCE both ways (nats) of similarities (n, m): an image's texts are each right, and not counted against one another.

    Every text's image must be among the images, each of which is there once.
    """
    own = image_owner[:, None] == text_owner
    others = similarity.masked_fill(own, float("-inf"))
    to_text = (
        torch.logaddexp(similarity, others.logsumexp(1, keepdim=True)) - similarity
    )  # each own text against all others
    to_image = similarity.logsumexp(0) - similarity  # images are each there once
    return 0.5 * (to_text[own].mean() + to_image[own].mean())


class SigmoidInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_image, z_text, image_owner, text_owner, scale, bias, chunk):
        grads = [torch.zeros_like(t) for t in (z_image, z_text, scale, bias)]
        total = z_image.new_zeros(())
        for start in range(0, len(z_image), chunk):
            rows = slice(start, start + chunk)
            cosine = z_image[rows] @ z_text.T
            sign = 2.0 * (image_owner[rows, None] == text_owner) - 1
            logits = cosine * scale + bias
            total += F.softplus(-sign * logits).sum()
            slope = logits.mul_(-sign).sigmoid_().mul_(-sign)  # of the loss in the logits
            grads[0][rows] = scale * (slope @ z_text)
            grads[1] += scale * (slope.T @ z_image[rows])
            grads[2] += (slope * cosine).sum()
            grads[3] += slope.sum()
        ctx.save_for_backward(*(g / len(z_image) for g in grads))
        return total / len(z_image)

    @staticmethod
    def backward(ctx, grad):
        image, text, scale, bias = (grad * g for g in ctx.saved_tensors)
        return image, text, None, None, scale, bias, None


class InfoNCEInPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_image, z_text, image_owner, text_owner, scale, bias, chunk):
        pieces = [slice(start, start + chunk) for start in range(0, len(z_image), chunk)]
        columns = z_image.new_full((len(z_text),), float("-inf"))  # log sum exp over images
        for rows in pieces:
            columns = torch.logaddexp(columns, (scale * z_image[rows] @ z_text.T + bias).logsumexp(0))
        count = len(z_text)  # pairs that belong together
        grads = [torch.zeros_like(t) for t in (z_image, z_text, scale)]
        total = z_image.new_zeros(())
        for rows in pieces:
            cosine = z_image[rows] @ z_text.T
            logits = cosine * scale + bias
            own = image_owner[rows, None] == text_owner
            others = logits.masked_fill(own, float("-inf")).logsumexp(1, keepdim=True)
            against = torch.logaddexp(logits, others)  # an own text's, and all texts of other images
            total += ((against - logits) + (columns - logits))[own].sum()
            # an own text k: d(against_k)/dk = exp(k - against_k); another text j: sum over own k of exp(j - against_k)
            weight = torch.where(own, (-against).exp(), 0.0).sum(1, keepdim=True)
            slope = torch.where(own, (logits - against).exp() - 2, logits.exp() * weight)
            slope += (logits - columns).exp()
            grads[0][rows] = scale * (slope @ z_text)
            grads[1] += scale * (slope.T @ z_image[rows])
            grads[2] += (slope * cosine).sum()
        factor = 0.5 / count
        ctx.save_for_backward(*(g * factor for g in grads))
        return total * factor

    @staticmethod
    def backward(ctx, grad):
        image, text, scale = (grad * g for g in ctx.saved_tensors)
        return image, text, None, None, scale, None, None  # the bias cancels


def sigmoid_in_pieces(*args):
    """`sigmoid_loss` of the same arguments, and `chunk`: rows at a time."""
    return SigmoidInPieces.apply(*args)


def info_nce_in_pieces(*args):
    """`info_nce` of scale * z_i . z_t + bias, and `chunk`: rows at a time."""
    return InfoNCEInPieces.apply(*args)
