"""How far `generate` is from what the processor can do: BLIP-base's shape, 4 images, 3 beams, RBM off.

    python -m benchmarks.generate_bound --output benchmarks/results/generate_bound.json

The vision tower and the image's keys and values are bound by arithmetic: their operations (PyTorch's FlopCounterMode) at the rate of one of
their own products, alone. The steps of decoding are bound by that or by memory, whichever takes longer: the decoder's weights and the
image's keys and values, each read once a step, at the rate at which PyTorch sums a large tensor. What the time is spent on is PyTorch's
profiler's answer.
"""

import argparse
import timeit
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generate import IMAGE_SIZE, NEW_TOKENS, Ours, blip_base
from modeling_blip_rbm.inference_blip_rbm import ImageCache, behind_the_door
from training.lib.checkpoints import write_json


KINDS = {  # of operations, by parts of their names
    "linear layers": ("linear", "addmm", "aten::mm", "_int_mm"),
    "attention": ("bmm", "attention", "softmax"),
    "memory": ("copy_", "cat", "index_select", "empty", "clone"),
}


def seconds_of(function, repeats: int = 7) -> float:
    """Least of some runs, after one that warms up: other work on the machine only adds."""
    function()
    return min(timeit.repeat(function, number=1, repeat=repeats))


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def shares(function) -> dict[str, float]:
    """Of the time in operators, the share of every kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    seconds = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "all else")
        seconds[kind] += event.self_cpu_time_total
    return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


def bytes_of_a_step(model, cache: ImageCache) -> int:
    """Weights that every step reads, all of the decoder's linear layers but those that make the image's keys and values; and these."""
    layers = {n: m for n, m in model.text_decoder.named_modules() if isinstance(m, torch.nn.Linear)}
    of_image = ("crossattention.self.key", "crossattention.self.value")
    weights = [layer.weight for name, layer in layers.items() if not name.endswith(of_image)]
    cached = [t for layer in cache.cross_attention_cache.layers for t in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in weights + cached)


@torch.no_grad()
def measure(dtype: torch.dtype, bandwidth: float, batch: int = 4, beams: int = 3) -> dict:
    """Args: bandwidth: bytes per second."""
    model, size = blip_base()[1].to(dtype), IMAGE_SIZE["blip_base"]
    ours, pixels = Ours(model, rbm=False), torch.randn(batch, 3, size, size, dtype=dtype)
    image = ours.vision(pixels)
    decode = lambda: ours.decode(image, NEW_TOKENS, num_beams=beams, do_sample=False)
    prepared = behind_the_door(model)
    new_cache = lambda: prepared.new_cache(image.image_embeds)
    model.auto_optimize = False  # packed products are not counted: the model's own modules, in training's way
    hook = model.register_forward_pre_hook(lambda module, args: None)
    own_keys = lambda: [
        (layer.crossattention.self.key(image.image_embeds), layer.crossattention.self.value(image.image_embeds))
        for layer in model.text_decoder.bert.encoder.layer
    ]
    counted = {"vision": operations(lambda: model.vision_model(pixels)), "keys and values": operations(own_keys)}
    counted["steps"] = operations(decode) - beams * counted["keys and values"]
    hook.remove()
    mlp, tokens = prepared.tower.encoder.layers[0].mlp.fc1, image.image_embeds
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
    rate = operations(lambda: torch.nn.functional.linear(tokens, weight)) / seconds_of(lambda: mlp(tokens))
    cache = new_cache()
    seconds = {"vision": seconds_of(lambda: ours.vision(pixels)), "keys and values": seconds_of(new_cache)}
    seconds["steps"] = seconds_of(decode) - seconds["keys and values"]
    spent = {"vision": shares(lambda: ours.vision(pixels)), "decoding": shares(decode)}
    bound = {part: count / rate for part, count in counted.items()}
    bound["steps"] = max(bound["steps"], NEW_TOKENS * bytes_of_a_step(model, cache) / bandwidth)
    return {
        "gigaflops": rate / 1e9,
        "seconds": seconds,
        "bound": bound,
        "shares": spent,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="results file")
    args = parser.parse_args()
    memory = torch.randn(10**8)
    bandwidth = memory.nbytes / seconds_of(memory.sum, repeats=30)
    results = {"threads": torch.get_num_threads(), "gigabytes_per_second": bandwidth / 1e9}
    for dtype in ("float32", "bfloat16"):
        results[dtype] = measure(getattr(torch, dtype), bandwidth)
        print(f"{dtype}: {results[dtype]['gigaflops']:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s")
        for part, seconds in results[dtype]["seconds"].items():
            bound = results[dtype]["bound"][part]
            print(f"  {part}: {seconds:.3f} s, bound {bound:.3f} s, {bound / seconds:.0%} of it reached")
        for part, kinds in results[dtype]["shares"].items():
            print(f"  {part}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()))
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
