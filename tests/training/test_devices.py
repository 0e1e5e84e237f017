"""Every stage computes on the accelerator that there is, and gives what it gives on a CPU: on a device that is none, whose tensors refuse
those of the host (tests/other_device.py)."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from tests.other_device import DEVICE, other_device
from tests.stages import in_process
from training import evaluate_captions, evaluate_confidence
from training.lib import features


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
    monkeypatch.setattr(  # of captions that are neither all right nor all wrong
        evaluate_confidence.CiderD, "scores", lambda scorer, captions: np.arange(len(captions)) % 2
    ) if stage == "evaluate_confidence" else None
    devices, own = [], features.image_tokens
    monkeypatch.setattr(features, "image_tokens", lambda tower, x, **k: devices.append(x.device) or own(tower, x, **k))
    (flags, file), results = STAGES[stage], []
    for name in ("host", "other"):
        (tmp_path / name).mkdir()
        flags = [*flags, "--model", saved_model, "--dataset", pairs, "--cache_dir", "features"]
        with other_device() if name == "other" else nullcontext():
            torch.manual_seed(0)
            in_process(stage.split()[0], *flags, cwd=tmp_path / name)
        results.append(numbers_of(json.loads((tmp_path / name / file).read_text())))
    host, other = results
    numbers = {name: n for name, n in host.items() if isinstance(n, float)}
    assert {name: other[name] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-4, nan_ok=True)
    assert len(numbers) > 3 and {**other, **numbers} == host
    if "tower" not in stage:
        assert set(devices) == {torch.device("cpu"), DEVICE}
