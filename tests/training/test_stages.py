"""The stages one after the other, on drawn images with a tiny tower and a tiny BERT."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from experiments.reranker import train_reranker
from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.stages import COLOURS, in_process
from training.lib.data import fold_of
from training.lib.pairs import load_pairs


CAPTIONER = ["--per_device_train_batch_size", 4, "--dropout", 0, "--max_new_tokens", 9, "--eval_strategy", "steps"]


@pytest.fixture(scope="module")
def data(pairs, tmp_path_factory):
    cache = tmp_path_factory.mktemp("features")
    return ["--dataset", pairs, "--held_back", 4, "--views", 2, "--cache_dir", cache]


@pytest.fixture(scope="module")
def work(pairs, towers, data, tmp_path_factory):
    """A folder with a captioner, trained in two runs, the second of which went on from the first; and its RBM."""
    folder = tmp_path_factory.mktemp("work")
    build = ["--vision", towers / "vision", "--text", towers / "text", "--output_dir", "untrained"]
    in_process("build_captioner", *build, cwd=folder)
    train = ["--model", "untrained", *data, "--output_dir", "captioner", *CAPTIONER, "--eval_steps", 25]
    train += ["--learning_rate", "1e-2", "--ema_decay", 0.8, "--save_strategy", "steps", "--save_steps", 25]
    train += ["--label_smoothing", 0, "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", 10]
    in_process("train_captioner", *train, "--num_train_epochs", 5, cwd=folder)
    in_process("train_captioner", *train, "--num_train_epochs", 50, cwd=folder)  # goes on from epoch 5
    rbm = ["--model", "captioner/best", *data, "--output_dir", "rbm", "--num_words", 9, "--hidden_size", 7]
    rbm += ["--batch_size", 5, "--eval_every", 5, "--cd", 0.01, "--cd_persistent", "--sparsity_target", 0.3]
    in_process("train_rbm", *rbm, "--ais_every", 20, "--epochs", 10, cwd=folder)
    in_process("train_rbm", *rbm, "--ais_every", 20, "--epochs", 40, cwd=folder)  # goes on from epoch 10
    return folder


@pytest.fixture(scope="module")
def tuned(work, data):
    phrases = ["--model", "rbm/best", *data, "--output_dir", "phrases", "--min_images", 3]
    in_process("fit_phrases", *phrases, cwd=work)
    tune = ["--model", "phrases/best", *data, "--output_dir", "tuned", "--candidates", 5, "--guidance", 0.0, 0.2]
    tune += ["--guidance_rarity", 0.0, 0.5, "--rerank_vocabulary", 1.1]
    in_process("tune_decoding", *tune, "--half", True, "--max_new_tokens", 9, cwd=work)
    return work / "tuned"


def test_rarity_needs_phrases(work, data):
    tune = ["--model", "rbm/best", *data, "--output_dir", "untuned", "--guidance_rarity", 0.5]
    with pytest.raises(ValueError, match="need phrases, which rbm/best has not: run training.fit_phrases first"):
        in_process("tune_decoding", *tune, cwd=work)


def test_captioner_goes_on_from_its_checkpoint(work):
    assert (work / "captioner" / "checkpoint-25" / "ema.safetensors").exists()
    history = json.loads((work / "captioner" / "captioner.json").read_text())["held_back"]
    assert [entry["step"] for entry in history] == list(range(25, 251, 25))


def test_minimum_risk(work, data):
    risk = ["--model", "captioner/best", *data, "--output_dir", "risk", *CAPTIONER, "--eval_steps", 6]
    risk += ["--samples", 3, "--unigram_bias", "false", "--full_vocabulary_share", 1, "--max_steps", 6]
    out = in_process(
        "experiments.minimum_risk.train_minimum_risk",
        *risk,
        "--logging_steps",
        3,
        "--ema_decay",
        0.5,
        "--learning_rate",
        1e-4,
        cwd=work,
    )
    assert "sampled_cider" in out and (work / "risk" / "best" / "config.json").exists()


def test_the_record_goes_with_the_weights(work):
    """A mean of two runs took the minutes of both; what is built on it has its tower, and goes on from it."""
    runs = ("captioner/best", "captioner/last", "again/best")
    shutil.copytree(work / "captioner", work / "again")
    in_process("average_captioners", *runs, "--output_dir", "mean", cwd=work)
    one, mean = (json.loads((work / name / "captioner.json").read_text()) for name in ("captioner", "mean"))
    assert mean["minutes"] == 2 * one["minutes"] and mean["average_of"] == list(runs)
    build = ["--decoder", "mean/best", "--output_dir", "built", "--vision"]
    in_process("build_captioner", *build, "mean/best", cwd=work)
    assert json.loads((work / "built" / "captioner.json").read_text()) == mean
    built, trained = (BlipRBMForConditionalGeneration.from_pretrained(work / name) for name in ("built", "mean/best"))
    towers = (model.vision_model.state_dict() for model in (built, trained))
    assert all(torch.equal(a, b) for a, b in zip(*(tower.values() for tower in towers), strict=True))
    with pytest.raises(ValueError, match="built holds a model"):
        in_process("build_captioner", *build, "mean/best", cwd=work)
    build[build.index("built")] = "first-layers"
    with pytest.raises(ValueError, match="only taken whole: give mean/best"):
        in_process("build_captioner", *build, "mean/best@1", cwd=work)


def test_rbm_learns_the_colours(work, data, pairs):
    log = [json.loads(line) for line in (work / "rbm" / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(5, 41, 5))
    assert log[-1]["word_ap"] > max(0.7, log[0]["word_ap"] - 0.1) and np.isfinite(log[-1]["cd"])
    assert [np.isfinite(entry.get("log_likelihood", np.nan)) for entry in log] == [i in (1, 3, 7) for i in range(8)]
    assert log[-1]["sparsity"] < log[0]["sparsity"] + 0.1 and np.isfinite(log[-1]["free_energy_gap"])
    assert PILImage.open(work / "rbm" / "curves.png").size == (1200, 560)
    knows = ["--model", "rbm/best", "--dataset", pairs, "--output", "knows.json", *data[-2:]]
    in_process("evaluate_rbm", *knows, "--queries", *list(COLOURS)[:2], cwd=work)
    knows = json.loads((work / "knows.json").read_text())
    assert knows["per_word_ap"] > knows["per_word_ap_chance"] + 0.2 and (work / "knows.png").exists()


def test_an_rbm_of_tokens_in_every_stage(work, data, pairs):
    rbm = ["--model", "captioner/best", *data, "--output_dir", "of-tokens", "--num_words", 9, "--hidden_size", 7]
    rbm += ["--pooling", "tokens", "--batch_size", 5, "--eval_every", 5, "--epochs", 10, "--cd", 0.001]
    in_process("train_rbm", *rbm, cwd=work)
    phrases = ["--model", "of-tokens/best", *data, "--output_dir", "of-tokens-phrases", "--min_images", 3]
    in_process("fit_phrases", *phrases, cwd=work)
    knows = ["--model", "of-tokens-phrases/best", "--dataset", pairs, "--output", "of-tokens.json", *data[-2:]]
    in_process("evaluate_rbm", *knows, "--queries", *list(COLOURS)[:2], cwd=work)
    knows = json.loads((work / "of-tokens.json").read_text())
    assert knows["per_word_ap"] > knows["per_word_ap_chance"] + 0.2
    kept = ["--model", "of-tokens-phrases/best", *data, "--output_dir", "kept-by-tokens", "--least", 0.01]
    in_process("capfilt", *kept, cwd=work)
    assert json.loads((work / "kept-by-tokens" / "capfilt.json").read_text())["auc_against_hard_negatives"] > 0


@pytest.mark.parametrize("parts", ["refine", "lora"])
def test_a_part_is_trained_alone(work, data, parts):
    refine = ["--model", "rbm/best", *data, "--output_dir", parts, "--parts", parts, "--cause_tokens", 2, *CAPTIONER]
    refine += [
        "--unigram_bias",
        "false",
        "--max_steps",
        6,
        "--learning_rate",
        1e-2,
        "--eval_steps",
        6,
        "--lora_rank",
        3,
    ]
    out = in_process("train_captioner", *refine, "--ema_decay", 0.5, cwd=work)
    assert f"training {parts}:" in out
    before, after = (
        BlipRBMForConditionalGeneration.from_pretrained(work / folder) for folder in ("rbm/best", f"{parts}/best")
    )
    own, new = before.state_dict(), after.state_dict()
    changed = {name for name in own if not torch.equal(own[name], new[name])}
    if parts == "refine":
        assert after.rbm_layer.gate != 0 and after.config.rbm_cause_tokens == 2
        assert changed == {"rbm_layer.gate", "rbm_layer.shift.weight"}
    else:  # merged into the weights of the decoder's attention: the model has BLIP's parameters and no others
        assert set(own) == set(new)
        assert changed and all(name.rsplit(".", 2)[1] in ("query", "value") for name in changed)


def test_an_adapter_in_refines_place(work, data):
    adapter = ["--model", "rbm/best", *data, "--output_dir", "adapter", "--cause_tokens", 2, *CAPTIONER]
    adapter += ["--unigram_bias", "false", "--max_steps", 2, "--eval_steps", 2, "--ema_decay", 0.5]
    with pytest.raises(ValueError, match="--parts is 'lora', but the adapter stands in refine's place"):
        in_process("experiments.mlp_adapter.train_adapter", *adapter, "--parts", "lora", cwd=work)
    out = in_process("experiments.mlp_adapter.train_adapter", *adapter, "--parts", "refine", cwd=work)
    width, images, hidden = 28, 2 * 22, 7  # of the decoder, the pooled image, the RBM
    of_map = lambda outputs: round(hidden * outputs / (images + outputs)) * (images + outputs)
    assert f"training refine: {of_map(width) + of_map(2 * width) + 1:,} parameters" in out
    assert (work / "adapter" / "captioner.json").exists()


def test_reranker(work, data):
    rerank = ["--model", "rbm/best", "--writer", "captioner/first", *data, "--output_dir", "reranker", "--epochs", 3]
    rerank += ["--writer_images", 12, "--candidates", 4, "--batch_size", 5, "--max_new_tokens", 9]
    in_process("experiments.reranker.train_reranker", *rerank, cwd=work)
    report = json.loads((work / "reranker" / "reranker.json").read_text())
    assert [entry["epoch"] for entry in report["held_back"]] == [0, 1, 2, 3]
    assert report["candidates"]["training"]["oracle_cider"] >= report["candidates"]["training"]["sampled_cider"]


def test_reranker_with_writers_that_have_not_seen_the_images(work, data, pairs):
    for fold in (0, 1):
        train = ["--model", "captioner/best", *data, "--output_dir", f"fold-{fold}", "--folds", 2, "--fold", fold]
        train += [*CAPTIONER, "--unigram_bias", "false", "--max_steps", 2, "--eval_steps", 2, "--learning_rate", 0]
        in_process("train_captioner", *train, "--ema_decay", 0, cwd=work)
    rerank = ["--model", "rbm/best", *data, "--output_dir", "crossed", "--epochs", 1, "--candidates", 3]
    rerank += ["--writer_images", 12, "--batch_size", 5, "--max_new_tokens", 9]
    with pytest.raises(
        ValueError, match="number 0 of 2 .* --folds 2 --fold 0, but fold-1/best was with --folds 2 --fold 1"
    ):
        in_process("experiments.reranker.train_reranker", *rerank, "--writer", "fold-1/best", "fold-0/best", cwd=work)
    with mock.patch(
        "experiments.reranker.train_reranker.write_candidates", wraps=train_reranker.write_candidates
    ) as write:
        in_process("experiments.reranker.train_reranker", *rerank, "--writer", "fold-0/best", "fold-1/best", cwd=work)
    folds = fold_of(load_pairs(str(pairs), "train")["image_id"], 2)
    asked = [set(folds[call.args[3]]) for call in write.call_args_list]
    assert asked == [{0}, {1}] * 2  # training images, then those held back
    with pytest.raises(ValueError, match="--fold is 2, but must be at least 0 and less than --folds, which is 2"):
        in_process("train_captioner", *train, "--fold", 2, cwd=work)


def test_tower_is_trained_in_part(work, data):
    tower = ["--model", "captioner/best", *data, "--output_dir", "tower", "--tower_learning_rate", 1e-3, *CAPTIONER]
    tower += ["--max_steps", 4, "--tower_share", 0.5, "--unigram_bias", "false", "--ema_decay", 0.5, "--eval_steps", 4]
    in_process("train_captioner", *tower, "--token_dropout", 0.1, cwd=work)
    old, new = (
        BlipRBMForConditionalGeneration.from_pretrained(work / folder / "best").vision_model.state_dict()
        for folder in ("captioner", "tower")
    )
    changed = [not torch.equal(t, new[n]) for n, t in old.items()]
    assert any(changed) and not all(changed)


def test_tuned_and_evaluated(work, tuned, data, pairs):
    saved = json.loads((tuned / "config.json").read_text())
    phrases = json.loads((work / "phrases" / "phrases.json").read_text())
    assert phrases["phrases"] == saved["rbm_num_phrases"] > 5
    assert phrases["held_back"]["own_captions"] > 1.5 * phrases["held_back"]["other_captions"]
    decoding = json.loads((tuned / "generation_config.json").read_text())
    assert decoding["rbm_rerank"] and decoding["rbm_guidance"] in (0.0, 0.2) and saved["dtype"] == "float32"
    evaluate = ["--model", "tuned", "--dataset", pairs, "--output", "results.json", *data[-2:]]
    in_process("evaluate_captions", *evaluate, "--ablation", True, "--pictures", "pictures", cwd=work)
    results = json.loads((work / "results.json").read_text())
    assert results["images"] == 8 and set(results["systems"]) == {"BLIP", "BLIP-RBM"}
    alone = {name: system["CIDEr-D"] for name, system in results["ablation"].items()}
    assert len(alone) == 13 and alone["5 guided beams: oracle"] >= alone["5 guided beams: re-rank"]
    drawn = {file.stem for file in (work / "pictures").glob("*.png")}
    assert drawn == {"random", "best", "worst", "difference", "attention-1", "attention-2", "attention-3"}
    right = sum(list(COLOURS)[i % 4] in entry["BLIP-RBM"] for i, entry in enumerate(results["captions"]))
    assert right >= 6, results["captions"]
    plain = ["--model", "captioner/best", *evaluate[2:4], "--output", "plain.json", *data[-2:], "--plain", True]
    in_process("evaluate_captions", *plain, cwd=work)
    assert set(json.loads((work / "plain.json").read_text())["systems"]) == {"BLIP"}
    with pytest.raises(ValueError, match="there is no difference"):
        in_process("evaluate_captions", *plain, "--ablation", True, cwd=work)


def test_confidence(work, tuned, data, pairs):
    (work / "wrong").mkdir()  # a third of the captions are of another image: not every caption can be right
    for split in ("train", "validation"):
        rows = load_pairs(pairs, split)
        captions = [rows[(i + 1) % len(rows) if i % 3 == 0 else i]["captions"] for i in range(len(rows))]
        rows.remove_columns("captions").add_column("captions", captions).to_parquet(work / "wrong" / f"{split}.parquet")
    command = ["--model", "tuned", "--dataset", "wrong", "--output", "confidence.json", "--held_back", 16]
    command += ["--kind_images", 3, *data[-2:], "--also_trained_on", pairs]
    in_process("evaluate_confidence", *command, "--other_photographs", pairs, cwd=work)
    confidence = json.loads((work / "confidence.json").read_text())
    unlike, names = confidence["unlike"], [f"photographs of {name}" for name in ("wrong", pairs.name)]
    assert unlike["images"] == {"inside": 5, "of_a_kind": 3, "compared_to": 8 + 24}
    assert (work / "confidence.png").exists()
    for of_kinds in unlike["auc"].values():
        assert len(of_kinds) == 13 and list(of_kinds)[-1] == names[1]
    assert list(unlike["mean"]) == names and unlike["inside"] == names[0] and unlike["sorted_by"] == "free energy"
    weights = json.loads((tuned / "config.json").read_text())["rbm_confidence"]
    assert weights == pytest.approx(list(confidence["weights"].values()))
    for flags, message in (
        (["--kind_images", 8], "leaves none of the 8 images"),
        (["--other_photographs", "wrong"], "of that name already"),
    ):
        with pytest.raises(ValueError, match=message):
            in_process("evaluate_confidence", *command, *flags, cwd=work)


def test_diversity(work, tuned, data, pairs):
    varied = ["--model", "tuned", "--dataset", pairs, "--output", "varied.json", *data[-2:], "--captions", 3]
    in_process(
        "experiments.diversity.evaluate_diversity",
        *varied,
        "--causes",
        0.5,
        "--temperatures",
        1.0,
        "--max_new_tokens",
        9,
        cwd=work,
    )
    ways = json.loads((work / "varied.json").read_text())["ways"]
    assert list(ways) == ["hidden causes, 3 beams", "sampling", "nucleus 0.9", "diverse beams", "beams"]
    assert all(0 < e["div_2"] <= 1 for way in ways.values() for e in way.values())
    assert (work / "varied.png").exists()


@pytest.mark.parametrize("module", ["train_captioner", "train_rbm", "experiments.reranker.train_reranker"])
def test_a_folder_that_holds_something_else_is_left_alone(work, data, module):
    before = {file.name: file.stat().st_mtime_ns for file in (work / "untrained").iterdir()}
    with pytest.raises(
        ValueError, match="untrained holds a model that this stage did not write .* nothing was changed"
    ):
        in_process(module, "--model", "untrained", *data, "--output_dir", "untrained", cwd=work)
    assert {file.name: file.stat().st_mtime_ns for file in (work / "untrained").iterdir()} == before


def test_the_rbm_in_its_own_place_and_a_table(tuned, data, pairs, tmp_path):
    """On drawn images: every stand-in is measured; the file says what each adds to BLIP and what the RBM adds to it."""
    arguments = [
        "--model",
        tuned,
        *data,
        "--worlds",
        pairs,
        "--output",
        tmp_path / "controls.json",
        "--work",
        tmp_path / "work",
    ]
    names = ["RBM", "linear", "no image"]
    in_process(
        "experiments.controls.__main__",
        *arguments,
        "--stand_ins",
        *names,
        "--guides",
        "RBM",
        "linear",
        "--candidates",
        3,
        cwd=tmp_path,
    )
    found = json.loads((tmp_path / "controls.json").read_text())
    assert set(found["systems"]) == {"RBM", "RBM, with guide", "linear", "linear, with guide", "no image"}
    assert set(found["worlds"]) == {pairs.name, "all"}
    assert found["worlds"]["all"]["RBM, with guide"]["rbm_minus_it"]["CIDEr-D"]["difference"] == 0
    assert found["worlds"]["all"]["BLIP"]["minus_blip"]["CIDEr-D"]["difference"] == 0
    assert found["worlds"]["all"]["linear"]["measures"]["CIDEr-D"] > 0
