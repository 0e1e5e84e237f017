"""The stages from end to end, on drawn images with a tiny tower and a tiny BERT; and what must hold in each."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from safetensors.torch import load_file
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
from training.average_captioners import average
from training.checkpoints import save_captioner
from training.data import image_view, split_held_back
from training.evaluate_captions import caption_rows
from training.evaluate_rbm import average_precision
from training.features import cache_features
from training.pairs import load_pairs
from training.shrink_vocabulary import kept_tokens, shrink_captioner, shrink_tokenizer
from training.train_captioner import (
    GumbelNoise,
    MinimumRiskTrainer,
    PackedCaptioner,
    PackedCaptions,
    caption_tokens,
    collate,
    packed,
    packed_mask,
)
from training.train_rbm import (
    PooledPairs,
    RBMArguments,
    RBMObjective,
    choose_words,
    evaluations_since_best,
    match_loss,
    sparsity_loss,
    words_loss,
)
from training.train_rbm import train as train_rbm


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


def stage(module, *args, cwd, launcher=()):
    """Run a stage in a process of its own, or with `accelerate launch` and these flags."""
    environment = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PATH": "/usr/bin:/bin"}
    environment |= {"HF_HOME": str(cwd / "hf")}
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else ["-W", "ignore"]
    command = [sys.executable, *launch, "-m", f"training.{module}", *map(str, args)]
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

    risk = ["--model", "captioner/best", *data, "--output_dir", "risk", "--per_device_train_batch_size", 4]
    risk += ["--samples", 3, "--unigram_bias", "false", "--full_vocabulary_share", 1, "--dropout", 0, "--max_steps", 6]
    risk += ["--eval_strategy", "steps", "--eval_steps", 6, "--logging_steps", 3, "--ema_decay", 0.5]
    out = succeed("train_captioner", *risk, "--learning_rate", "1e-4", "--max_new_tokens", 9, cwd=tmp_path)
    assert "sampled_cider" in out and (tmp_path / "risk" / "best" / "config.json").exists()

    rbm = ["--model", "captioner/best", *data, "--output_dir", "rbm", "--num_words", 9, "--hidden_size", 7]
    rbm += [
        "--batch_size",
        5,
        "--eval_every",
        5,
        "--cd",
        0.01,
        "--cd_persistent",
        "--sparsity_target",
        0.3,
        "--ais_every",
        20,
    ]
    succeed("train_rbm", *rbm, "--epochs", 10, cwd=tmp_path)
    succeed("train_rbm", *rbm, "--epochs", 40, cwd=tmp_path)  # goes on from epoch 10
    log = [json.loads(line) for line in (tmp_path / "rbm" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(5, 41, 5))
    assert log[-1]["word_ap"] > max(0.7, log[0]["word_ap"] - 0.1) and np.isfinite(log[-1]["cd"])
    assert [np.isfinite(entry.get("log_likelihood", np.nan)) for entry in log] == [i in (1, 3, 7) for i in range(8)]
    assert log[-1]["sparsity"] < log[0]["sparsity"] + 0.1 and np.isfinite(log[-1]["free_energy_gap"])
    assert PILImage.open(tmp_path / "rbm" / "curves.png").size == (1200, 560)
    knows = ["--model", "rbm/best", "--dataset", pairs, "--output", "knows.json", "--cache_dir", tmp_path / "features"]
    succeed("evaluate_rbm", *knows, "--queries", *list(COLOURS)[:2], cwd=tmp_path)
    knows = json.loads((tmp_path / "knows.json").read_text())
    assert knows["per_word_ap"] > knows["per_word_ap_chance"] + 0.2 and (tmp_path / "knows.png").exists()

    for parts in ("refine", "adapter"):  # from the RBM's captioner, all else frozen
        refine = ["--model", "rbm/best", *data, "--output_dir", parts, "--parts", parts, "--cause_tokens", 2]
        refine += ["--per_device_train_batch_size", 4, "--unigram_bias", "false", "--max_steps", 6, "--dropout", 0]
        refine += ["--learning_rate", "1e-2", "--eval_strategy", "steps", "--eval_steps", 6, "--max_new_tokens", 9]
        out = succeed("train_captioner", *refine, "--ema_decay", 0.5, cwd=tmp_path)
        assert f"training {parts}:" in out, out
    before, after = (
        BlipRBMForConditionalGeneration.from_pretrained(tmp_path / folder) for folder in ("rbm/best", "refine/best")
    )
    assert after.rbm_layer.gate != 0 and after.config.rbm_cause_tokens == 2
    own, new = before.state_dict(), after.state_dict()
    assert [n for n in own if not torch.equal(own[n], new[n])] == ["rbm_layer.gate", "rbm_layer.shift.weight"]

    rerank = ["--model", "rbm/best", "--writer", "captioner/first", *data, "--output_dir", "reranker", "--epochs", 3]
    rerank += ["--writer_images", 12, "--candidates", 4, "--batch_size", 5, "--max_new_tokens", 9]
    succeed("train_reranker", *rerank, cwd=tmp_path)
    report = json.loads((tmp_path / "reranker" / "reranker.json").read_text())
    assert [entry["epoch"] for entry in report["held_back"]] == [0, 1, 2, 3]
    assert report["candidates"]["training"]["oracle_cider"] >= report["candidates"]["training"]["sampled_cider"]

    tower = [
        "--model",
        "captioner/best",
        *data,
        "--output_dir",
        "tower",
        "--tower_learning_rate",
        1e-3,
        "--max_steps",
        4,
    ]
    tower += ["--tower_share", 0.5, "--per_device_train_batch_size", 4, "--unigram_bias", "false", "--ema_decay", 0.5]
    tower += ["--eval_strategy", "steps", "--eval_steps", 4, "--token_dropout", 0.1, "--max_new_tokens", 9]
    succeed("train_captioner", *tower, cwd=tmp_path)
    new = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "tower" / "best").vision_model.state_dict()
    changed = [not torch.equal(t, new[n]) for n, t in before.vision_model.state_dict().items()]
    assert any(changed) and not all(changed)

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
    succeed("evaluate_captions", *evaluate, "--ablation", True, "--pictures", "pictures", cwd=tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == 8 and set(results["systems"]) == {"BLIP", "BLIP-RBM"}
    alone = {name: system["CIDEr-D"] for name, system in results["ablation"].items()}
    assert len(alone) == 11 and alone["5 guided beams: oracle"] >= alone["5 guided beams: re-rank"]
    drawn = {file.stem for file in (tmp_path / "pictures").glob("*.png")}
    assert drawn == {"random", "best", "worst", "difference", "attention-1", "attention-2", "attention-3"}

    (tmp_path / "wrong").mkdir()  # a third of the captions are of another image: not every caption can be right
    for split in ("train", "validation"):
        rows = load_pairs(pairs, split)
        captions = [rows[(i + 1) % len(rows) if i % 3 == 0 else i]["captions"] for i in range(len(rows))]
        rows.remove_columns("captions").add_column("captions", captions).to_parquet(
            tmp_path / "wrong" / f"{split}.parquet"
        )
    confidence = ["--model", "tuned", "--dataset", "wrong", "--output", "confidence.json", "--held_back", 16]
    succeed("evaluate_confidence", *confidence, "--kind_images", 3, "--cache_dir", tmp_path / "features", cwd=tmp_path)
    confidence = json.loads((tmp_path / "confidence.json").read_text())
    assert len(confidence["energy_auc"]) == 5 and (tmp_path / "confidence.png").exists()
    weights = json.loads((tmp_path / "tuned" / "config.json").read_text())["rbm_confidence"]
    assert weights == pytest.approx(list(confidence["weights"].values()))
    varied = ["--model", "tuned", "--dataset", pairs, "--output", "varied.json", "--cache_dir", tmp_path / "features"]
    varied += ["--captions", 3, "--causes", 0.5, "--temperatures", 1.0, "--max_new_tokens", 9]
    succeed("evaluate_diversity", *varied, cwd=tmp_path)
    ways = json.loads((tmp_path / "varied.json").read_text())["ways"]
    assert len(ways) == 4 and all(0 < e["div_2"] <= 1 for way in ways.values() for e in way.values())
    assert (tmp_path / "varied.png").exists()
    right = sum(list(COLOURS)[i % 4] in entry["BLIP-RBM"] for i, entry in enumerate(results["captions"]))
    assert right >= 6, results["captions"]


def test_missing_columns_and_wrong_recipes_are_named(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"no column for the caption was found among \['image', 'picture'\]"):
        Dataset.from_dict({"image": ["y"], "picture": ["x"]}).to_parquet(tmp_path / "train.parquet")
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


# ---------------------------------------------------------------- vocabulary


def test_a_smaller_vocabulary_says_the_same(model, processor, pixel_values, tmp_path):
    """Tokens that no caption holds go; those that stay have the same probabilities up to the normalisation."""
    gone = {"street", "horse", "##ing"}
    kept = [i for i, token in enumerate(VOCABULARY) if token not in gone]
    with torch.no_grad():  # never said, as after training
        model.text_decoder.cls.predictions.bias[[VOCABULARY.index(token) for token in gone]] = -50.0
    small = shrink_captioner(model, kept)
    tokenizer = shrink_tokenizer(processor.tokenizer, kept)
    assert len(tokenizer) == len(kept) == small.config.text_config.vocab_size == len(VOCABULARY) - 3
    assert tokenizer.bos_token == "[DEC]" and tokenizer.bos_token_id == small.decoder_input_ids == kept.index(
        VOCABULARY.index("[DEC]")
    )
    small_processor = type(processor)(processor.image_processor, tokenizer)
    for settings in ({}, {"num_beams": 3}, {"rbm_guidance": 0.5, "rbm_rerank": True}):
        expected = processor.captions(model.generate(pixel_values, max_new_tokens=9, **settings))
        assert small_processor.captions(small.generate(pixel_values, max_new_tokens=9, **settings)) == expected
    save_captioner(small, small_processor, tmp_path / "small")
    again = type(processor).from_pretrained(tmp_path / "small")
    assert again(text="a dog runs on the beach")["input_ids"].tolist() == [
        [kept.index(i) for i in row] for row in processor(text="a dog runs on the beach")["input_ids"].tolist()
    ]
    with pytest.raises(ValueError, match="the RBM has words that would go, such as tokens"):
        shrink_captioner(model, [i for i in kept if VOCABULARY[i] != "dog"])


def test_kept_tokens(processor):
    tokenizer = processor.tokenizer
    said = {VOCABULARY.index("dog"), VOCABULARY.index("red")}
    tokens = tokenizer.convert_ids_to_tokens(kept_tokens(tokenizer, said))
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "##s", "[DEC]"]


# ---------------------------------------------------------------- losses


def test_packed_loss_is_the_loss_of_single_captions(model, processor, pixel_values):
    captions = [["a dog runs", "the red ball on the grass"], ["a cat", "two people in a park", "white snow"]]
    items, single = [], []
    tokens = vision_tokens(model.vision_model(pixel_values)).detach()
    for i, of_image in enumerate(captions):
        ids = caption_tokens(processor, of_image)
        items.append({"index": i, "vision_hidden_states": tokens[i], **packed(ids)})
        for caption in ids:
            row = torch.tensor([caption])
            logits = model(vision_hidden_states=tokens[i : i + 1], input_ids=row).logits[0, :-1]
            single.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    captioner = PackedCaptioner(model.config).eval()
    captioner.load_state_dict(model.state_dict())
    captioner.full_vocabulary = True
    torch.testing.assert_close(captioner(**collate(items))["loss"], torch.cat(single).mean())
    captioner.full_vocabulary, captioner.active = False, torch.arange(len(VOCABULARY))
    torch.testing.assert_close(captioner(**collate(items))["loss"], torch.cat(single).mean())
    weighted = [item | {"weights": [float(s + 1) for s in item["segments"]]} for item in items]
    expected = sum(n * loss.sum() for n, loss in zip((1, 2, 1, 2, 3), single)) / len(torch.cat(single))
    torch.testing.assert_close(captioner(**collate(weighted))["loss"], expected)


def test_gumbel_noise_samples_from_the_softmax():
    scores = torch.tensor([[0.0, 1.0, -1.0, 5.0, 0.5]]).expand(20_000, -1)
    allowed = torch.tensor([0, 1, 2, 4])
    drawn = GumbelNoise(allowed)(None, scores).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.zeros(5).index_copy(0, allowed, scores[0, allowed].softmax(-1))
    torch.testing.assert_close(share, expected, atol=0.012, rtol=0)


def test_minimum_risk_makes_better_captions_likelier(model, processor, tmp_path):
    """One image, two captions it may sample: the one that is a reference gains, the other loses."""
    good, bad = caption_tokens(processor, ["a dog runs on grass", "the red ball"])
    captioner = PackedCaptioner(model.config)
    captioner.load_state_dict(model.state_dict())
    captioner.full_vocabulary = True
    features = vision_tokens(model.vision_model(torch.randn(1, 3, 24, 24))).detach()
    references = [["a dog runs on grass", "a dog runs on the grass"], ["a white cat", "two people"]]
    data = PackedCaptions(None, [0], [[good]])
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, max_steps=1)
    trainer = MinimumRiskTrainer(
        model=captioner, args=args, train_dataset=data, data_collator=collate, held_back=None, ema=None,
        processor=processor, eval_beams=1, max_new_tokens=9, references=references, samples=2, reference_weight=0.0,
    )  # fmt: skip
    trainer.sample = lambda model, features: [[list(good), list(bad)]]

    def log_prob(caption):
        row = torch.tensor([caption])
        logits = captioner(vision_hidden_states=features, input_ids=row).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum().item()

    captioner.eval()
    before = log_prob(good), log_prob(bad)
    optimizer = torch.optim.SGD(captioner.text_decoder.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        trainer.compute_loss(captioner, {"index": torch.tensor([0]), "vision_hidden_states": features}).backward()
        optimizer.step()
    captioner.eval()
    assert log_prob(good) > before[0] and log_prob(bad) < before[1]
    assert trainer.rewards[0] > 1  # half of a perfect caption's


def test_average_of_captioners(model, blip):
    other = BlipRBMForConditionalGeneration(model.config)
    mean = average([model, other])
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(mean[name], 0.5 * (model.state_dict()[name] + other.state_dict()[name]))
    model.load_state_dict(mean)
    with pytest.raises(ValueError, match="not of one kind"):
        average([model, BlipRBMForConditionalGeneration.from_blip(blip)])


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


@pytest.fixture
def untrained(pairs, towers, tmp_path):
    command = ["--vision", towers / "vision", "--text", towers / "text", "--output_dir", tmp_path / "untrained"]
    succeed("build_captioner", *command, cwd=tmp_path)
    return tmp_path / "untrained"


def test_the_captioner_stage_does_not_depend_on_how_a_batch_is_split(pairs, untrained, tmp_path):
    """8x1 = 2x4 = 1x8 = 2 processes of 4: the same loss and the same weights after two steps, captions of unlike lengths."""
    data = [
        "--dataset",
        pairs,
        "--held_back",
        4,
        "--views",
        1,
        "--cache_dir",
        tmp_path / "features",
        "--model",
        untrained,
    ]
    exact = ["--dropout", 0, "--ema_decay", 0, "--max_steps", 2, "--logging_steps", 1, "--max_new_tokens", 3]
    exact += ["--learning_rate", 1e-3, "--eval_strategy", "steps", "--eval_steps", 2, "--seed", 3]
    results = {}
    for batch, steps, processes in ((8, 1, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2)):
        name = f"{batch}x{steps}x{processes}"
        size = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps, "--output_dir", name]
        launcher = () if processes == 1 else ("--config_file", str(REPO / "training" / "accelerate" / "multi-cpu.yaml"))
        size += [] if processes == 1 else ["--ddp_backend", "gloo"]
        out = succeed("train_captioner", *data, *exact, *size, cwd=tmp_path, launcher=launcher)
        losses = [float(loss) for loss in re.findall(r"'loss': '([0-9.]+)'", out)]
        results[name] = losses, load_file(tmp_path / name / "last" / "model.safetensors")
    losses, weights = results.pop("8x1x1")
    assert len(losses) == 2
    for name, (other_losses, other_weights) in results.items():
        assert other_losses == pytest.approx(losses, rel=1e-3), name  # as printed
        far = {key: (other_weights[key] - t).abs().max().item() for key, t in weights.items()}
        assert max(far.values()) <= 1e-5, (name, max(far, key=far.get), max(far.values()))


def test_rbm_losses_fall_when_image_and_words_agree(model):
    p = model.rbm_layer.rbm.parameters_fp32
    a = hidden_input(p, torch.randn(5, 44))
    w = torch.rand(5, 11).round()
    assert match_loss(p, a, w).item() > 0 and words_loss(p, a, w).item() > 0
    aligned = p._replace(U=torch.zeros_like(p.U))
    assert match_loss(aligned, a, w).item() == pytest.approx(np.log(5), rel=1e-4)  # no words: chance


def test_divergence_leaves_the_last_good_rbm(model, tmp_path):
    rbm = model.rbm_layer.rbm
    words = [torch.rand(2, rbm.word_size) < 0.3 for _ in range(23)]
    pairs = PooledPairs(torch.randn(23, 2, rbm.visible_size), words)
    held_back = (torch.randn(7, rbm.visible_size), words[:7])
    settings = RBMArguments("x", str(tmp_path), epochs=2, batch_size=11, eval_every=1)
    assert len(train_rbm(Accelerator(), model, pairs, held_back, settings)) == 2
    good = (tmp_path / "best.pt").read_bytes()
    settings = RBMArguments("x", str(tmp_path), epochs=5, batch_size=11, eval_every=1)
    pairs.pooled[5] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged in epoch 3 .*lower --learning_rate"):
        train_rbm(Accelerator(), model, pairs, held_back, settings)
    assert (tmp_path / "best.pt").read_bytes() == good
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_collapse_is_said(model, tmp_path, capsys):
    rbm = model.rbm_layer.rbm
    words = [torch.rand(2, rbm.word_size) < 0.3 for _ in range(23)]
    pairs = PooledPairs(torch.randn(23, 2, rbm.visible_size), words)
    rbm.hidden_bias.data.fill_(-60.0)
    settings = RBMArguments("x", str(tmp_path), epochs=1, batch_size=11, eval_every=1)
    history = train_rbm(Accelerator(), model, pairs, (pairs.pooled[:7, 0], words[:7]), settings)
    assert history[-1]["dead"] == 1.0
    assert "collapsed, 100% of its hidden units are always off" in capsys.readouterr().out


def test_persistent_chains_go_on(model):
    rbm = model.rbm_layer.rbm
    settings = RBMArguments("x", "x", words=0.0, match=0.0, cd=1.0, cd_persistent=True, batch_size=13)
    objective = RBMObjective(rbm, settings)
    start = objective.chain_h.clone()
    pooled, w = torch.randn(5, rbm.visible_size), torch.rand(5, rbm.word_size).round()
    loss, terms = objective(pooled, w)
    loss.backward()
    assert set(terms) == {"cd"} and rbm.image_weight.grad.abs().sum() > 0
    assert objective.chain_h.shape == start.shape and not torch.equal(objective.chain_h, start)
    assert "chain_x" in objective.state_dict()  # saved, so that a stopped run goes on with them
    with pytest.raises(ValueError, match="exclude each other"):
        RBMObjective(rbm, RBMArguments("x", "x", cd=1.0, cd_persistent=True, cd_clamp_image=True))


def test_sparsity_loss_is_least_at_its_target():
    at = lambda share: sparsity_loss(torch.logit(torch.full((7, 5), share)), 0.2).item()
    assert at(0.2) < min(at(0.1), at(0.3)) and at(0.2) == pytest.approx(
        -0.2 * np.log(0.2) - 0.8 * np.log(0.8), rel=1e-5
    )


def test_early_stopping_counts_from_the_best():
    entries = [{"text_to_image_r10": r, "image_to_text_r10": 0} for r in (3, 5, 4, 4)]
    assert [evaluations_since_best(entries[:n]) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]


def test_average_precision_by_hand():
    prob, target = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(average_precision(prob, target), torch.tensor([(1 + 2 / 3) / 2]))


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
