"""Running the training stages in tests: drawn data and tiny towers to run them on, in this process or in one of their
own."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as PILImage
from transformers import BertConfig, BertModel, BlipImageProcessor, Dinov2Config, Dinov2Model

from tests.conftest import REPO, VOCABULARY, tiny_tokenizer


COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "black": (10, 10, 10), "white": (245, 245, 245)}


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


def module_of(stage: str) -> str:
    """`train_rbm` is a stage; `experiments.noise.noise` is named in full."""
    return stage if "." in stage else f"training.{stage}"


def in_process(module, *args, cwd) -> str:
    """Run a stage as its command line would, in this process; what it printed."""
    printed, before = io.StringIO(), os.getcwd()
    os.chdir(cwd)
    try:
        with mock.patch.object(sys, "argv", [module, *map(str, args)]), contextlib.redirect_stdout(printed):
            importlib.import_module(module_of(module)).main()
    finally:
        os.chdir(before)
        AcceleratorState._reset_state(True)
    return printed.getvalue()


def process(module, *args, cwd, launcher=()):
    """Run a stage in a process of its own, or with `accelerate launch` and these flags."""
    environment = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    environment |= {"HF_HOME": str(cwd / "hf")}
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else ["-W", "ignore"]
    command = [sys.executable, *launch, "-m", module_of(module), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def succeed(*args, **kwargs) -> str:
    """What a stage in a process of its own printed."""
    result = process(*args, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
