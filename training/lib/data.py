"""Image-caption pairs (`training/lib/pairs.py`): how they are split, the images as the vision tower sees them, the
captions as the RBM does."""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import ImageEnhance, ImageOps

from modeling_blip_rbm.generation_blip_rbm import word_columns
from training.lib.mixture import part_of


# How one cached training view differs from the plain image. View 0 is the plain image, view 1 its mirror image, and
# every further view is a random crop of this share of the sides, mirrored in half of the cases.
CROP_SIDES = (0.75, 0.95)


def _hashes(image_ids: Iterable[str], seed: int, which: slice) -> np.ndarray:
    """(n,) uint64: eight bytes of the hash of each id."""
    digests = (hashlib.sha256(f"{seed}:{image_id}".encode()).digest() for image_id in image_ids)
    return np.fromiter((int.from_bytes(digest[which], "big") for digest in digests), np.uint64)


def split_held_back(dataset: Dataset, held_back: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, held back): images of the *training* split on which everything is tuned.

    An image is held back by the hash of its id, so that the same images are held back in every stage, in whatever
    order or subset the data are read: nothing that one stage tunes on was trained on by another. Of several data sets
    (`training/lib/mixture.py`) as many are held back of each.
    """
    if not 0 <= held_back < len(dataset):
        raise ValueError(f"held_back is {held_back}, but must be at least 0 and less than the {len(dataset)} images")
    order = np.argsort(_hashes(dataset["image_id"], seed, slice(0, 8)), kind="stable")
    parts = part_of(dataset)[order]
    held = np.zeros(len(order), bool)
    names, counts = np.unique(parts, return_counts=True)
    for name, count in zip(names, counts):
        if held_back // len(names) >= count:
            raise ValueError(
                f"held_back is {held_back}, {held_back // len(names)} of each data set, but number {name + 1} has {count} images"
            )
        held[np.flatnonzero(parts == name)[: held_back // len(names)]] = True
    return np.sort(order[~held]), np.sort(order[held])


def fold_of(image_ids: Iterable[str], folds: int, seed: int = 0) -> np.ndarray:
    """(n,) in which of so many parts an image is, by the hash of its id: the same in every stage, as in
    `split_held_back`.

    Other bytes of the hash than those that hold images back, so that both have a share of every part.
    """
    return (_hashes(image_ids, seed, slice(8, 16)) % np.uint64(folds)).astype(np.int64)


def image_view(image, view: int, seed: int):
    """The image as training view number `view` (see `CROP_SIDES`). `seed` makes the random crop repeatable."""
    if view == 0:
        return image
    if view == 1:
        return ImageOps.mirror(image)
    rng = np.random.default_rng([seed, view])
    width, height = image.size
    crop_width, crop_height = (max(1, round(side * rng.uniform(*CROP_SIDES))) for side in (width, height))
    left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
    image = image.crop((left, top, left + crop_width, top + crop_height))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def random_view(image):
    """A random crop, mirrored in half of the cases, colours and light a little different: a new one at every call."""
    side = 0.7 + 0.3 * float(torch.rand(()))
    width, height = (max(1, round(side * length)) for length in image.size)
    left, top = (int(torch.randint(whole - part + 1, ())) for whole, part in zip(image.size, (width, height)))
    image = image.crop((left, top, left + width, top + height))
    if torch.rand(()) < 0.5:
        image = ImageOps.mirror(image)
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(0.75 + 0.5 * float(torch.rand(())))
    return image


def images_fingerprint(dataset: Dataset) -> str:
    """Hash of the encoded image bytes (and paths, where the bytes are on disk), in order."""
    digest = hashlib.sha256()
    for row in dataset.select_columns("image").cast_column("image", Image(decode=False)):
        content = row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes()
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


class CaptionWords:
    """Which of an RBM's words each caption holds: `words[i]` is bool (captions of image i, K).

    The words' numbers are in a temporary file, memory-mapped: memory does not grow with them (`benchmarks/scale.py`).

    Args:
        token_ids: of every image, the token ids of each of its captions; gone through once, so that they need not be in
            memory.
    """

    def __init__(self, token_ids: Iterable[list[list[int]]], word_ids: list[int], vocab_size: int):
        columns = word_columns(word_ids, vocab_size).numpy()
        self.word_ids, number, ends, counts = word_ids, 0, array("q", [0]), array("q", [0])
        with tempfile.TemporaryFile() as file:
            for of_image in token_ids:
                counts.append(len(of_image))
                for ids in of_image:
                    found = np.unique(columns[np.asarray(ids, dtype=np.int64)])
                    found = found[found < len(word_ids)].astype(np.int32)
                    file.write(found.tobytes())
                    number += len(found)
                    ends.append(number)
            file.flush()
            # an empty file cannot be mapped; the mapping outlives the file
            self.columns = np.memmap(file, np.int32, mode="r", shape=(number,)) if number else np.empty(0, np.int32)
        self.ends, self.starts = np.frombuffer(ends, np.int64), np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def num_words(self) -> int:
        return len(self.word_ids)

    def __getitem__(self, image: int) -> torch.Tensor:
        return self.of_captions(np.arange(*self.starts[[image, image + 1]]))

    def of_captions(self, numbers: np.ndarray) -> torch.Tensor:
        """(n, K) bool of the captions with these numbers, all images' captions counted through."""
        lengths = self.ends[numbers + 1] - self.ends[numbers]
        rows = np.repeat(np.arange(len(numbers)), lengths)
        places = np.arange(lengths.sum()) + np.repeat(self.ends[numbers] - (np.cumsum(lengths) - lengths), lengths)
        chosen = np.zeros((len(numbers), self.num_words), bool)
        chosen[rows, self.columns[places]] = True
        return torch.from_numpy(chosen)

    def choose(self, images: np.ndarray, chance: np.ndarray) -> torch.Tensor:
        """(len(images), K) fp32: of each image the caption that its number in [0, 1) falls on."""
        counts = self.starts[images + 1] - self.starts[images]
        rows = self.starts[images] + (chance * counts).astype(np.int64)
        return self.of_captions(rows).float()

    def share(self, images: np.ndarray) -> torch.Tensor:
        """(K,) share of these images' captions that hold each word."""
        holding, captions = np.zeros(self.num_words, np.int64), 0
        for image in images:
            start, end = self.starts[[image, image + 1]]
            holding += np.bincount(self.columns[self.ends[start] : self.ends[end]], minlength=self.num_words)
            captions += end - start
        return torch.from_numpy((holding / captions).astype(np.float32))


def caption_words(tokenizer, captions, word_ids) -> CaptionWords:
    """Of each image, which words its captions hold."""
    tokenized = (
        tokenizer(list(of_image), add_special_tokens=False)["input_ids"] if of_image else [] for of_image in captions
    )
    return CaptionWords(tokenized, word_ids, len(tokenizer))


# Words without content, which the decoder's grammar needs and the image does not decide.
FUNCTION_WORDS = set(
    "a an the this that these those some any each every another other his her hers its their theirs my your our he she "
    "it they them him himself herself itself themselves i you we who whom whose which what where when while as if than "
    "then so and or but nor not no of in on at by for from with without to into onto off out up down over under through "
    "across along around about above below behind beside near next between among during after before against toward "
    "towards upon is are was were be been being am has have had having do does did can could will would may might there "
    "here very just also too s t".split()
)


def choose_words(tokenizer, captions: Iterable[list[str]], num_words: int) -> list[int]:
    """Token ids of the most frequent content words (whole word-pieces, letters only), ascending."""
    counts = torch.zeros(len(tokenizer), dtype=torch.long)
    for of_image in captions:
        for ids in tokenizer(list(of_image), add_special_tokens=False)["input_ids"]:
            counts[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    content = torch.tensor([token.isalpha() and token not in FUNCTION_WORDS for token in tokens])
    order = (counts * content).argsort(descending=True, stable=True)[:num_words]
    return sorted(order[counts[order] > 0].tolist())
