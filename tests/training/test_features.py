"""Cached outputs of a vision tower: right, reused, whole or not there."""

import collections
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from transformers import BlipImageProcessor, Dinov2Model

from modeling_blip_rbm.inference_blip_rbm import image_tokens
from modeling_blip_rbm.vision_blip_rbm import pool_tokens, vision_tokens
from tests.conftest import REPO, random_image
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


@pytest.mark.parametrize("text", ["", '{"shards": [', "[3]", '{"shards": [{"file": "../x"}], "settings": {}}', "\xff"])
def test_a_damaged_index_is_written_again(pairs, tower, tmp_path, small_shards, text, capsys, monkeypatch):
    monkeypatch.setattr(features_module, "bf16_is_fast", lambda: False)  # whatever this processor has
    dataset = load_pairs(pairs, "train")
    store = cache_features(*tower, dataset, tmp_path)
    expected = everything(store)
    (store.folder / "index.json").write_text(text, encoding="latin-1")
    np.testing.assert_array_equal(everything(cache_features(*tower, dataset, tmp_path, dtype="auto")), expected)
    assert capsys.readouterr().out.count("index.json is damaged: encoding its images again") == 1
    json.loads((store.folder / "index.json").read_text())


ENCODE = """
import sys
import numpy as np, torch
from transformers import BlipImageProcessor, Dinov2Model
from training.lib import features
from training.lib.pairs import load_pairs
torch.set_num_threads(1)
features.SHARD_ROWS = 3
vision, data, cache = sys.argv[1:]
tower, processor = Dinov2Model.from_pretrained(vision).eval(), BlipImageProcessor.from_pretrained(vision)
dataset = load_pairs(data, "train")
print("go", flush=True)
sys.stdin.readline()
store = features.cache_features(tower, processor, dataset, cache, batch_size=1)
print(len(store), float(store.batch(range(len(store))).double().sum()))
"""


def test_processes_that_encode_the_same_images_at_once(pairs, towers, tmp_path):
    """Each comes to the end, with the same features, and leaves a whole cache without temporary files."""
    command = [sys.executable, "-W", "ignore", "-c", ENCODE, towers / "vision", pairs, tmp_path / "cache"]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "go\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    # before it, one may say that a shard, which the other has just replaced, is encoded again
    said = [process.communicate()[0].split()[-2:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and said[0] == said[1] and said[0][0] == "24"
    (folder,) = (tmp_path / "cache").iterdir()
    assert {file.name for file in folder.iterdir()} == {"index.json", *(f"{i:05}.npy" for i in range(8))}
    index = json.loads((folder / "index.json").read_text())
    assert index["finished"] and not features_module.FeatureWriter(tmp_path / "cache", index["settings"]).broken


def test_a_process_that_is_behind_takes_nothing_from_another(pairs, tower, tmp_path, monkeypatch, small_shards):
    """The other's index, of one shard, replaces this one's in the moment in which it is finished."""
    dataset = load_pairs(pairs, "train")
    write_index = features_module.FeatureWriter.write_index

    def overtaken(writer):
        write_index(writer)
        writer.index_file.write_text(json.dumps(writer.index | {"shards": writer.shards[:1], "finished": False}))

    monkeypatch.setattr(features_module.FeatureWriter, "write_index", overtaken)
    assert len(cache_features(*tower, dataset, tmp_path)) == 24


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


def test_features_in_bf16_where_weights_are_packed(pairs, tower, tmp_path, monkeypatch):
    """On a processor without AMX the linear layers of a tower are packed in fp32, which autocast's inputs do not fit."""
    monkeypatch.setattr("modeling_blip_rbm.inference_blip_rbm.has_amx", lambda: False)
    dataset = load_pairs(pairs, "train").select(range(3))
    full, half = (everything(cache_features(*tower, dataset, tmp_path, dtype=d)) for d in ("float32", "bfloat16"))
    assert 0 < np.abs(full.astype(float) - half).max() < 0.1


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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("7 requested and 3 written")])
def test_a_disk_that_fills_up_while_a_shard_is_written(pairs, tower, tmp_path, monkeypatch, small_shards, error):
    dataset = load_pairs(pairs, "train")
    expected = everything(cache_features(*tower, dataset, tmp_path / "a"))
    save, written = np.save, []

    def second_fails(file, array):
        written.append(array)
        if len(written) == 2:
            file.write(b"half")
            raise error
        save(file, array)

    monkeypatch.setattr(features_module.np, "save", second_fails)
    with pytest.raises(OSError, match="00001.npy was not written: the disk is full"):
        cache_features(*tower, dataset, tmp_path / "b")
    (folder,) = (tmp_path / "b").iterdir()
    assert {file.name for file in folder.iterdir()} == {"00000.npy", "index.json"}
    np.testing.assert_array_equal(everything(cache_features(*tower, dataset, tmp_path / "b")), expected)
    assert len(written) == 2 + 3  # the first shard was kept
