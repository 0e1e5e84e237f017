"""Cached outputs of a vision tower: right, reused, whole or not there."""

import collections
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import BlipImageProcessor, Dinov2Model, EfficientNetConfig, EfficientNetModel

from modeling_blip_rbm.modeling_blip_rbm import folded_tower, image_tokens, pool_tokens, vision_tokens
from tests.conftest import random_image
from training.lib import features as features_module
from training.lib.arguments import DataArguments
from training.lib.data import image_view
from training.lib.features import cache_features, load_features
from training.lib.pairs import load_pairs


def test_views():
    image = random_image(37, 29)
    assert image_view(image, 0, 5) is image
    assert image_view(image, 1, 5).getpixel((0, 0)) == image.getpixel((36, 0))
    crop = image_view(image, 2, 5)
    assert crop.size[0] < 37 and crop.size[1] < 29
    assert crop.tobytes() == image_view(image, 2, 5).tobytes() != image_view(image, 3, 5).tobytes()


def test_feature_cache_is_the_towers_output_and_is_reused(pairs, towers, tmp_path, monkeypatch):
    tower = Dinov2Model.from_pretrained(towers / "vision").eval()
    image_processor = BlipImageProcessor.from_pretrained(towers / "vision")
    dataset = load_pairs(pairs, "train")
    store = cache_features(tower, image_processor, dataset, tmp_path, views=2, batch_size=6)
    assert store.shape == (24, 2, 17, 22) and store.batch(range(24)).std(0).mean() > 0.01
    for row in (0, 23):
        image = dataset[row]["image"]
        pixel_values = image_processor(
            [image, image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)], return_tensors="pt"
        )
        with torch.no_grad():
            expected = vision_tokens(tower(**pixel_values))
        torch.testing.assert_close(torch.from_numpy(np.array(store[row])).float(), expected, atol=2e-3, rtol=2e-3)

    def fail(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(features_module.FeatureWriter, "write", fail)
    cache_features(tower, image_processor, dataset, tmp_path, views=2)
    with pytest.raises(AssertionError, match="encoded again"):  # other weights: another entry
        with torch.no_grad():
            next(tower.parameters()).mul_(1.5)
        cache_features(tower, image_processor, dataset, tmp_path, views=2)


@pytest.fixture
def tower(towers):
    return Dinov2Model.from_pretrained(towers / "vision").eval(), BlipImageProcessor.from_pretrained(towers / "vision")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(features_module, "SHARD_ROWS", 7)


def everything(store):
    return np.stack([store[row] for row in range(len(store))])


def test_interrupted_encoding_goes_on(pairs, tower, tmp_path, monkeypatch, small_shards):
    dataset = load_pairs(pairs, "train")
    expected = everything(cache_features(*tower, dataset, tmp_path / "a", batch_size=1))
    calls = []

    def stop_after_ten(*args):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return image_tokens(*args)

    monkeypatch.setattr(features_module, "image_tokens", stop_after_ten)
    with pytest.raises(KeyboardInterrupt):
        cache_features(*tower, dataset, tmp_path / "b", batch_size=1)
    assert len(list((tmp_path / "b").glob("*/0*.npy"))) == 1  # whole shards only
    again = everything(cache_features(*tower, dataset, tmp_path / "b", batch_size=1))
    np.testing.assert_array_equal(again, expected)
    assert len(calls) < 10 + 24  # the first seven images were not encoded again


@pytest.mark.parametrize("damage", ["lost", "changed", "cut"])
def test_a_damaged_shard_is_encoded_again(pairs, tower, tmp_path, small_shards, damage, capsys):
    dataset = load_pairs(pairs, "train")
    store = cache_features(*tower, dataset, tmp_path, views=2)
    expected, file = everything(store), store.folder / "00001.npy"
    content = bytearray(file.read_bytes())
    if damage == "lost":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-9])
    else:
        content[-9] ^= 1
        file.write_bytes(content)
    others = {f.name: f.stat().st_mtime_ns for f in store.folder.glob("0*.npy") if f != file}
    again = cache_features(*tower, dataset, tmp_path, views=2)
    np.testing.assert_array_equal(everything(again), expected)
    assert "00001.npy is missing or damaged" in capsys.readouterr().out
    assert all((store.folder / name).stat().st_mtime_ns == when for name, when in others.items())


def test_pooled_features(pairs, tower, tmp_path, monkeypatch):
    """By the tower, or from the tokens if they are there already: the same."""
    dataset = load_pairs(pairs, "train")
    pooled = everything(cache_features(*tower, dataset, tmp_path / "a", views=2, pooling="cls_mean"))
    assert pooled.shape == (24, 2, 44)
    tokens = cache_features(*tower, dataset, tmp_path / "b", views=2)
    expected = pool_tokens(torch.from_numpy(everything(tokens)).float().flatten(0, 1), "cls_mean").view(24, 2, -1)
    np.testing.assert_allclose(pooled, expected, atol=4e-3, rtol=4e-3)
    monkeypatch.setattr(features_module, "image_tokens", None)  # not called
    again = everything(cache_features(*tower, dataset, tmp_path / "b", views=2, pooling="cls_mean"))
    np.testing.assert_allclose(again, expected, atol=4e-3, rtol=4e-3)


def test_the_automatic_dtype_is_that_of_what_is_cached(pairs, tower, tmp_path, monkeypatch):
    """Two processes, or a run and its resumption, measure at different times and must not encode twice."""
    dataset = load_pairs(pairs, "train")
    folders = []
    for fast in (True, False):
        monkeypatch.setattr(features_module, "bf16_is_fast", fast.__bool__)
        folders.append(cache_features(*tower, dataset, tmp_path, dtype="auto").folder)
        pooled = cache_features(*tower, dataset, tmp_path, dtype="auto", pooling="mean")  # from these tokens
        assert pooled.index["settings"]["dtype"] == "bfloat16"
    assert folders[0] == folders[1]
    assert cache_features(*tower, dataset, tmp_path / "new", dtype="auto").index["settings"]["dtype"] == "float32"


def test_a_stream_is_read_once_and_keeps_its_captions(pairs, tower, tmp_path, small_shards):
    expected = load_pairs(pairs, "train")
    data = DataArguments(str(pairs), streaming=True, cache_dir=str(tmp_path), views=2, encode_dtype="float32")
    dataset, store = load_features(data, *tower)
    assert dataset["captions"][:] == expected["captions"][:] and dataset["image_id"][:] == expected["image_id"][:]
    whole = cache_features(*tower, expected, tmp_path / "whole", views=2)
    np.testing.assert_allclose(everything(store), everything(whole), atol=1e-2)
    (store.folder / "00002.jsonl").write_text("")  # damaged: its images are read again
    dataset, _ = load_features(data, *tower, card_file=tmp_path / "card.json")
    assert dataset["captions"][:] == expected["captions"][:]
    assert json.loads((tmp_path / "card.json").read_text())["images"] == 24
    some, _ = load_features(DataArguments(str(pairs), max_images=5, streaming=True, cache_dir=str(tmp_path)), *tower)
    assert len(some) == 5


def test_a_full_disk_is_named_and_nothing_is_lost(pairs, tower, tmp_path, monkeypatch, small_shards):
    dataset = load_pairs(pairs, "train")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda folder: usage(2**40, 2**40, 5000))
    with pytest.raises(OSError, match=r"has 0 MB left: give another --cache_dir, or fewer --views"):
        cache_features(*tower, dataset, tmp_path)
    monkeypatch.undo()
    assert len(cache_features(*tower, dataset, tmp_path)) == 24


def test_folded_tower_is_the_tower():
    """Batch normalisation folded into convolutions, whose running statistics and weights are not trivial."""
    config = EfficientNetConfig(
        image_size=64,
        hidden_dim=320,
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_act="relu6",
        dropout_rate=0.0,
    )
    tower = EfficientNetModel(config).eval()
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
            elif isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
        images = torch.randn(3, 3, 64, 64)
        expected, before = tower(images).last_hidden_state, copy.deepcopy(tower.state_dict())
        folded = folded_tower(tower)
        got = folded(images.clone()).last_hidden_state
    assert expected.std() > 0.01 and not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(t, before[name]) for name, t in tower.state_dict().items())  # the tower itself is as it was
