"""From how many rows on packed weights are faster: what `inference_blip_rbm.PACKING` and `fused_attention` write down.

    python -m benchmarks.linear

Ratios of the shortest times, packed by `torch.nn.functional.linear`, and attention by blocks by PyTorch's fused kernel, each called in
turn. Below 1 the first is faster. Needs a quiet machine.
"""

import timeit
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.generate import processor
from modeling_blip_rbm.inference_blip_rbm import _linear, _pack, attention_by_blocks


ROWS = (1, 2, 4, 12, 30, 64, 256, 577, 2308)


def ratio(function, other, times: int = 15) -> float:
    turns = [[min(timeit.repeat(f, number=1, repeat=2)) for f in (function, other)] for _ in range(times)]
    return min(first for first, _ in turns) / min(second for _, second in turns)


def products(product, x, weights):
    return [product(x, weight) for weight in weights]


@torch.no_grad()
def main():
    print(f"{processor()}, {torch.get_num_threads()} threads\n")
    print("| dtype | " + " | ".join(f"{rows} rows" for rows in ROWS) + " | attention by blocks |")
    print("|---" * (len(ROWS) + 2) + "|")
    for dtype in (torch.float32, torch.bfloat16):
        weights = [torch.randn(3072, 768).to(dtype) for _ in range(6)]  # more than the caches hold
        packed, cells = [_pack(weight) for weight in weights], []
        for rows in ROWS:
            x = torch.randn(rows, 768).to(dtype)
            cells.append(ratio(partial(products, _linear, x, packed), partial(products, F.linear, x, weights)))
        qkv = torch.randn(3, 4, 577, 12, 64).to(dtype).transpose(2, 3)
        fused = partial(F.scaled_dot_product_attention, *qkv)
        cells.append(ratio(partial(attention_by_blocks, *qkv, 0.125), fused, times=7))
        print(f"| {str(dtype).removeprefix('torch.')} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
