"""The stages from end to end, on drawn images with a tiny tower and a tiny BERT; and what must hold in each."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from transformers import (
    BertConfig,
    BertModel,
    BlipImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Trainer,
    TrainingArguments,
)

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.modeling_blip_rbm import vision_tokens
from modeling_blip_rbm.rbm import hidden_input
from tests.conftest import REPO, VOCABULARY, random_image, tiny_tokenizer
from training import features as features_module
from training.checkpoints import save_captioner
from training.data import image_view, load_pairs, split_held_back
from training.evaluate_captions import caption_rows
from training.features import cache_features
from training.train_captioner import PackedCaptioner, caption_tokens, collate, packed_mask
from training.train_rbm import average_precision, choose_words, match_loss, words_loss


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "black": (10, 10, 10), "white": (245, 245, 245)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """24 plain images of one colour, three captions each, as a parquet data set."""
    folder = tmp_path_factory.mktemp("pairs")
    names = list(COLOURS)
    rows = {"image": [], "captions": [], "image_id": []}
    for i in range(24):
        colour = names[i % 4]
        pixels = np.clip(np.array(COLOURS[colour]) + np.random.default_rng(i).normal(0, 9, (40, 40, 3)), 0, 255)
        rows["image"].append(PILImage.fromarray(pixels.astype(np.uint8)))
        rows["captions"].append(
            [f"a {colour} ball .", f"the {colour} ball is {colour}", f"a picture of a {colour} ball"]
        )
        rows["image_id"].append(f"{i}.png")
    dataset = Dataset.from_dict(
        rows, features=Features({"image": Image(), "captions": Sequence(Value("string")), "image_id": Value("string")})
    )
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    dataset.select(range(8)).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of a DINOv2 and of a BERT with random weights, as transformers saves them."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder / "vision")
    BlipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder / "vision")
    bert = BertConfig(
        vocab_size=len(VOCABULARY) - 2,
        hidden_size=28,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=31,
    )
    BertModel(bert).save_pretrained(folder / "text")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.no_padding()
    vocabulary = folder / "text" / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY[:-2]))
    (folder / "text" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 31})
    )
    return folder


def stage(module, *args, cwd):
    environment = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PATH": "/usr/bin:/bin"}
    environment |= {"HF_HOME": str(cwd / "hf")}
    command = [sys.executable, "-W", "ignore", "-m", f"training.{module}", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*args, **kwargs):
    result = stage(*args, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_stages_end_to_end(pairs, towers, tmp_path):
    """build -> train (stopped and resumed) -> RBM -> tune -> evaluate: it learns the colours."""
    data = ["--dataset", pairs, "--held_back", 4, "--views", 2, "--cache_dir", tmp_path / "features"]
    succeed(
        "build_captioner",
        "--vision",
        towers / "vision",
        "--text",
        towers / "text",
        "--output_dir",
        "untrained",
        cwd=tmp_path,
    )
    train = ["--model", "untrained", *data, "--output_dir", "captioner", "--per_device_train_batch_size", 4]
    train += ["--learning_rate", "1e-2", "--dropout", 0, "--ema_decay", 0.8, "--max_new_tokens", 9, "--eval_steps", 25]
    train += ["--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", 25, "--label_smoothing", 0]
    train += ["--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 10]
    succeed("train_captioner", *train, "--num_train_epochs", 5, cwd=tmp_path)
    assert (tmp_path / "captioner" / "checkpoint-25" / "ema.safetensors").exists()
    out = succeed("train_captioner", *train, "--num_train_epochs", 50, cwd=tmp_path)  # goes on from epoch 5
    history = json.loads((tmp_path / "captioner" / "captioner.json").read_text())["held_back"]
    assert [entry["step"] for entry in history] == list(range(25, 251, 25)), out

    rbm = ["--model", "captioner/best", *data, "--output_dir", "rbm", "--num_words", 9, "--hidden_size", 7]
    rbm += ["--batch_size", 5, "--eval_every", 5, "--cd", 0.01]
    succeed("train_rbm", *rbm, "--epochs", 10, cwd=tmp_path)
    succeed("train_rbm", *rbm, "--epochs", 40, cwd=tmp_path)  # goes on from epoch 10
    log = [json.loads(line) for line in (tmp_path / "rbm" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(5, 41, 5))
    assert log[-1]["word_ap"] > max(0.7, log[0]["word_ap"] - 0.1) and np.isfinite(log[-1]["cd"])

    tune = [
        "--model",
        "rbm/best",
        *data,
        "--output_dir",
        "tuned",
        "--candidates",
        5,
        "--guidance",
        0.0,
        0.2,
        "--half",
        True,
    ]
    succeed("tune_decoding", *tune, "--max_new_tokens", 9, cwd=tmp_path)
    saved = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert saved["rbm_rerank"] and saved["rbm_guidance"] in (0.0, 0.2) and saved["dtype"] == "float32"

    evaluate = [
        "--model",
        "tuned",
        "--dataset",
        pairs,
        "--output",
        "results.json",
        "--cache_dir",
        tmp_path / "features",
    ]
    succeed("evaluate_captions", *evaluate, cwd=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 8 and set(results["systems"]) == {"BLIP", "BLIP-RBM"}
    right = sum(list(COLOURS)[i % 4] in entry["BLIP-RBM"] for i, entry in enumerate(results["captions"]))
    assert right >= 6, results["captions"]


def test_missing_columns_and_wrong_recipes_are_named(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"has the columns \['picture'\]; needed: 'image'"):
        Dataset.from_dict({"picture": ["x"]}).to_parquet(tmp_path / "train.parquet")
        load_pairs(tmp_path, "train")
    (tmp_path / "recipe.yaml").write_text("lerning_rate: 1\n")
    result = stage("train_rbm", "recipe.yaml", "--model", "x", "--dataset", "x", "--output_dir", "x", cwd=tmp_path)
    assert result.returncode == 2 and "keys that are no flags of this stage: lerning_rate" in result.stderr


def test_a_text_model_that_is_no_bert_is_refused(towers, tmp_path):
    config = Dinov2Config(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path / "no-bert")
    result = stage(
        "build_captioner", "--vision", towers / "vision", "--text", "no-bert", "--output_dir", "x", cwd=tmp_path
    )
    assert result.returncode != 0 and "is a 'dinov2' model, but BLIP's decoder is a BERT" in result.stderr


# ---------------------------------------------------------------- data and features


def test_held_back_images_do_not_depend_on_the_order(pairs):
    dataset = load_pairs(pairs, "train")
    train, held = split_held_back(dataset, 5)
    assert len(train) == 19 and not set(train) & set(held)
    shuffled = dataset.shuffle(seed=1)
    _, held_again = split_held_back(shuffled, 5)
    assert {dataset[int(i)]["image_id"] for i in held} == {shuffled[int(i)]["image_id"] for i in held_again}
    with pytest.raises(ValueError, match="held_back is 24"):
        split_held_back(dataset, 24)


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
    assert store.features.shape == (24, 2, 17, 22) and store.features[:, 0].std(axis=0).mean() > 0.01
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

    monkeypatch.setattr(features_module, "_write_features", fail)
    cache_features(tower, image_processor, dataset, tmp_path, views=2)
    with pytest.raises(AssertionError, match="encoded again"):  # other weights: another entry
        with torch.no_grad():
            next(tower.parameters()).mul_(1.5)
        cache_features(tower, image_processor, dataset, tmp_path, views=2)


def test_interrupted_encoding_goes_on(pairs, towers, tmp_path, monkeypatch):
    tower = Dinov2Model.from_pretrained(towers / "vision").eval()
    image_processor = BlipImageProcessor.from_pretrained(towers / "vision")
    dataset = load_pairs(pairs, "train")
    expected = cache_features(tower, image_processor, dataset, tmp_path / "a", batch_size=1).features[:]
    calls = []

    def stop_after_ten(outputs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return vision_tokens(outputs)

    monkeypatch.setattr(features_module, "vision_tokens", stop_after_ten)
    with pytest.raises(KeyboardInterrupt):
        cache_features(tower, image_processor, dataset, tmp_path / "b", batch_size=1)
    assert not list((tmp_path / "b").glob("*/features.npy"))
    again = cache_features(tower, image_processor, dataset, tmp_path / "b", batch_size=1).features[:]
    np.testing.assert_array_equal(again, expected)


# ---------------------------------------------------------------- losses


def test_packed_loss_is_the_loss_of_single_captions(model, processor, pixel_values):
    captions = [["a dog runs", "the red ball on the grass"], ["a cat", "two people in a park", "white snow"]]
    items, single = [], []
    tokens = vision_tokens(model.vision_model(pixel_values)).detach()
    for i, of_image in enumerate(captions):
        ids = caption_tokens(processor, of_image)
        items.append(
            {
                "vision_hidden_states": tokens[i],
                "input_ids": [t for c in ids for t in c[:-1]],
                "labels": [t for c in ids for t in c[1:]],
                "position_ids": [place for c in ids for place in range(len(c) - 1)],
                "segments": [n for n, c in enumerate(ids) for _ in c[:-1]],
            }
        )
        for caption in ids:
            row = torch.tensor([caption])
            logits = model(vision_hidden_states=tokens[i : i + 1], input_ids=row).logits[0, :-1]
            single.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    packed = PackedCaptioner(model.config).eval()
    packed.load_state_dict(model.state_dict())
    packed.full_vocabulary = True
    torch.testing.assert_close(packed(**collate(items))["loss"], torch.cat(single).mean())
    packed.full_vocabulary, packed.active = False, torch.arange(len(VOCABULARY))
    torch.testing.assert_close(packed(**collate(items))["loss"], torch.cat(single).mean())


def test_packed_mask():
    sees = packed_mask(torch.tensor([[0, 0, 1, -1]]), torch.float32)[0, 0] == 0
    assert sees.tolist() == [
        [True] + [False] * 3,
        [True, True, False, False],
        [False, False, True, False],
        [False] * 3 + [True],
    ]


@pytest.mark.parametrize("batch, accumulation", [(2, 4), (1, 8)])
def test_accumulation_does_not_change_loss_or_gradient(blip, processor, tmp_path, batch, accumulation):
    """HF Trainer: 8x1 = 2x4 = 1x8. Stock BLIP's loss grows with the accumulation steps."""
    texts = ["a dog runs", "the red ball", "a white cat", "two people standing", "a black horse", "snow on grass"]
    ids = processor(text=[*texts, "blue water plays", "a child sits"])["input_ids"]
    images = torch.randn(8, 3, 24, 24)
    rows = [{"pixel_values": image, "input_ids": row, "labels": row} for image, row in zip(images, ids)]

    def first_step(batch, accumulation):
        model = BlipRBMForConditionalGeneration.from_blip(blip)
        args = TrainingArguments(
            tmp_path / f"{batch}", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=1, logging_steps=1, report_to="none", save_strategy="no", learning_rate=1e-3, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]

    whole, parts = first_step(8, 1), first_step(batch, accumulation)
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-4)
    assert float(parts["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=1e-3)


def test_rbm_losses_fall_when_image_and_words_agree(model):
    p = model.rbm_layer.rbm.parameters_fp32
    a = hidden_input(p, torch.randn(5, 44))
    w = torch.rand(5, 11).round()
    assert match_loss(p, a, w).item() > 0 and words_loss(p, a, w).item() > 0
    aligned = p._replace(U=torch.zeros_like(p.U))
    assert match_loss(aligned, a, w).item() == pytest.approx(np.log(5), rel=1e-4)  # no words: chance


def test_average_precision_by_hand():
    prob, target = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[True, False, True, False]])
    assert average_precision(prob, target) == pytest.approx((1 + 2 / 3) / 2)


def test_words_are_frequent_and_have_content():
    ids = choose_words(tiny_tokenizer(), [["a dog", "the dog on the beach"], ["dogs and a ball"]], 2)
    assert {VOCABULARY[i] for i in ids} <= {"dog", "beach", "ball"} and VOCABULARY.index("dog") in ids


# ---------------------------------------------------------------- saving


def test_saved_in_half_loads_as_float(model, processor, pixel_values, tmp_path):
    save_captioner(model, processor, tmp_path / "half", half=True)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.float32
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a.half().to(a.dtype), b, rtol=0, atol=0, msg=name)


def test_nan_is_never_written_over_a_good_checkpoint(model, processor, tmp_path):
    save_captioner(model, processor, tmp_path / "kept")
    before = (tmp_path / "kept" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.rbm_layer.rbm.word_bias[3] = float("nan")
    with pytest.raises(ValueError, match="not saved: NaN or infinite values in rbm_layer.rbm.word_bias"):
        save_captioner(model, processor, tmp_path / "kept")
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == before


def test_captions_from_cached_features_are_those_from_pixels(model, processor, pixel_values, tmp_path):
    tokens = vision_tokens(model.vision_model(pixel_values)).detach()

    class Store:
        def batch(self, rows):
            return tokens[list(rows)]

    cached = caption_rows(model, processor, Store(), range(5), batch_size=2, num_beams=3)
    assert cached == processor.captions(model.generate(pixel_values, num_beams=3))
