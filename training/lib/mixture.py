"""Several data sets as one: how `--dataset` names them, and what of each is read.

    --dataset flickr8k web,weight=0.5,source=web coco_captions.jsonl,text=true,without=coco:validation

Each is a path or Hub id, and what differs from the defaults:

- `weight`: how often its images (or texts) come in an epoch of the captioner; 0.5 takes another half in every epoch.
- `source`: its captions begin with the token `[SOURCE]` in the place of `[DEC]`, so that the decoder knows whose style it writes. It
  writes the style of the captions without a source afterwards, as `[DEC]` is what `generate` begins with. BLIP's paper (arXiv 2201.12086)
  does the same with a prompt.
- `text=true`: captions alone. The decoder learns language from them; whatever needs images passes over them.
- `without`: another data set and split. What is of one of its images, by the number in the image's id, is left out.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Optional

import numpy as np
from datasets import Dataset, concatenate_datasets

from training.lib.pairs import load_pairs, read_texts


KEYS = ("weight", "source", "text", "without")
PART = "part"  # the column that says which of several data sets an image is of


@dataclass
class DataSource:
    """One entry of `--dataset`."""

    path: str
    weight: float = 1.0
    source: Optional[str] = None
    text: bool = False
    without: Optional[str] = None


def parse_source(entry: str) -> DataSource:
    """A `DataSource` of `path,key=value,...`.

    Raises:
        ValueError: for an unknown key, or a value that cannot be.
    """
    path, found = entry, {}
    while match := re.fullmatch(r"(.*),(\w+)=([^,=]*)", path):
        path, key, value = match.groups()
        if key not in KEYS:
            raise ValueError(f"--dataset {entry}: {key!r} is not one of {', '.join(KEYS)}")
        found[key] = value
    if "weight" in found:
        try:
            found["weight"] = float(found["weight"])
        except ValueError:
            raise ValueError(f"--dataset {entry}: weight is {found['weight']!r}, but must be a number") from None
        if not 0 < found["weight"] <= 1000:
            raise ValueError(f"--dataset {entry}: weight is {found['weight']:g}, but must be above 0 and at most 1000")
    if "text" in found:
        if found["text"] not in ("true", "false"):
            raise ValueError(f"--dataset {entry}: text is {found['text']!r}, but must be true or false")
        found["text"] = found["text"] == "true"
    return DataSource(path, **found)


def image_number(image_id: str) -> Optional[str]:
    """The number in an image's id, "199055" of "COCO_val2014_000000199055.jpg", by which two data sets know that they speak of one
    image."""
    numbers = re.findall(r"\d+", image_id)
    return max(numbers, key=len).lstrip("0") if numbers else None


def excluded_numbers(source: DataSource) -> set[str]:
    """The numbers of the images that `without` names."""
    if source.without is None:
        return set()
    path, _, split = source.without.rpartition(":")
    ids = load_pairs(path or split, split if path else "validation")["image_id"]
    return {number for number in map(image_number, ids) if number}


def is_outside(excluded: set[str], image_id: str) -> bool:
    return image_number(image_id) not in excluded


def without_excluded(dataset: Dataset, source: DataSource) -> Dataset:
    """The images that `without` does not name."""
    if not (excluded := excluded_numbers(source)):
        return dataset
    return dataset.select([row for row, name in enumerate(dataset["image_id"]) if is_outside(excluded, name)])


def read_images(data) -> Dataset:
    """The pairs of all data sets with images that `DataArguments` name, one after the other; with several, the column `part` says which
    of `image_sources(data)` each is of."""
    return join_parts(
        [
            without_excluded(load_pairs(source.path, data.train_split, data.max_images, **data.columns), source)
            for source in image_sources(data)
        ]
    )


def join_parts(parts: list[Dataset]) -> Dataset:
    """Data sets with the same columns as one."""
    if len(parts) == 1:
        return parts[0]
    return concatenate_datasets([part.add_column(PART, [number] * len(part)) for number, part in enumerate(parts)])


def read_text_sources(data) -> list[tuple[DataSource, list[list[str]]]]:
    """The captions, by image, of each data set of texts alone."""
    found = []
    for source in data.sources:
        if source.text:
            excluded = partial(is_outside, excluded_numbers(source))
            texts = read_texts(source.path, data.train_split, data.caption_column, excluded)
            print(f"{source.path}: {len(texts):,} images' captions, {sum(map(len, texts)):,} in all")
            found.append((source, texts))
    return found


def image_sources(data) -> list[DataSource]:
    """The data sets that have images."""
    return [source for source in data.sources if not source.text]


def part_of(dataset: Dataset) -> np.ndarray:
    """(n,) which data set each row is of."""
    return np.asarray(dataset[PART]) if PART in dataset.column_names else np.zeros(len(dataset), int)
