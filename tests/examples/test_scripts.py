"""The examples that take minutes, as a person runs them. Those that take seconds are in `tests/modeling_blip_rbm/test_ecosystem.py`."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.conftest import CHECKPOINT, REPO


pytestmark = pytest.mark.slow


def run(command, **environment):
    environment = os.environ | {"PYTHONPATH": str(REPO)} | environment
    result = subprocess.run(list(map(str, command)), cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_rbm_on_a_matrix(tmp_path):
    pytest.importorskip("sklearn")
    run([sys.executable, "examples/digits_rbm.py", "--output", tmp_path / "digits"])
    result = json.loads((tmp_path / "digits.json").read_text())
    assert result["log_likelihood_test"] > result["log_likelihood_independent_pixels"] + 5  # nats
    assert result["features"]["hidden_units"] > result["features"]["pixels"]
    with Image.open(tmp_path / "digits.png") as picture:
        assert min(picture.size) > 500


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="needs the embedded checkpoint")
def test_the_tutorial_goes_from_photographs_to_a_staged_repo(tmp_path):
    said = run(["bash", "examples/tutorial.sh"], PYTHON=sys.executable, RUNS=str(tmp_path))
    assert all(said.count(f"\n{step}. ") == 1 for step in (2, 3, 4)) and said.startswith("1. ")
    assert (tmp_path / "model" / "tuning.json").is_file() and (tmp_path / "model-hub" / "README.md").is_file()
