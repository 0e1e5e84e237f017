"""Refine by an MLP or a linear map in place of the RBM, of as many parameters: what of refine's effect is the RBM's?

    python -m experiments.mlp_adapter.train_adapter experiments/mlp_adapter/refine-small.yaml \
        --model checkpoints/blip-rbm-small \
        --dataset flickr8k --output_dir runs/adapter

The captioner stage with `--parts refine`, but the shift and the tokens come from the MLP, or with `--linear true` from a linear map. What is measured is in
captioner.json; the model cannot be loaded again, as a BLIP-RBM has no such layer.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import TrainingArguments

from modeling_blip_rbm.vision_blip_rbm import pool_tokens
from training.lib.arguments import CaptionerArguments, DataArguments, parse_arguments
from training.lib.stage import run_stage
from training.train_captioner import train_captioner, train_only


class Adapter(torch.nn.Module):
    """Refine without an RBM, for comparison: shift and tokens by an MLP, or a linear map, of the same image, of about as many parameters as
    `RBMLayer`'s shift and causes. Where the RBM reads tokens, each token is shifted by what the MLP makes of it alone."""

    def __init__(self, rbm_layer, width: int, linear: bool):
        super().__init__()
        self.rbm, self.pooling, self.cause_tokens = rbm_layer.rbm, rbm_layer.pooling, rbm_layer.cause_tokens
        self.shift = self.map_of(width, rbm_layer.rbm.hidden_size, linear)
        self.causes = (
            self.map_of(self.cause_tokens * width, rbm_layer.rbm.hidden_size, linear) if self.cause_tokens else None
        )
        self.gate = torch.nn.Parameter(torch.zeros(1))

    def map_of(self, outputs: int, hidden_size: int, linear: bool) -> torch.nn.Module:
        """From the standardised image to so many outputs, with hidden_size * outputs parameters, by a bottleneck."""
        bottleneck = max(1, round(hidden_size * outputs / (self.rbm.visible_size + outputs)))
        return torch.nn.Sequential(
            torch.nn.Linear(self.rbm.visible_size, bottleneck, bias=False),
            torch.nn.Identity() if linear else torch.nn.GELU(),
            torch.nn.Linear(bottleneck, outputs, bias=False),
        )

    def forward(self, tokens, image_embeds, refine: bool = True):
        x = self.rbm.standardise(pool_tokens(tokens, self.pooling))
        places = x if x.dim() == 3 else x[:, None]
        pooled = places.mean(1)
        if not refine:
            return image_embeds, pooled
        shift = self.gate * self.shift(places)
        if x.dim() == 3:
            shift = torch.nn.functional.pad(shift, (0, 0, 0, image_embeds.shape[1] - shift.shape[1]))
        refined = image_embeds + shift.to(image_embeds.dtype)
        if self.causes is not None and self.gate != 0:
            causes = (self.gate * self.causes(pooled)).view(len(pooled), self.cause_tokens, -1)
            refined = torch.cat([refined, causes.to(refined.dtype)], 1)
        return refined, pooled


@dataclass
class AdapterArguments:
    linear: bool = field(default=False, metadata={"help": "a linear map of low rank in place of the MLP"})


def adapter_parts(model, captioner: CaptionerArguments, linear: bool) -> list[torch.nn.Parameter]:
    """Put the adapter in the RBM layer's place; its parameters, all others frozen."""
    model.rbm_layer = Adapter(model.rbm_layer, model.config.text_config.encoder_hidden_size, linear)
    maps = [part for part in (model.rbm_layer.shift, model.rbm_layer.causes) if part is not None]
    return train_only(model, [*(p for part in maps for p in part.parameters()), model.rbm_layer.gate])


def main():
    data, captioner, args, adapter = parse_arguments(
        DataArguments, CaptionerArguments, TrainingArguments, AdapterArguments
    )
    if captioner.parts != "refine":
        raise ValueError(f"--parts is {captioner.parts!r}, but the adapter stands in refine's place: give refine")
    train_captioner(data, captioner, args, choose_parts=partial(adapter_parts, linear=adapter.linear))


if __name__ == "__main__":
    run_stage(main)
