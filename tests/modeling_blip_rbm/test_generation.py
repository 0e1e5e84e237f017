"""Guide and re-rank against their plain definitions."""

import itertools

import pytest
import torch

from modeling_blip_rbm import DecodingSettings
from modeling_blip_rbm.generation_blip_rbm import (
    InverseTransformSampling,
    RBMGuidance,
    caption_similarity,
    consensus,
    rerank_scores,
    word_columns,
    words_said,
)
from modeling_blip_rbm.inference_blip_rbm import packed_product
from modeling_blip_rbm.rbm import (
    RBMParameters,
    free_energy,
    gain_weights,
    hidden_input,
    pointwise_mutual_information,
    prob_w_given_h,
)
from tests.conftest import WORD_IDS


V, K, H, VOCAB = 3, len(WORD_IDS), 7, 47


@pytest.fixture
def params():
    return RBMParameters(
        c=torch.randn(H), U=torch.randn(K, H), b=torch.randn(K), W=torch.randn(V, H), mu=torch.randn(V)
    )


def test_words_said():
    sequences = torch.tensor([[44, WORD_IDS[2], 5, WORD_IDS[0], WORD_IDS[2]], [44, 5, 6, 3, 0]])
    said = words_said(sequences, word_columns(WORD_IDS, VOCAB), K)
    assert said.nonzero().tolist() == [[0, 0], [0, 2]] and said.max() == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_guidance_is_the_brute_force_free_energy_difference(params, beams):
    """For every word of the vocabulary: F without it minus F with it, for this image minus for the average image."""
    x, beta, clip = torch.randn(2, V), 0.7, 1.0
    rows = torch.tensor([[44, 5, WORD_IDS[i % K], 6, WORD_IDS[(3 * i) % K]] for i in range(2 * beams)])
    scores = torch.randn(2 * beams, VOCAB).log_softmax(-1)
    guidance = RBMGuidance(params, hidden_input(params, x), WORD_IDS, VOCAB, beta, clip, order="exact")
    expected = scores.clone()
    clipped = False
    for row, k in itertools.product(range(2 * beams), range(K)):
        w = torch.zeros(1, K)
        w[0, [j for j, token in enumerate(WORD_IDS) if token in rows[row]]] = 1.0
        if w[0, k]:
            continue  # said already: no gain
        more = w.clone()
        more[0, k] = 1.0
        image, average = x[row // beams][None], torch.zeros(1, V)
        gain = (free_energy(params, image, w) - free_energy(params, image, more)) - (
            free_energy(params, average, w) - free_energy(params, average, more)
        )
        clipped |= gain.abs().item() > clip
        expected[row, WORD_IDS[k]] += beta * gain.clamp(-clip, clip).item()
    before = scores.clone()
    torch.testing.assert_close(guidance(rows, scores), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores, before) and clipped


def test_said_words_change_the_gains_of_others(params):
    guidance = RBMGuidance(params, hidden_input(params, torch.randn(1, V)), WORD_IDS, VOCAB, 1.0)
    none, dog = guidance.gains(torch.zeros(1, K)), guidance.gains(torch.eye(K)[:1])
    assert dog[0, 0] == 0 and (none[0, 1:] != dog[0, 1:]).all()


def test_gains_along_a_caption_add_up_to_its_mutual_information(params):
    """What beam search then maximises is log P + beta * PMI of the whole caption."""
    x = torch.randn(1, V)
    guidance = RBMGuidance(params, hidden_input(params, x), WORD_IDS, VOCAB, 1.0, clip=1e9, order="exact")
    caption = [44, 5, WORD_IDS[3], 6, WORD_IDS[0], WORD_IDS[3], WORD_IDS[7]]
    scores = torch.zeros(1, VOCAB)
    total = sum(guidance(torch.tensor([caption[:t]]), scores)[0, caption[t]] for t in range(1, len(caption)))
    w = words_said(torch.tensor([caption]), word_columns(WORD_IDS, VOCAB), K)
    expected = pointwise_mutual_information(params, hidden_input(params, x), w)
    torch.testing.assert_close(total, expected[0], atol=1e-4, rtol=1e-4)


def test_no_guidance_for_the_average_image(params):
    guidance = RBMGuidance(params, params.c[None], WORD_IDS, VOCAB, 1.0)
    scores = torch.randn(1, VOCAB).log_softmax(-1)
    torch.testing.assert_close(guidance(torch.tensor([[44, 5]]), scores), scores)


SEQUENCES = torch.tensor([[[44, 5, 7, 9, 3, 0], [44, 5, 7, 11, 5, 3], [44, 6, 13, 3, 0, 0]]])
WORDS = [[5, 7, 9], [5, 7, 11, 5], [6, 13]]


def pairs(value):
    return torch.tensor([[[value(a, b) for b in WORDS] for a in WORDS]], dtype=torch.float32)


def test_similarities_of_token_sets():
    at = lambda kind: caption_similarity(SEQUENCES, kind, ignored=(0, 3, 44))
    shared = lambda a, b: len({*a} & {*b})
    torch.testing.assert_close(at("jaccard"), pairs(lambda a, b: shared(a, b) / len({*a} | {*b})))
    torch.testing.assert_close(at("overlap"), pairs(lambda a, b: shared(a, b) / min(len({*a}), len({*b}))))
    with pytest.raises(ValueError, match="'euclid'; allowed are 'jaccard', 'overlap'"):
        at("euclid")


@pytest.mark.parametrize("order", ["first", "second"])
def test_guide_with_a_product_of_its_own_gives_the_same_gains(params, order):
    a, said = hidden_input(params, torch.randn(2, V)), torch.randint(2, (4, K)).float()
    ways = (packed_product(gain_weights(params.U, order)), None)
    fast, plain = (
        RBMGuidance(params, a, WORD_IDS, VOCAB, 1.0, clip=2.0, order=order, product=way).gains(said) for way in ways
    )
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


def test_consensus_is_the_mean_similarity_to_the_others():
    similarity = caption_similarity(SEQUENCES, "jaccard", ignored=(0, 3, 44))
    expected = [similarity[0, i, [j for j in range(3) if j != i]].mean() for i in range(3)]
    torch.testing.assert_close(consensus(similarity)[0], torch.stack(expected))
    assert consensus(similarity[:, :1, :1]).tolist() == [[0.0]]


def test_rerank_scores():
    parts = {
        name: torch.tensor([[v]]) for name, v in zip(("log_prob", "length", "pmi", "overlap"), (-6.0, 4.0, 2.0, 0.5))
    }
    names = ("length_penalty", "pmi", "consensus", "cider", "rarity", "similarity")
    settings = dict(zip([f"rbm_rerank_{name}" for name in names], (0.5, 0.1, 3.0, 0.0, 0.0, "overlap")))
    rerank_scores_of = lambda parts, settings: rerank_scores(parts, DecodingSettings(**settings))
    assert rerank_scores_of(parts, settings).item() == pytest.approx(-6 / 2 + 0.1 * 2 + 3 * 0.5)
    with_cider = rerank_scores_of(parts | {"cider": torch.tensor([[0.7]])}, settings | {"rbm_rerank_cider": 4.0})
    assert with_cider.item() == pytest.approx(-6 / 2 + 0.1 * 2 + 3 * 0.5 + 4 * 0.7)
    with_rarity = rerank_scores_of(parts | {"rarity": torch.tensor([[1.3]])}, settings | {"rbm_rerank_rarity": 2.0})
    assert with_rarity.item() == pytest.approx(-6 / 2 + 0.1 * 2 + 3 * 0.5 + 2 * 1.3)


def test_causes_shift_the_words_that_they_favour(params):
    """The shift is the log-odds of P(w | h) less those at the mean causes."""
    a = hidden_input(params, torch.randn(2, V))
    causes = torch.rand(2, H).round()
    guide = RBMGuidance(params, a, WORD_IDS, VOCAB, beta=0.0, clip=1e9, causes=causes, diversity=0.7)
    ids = torch.tensor([[44, WORD_IDS[1]], [44, 1], [44, 2], [44, 3]])  # two rows an image; one has said word 1
    bonus = guide(ids, torch.zeros(4, VOCAB))
    log_odds = lambda h: torch.logit(prob_w_given_h(params, h))
    expected = 0.7 * (log_odds(causes) - log_odds(torch.sigmoid(a))).repeat_interleave(2, 0)
    expected[0, 1] = 0.0
    torch.testing.assert_close(bonus[:, WORD_IDS], expected, atol=1e-4, rtol=1e-3)


def test_inverse_transform_sampling_draws_from_the_softmax():
    """In every row one token is left, as often as its probability, and never one that was ruled out, at either end or between."""
    inf = float("inf")
    scores = torch.tensor([[-inf, 0.0, 1.0, -inf, -1.0, 0.5, -inf], [2.0, 0.0, -inf, 0.0, 1.0, 0.0, 3.0]])
    draws = 20_000
    left = InverseTransformSampling()(None, scores.repeat_interleave(draws, 0))
    assert torch.equal(left.exp().sum(-1), torch.ones(2 * draws))
    share = left.exp().view(2, draws, -1).mean(1)
    torch.testing.assert_close(share, scores.softmax(-1), atol=0.012, rtol=0)
    assert (share[scores == -inf] == 0).all()


@pytest.mark.parametrize("drawn, token", [(0.0, 2), (1 - 2**-24, 1)])
def test_inverse_transform_sampling_at_the_ends_of_what_torch_rand_gives(drawn, token, monkeypatch):
    scores = torch.tensor([[-float("inf"), 0.0, 0.0, -float("inf")]])
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.full(shape, drawn))
    assert InverseTransformSampling()(None, scores).argmax(-1).item() == token


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_inverse_transform_sampling_of_nothing(bad):
    scores = torch.zeros(3, 5)
    scores[1] = bad
    sampling = InverseTransformSampling()
    for step in (torch.zeros(3, 5), scores, torch.zeros(3, 5)):
        assert sampling(None, step).shape == (3, 5)
    with pytest.raises(ValueError, match="nothing to sample from"):
        sampling.check()
