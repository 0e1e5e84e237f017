"""Whatever form a person's pairs have, the same pairs are read; what cannot be used is counted, not fatal."""

import csv
import json

import pytest
from datasets import Dataset, Features, Image, Value

from tests.conftest import random_image
from training.lib.pairs import load_pairs, read_pairs


CAPTIONS = {"a.png": ["a dog", "the dog runs"], "b.png": ["a cat"], "c.png": ["snow", "a beach", "grass"]}


@pytest.fixture
def photos(tmp_path):
    for number, (name, mode) in enumerate(zip(CAPTIONS, ("RGB", "L", "RGBA"))):
        random_image(29 + number, 37).convert(mode).save(tmp_path / name)
    return tmp_path


def coco(folder):
    images = [{"id": 7 + i, "file_name": name} for i, name in enumerate(CAPTIONS)]
    annotations = [{"image_id": 7 + i, "caption": c} for i, name in enumerate(CAPTIONS) for c in CAPTIONS[name]]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


def table(folder, name, separator):
    """One caption a row."""
    with (folder / name).open("w", newline="") as file:
        rows = csv.writer(file, delimiter=separator)
        rows.writerow(["file_name", "caption"])
        rows.writerows((image, caption) for image, captions in CAPTIONS.items() for caption in captions)
    return folder / name


def json_lines(folder, name="pairs.jsonl"):
    lines = [json.dumps({"file_name": image, "text": captions}) for image, captions in CAPTIONS.items()]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def image_folder(folder):
    json_lines(folder, "metadata.jsonl")
    return folder


def arrow(folder):
    rows = {"image": [str(folder / name) for name in CAPTIONS], "sentences": list(CAPTIONS.values())}
    Dataset.from_dict(rows).cast_column("image", Image()).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = {
    "coco": coco,
    "csv": lambda folder: table(folder, "pairs.csv", ","),
    "tsv": lambda folder: table(folder, "pairs.tsv", "\t"),
    "jsonl": json_lines,
    "imagefolder": image_folder,
    "arrow": arrow,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_gives_the_same_pairs(photos, source):
    dataset, card = read_pairs(SOURCES[source](photos), "train")
    assert dataset["captions"][:] == list(CAPTIONS.values())
    assert [image.size for image in dataset["image"]] == [(29, 37), (30, 37), (31, 37)]
    assert (card.images, card.captions, card.captions_per_image) == (3, 6, (1, 2.0, 3)) and not card.dropped
    assert card.modes == {"RGB": 1, "L": 1, "RGBA": 1} and card.sides == (29, 37)


def test_rows_that_cannot_be_used_are_counted(tmp_path, photos, capsys):
    good = {"bytes": (photos / "a.png").read_bytes(), "path": None}
    other = {"bytes": (photos / "b.png").read_bytes(), "path": None}
    rows = [
        (good, "a dog", "1"),
        (good, "the dog", "1"),  # the same image: one more caption
        (other, "a cat", "1"),  # its id is taken
        (other, " ", "2"),
        (other, None, "3"),
        (None, "a cat", "4"),
        ({"bytes": b"no image", "path": None}, "a cat", "5"),
        ({"bytes": good["bytes"][:20], "path": None}, "a cat", "6"),
        (other, "кошка", "7"),
    ]
    columns = dict(zip(("image", "caption", "image_id"), map(list, zip(*rows))))
    features = Features({"image": Image(decode=False), "caption": Value("string"), "image_id": Value("string")})
    Dataset.from_dict(columns, features=features).cast_column("image", Image()).to_parquet(
        tmp_path / "x" / "train.parquet"
    )
    dataset, card = read_pairs(tmp_path / "x", "train")
    assert dataset["captions"][:] == [["a dog", "the dog"], ["кошка"]] and dataset["image_id"][:] == ["1", "7"]
    assert card.dropped == {
        "image id stands for another image already": 1,
        "no caption": 2,
        "no image": 1,
        "image cannot be read": 2,
    }
    assert card.not_ascii == 1 and card.rows == 9
    load_pairs(tmp_path / "x", "train")
    assert "dropped 2: image cannot be read" in capsys.readouterr().out


def test_what_is_wrong_is_named(photos):
    file = table(photos, "pairs.csv", ",")
    with pytest.raises(
        ValueError, match=r"no column 'words' for the caption; the data have \['caption', 'file_name'\]"
    ):
        read_pairs(file, "train", caption_column="words")
    (photos / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"is no COCO caption file"):
        read_pairs(photos / "other.json", "train")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_pairs(photos / "absent" / "pairs.csv", "train")
    for image in photos.glob("*.png"):
        image.unlink()
    with pytest.raises(ValueError, match=r"none of its 6 rows can be used: \{'image file is missing': 6\}"):
        read_pairs(file, "train")
