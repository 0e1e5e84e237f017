"""Whatever form a person's pairs have, the same pairs are read; what cannot be used is counted, not fatal."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import warnings
import zlib

import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from tests.conftest import REPO, random_image, tiny_tokenizer
from training.lib.pairs import PairStream, load_pairs, read_pairs, read_texts, unknown_token_message


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


def lines(folder, name, *texts, end="\n"):
    (folder / name).write_bytes(end.join([*texts, ""]).encode())
    return folder / name


def each(form):
    """One text a caption."""
    return [form.format(image=image, n=n, text=c) for image in CAPTIONS for n, c in enumerate(CAPTIONS[image])]


def coco_layout(folder):
    """As it is unpacked: annotations/ beside the folder of the images."""
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    for name in CAPTIONS:
        (folder / name).rename(folder / "train2017" / name)
    return coco(folder).rename(folder / "annotations" / "captions_train2017.json")


def karpathy(folder):
    """The last image is of another split."""
    images = [
        {"filename": name, "imgid": i, "split": split, "sentences": [{"raw": c, "tokens": []} for c in CAPTIONS[name]]}
        for i, (name, split) in enumerate(zip([*CAPTIONS, "a.png"], ("train", "train", "train", "val")))
    ]
    return lines(folder, "dataset.json", json.dumps({"images": images, "dataset": "x"}))


def blip(folder):
    rows = [{"image": i, "caption": c, "image_id": f"coco_{i}"} for i in CAPTIONS for c in CAPTIONS[i]]
    return lines(folder, "karpathy_train.json", json.dumps(rows))


def captioned(folder):
    """What `blip-rbm caption --json` writes."""
    rows = [
        {"image": str(folder / i), "captions": [{"generated_text": c, "score": -1.5} for c in CAPTIONS[i]]}
        for i in CAPTIONS
    ]
    return lines(folder, "own.jsonl", *map(json.dumps, rows))


def zipped(folder):
    content = gzip.compress(json_lines(folder).read_bytes())
    (folder / "pairs.jsonl").unlink()
    (folder / "pairs.jsonl.gz").write_bytes(content)
    return folder / "pairs.jsonl.gz"


def sidecars(folder):
    for name, suffix in zip(CAPTIONS, (".txt", ".caption", ".png.txt")):
        (folder / name).with_suffix(suffix).write_text("\r\n".join(CAPTIONS[name]) + "\r\n")
    (folder / "10_dog").mkdir()
    for file in list(folder.glob("*.*")):
        file.rename(folder / "10_dog" / file.name)
    (folder / "10_dog" / "._a.png").write_text("what a system hides")
    (folder / "10_dog" / "again").symlink_to(folder)  # for ever
    return folder


def metadata_above(folder):
    """metadata.jsonl above train/ and test/; an image called as another split."""
    (folder / "train").mkdir()
    for name in CAPTIONS:
        (folder / name).rename(folder / "train" / name)
    (folder / "test").mkdir()
    random_image(41, 43).save(folder / "test" / "train of b.png")
    rows = [{"file_name": f"train/{i}", "text": c} for i in CAPTIONS for c in CAPTIONS[i]]
    rows.append({"file_name": "test/train of b.png", "text": "a train"})
    lines(folder, "metadata.jsonl", *map(json.dumps, rows))
    return folder


def images_below(folder):
    """Flickr30k as Kaggle has it: bars, blanks, quotes that are not closed; the images in a folder."""
    (folder / "flickr30k_images").mkdir()
    for name in CAPTIONS:
        (folder / name).rename(folder / "flickr30k_images" / name)
    return lines(folder, "results.csv", "image_name| comment_number| comment", *each("{image}| {n}| {text}"))


SOURCES = {
    "coco": coco,
    "coco as unpacked": coco_layout,
    "karpathy": karpathy,
    "blip": blip,
    "caption --json": captioned,
    "csv": lambda folder: table(folder, "pairs.csv", ","),
    "tsv": lambda folder: table(folder, "pairs.tsv", "\t"),
    "semicolons, byte order mark, CRLF": lambda folder: lines(
        folder, "x.csv", "\ufeffImage;Caption", *each('{image};"{text}"'), end="\r\n"
    ),
    "utf-16": lambda folder: (
        lines(folder, "x.txt", "image\tcaption", *each("{image}\t{text}")).write_text(
            "image\tcaption\n" + "\n".join(each("{image}\t{text}")), encoding="utf-16"
        )
        and folder / "x.txt"
    ),
    "kaggle flickr8k": lambda folder: lines(folder, "captions.txt", "image,caption", *each("{image},{text}")),
    "kaggle flickr30k": images_below,
    "flickr8k tokens": lambda folder: lines(folder, "Flickr8k.token.txt", *each("{image}#{n}\t{text}")),
    "flickr8k tokens under a header": lambda folder: lines(
        folder, "x.txt", "image|caption", *each("{image}#{n}|{text}")
    ),
    "kohya meta": lambda folder: lines(
        folder, "meta_cap.json", json.dumps({image: {"caption": captions} for image, captions in CAPTIONS.items()})
    ),
    "jsonl": json_lines,
    "jsonl.gz": zipped,
    "imagefolder": image_folder,
    "imagefolder above its splits": metadata_above,
    "text files beside images": sidecars,
    "arrow": arrow,
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_form_gives_the_same_pairs(photos, source):
    dataset, card = read_pairs(SOURCES[source](photos), "train")
    assert dataset["captions"][:] == list(CAPTIONS.values())
    assert [image.size for image in dataset["image"]] == [(29, 37), (30, 37), (31, 37)]
    assert (card.images, card.captions, card.captions_per_image) == (3, 6, (1, 2.0, 3)) and not card.dropped
    assert card.modes == {"RGB": 1, "L": 1, "RGBA": 1} and card.sides == (29, 37)


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "arrow"])
def test_a_stream_is_the_same_as_what_is_read(photos, source):
    path = SOURCES[source](photos)
    rows, (dataset, _) = list(PairStream(path, "train")), read_pairs(path, "train")
    assert [row["captions"] for row in rows] == list(CAPTIONS.values())
    assert [row["image_id"] for row in rows] == dataset["image_id"][:]
    assert [row["image"].size for row in rows] == [(29, 37), (30, 37), (31, 37)]


def test_rows_that_cannot_be_used_are_counted(tmp_path, photos, capsys):
    good = {"bytes": (photos / "a.png").read_bytes(), "path": None}
    other = {"bytes": (photos / "b.png").read_bytes(), "path": None}
    rows = [
        (good, "a dog", "1"),
        (good, "the dog", "1"),  # the same image: one more caption
        (other, "a cat", "1"),  # another image
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
    assert dataset["captions"][:] == [["a dog", "the dog"], ["a cat"], ["кошка"]]
    first, second, third = dataset["image_id"]
    assert (first, third) == ("1", "7") and second.startswith("1-")
    assert card.dropped == {"no caption": 2, "no image": 1, "image cannot be read": 2}
    assert (card.not_ascii, card.rows, card.shared_ids, card.repeated_images) == (1, 9, 1, 1)
    load_pairs(tmp_path / "x", "train")
    assert "dropped 2: image cannot be read" in capsys.readouterr().out


def test_what_is_wrong_is_named(photos):
    file = table(photos, "pairs.csv", ",")
    with pytest.raises(
        ValueError, match=r"no column 'words' for the caption; the data have \['caption', 'file_name'\]"
    ):
        read_pairs(file, "train", caption_column="words")
    (photos / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="other.json holds JSON, but neither COCO captions"):
        read_pairs(photos / "other.json", "train")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_pairs(photos / "absent" / "pairs.csv", "train")
    for image in photos.glob("*.png"):
        image.unlink()
    with pytest.raises(ValueError, match=r"none of its 6 rows can be used: \{'image file is missing': 6\}"):
        read_pairs(file, "train")


def test_one_id_of_two_files_is_two_images_and_ids_stay_as_they_are_written(photos):
    rows = ["image,caption,image_id", "a.png,one,1", "b.png,two,1", "c.png,three,01", "a.png,four,1", "b.png,five,1.0"]
    file = lines(photos, "x.csv", *rows, "c.png,six,", "a.png,seven,")
    dataset, card = read_pairs(file, "train")
    assert dataset["captions"][:] == [["one", "four"], ["two"], ["three"], ["five"], ["six"], ["seven"]]
    ids = dataset["image_id"][:]
    assert (
        ids[0] == "1"
        and ids[1].startswith("1-")
        and ids[2:] == ["01", "1.0", "c.png", "a.png"]
        and card.shared_ids == 1
    )
    assert [row["image_id"] for row in PairStream(file, "train")] == [
        *ids[:3],
        "1",
        *ids[3:],
    ]  # it has forgotten the first
    numbered = lines(photos, "y.jsonl", *(json.dumps({"id": n, "image": "a.png", "text": str(n)}) for n in (5, 7)))
    assert read_pairs(numbered, "train")[0]["captions"][:] == [["5", "7"]]  # "id" may be of the caption


def test_coco_with_an_id_of_two_files_is_refused(photos):
    content = json.loads(coco(photos).read_text())
    content["images"][1]["id"] = 7
    (photos / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="image id 7 stands for two files, a.png and b.png"):
        read_pairs(photos / "captions.json", "train")


def test_paths_are_meant_from_the_data_file(photos, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    random_image(53, 59).save(elsewhere / "a.png")
    monkeypatch.chdir(elsewhere)
    file = table(photos, "pairs.csv", ",")
    assert read_pairs(file, "train")[0][0]["image"].size == (29, 37)
    assert read_pairs(file, "train", image_dir=elsewhere)[0]["image"][0].size == (53, 59)
    (photos / "a.png").unlink()
    with pytest.raises(
        ValueError, match=f"image a.png is in the working directory, but not where .*{photos.name}.*--image_dir ."
    ):
        read_pairs(file, "train")
    with pytest.raises(ValueError, match="--image_dir nowhere: no such folder"):
        read_pairs(file, "train", image_dir="nowhere")


def png_header(width, height):
    """A PNG that claims to be large."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(97))) + chunk(b"IEND", b"")


def test_one_image_that_cannot_be_decoded_is_dropped_by_name(photos):
    jpeg = io.BytesIO()
    random_image(211, 223).save(jpeg, "jpeg")
    bad = {
        "cut.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "large.png": png_header(10_007, 10_009),
        "bomb.png": png_header(30_011, 30_013),
        "empty.png": b"",
        "phone.heic": b"\0\0\0\x18ftypheic",
    }
    for name, content in bad.items():
        (photos / name).write_bytes(content)
    os.mkfifo(photos / "pipe.png")
    names = [
        "cut.jpg",
        "large.png",
        "bomb.png",
        "empty.png",
        "phone.heic",
        "pipe.png",
        "x" * 300,
        "http://x.org/a.png",
        "\0",
        "a.png",
    ]
    file = lines(photos, "x.jsonl", *(json.dumps({"image": name, "caption": "a dog"}) for name in names))
    with warnings.catch_warnings():
        warnings.simplefilter("error", PILImage.DecompressionBombWarning)
        dataset, card = read_pairs(file, "train")
        streamed = list(stream := PairStream(file, "train"))
    assert dataset["captions"][:] == [["a dog"]] and dataset[0]["image"].size == (29, 37)
    many = "image has too many pixels (more than 89 million)"
    expected = {
        "image file is missing": 3,
        "image is an internet address, which is never fetched": 1,
        "image cannot be read": 3,
        many: 2,
    }
    assert card.dropped == expected
    assert any("cut.jpg' in x.jsonl, line 1" in name for name in card.names["image cannot be read"])
    assert len(streamed) == 1 and stream.dropped == expected
    assert read_pairs(file, "train")[1] == card  # remembered
    (photos / "cut.jpg").write_bytes(jpeg.getvalue())
    assert read_pairs(file, "train")[1].images == 2  # until a file changes


def test_text_of_a_table_stays_text(photos):
    texts = ["None", "null", "NA", "n/a", "12", "1e5", 'two "dogs"', "a, b", ""]
    for number in range(len(texts)):
        random_image(29, 31 + number).save(photos / f"{number}.png")
    with (photos / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{n}.png", text) for n, text in enumerate(texts))])
    dataset, card = read_pairs(photos / "x.csv", "train")
    assert dataset["captions"][:] == [[text] for text in texts[:-1]]
    assert card.dropped == {"no caption": 1} and card.names == {"no caption": ["'8.png' in x.csv, line 10"]}
    assert card.repeated_images == 0
    file = lines(photos, "y.csv", "image,caption", "0.png,a dog, a cat", "1.png,a dog", "1.png,a dog")
    dataset, card = read_pairs(file, "train")
    assert dataset["captions"][:] == [["a dog, a cat"], ["a dog", "a dog"]] and card.repeated_captions == 1
    file = lines(photos, "y.tsv", "image\tcaption", '0.png\t"Stop" says a sign', '1.png\ta 12" ball, "red', "2.png")
    dataset, card = read_pairs(file, "train")
    assert dataset["captions"][:] == [['"Stop" says a sign'], ['a 12" ball, "red']] and card.dropped == {
        "no caption": 1
    }
    file = lines(photos, "z.jsonl", json.dumps({"image": "0.png", "captions": [7, "", None, "a \ud800 b"]}))
    dataset, card = read_pairs(file, "train")
    assert dataset["captions"][:] == [["7", "a b"]] and card.dropped == {"empty caption": 2}


def test_splits(photos):
    file = karpathy(photos)
    assert len(read_pairs(file, "val")[0]) == len(read_pairs(file, "validation")[0]) == 1
    assert len(read_pairs(file, "train+validation")[0]) == 4  # one file under two ids
    assert read_pairs(file, "train[:1]")[0]["captions"][:] == [CAPTIONS["a.png"]]
    with pytest.raises(ValueError, match=r"has no split 'test'; it has train \(3 rows\), validation \(1 rows\)"):
        read_pairs(file, "test")
    file.unlink()
    folder = metadata_above(photos)
    assert read_pairs(folder, "test")[0]["captions"][:] == [["a train"]]
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "test.png", "text": "x"}))
    assert read_pairs(folder, "train")[1].dropped == {"outside of the folders of the splits (train, test)": 1}
    (folder / "metadata.jsonl").unlink()
    lines(folder, "train.csv", "image,text", "train/a.png,x")
    lines(folder, "val.csv", "image,text", "train/b.png,y")
    assert read_pairs(folder, "validation")[0]["captions"][:] == [["y"]]
    with pytest.raises(ValueError, match="has no split test; it has train, validation"):
        read_pairs(folder, "test")
    lines(folder, "other.csv", "image,text", "train/b.png,y")
    with pytest.raises(ValueError, match=r"several data files \(other.csv, train.csv, val.csv\): give one"):
        read_pairs(folder, "train")


DAMAGED = {
    "not UTF-8": ("x.csv", "image,caption\na.png,café\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8.*iconv"),
    "open quote": (
        "x.csv",
        b'image,caption\na.png,"a dog\nb.png,a cat\n',
        "x.csv, line 3: .*every quoted text is closed",
    ),
    "surplus field": ("x.csv", b"image,caption,n\na.png,a,dog,7\n", "line 2 has 4 fields, but there are 3 columns"),
    "one name twice": ("x.csv", b"image,text,text\na.png,x,y\n", "x.csv: 3 columns, but several are called 'text'"),
    "cut document": ("x.json", b'{"images": [{"id": 1}', "x.json is not JSON, or cut off"),
    "damaged line": ("x.jsonl", b'{"image": "a.png", "caption": "x"}\n{"image": \n', "x.jsonl, line 2 is not JSON"),
    "a line that is a list": ("x.jsonl", b'{"image": "a.png"}\n["b.png"]\n', "line 2 is .*, but must be an object"),
    "cut archive": ("x.jsonl.gz", gzip.compress(b"{}" * 97)[:23], "x.jsonl.gz is damaged"),
    "entries of another kind": ("x.json", b'{"images": [3], "annotations": [5]}', "x.json is damaged"),
    "empty": ("x.csv", b"\n", "x.csv is empty"),
    "binary": ("x.csv", b"a\0b", "neither text nor"),
    "an image": ("x.png", b"", "is no data file: give the folder"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_the_damaged_line_is_named(photos, case):
    name, content, message = DAMAGED[case]
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(photos / name, "train")


def test_folders_without_captions(photos):
    with pytest.raises(ValueError, match="holds 3 images, but no captions: put photo.txt beside photo.jpg"):
        read_pairs(photos, "train")
    (photos / "a.txt").write_text("a dog")
    (photos / os.fsdecode(b"\xff.png")).write_bytes(b"")
    (photos / os.fsdecode(b"\xff.txt")).write_text("x")
    dataset, card = read_pairs(photos, "train")
    assert dataset["image_id"][:] == ["a.png"] and card.dropped == {"no caption": 2, "image file name is not UTF-8": 1}
    str(card).encode()  # can be printed
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has train \(4 rows\)"):
        read_pairs(photos, "validation")


def test_captions_without_images(tmp_path):
    rows = [{"image_id": 9, "captions": ["a dog", " "]}, {"image_id": 25, "captions": ["a cat", "the cat"]}]
    file = lines(tmp_path, "texts.jsonl", *map(json.dumps, rows))
    with pytest.raises(ValueError, match="no column for the image .* captions without images, a captioner cannot"):
        read_pairs(file, "train")
    assert read_texts(file) == [["a dog"], ["a cat", "the cat"]]
    file = lines(tmp_path, "names.jsonl", *(json.dumps({"image": f"{n}.jpg", "text": "x"}) for n in (3, 5, 3)))
    with pytest.raises(
        ValueError, match="none of its 3 rows can be used: .*looked for in .*--image_dir.*without images"
    ):
        read_pairs(file, "train")
    assert read_texts(file) == [["x", "x"], ["x"]]


def test_words_that_the_vocabulary_lacks_are_named():
    tokenizer = tiny_tokenizer()
    assert unknown_token_message([["a dog", "the cat runs"], ["dogs"]], tokenizer) is None
    said = unknown_token_message(["a dog", "一只猫 on grass", "猫"], tokenizer)
    assert said.startswith("50 % of the words of the captions are not in the vocabulary ([UNK]): '猫', '一', '只'.")
    assert unknown_token_message([["a dog"] * 97, ["zebra"]], tokenizer) is None  # one of 195 words


def test_the_command_says_what_is_read(photos):
    command = [sys.executable, "-m", "training.lib.pairs", "--dataset", str(table(photos, "pairs.csv", ","))]
    ran = subprocess.run([*command, "--output", str(photos / "card.json")], cwd=REPO, capture_output=True, text=True)
    assert ran.returncode == 0 and "3 images, 6 captions (1 to 3 an image" in ran.stdout, ran.stderr
    assert json.loads((photos / "card.json").read_text())["captions"] == 6
