"""Where the RBM touches the words: guide (while a caption is written) and re-rank (when candidates are finished).

Axes: R rows (images * beams), T tokens, K words of the RBM, H hidden units, B images, n candidates of an image.
"""

import torch
from transformers import LogitsProcessor, StoppingCriteria

from .rbm import RBMParameters, word_gains


def word_columns(word_ids: list[int], vocab_size: int, device=None) -> torch.Tensor:
    """(vocab_size,) column of each token id in the word block, K for tokens that have none."""
    columns = torch.full((vocab_size,), len(word_ids), device=device)
    columns[torch.tensor(word_ids, device=device, dtype=torch.long)] = torch.arange(len(word_ids), device=device)
    return columns


def words_said(token_ids: torch.Tensor, columns: torch.Tensor, num_words: int) -> torch.Tensor:
    """w (R, K) in {0, 1}: which of the RBM's words stand in the token sequences (R, T)."""
    said = torch.zeros(token_ids.shape[0], num_words + 1, device=token_ids.device)
    return said.scatter_(1, columns[token_ids], 1.0)[:, :num_words]


class RBMGuidance(LogitsProcessor):
    """Adds beta * clip(g_k) to the score of every word k not yet said.

    g_k = gain of word k for this image - its gain for the average image, given the words said so far
    (`rbm.word_gains`): once "dog" is said, the causes that it shares are explained, and other words gain. Words outside
    the RBM's vocabulary gain nothing. As free-energy differences, the gains along a caption add up to the pointwise
    mutual information of its words and the image: beam search looks for the best log P(caption | image) + beta * PMI,
    which is why the scores are not normalised again (sampling does so itself).

    Args:
        hidden_input: a (B, H) of the images; rows R of the scores must be a multiple of B, an image's rows adjacent.
        beta: weight. clip: bound on |g_k| in nats. order: see `rbm.word_gains`.
    """

    def __init__(self, parameters: RBMParameters, hidden_input, word_ids, vocab_size, beta, clip=5.0, order="exact"):
        self.parameters, self.hidden_input = parameters, hidden_input
        self.word_ids = torch.tensor(word_ids, device=hidden_input.device)
        self.columns = word_columns(word_ids, vocab_size, hidden_input.device)
        self.beta, self.clip, self.order = beta, clip, order

    def gains(self, input_ids: torch.Tensor) -> torch.Tensor:
        """g (R, K) in nats, zero for words already said."""
        p = self.parameters
        said = words_said(input_ids, self.columns, len(self.word_ids))
        explained = said @ p.U  # (R, H)
        a = self.hidden_input.repeat_interleave(input_ids.shape[0] // self.hidden_input.shape[0], 0)
        gains = word_gains(p, a + explained, self.order) - word_gains(p, p.c + explained, self.order)
        return gains.clamp(-self.clip, self.clip) * (1 - said)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        bonus = self.beta * self.gains(input_ids).to(scores.dtype)
        return scores.index_add(1, self.word_ids, bonus)


class ContextLimit(StoppingCriteria):
    """Ends every caption where the decoder's positions end, however many new tokens were asked for."""

    def __init__(self, max_position_embeddings: int):
        self.limit = max_position_embeddings

    def __call__(self, input_ids, scores, **kwargs):
        full = input_ids.shape[1] >= self.limit
        return torch.full((input_ids.shape[0],), full, dtype=torch.bool, device=input_ids.device)


def consensus(sequences: torch.Tensor, ignored: tuple[int, ...]) -> torch.Tensor:
    """(B, n) mean Jaccard similarity of each candidate's token set to those of the other candidates (B, n, T).

    The minimum-Bayes-risk choice under that similarity (Kumar & Byrne, NAACL 2004). One candidate: 0.
    """
    num_images, n, _ = sequences.shape
    if n == 1:
        return torch.zeros(num_images, 1, device=sequences.device)
    tokens, index = torch.unique(sequences, return_inverse=True)
    sets = torch.zeros(num_images, n, len(tokens), device=sequences.device).scatter_(2, index, 1.0)
    sets[..., torch.isin(tokens, torch.tensor(ignored, device=tokens.device))] = 0.0
    shared = sets @ sets.transpose(1, 2)  # (B, n, n)
    sizes = sets.sum(-1)
    jaccard = shared / (sizes[:, :, None] + sizes[:, None, :] - shared).clamp(min=1.0)
    return (jaccard.sum(-1) - jaccard.diagonal(dim1=1, dim2=2)) / (n - 1)


def rerank_scores(log_prob, length, pmi, agreement, length_penalty: float, l_pmi: float, l_consensus: float):
    """log P(caption | image) / length^alpha + l1 * PMI + l2 * consensus, all (B, n)."""
    return log_prob / length.clamp(min=1) ** length_penalty + l_pmi * pmi + l_consensus * agreement
