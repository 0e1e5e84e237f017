"""Whatever images and prompts people have."""

import base64
import functools
import http.server
import io
import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models

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


def test_one_image_as_everything(processor, tmp_path):
    image, file = random_image(), io.BytesIO()
    image.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    text = base64.b64encode(file.getvalue()).decode()
    array = np.asarray(image)
    given = [
        tmp_path / "a.png", str(tmp_path / "a.png"), file.getvalue(), bytearray(file.getvalue()), file,
        f"data:image/png;base64,{text}", text, array, array.transpose(2, 0, 1), array.tolist(), array / 255,
        array.astype(np.int64), torch.tensor(array), torch.tensor(array).permute(2, 0, 1) / 255,
        torch.tensor(array).to(torch.float64), {"bytes": None, "path": str(tmp_path / "a.png")},
    ]  # fmt: skip
    for one in given:
        assert load_image(one).tobytes() == image.tobytes(), type(one)
    expected = processor(images=[image] * 3)["pixel_values"]
    batch = torch.tensor(np.stack([array] * 3))
    for three in ([[image]] * 3, [[image, image], [image]], batch, batch.permute(0, 3, 1, 2).numpy(), (image,) * 3):
        assert torch.equal(processor(images=three)["pixel_values"], expected)
    assert load_image(np.array([[True, False]] * 5)).getpixel((0, 0)) == (255, 255, 255)


def test_addresses(tmp_path):
    random_image().save(tmp_path / "a.png")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_image(f"{address}/a.png").tobytes() == random_image().tobytes()
        with pytest.raises(ValueError, match="none.png: .*404"):
            load_image(f"{address}/none.png")
        for never in (Path(f"{address}/a.png"), {"path": f"{address}/a.png"}):  # of data that someone else wrote
            with pytest.raises(ValueError, match="no such file"):
                load_image(never)
        server.shutdown()
    with pytest.raises(ValueError, match="a.png: .*fetched"):
        load_image(f"{address}/a.png", timeout=5)


@pytest.mark.parametrize(
    "image, why",
    [
        (np.full((5, 7, 3), -1.3), "below 0; it looks normalised"),
        (torch.randn(3, 5, 7), "pixel_values"),
        (np.full((5, 7), 256.5), "up to 1 or 255"),
        (np.full((5, 7), 10**6), "65,535"),
        (np.full((5, 7), np.nan), "NaN"),
        (np.full((5, 7), np.inf), "NaN or infinite"),
        (np.full((5, 7), "2026-11-28", dtype="datetime64[D]"), "datetime64"),
        (np.full((5, 7), "dog"), "type <U3"),
        (np.full((5, 7), None), "type object"),
        (None, "type object"),
        (np.zeros((5, 7, 2)), "no image"),
        (np.zeros(5), "no image"),
        (3.5, "no image"),
        ([[0, 1], [2]], "inhomogeneous"),
        (Image.new("RGB", (0, 0)), "0 x 0"),
        ("data:image/png;base64,*", "damaged"),
        ("data:text", "base64"),
        ({"role": "user"}, "holds no image"),
        ("a" * 5000, "5000 characters"),
        ("a\0b", "null"),
        ("/dev/null", "no regular file"),
        ("/", "a folder"),
    ],
)
def test_what_is_no_image_is_refused(image, why):
    with pytest.raises(ValueError, match=why):
        load_image(image)


def test_rounding_is_no_normalisation():
    assert load_image(np.full((5, 7), 1.0000002)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(np.array([[-1e-7, 1.0]] * 5)).getpixel((0, 0)) == (0, 0, 0)
    assert load_image(np.ones((5, 7), np.int64)).getpixel((0, 0)) == (1, 1, 1)  # whole numbers are of 255


def test_large_images_come_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_blip_rbm.processing_blip_rbm.WHOLE_PIXELS", 10_000)
    monkeypatch.setattr("modeling_blip_rbm.processing_blip_rbm.LEAST_SIDE", 50)
    image = Image.linear_gradient("L").resize((409, 307)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    decoded = []
    monkeypatch.setattr(
        "PIL.JpegImagePlugin.JpegImageFile.load_end", lambda self: decoded.append(self.size), raising=False
    )
    small = load_image(tmp_path / "a.jpg")
    assert decoded[0] == (103, 77) and small.size == (77, 103)  # a quarter, never decoded whole, and upright
    for mode in ("RGB", "RGBA", "L", "P", "CMYK"):
        image.convert(mode).save(tmp_path / "a.tif")
        assert load_image(tmp_path / "a.tif").size == load_image(image.convert(mode)).size == (103, 77)
    assert np.abs(np.asarray(load_image(image), float) - np.asarray(image.resize((103, 77)), float)).mean() < 4
    assert image.size == (409, 307)  # the caller's own stays
    assert load_image(random_image(997, 53)).size == (997, 53)  # a strip would lose too much


def test_an_ordinary_photograph_is_decoded_whole(tmp_path):
    image = Image.new("RGB", (6007, 4001), (90, 120, 30))
    image.save(tmp_path / "a.jpg")
    assert load_image(tmp_path / "a.jpg").size == (6007, 4001)


def test_what_takes_too_much_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_blip_rbm.processing_blip_rbm.MOST_PIXELS", 1000)
    random_image().save(tmp_path / "a.png")
    random_image().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a.png: .*37 x 29 pixels.*save it as JPEG"):
        load_image(tmp_path / "a.png")
    assert load_image(tmp_path / "a.jpg").size == (37, 29)


def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="a.jpg: .*no regular file"):
        load_image(tmp_path / "a.jpg")


def test_empty_list(processor):
    with pytest.raises(ValueError, match="list of images is empty"):
        processor(images=[])
    with pytest.raises(ValueError, match="an empty list of images"):
        processor(images=[[random_image()], []])
    with pytest.raises(ValueError, match="images, text, or both"):
        processor()


def test_texts_are_captions_with_sep_and_prompts_without(processor):
    word = VOCABULARY.index
    texts = ["a dog", "a picture of the"]
    for given in ({}, {"images": [random_image()] * 2}):  # labels as they are, with images or without
        captions = processor(text=texts, **given)
        assert captions["input_ids"][0].tolist() == [word("[DEC]"), word("a"), word("dog"), word("[SEP]"), 0, 0]
        assert captions["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]
    assert processor.captions(captions["input_ids"]) == texts
    prompts = processor(text=texts, as_prompt=True)
    assert prompts["input_ids"][0].tolist() == [0, 0, word("[DEC]"), word("a"), word("dog")]
    assert prompts["attention_mask"][0].tolist() == [0, 0, 1, 1, 1]
    assert set(captions) == {"pixel_values", "input_ids", "attention_mask"}


def test_either_prompts_a_caption_alike(model, processor):
    image, texts = random_image(), ["a dog", "a picture of the"]
    generated = [
        model.generate(**processor(images=[image] * 2, text=texts, as_prompt=as_prompt), max_new_tokens=3)
        for as_prompt in (False, True)
    ]
    assert processor.captions(generated[0]) == processor.captions(generated[1])


def test_arguments_of_tokenizers_and_image_processors(processor):
    dec, sep = VOCABULARY.index("[DEC]"), VOCABULARY.index("[SEP]")
    text = "a dog runs on the beach"
    for given in ({"truncation": True, "max_length": 5}, {"max_length": 5}, {"text_kwargs": {"max_length": 5}}):
        ids = processor(text=text, **given)["input_ids"][0].tolist()
        assert len(ids) == 5 and ids[0] == dec and ids[-1] == sep  # a cut caption ends too
    assert len(processor(text=text, truncation=False, max_length=5)["input_ids"][0]) == 8
    assert len(processor(text=text, add_special_tokens=False)["input_ids"][0]) == 6
    assert processor(text="a dog", text_pair="red")["input_ids"][0].tolist().count(sep) == 2
    assert len(processor(text=text, return_offsets_mapping=True)["offset_mapping"][0]) == 8
    assert processor(images=random_image(), size={"height": 31, "width": 31})["pixel_values"].shape[-1] == 31
    assert processor(images=random_image(), images_kwargs={"do_normalize": False})["pixel_values"].min() >= 0


@pytest.mark.parametrize("text", [[], [None], [7], [{"role": "user", "content": "a dog"}]])
def test_what_is_no_text(processor, text):
    with pytest.raises(ValueError, match="give at least one text|a text is|holds no conversation"):
        processor(text=text)
    with pytest.raises(ValueError, match="as text how the caption begins"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_unknown_words_are_named(processor, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_blip_rbm.processing_blip_rbm.logger.warning", said.append)
    processor(text=["a dog", "red ball"])
    assert not said
    processor(text=["a zebra", "zebra dog"], as_prompt=True)
    assert len(said) == 1 and "2 of 4 tokens (50%)" in said[0] and said[0].count("'zebra'") == 1


def test_no_vocabulary(saved_model):
    special = {token: i for i, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"))}
    Tokenizer(models.WordPiece(special, unk_token="[UNK]")).save(str(saved_model / "tokenizer.json"))
    with pytest.raises(ValueError, match="blip-rbm-tiny has no vocabulary: tokenizer.json is missing"):
        BlipRBMProcessor.from_pretrained(saved_model)


def test_a_tokenizer_without_dec(processor):
    processor.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos_token is None"):
        BlipRBMProcessor(processor.image_processor, processor.tokenizer)


def test_pickled(processor):
    image, text = random_image(), ["a dog on grass"]
    again = pickle.loads(pickle.dumps(processor))
    for name, value in processor(images=image, text=text).items():
        assert torch.equal(value, again(images=image, text=text)[name])


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
