"""Image-caption pairs from whatever a person has: a Hub id, parquet, Arrow, an imagefolder, COCO captions, CSV or JSON lines.

python -m training.pairs --dataset my-photos --split train        # what would be read, and what dropped
"""

import argparse
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
from datasets import Dataset, Image, load_dataset, load_from_disk
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from training.lib.checkpoints import write_json


IMAGE_COLUMNS = ("image", "img", "image_path", "file_name", "filename", "path", "jpg", "png")
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "sentences", "raw", "txt", "description")
ID_COLUMNS = ("image_id", "id", "img_id")


@dataclass
class PairsCard:
    """What was read: counts and sizes, and rows dropped by reason."""

    source: str
    split: str
    rows: int
    images: int
    captions: int
    captions_per_image: tuple[int, float, int]  # least, mean, most
    words_per_caption: tuple[int, float, int]
    sides: tuple[int, int]  # least and most pixels of an image's side
    modes: dict[str, int]  # RGB, L, ...
    not_ascii: int  # captions that hold other than ASCII letters
    dropped: dict[str, int]

    def __str__(self):
        least, mean, most = self.captions_per_image
        lines = [
            f"{self.source} ({self.split}): {self.images:,} images, {self.captions:,} captions ({least} to {most} an image, "
            f"{mean:.1f} on average; {self.words_per_caption[1]:.1f} words each)",
            f"  sides {self.sides[0]} to {self.sides[1]} pixels; modes {self.modes}; captions not ASCII: {self.not_ascii:,}",
        ]
        lines += [f"  dropped {number:,}: {reason}" for reason, number in self.dropped.items()]
        return "\n".join(lines)


def find_column(columns, wanted: str | None, known: tuple[str, ...], what: str) -> str:
    """The column that was asked for, or the first that is known.

    Raises:
        ValueError: if there is none, with what there is.
    """
    if wanted is not None and wanted not in columns:
        raise ValueError(f"there is no column {wanted!r} for the {what}; the data have {sorted(columns)}")
    column = wanted or next((name for name in known if name in columns), None)
    if column is None:
        raise ValueError(
            f"no column for the {what} was found among {sorted(columns)}; say which it is with --{what}_column (known by "
            f"themselves: {', '.join(known)})"
        )
    return column


def read_table(path: str, split: str):
    """The rows as they are: a dataset, and the folder that relative image paths are meant from."""
    file = Path(path)
    if file.suffix == ".json" and file.is_file():
        return read_coco(file), file.parent
    if file.suffix in (".csv", ".tsv", ".jsonl") and file.is_file():
        kind, extra = (
            ("json", {}) if file.suffix == ".jsonl" else ("csv", {"sep": "\t" if file.suffix == ".tsv" else ","})
        )
        part = "train" + split[split.index("[") :] if "[" in split else "train"  # a file is one split
        return load_dataset(kind, data_files=str(file), split=part, **extra), file.parent
    if (file / "dataset_info.json").exists() or (file / "dataset_dict.json").exists():
        saved = load_from_disk(str(file))
        return (saved[split] if hasattr(saved, "keys") else saved), file
    if file.suffix and not file.exists() and len(file.parts) > 2:
        raise ValueError(f"{path}: no such file or folder")
    return load_dataset(str(path), split=split), file


def read_coco(file: Path) -> Dataset:
    """COCO's captions_*.json: `images` with ids and file names, `annotations` with captions.

    Raises:
        ValueError: if the file is of another kind.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(
            f"{file} is no COCO caption file: it lacks 'images' or 'annotations'. For JSON lines, name it .jsonl"
        )
    captions = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
    return Dataset.from_dict(
        {
            "image": [image["file_name"] for image in content["images"]],
            "captions": [captions.get(image["id"], []) for image in content["images"]],
            "image_id": [str(image["id"]) for image in content["images"]],
        }
    )


def clean_captions(value) -> list[str]:
    """The captions of a row: one text, or a list of them; without empty ones."""
    values = [value] if isinstance(value, str) else list(value or [])
    return [" ".join(text.split()) for text in values if isinstance(text, str) and text.strip()]


def image_header(image: dict | str | None, folder: Path) -> tuple[dict, tuple[int, int], str]:
    """A row's image as {"bytes", "path"}, its size and mode; only the head of the file is decoded.

    Raises:
        ValueError: why it cannot be used.
    """
    if isinstance(image, str):
        image = {"bytes": None, "path": image}
    if not image or not (image.get("bytes") or image.get("path")):
        raise ValueError("no image")
    if not image.get("bytes"):
        path = Path(image["path"])
        path = path if path.is_absolute() or path.exists() else folder / path
        if not path.is_file():
            raise ValueError("image file is missing")
        image = {"bytes": None, "path": str(path)}
    try:
        with PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
            return image, opened.size, opened.mode
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise ValueError("image cannot be read") from None


def content_hash(image: dict) -> bytes | None:
    """Of an image's encoded bytes, if the data hold them."""
    return hashlib.sha256(image["bytes"]).digest() if image.get("bytes") else None


def collect(table: Dataset, folder: Path, image_column: str, caption_column: str, id_column: str | None):
    """Rows of one image each, in the order of their first appearance; and what was dropped, seen and measured."""
    rows, dropped, modes, sides = {}, Counter(), Counter(), []
    if isinstance(table.features[image_column], Image):
        table = table.cast_column(image_column, Image(decode=False))
    for number, row in enumerate(table.select_columns([c for c in (image_column, caption_column, id_column) if c])):
        captions = clean_captions(row[caption_column])
        if not captions:
            dropped["no caption"] += 1
            continue
        image = row[image_column]
        path = image if isinstance(image, str) else None
        key = str(row[id_column]) if id_column else path or str(number)
        if key in rows:
            same = path is not None or (image and content_hash(image) == rows[key]["hash"])
            if same:  # one caption a row
                rows[key]["captions"] += captions
            else:
                dropped["image id stands for another image already"] += 1
            continue
        try:
            image, size, mode = image_header(image, folder)
        except ValueError as reason:
            dropped[str(reason)] += 1
            continue
        # the image itself stays on disk: memory does not grow with the size of the images
        rows[key] = {
            "path": image["path"],
            "hash": content_hash(image),
            "captions": captions,
            "image_id": key,
            "row": number,
        }
        modes[mode] += 1
        sides += size
    return list(rows.values()), dropped, modes, sides


def spread(numbers) -> tuple[int, float, int]:
    return min(numbers, default=0), sum(numbers) / max(len(numbers), 1), max(numbers, default=0)


def read_pairs(
    path: str, split: str, image_column: str | None = None, caption_column: str | None = None
) -> tuple[Dataset, PairsCard]:
    """All usable pairs of a source, and what was read and dropped.

    Args:
        path: a Hub id; a local folder (parquet, Arrow, imagefolder with metadata.csv or .jsonl); a file: COCO captions (.json), .csv,
            .tsv, .jsonl. One caption a row or several; rows of one image are put together.
        split: name of the split, or a slice such as "train[:100]".
        image_column, caption_column: their names, if they are not the usual ones.

    Returns:
        A dataset with the columns `image` (PIL when read), `captions` (list of str) and `image_id` (str), and its card.

    Raises:
        ValueError: if a column is missing, or nothing usable is left.
    """
    table, folder = read_table(str(path), split)
    # what reading took, and keeps in case it is needed again: 60 MB for 24,000 images
    pyarrow.default_memory_pool().release_unused()
    columns = table.column_names
    image_column = find_column(columns, image_column, IMAGE_COLUMNS, "image")
    caption_column = find_column(columns, caption_column, CAPTION_COLUMNS, "caption")
    id_column = next((name for name in ID_COLUMNS if name in columns and name != image_column), None)
    rows, dropped, modes, sides = collect(table, folder, image_column, caption_column, id_column)
    if not rows:
        raise ValueError(
            f"{path} ({split}): none of its {len(table)} rows can be used: {dict(dropped) or 'it is empty'}"
        )
    captions = [caption for row in rows for caption in row["captions"]]
    card = PairsCard(
        source=str(path),
        split=split,
        rows=len(table),
        images=len(rows),
        captions=len(captions),
        captions_per_image=spread([len(row["captions"]) for row in rows]),
        words_per_caption=spread([len(caption.split()) for caption in captions]),
        sides=(min(sides), max(sides)),
        modes=dict(modes),
        not_ascii=sum(not caption.isascii() for caption in captions),
        dropped=dict(dropped),
    )
    if isinstance(table.features[image_column], Image):  # stays memory-mapped: no image is copied
        pairs = table.select([row["row"] for row in rows]).select_columns(image_column)
        pairs = pairs if image_column == "image" else pairs.rename_column(image_column, "image")
    else:
        pairs = Dataset.from_dict({"image": [row["path"] for row in rows]}).cast_column("image", Image())
    for column in ("captions", "image_id"):
        pairs = pairs.add_column(column, [row[column] for row in rows])
    return pairs, card


def load_pairs(path: str, split: str, max_images: int | None = None, **columns) -> Dataset:
    """The pairs of `read_pairs`, the first `max_images` of them; prints what was dropped."""
    dataset, card = read_pairs(path, split, **columns)
    if card.dropped:
        print(card)
    return dataset if max_images is None else dataset.select(range(min(max_images, len(dataset))))


class PairStream:
    """The pairs of a source one after the other, `{image, captions, image_id}`, never all on disk. Rows of one image are put together if
    they follow one another. What cannot be used is counted in `dropped`.

    Args:
        path: a Hub id, or a local folder of parquet files or images.
        max_images: end after so many.
    """

    def __init__(self, path: str, split: str, max_images: int | None = None, image_column=None, caption_column=None):
        self.path, self.split, self.max_images = str(path), split, max_images
        # a shard a row group: of a larger one the reader takes up to a gigabyte ahead
        self.table = load_dataset(self.path, split=split, streaming=True).reshard()
        columns = self.table.column_names or list(next(iter(self.table), {}))
        self.image_column = find_column(columns, image_column, IMAGE_COLUMNS, "image")
        self.caption_column = find_column(columns, caption_column, CAPTION_COLUMNS, "caption")
        self.id_column = next((name for name in ID_COLUMNS if name in columns and name != self.image_column), None)
        self.dropped = Counter()

    @property
    def fingerprint(self) -> str:
        """Of where the pairs come from: the images themselves cannot be known before they are read."""
        source = self.path if not Path(self.path).exists() else str(Path(self.path).resolve())
        return f"stream of {source}, {self.split}, {self.max_images}, {self.image_column}, {self.caption_column}"

    def rows(self) -> Iterator[dict]:
        """One row an image, unless another image stands between its rows."""
        table = self.table.cast_column(self.image_column, Image(decode=False))
        pending = None
        for number, row in enumerate(table):
            captions = clean_captions(row[self.caption_column])
            if not captions:
                self.dropped["no caption"] += 1
                continue
            try:
                image, _, _ = image_header(row[self.image_column], Path(self.path))
            except ValueError as reason:
                self.dropped[str(reason)] += 1
                continue
            key = str(row[self.id_column]) if self.id_column else image["path"] or str(number)
            if pending and pending["image_id"] == key:
                pending["captions"] += captions
                continue
            if pending:
                yield pending
            pending = {"image": image, "captions": captions, "image_id": key}
        if pending:
            yield pending

    def __iter__(self) -> Iterator[dict]:
        self.dropped.clear()
        for number, row in enumerate(self.rows()):
            if number == self.max_images:
                return
            image = row["image"]
            opened = PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
            yield row | {"image": opened}

    def __repr__(self):
        return f"{self.path} ({self.split}, streamed)"


def main():
    parser = argparse.ArgumentParser(description="Show what is read of a dataset of image-caption pairs.")
    parser.add_argument("--dataset", required=True, help="Hub id, folder or file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column")
    parser.add_argument("--caption_column")
    parser.add_argument("--output", help="save the card as JSON")
    args = parser.parse_args()
    _, card = read_pairs(args.dataset, args.split, args.image_column, args.caption_column)
    print(card)
    if args.output:
        write_json(args.output, asdict(card))


if __name__ == "__main__":
    main()
