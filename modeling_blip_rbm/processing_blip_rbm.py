"""The processor: images as people have them, and texts as BLIP's decoder reads them."""

import base64
import binascii
import http.client
import io
import json
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers.processors import TemplateProcessing
from transformers import BatchFeature, ProcessorMixin
from transformers import __version__ as transformers_version
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .configuration_blip_rbm import AUTO_MAP, copy_code


logger = logging.get_logger(__name__)

WHOLE_PIXELS = 32_000_000  # a larger image is halved until it has no more: towers see less than a hundredth of them
MOST_PIXELS = 100_000_000  # of an image that Pillow can only decode whole; of a JPEG Pillow's own limit counts
LEAST_SIDE = 1024  # to which a large image is halved at most
MOST_BYTES = 200_000_000  # of a file from the network
ROWS_AT_ONCE = 256  # of deep images, while they are made 8 bits deep
ROUNDING = 1e-3  # of floats that resizing left a little outside [0, 1]
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
ORIENTATION = 0x0112  # in EXIF
NO_CHAT = "BLIP-RBM captions images and holds no conversation: give it the image itself, and as text how the caption begins, such as 'a photo of'"
NORMALISED = "it looks normalised already: give such a tensor to the model as pixel_values, and to the processor the image itself"


def _files_needed():  # never called: transformers 4.57 copies from a folder what a file imports, not what that imports in turn
    from .pipeline_blip_rbm import BlipRBMImageToTextPipeline  # noqa: F401
    from .rbm import JointRBM  # noqa: F401


def load_image(image, timeout: float | None = 30.0) -> Image.Image:
    """An upright RGB image of whatever holds one.

    Rotated as its EXIF data say; transparency laid on white; of an animation the first frame; 16-bit and float values scaled to 8 bits. An image
    of more than 32 megapixels comes at a half, a quarter or an eighth of its size, a JPEG without ever being decoded whole.

    Args:
        image: a path, URL, data URI or base64 string; bytes or an open binary file; a PIL image; an array or tensor (H, W), (H, W, C) or
            (C, H, W) with C in 1, 3, 4, of integers from 0 to 255 (to 65,535 if deeper), or floats from 0 to 1 or to 255; a row of `datasets.Image`
            that is not decoded. A `Path` is never fetched from the network.
        timeout: seconds to wait for a URL, `None` for ever.

    Raises:
        ValueError: if it cannot be read as an image, naming it and why.
    """
    name = _name(image)
    try:
        image = _opened(image, timeout)
        image.load()
        if min(image.size) < 1:
            raise TypeError(f"it has {image.width} x {image.height} pixels")
        return _upright_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        hint = "; for HEIC, `pip install pillow-heif`" if _is_unread_heic(image, name) else ""
        raise ValueError(f"{name}: not an image, or of a kind that Pillow cannot read{hint}") from None
    except (OSError, SyntaxError, EOFError, TypeError, ValueError, MemoryError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image ({error})") from None


def _is_unread_heic(image, name: str) -> bool:
    """Whether a file is HEIC by its name or, as phones also call it photo.jpg, by its first bytes, and nothing is there that reads it."""
    if ".heic" in Image.registered_extensions():
        return False
    if isinstance(image, Path) or (isinstance(image, str) and os.path.isfile(image)):
        with open(image, "rb") as file:
            image = file.read(12)
    brand = bytes(image[8:12]) if isinstance(image, (bytes, bytearray, memoryview)) and image[4:8] == b"ftyp" else b""
    return brand in HEIC_BRANDS or name.lower().endswith((".heic", ".heif", ".hif"))


def _name(image) -> str:
    """What an error calls this image."""
    if isinstance(image, (str, os.PathLike)):
        text = os.fspath(image) or "an empty path"
        return text if len(text) < 300 else f"{text[:60]}... ({len(text)} characters)"
    return getattr(image, "filename", None) or f"an image given as {type(image).__name__}"


def _opened(image, timeout) -> Image.Image:
    """A PIL image, not decoded yet if it is from a file."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping):  # of datasets.Image, not decoded
        if not (image.get("bytes") or image.get("path")):
            raise TypeError(f"a dict with {', '.join(map(str, image)) or 'no keys'} holds no image: bytes or path do")
        return _opened(image.get("bytes") or Path(image["path"]), timeout)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        image = _fetched(image, timeout)
    elif isinstance(image, str) and (content := _from_base64(image)):
        image = content
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _reduced_while_decoding(Image.open(io.BytesIO(image)))
    if isinstance(image, (str, os.PathLike)):
        return _reduced_while_decoding(Image.open(_regular_file(image)))
    if hasattr(image, "read"):
        return _reduced_while_decoding(Image.open(image))
    return _from_array(_as_array(image))


def _regular_file(path):
    """The path itself. A pipe or device is refused before it is opened, which could take for ever."""
    if os.path.isdir(path):
        raise TypeError("it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):
        raise TypeError("it is no regular file, but a pipe, socket or device")
    return path


def _fetched(url: str, timeout) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "blip-rbm"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            content = response.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"it could not be fetched: {error}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 10**6} MB")
    return content


def _from_base64(text: str) -> bytes | None:
    """What a data URI, or a bare base64 string as transformers takes it, holds; None for anything else, such as a path."""
    is_uri = text.startswith("data:")
    if not is_uri and (len(text) < 64 or os.path.exists(text)):
        return None
    head, _, body = text.rpartition(",") if is_uri else ("", "", text)
    if is_uri and not head.endswith(";base64"):
        raise ValueError("a data URI must be of the form data:image/...;base64,...")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        if is_uri:
            raise ValueError("its base64 is damaged") from None
        return None


def _reduced_while_decoding(image: Image.Image) -> Image.Image:
    """The image, told to decode itself smaller if it is large and can.

    Raises:
        TypeError: if it is too large and cannot.
    """
    if image.format in ("JPEG", "MPO"):
        if (factor := _halvings(image.size)) > 1:
            image.draft(None, (image.width // factor, image.height // factor))
    elif image.width * image.height > MOST_PIXELS:
        raise TypeError(
            f"it has {image.width} x {image.height} pixels, and a {image.format} of more than {MOST_PIXELS // 10**6} "
            "megapixels takes too much memory: make it smaller, or save it as JPEG"
        )
    return image


def _halvings(size) -> int:
    """1, 2, 4 or 8: by which an image of this size is divided."""
    factor = 1
    while factor < 8 and size[0] * size[1] > WHOLE_PIXELS * factor**2 and min(size) >= 2 * factor * LEAST_SIDE:
        factor *= 2
    return factor


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _from_array(np.asarray(image))
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    mode = "RGBA" if transparent else "RGB"
    if image.mode != mode:  # which would copy it too
        image = image.convert(mode)
    if (factor := _halvings(image.size)) > 1:
        image = image.reduce(factor)
    if transparent:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if min(image.size) < 5:  # image processors take a side of 1 to 4 pixels for the colour channels
        image = image.resize(tuple(max(5, side) for side in image.size), Image.Resampling.NEAREST)
    return image


def _as_array(image) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = image.float() if image.dtype == torch.bfloat16 else image  # NumPy has no bfloat16
    return np.asarray(image)


def _from_array(array: np.ndarray) -> Image.Image:
    """An image of an array (H, W), (H, W, C) or (C, H, W).

    Raises:
        TypeError: if it is no image, or one that was normalised for a model.
    """
    if array.dtype.kind not in "buif":
        raise TypeError(f"its values are of type {array.dtype}: give a path, a PIL image, or an array of numbers")
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[0] in channels and array.shape[-1] not in channels:
        array = array.transpose(1, 2, 0)  # channels first
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0 or (array.ndim == 3 and array.shape[-1] not in channels):
        raise TypeError(f"an array of shape {array.shape} is no image: (H, W), (H, W, 3) or (H, W, 4) is")
    if array.dtype != np.uint8:
        array = _eight_bits(array)
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bits(array: np.ndarray) -> np.ndarray:
    least, most = float(array.min()), float(array.max())
    if not np.isfinite([least, most]).all():
        raise TypeError("it has NaN or infinite values")
    if least < -ROUNDING:
        raise TypeError(f"its values go down to {least:.3g}, and an image has none below 0; {NORMALISED}")
    if array.dtype.kind == "f" and most > 255:
        raise TypeError(f"its values go up to {most:.3g}, and floats of an image up to 1 or 255; {NORMALISED}")
    if most > 65535:
        raise TypeError(f"its values go up to {most:.6g}, and those of an image up to 255 or 65,535")
    unit = array.dtype.kind == "b" or (array.dtype.kind == "f" and most <= 1 + ROUNDING)
    scale = 255.0 if unit else 1.0 if most <= 255 else 255.0 / 65535.0
    bits = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), ROWS_AT_ONCE):  # as float64 all at once is eight times the image
        rows = array[start : start + ROWS_AT_ONCE].astype(np.float64) * scale
        bits[start : start + ROWS_AT_ONCE] = rows.clip(0, 255).round()
    return bits


def _list_of_images(images) -> list:
    """One image, a list, a batch (B, H, W, C) or (B, C, H, W), or a list with a list for each example: as one list."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    if not isinstance(images, (list, tuple)):
        return [images]
    if not images:
        raise ValueError("the list of images is empty: give at least one image")
    flat = []
    for image in images:
        nested = isinstance(image, (list, tuple)) and not (image and isinstance(image[0], (int, float, list, tuple)))
        if nested and not image:
            raise ValueError("an example has an empty list of images: give each at least one")
        flat += _list_of_images(image) if nested or getattr(image, "ndim", 0) == 4 else [image]
    return flat


def _begin_with_bos(tokenizer):
    """Make a tokenizer put its bos_token, BLIP's [DEC], where BERT's template has [CLS], and give what the decoder reads and no more."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer: load a fast one (use_fast=True)")
    bos, sep = tokenizer.bos_token, tokenizer.sep_token
    ids = [None if token is None else tokenizer.get_vocab().get(token) for token in (bos, sep)]
    if None in ids:
        raise ValueError(
            f"the tokenizer's bos_token is {bos!r} and its sep_token {sep!r}, but a caption needs both, as tokens of its vocabulary: BLIP's "
            'are "[DEC]" and "[SEP]"'
        )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {sep}", pair=f"{bos} $A {sep} $B {sep}", special_tokens=list(zip((bos, sep), ids))
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]


class BlipRBMProcessor(ProcessorMixin):
    """Images to pixel_values (B, 3, S, S), texts to input_ids `[DEC] w1 ... wn [SEP]`, which are labels too.

    ```python
    batch = processor(images=photos, text=captions, truncation=True, max_length=32)  # to train: labels=batch["input_ids"]
    prompt = processor(images=photo, text="a photo of")  # generate drops the [SEP]
    ```

    Args:
        image_processor: of the vision tower.
        tokenizer: BERT's, a fast one, with `bos_token` "[DEC]". From here on it begins a text with it, where BERT has [CLS].
    """

    if transformers_version < "5":  # later ones read the signature of __init__, and warn of these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        if tokenizer is not None:
            _begin_with_bos(tokenizer)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True, as_prompt=False, **kwargs):
        """
        Args:
            images: one image or a list of what [`load_image`] reads, a batch as an array, or a list with a list for each example.
            text: one text or a list of them.
            padding: as of tokenizers: True, "longest", "max_length" or False; then, texts of several lengths fit in no tensor, and
                `return_tensors=None` gives lists.
            as_prompt: without [SEP], and padded on the left. `generate` takes either.
            kwargs: of the tokenizer (`truncation`, `max_length`, `text_pair`, `add_special_tokens`, ...) and of the image processor
                (`do_resize`, ...); also as `text_kwargs` and `images_kwargs`. `timeout` as of [`load_image`]. `max_length` alone truncates, unless `truncation=False`.

        Returns:
            `BatchFeature` of pixel_values (B, 3, S, S), and input_ids and attention_mask (M, T).

        Raises:
            ValueError: if there is neither image nor text, an empty list, or something that is not an image.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        timeout = kwargs.pop("timeout", 30.0)
        images_kwargs = dict(kwargs.pop("images_kwargs", None) or {})
        kwargs |= kwargs.pop("text_kwargs", None) or {}
        images_kwargs |= {name: kwargs.pop(name) for name in list(kwargs) if name in ImagesKwargs.__annotations__}
        data = {}
        if images is not None:
            loaded = [load_image(image, timeout) for image in _list_of_images(images)]
            # all that fast ones give
            pixel_values = self.image_processor(loaded, **images_kwargs | {"return_tensors": "pt"})["pixel_values"]
            if return_tensors != "pt":
                pixel_values = pixel_values.numpy() if return_tensors == "np" else pixel_values.tolist()
            data["pixel_values"] = pixel_values
        if text is not None:
            texts = list(text) if isinstance(text, (list, tuple)) else [text]
            if isinstance(text, str) and isinstance(kwargs.get("text_pair"), str):
                kwargs["text_pair"] = [kwargs["text_pair"]]
            data |= self.encode_text(texts, as_prompt, padding, return_tensors=return_tensors, **kwargs)
        return BatchFeature(data)

    def encode_text(
        self, texts: list[str], as_prompt: bool = False, padding=True, max_length=None, return_tensors="pt", **kwargs
    ) -> dict:
        """input_ids and attention_mask (M, T) as the decoder reads them; see `__call__`. Warns of what the vocabulary lacks."""
        if not texts:
            raise ValueError("the list of texts is empty: give at least one text")
        for text in texts:
            first = text[0] if isinstance(text, (list, tuple)) and text else text  # of words, or of messages
            if not isinstance(first, (str, list, tuple)):
                raise ValueError(NO_CHAT if isinstance(first, Mapping) else f"a text is {text!r}: give strings")
        kwargs.setdefault("truncation", max_length is not None)
        if as_prompt:
            kwargs = {"padding_side": "left"} | kwargs | {"add_special_tokens": False}
            texts = [f"{self.tokenizer.bos_token} {text}" if isinstance(text, str) else text for text in texts]
        encoded = self.tokenizer(texts, padding=padding, max_length=max_length, return_tensors=return_tensors, **kwargs)
        self._warn_of_unknown(texts, encoded)
        return dict(encoded)

    def _warn_of_unknown(self, texts, encoded):
        unknown, special = self.tokenizer.unk_token, set(self.tokenizer.all_special_tokens)
        lost, number = [], 0
        for text, encoding in zip(texts, encoded.encodings):
            for token, (start, end), part in zip(encoding.tokens, encoding.offsets, encoding.sequence_ids):
                number += token == unknown or token not in special
                if token == unknown:
                    lost.append(text[start:end] if isinstance(text, str) and part == 0 else unknown)
        if lost:
            names = ", ".join(map(repr, list(dict.fromkeys(lost))[:10]))
            logger.warning(
                f"{len(lost)} of {number} tokens ({len(lost) / number:.0%}) are not in the vocabulary and become {unknown}: {names}. The model "
                "can neither read nor write them: use other words, or a model whose vocabulary has them."
            )

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Raises ValueError: the model captions and holds no conversation."""
        raise ValueError(NO_CHAT)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers' own.

        Raises:
            ValueError: if a file is damaged, or the tokenizer has no vocabulary, as when tokenizer.json is missing: captions would be empty.
        """
        try:
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError, KeyError) as error:  # of JSON that is of another form
            raise ValueError(
                f"{pretrained_model_name_or_path} has no processor that can be loaded ({type(error).__name__}: {error}). processor_config.json, "
                "tokenizer.json or tokenizer_config.json is damaged: copy it from where the model is from."
            ) from error
        tokenizer = processor.tokenizer
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(
                f"{pretrained_model_name_or_path} has no vocabulary: tokenizer.json is missing or empty. Save the "
                "processor there again (processor.save_pretrained), or copy the file from where the model is from."
            )
        return processor

    def save_pretrained(self, save_directory, **kwargs):
        """As transformers' own, with the package's code beside it, so that `trust_remote_code` finds it. What 5 writes is made readable for 4:
        the list of special tokens had another name there."""
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copy_code(save_directory)
        saved = super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory) / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if isinstance(settings.get("extra_special_tokens"), list):
            settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
        return saved

    def captions(self, sequences) -> list[str]:
        """Texts of generated token ids."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def pad_token_id(self) -> int:
        """Where Seq2SeqTrainer looks for it."""
        return self.tokenizer.pad_token_id

    @property
    def model_input_names(self):
        return ["pixel_values", "input_ids", "attention_mask"]


__all__ = ["BlipRBMProcessor", "load_image"]
