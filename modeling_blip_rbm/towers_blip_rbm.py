"""Two vision towers side by side: what one was not trained to see, the other may.

Features of several encoders, channel by channel, as "Eyes Wide Shut?" (Tong et al., CVPR 2024, arXiv 2401.06209) and Eagle (Shi et al., 2024,
arXiv 2408.15998) use them; here a convolutional network of labels and a small self-supervised transformer.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from .configuration_blip_rbm import TOWERS_WITH_CLS


class TwoTowers(nn.Module):
    """A tower that gives a feature map and, at each of its places, what a second tower says there and of the whole image.

    Both see the same pixels; the second one's are made smaller, and brought to the mean and deviation that it was trained with. Its
    patches are averaged onto the first one's grid.

    Args:
        first: gives `last_hidden_state` (B, C1, h, w).
        second: gives `last_hidden_state` (B, C2, h2, w2), or with a CLS token (B, 1 + h2 * h2, C2), for images of its config's `image_size`.

    Attributes:
        scale, shift (3, 1, 1): from the first one's pixel values to the second one's; part of the weights.
    """

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second
        self.has_cls = second.config.model_type in TOWERS_WITH_CLS
        self.register_buffer("scale", torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    @torch.no_grad()
    def set_statistics(self, first_mean, first_std, second_mean, second_std):
        """Of the pixel values (0 to 1, by channel) that the two image processors normalise with."""
        column = lambda values: torch.tensor(values, dtype=torch.float64)[:, None, None]
        self.scale.copy_(column(first_std) / column(second_std))
        self.shift.copy_((column(first_mean) - column(second_mean)) / column(second_std))

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        """`last_hidden_state` (B, C1 + C2, h, w), or with a CLS token (B, C1 + 2 C2, h, w)."""
        grid = self.first(pixel_values).last_hidden_state
        size = self.second.config.image_size
        pixels = F.interpolate(pixel_values.float(), (size, size), mode="bilinear", antialias=True)
        pixels = pixels * self.scale.float() + self.shift.float()
        states = self.second(pixels.to(pixel_values.dtype)).last_hidden_state
        whole = []
        if self.has_cls:
            cls, patches = states[:, 0], states[:, 1:]
            side = round(patches.shape[1] ** 0.5)
            states = patches.transpose(1, 2).unflatten(-1, (side, side))
            whole = [cls[:, :, None, None].expand(-1, -1, *grid.shape[2:])]
        there = F.adaptive_avg_pool2d(states, grid.shape[2:])
        return BaseModelOutput(
            last_hidden_state=torch.cat([grid, *(part.to(grid.dtype) for part in (there, *whole))], 1)
        )
