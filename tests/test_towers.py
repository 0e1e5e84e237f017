"""Two vision towers side by side."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BlipImageProcessor, Dinov2Model, EfficientNetConfig, EfficientNetModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.towers_blip_rbm import TwoTowers
from tests.conftest import randomise, tiny_config
from tests.stages import in_process
from training.build_captioner import at_image_size, load_tower


EFFICIENTNET = EfficientNetConfig(
    image_size=65, width_coefficient=0.3, depth_coefficient=0.2, hidden_dim=384, depthwise_padding=[]
)
DINOV2 = {"model_type": "dinov2", "hidden_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7}


class Grid(nn.Module):
    """The mean colour of each part of the image: (B, 3, side, side), or with a CLS token (B, 1 + side * side, 3)."""

    def __init__(self, side: int, image_size: int, has_cls: bool = False):
        super().__init__()
        self.side, self.has_cls = side, has_cls
        self.config = SimpleNamespace(image_size=image_size, model_type="vit" if has_cls else "resnet")

    def forward(self, pixel_values):
        self.seen = pixel_values
        states = nn.functional.adaptive_avg_pool2d(pixel_values, self.side)
        if self.has_cls:
            cls = pixel_values.mean((2, 3))[:, None]
            states = torch.cat([cls, states.flatten(2).transpose(1, 2)], 1)
        return BaseModelOutput(last_hidden_state=states)


@pytest.mark.parametrize("has_cls", [True, False])
def test_the_second_sees_the_same_places_in_its_own_colours(has_cls):
    towers = TwoTowers(Grid(5, 70), Grid(10, 40, has_cls))
    first, second = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    towers.set_statistics(*first, *second)
    # a picture that does not change when it is made smaller: blocks of 14 pixels become blocks of 8
    picture = torch.rand(3, 3, 5, 5)
    mean, std, second_mean, second_std = (torch.tensor(v)[:, None, None] for v in (*first, *second))
    pixel_values = ((picture - mean) / std).repeat_interleave(14, 2).repeat_interleave(14, 3)
    states = towers(pixel_values).last_hidden_state
    assert states.shape == (3, 9 if has_cls else 6, 5, 5)
    torch.testing.assert_close(states[:, :3], (picture - mean) / std)
    assert towers.second.seen.shape == (3, 3, 40, 40)
    expected = (picture - second_mean) / second_std
    # at the borders of blocks the filter mixes neighbours
    torch.testing.assert_close(towers.second.seen[:, :, 4::8, 4::8], expected, atol=0.05, rtol=0)
    torch.testing.assert_close(states[:, 3:6], nn.functional.adaptive_avg_pool2d(towers.second.seen, 5))
    if has_cls:
        whole = towers.second.seen.mean((2, 3))[:, :, None, None]
        torch.testing.assert_close(states[:, 6:], whole.expand(-1, -1, 5, 5))


def test_a_captioner_of_two_towers_saved_and_loaded(tmp_path):
    torch.manual_seed(3)
    config = tiny_config(vision_config=EFFICIENTNET.to_dict(), second_vision_config=DINOV2 | {"image_size": 28})
    model = randomise(BlipRBMForConditionalGeneration(config), std=0.05).eval()
    assert model.config.vision_hidden_size == 384 + 2 * 22 and model.config.rbm_visible_size == 384 + 2 * 22
    model.vision_model.set_statistics([0.5] * 3, [0.5] * 3, [0.4] * 3, [0.2] * 3)
    pixel_values = torch.randn(3, 3, 65, 65)
    model.save_pretrained(tmp_path)
    loaded = BlipRBMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded.vision_model.shift, model.vision_model.shift)
    expected = model.encode_image(pixel_values).image_embeds
    torch.testing.assert_close(loaded.encode_image(pixel_values).image_embeds, expected, atol=1e-5, rtol=1e-4)
    assert (
        loaded.generate(pixel_values, max_new_tokens=5).tolist()
        == model.generate(pixel_values, max_new_tokens=5).tolist()
    )
    # folded and in half precision as well
    half = loaded.to(torch.bfloat16).optimize_for_inference()
    torch.testing.assert_close(half.encode_image(pixel_values).image_embeds.float(), expected, atol=0.1, rtol=0.1)


def test_the_first_tower_must_give_a_feature_map():
    with pytest.raises(ValueError, match="vision_config is a 'dinov2': exchange the two"):
        tiny_config(vision_config=DINOV2, second_vision_config=EFFICIENTNET.to_dict())


@torch.no_grad()
def test_a_tower_for_smaller_images_says_the_same(towers):
    tower = Dinov2Model.from_pretrained(towers / "vision").eval()
    small = torch.randn(3, 3, 21, 21)
    expected = tower(small).last_hidden_state  # which interpolates its positions every time
    smaller = at_image_size(tower, 21).eval()
    assert smaller.config.image_size == 21 and smaller.embeddings.position_embeddings.shape[1] == 1 + 3 * 3
    torch.testing.assert_close(smaller(small).last_hidden_state, expected)
    with pytest.raises(ValueError, match="patches of 7: choose a multiple"):
        at_image_size(tower, 20)
    with pytest.raises(ValueError, match="'efficientnet' tower has no positions"):
        at_image_size(EfficientNetModel(EFFICIENTNET), 21)


def test_the_stage_builds_a_captioner_of_two_towers(towers, tmp_path):
    EfficientNetModel(EFFICIENTNET).save_pretrained(tmp_path / "first")
    settings = {"size": {"height": 65, "width": 65}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    BlipImageProcessor(**settings).save_pretrained(tmp_path / "first")
    in_process("build_captioner", "--vision", "first", "--text", towers / "text", "--output_dir", "one", cwd=tmp_path)
    both = ["--second", towers / "vision", "--second_size", "21"]
    in_process("build_captioner", "--decoder", "one", "--vision", "one", *both, "--output_dir", "two", cwd=tmp_path)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["second_vision_config"]["image_size"] == 21 and config["vision_hidden_size"] == 384 + 2 * 22
    one, two = (BlipRBMForConditionalGeneration.from_pretrained(tmp_path / name).eval() for name in ("one", "two"))
    pixel_values = torch.randn(2, 3, 65, 65)
    states = two.vision_model(pixel_values).last_hidden_state
    torch.testing.assert_close(states[:, :384], one.vision_model(pixel_values).last_hidden_state)
    dinov2 = BlipImageProcessor.from_pretrained(towers / "vision")
    scale = torch.tensor([0.5 / std for std in dinov2.image_std])
    torch.testing.assert_close(two.vision_model.scale[:, 0, 0], scale)
    for vision, wrong in (("two", "has two towers side by side"), ("one@1", "only taken whole: give .*one")):
        with pytest.raises(ValueError, match=wrong):
            load_tower(str(tmp_path / vision))
    with pytest.raises(SystemExit):
        in_process(
            "build_captioner", "--vision", "first", "--text", towers / "text", *both, "--output_dir", "x", cwd=tmp_path
        )
