"""Phrases: what an image's hidden causes say of whole word sequences, and so which CIDEr-D a caption may expect.

The word block knows which words a caption holds, but not their order. The phrase block holds n-grams of one to four tokens: of a caption,
phi_g, how often n-gram g stands in it times its inverse document frequency, divided by the length of that vector over all n-grams of its
order. That is the vector of CIDEr (Vedantam, Zitnick & Parikh, CVPR 2015), whose mean over references and orders is the score. As a block of
Gaussian units of variance 1 its mean given the hidden causes is linear, E[phi | h] = r + R h, as that of the RBM's image block, and what
couples a caption with the causes is the energy of that block:

    CIDEr-D expected of caption c for image x  =  10 f(|c|) / 4  phi(c)' (r + R q),    q = P(h = 1 | x)

with f the mean over training captions of CIDEr-D's penalty for a length unlike the reference's. r and R are fitted in closed form, the RBM as
it is (`training/fit_phrases.py`): a regression of the mean vector of an image's captions on its causes. It is a consensus with what would be
said of like images (Devlin et al., "Exploring nearest neighbor approaches for image captioning", 2015), without keeping their captions.
What is expected of many images draws to common words; `rarity` is the weight on the other side.

Axes: B images, n candidates of an image, T tokens, L places where an n-gram may begin, P phrases, H hidden causes.
"""

import torch
import torch.nn.functional as F
from torch import nn


ORDERS = (1, 2, 3, 4)  # of n-grams, as CIDEr counts them
SIGMA = 6.0  # of CIDEr-D's penalty for another length
MAX_LENGTH = 64  # of captions whose length counts as it is
RARE_FROM = 4.0  # idf: words said of fewer than one image in 55 are rare


def ngram_numbers(sequences: torch.Tensor, n: int, ignored: tuple[int, ...], base: int):
    """The n-grams of token sequences (..., T), each as one number, digits of the base `base` that are never 0: no two n-grams, of one order or
    of two, have the same.

    Args:
        ignored: ids of tokens over which no n-gram goes, such as pads.
        base: greater than every token id + 1. Exact up to n = 4 for a base of 55,000.

    Returns:
        numbers (..., L) and whether there is an n-gram at all (..., L), L = T - n + 1.
    """
    length = sequences.shape[-1] - n + 1
    dropped = torch.isin(sequences, torch.tensor(ignored, device=sequences.device))
    number = torch.zeros_like(sequences[..., :length])
    kept = torch.ones_like(number, dtype=torch.bool)
    for i in range(n):
        number = number * base + sequences[..., i : i + length] + 1
        kept &= ~dropped[..., i : i + length]
    return number, kept


def length_factors(lengths: torch.Tensor) -> torch.Tensor:
    """f (MAX_LENGTH + 1,): what is left of CIDEr-D, on average over references with these numbers of tokens, of a caption of 0, 1, ... tokens."""
    own = torch.arange(MAX_LENGTH + 1, dtype=torch.float)
    of_length = torch.bincount(lengths.clamp(max=MAX_LENGTH), minlength=MAX_LENGTH + 1) / len(lengths)
    return torch.exp(-((own[:, None] - own) ** 2) / (2 * SIGMA**2)) @ of_length


class PhraseBlock(nn.Module):
    """The phrases, and what the hidden causes say of them. See the head of this file.

    Attributes:
        numbers (P,): the n-grams by `ngram_numbers`, ascending. idf (P,): log(images / images in whose captions it is said).
        unknown_idf (): of an n-gram that is none of the phrases. weight R (P, H), bias r (P,), length_factor f.
    """

    def __init__(self, num_phrases: int, hidden_size: int, vocab_size: int):
        super().__init__()
        self.base = vocab_size + 1
        self.register_buffer("numbers", torch.zeros(num_phrases, dtype=torch.long))
        self.register_buffer("idf", torch.zeros(num_phrases))
        self.register_buffer("unknown_idf", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(num_phrases, hidden_size))
        self.register_buffer("bias", torch.zeros(num_phrases))
        self.register_buffer("length_factor", torch.zeros(MAX_LENGTH + 1))

    def set_vocab_size(self, vocab_size: int):
        """Number the phrases for a vocabulary of another size, in which every token keeps its id.

        Raises:
            ValueError: if a phrase has a token that the vocabulary would not have.
        """
        base, left, scale = vocab_size + 1, self.numbers.clone(), 1
        numbers = torch.zeros_like(left)
        while left.any():
            digit = left % self.base
            if (digit > vocab_size).any():
                raise ValueError(
                    f"a phrase has token {int(digit.max()) - 1}, but the vocabulary would have {vocab_size} tokens"
                )
            numbers, left, scale = numbers + digit * scale, left // self.base, scale * base
        self.numbers.copy_(numbers)  # still ascending: the order of digits is the same in every base
        self.base = base

    def vectors(self, sequences: torch.Tensor, ignored: tuple[int, ...]):
        """phi of token sequences (R, T), sparse: columns (R, G) among the phrases and values (R, G). A phrase said twice stands there once,
        as CIDEr-D counts no more than the references have; n-grams that are no phrases only make the vector longer."""
        columns, values = [], []
        for n in ORDERS[: sequences.shape[-1]]:
            number, kept = ngram_numbers(sequences, n, ignored, self.base)
            column = torch.searchsorted(self.numbers, number).clamp(max=len(self.numbers) - 1)
            known = (self.numbers[column] == number) & kept
            idf = torch.where(known, self.idf[column], self.unknown_idf) * kept
            times = ((number[:, :, None] == number[:, None]) & kept[:, None]).sum(-1).clamp(min=1)
            norm = (idf**2 * times).sum(-1, keepdim=True).sqrt()
            columns.append(column)
            values.append(idf * known / times / norm.clamp(min=1e-6))
        return torch.cat(columns, -1), torch.cat(values, -1)

    def expected_cider(self, hidden: torch.Tensor, sequences: torch.Tensor, ignored: tuple[int, ...]) -> torch.Tensor:
        """(B, n) CIDEr-D, about 0 to 10, expected of the captions (B, n, T) of images with the causes q (B, H).

        Args:
            ignored: ids of tokens that are no words: pads, and the ends of captions.
        """
        images, n, _ = sequences.shape
        flat = sequences.flatten(0, 1)
        columns, values = self.vectors(flat, ignored)
        weights = values.to(self.weight.dtype)  # the model may have been put into half precision
        of_causes = F.embedding_bag(columns, self.weight, per_sample_weights=weights, mode="sum").view(images, n, -1)
        expected = (of_causes.float() @ hidden.float()[:, :, None])[..., 0]
        expected = expected + (self.bias[columns] * values).sum(-1).view(images, n)
        length = (~torch.isin(flat, torch.tensor(ignored, device=flat.device))).sum(-1).clamp(max=MAX_LENGTH)
        return 10 / len(ORDERS) * expected * self.length_factor[length].view(images, n)

    def rarity(self, sequences: torch.Tensor, ignored: tuple[int, ...]) -> torch.Tensor:
        """(B, n) how rare the words of the captions (B, n, T) are, in nats: the sum of `token_rarity` over their different tokens."""
        counted = ~torch.isin(sequences, torch.tensor(ignored, device=sequences.device))
        times = (sequences[..., :, None] == sequences[..., None, :]).sum(-1)
        return (self.token_rarity(sequences) * counted / times).sum(-1)

    def token_rarity(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(...) how far the idf of tokens (...) is above `RARE_FROM`, in nats. Those that are no phrases count as the rarest that is one."""
        number = token_ids + 1  # a token's own of `ngram_numbers`
        column = torch.searchsorted(self.numbers, number).clamp(max=len(self.numbers) - 1)
        idf = torch.where(self.numbers[column] == number, self.idf[column], self.idf.max())
        return (idf.float() - RARE_FROM).clamp(min=0)
