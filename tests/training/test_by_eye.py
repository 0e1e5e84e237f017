"""A sheet of captions without the names of their systems, and what judgements of it say."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.by_eye.__main__ import judged, shuffled_key
from tests.stages import in_process


MODULE = "experiments.by_eye.__main__"


@pytest.fixture(scope="module")
def sheet(pairs, towers, tmp_path_factory):
    work = tmp_path_factory.mktemp("by_eye")
    for seed in (0, 1):
        build = ["--vision", towers / "vision", "--text", towers / "text", "--output_dir", f"model-{seed}"]
        in_process("build_captioner", *build, "--seed", seed, cwd=work)
    write = ["--model", "model-0", "model-1", "--dataset", pairs, "--split", "train", "--max_new_tokens", 5]
    write += ["--decodings", "plain", "--images", 11, "--output", "sheet"]
    in_process(MODULE, *write, cwd=work)
    return work, write


def test_a_sheet_has_pages_a_key_and_an_empty_table(sheet):
    folder = sheet[0] / "sheet"
    key = json.loads((folder / "sheet.json").read_text())["images"]
    assert len(key) == 11 == len({entry["image_id"] for entry in key})
    rows = [line.split("\t") for line in (folder / "judgements.tsv").read_text().splitlines()]
    assert rows[0] == ["image", "letter", "right"]
    assert rows[1:] == [[str(entry["number"]), letter, ""] for entry in key for letter in entry["letters"]]
    for entry in key:
        named = [name for of in entry["letters"].values() for name in of["systems"]]
        assert sorted(named) == ["model-0, plain", "model-1, plain"]
    assert sorted(file.name for file in folder.glob("*.png")) == ["page-1.png", "page-2.png"]
    first = np.asarray(Image.open(folder / "page-1.png").convert("L"))
    assert first.std() > 20 and "model" not in (folder / "judgements.tsv").read_text()


def test_what_cannot_be_is_refused(sheet):
    work, write = sheet
    with pytest.raises(ValueError, match="--output sheet holds files"):
        in_process(MODULE, *write, cwd=work)
    with pytest.raises(ValueError, match="--images 25: must be of 1 to 24"):
        in_process(MODULE, *write[:-4], "--images", 25, "--output", "other", cwd=work)
    with pytest.raises(ValueError, match="--decodings blue: unknown, must be of plain, rbm"):
        in_process(MODULE, *write, "--decodings", "blue", "--output", "other", cwd=work)
    with pytest.raises(ValueError, match="is empty: fill in"):
        in_process(MODULE, "--judge", "sheet", cwd=work)
    assert not (work / "other").exists()


def test_equal_captions_have_one_letter_and_orders_differ():
    said = {"old": ["a dog"] * 40, "new": ["a cat"] * 40, "third": ["a dog"] * 40}
    key = shuffled_key(said, list(range(40)), np.random.default_rng(0))
    assert all(set(entry["letters"]) == {"A", "B"} for entry in key)
    first = [entry["letters"]["A"] for entry in key]
    assert {tuple(letter["systems"]) for letter in first} == {("old", "third"), ("new",)}
    assert 10 < sum(letter["caption"] == "a dog" for letter in first) < 30
    assert key == shuffled_key(said, list(range(40)), np.random.default_rng(0))


def test_judgements_are_joined_with_the_key(tmp_path):
    """By hand: 10 images, `old` and `new` differ in all but the last; `new` right in 7 of 10, `old` in 1 of 2 judged."""
    said = {"old": ["a dog"] * 9 + ["a cat"], "new": ["a cat"] * 10}
    key = shuffled_key(said, [f"{i}.png" for i in range(10)], np.random.default_rng(3))
    (tmp_path / "sheet.json").write_text(json.dumps({"images": key}))
    lines = ["image\tletter\tright"]
    for entry in key:
        for letter, of in entry["letters"].items():
            of_new = int(entry["number"] not in (1, 2, 3))
            judgement = of_new if "new" in of["systems"] else 0 if entry["number"] == 1 else ""
            lines.append(f"{entry['number']}\t{letter}\t{judgement}")
    (tmp_path / "judgements.tsv").write_text("\n".join(lines))
    assert judged(tmp_path) == {"old": [False, True], "new": [False] * 3 + [True] * 7}
    printed = in_process(MODULE, "--judge", tmp_path, cwd=tmp_path).splitlines()
    assert printed == [  # Wilson, by hand: (k + z²/2 ± z √(k (n - k)/n + z²/4)) / (n + z²)
        "new: 70% [40%, 89%] of 10 captions right",
        "old: 50% [9%, 91%] of 2 captions right",
    ]
    for wrong in ("1\tA\tyes", "1\tC\t1", "11\tA\t1", lines[1]):
        (tmp_path / "judgements.tsv").write_text("\n".join([*lines, wrong]))
        with pytest.raises(ValueError, match=f"line {len(lines) + 1}"):
            judged(tmp_path)
