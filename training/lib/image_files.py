"""The images of a data set: where their files are, and which of them can be decoded."""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset, Features, Image, Value, config
from PIL import Image as PILImage
from PIL import ImageOps


IMAGE_SUFFIXES = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
IMAGE_SUFFIXES |= {
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
}  # images too where Pillow cannot read them: dropped by name, not passed over
CHECK = {"width": "int32", "height": "int32", "mode": "string", "digest": "binary", "problem": "string"}


class UnusableImage(ValueError):
    """Why one image is left out; the others are used."""


class ImageFinder:
    """The file that a path in the data means.

    Args:
        folders: where relative paths are looked for, in this order; the first file found is taken. The working
            directory is none of them.
    """

    def __init__(self, folders: Iterable[Path]):
        self.folders = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))

    def __str__(self):
        return ", ".join(folder for folder in self.folders if os.path.isdir(folder))

    def __call__(self, path: str) -> str:
        """The absolute path of the file.

        Raises:
            UnusableImage: if there is no such file.
            ValueError: if only the working directory has it: it may be another image of that name.
        """
        if "://" in path:
            raise UnusableImage("image is an internet address, which is never fetched")
        if path.encode("utf-8", "ignore").decode() != path:
            raise UnusableImage("image file name is not UTF-8")
        for spelling in dict.fromkeys((path, path.replace("\\", "/"))):  # the other way round on Windows' paths
            for folder in self.folders if not os.path.isabs(path) else [""]:
                file = os.path.join(folder, spelling)
                if os.path.isfile(file):  # of a name that no file can have, it is False
                    return os.path.normpath(file)
        if not os.path.isabs(path) and os.path.isfile(path):
            raise ValueError(
                f"image {path} is in the working directory, but not where relative paths of these data are looked for "
                f"({self}); if the working directory is meant, give it: --image_dir ."
            )
        raise UnusableImage("image file is missing")


def check_image(image: dict) -> dict:
    """Decode an image as cheaply as shows whether it can be: a JPEG at an eighth of its size.

    Args:
        image: {"bytes", "path"}, of which one may be None.

    Returns:
        `width`, `height` in pixels, `mode`, `digest` of the file's bytes, and `problem`: None, or why it cannot be
        used.
    """
    found = dict.fromkeys(CHECK)
    try:
        content = image["bytes"] or Path(image["path"]).read_bytes()
        found["digest"] = hashlib.sha256(content).digest()
        with PILImage.open(io.BytesIO(content)) as opened:
            found |= {"width": opened.width, "height": opened.height, "mode": opened.mode}
            opened.draft("RGB", (1, 1))
            if opened.width * opened.height > PILImage.MAX_IMAGE_PIXELS:  # what draft mode cannot make smaller
                raise PILImage.DecompressionBombError
            ImageOps.exif_transpose(opened).convert("RGB")  # all that a stage does to it
    except PILImage.DecompressionBombError:
        found["problem"] = f"image has too many pixels (more than {PILImage.MAX_IMAGE_PIXELS // 10**6} million)"
    except (
        Exception
    ):  # Pillow's decoders raise whatever they meet in a damaged file: OSError, SyntaxError, struct.error, ...
        found["problem"] = "image cannot be read"
    return found


def check_batch(batch: dict) -> dict:
    with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # of many pixels, damaged EXIF: decided here
        found = list(pool.map(check_image, batch["image"]))
    return {name: [of_image[name] for of_image in found] for name in CHECK}


def check_images(images: Dataset, states: Iterable[str]) -> Dataset:
    """`check_image` of every image, computed once: kept in the cache of `datasets` as long as the images do not change.

    Args:
        images: a column `image`.
        states: of every image what changes with it: its hash, or its path, size and time of change.

    Returns:
        (len(images)) rows with the columns of `CHECK`.
    """
    key = hashlib.sha256(json.dumps([PILImage.__version__, *states]).encode()).hexdigest()[:32]
    folder = Path(config.HF_DATASETS_CACHE) / "checked-images"
    folder.mkdir(parents=True, exist_ok=True)
    return images.cast_column("image", Image(decode=False)).map(
        check_batch,
        batched=True,
        batch_size=64,
        remove_columns=["image"],
        features=Features({name: Value(kind) for name, kind in CHECK.items()}),
        cache_file_name=str(folder / f"{key}.arrow"),
        load_from_cache_file=True,
        new_fingerprint=key,
        desc="check images",
    )
