"""The config: what it writes, reads and refuses."""

import json

import pytest
from transformers import AutoConfig, CLIPVisionConfig, GenerationConfig

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, DecodingSettings
from modeling_blip_rbm.configuration_blip_rbm import DECODING_SETTINGS, HUB_FILES, copy_code
from tests.conftest import REPO, WORD_IDS, tiny_config


def test_auto_map_and_pipelines_are_written(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "blip_rbm"
    assert saved["auto_map"]["AutoModel"].endswith("modeling_blip_rbm.BlipRBMForConditionalGeneration")
    assert saved["custom_pipelines"]["image-to-text"]["impl"] == "pipeline_blip_rbm.BlipRBMImageToTextPipeline"


def test_round_trip(tmp_path):
    config = tiny_config(vision_config=CLIPVisionConfig(hidden_size=36))
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, BlipRBMConfig) and type(again.vision_config) is CLIPVisionConfig
    assert again.vision_config.hidden_size == 36 and again.rbm_word_ids == WORD_IDS
    assert again.rbm_hidden_size == 7


def test_defaults_are_blips():
    config = BlipRBMConfig()
    assert config.has_blip_tower and config.rbm_pooling == "cls_mean" and config.rbm_visible_size == 2 * 768
    assert config.text_config.encoder_hidden_size == 768


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
        ("rbm_guidance", float("nan"), "a number from -1000 to 1000"),
        ("rbm_guidance", 1e9, "a number from -1000 to 1000"),
        ("rbm_guidance_clip", -1, "a number from 0 to 1000"),
        ("rbm_guidance", 200, "a number from -100 to 100"),
        ("rbm_rerank", "no", "True, False"),
        ("rbm_confidence", [], "a list of 3 finite numbers"),
        ("rbm_match", [1.0, float("nan")], "a list of 2 finite numbers"),
        ("rbm_guidance_order", "third", "'exact', 'second', 'first'"),
        ("rbm_rerank_candidates", 0, "an int from 1"),
        ("rbm_rerank_pmi", float("inf"), "a number from -1000 to 1000"),
        ("num_image_tokens", -3, "an int from 1"),
    ],
)
def test_impossible_values(name, value, allowed):
    with pytest.raises(ValueError) as error:
        tiny_config(**{name: value})
    assert f"{name} is {value!r}" in str(error.value) and allowed in str(error.value)


def test_decoding_settings_of_a_generation_config_and_what_overrides_them():
    stored = GenerationConfig(rbm_guidance=0.3, rbm_rerank=True)
    assert DecodingSettings.of(stored) == DecodingSettings(rbm_guidance=0.3, rbm_rerank=True)
    given = DecodingSettings.of(stored, {"rbm_guidance": 0.0, "rbm_rerank": None, "num_beams": 3})
    assert given == DecodingSettings(rbm_guidance=0.0, rbm_rerank=True)
    assert set(DECODING_SETTINGS) == set(given.to_dict()) and len(DECODING_SETTINGS) == 12


def test_settings_of_a_config_from_before_reach_generate(blip, pixel_values, tmp_path):
    """Checkpoints and code from when the config had them: as from_blip's arguments, set afterwards, and in a config.json."""
    expected = BlipRBMForConditionalGeneration.from_blip(blip, rbm_word_ids=WORD_IDS, rbm_hidden_size=7)
    expected.generation_config.rbm_guidance = 3.0
    model = BlipRBMForConditionalGeneration.from_blip(blip, rbm_word_ids=WORD_IDS, rbm_hidden_size=7, rbm_guidance=3.0)
    assert model.decoding_settings() == expected.decoding_settings()
    model.config.update({"rbm_rerank": True, "rbm_rerank_candidates": 3})
    assert model.decoding_settings() == DecodingSettings(rbm_guidance=3.0, rbm_rerank=True, rbm_rerank_candidates=3)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not set(config) & {*DECODING_SETTINGS, "decoding_settings"}
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rbm_guidance": 0.7, "rbm_guidance_exact": True}))
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path)
    assert again.decoding_settings() == DecodingSettings(rbm_guidance=0.7)


def test_every_file_of_the_package_goes_to_the_hub_but_the_command_lines():
    files = {file.name for file in (REPO / "modeling_blip_rbm").glob("*.py")}
    assert set(HUB_FILES) == files - {"__init__.py", "__main__.py", "files.py"}


def test_code_is_copied_whole_and_never_through_a_link(tmp_path):
    (tmp_path / "far.py").write_text("another's")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "rbm.py").symlink_to(tmp_path / "far.py")
    copy_code(tmp_path / "model")
    assert (tmp_path / "far.py").read_text() == "another's" and (tmp_path / "model" / "rbm.py").is_symlink()
    assert {file.name for file in (tmp_path / "model").iterdir()} == set(HUB_FILES)
    for name in set(HUB_FILES) - {"rbm.py"}:
        assert (tmp_path / "model" / name).read_bytes() == (REPO / "modeling_blip_rbm" / name).read_bytes()


def test_unknown_tower():
    with pytest.raises(ValueError, match="no_such_tower"):
        tiny_config(vision_config={"model_type": "no_such_tower"})
