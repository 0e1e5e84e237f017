"""Image-caption pairs (`training/pairs.py`): how they are split, the images as the vision tower sees them, the captions as the RBM
does."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import ImageEnhance, ImageOps

from modeling_blip_rbm.decoding_blip_rbm import word_columns, words_said


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


def caption_words(tokenizer, captions, word_ids) -> list[torch.Tensor]:
    """Of each image, which words its captions hold: bool (captions, K)."""
    columns = word_columns(word_ids, len(tokenizer))
    result = []
    for of_image in captions:
        ids = tokenizer(list(of_image), add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        result.append(words_said(ids, columns, len(word_ids)).bool())
    return result
