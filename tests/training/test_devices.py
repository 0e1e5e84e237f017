"""Every stage computes on the accelerator that there is, and gives what it gives on a CPU."""

import json
from contextlib import nullcontext

import pytest

from tests.other_device import DEVICE, other_device
from tests.stages import in_process


@pytest.mark.parametrize("stage", ["evaluate_captions", "evaluate_rbm", "fit_phrases", "capfilt", "tune_decoding", "train_rbm", "train_captioner", "evaluate_confidence"])
def test_x(stage, saved_model, pairs, tmp_path):
    common = {
      "evaluate_captions": ["--model", saved_model, "--split", "validation", "--max_new_tokens", 5, "--output", "OUT.json", "--ablation", True],
      "evaluate_rbm": ["--model", saved_model, "--split", "validation", "--queries", "dog", "cat", "--output", "OUT.json"],
      "evaluate_confidence": ["--model", saved_model, "--split", "validation", "--kind_images", 3, "--output", "OUT.json", "--held_back", 7],
      "fit_phrases": ["--model", saved_model, "--min_images", 2, "--output_dir", "OUT", "--held_back", 7],
      "capfilt": ["--model", saved_model, "--output_dir", "OUT", "--held_back", 7],
      "tune_decoding": ["--model", saved_model, "--output_dir", "OUT", "--held_back", 7, "--max_new_tokens", 5, "--candidates", 2],
      "train_rbm": ["--model", saved_model, "--output_dir", "OUT", "--held_back", 7, "--epochs", 2, "--batch_size", 5, "--hidden_size", 7],
      "train_captioner": ["--model", saved_model, "--output_dir", "OUT", "--held_back", 7, "--num_train_epochs", 2, "--report_to", "none"],
    }[stage]
    for name in ("host", "other"):
        with other_device() if name == "other" else nullcontext():
            args = [str(a).replace("OUT", name) for a in common]
            in_process(stage, *args, "--dataset", pairs, "--cache_dir", name + "-features", cwd=tmp_path)
