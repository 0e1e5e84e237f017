"""`blip-rbm search` and `blip-rbm energy`: the RBM over a folder, with an index."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from modeling_blip_rbm import BlipRBMForImageTextRetrieval
from modeling_blip_rbm.__main__ import main
from modeling_blip_rbm.cli import index as index_file
from modeling_blip_rbm.cli.index import NAME
from tests.conftest import random_image


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for i in range(5):
        random_image(seed=i).save(folder / f"{i}.png")
    random_image(seed=9).save(folder / "more" / "9.png")
    return folder


@pytest.fixture
def seen(monkeypatch):
    """How many images the model looked at, each time."""
    numbers, look_at = [], index_file.look_at
    monkeypatch.setattr(
        index_file, "look_at", lambda model, pixels: numbers.append(len(pixels)) or look_at(model, pixels)
    )
    return numbers


@pytest.fixture
def command(saved_model, capsys):
    def run(*args):
        code = main([*map(str, args), "--model", str(saved_model)])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, lines=out.splitlines(), err=err)

    return run


def test_search_ranks_as_the_retrieval_head(command, photos, saved_model, processor):
    result = command("search", photos, "a red dog on the beach", "--top", 4)
    model = BlipRBMForImageTextRetrieval.from_pretrained(saved_model).eval()
    files = sorted(photos.rglob("*.png"))
    with torch.no_grad():
        scores = model(**processor(images=files), **processor(text="a red dog on the beach")).logits_per_image[:, 0]
    best = sorted(zip(scores.tolist(), files), reverse=True)[:4]
    assert result.code == 0 and [line.split(" ", 1)[1] for line in result.lines] == [str(file) for _, file in best]
    assert [float(line.split()[0]) for line in result.lines] == pytest.approx([score for score, _ in best], abs=0.02)


def test_energy_sorts_the_unlike_first(command, photos, saved_model, processor):
    lines = [json.loads(line) for line in command("energy", photos, "--json").lines]
    model = BlipRBMForImageTextRetrieval.from_pretrained(saved_model).eval()
    expected = model.image_free_energy(processor(images=[line["image"] for line in lines])["pixel_values"])
    assert len(lines) == 6 and [line["energy"] for line in lines] == pytest.approx(expected.tolist(), rel=1e-4)
    assert expected.tolist() == sorted(expected.tolist(), reverse=True)


def test_help_says_what_was_measured_of_the_model(saved_model, monkeypatch, capsys):
    aucs = {"noise": {"auc": 0.97}, "upside down": {"auc": 0.53}}
    monkeypatch.setenv("BLIP_RBM_MODEL", str(saved_model))
    for measured, said in (
        ({"unlike": {"inside": "photographs", "sorted_by": "F", "auc": {"F": aucs}}}, True),
        ({"energy_auc": {}}, False),
    ):
        (saved_model / "confidence.json").write_text(json.dumps(measured))
        with pytest.raises(SystemExit):
            main(["energy", "--help"])
        assert ("noise 0.97, upside down 0.53" in " ".join(capsys.readouterr().out.split())) == said


def test_only_what_changed_is_looked_at_again(command, photos, seen, model, saved_model):
    first = command("energy", photos, "--batch-size", 4).lines
    assert seen == [4, 2] and command("energy", photos).lines == first and seen == [4, 2]
    assert command("search", photos, "dog").code == 0 and seen == [4, 2]  # one index for both
    random_image(seed=77).save(photos / "0.png")
    os.utime(photos / "0.png", ns=(1, 1))
    (photos / "1.png").unlink()
    again = command("energy", photos).lines
    assert seen == [4, 2, 1] and len(again) == 5 and not any("1.png" in line for line in again)
    model.rbm_layer.rbm.image_weight.data.mul_(2.0)
    model.save_pretrained(saved_model)
    assert command("energy", photos).lines != again and sum(seen[3:]) == 5  # another model


def test_an_index_that_is_damaged_or_cannot_be_kept(command, photos, seen):
    lines = command("energy", photos).lines
    (photos / NAME).write_bytes(b"half")
    result = command("energy", photos)
    assert result.lines == lines and "is made anew" in result.err
    result = command("energy", photos, "--index", photos / "no folder" / "index")
    assert result.code == 0 and result.lines == lines and "cannot be kept" in result.err


def test_what_cannot_be_read_is_named_and_the_rest_is_found(command, photos):
    (photos / "broken.jpg").write_text("no image")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    result = command("search", photos, "dog")
    assert result.code == 2 and len(result.lines) == 6 and "broken.jpg: not an image" in result.err
    assert "gone.jpg: no such file" in result.err and "loop.jpg: cannot be read as an image" in result.err


@pytest.mark.parametrize(
    "text, code, said",
    [("a dog and a zebra", 0, "the RBM has no word for zebra, "), ("qqq", 2, "knows no word"), (" ", 2, "is empty")],
)
def test_words_that_the_rbm_does_not_know(text, code, said, command, photos):
    result = command("search", photos, text)
    assert result.code == code and said in result.err


def test_the_page_needs_no_other_file(command, photos, tmp_path):
    page = tmp_path / "sheet.html"
    command("search", photos, "dog & <cat>", "--html", page, "--top", 3)
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3 and "://" not in text and "<cat>" not in text


def test_no_folder(command, photos):
    assert "no such folder" in command("energy", photos / "nowhere").err
