"""Image-caption pairs (`training/pairs.py`): how they are split, the images as the vision tower sees them, the captions as the RBM
does."""

import hashlib
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import ImageEnhance, ImageOps
from scipy.sparse import csr_matrix

from modeling_blip_rbm.decoding_blip_rbm import word_columns


# How one cached training view differs from the plain image. View 0 is the plain image, view 1 its mirror image, and
# every further view is a random crop of this share of the sides, mirrored in half of the cases.
CROP_SIDES = (0.75, 0.95)


def split_held_back(dataset: Dataset, held_back: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, held back): images of the *training* split on which everything is tuned.

    An image is held back by the hash of its id, so that the same images are held back in every stage, in whatever
    order or subset the data are read: nothing that one stage tunes on was trained on by another.
    """
    if not 0 <= held_back < len(dataset):
        raise ValueError(f"held_back is {held_back}, but must be at least 0 and less than the {len(dataset)} images")
    keys = [hashlib.sha256(f"{seed}:{image_id}".encode()).hexdigest() for image_id in dataset["image_id"]]
    order = np.argsort(keys, kind="stable")
    return np.sort(order[held_back:]), np.sort(order[:held_back])


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
    """Which of an RBM's words each caption holds, sparse: `words[i]` is bool (captions of image i, K).

    Args:
        token_ids: of every image, the token ids of each of its captions; gone through once, so that they need not be in memory.
    """

    def __init__(self, token_ids: Iterable[list[list[int]]], word_ids: list[int], vocab_size: int):
        columns = word_columns(word_ids, vocab_size).numpy()
        indices, ends, counts = array("i"), array("q", [0]), array("q", [0])
        for of_image in token_ids:
            counts.append(len(of_image))
            for ids in of_image:
                found = np.unique(columns[np.asarray(ids, dtype=np.int64)])
                indices.extend(found[found < len(word_ids)].tolist())
                ends.append(len(indices))
        indices, ends = (
            np.frombuffer(indices, np.int32) if indices else np.empty(0, np.int32),
            np.frombuffer(ends, np.int64),
        )
        shape = (len(ends) - 1, len(word_ids))
        self.matrix = csr_matrix((np.ones(len(indices), bool), indices, ends), shape=shape)
        self.starts = np.cumsum(counts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, image: int) -> torch.Tensor:
        return self.of_captions(slice(*self.starts[[image, image + 1]]))

    @property
    def num_words(self) -> int:
        return self.matrix.shape[1]

    def of_captions(self, numbers: slice | np.ndarray) -> torch.Tensor:
        """(n, K) bool of the captions with these numbers, all images' captions counted through."""
        return torch.from_numpy(self.matrix[numbers].toarray())

    def choose(self, images: np.ndarray, chance: np.ndarray) -> torch.Tensor:
        """(len(images), K) fp32: of each image the caption that its number in [0, 1) falls on."""
        counts = self.starts[images + 1] - self.starts[images]
        rows = self.starts[images] + (chance * counts).astype(np.int64)
        return self.of_captions(rows).float()

    def share(self, images: np.ndarray) -> torch.Tensor:
        """(K,) share of these images' captions that hold each word."""
        chosen = np.zeros(len(self), np.float32)
        chosen[images] = 1
        of_caption = np.repeat(chosen, np.diff(self.starts))
        return torch.from_numpy(self.matrix.T @ of_caption / of_caption.sum())


def caption_words(tokenizer, captions, word_ids) -> CaptionWords:
    """Of each image, which words its captions hold."""
    tokenized = (
        tokenizer(list(of_image), add_special_tokens=False)["input_ids"] if of_image else [] for of_image in captions
    )
    return CaptionWords(tokenized, word_ids, len(tokenizer))
