"""Frozen unimodal encoders for alignment: any vision tower, any text encoder, their embeddings computed once.

A vision encoder is a folder or Hub id; `NAME@6,12` takes the hidden states after layers 6 and 12 in the place of the
output. A BLIP-RBM gives its vision tower.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration
from modeling_blip_rbm.vision_blip_rbm import vision_tokens
from training.lib.checkpoints import write_array
from training.lib.distributed import own_processes
from training.lib.features import cache_features, tower_fingerprint


def load_image_processor(name: str):
    """The image processor of a vision model, for whole images: captions also speak of what a central crop would cut
    off."""
    processor = AutoImageProcessor.from_pretrained(name)
    if getattr(processor, "do_center_crop", False):
        processor.size, processor.do_center_crop = dict(processor.crop_size), False
    return processor


def load_vision_model(name: str):
    """A vision model by folder or Hub id, or the tower of a BLIP-RBM."""
    if AutoConfig.from_pretrained(name).model_type == BlipRBMConfig.model_type:
        return BlipRBMForConditionalGeneration.from_pretrained(name, dtype=torch.float32).vision_model
    return AutoModel.from_pretrained(name, dtype=torch.float32)


@torch.no_grad()
def states_of_blank(tower, image_processor):
    """What a tower says of an image without content, (1, N, C) or a feature map: for its shape, as the processor's size
    need not be the one that the tower was trained on."""
    image = np.zeros((32, 32, 3), np.uint8)
    pixel_values = image_processor(image, return_tensors="pt")["pixel_values"]
    return tower(pixel_values.to(next(tower.parameters()).device)).last_hidden_state


class LayersOfTower(torch.nn.Module):
    """A vision tower whose tokens are the hidden states after some of its layers, side by side: (B, N, layers * C)."""

    def __init__(self, tower, layers: list[int]):
        super().__init__()
        count = tower.config.num_hidden_layers
        if not layers or min(layers) < 0 or max(layers) > count:
            raise ValueError(f"layers are {layers}, but this tower has 0 (embeddings) to {count}")
        self.tower, self.config = tower, tower.config
        self.register_buffer("layers", torch.tensor(layers, dtype=torch.float32))  # part of the features' fingerprint

    def forward(self, pixel_values):
        states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        return BaseModelOutput(last_hidden_state=torch.cat([states[int(layer)] for layer in self.layers], dim=-1))


class VisionEncoder:
    """A frozen tower with its image processor.

    Attributes:
        pooling: of its tokens: [CLS ; mean] (SAIL, arXiv 2412.04616) where there is a CLS token, the mean of a feature
            map.
        parts: name and columns of each layer among the pooled features.
    """

    def __init__(self, spec: str):
        name, _, layers = spec.partition("@")
        self.name = Path(name).name
        self.tower, self.image_processor = load_vision_model(name), load_image_processor(name)
        wanted = [int(layer) for layer in layers.split(",")] if layers else []
        if wanted:
            self.tower = LayersOfTower(self.tower, wanted)
        self.tower.eval().requires_grad_(False).to(own_processes().device)
        states = states_of_blank(self.tower, self.image_processor)
        self.pooling = "mean" if states.dim() == 4 else "cls_mean"
        width = vision_tokens(BaseModelOutput(states)).shape[-1]
        self.parts = self._parts(wanted, width)

    def _parts(self, layers: list[int], width: int) -> dict[str, np.ndarray]:
        copies = 2 if self.pooling == "cls_mean" else 1  # [CLS of all layers ; mean of all layers]
        if not layers:
            return {self.name: np.arange(copies * width)}
        each = width // len(layers)
        return {
            f"{self.name}@{layer}": np.concatenate([np.arange(each) + i * each + c * width for c in range(copies)])
            for i, layer in enumerate(layers)
        }

    def embed(self, dataset: Dataset, cache_dir: str | Path, views: int = 1):
        """`FeatureStore` of the pooled images (images, views, V)."""
        settings = {"views": views, "dtype": "auto", "pooling": self.pooling}
        return cache_features(self.tower, self.image_processor, dataset, cache_dir, **settings)


class TextEncoder:
    """A frozen sentence encoder: mean over the tokens, as sentence-transformers pool."""

    def __init__(self, name: str):
        self.name = Path(name).name
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        self.model.to(own_processes().device)

    @torch.no_grad()
    def embed(self, captions: list[str], cache_dir: str | Path, batch_size: int = 128) -> np.ndarray:
        """(captions, D) fp16, memory-mapped; found again by a hash of weights and captions."""
        digest = hashlib.sha256(tower_fingerprint(self.model).encode())
        digest.update("\0".join(captions).encode())
        file = Path(cache_dir) / f"text-{digest.hexdigest()[:16]}.npy"
        if not file.exists():
            order = np.argsort([len(caption) for caption in captions], kind="stable")  # like lengths together: few pads
            embeddings = np.empty((len(captions), self.model.config.hidden_size), np.float16)
            for start in tqdm(range(0, len(captions), batch_size), desc=f"encode {len(captions)} captions"):
                rows = order[start : start + batch_size]
                batch = self.tokenizer([captions[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
                batch = batch.to(self.model.device)
                states = self.model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None]
                embeddings[rows] = ((states * mask).sum(1) / mask.sum(1)).half().cpu().numpy()
            write_array(file, embeddings)
        return np.load(file, mmap_mode="r")
