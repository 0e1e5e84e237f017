"""ONNX: the vision encoder with the RBM, and the decoder's step, for ONNX Runtime and what reads its files.

    pip install 'blip-rbm[onnx]'
    python -m training.export_onnx --model checkpoints/blip-rbm-small --output_dir runs/onnx

`image.onnx`: pixel_values (B, 3, S, S) -> image_embeds (B, N, D), hidden_input (B, H), and of each decoder layer the
image's keys and values (B, heads, N, head size). `decode.onnx`, by transformers' own exporter: token ids and caches ->
logits and caches. Re-rank and guide are tensor arithmetic on hidden_input, and stay outside. The files are checked by
captioning images greedily with ONNX Runtime alone: the tokens must be PyTorch's.
"""

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.checkpoints import refuse_other_output
from training.lib.stage import run_stage


class ImageEncoder(torch.nn.Module):
    """All that is computed once an image."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        encoding = self.model.encode_image(pixel_values)
        attentions = [layer.crossattention.self for layer in self.model.text_decoder.bert.encoder.layer]
        cross = [
            product(encoding.image_embeds).unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for attention in attentions
            for product in (attention.key, attention.value)
        ]
        return encoding.image_embeds, encoding.hidden_input, *cross


@torch.no_grad()
def export(model, output_dir: Path, pixel_values: torch.Tensor):
    """Write `image.onnx` and `decode.onnx`. pixel_values (B, 3, S, S) with B > 1: a batch of one would be taken for a
    constant.

    Raises:
        ImportError: if what exports is not installed.
    """
    from transformers.exporters import OnnxExporter
    from transformers.exporters.configs import OnnxConfig

    program = torch.onnx.export(
        ImageEncoder(model).eval(),
        (pixel_values,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    settings = copy.deepcopy(model.generation_config)
    settings.update(num_beams=1, max_new_tokens=4, max_length=None, repetition_penalty=1.0, length_penalty=1.0)
    start = torch.full((len(pixel_values), 3), model.config.text_config.bos_token_id)
    inputs = {
        "pixel_values": pixel_values,
        "input_ids": start,
        "attention_mask": torch.ones_like(start),
        "rbm": False,
        "past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache()),
    }
    exported = OnnxExporter().export_for_generation(
        model, inputs, OnnxConfig(dynamic=True), generation_config=settings, multi_token_decode=True
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    exported.save_pretrained(output_dir)
    program.save(str(output_dir / "image.onnx"))
    return exported


def caption(folder: Path, model, pixel_values: torch.Tensor, max_new_tokens: int = 12) -> np.ndarray:
    """(B, 1 + max_new_tokens) token ids, greedily, by ONNX Runtime."""
    import onnxruntime

    text = model.config.text_config
    image, decode = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("image", "decode"))
    image_embeds, _, *cross = image.run(None, {image.get_inputs()[0].name: pixel_values.numpy()})
    names = [entry.name for entry in decode.get_inputs()]
    size = text.hidden_size // text.num_attention_heads
    cache = {}
    for name in names:
        if "past_key_values" not in name:
            continue
        layer = int(name.split("layers.")[1].split(".")[0])
        empty = np.zeros((len(image_embeds), text.num_attention_heads, 0, size), np.float32)
        cache[name] = cross[2 * layer + name.endswith("values")] if "cross_attention" in name else empty
    ids = np.full((len(image_embeds), 1), text.bos_token_id)
    for _ in range(max_new_tokens):
        new = ids[:, next(iter(cache.values())).shape[2] :]
        feed = cache | {"input_ids": new, "attention_mask": np.ones_like(ids)}
        feed |= {name: image_embeds for name in names if name.endswith("image_embeds")}
        outputs = dict(
            zip((o.name for o in decode.get_outputs()), decode.run(None, {n: feed[n] for n in names if n in feed}))
        )
        ids = np.concatenate([ids, outputs["logits"][:, -1:].argmax(-1)], 1)
        cache = {name: outputs.get(name.replace("input.", "output."), value) for name, value in cache.items()}
    return ids


def main():
    parser = argparse.ArgumentParser(description="Export a BLIP-RBM to ONNX and check the files with ONNX Runtime.")
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--output_dir", required=True)
    args = parser.parse_args()
    refuse_other_output(args.output_dir)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    processor = BlipRBMProcessor.from_pretrained(args.model)
    images = [np.random.default_rng(i).integers(0, 256, (224, 224, 3), dtype=np.uint8) for i in range(2)]
    pixel_values = processor(images=images)["pixel_values"]
    output_dir = Path(args.output_dir)
    export(model, output_dir, pixel_values)
    ours = caption(output_dir, model, pixel_values)
    theirs = model.generate(
        pixel_values, rbm_guidance=0.0, rbm_rerank=False, num_beams=1, max_new_tokens=12, repetition_penalty=1.0
    ).numpy()
    sep = model.config.text_config.sep_token_id
    cut = lambda rows: [row[: row.index(sep)] if sep in row else row for row in rows.tolist()]
    if cut(ours) != cut(theirs):
        raise RuntimeError(f"ONNX Runtime says {cut(ours)}, PyTorch {cut(theirs)}: do not use {output_dir}")
    sizes = {file.name: f"{file.stat().st_size / 1e6:.1f} MB" for file in sorted(output_dir.glob("*.onnx*"))}
    print(f"{output_dir}: {json.dumps(sizes)}; ONNX Runtime says what PyTorch says")


if __name__ == "__main__":
    run_stage(main)
