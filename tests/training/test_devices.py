"""Every stage computes on the accelerator that there is, and gives what it gives on a CPU: on a device that is none, whose tensors refuse
those of the host (tests/other_device.py)."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.inference_blip_rbm import may_be_fast
from tests.conftest import randomise, tiny_config
from tests.other_device import DEVICE, other_device
from tests.stages import in_process
from training import capfilt, evaluate_captions, evaluate_confidence, train_rbm
from training.lib.features import cache_features
from training.lib.pairs import load_pairs


HELD_BACK = ["--held_back", 8]
STAGES = {  # flags beside --model, --dataset and --cache_dir; what is compared
    "evaluate_captions": (["--max_new_tokens", 5, "--ablation", True, "--num_beams", 2, "--output", "out"], "out"),
    "evaluate_confidence": ([*HELD_BACK, "--kind_images", 3, "--output", "out"], "out"),
    "evaluate_rbm": (["--queries", "dog", "cat", "--output", "out"], "out"),
    "fit_phrases": ([*HELD_BACK, "--min_images", 2, "--output_dir", "out"], "out/phrases.json"),
    "capfilt": ([*HELD_BACK, "--synthetic", True, "--least", 0.0, "--output_dir", "out"], "out/capfilt.json"),
    "capfilt --cross_fit": (
        [*HELD_BACK, "--cross_fit", True, "--epochs", 1, "--batch_size", 5, "--least", 0.0, "--output_dir", "out"],
        "out/capfilt.json",
    ),
    "tune_decoding": (
        [*HELD_BACK, "--max_new_tokens", 5, "--candidates", 2, "--prior", 0.0, 0.2, "--output_dir", "out"],
        "out/tuning.json",
    ),
    "train_rbm": (
        [*HELD_BACK, "--epochs", 2, "--eval_every", 1, "--batch_size", 5, "--cd", 0.01, "--cd_persistent", True]
        + ["--hidden_size", 7, "--num_words", 11, "--sparsity_target", 0.3, "--ais_every", 2, "--output_dir", "out"],
        "out/rbm.json",
    ),
    "train_captioner": (
        [
            *HELD_BACK,
            "--use_cpu",
            False,
            "--dataloader_pin_memory",
            False,
            "--eval_strategy",
            "epoch",
            "--num_train_epochs",
            2,
            "--token_dropout",
            0.1,
        ]
        + [
            "--image_token_dropout",
            0.2,
            "--max_new_tokens",
            5,
            "--per_device_train_batch_size",
            5,
            "--output_dir",
            "out",
        ],
        "out/captioner.json",
    ),
    "train_captioner of the tower": (
        [
            *HELD_BACK,
            "--use_cpu",
            False,
            "--dataloader_pin_memory",
            False,
            "--eval_strategy",
            "epoch",
            "--num_train_epochs",
            1,
            "--max_new_tokens",
            5,
        ]
        + ["--tower_learning_rate", 1e-3, "--output_dir", "out"],
        "out/captioner.json",
    ),
}
CLOCK = ("second", "minute", "memory", "runtime", "per_second", "_dir")  # what is another number every time


def numbers_of(value, name=""):
    """The numbers and texts of a results file, by name."""
    if any(part in name.rpartition("/")[2] for part in CLOCK):
        return {}
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: n for key, part in items for path, n in numbers_of(part, f"{name}/{key}").items()}
    return {name: value}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_another_device(stage, saved_model, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_captions, "meteor", lambda *texts: None)  # Java's, which takes minutes
    if stage == "evaluate_confidence":  # of captions that are neither all right nor all wrong
        half = lambda scorer, captions: np.arange(len(captions)) % 2
        monkeypatch.setattr(evaluate_confidence.CiderD, "scores", half)
    for module in (capfilt, train_rbm):  # loading a model draws random numbers, not as many here as there
        seeded = lambda *args, own=module.with_new_rbm: torch.manual_seed(3) and own(*args)
        monkeypatch.setattr(module, "with_new_rbm", seeded)
    (flags, file), results = STAGES[stage], []
    for name in ("host", "other"):
        (tmp_path / name).mkdir()
        flags = [*flags, "--model", saved_model, "--dataset", pairs, "--cache_dir", tmp_path / "features"]
        with other_device() if name == "other" else nullcontext() as there:
            in_process(stage.split()[0], *flags, cwd=tmp_path / name)
        results.append(numbers_of(json.loads((tmp_path / name / file).read_text())))
    assert there.operations > 400
    host, other = results
    numbers = {name: n for name, n in host.items() if isinstance(n, float)}
    assert {name: other[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4, nan_ok=True)
    assert len(numbers) >= 3 and {**other, **numbers} == host


@pytest.mark.parametrize("pooling", [None, "cls_mean"])
def test_images_are_encoded_where_the_tower_is(model, processor, pairs, tmp_path, pooling):
    dataset, stores = load_pairs(pairs, "validation"), []
    for name in ("host", "other"):
        with other_device() if name == "other" else nullcontext():
            tower = model.vision_model.to(DEVICE if name == "other" else "cpu")
            store = cache_features(tower, processor.image_processor, dataset, tmp_path / name, views=3, pooling=pooling)
        stores.append(np.stack([store[row] for row in range(len(dataset))]))
    np.testing.assert_allclose(*stores, rtol=3e-3, atol=3e-3)
    assert stores[0].std() > 0.1


@pytest.mark.parametrize("kind", ["probe", "rbm"])
def test_alignment_on_another_device(kind, towers, pairs, tmp_path):
    flags = [
        "--kind",
        kind,
        "--vision",
        towers / "vision",
        "--text",
        towers / "text",
        "--dataset",
        pairs,
        "--held_back",
        7,
    ]
    flags += ["--epochs", 2, "--batch_size", 5, "--output_dir", "run", "--cache_dir", "features"]
    with other_device() as there:
        in_process("align", *flags, cwd=tmp_path)
    assert there.operations > 400
    entry = json.loads((tmp_path / "run" / "align.json").read_text())["held_back"][-1]
    assert entry["epoch"] == 2 and np.isfinite(list(entry.values())).all()


def automatic(part):
    """A plan for two devices of which the first has room for so much of the model."""

    def plan(model):
        size = sum(p.nbytes for p in model.parameters())
        room = {0: int(part * size), 1: 2 * size}
        return infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)

    return plan


PLANS = {
    "four tenths": automatic(0.4),
    "a layer": automatic(0.45),
    "half": automatic(0.5),
    "most": automatic(0.7),
    "the RBM alone": lambda model: {"vision_model": 1, "rbm_layer": 0, "text_decoder": 1},
    "the decoder alone": lambda model: {"vision_model": 0, "rbm_layer": 0, "text_decoder": 1},
}


@pytest.mark.parametrize("name", PLANS)
def test_a_model_on_two_devices(name, model, pixel_values):
    """As `device_map="balanced"` splits it: Accelerate's hooks bring what an operation needs together."""
    settings = {"rbm_guidance": 0.7, "rbm_rerank": True, "rbm_rerank_pmi": 0.3, "max_new_tokens": 7}
    expected = model.generate(pixel_values, **settings)
    evidence = model.caption_evidence(model.encode_image(pixel_values), expected)
    energy = model.image_free_energy(pixel_values)
    plan = PLANS[name](model)
    assert set(plan.values()) == {0, 1}
    with other_device():
        split = dispatch_model(model, {name: f"other:{number}" for name, number in plan.items()})
        images = pixel_values.to("other:1")
        captions = split.generate(images, **settings)
        assert captions.device.type == "other" and torch.equal(captions.cpu(), expected)
        torch.testing.assert_close(split.image_free_energy(images).cpu(), energy)
        found = split.caption_evidence(split.encode_image(images), captions)
        torch.testing.assert_close(found.cpu(), evidence, atol=1e-4, rtol=1e-4)


def test_where_a_word_is_on_two_devices(pixel_values):
    model = randomise(BlipRBMForConditionalGeneration(tiny_config(rbm_pooling="tokens")))
    words = model.config.rbm_word_ids[2:5]
    expected = model.word_map(pixel_values, words), model.image_energy(pixel_values)
    with other_device():
        split = dispatch_model(model, {"vision_model": "other:0", "rbm_layer": "other:1", "text_decoder": "other:0"})
        images = pixel_values.to("other:0")
        found = split.word_map(images, words).cpu(), split.image_energy(images).cpu()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", [0.2, 0.3, 0.4])
def test_what_holds_weights_of_its_own_is_not_split(model, part):
    """Hooks are of modules: a plan that puts a module's own weights on two devices has none for them."""
    plan = automatic(part)(model)
    names = {name for name, _ in model.named_modules()}
    assert set(plan) <= names


@pytest.mark.parametrize(
    "settings",
    [
        {"rbm_guidance": 0.7, "num_beams": 3},
        {"rbm_guidance": 0.7, "rbm_rerank": True, "rbm_guidance_order": "second"},
        {"rbm_guidance": 0.7, "rbm_rerank": True, "do_sample": True},
        {"rbm_diversity": 3.0, "num_return_sequences": 3, "cache_implementation": "static"},
    ],
)
def test_the_fast_path_on_another_device(model, pixel_values, settings):
    """The captions of a CPU, and the host reads one number a step: transformers asks whether all captions have ended."""
    torch.manual_seed(3)
    expected, reads = model.generate(pixel_values, max_new_tokens=7, min_new_tokens=7, **settings), {}
    with other_device() as there, torch.no_grad():
        model.to(DEVICE)
        images = pixel_values.to(DEVICE)
        assert may_be_fast(model)
        for steps in (7, 13):
            torch.manual_seed(3)
            before = there.reads
            captions = model.generate(images, max_new_tokens=steps, min_new_tokens=steps, **settings)
            reads[steps] = there.reads - before
            assert steps == 13 or torch.equal(captions.cpu(), expected)
    assert reads[13] - reads[7] == 13 - 7
