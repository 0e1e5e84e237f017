"""Where the RBM touches the words: guide (while a caption is written) and re-rank (when candidates are finished).

Axes: R rows (images * beams), T tokens, K words of the RBM, H hidden units, B images, n candidates of an image.
"""

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, StoppingCriteria

from .rbm import RBMParameters, gain_moments, word_gains


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
        beta: weight, or of each word one of its own (K,). clip: bound on |g_k| in nats. order: see `rbm.word_gains`.
        causes: h (B, H), sampled hidden causes that these captions shall be about: word k gains diversity * U_k'(h - q), its
            log-odds given h less those given the mean, q = P(h | x).
        diversity: weight of the causes.
        product: what multiplies `rbm.gain_moments` with `rbm.gain_weights` of this order (`linear_blip_rbm.product_with`), where that is
            faster; None: `rbm.word_gains`.
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
        self.beta, self.clip, self.order = torch.as_tensor(beta, device=hidden_input.device), clip, order
        self.guided = bool(self.beta.any())
        self.kept = {}  # (image, columns of the words said): their gains (K,)

    def gains(self, input_ids: torch.Tensor) -> torch.Tensor:
        """g (R, K) in nats of the words after the tokens (R, T), zero for words already said.

        They depend on the image and on the set of words said. So a row that adds none, or the same as another, is not computed again: of
        what `generate` asks for, step by step, about half."""
        rows_of_image, words = len(input_ids) // len(self.hidden_input), len(self.word_ids)
        keys = [
            (row // rows_of_image, frozenset(column for column in columns if column < words))
            for row, columns in enumerate(self.columns[input_ids].tolist())
        ]
        if new := list(dict.fromkeys(key for key in keys if key not in self.kept)):
            self.kept.update(zip(new, self._gains(*zip(*new))))
        self.kept = {key: self.kept[key] for key in keys}  # of this step alone
        return torch.stack([self.kept[key] for key in keys])

    def _gains(self, images: tuple[int, ...], said: tuple[frozenset[int], ...]) -> torch.Tensor:
        """(n, K) for n images and the columns of the words said of each."""
        device, p = self.hidden_input.device, self.parameters
        number = torch.tensor([len(words) for words in said], device=device)
        columns = torch.tensor([column for words in said for column in words], dtype=torch.long, device=device)
        explained = F.embedding_bag(columns, p.U, number.cumsum(0) - number, mode="sum")  # U'w
        a, than = self.hidden_input[list(images)] + explained, p.c + explained
        if self.product is None:
            gains = word_gains(p, a, self.order, than)
        else:
            gains = self.product(gain_moments(a, self.order, than))
        gains = gains.clamp_(-self.clip, self.clip)
        gains[torch.repeat_interleave(number), columns] = 0.0
        return gains

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        bonus = self.beta * self.gains(input_ids) if self.guided else 0.0
        if self.shift is not None:
            said = words_said(input_ids, self.columns, len(self.word_ids))
            bonus = bonus + self.shift.repeat_interleave(len(input_ids) // len(self.shift), 0) * (1 - said)
        return scores.index_add(1, self.word_ids, bonus.to(scores.dtype))


class InverseTransformSampling(LogitsProcessor):
    """Leaves of the scores (R, vocabulary) one token in each row, drawn from their softmax, so that greedy decoding samples.

    It draws one number a row, where `torch.multinomial` on a CPU draws one for every token: 160 rows of BLIP's 30,522 take a fiftieth of the
    time, which had been a third of all of it (docs/experiments.md).

    Raises:
        ValueError: if there are scores that are no numbers, or a row without a token that is left.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        cumulative = scores.softmax(-1).cumsum(-1)
        if cumulative[:, -1].isnan().any():
            raise ValueError(
                "there is nothing to sample from: the next token's scores have NaN, or rule out every token. Look at the model's weights, "
                "and at what the logits processors leave"
            )
        # in (0, 1]: the first token up to which there is as much is never one of probability 0
        drawn = (1 - torch.rand(len(scores), 1, device=scores.device)) * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, drawn)
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


class ContextLimit(StoppingCriteria):
    """Ends every caption where the decoder's positions end, however many new tokens were asked for."""

    def __init__(self, max_position_embeddings: int):
        self.limit = max_position_embeddings

    def __call__(self, input_ids, scores, **kwargs):
        full = input_ids.shape[1] >= self.limit
        return torch.full((input_ids.shape[0],), full, dtype=torch.bool, device=input_ids.device)


ORDERS = (1, 2, 3, 4)  # of n-grams, as CIDEr counts them
SIMILARITIES = ("jaccard", "overlap", "cosine", "ngram", "hidden_js", "hidden_kl")


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


def ngram_counts(sequences: torch.Tensor, n: int, ignored: tuple[int, ...]) -> torch.Tensor:
    """(B, m, G) how often each n-gram of an image's m captions (B, m, T) stands in each; none over an ignored token.

    G is the number of different n-grams in the batch.
    """
    number, kept = ngram_numbers(sequences, n, ignored, base=int(sequences.max()) + 2)
    ngrams, index = torch.unique(number, return_inverse=True)
    counts = torch.zeros(*sequences.shape[:2], len(ngrams), device=sequences.device)
    return counts.scatter_add_(2, index, kept.to(counts.dtype))


def caption_similarity(sequences, kind: str, ignored: tuple[int, ...], q=None) -> torch.Tensor:
    """(B, m, m) similarity of an image's m captions (B, m, T) to one another.

    Args:
        kind: of their sets of tokens, "jaccard" (shared / all), "overlap" (shared / those of the shorter; Szymkiewicz 1934)
            or "cosine"; "ngram": the mean over n = 1..4 of the cosine of clipped n-gram counts (CIDEr-D, Vedantam et al.
            2015, without idf); of the RBM's posteriors over hidden causes, "hidden_js" and "hidden_kl": 1 - Jensen-Shannon
            divergence and exp(-KL) of the independent units' distributions, mean over units.
        q (B, m, H): P(h = 1 | x, caption), for the last two.
    """
    if kind == "ngram":
        total = 0.0
        for n in ORDERS[: sequences.shape[-1]]:
            counts = ngram_counts(sequences, n, ignored)
            norm = counts.norm(dim=-1).clamp(min=1e-6)
            clipped = torch.stack([(torch.minimum(c[:, None], c[None]) * c[None]).sum(-1) for c in counts])
            total = total + clipped / (norm[:, :, None] * norm[:, None])
        return total / len(ORDERS)
    if kind in ("hidden_js", "hidden_kl"):
        p = q.clamp(1e-6, 1 - 1e-6)
        entropy = lambda r: -(r * r.log() + (1 - r) * (1 - r).log())
        if kind == "hidden_js":
            mixed = 0.5 * (p[:, :, None] + p[:, None])
            divergence = entropy(mixed) - 0.5 * (entropy(p)[:, :, None] + entropy(p)[:, None])
            return 1 - (divergence / torch.log(torch.tensor(2.0))).mean(-1)
        cross = -(p[:, :, None] * p.log()[:, None] + (1 - p[:, :, None]) * (1 - p).log()[:, None])
        return torch.exp(-(cross - entropy(p)[:, :, None]).mean(-1))
    sets = (ngram_counts(sequences, 1, ignored) > 0).float()
    shared = sets @ sets.transpose(1, 2)
    sizes = sets.sum(-1)
    a, b = sizes[:, :, None], sizes[:, None, :]
    whole = {"jaccard": a + b - shared, "overlap": torch.minimum(a, b), "cosine": (a * b).sqrt()}
    if kind not in whole:
        raise ValueError(f"similarity is {kind!r}; allowed are {', '.join(map(repr, SIMILARITIES))}")
    return shared / whole[kind].clamp(min=1.0)


def consensus(similarity: torch.Tensor) -> torch.Tensor:
    """(B, n) mean similarity (B, n, n) of each candidate to the others: the minimum-Bayes-risk choice under that similarity
    (Kumar & Byrne, NAACL 2004). One candidate: 0."""
    n = similarity.shape[-1]
    return (similarity.sum(-1) - similarity.diagonal(dim1=1, dim2=2)) / max(n - 1, 1)


def rerank_scores(parts: dict, settings: dict) -> torch.Tensor:
    """(B, n) log P(caption | image) / length^alpha + l1 * PMI + l2 * consensus + l3 * expected CIDEr-D + l4 * rarity.

    Args:
        parts: of `candidate_parts`, (B, n) each; those whose weight is 0 may be left out.
        settings: `rbm_rerank_length_penalty` alpha, `rbm_rerank_pmi` l1, `rbm_rerank_consensus` l2 with its `rbm_rerank_similarity`,
            `rbm_rerank_cider` l3 and `rbm_rerank_rarity` l4, as in the config.
    """
    score = parts["log_prob"] / parts["length"].clamp(min=1) ** settings["rbm_rerank_length_penalty"]
    weights = {
        "pmi": settings["rbm_rerank_pmi"],
        settings["rbm_rerank_similarity"]: settings["rbm_rerank_consensus"],
        "cider": settings["rbm_rerank_cider"],
        "rarity": settings["rbm_rerank_rarity"],
    }
    for name, weight in weights.items():
        if weight:
            score = score + weight * parts[name]
    return score
