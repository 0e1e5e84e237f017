"""Our metrics against pycocoevalcap's, on real captions.

`captions.json`: the 5 captions of each of 250 Flickr8k validation images (Hodosh, Young & Hockenmaier, JAIR 2013; for
research), texts only. The first caption plays the candidate.
"""

import json
import shutil

import evaluate
import numpy as np
import pytest
import torch

from experiments.diversity.evaluate_diversity import HammingDiversity
from tests.conftest import REPO
from training.lib.metrics import (
    CiderD,
    bleu,
    bleu_of_statistics,
    bleu_statistics,
    corpus_diversity,
    meteor,
    paired_bootstrap,
    rouge_l,
    set_diversity,
    tokenize,
)


@pytest.fixture(scope="module")
def sets():
    captions = json.loads((REPO / "tests" / "captions.json").read_text())
    assert len(captions) >= 200
    return [entry[0] for entry in captions], [entry[1:] for entry in captions]


@pytest.fixture(scope="module")
def coco(sets):
    """The same, tokenized, as pycocoevalcap wants them."""
    joined = lambda text: " ".join(tokenize(text))
    candidates, references = sets
    return (
        {i: [joined(r) for r in rs] for i, rs in enumerate(references)},
        {i: [joined(c)] for i, c in enumerate(candidates)},
    )


def test_cider_d(sets, coco):
    from pycocoevalcap.cider.cider import Cider

    expected, each = Cider().compute_score(*coco)
    scores = CiderD(sets[1]).scores(sets[0])
    np.testing.assert_allclose(scores, each, rtol=0, atol=1e-6)
    assert scores.mean() == pytest.approx(expected, abs=1e-6) and 0.2 < expected < 2


def test_bleu(sets, coco):
    from pycocoevalcap.bleu.bleu import Bleu

    expected, each = Bleu(4).compute_score(*coco, verbose=0)
    np.testing.assert_allclose(bleu(*sets), expected, rtol=0, atol=1e-6)
    single = [bleu_of_statistics(bleu_statistics(tokenize(c), list(map(tokenize, rs)))) for c, rs in zip(*sets)]
    np.testing.assert_allclose(np.array(single).T, each, rtol=0, atol=1e-6)


def test_rouge_l(sets, coco):
    from pycocoevalcap.rouge.rouge import Rouge

    expected, each = Rouge().compute_score(*coco)
    np.testing.assert_allclose([rouge_l(c, rs) for c, rs in zip(*sets)], each, rtol=0, atol=1e-6)
    assert 0.3 < expected < 0.7


@pytest.mark.parametrize("caption", ["", "...", "dog", "a dog"])
def test_degenerate_captions_score_as_in_coco(caption, sets):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    references = sets[1][:7]
    gts = {i: [" ".join(tokenize(r)) for r in rs] for i, rs in enumerate(references)}
    res = {i: [" ".join(tokenize(caption))] for i in range(7)}
    candidates = [caption] * 7
    np.testing.assert_allclose(CiderD(references).scores(candidates), Cider().compute_score(gts, res)[1], atol=1e-6)
    np.testing.assert_allclose(bleu(candidates, references), Bleu(4).compute_score(gts, res, verbose=0)[0], atol=1e-6)
    ours = [rouge_l(caption, rs) for rs in references]
    np.testing.assert_allclose(ours, Rouge().compute_score(gts, res)[1], atol=1e-6)


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("A dog's ball, isn't it?", "a dog 's ball is n't it"),
        ('The man in a T-shirt says "hello" .', "the man in a t-shirt says hello"),
        ("A 4-wheeler at 10:30 -- the 2nd U.S. race...", "a 4-wheeler at 10:30 the 2nd u.s. race"),
        ("three dogs (brown) play", "three dogs -lrb- brown -rrb- play"),
    ],
)
def test_tokens(caption, tokens):
    assert tokenize(caption) == tokens.split()


def test_evaluate_modules(sets):
    for file, name, expected in (
        ("cider_d.py", "cider_d", CiderD(sets[1]).scores(sets[0]).mean()),
        ("rouge_l.py", "rouge_l", np.mean([rouge_l(c, rs) for c, rs in zip(*sets)])),
        ("bleu.py", "bleu_4", bleu(*sets)[3]),
    ):
        metric = evaluate.load(str(REPO / "training" / "metrics" / file))
        assert metric.compute(predictions=sets[0], references=sets[1])[name] == pytest.approx(expected)
    metric = evaluate.load(str(REPO / "training" / "metrics" / "diversity.py"))
    assert metric.compute(predictions=sets[0])["vocabulary"] == corpus_diversity(sets[0])["vocabulary"]


def test_meteor_is_left_out_without_java(sets, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert meteor(*sets) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR is a Java program")
def test_meteor(sets):
    of_corpus, each = meteor(*sets)
    assert 0.15 < of_corpus < 0.4 and each.shape == (len(sets[0]),)
    assert meteor(["a dog runs on grass"], [["a dog runs on grass"]])[0] == pytest.approx(1.0)


def test_diverse_beams_lose_what_others_say_at_the_same_place():
    """Two images, three captions side by side: each is told off for the tokens of those before it, and of its own image
    alone."""
    scores = torch.tensor([[4.0, 3.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 5.0, 1.0]] * 3)
    chosen = lambda penalty: HammingDiversity(3, penalty)(None, scores).argmax(-1).tolist()
    assert chosen(0.0) == [0, 0, 0, 2, 2, 2]
    assert chosen(1.5) == [0, 1, 0, 2, 2, 2]  # 4 - 1.5 < 3, then both are said once; 5 - 3 > 1
    assert chosen(9.0) == [0, 1, 2, 2, 3, 0]
    first = HammingDiversity(3, 9.0)(None, scores)[0]
    torch.testing.assert_close(first, scores[0].log_softmax(-1))


def test_diversity_by_hand():
    result = corpus_diversity(["a dog runs", "a dog sits", "a dog runs ."], ["A dog runs."])
    assert result["vocabulary"] == 4 and result["mean_length"] == 3 and result["unique"] == pytest.approx(2 / 3)
    assert result["distinct_1"] == pytest.approx(4 / 9) and result["distinct_2"] == pytest.approx(3 / 6)
    assert result["novel"] == pytest.approx(1 / 3)
    within = set_diversity([["a dog runs fast now", "a dog runs fast now"], ["a b c d", "e f g h"]])
    assert within["div_1"] == pytest.approx((5 / 10 + 8 / 8) / 2)
    assert within["div_2"] == pytest.approx((4 / 10 + 6 / 8) / 2)
    assert within["mbleu_4"] == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="at least 2"):
        set_diversity([["one"]])


def test_bootstrap_interval_covers_the_truth():
    """Of 200 paired samples with a true difference of 0.3, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        baseline = rng.normal(size=101)
        ours = baseline + rng.normal(0.3, 1.0, size=101)
        result = paired_bootstrap(ours, baseline, resamples=500, seed=trial)
        covered += result["low"] <= 0.3 <= result["high"]
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_of_corpus_bleu_and_of_nothing(sets):
    rows = np.array([bleu_statistics(tokenize(c), list(map(tokenize, rs))) for c, rs in zip(*sets)])
    bleu_4 = lambda mean: bleu_of_statistics(mean)[..., 3]
    result = paired_bootstrap(rows, rows, bleu_4, resamples=200)
    assert result == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(rows, rows[:-1])
