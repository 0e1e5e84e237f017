"""Small models with random weights. Sizes are distinct primes wherever they may be, so a transposed axis cannot pass."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor


torch.set_num_threads(1)  # the models are tiny: threads only cost

REPO = Path(__file__).resolve().parent.parent
CHECKPOINT = REPO / "checkpoints" / "blip-rbm-small"
WORDS = (
    "a the on in of and with is are dog cat man woman boy girl ball grass beach snow red blue black white runs jumps "
)
WORDS += "sits plays water park street photo picture two three ##s ##ing bike horse tree car child people standing"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), "[DEC]", "[ENC]"]
WORD_IDS = [VOCABULARY.index(word) for word in "dog cat man woman boy girl ball grass beach snow red".split()]  # K = 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_tokenizer():
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        mask_token="[MASK]",
    )


TEXT_CONFIG = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 28,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 31,
    "bos_token_id": VOCABULARY.index("[DEC]"),
    "sep_token_id": VOCABULARY.index("[SEP]"),
    "eos_token_id": VOCABULARY.index("[SEP]"),
    "pad_token_id": 0,
    "initializer_range": 0.5,  # so that random captions differ from image to image
}
VISION_CONFIG = {
    "hidden_size": 22,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "initializer_range": 0.5,
}
RBM_SETTINGS = {"rbm_word_ids": WORD_IDS, "rbm_hidden_size": 7}


@torch.no_grad()
def randomise(model, std=0.4):
    """Weights large enough that different images get different captions."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


@pytest.fixture
def blip():
    config = BlipConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG)
    return randomise(BlipForConditionalGeneration(config))


@pytest.fixture
def model(blip):
    """A converted BLIP whose RBM has random weights; the gate of refine is still 0."""
    model = BlipRBMForConditionalGeneration.from_blip(blip, **RBM_SETTINGS)
    randomise(model.rbm_layer.rbm)
    return model


@pytest.fixture
def processor():
    image_processor = BlipImageProcessor(size={"height": 24, "width": 24})
    return BlipRBMProcessor(image_processor, tiny_tokenizer())


@pytest.fixture
def saved_model(model, processor, tmp_path):
    """The folder of a whole model, as on the Hub."""
    folder = tmp_path / "blip-rbm-tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pixel_values():
    return torch.randn(5, 3, 24, 24)


def random_image(width=37, height=29, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tiny_config(**settings):
    return BlipRBMConfig(**{"vision_config": VISION_CONFIG, "text_config": TEXT_CONFIG, **RBM_SETTINGS, **settings})


pytest_plugins = ["tests.stages"]  # fixtures of the training stages
