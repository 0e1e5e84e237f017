"""`blip-rbm caption`: what a person types and sees."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from modeling_blip_rbm.__main__ import main
from modeling_blip_rbm.files import find_images
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


def damaged(folder, name, content):
    for file in folder.glob(name):
        file.unlink() if content is None else file.write_bytes(content)


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", None),
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b'{"model_type": "blip'),
        ("model.safetensors", None),
        ("model.safetensors", b"half"),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("*processor_config.json", None),
        ("generation_config.json", b"{"),
    ],
)
def test_a_damaged_model_is_one_line(name, content, saved_model, photos, capsys):
    damaged(saved_model, name, content)
    code, lines, err = run(capsys, photos, "--model", saved_model)
    said = [line for line in err.splitlines() if line.startswith("blip-rbm: ")]
    assert code == 2 and not lines and len(said) == 1 and str(saved_model) in said[0] and "Traceback" not in err


def test_weights_that_are_missing(saved_model, photos, capsys):
    file = saved_model / "model.safetensors"
    weights = load_file(file)
    weights.pop("text_decoder.bert.encoder.layer.0.output.dense.weight")
    save_file(weights, file, metadata={"format": "pt"})
    code, lines, err = run(capsys, photos, "--model", saved_model)
    assert code == 2 and not lines and "output.dense.weight" in err


def test_no_model_at_all(photos, capsys, monkeypatch):
    monkeypatch.delenv("BLIP_RBM_MODEL", raising=False)
    monkeypatch.setattr("modeling_blip_rbm.__main__.EMBEDDED_MODEL", photos / "nowhere")
    code, _, err = run(capsys, photos)
    assert code == 2 and "Give --model" in err


def test_what_is_found_in_folders(photos, tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    for name in ("d.tga", "e.JFIF", "f.jp2", "._a.png", ".hidden.png", "g.heic", "film.mpg"):
        (far / name).write_bytes(b"")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        (photos / name).mkdir()
        random_image().save(photos / name / "a.png")
    (photos / "linked").symlink_to(far)
    (far / "back").symlink_to(photos)
    (photos / "more" / "up").symlink_to(photos)
    (photos / "gone.png").symlink_to("nowhere")
    os.mkfifo(photos / "pipe.jpg")
    files, errors = find_images([photos, photos / "a.png", far / "d.tga", f"{photos}/more/../b.jpg"])
    inside = [
        "a.png",
        "b.jpg",
        "gone.png",
        "linked/d.tga",
        "linked/e.JFIF",
        "linked/f.jp2",
        "linked/g.heic",
        "more/c.png",
    ]
    assert files == [*(photos / name for name in inside), far / "d.tga"] and not errors
    assert find_images([far / "d.tga"] * 3)[0] == [far / "d.tga"]


def test_a_folder_that_cannot_be_read_is_named(photos, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refused)
    files, errors = find_images([photos])
    assert len(files) == 2 and errors == [f"{photos / 'more'}: this folder cannot be read (Permission denied)"]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_file_named_twice_is_captioned_once(batch_size, saved_model, photos, capsys):
    paths = [photos / "a.png", photos / "a.png", photos]
    _, lines, _ = run(capsys, *paths, "--model", saved_model, "--batch-size", batch_size)
    assert len(lines) == 3


def test_pipes_and_devices_are_not_opened(saved_model, photos, capsys):
    os.mkfifo(photos / "pipe.jpg")
    code, lines, err = run(capsys, photos, photos / "pipe.jpg", "/dev/zero", "--model", saved_model)
    assert code == 2 and len(lines) == 3 and "pipe.jpg: " in err and "/dev/zero: " in err


def test_names_that_would_do_harm(saved_model, tmp_path, capsys):
    folder = tmp_path / "p"
    folder.mkdir()
    files = [folder / os.fsdecode(name) for name in (b"a\nb.png", b"caf\xe9.png", b"e\x1b[31m.png")]
    for file in files:
        random_image().save(file)
    code, lines, _ = run(capsys, folder, "--model", saved_model)
    assert code == 0 and [line.split(": ")[0] for line in lines] == [
        rf"{folder}/a\nb.png", rf"{folder}/caf\udce9.png", rf"{folder}/e\x1b[31m.png"
    ]  # fmt: skip
    code, lines, _ = run(capsys, folder, "--model", saved_model, "--json")
    assert code == 0 and [Path(json.loads(line)["image"]) for line in lines] == files


@pytest.mark.parametrize("how, code", [("head", 141), ("ctrl-c", 130)])
def test_a_stop_is_quiet_and_loses_nothing(how, code, saved_model, tmp_path):
    for i in range(97):
        random_image(seed=i).save(tmp_path / f"{i:02}.png")
    command = [
        sys.executable,
        "-m",
        "modeling_blip_rbm",
        "caption",
        tmp_path,
        "--model",
        saved_model,
        "--batch-size",
        "1",
    ]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(os.fsencode(tmp_path / "00.png"))  # before the rest is done
    if how == "head":
        process.stdout.close()
    else:
        process.send_signal(signal.SIGINT)
    assert process.wait(60) == code and b"Traceback" not in process.stderr.read()


def test_no_such_model(photos, capsys, tmp_path):
    code, _, err = run(capsys, photos, "--model", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err


@pytest.mark.parametrize(
    "name, number",
    [("--num-captions", "0"), ("--num-beams", "-5"), ("--words", "-1"), ("--batch-size", "many"), ("--words", "2.5")],
)
def test_bad_numbers(name, number, photos, capsys):
    with pytest.raises(SystemExit) as error:
        run(capsys, photos, name, number)
    assert error.value.code == 2 and f"{name}: '{number}' must be" in capsys.readouterr().err


def test_as_a_module(saved_model, photos):
    command = [sys.executable, "-m", "modeling_blip_rbm", "caption", str(photos / "a.png"), "--model", str(saved_model)]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith(str(photos / "a.png"))
