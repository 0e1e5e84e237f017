"""What every command has in common: recipes, and how it ends."""

import subprocess
import sys

import pytest
import yaml

from tests.conftest import REPO
from tests.stages import process
from training.lib import arguments
from training.lib.stage import run_stage


@pytest.mark.parametrize(
    "error", [ValueError("no image\n  in x"), FileNotFoundError(2, "No such file", "x"), KeyboardInterrupt()]
)
def test_a_users_error_is_one_line(error, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train_rbm.py"])
    with pytest.raises(SystemExit) as stopped:
        run_stage(main)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("train_rbm: ")
    assert stopped.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    if not isinstance(error, KeyboardInterrupt):
        monkeypatch.setenv("BLIP_RBM_DEBUG", "1")
        with pytest.raises(type(error)):
            run_stage(main)


def test_a_fault_of_the_code_is_a_traceback():
    def main():
        raise KeyError("x")

    with pytest.raises(KeyError):
        run_stage(main)


def test_a_stage_that_cannot_read_its_model_says_so(tmp_path):
    result = process("train_rbm", "--model", "nowhere", "--dataset", "x", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("train_rbm: error: ") and "nowhere" in result.stderr


def test_whoever_stops_reading_gets_no_traceback(tmp_path):
    program = "from training.lib.stage import run_stage; run_stage(lambda: print('line\\n' * 100_000))"
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == b""


@pytest.mark.parametrize(
    "recipe, complaint",
    [
        ("- 1\n- 2\n", "must have a line `flag: value`"),
        ("a: [", "is not YAML"),
        ("lerning_rate: 1\n", "no flags"),
        (None, "cannot be read"),
    ],
)
def test_a_recipe_that_is_none_is_refused(recipe, complaint, tmp_path, monkeypatch, capsys):
    if recipe is not None:
        (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.setattr(sys, "argv", ["stage", str(tmp_path / "r.yaml")])
    with pytest.raises(SystemExit) as stopped:
        arguments.parse_arguments(arguments.DataArguments)
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("amx, avx512_bf16, fast", [(True, True, True), (False, True, True), (False, False, False)])
def test_bf16_by_what_the_processor_has(amx, avx512_bf16, fast, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512_bf16)
    assert arguments.bf16_is_fast() is fast


@pytest.mark.parametrize("recipe", sorted((REPO / "training" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_settings(recipe):
    assert isinstance(yaml.safe_load(recipe.read_text()), dict)


def test_names_that_users_have_go_on_working():
    with pytest.warns(DeprecationWarning, match="training.lib.trainer"):
        from training.trainer import CaptionCollator
    with pytest.warns(DeprecationWarning, match="training.lib.metrics"):
        from training.metrics import CiderD
    from training.lib import metrics, trainer
    from training.pairs import load_pairs, read_pairs

    assert (CaptionCollator, CiderD) == (trainer.CaptionCollator, metrics.CiderD)
    assert load_pairs.__module__ == read_pairs.__module__ == "training.lib.pairs"
