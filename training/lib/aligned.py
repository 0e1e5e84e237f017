"""Layers that bring images and sentences of frozen encoders into one space, and tokens that go through such a layer."""

import json
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.lib.contrastive import info_nce_in_pieces, sigmoid_in_pieces
from training.lib.distributed import from_all_processes


class GatedLayer(nn.Module):
    """SAIL's alignment layer: g(ReLU6(f1 x) * f2 x), (n, in) -> (n, out)."""

    def __init__(self, in_size: int, hidden_size: int, out_size: int):
        super().__init__()
        self.gate, self.value = nn.Linear(in_size, hidden_size), nn.Linear(in_size, hidden_size)
        self.out = nn.Linear(hidden_size, out_size)

    def forward(self, x):
        return self.out(F.relu6(self.gate(x)) * self.value(x))


class Projection(nn.Module):
    """Image and sentence in one space; their similarity is the cosine there.

    Args:
        hidden_size: of the gated layers; None: linear ones.
    """

    def __init__(
        self, image_size: int, text_size: int, dim: int, hidden_size: Optional[int], dropout: float, loss: str
    ):
        super().__init__()
        head = lambda size: nn.Sequential(
            nn.LayerNorm(size),
            nn.Dropout(dropout),
            nn.Linear(size, dim) if hidden_size is None else GatedLayer(size, hidden_size, dim),
        )
        self.image, self.text = head(image_size), head(text_size)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0 if loss == "sigmoid" else 0.0))
        self.loss = loss

    def embed_images(self, images):
        return F.normalize(self.image(images), dim=-1)

    def embed_texts(self, texts, words=None):
        return F.normalize(self.text(texts), dim=-1)

    def similarity(self, images, texts):
        """(n, m) of what `embed_images` and `embed_texts` give."""
        return images @ texts.T

    def forward(self, images, texts, words, image_owner, text_owner, chunk: int):
        """The loss of a batch: images (n, V), texts (m, D); owners: the number of the image that each belongs to."""
        z_image, z_text = (from_all_processes(z) for z in (self.embed_images(images), self.embed_texts(texts)))
        owners = from_all_processes(image_owner), from_all_processes(text_owner)
        in_pieces = sigmoid_in_pieces if self.loss == "sigmoid" else info_nce_in_pieces
        return in_pieces(z_image, z_text, *owners, self.log_scale.clamp(max=np.log(100.0)).exp(), self.bias, chunk)


def load_image_layer(run: str | Path) -> nn.Module:
    """The image layer (n, V) -> (n, dim) of a finished `probe` or `sail` run on one tower that is pooled by its mean.

    Raises:
        FileNotFoundError: if the run has not ended.
        ValueError: if it is of another kind.
    """
    settings = json.loads((Path(run) / "align.json").read_text())["align"]
    if settings["kind"] == "rbm" or len(settings["vision"]) > 1:
        raise ValueError(
            f"{run} is of kind {settings['kind']!r} on {len(settings['vision'])} towers; aligned tokens need probe or sail on one"
        )
    weights = torch.load(Path(run) / "best.pt", weights_only=True, map_location="cpu")
    image_size, text_size = (len(weights[f"{side}.0.weight"]) for side in ("image", "text"))
    hidden_size = settings["hidden_size"] if settings["kind"] == "sail" else None
    projection = Projection(image_size, text_size, settings["dim"], hidden_size, settings["dropout"], settings["loss"])
    projection.load_state_dict(weights)
    return projection.image.eval().requires_grad_(False)


class AlignedTokens:
    """A `FeatureStore` of tokens, each through the image layer of a trained `Projection` (before it is put on the
    sphere).

    The layer has learned on pooled images, [CLS ; mean of the patches] or the mean; a token takes the place of the
    mean.
    """

    def __init__(self, store, layer: nn.Module):
        self.store, self.layer, self.num_views = store, layer, store.num_views

    @torch.no_grad()
    def aligned(self, tokens: torch.Tensor) -> torch.Tensor:
        if len(self.layer[0].weight) == 2 * tokens.shape[-1]:
            tokens = torch.cat([tokens[..., :1, :].expand_as(tokens), tokens], dim=-1)
        return self.layer(tokens)

    def view(self, row: int, view: int = 0) -> torch.Tensor:
        return self.aligned(self.store.view(row, view).float())

    def batch(self, rows, view=0) -> torch.Tensor:
        return self.aligned(self.store.batch(rows, view))
