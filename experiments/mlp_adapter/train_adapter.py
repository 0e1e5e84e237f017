"""Refine by an MLP in place of the RBM, of as many parameters: what of refine's effect is the RBM's?

    python -m experiments.mlp_adapter.train_adapter experiments/mlp_adapter/refine-small.yaml \
        --model checkpoints/blip-rbm-small \
        --dataset flickr8k --output_dir runs/adapter

The captioner stage with `--parts refine`, but the shift and the tokens come from the MLP. What is measured is in
captioner.json; the model cannot be loaded again, as a BLIP-RBM has no such layer.
"""

import torch
from transformers import TrainingArguments

from modeling_blip_rbm.vision_blip_rbm import pool_tokens
from training.lib.arguments import CaptionerArguments, DataArguments, parse_arguments
from training.lib.stage import run_stage
from training.train_captioner import train_captioner, train_only


class MLPAdapter(torch.nn.Module):
    """Refine without an RBM, for comparison: the same shift and tokens by an MLP on the same pooled image, of about as
    many parameters as `RBMLayer`'s shift and causes."""

    def __init__(self, rbm_layer, width: int):
        super().__init__()
        self.rbm, self.pooling, self.cause_tokens = rbm_layer.rbm, rbm_layer.pooling, rbm_layer.cause_tokens
        outputs = (1 + self.cause_tokens) * width
        own = rbm_layer.rbm.hidden_size * outputs
        bottleneck = max(1, round(own / (self.rbm.visible_size + outputs)))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(self.rbm.visible_size, bottleneck, bias=False),
            torch.nn.GELU(),
            torch.nn.Linear(bottleneck, outputs, bias=False),
        )
        self.gate = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, image_embeds, refine: bool = True):
        x = self.hidden_input(tokens)
        return (self.refine(image_embeds, x) if refine else image_embeds), x

    def hidden_input(self, tokens):  # here simply the standardised pooled image
        return self.rbm.standardise(pool_tokens(tokens, self.pooling))

    def refine(self, image_embeds, x):
        shift, *tokens = (
            (self.gate * self.mlp(x)).view(len(x), 1 + self.cause_tokens, -1).to(image_embeds.dtype).split(1, 1)
        )
        return torch.cat([image_embeds + shift, *(tokens if self.gate != 0 else [])], 1)


def adapter_parts(model, captioner: CaptionerArguments) -> list[torch.nn.Parameter]:
    """Put the adapter in the RBM layer's place; its parameters, all others frozen."""
    model.rbm_layer = MLPAdapter(model.rbm_layer, model.config.text_config.encoder_hidden_size)
    return train_only(model, [*model.rbm_layer.mlp.parameters(), model.rbm_layer.gate])


def main():
    data, captioner, args = parse_arguments(DataArguments, CaptionerArguments, TrainingArguments)
    if captioner.parts != "refine":
        raise ValueError(f"--parts is {captioner.parts!r}, but the adapter stands in refine's place: give refine")
    train_captioner(data, captioner, args, choose_parts=adapter_parts)


if __name__ == "__main__":
    run_stage(main)
