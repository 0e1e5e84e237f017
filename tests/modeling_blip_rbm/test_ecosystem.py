"""The captioner in the hands of `datasets`, torch's DataLoader and transformers' own iterators."""

import functools
import http.server
import runpy
import sys
import threading

import pytest
from datasets import Dataset, Features, Image, Value
from torch.utils.data import DataLoader
from transformers.pipelines.pt_utils import KeyDataset

from modeling_blip_rbm import BlipRBMImageToTextPipeline
from tests.conftest import REPO, random_image


@pytest.fixture
def captioner(model, processor):
    return BlipRBMImageToTextPipeline(model=model, processor=processor)


@pytest.fixture
def files(tmp_path):
    names = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        random_image(seed=i).save(name)
    return names


@pytest.fixture
def dataset(files):
    features = Features({"image": Image(), "n": Value("int64")})
    return Dataset.from_dict({"image": files, "n": list(range(5))}, features=features)


@pytest.fixture
def expected(captioner, files):
    return [captions[0]["generated_text"] for captions in captioner(files)]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_map_adds_columns(num_proc, captioner, dataset, expected):
    captioner.model.config.rbm_confidence = [0.5, 1.0, 0.1]
    captioned = dataset.map(captioner, batched=True, batch_size=2, num_proc=num_proc)
    assert set(captioned.column_names) == {"image", "n", "generated_text", "score", "confidence"}
    assert captioned["generated_text"][:] == expected
    assert captioner(dataset["image"])[4][0]["score"] == pytest.approx(captioned["score"][4], rel=1e-4)


def test_map_with_several_captions(captioner, dataset):
    several = functools.partial(captioner, num_return_sequences=2, num_beams=3, prompt="a picture of")
    captions = dataset.map(several, batched=True)["generated_text"][:]
    assert [len(of_image) for of_image in captions] == [2] * 5
    assert all(text.startswith("a picture of") for of_image in captions for text in of_image)


def test_key_dataset_and_addresses(captioner, dataset, files, expected, tmp_path):
    assert [one[0]["generated_text"] for one in captioner(KeyDataset(dataset, "image"), batch_size=2)] == expected
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.func.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{i}.png" for i in range(5)]
        assert [one[0]["generated_text"] for one in captioner(urls, batch_size=2)] == expected
        server.shutdown()


def test_the_processor_in_a_data_loader(model, processor, files, expected):
    loader = DataLoader(files, batch_size=2, num_workers=2, collate_fn=lambda paths: processor(images=paths))
    captions = [caption for batch in loader for caption in processor.captions(model.generate(**batch))]
    assert captions == expected


@pytest.mark.parametrize("script", ["caption_dataset", "varied_captions", "search_photographs"])
def test_examples_run(script, saved_model, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--model", str(saved_model), "--images", str(tmp_path)])
    runpy.run_path(str(REPO / "examples" / f"{script}.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 5 and all(any(f"{i}.png" in line for line in lines) for i in range(5))
