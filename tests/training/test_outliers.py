"""Unlike images: how they are made, and the scores that should tell them apart."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from modeling_blip_rbm.rbm import relative_free_energy
from tests.conftest import random_image
from training.lib.outliers import TrainingImages, all_scores, aucs, means, model_scores
from training.lib.unlike_images import made_images, spoiled_images


def test_auc_is_that_of_scikit_learn_and_differences_are_paired():
    rng = np.random.default_rng(3)
    ours, other = rng.integers(0, 7, (2, 53)).astype(float)  # with ties
    inside = {"ours": ours, "same": 10 * ours, "other": other}
    outside = {}
    for kind, shift in (("near", 1), ("far", 3)):
        theirs = rng.integers(0, 7, 31) + shift
        outside[kind] = {"ours": theirs, "same": 10 * theirs, "other": rng.integers(0, 7, 31)}
    found = aucs(inside, outside)
    for score, of_kinds in found.items():
        for kind, entry in of_kinds.items():
            values = np.r_[inside[score], outside[kind][score]]
            expected = roc_auc_score(np.r_[np.zeros(53), np.ones(31)], values)
            assert entry["auc"] == pytest.approx(expected) and entry["low"] < expected < entry["high"]
    mean = means(inside, outside, "ours")
    expected = {score: np.mean([entry["auc"] for entry in of.values()]) for score, of in found.items()}
    assert {score: entry["auc"] for score, entry in mean["auc"].items()} == pytest.approx(expected)
    same, other = mean["difference"]["same"], mean["difference"]["other"]
    assert list(same.values()) == pytest.approx([0, 0, 0])  # the same images are drawn for both
    assert other["difference"] == pytest.approx(expected["other"] - expected["ours"]) and other["high"] < 0


def test_the_interval_of_a_mean_knows_that_spoiled_photographs_belong_together():
    rng = np.random.default_rng(5)
    inside, theirs, more = rng.normal(size=997), rng.normal(size=59), rng.normal(size=59)
    widths = []
    for second in (theirs, more):  # the same photographs again, and others
        mean = means({"a": inside}, {"x": {"a": theirs}, "y": {"a": second}}, "a")["auc"]["a"]
        widths.append(mean["high"] - mean["low"])
    assert widths[0] > 1.2 * widths[1]


def test_distances_to_training_images():
    rng = np.random.default_rng(7)
    pooled = rng.normal(size=(1009, 3)) * [10, 1, 1] + [0, 0, 50]
    training = TrainingImages(pooled)
    mean = pooled.mean(0)
    rows = np.stack([mean, mean + [5, 0, 0], mean + [0, 5, 0]])
    distance = training.distance(rows)
    assert distance == pytest.approx([0, 0.5, 5], rel=0.1, abs=1e-6)
    cosine = training.distance_to_nearest(np.stack([3 * pooled[11], -pooled[11]]))
    assert cosine[0] == pytest.approx(0, abs=1e-9) and cosine[1] > 1


@torch.no_grad()
def test_scores_of_a_model(model, pixel_values):
    tokens = model.vision_hidden_states(pixel_values)
    encoding = model.encode_image(vision_hidden_states=tokens)
    seen = {name: value.numpy() for name, value in model_scores(model, tokens, encoding.hidden_input).items()}
    seen["evidence"] = np.stack([np.linspace(-3, -1, 5), np.zeros(5)], 1)
    model.config.rbm_confidence = [0.0, 1.0, 0.0]
    training = TrainingImages(np.random.default_rng(0).normal(size=(17, seen["pooled"].shape[1])))
    scores = all_scores(seen, training, model.confidence)
    relative = relative_free_energy(model.rbm_parameters(), encoding.hidden_input)
    assert scores["relative free energy"] == pytest.approx(relative.numpy())
    assert scores["free energy"] == pytest.approx(model.image_free_energy(pixel_values).numpy())
    for name in ("log P of the caption", "confidence"):  # the surer, the less unlike
        assert (np.diff(scores[name]) < 0).all()
    assert {value.shape for value in scores.values()} == {(5,)} and "pooled" not in scores


def test_made_images_are_the_same_for_a_seed():
    first, again, other = (made_images(2, seed, size=61) for seed in (3, 3, 5))
    assert list(first) == ["noise", "textures", "text pages", "medical", "drawings"]
    for kind, images in first.items():
        assert [image.size for image in images] == [(61, 61)] * 2
        assert images[0].tobytes() == again[kind][0].tobytes() != images[1].tobytes() != other[kind][1].tobytes()


def test_spoiled_photographs():
    photograph = Image.fromarray(np.array(random_image(seed=1).resize((131, 67))))
    spoiled = {kind: images[0] for kind, images in spoiled_images([photograph], seed=3).items()}
    pixels = {kind: np.array(image).astype(int) for kind, image in spoiled.items()}
    original = np.array(photograph).astype(int)
    assert (pixels["upside down"][::-1, ::-1] == original).all() and (
        pixels["inverted colours"] == 255 - original
    ).all()
    patches = pixels["shuffled patches"]
    assert patches.shape == (64, 128, 3) and np.abs(patches - original[:64, :128]).mean() > 5
    assert (np.sort(patches, axis=None) == np.sort(original[:64, :128], axis=None)).all()
    for kind, image in spoiled.items():
        if kind != "shuffled patches":
            assert image.size == photograph.size and np.abs(pixels[kind] - original).mean() > 5, kind
    assert len(np.unique(pixels["pixelated"].reshape(-1, 3), axis=0)) <= 16 * 31
    assert (pixels["edges only"].std(-1) == 0).all()
    assert np.abs(np.diff(pixels["blurred"], axis=1)).mean() < 0.5 * np.abs(np.diff(original, axis=1)).mean()
