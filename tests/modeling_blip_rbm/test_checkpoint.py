"""The embedded model as it lies in git."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipVisionConfig

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMForImageTextRetrieval, BlipRBMProcessor
from modeling_blip_rbm.configuration_blip_rbm import HUB_FILES
from tests.conftest import CHECKPOINT, REPO


@pytest.fixture(scope="module")
def embedded():
    model = BlipRBMForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    return model, BlipRBMProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def photographs():
    return sorted((REPO / "examples").glob("*.jpg"))[:4]


def test_size_and_precision(embedded):
    model, _ = embedded
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 32e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    shards = list(CHECKPOINT.glob("*.safetensors"))
    assert shards and all(shard.stat().st_size < 45e6 for shard in shards)
    tensors = [*model.parameters(), *model.buffers()]  # tied ones once
    fp16 = sum(t.numel() * (2 if t.is_floating_point() else 8) for t in tensors)
    assert fp16 <= sum(shard.stat().st_size for shard in shards) < fp16 + 0.1e6 < 80e6


def test_it_carries_the_whole_package():
    links = {file.name: file.readlink() for file in CHECKPOINT.glob("*.py")}
    assert links == {name: Path("..", "..", "modeling_blip_rbm", name) for name in HUB_FILES}
    assert all((CHECKPOINT / name).exists() for name in links)


def test_captions_are_sentences_about_the_images(embedded, photographs):
    model, processor = embedded
    captions = processor.captions(model.generate(**processor(images=photographs)))
    assert len(set(captions)) > 1 and all(3 <= len(caption.split()) <= 20 for caption in captions)


class FromEmbeds(torch.nn.Module):
    """A BLIP tower that gives the image_embeds it was made with."""

    def __init__(self, embeds):
        super().__init__()
        self.embeds = embeds

    def forward(self, pixel_values=None, **kwargs):
        return (self.embeds,)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_rbm_off_is_blip_token_for_token(embedded, photographs, settings, prompt):
    """Stock BLIP with the embedded decoder, on what our projector makes of the images."""
    model, processor = embedded
    inputs = processor(images=photographs)
    config = BlipConfig(
        text_config=model.config.text_config.to_dict(),
        vision_config=BlipVisionConfig(
            hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=11, image_size=32
        ).to_dict(),
    )
    blip = BlipForConditionalGeneration(config).eval()
    blip.text_decoder.load_state_dict(model.text_decoder.state_dict())
    blip.vision_model = FromEmbeds(model.encode_image(**inputs).image_embeds)
    text = {}
    if prompt:
        row = processor(text=prompt)["input_ids"]  # with [SEP], which stock BLIP cuts off
        text = {
            "input_ids": row.repeat(len(photographs), 1),
            "attention_mask": torch.ones(len(photographs), row.shape[1]),
        }
    settings = {"max_new_tokens": 20, "num_beams": 1, "length_penalty": 1.0, "repetition_penalty": 1.0, **settings}
    expected = blip.generate(inputs["pixel_values"], **{k: v.clone().long() for k, v in text.items()}, **settings)
    ours = model.generate(**inputs, **{k: v.long() for k, v in text.items()}, rbm=False, **settings)
    assert processor.captions(ours) == processor.captions(expected)


@pytest.fixture(scope="module")
def results():
    return json.loads((CHECKPOINT / "results.json").read_text())


FLOORS = {"flickr8k": (52, 56), "web": (43, 51), "coco": (51, 58)}  # CIDEr-D of BLIP and of BLIP-RBM


@pytest.mark.parametrize("world", FLOORS)
def test_results_reach_the_floors(world):
    results = json.loads((REPO / "benchmarks" / "results" / f"captions_{world}.json").read_text())
    blip, ours = results["systems"]["BLIP"], results["systems"]["BLIP-RBM"]
    assert results["images"] == 1000 and results["settings"]["num_beams"] == 3
    assert (blip["CIDEr-D"], ours["CIDEr-D"]) >= FLOORS[world] and ours["CIDEr-D"] >= FLOORS[world][1]
    assert results["difference"]["CIDEr-D"]["low"] > 0 and ours["CHAIR-i"] < blip["CHAIR-i"]


def test_records_of_training_are_there():
    assert {"captioner.json", "rbm.json", "phrases.json", "tuning.json"} <= {file.name for file in CHECKPOINT.iterdir()}


def test_results_are_of_this_config(embedded, results):
    """The config that was measured is the config that ships."""
    model, _ = embedded
    settings = vars(model.config) | model.decoding_settings().to_dict()
    later = ("rbm_confidence", "rbm_match")  # fitted afterwards; captions do not depend on them
    measured = {name: value for name, value in results["rbm"].items() if name not in later and name in settings}
    assert {name: settings[name] for name in measured} == measured and "rbm_guidance" in measured


def test_rerank_scores_are_those_of_the_candidates(embedded, photographs):
    """Beams that end before the others: their log P comes from the right steps of decoding."""
    model, processor = embedded
    encoding = model.encode_image(**processor(images=photographs))
    n = model.decoding_settings().rbm_rerank_candidates
    candidates = model.generate(encoding=encoding, rbm_rerank=False, num_beams=n, num_return_sequences=n)
    chosen = model.generate(encoding=encoding, num_return_sequences=n, return_dict_in_generate=True)
    expected = model.candidate_scores(encoding, candidates).sort(dim=1, descending=True).values
    torch.testing.assert_close(chosen.rerank_scores, expected.flatten(), atol=1e-3, rtol=1e-3)


def test_the_model_itself_says_the_same_as_its_fast_copy(embedded, photographs):
    """Folded, packed and with the image's keys and values shared: word for word, with every strategy on."""
    model, processor = embedded
    inputs = processor(images=photographs)
    fast = model.generate(**inputs)
    slow = model.generate(**inputs, output_attentions=True, return_dict_in_generate=True).sequences
    assert processor.captions(fast) == processor.captions(slow)


def test_saving_into_the_linked_folder_leaves_the_source_alone(embedded, tmp_path):
    model, processor = embedded
    (tmp_path / "source").mkdir()
    for name in HUB_FILES:
        (tmp_path / "source" / name).write_text("# the source\n")
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).symlink_to(Path("..", "source", name))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert {(tmp_path / "source" / name).read_text() for name in HUB_FILES} == {"# the source\n"}


def test_presets_are_settings_that_generate_takes(embedded, photographs):
    model, processor = embedded
    inputs = processor(images=photographs[:2])
    assert "varied" in model.presets
    varied = model.generate(**inputs, **model.presets["varied"], num_return_sequences=20)
    assert len(varied) == 40  # as many candidates as the preset says


def test_it_compares_images_and_texts(embedded, photographs):
    """The same weights as a retrieval model: what its own captions say goes with their images."""
    model, processor = embedded
    inputs = processor(images=photographs)
    captions = processor.captions(model.generate(**inputs))
    matcher = BlipRBMForImageTextRetrieval.from_pretrained(CHECKPOINT).eval()
    output = matcher(inputs["pixel_values"], **processor(text=captions))
    own = output.logits_per_image.diagonal()
    assert (own > output.logits_per_image.mean(1)).all()
    assert ((output.match_probability > 0) & (output.match_probability < 1)).all()
