"""The test classes that transformers would have for BLIP-RBM in `tests/models/`, and the one for its BLIP beside them.

Read by pytest in a process whose `TRANSFORMERS_TESTS` names the cache folder; see `__main__.py`.
"""

import os
import unittest
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, set_seed

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration

from .generation import Generation
from .source import load


checkout = os.environ.get("TRANSFORMERS_TESTS_CHECKOUT")
common = load(Path(os.environ["TRANSFORMERS_TESTS"]), Path(checkout) if checkout else None)
torch.set_num_threads(1)

LAYERS, HEADS, TOKENS, WORDS = 2, 4, 7, 99
# Heads and layers are those of the tower: the common tests know one number of each. Pad, start and end come first.
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 28,
    "intermediate_size": 37,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
BLIP_TOWER = {
    "hidden_size": 20,
    "intermediate_size": 31,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 30,
    "patch_size": 6,
}
DINOV2 = {
    "model_type": "dinov2",
    "hidden_size": 20,
    "mlp_ratio": 2,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 30,
    "patch_size": 6,
}
EFFICIENTNET = {  # widths are multiples of 8; the stem's and the last one's follow from width_coefficient
    "model_type": "efficientnet",
    "image_size": 30,
    "width_coefficient": 0.1,
    "depth_coefficient": 1.0,
    "kernel_sizes": [3, 5],
    "in_channels": [32, 160],
    "out_channels": [160, 240],
    "depthwise_padding": [],
    "strides": [1, 2],
    "num_block_repeats": [1, 1],
    "expand_ratios": [1, 3],
    "num_hidden_layers": LAYERS,
    "hidden_dim": 128,
}
RBM = {"rbm_word_ids": [5, 7, 11, 13, 17], "rbm_hidden_size": 11}


class Tester:
    """What the common tests ask of a `model_tester`."""

    batch_size, is_training = 5, True
    num_hidden_layers, num_attention_heads = LAYERS, HEADS

    def __init__(self, config_class, vision, of_text, **settings):
        self.config_class, self.vision, self.settings = config_class, vision, settings
        # whose hidden states and attentions the model returns: the decoder's, or in stock BLIP the tower's
        self.seq_length = self.encoder_seq_length = TOKENS if of_text else (30 // 6) ** 2 + 1
        self.hidden_size = TEXT["hidden_size"] if of_text else vision["hidden_size"]

    def get_config(self):
        return self.config_class(vision_config=dict(self.vision), text_config=dict(TEXT), **self.settings)

    def prepare_config_and_inputs_for_common(self):
        input_ids = common.ids_tensor([self.batch_size, TOKENS], WORDS).clamp(min=5)  # no pads within a caption
        attention_mask = torch.ones_like(input_ids)
        attention_mask[:2, -2:] = 0
        pixel_values = common.floats_tensor([self.batch_size, 3, 30, 30])
        inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return self.get_config(), inputs


generation = common.GenerationTesterMixin
bases = (Generation,) if getattr(generation, "is_stand_in", False) else ()


class Common(*bases, generation, common.ModelTesterMixin):
    _is_composite = True
    additional_model_inputs = ["input_ids"]  # a mask needs its tokens

    def setUp(self):
        set_seed(0)
        common.global_rng.seed(0)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:  # transformers finds out by the class's name which labels it takes
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs


class StockBlip(Common, unittest.TestCase):
    all_model_classes = (BlipForConditionalGeneration,)
    model_tester = Tester(BlipConfig, BLIP_TOWER, of_text=False)


class BlipRBM(Common, unittest.TestCase):
    all_model_classes = (BlipRBMForConditionalGeneration,)
    model_tester = Tester(BlipRBMConfig, BLIP_TOWER, of_text=True, **RBM)


class BlipRBMDinov2(BlipRBM):
    model_tester = Tester(BlipRBMConfig, DINOV2, of_text=True, **RBM)


class BlipRBMEfficientNet(BlipRBM):
    model_tester = Tester(BlipRBMConfig, EFFICIENTNET, of_text=True, **RBM)


del Common  # not a test class of its own
