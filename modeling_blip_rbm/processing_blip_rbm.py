"""The processor: whatever image a person has, and prompts as BLIP's decoder wants them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin
from transformers import __version__ as transformers_version

from .configuration_blip_rbm import AUTO_MAP, copy_code


def load_image(image) -> Image.Image:
    """An upright RGB image from a path, bytes, array (H, W[, C]) or PIL image.

    Rotated as its EXIF data say; transparency laid on white; of an animation the first frame; 16-bit and float values
    scaled to 8 bits.

    Raises:
        ValueError: if it cannot be read as an image, naming it and why.
    """
    name = str(image) if isinstance(image, (str, Path)) else f"an image given as {type(image).__name__}"
    try:
        if isinstance(image, (str, Path)):
            image = Image.open(image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        elif isinstance(image, dict) and ("bytes" in image or "path" in image):  # a datasets.Image not decoded
            return load_image(image.get("bytes") or image["path"])
        elif not isinstance(image, Image.Image):
            image = _from_array(np.asarray(image))
        image.load()
        image = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image, or of a kind that Pillow cannot read") from None
    except (OSError, SyntaxError, EOFError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be read as an image ({error})") from None
    if image.mode.startswith(("I", "F")):
        image = _from_array(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if min(image.size) < 5:  # image processors take a side of 1 to 4 pixels for the colour channels
        image = image.resize(tuple(max(5, side) for side in image.size), Image.Resampling.NEAREST)
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)  # channels first
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise TypeError(f"an array of shape {array.shape} is no image: (H, W), (H, W, 3) or (H, W, 4) is")
    if array.dtype != np.uint8:
        array = array.astype(np.float64)
        top = 1.0 if array.max() <= 1 else 255.0 if array.max() <= 255 else 65535.0
        array = (array / top * 255).clip(0, 255).round().astype(np.uint8)
    return Image.fromarray(array)


class BlipRBMProcessor(ProcessorMixin):
    """Images to pixel_values, texts to input_ids `[DEC] w1 ... wn [SEP]`.

    Args:
        image_processor: of the vision tower.
        tokenizer: BERT's, with `bos_token` "[DEC]".
    """

    if transformers_version < "5":  # later ones read the signature of __init__, and warn of these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images=None, text=None, return_tensors="pt", padding=True, as_prompt=None, **kwargs):
        """
        Args:
            images: one image or a list: path, bytes, array or PIL image.
            text: one text or a list. With images and no `labels` wanted it is a prompt (no [SEP], padded on the left);
                without images it is captions (with [SEP], padded on the right).
            as_prompt: to say which of the two it is, whatever else is given.

        Raises:
            ValueError: if there is neither image nor text, an empty list, or something that is not an image.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        data = {}
        if images is not None:
            images = list(images) if isinstance(images, (list, tuple)) else [images]
            if not images:
                raise ValueError("the list of images is empty: give at least one image")
            loaded = [load_image(image) for image in images]
            pixel_values = self.image_processor(loaded, return_tensors="pt")["pixel_values"]  # all that fast ones give
            if return_tensors != "pt":
                pixel_values = pixel_values.numpy() if return_tensors == "np" else pixel_values.tolist()
            data["pixel_values"] = pixel_values
        if text is not None:
            as_prompt = images is not None if as_prompt is None else as_prompt
            texts = [text] if isinstance(text, str) else list(text)
            data |= self.encode_text(texts, as_prompt, padding, return_tensors=return_tensors, **kwargs)
        return BatchFeature(data)

    def encode_text(
        self, texts: list[str], as_prompt: bool, padding=True, max_length=None, return_tensors="pt", **kwargs
    ) -> dict:
        """input_ids and attention_mask (B, T) as the decoder reads them.

        Args:
            padding: as of tokenizers: True, "longest", "max_length" or False; then, texts of several lengths fit in no tensor, and
                `return_tensors=None` gives lists.
            max_length: tokens at most.
        """
        tokenizer = self.tokenizer
        ids = tokenizer(texts, add_special_tokens=False, truncation=False, **kwargs)["input_ids"]
        ids = [[tokenizer.bos_token_id, *row, *([] if as_prompt else [tokenizer.sep_token_id])] for row in ids]
        rows = {"input_ids": [row if max_length is None else row[:max_length] for row in ids]}
        rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
        settings = {"padding": padding, "padding_side": "left" if as_prompt else "right"}
        if padding == "max_length":
            settings["max_length"] = max_length
        return dict(tokenizer.pad(rows, return_tensors=return_tensors, **settings))

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
    def model_input_names(self):
        return ["pixel_values", "input_ids", "attention_mask"]


__all__ = ["BlipRBMProcessor", "load_image"]
