"""`pipeline("image-to-text")`: what goes in, what comes out."""

import pytest
from datasets import Dataset, Features, Image, Value

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
