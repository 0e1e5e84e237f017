"""`blip-rbm caption`: what a person types and sees."""

import json
import subprocess
import sys

import pytest

from modeling_blip_rbm.__main__ import main
from tests.conftest import REPO, random_image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        random_image(seed=i).save(folder / name)
    (folder / "notes.txt").write_text("no image, and not looked at")
    return folder


def run(capsys, *args):
    code = main(["caption", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_files_and_folders(saved_model, photos, capsys):
    code, lines, _ = run(capsys, photos, "--model", saved_model)
    assert code == 0
    assert [line.split(": ")[0] for line in lines] == [str(photos / n) for n in ("a.png", "b.jpg", "more/c.png")]
    code, one, _ = run(capsys, photos / "b.jpg", "--model", saved_model, "--batch-size", 1)
    assert one == lines[1:2]


def test_json(saved_model, photos, capsys):
    code, lines, _ = run(capsys, photos, "--model", saved_model, "--json", "--num-captions", 3, "--words", 2)
    assert code == 0 and len(lines) == 3
    entry = json.loads(lines[0])
    assert entry["image"] == str(photos / "a.png") and len(entry["captions"]) == 3
    assert set(entry["captions"][0]) == {"generated_text", "score", "words"} and len(entry["captions"][0]["words"]) == 2


def test_prompt_and_plain(saved_model, model, photos, capsys):
    _, lines, _ = run(capsys, photos, "--model", saved_model, "--prompt", "a picture of")
    assert all(": a picture of" in line for line in lines)
    model.generation_config.rbm_guidance = 5.0
    model.save_pretrained(saved_model)
    _, guided, _ = run(capsys, photos, "--model", saved_model)
    _, plain, _ = run(capsys, photos, "--model", saved_model, "--plain")
    assert guided != plain


def test_what_cannot_be_read_is_named_and_the_rest_is_captioned(saved_model, photos, capsys):
    (photos / "broken.jpg").write_text("no image")
    (photos / "empty").mkdir()
    code, lines, err = run(capsys, photos, photos / "gone.png", photos / "empty", "--model", saved_model)
    assert code == 2 and len(lines) == 3
    assert "broken.jpg: not an image" in err and "gone.png: no such file" in err and "no image in this folder" in err


def test_prompt_too_long(saved_model, photos, capsys):
    code, _, err = run(capsys, photos, "--model", saved_model, "--prompt", "dog " * 40)
    assert code == 2 and "the prompt has 41 tokens" in err


def test_no_such_model(photos, capsys, tmp_path):
    code, _, err = run(capsys, photos, "--model", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err


def test_bad_numbers(photos, capsys):
    with pytest.raises(SystemExit) as error:
        run(capsys, photos, "--num-captions", 0)
    assert error.value.code == 2 and "at least 1" in capsys.readouterr().err


def test_as_a_module(saved_model, photos):
    command = [sys.executable, "-m", "modeling_blip_rbm", "caption", str(photos / "a.png"), "--model", str(saved_model)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(str(photos / "a.png"))
