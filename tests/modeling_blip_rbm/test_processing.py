"""Whatever images and prompts people have."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_blip_rbm import BlipRBMProcessor, load_image
from tests.conftest import VOCABULARY, random_image


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA", "YCbCr"])
def test_modes(mode, tmp_path, processor):
    image = random_image(mode="L" if mode == "LA" else "RGB").convert(mode)
    loaded = load_image(image)
    assert loaded.mode == "RGB" and loaded.size == (37, 29)
    assert processor(images=image)["pixel_values"].shape == (1, 3, 24, 24)


def test_grey_and_cmyk_keep_their_colours():
    assert load_image(Image.new("L", (7, 5), 100)).getpixel((0, 0)) == (100, 100, 100)
    red = Image.new("RGB", (7, 5), (255, 0, 0)).convert("CMYK")
    assert load_image(red).getpixel((0, 0)) == (255, 0, 0)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (7, 5), (200, 0, 0, 0))
    assert load_image(image).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (7, 5), 0)
    palette.info["transparency"] = 0
    assert load_image(palette).getpixel((1, 1)) == (255, 255, 255)


def test_16_bit_is_scaled_not_cut(tmp_path):
    array = np.full((5, 7), 32768, dtype=np.uint16)
    Image.fromarray(array).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    assert load_image(array).getpixel((0, 0)) == (128, 128, 128)


def test_float_arrays():
    assert load_image(np.full((5, 7, 3), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(torch.full((3, 5, 7), 0.5).numpy()).size == (7, 5)


def test_exif_rotation(tmp_path):
    image = random_image(37, 29)
    exif = Image.Exif()
    exif[0x0112] = 6  # shot with the camera turned
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (29, 37)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_image(tmp_path / "moving.gif").getpixel((0, 0))[0] > 250


def test_one_pixel(processor):
    dot = processor(images=Image.new("RGB", (1, 1), (0, 90, 255)))["pixel_values"]
    torch.testing.assert_close(dot, processor(images=Image.new("RGB", (24, 24), (0, 90, 255)))["pixel_values"])
    assert processor(images=Image.new("RGB", (1, 500)))["pixel_values"].shape == (1, 3, 24, 24)


def test_truncated_empty_and_text_files_are_named(tmp_path):
    whole = io.BytesIO()
    random_image(200, 150).save(whole, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("these are words, and not an image")
    for name in ("truncated.jpg", "empty.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=f"{name}: (cannot be read as an image|not an image)"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere.jpg: no such file"):
        load_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="shape \\(0, 5\\)"):
        load_image(np.zeros((0, 5)))


def test_bytes_and_undecoded_dataset_rows():
    file = io.BytesIO()
    random_image().save(file, "PNG")
    assert load_image(file.getvalue()).tobytes() == random_image().tobytes()
    assert load_image({"bytes": file.getvalue(), "path": None}).tobytes() == random_image().tobytes()


def test_empty_list(processor):
    with pytest.raises(ValueError, match="list of images is empty"):
        processor(images=[])
    with pytest.raises(ValueError, match="images, text, or both"):
        processor()


def test_prompts_and_captions(processor):
    word = VOCABULARY.index
    prompts = processor(images=[random_image()] * 2, text=["a dog", "a picture of the"])
    assert prompts["input_ids"][0].tolist() == [0, 0, word("[DEC]"), word("a"), word("dog")]
    assert prompts["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    captions = processor(text=["a dog", "a picture of the"])
    assert captions["input_ids"][0].tolist() == [word("[DEC]"), word("a"), word("dog"), word("[SEP]"), 0, 0]
    assert processor.captions(captions["input_ids"]) == ["a dog", "a picture of the"]


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    image, text = random_image(), ["a dog runs on the beach"]
    for name, value in processor(images=image, text=text).items():
        assert torch.equal(value, again(images=image, text=text)[name])


def test_special_tokens_are_saved_for_both_transformers(processor, tmp_path):
    """transformers 5 writes them as a list under a name at which 4.57 expects a dict."""
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert settings["additional_special_tokens"] == ["[ENC]"]
    again = BlipRBMProcessor.from_pretrained(tmp_path).tokenizer
    assert again.tokenize("a [ENC] dog")[1] == "[ENC]" and "[ENC]" in again.all_special_tokens


def test_padding_is_as_asked_for(processor):
    texts = ["a dog", "two dog on the grass"]
    alone = [processor(text=text)["input_ids"][0].tolist() for text in texts]
    ragged = processor(text=texts, padding=False, return_tensors=None)
    assert ragged["input_ids"] == alone and [sum(row) for row in ragged["attention_mask"]] == [
        len(row) for row in alone
    ]
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=texts, padding=False)
    wide = processor(text=texts, padding="max_length", max_length=11, return_tensors="np")
    assert wide["input_ids"].shape == wide["attention_mask"].shape == (2, 11)
    assert [row[: len(one)].tolist() for row, one in zip(wide["input_ids"], alone)] == alone
