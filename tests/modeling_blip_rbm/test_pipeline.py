"""`pipeline("image-to-text")`: what goes in, what comes out."""

import base64

import pytest
import transformers
from datasets import Dataset, Features, Image, Value
from transformers import BlipProcessor, ImageTextToTextPipeline, pipeline

from modeling_blip_rbm import BlipRBMImageToTextPipeline
from tests.conftest import RBM_SETTINGS, VOCABULARY, random_image


@pytest.fixture
def captioner(model, processor):
    return BlipRBMImageToTextPipeline(model=model, processor=processor)


@pytest.fixture
def images():
    return [random_image(seed=i) for i in range(5)]


def test_one_image_every_way(captioner, images, tmp_path):
    images[0].save(tmp_path / "photo.png")
    expected = captioner(images[0])
    assert list(expected[0]) == ["generated_text", "score", "words"]
    assert captioner(str(tmp_path / "photo.png")) == expected
    assert captioner([images[0]]) == [expected]
    content = (tmp_path / "photo.png").read_bytes()
    assert captioner(images=str(tmp_path / "photo.png")) == captioner(content, timeout=3) == expected
    assert captioner("data:image/png;base64," + base64.b64encode(content).decode()) == expected
    with open(tmp_path / "photo.png", "rb") as file:
        assert captioner(file) == expected
    assert captioner({"image": images[0]}) == captioner(images[0], generate_kwargs={}) == expected
    assert captioner(captioner.preprocess(images[0])) == expected


def test_lists_columns_and_generators_agree(captioner, images):
    expected = [captioner(image) for image in images]
    dataset = Dataset.from_dict(
        {"image": images, "n": list(range(5))}, features=Features({"image": Image(), "n": Value("int64")})
    )

    def same(outputs):
        outputs = list(outputs)
        assert [o[0]["generated_text"] for o in outputs] == [e[0]["generated_text"] for e in expected]
        assert [o[0]["score"] for o in outputs] == pytest.approx([e[0]["score"] for e in expected], rel=1e-4)
        assert [list(o[0]["words"]) for o in outputs] == [list(e[0]["words"]) for e in expected]

    same(captioner(images))
    same(captioner(images, batch_size=2))
    same(captioner(images, batch_size=2, num_workers=1))
    same(captioner(dataset["image"]))
    same(captioner(image for image in images))


def test_words_are_the_rbms(captioner, images):
    words = captioner(images[0], top_words=3)[0]["words"]
    assert len(words) == 3 and set(words) <= {VOCABULARY[i] for i in RBM_SETTINGS["rbm_word_ids"]}
    assert list(words.values()) == sorted(words.values(), reverse=True)


def test_a_calibrated_model_says_how_sure_it_is(captioner, images):
    captioner.model.config.rbm_confidence = [0.5, 1.0, 0.1]
    for captions in captioner(images, num_beams=3, num_return_sequences=2, batch_size=2):
        assert [list(c) for c in captions] == [["generated_text", "score", "words", "confidence"]] * 2
        assert all(0 < c["confidence"] < 1 for c in captions)


def test_several_captions_prompt_and_plain(captioner, images):
    out = captioner(images[:2], num_return_sequences=3, num_beams=5, prompt="a picture of", batch_size=2)
    assert [len(captions) for captions in out] == [3, 3]
    assert all(c["generated_text"].startswith("a picture of") for captions in out for c in captions)
    captioner.model.generation_config.rbm_guidance = 5.0
    guided, plain = captioner(images), captioner(images, rbm=False)
    assert [g[0]["generated_text"] for g in guided] != [p[0]["generated_text"] for p in plain]


def test_generate_kwargs_of_the_old_task(captioner, images):
    out = captioner(images[0], generate_kwargs={"max_new_tokens": 2})
    assert len(out[0]["generated_text"].split()) <= 2


def test_bad_input(captioner, tmp_path):
    with pytest.raises(ValueError, match="list of images is empty"):
        captioner([])
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="text.jpg: not an image"):
        captioner(str(tmp_path / "text.jpg"))


def test_texts_of_the_replacing_task(captioner, images):
    """`image-text-to-text`: text is the prompt, one for all or one an image."""
    expected = captioner(images[0], prompt="a dog", max_new_tokens=3)
    assert captioner(images=images[0], text="a dog", max_new_tokens=3) == expected
    rest = captioner(images[0], text="a dog", max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    assert f"a dog {rest}".strip() == expected[0]["generated_text"]
    texts = ["a dog", "a picture of the"]
    for several in (captioner(images[:2], text=texts), captioner(images[:2], text=texts, batch_size=2)):
        for image, text, captions in zip(images, texts, several):
            assert captions[0]["generated_text"] == captioner(image, prompt=text)[0]["generated_text"]


@pytest.mark.parametrize(
    "inputs, settings, why",
    [
        ((), {}, "give the image"),
        (("a.png",), {"images": "b.png"}, "once"),
        (("a.png",), {"prompt": "a", "text": "b"}, "two names"),
        (("a.png",), {"prompt": 7}, "prompt is 7"),
        (("a.png",), {"text": ["a", "b"]}, "1 images and 2 texts"),
        (("a.png",), {"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 5}}, "max_new_tokens stands both"),
        (([{"role": "user", "content": [{"type": "image"}]}],), {}, "no conversation"),
        ((), {"images": "a.png", "text": [{"role": "user", "content": "what is it?"}]}, "no conversation"),
    ],
)
def test_calls_that_say_nothing_or_two_things(captioner, inputs, settings, why):
    with pytest.raises(ValueError, match=why):
        captioner(*inputs, **settings)


@pytest.mark.parametrize("task", ["image-to-text", "image-text-to-text"])
def test_a_model_object(task, model, processor, images, monkeypatch):
    monkeypatch.setattr(
        transformers.pipelines.logger, "warning_once", lambda *args: None
    )  # 5.23's own cannot be formatted
    captioner = pipeline(task, model=model, processor=processor)
    assert type(captioner) is BlipRBMImageToTextPipeline
    assert captioner(images[0]) == BlipRBMImageToTextPipeline(model=model, processor=processor)(images[0])
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    assert BlipRBMImageToTextPipeline(model=model, **parts)(images[0]) == captioner(images[0])
    with pytest.raises(ValueError, match="no processor"):
        BlipRBMImageToTextPipeline(model=model)


def test_other_models_keep_their_pipeline(blip, processor):
    stock = pipeline(
        "image-text-to-text", model=blip, processor=BlipProcessor(processor.image_processor, processor.tokenizer)
    )
    assert type(stock) is ImageTextToTextPipeline
    assert not isinstance(stock, BlipRBMImageToTextPipeline)


def test_a_prompt_is_warned_of_once_a_call(captioner, images, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_blip_rbm.processing_blip_rbm.logger.warning", said.append)
    captioner(images, prompt="a zebra")
    assert len(said) == 1 and "'zebra'" in said[0]
