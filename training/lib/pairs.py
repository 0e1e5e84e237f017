"""Image-caption pairs from whatever a person has (`readers.py`): what can be used, and what had to be left out.

python -m training.pairs --dataset my-photos --split train        # what would be read, and what dropped
"""

import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import pyarrow
from datasets import Dataset, Features, Image, Value

from training.lib.checkpoints import write_json
from training.lib.image_files import ImageFinder, UnusableImage, check_batch, check_images
from training.lib.readers import Columns, Row, Source, caption_values, read_source


NAMED = 5  # so many of the dropped are named
ASKED = 20_000  # about so many captions, evenly spread, tell whether a vocabulary lacks words


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
    names: dict[str, list[str]] = field(default_factory=dict)  # the first of the dropped, by reason
    splits: dict[str, int] = field(default_factory=dict)  # rows of every split that was found
    repeated_captions: int = 0  # that their image has already; kept
    repeated_images: int = 0  # of the same content as one before, under another id or path; kept
    shared_ids: int = 0  # images whose id another one has already: theirs was made longer

    def __str__(self):
        least, mean, most = self.captions_per_image
        lines = [
            f"{self.source} ({self.split}): {self.images:,} images, {self.captions:,} captions ({least} to {most} an "
            f"image, {mean:.1f} on average; {self.words_per_caption[1]:.1f} words each)",
            f"  sides {self.sides[0]} to {self.sides[1]} pixels; modes {self.modes}; captions not ASCII: "
            f"{self.not_ascii:,}",
        ]
        if len(self.splits) > 1:
            lines.append("  splits: " + ", ".join(f"{name} {rows:,}" for name, rows in self.splits.items()))
        notes = {
            "captions that their image has already": self.repeated_captions,
            "images of the same content as one before": self.repeated_images,
            "images whose id another image has: theirs was made longer": self.shared_ids,
        }
        lines += [f"  kept {number:,}: {what}" for what, number in notes.items() if number]
        for reason, number in self.dropped.items():
            named = self.names.get(reason, [])
            more = ", ..." * (number > len(named))
            lines.append(f"  dropped {number:,}: {reason}" + f" ({'; '.join(named)}{more})" * bool(named))
        return "\n".join(lines)


class Drops:
    """What is left out: `counts` by reason, and the first `names`."""

    def __init__(self):
        self.counts, self.names = Counter(), {}

    def add(self, reason: str, row: Row, number: int = 1):
        self.counts[reason] += number
        named = self.names.setdefault(reason, [])
        image = row.image.get("path") if isinstance(row.image, dict) else row.image
        if len(named) < NAMED and isinstance(image, str):
            named.append(f"{image[:99]!r}" + f" in {row.where}" * (image != row.where))
        elif len(named) < NAMED:
            named.append(row.where)


def clean_captions(row: Row, drops: Drops) -> list[str]:
    """The captions of a row, white space as single blanks; empty ones are dropped."""
    values = caption_values(row.captions)
    captions = [" ".join(text.split()) for text in values if text and text.strip()]
    if not captions:
        drops.add("no caption", row)
    elif empty := len(values) - len(captions):
        drops.add("empty caption", row, empty)
    return captions


def find_image(image, find: ImageFinder) -> tuple[dict, str]:
    """An image as {"bytes", "path"}, and what tells it from others: its file, or the hash of its bytes.

    Raises:
        UnusableImage: if there is none.
    """
    image = {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, None)
    if content:
        return {"bytes": content, "path": path}, hashlib.sha256(content).hexdigest()
    if not path or not path.strip():
        raise UnusableImage("no image")
    file = find(path)
    return {"bytes": None, "path": file}, file


class ImageIds:
    """Which rows are of one image, and its id: the id and the image's file or content must be the same. An id that
    another image has is made longer, for the ids tell which images are held back."""

    def __init__(self, folders: list[str]):
        self.folders, self.ids, self.owners, self.shared = folders, {}, {}, 0

    def __call__(self, row: Row, number: int, image: dict, identity: str) -> tuple[tuple, str]:
        """The image's key, and its id."""
        key = (row.image_id if row.names_image else None, identity)
        if key not in self.ids:
            name = row.image if isinstance(row.image, str) else image["path"] if not image["bytes"] else None
            folder = next((folder for folder in self.folders if name and name.startswith(folder + os.sep)), None)
            name = os.path.relpath(name, folder) if folder and not isinstance(row.image, str) else name
            image_id = row.image_id or name or str(number)
            if self.owners.setdefault(image_id, key) != key:
                image_id += "-" + hashlib.sha256((name or identity).encode("utf-8", "surrogatepass")).hexdigest()[:8]
                self.shared += 1
            self.ids[key] = image_id
        return key, self.ids[key]


def collect(source: Source, drops: Drops) -> tuple[list[dict], int, int]:
    """The images in the order of their first appearance, not opened yet; the number of rows, and of images whose id
    another one has."""
    find, images, number = ImageFinder(source.folders), {}, -1
    ids = ImageIds(find.folders)
    for number, row in enumerate(source.rows()):
        captions = clean_captions(row, drops)
        if not captions:
            continue
        try:
            image, identity = find_image(row.image, find)
        except UnusableImage as reason:
            drops.add(str(reason), row)
            continue
        key, image_id = ids(row, number, image, identity)
        if key not in images:
            state = identity
            if not image["bytes"]:
                stat = os.stat(image["path"])
                state = f"{identity}|{stat.st_size}|{stat.st_mtime_ns}"
            # the image itself stays on disk: memory does not grow with the size of the images
            name = row._replace(image=image["path"], captions=None)
            images[key] = {
                "captions": [],
                "rows": 0,
                "number": number,
                "state": state,
                "row": name,
                "image_id": image_id,
            }
            images[key]["path"] = None if image["bytes"] else image["path"]
        images[key]["captions"] += captions
        images[key]["rows"] += 1
    return list(images.values()), number + 1, ids.shared


def images_of(source: Source, images: list[dict]) -> Dataset:
    """A data set with the column `image` of these images: memory-mapped where the data hold them, else by path."""
    if images and all(image["path"] is None for image in images):
        table = source.table.select([image["number"] for image in images]).select_columns(source.image_column)
        table = table if source.image_column == "image" else table.rename_column(source.image_column, "image")
        return table.cast_column("image", Image())
    content = [{"bytes": None, "path": image["path"]} for image in images]
    for image, found in zip(images, content):
        if image["path"] is None:  # some in the data, others in files
            found["bytes"] = source.table[image["number"]][source.image_column]["bytes"]
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    return Dataset.from_dict({"image": content}, features=features).cast_column("image", Image())


def spread(numbers) -> tuple[int, float, int]:
    return min(numbers, default=0), sum(numbers) / max(len(numbers), 1), max(numbers, default=0)


def nothing_left(path, split: str, rows: int, drops: Drops, folders: list[Path]) -> ValueError:
    """What to say if no row can be used."""
    example = next((f", such as {names[0]}" for names in drops.names.values() if names), "")
    said = f"{path} ({split}): none of its {rows} rows can be used: {dict(drops.counts) or 'it is empty'}{example}"
    if drops.counts["image file is missing"]:
        said += (
            f". Image files were looked for in {ImageFinder(folders)}; if they are elsewhere, say where with "
            "--image_dir. If the data are captions without images, they cannot be used here"
        )
    return ValueError(said)


def read_pairs(
    path: str | Path,
    split: str,
    image_column: Optional[str] = None,
    caption_column: Optional[str] = None,
    image_dir: Optional[str] = None,
) -> tuple[Dataset, PairsCard]:
    """All usable pairs of a source, and what was read and dropped.

    Every image is decoded once, to know that it can be; later calls remember it.

    Args:
        path: a Hub id; a local folder (Parquet, Arrow, imagefolder with metadata.csv or .jsonl, text files beside the
            images); a file: captions of COCO, Karpathy, BLIP or Kaggle, CSV, JSON lines (see
            `training/lib/readers.py`). One caption a row or several; rows of one image are put together.
        split: name of the split, or a slice such as "train[:100]".
        image_column, caption_column: their names, if they are not the usual ones.
        image_dir: the folder that relative image paths are meant from, if not the data file's.

    Returns:
        A dataset with the columns `image` (PIL when read), `captions` (list of str) and `image_id` (str), and its card.

    Raises:
        ValueError: if a column is missing, a file or line is damaged, or nothing usable is left.
    """
    source, drops = read_source(str(path), split, Columns(image_column, caption_column, image_dir)), Drops()
    # what reading took, and keeps in case it is needed again: 60 MB for 24,000 images
    pyarrow.default_memory_pool().release_unused()
    images, rows, shared_ids = collect(source, drops)
    if source.outside:
        drops.counts[f"outside of the folders of the splits ({', '.join(source.splits)})"] = source.outside
    checks = check_images(images_of(source, images), [image["state"] for image in images]).to_list() if images else []
    kept = []
    for image, check in zip(images, checks):
        if check["problem"]:
            drops.add(check["problem"], image["row"], image["rows"])
        else:
            kept.append(image | check)
    if not kept:
        raise nothing_left(path, split, rows, drops, source.folders)
    card = card_of(str(path), split, kept, rows, drops)
    card.splits, card.shared_ids = source.splits, shared_ids
    pairs = images_of(source, kept)
    for column in ("captions", "image_id"):
        pairs = pairs.add_column(column, [image[column] for image in kept])
    return pairs, card


def card_of(path: str, split: str, images: list[dict], rows: int, drops: Drops) -> PairsCard:
    """The card of images as `collect` gives them, with what `check_images` found."""
    captions = [caption for image in images for caption in image["captions"]]
    sides = [side for image in images for side in (image["width"], image["height"])]
    return PairsCard(
        source=path,
        split=split,
        rows=rows,
        images=len(images),
        captions=len(captions),
        captions_per_image=spread([len(image["captions"]) for image in images]),
        words_per_caption=spread([len(caption.split()) for caption in captions]),
        sides=(min(sides), max(sides)),
        modes=dict(Counter(image["mode"] for image in images)),
        not_ascii=sum(not caption.isascii() for caption in captions),
        dropped=dict(drops.counts),
        names=drops.names,
        repeated_captions=len(captions) - sum(len(set(image["captions"])) for image in images),
        repeated_images=len(images) - len({image["digest"] for image in images}),
    )


def load_pairs(path: str | Path, split: str, max_images: Optional[int] = None, **columns) -> Dataset:
    """The pairs of `read_pairs`, the first `max_images` of them; prints what was dropped."""
    dataset, card = read_pairs(path, split, **columns)
    if card.dropped or card.shared_ids:
        print(card)
    return dataset if max_images is None else dataset.select(range(min(max_images, len(dataset))))


def read_texts(
    path: str | Path,
    split: str = "train",
    caption_column: Optional[str] = None,
    wanted: Optional[Callable[[str], bool]] = None,
) -> list[list[str]]:
    """The captions of every image of a source, in its order. The images need not exist: `{"image_id": 9, "captions":
    [...]}` is enough.

    Args:
        wanted: tells by an image's id, or else its file, whether its captions are.

    Raises:
        ValueError: as `read_pairs`.
    """
    source, drops, texts = read_source(str(path), split, Columns(None, caption_column, need_image=False)), Drops(), {}
    for number, row in enumerate(source.rows()):
        name = row.image if isinstance(row.image, str) and row.image else None
        key = (row.image_id if row.names_image else None, name)
        if wanted is not None and not wanted(str(key[0] or name or "")):
            drops.add("left out by its image", row)
            continue
        captions = clean_captions(row, drops)
        if captions:
            texts.setdefault(key if any(key) else number, []).extend(captions)
    if not texts:
        raise ValueError(f"{path} ({split}) holds no caption: {dict(drops.counts) or 'it is empty'}")
    for reason, number in drops.counts.items():
        print(f"{path} ({split}): dropped {number:,}: {reason}")
    return list(texts.values())


def unknown_token_message(captions: Iterable, tokenizer, least: float = 0.01) -> Optional[str]:
    """What to say if a tokenizer lacks words of the captions: a model that learns from them learns to say [UNK].

    Args:
        captions: texts, or lists of texts.
        tokenizer: a fast tokenizer of transformers.
        least: the share of the words from which it is worth a word.

    Returns:
        One sentence with the share and examples, or None.
    """
    texts = [text for of_image in captions for text in ([of_image] if isinstance(of_image, str) else of_image)]
    texts = texts[:: 1 + len(texts) // ASKED]
    words, unknown, unk = 0, Counter(), tokenizer.unk_token_id
    for start in range(0, len(texts), 1024) if unk is not None else ():
        some = texts[start : start + 1024]
        for text, encoding in zip(some, tokenizer(some, add_special_tokens=False).encodings or []):
            words += len(set(encoding.word_ids))
            if unk in (ids := encoding.ids):
                spans = {word: span for i, word, span in zip(ids, encoding.word_ids, encoding.offsets) if i == unk}
                unknown.update(text[begin:end] for begin, end in spans.values())
    share = unknown.total() / max(words, 1)
    if share < least or not unknown:
        return None
    examples = ", ".join(repr(word) for word, _ in unknown.most_common(5))
    return (
        f"{100 * share:.0f} % of the words of the captions are not in the vocabulary ({tokenizer.unk_token}): "
        f"{examples}. A model trained on them cannot say them: take a decoder and tokenizer of the captions' language, "
        "or translate the captions"
    )


class PairStream:
    """The pairs of a source one after the other, `{image, captions, image_id}`, never all on disk.

    Rows of one image are put together if they follow one another. What cannot be used is counted in `dropped`.

    Args:
        path: a Hub id, or a local folder or file as in `read_pairs`.
        max_images: end after so many.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        max_images: Optional[int] = None,
        image_column: Optional[str] = None,
        caption_column: Optional[str] = None,
        image_dir: Optional[str] = None,
    ):
        self.path, self.split, self.max_images = str(path), split, max_images
        self.columns = Columns(image_column, caption_column, image_dir)
        self.source, self.drops = read_source(self.path, split, self.columns, streaming=True), Drops()

    @property
    def dropped(self) -> Counter:
        return self.drops.counts

    @property
    def fingerprint(self) -> str:
        """Of where the pairs come from: the images themselves cannot be known before they are read."""
        source = self.path if not Path(self.path).exists() else str(Path(self.path).resolve())
        image = self.source.image_column or self.columns.image
        moved = f", {self.columns.image_dir}" if self.columns.image_dir else ""
        return f"stream of {source}, {self.split}, {self.max_images}, {image}, {self.columns.caption}{moved}"

    def rows(self) -> Iterator[dict]:
        """One row an image, unless another image stands between its rows."""
        find = ImageFinder(self.source.folders)
        ids, pending = ImageIds(find.folders), None
        for number, row in enumerate(self.source.rows()):
            captions = clean_captions(row, self.drops)
            if not captions:
                continue
            try:
                image, identity = find_image(row.image, find)
            except UnusableImage as reason:
                self.drops.add(str(reason), row)
                continue
            key, image_id = ids(row, number, image, identity)
            if pending and pending["key"] == key:
                pending["captions"] += captions
                continue
            if pending:
                yield pending
            name = row._replace(image=image["path"])
            pending = {"image": image, "captions": captions, "image_id": image_id, "key": key, "row": name}
        if pending:
            yield pending

    def __iter__(self) -> Iterator[dict]:
        self.drops, number = Drops(), 0
        for row in self.rows():
            if number == self.max_images:
                return
            if problem := check_batch({"image": [row["image"]]})["problem"][0]:
                self.drops.add(problem, row["row"])
                continue
            number += 1
            yield {name: row[name] for name in ("captions", "image_id")} | {
                "image": Image().decode_example(row["image"])
            }

    def __repr__(self):
        return f"{self.path} ({self.split}, streamed)"


def main():
    parser = argparse.ArgumentParser(description="Show what is read of a dataset of image-caption pairs.")
    parser.add_argument("--dataset", required=True, help="Hub id, folder or file")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_column")
    parser.add_argument("--caption_column")
    parser.add_argument("--image_dir", help="folder that relative image paths are meant from, if not the data file's")
    parser.add_argument("--output", help="save the card as JSON")
    args = parser.parse_args()
    _, card = read_pairs(args.dataset, args.split, args.image_column, args.caption_column, args.image_dir)
    print(card)
    if args.output:
        write_json(args.output, asdict(card))


if __name__ == "__main__":
    main()
