"""The demo: its images, its page, picture and table, on a tiny model."""

import importlib.util
import re
import sys

import pytest
from PIL import Image

from tests.conftest import REPO, random_image


EXAMPLES = REPO / "examples"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """The script as a module, run in a folder of its own."""
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", sys.path[:])  # the script puts the repository first
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


@pytest.fixture
def photos(tmp_path):
    """A photograph, and one that is none and whose name comes first."""
    (tmp_path / "photos" / "not_photographs").mkdir(parents=True)
    random_image(seed=1).save(tmp_path / "photos" / "z.png")
    random_image(seed=2).save(tmp_path / "photos" / "not_photographs" / "a.png")
    return tmp_path / "photos"


@pytest.fixture
def run(demo, photos, saved_model, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["demo", str(photos), "--model", str(saved_model), *map(str, arguments)])
        return demo.main()

    return run


def test_page_picture_and_table(demo, run, photos, tmp_path, capsys):
    document = tmp_path / "docs" / "demo.md"
    document.parent.mkdir()
    document.write_text("before\n<!-- captions -->\nold\n<!-- /captions -->\nafter\n")
    assert run("--table", document) == 0
    before, header, _, *rows, after = document.read_text().replace("<!-- captions -->\n", "").splitlines()
    assert (before, header, after) == ("before", "| image | BLIP | BLIP-RBM |", "after") and len(rows) == 3
    photograph, other = rows[0].split(" | "), rows[1].split(" | ")  # rows[2] is the closing marker
    assert photograph[0] == "| [z.png](../photos/z.png)"
    assert other[0] == f"| [a.png](../photos/not_photographs/a.png), {demo.NOT_A_PHOTOGRAPH}"
    page, said = (tmp_path / "demo.html").read_text(), capsys.readouterr().out
    for caption in (*photograph[1:], *other[1:]):
        assert caption.removesuffix(" |") in page and caption.removesuffix(" |") in said
    assert page.index("z.png") < page.index(demo.NOT_A_PHOTOGRAPH) and page.count(demo.NOT_A_PHOTOGRAPH) == 1
    assert said.count(demo.NOT_A_PHOTOGRAPH) == 1
    with Image.open(tmp_path / "demo.png") as picture:
        assert 800 < picture.width < 1000 and picture.height < picture.width


def test_the_picture_marks_what_is_no_photograph(demo, photos, tmp_path):
    """Red text below the second image, none below the first."""
    rows = {file: {"BLIP": "a", "BLIP-RBM": "b", "words": {"c": 0.5}} for file in demo.image_files([photos])}
    rows = dict(sorted(rows.items(), key=lambda row: demo.is_photograph(row[0]), reverse=True))
    images = {file: Image.new("RGB", (40, 30), "white") for file in rows}
    demo.write_contact_sheet(rows, images, tmp_path / "sheet.png", columns=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        halves = [
            picture.convert("RGB").crop((x, 0, x + picture.width // 2, picture.height)) for x in (0, picture.width // 2)
        ]
    red = [sum(n for n, (r, g, b) in half.getcolors(1 << 20) if r > g + 60 and r > b + 60) for half in halves]
    assert red[0] == 0 and red[1] > 50


def test_a_table_without_markers_is_refused_before_captioning(run, tmp_path, capsys):
    document = tmp_path / "demo.md"
    assert run("--table", document) == 2 and "demo.md" in capsys.readouterr().err
    for text in ("no markers", "<!-- captions -->\nnot closed"):
        document.write_text(text)
        assert run("--table", document) == 2 and "<!-- /captions -->" in capsys.readouterr().err
        assert document.read_text() == text and not (tmp_path / "demo.html").exists()


def test_images_are_small_and_hold_nothing_but_the_picture():
    files = [file for file in EXAMPLES.rglob("*.*") if file.suffix in (".jpg", ".png")]
    assert len(files) == 16
    for file in files:
        with Image.open(file) as image:
            assert max(image.size) <= 480 and file.stat().st_size < 60_000, file
            assert not image.getexif(), f"{file} carries EXIF"


def test_the_document_has_a_row_for_each_image():
    text = (REPO / "docs" / "demo.md").read_text()
    linked = re.findall(r"^\| \[.+?\]\(\.\./examples/(.+?)\)", text, re.M)
    images = {
        file.relative_to(EXAMPLES).as_posix() for file in EXAMPLES.rglob("*.*") if file.suffix in (".jpg", ".png")
    }
    assert len(linked) == 16 and set(linked) == images
