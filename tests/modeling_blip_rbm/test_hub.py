"""As users load it: from a folder and by Hub id, in a clean process in which this package cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
from transformers.dynamic_module_utils import get_imports

from modeling_blip_rbm.configuration_blip_rbm import HUB_FILES
from tests.conftest import random_image


SETUP = """
import importlib.util, json, sys, warnings
warnings.simplefilter("ignore")
sys.path = [p for p in sys.path if p not in ("", sys.argv[2])]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
assert importlib.util.find_spec("modeling_blip_rbm") is None, "the package must not be importable here"
import torch, transformers
from PIL import Image
model_id, image = sys.argv[1], Image.open(sys.argv[3])
trust = {"trust_remote_code": True}
"""


def run_clean(code: str, model_id, image, tmp_path, **environment):
    """Run code in a new interpreter, outside the repo, with nothing of ours on its path. Returns what it printed."""
    repo = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-c", SETUP + textwrap.dedent(code), str(model_id), repo, str(image)]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture
def image_file(tmp_path):
    random_image().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def hub_cache(folder, home, repo_id="org/blip-rbm"):
    """A Hub cache as huggingface_hub lays it out, with one revision."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)
    return {"HF_HOME": str(home)}


AUTO_CLASSES = """
    config = transformers.AutoConfig.from_pretrained(model_id, **trust)
    processor = transformers.AutoProcessor.from_pretrained(model_id, **trust)
    inputs = processor(images=image)
    names = ["AutoModel", "AutoModelForImageTextToText"]
    captions = [
        processor.captions(getattr(transformers, name).from_pretrained(model_id, **trust).generate(**inputs))[0]
        for name in names
    ]
    print(json.dumps({"type": config.model_type, "captions": captions}))
"""
PIPELINES = """
    ours = transformers.pipeline("image-to-text", model=model_id, **trust)
    guessed = transformers.pipeline(model=model_id, **trust)
    theirs = transformers.pipeline("image-text-to-text", model=model_id, **trust)
    out = ours(image)
    print(json.dumps({
        "class": type(ours).__name__,
        "guessed": type(guessed).__name__,
        "ours": out,
        "many": [o[0]["generated_text"] for o in ours([image, image], batch_size=2)],
        "theirs": theirs(image, text="")[0]["generated_text"],
    }))
"""


@pytest.mark.parametrize("by", ["folder", "id"])
def test_auto_classes(by, saved_model, processor, model, image_file, tmp_path):
    environment = {} if by == "folder" else hub_cache(saved_model, tmp_path / "home")
    out = run_clean(
        AUTO_CLASSES, saved_model if by == "folder" else "org/blip-rbm", image_file, tmp_path, **environment
    )
    expected = processor.captions(model.generate(**processor(images=image_file)))[0]
    assert out == {"type": "blip_rbm", "captions": [expected, expected]}


@pytest.mark.parametrize("by", ["folder", "id"])
def test_pipelines(by, saved_model, processor, model, image_file, tmp_path):
    environment = {} if by == "folder" else hub_cache(saved_model, tmp_path / "home")
    out = run_clean(PIPELINES, saved_model if by == "folder" else "org/blip-rbm", image_file, tmp_path, **environment)
    expected = processor.captions(model.generate(**processor(images=image_file)))[0]
    assert out["class"] == out["guessed"] == "BlipRBMImageToTextPipeline"
    assert out["ours"][0]["generated_text"] == expected and out["many"] == [expected, expected]
    assert 0 < out["ours"][0]["score"] < 1 and len(out["ours"][0]["words"]) == 5
    assert out["theirs"].startswith(expected)  # that pipeline asks for 256 new tokens


def test_fine_tuned_and_saved_again_keeps_its_code(saved_model, image_file, tmp_path):
    """Hub -> load as remote code -> save: the copy still has everything that its pipeline needs."""
    code = """
    model = transformers.AutoModelForImageTextToText.from_pretrained(model_id, **trust)
    processor = transformers.AutoProcessor.from_pretrained(model_id, **trust)
    model.save_pretrained("again")
    processor.save_pretrained("again")
    out = transformers.pipeline("image-to-text", model="again", **trust)(image)
    print(json.dumps(out))
    """
    out = run_clean(code, saved_model, image_file, tmp_path)
    assert isinstance(out[0]["generated_text"], str)
    copied = {file.name for file in (tmp_path / "again").glob("*.py")}
    assert copied == set(HUB_FILES)


def test_remote_code_needs_no_other_package(saved_model):
    """transformers refuses remote code with an import outside of a `try` that is not installed: a compiler's helper must not be one."""
    needed = {name for file in saved_model.glob("*.py") for name in get_imports(file)}
    assert "torch" in needed and needed - set(sys.stdlib_module_names) <= {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "PIL",
        "tqdm",
    }
