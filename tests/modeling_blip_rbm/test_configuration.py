"""The config: what it writes, reads and refuses."""

import json

import pytest
from transformers import AutoConfig, CLIPVisionConfig

from modeling_blip_rbm import BlipRBMConfig
from tests.conftest import WORD_IDS, tiny_config


def test_auto_map_and_pipelines_are_written(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "blip_rbm"
    assert saved["auto_map"]["AutoModel"].endswith("modeling_blip_rbm.BlipRBMForConditionalGeneration")
    assert saved["custom_pipelines"]["image-to-text"]["impl"] == "pipeline_blip_rbm.BlipRBMImageToTextPipeline"


def test_round_trip(tmp_path):
    config = tiny_config(rbm_guidance=0.3, rbm_rerank=True, vision_config=CLIPVisionConfig(hidden_size=36))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, BlipRBMConfig) and type(again.vision_config) is CLIPVisionConfig
    assert again.vision_config.hidden_size == 36 and again.rbm_word_ids == WORD_IDS
    assert (again.rbm_guidance, again.rbm_rerank, again.rbm_hidden_size) == (0.3, True, 7)


def test_defaults_are_blips():
    config = BlipRBMConfig()
    assert config.has_blip_tower and config.rbm_pooling == "cls_mean" and config.rbm_visible_size == 2 * 768
    assert config.text_config.encoder_hidden_size == 768 and config.rbm_guidance == 0


def test_encoder_width_of_another_tower():
    config = tiny_config(vision_config={"model_type": "efficientnet"})
    assert not config.has_blip_tower and config.rbm_pooling == "mean"
    assert config.text_config.encoder_hidden_size == config.text_config.hidden_size


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("rbm_hidden_size", 0, "an int from 1"),
        ("rbm_hidden_size", 2.5, "an int from 1"),
        ("rbm_word_ids", [5, 3], "token ids, ascending, unique, from 0 to"),
        ("rbm_word_ids", [3, 3], "token ids, ascending, unique, from 0 to"),
        ("rbm_word_ids", [99999], "token ids, ascending, unique, from 0 to"),
        ("rbm_visible_type", "softmax", "'gaussian', 'binary'"),
        ("rbm_pooling", "max", "'cls_mean', 'mean', 'mean_max'"),
        ("rbm_guidance", float("nan"), "a finite number"),
        ("rbm_guidance", "strong", "a finite number"),
        ("rbm_guidance_clip", -1, "a finite number from 0"),
        ("rbm_guidance_order", "third", "exact, second, first"),
        ("rbm_rerank_candidates", 0, "an int from 1"),
        ("rbm_rerank_pmi", float("inf"), "a finite number"),
        ("num_image_tokens", -3, "an int from 1"),
    ],
)
def test_impossible_values(name, value, allowed):
    with pytest.raises(ValueError) as error:
        tiny_config(**{name: value})
    assert f"{name} is {value!r}" in str(error.value) and allowed in str(error.value)


def test_unknown_tower():
    with pytest.raises(ValueError, match="no_such_tower"):
        tiny_config(vision_config={"model_type": "no_such_tower"})
