"""What stands between the decoder's scores and the choice of a token: guide, sampling, and a record of log P.

They work on whole tensors and read no number on the host, so that a GPU is never waited for while a caption is written
(tests/modeling_blip_rbm/test_accelerator.py).

Axes: B images, n beams of an image, R rows (images * beams), C candidates, T tokens, m tokens chosen of an image, K words of the RBM, H hidden
units.
"""

from typing import Optional

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .rbm import RBMParameters, gain_moments, own_precision, word_gains


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
    """Guide: adds beta * clip(g_k) to the score of every word k not yet said.

    g_k is how much more the free energy falls by saying k of this image than by saying it of the average image (`rbm.word_gains`): once
    "dog" is said, the causes that it shares are explained, and other words gain. Words outside the RBM's vocabulary gain nothing. As
    free-energy differences, the gains along a caption add up to the pointwise mutual information of its words and the image: beam search
    looks for the best log P(caption | image) + beta * PMI, which is why the scores are not normalised again (sampling does so itself).

    Args:
        parameters: of the RBM. hidden_input: a (B, H) of the images; rows R of the scores must be a multiple of B, an image's rows
            adjacent. word_ids: token ids (K,) of the RBM's words.
        beta: weight, or of each word one of its own (K,). clip: bound on |g_k| in nats. order: see `rbm.word_gains`.
        causes: h (B, H), sampled hidden causes that these captions shall be about: word k gains diversity * U_k'(h - q), its
            log-odds given h less those given the mean, q = P(h | x).
        diversity: weight of the causes.
        product: what multiplies `rbm.gain_moments` with `rbm.gain_weights` of this order, where that is faster; None: `rbm.word_gains`.
    """

    def __init__(
        self,
        parameters: RBMParameters,
        hidden_input,
        word_ids,
        vocab_size,
        beta,
        clip=5.0,
        order="exact",
        causes=None,
        diversity=0.0,
        product=None,
    ):
        self.parameters, self.hidden_input, self.product = parameters, hidden_input, product
        self.shift = None
        if causes is not None:
            shift = (causes - torch.sigmoid(hidden_input)) @ parameters.U.T  # (B, K)
            self.shift = diversity * shift.clamp(-clip, clip)
        self.word_ids = torch.tensor(word_ids, device=hidden_input.device)
        self.columns = word_columns(word_ids, vocab_size, hidden_input.device)
        self.beta, self.clip, self.order = beta, clip, order

    def gains(self, said: torch.Tensor) -> torch.Tensor:
        """g (R, K) in nats of the words after those said (R, K), zero for these."""
        p, explained = self.parameters, said @ self.parameters.U
        a = self.hidden_input.repeat_interleave(len(said) // len(self.hidden_input), 0) + explained
        than = p.c + explained
        if self.product is None:
            gains = word_gains(p, a, self.order, than)
        else:
            gains = self.product(gain_moments(a, self.order, than))
        return gains.clamp(-self.clip, self.clip) * (1 - said)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        said = words_said(input_ids, self.columns, len(self.word_ids))
        with own_precision(scores):
            bonus = 0.0 if self.beta is None else self.beta * self.gains(said)
        if self.shift is not None:
            bonus = bonus + self.shift.repeat_interleave(len(said) // len(self.shift), 0) * (1 - said)
        return scores.index_add(1, self.word_ids, bonus.to(scores.dtype))


class InverseTransformSampling(LogitsProcessor):
    """Leaves of the scores (R, vocabulary) one token in each row, drawn from their softmax, so that greedy decoding samples.

    It draws one number a row, where `torch.multinomial` draws one for every token: on a CPU 160 rows of BLIP's 30,522 take a fiftieth of the
    time, which had been a third of all of it.

    Args:
        kept: a list to which the scores of every step are appended, or None.
    """

    def __init__(self, kept: Optional[list] = None):
        self.kept, self.nothing = kept, None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.kept is not None:
            self.kept.append(scores)
        cumulative = scores.softmax(-1).cumsum(-1)
        nothing = cumulative[:, -1].isnan().any()
        self.nothing = nothing if self.nothing is None else self.nothing | nothing
        # in (0, 1]: the first token up to which there is as much is never one of probability 0
        drawn = (1 - torch.rand(len(scores), 1, device=scores.device)) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn).clamp(max=scores.shape[-1] - 1)  # of NaN it is none at all
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)

    def check(self):
        """Once, at the end, as a GPU has to be waited for. Raises ValueError if there were scores that are no numbers, or a row without a
        token that is left."""
        if self.nothing is not None and self.nothing:
            raise ValueError(
                "there is nothing to sample from: the next token's scores have NaN, or rule out every token. Look at the model's weights, "
                "and at what the logits processors leave"
            )


class ChosenLogProb(LogitsProcessor):
    """log P of the tokens that decoding chooses, of one step's scores at a time: the logits of 20 steps, of 64 images with 9 beams, are
    1.4 GB. As the first logits processor it sees what the decoder gave; `chosen`, a stopping criterion that never stops, sees the tokens
    that were taken of it.

    Args:
        beams: rows of an image that compete for its tokens.
    """

    def __init__(self, beams: int):
        self.beams, self.scores, self.tokens, self.log_probs = beams, None, [], []

    @staticmethod
    def first(processors) -> LogitsProcessorList:
        return LogitsProcessorList(sorted(processors, key=lambda one: not isinstance(one, ChosenLogProb)))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.scores = scores.log_softmax(-1)  # a copy: processors after this one may write into theirs
        return scores

    def chosen(self, sequences: torch.LongTensor, scores=None, **kwargs) -> torch.BoolTensor:
        rows = self.scores.unflatten(0, (-1, self.beams))  # (B, n, vocabulary)
        # the m best of an image, each as if after any of its beams
        tokens = sequences[:, -1].view(len(rows), 1, -1).expand(-1, self.beams, -1)
        self.tokens.append(tokens.flatten(0, 1))
        self.log_probs.append(rows.gather(2, tokens).flatten(0, 1))  # (R, m)
        self.scores = None
        return torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)

    def of(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """log P (C, T) of new tokens (C, T), each taken in that row (C, T) of its step; anything for tokens that were not."""
        steps = torch.arange(tokens.shape[1], device=rows.device)
        taken, log_probs = (torch.stack(part[: len(steps)])[steps, rows] for part in (self.tokens, self.log_probs))
        place = (taken == tokens[..., None]).int().argmax(-1, keepdim=True)
        return log_probs.gather(-1, place)[..., 0]
