"""Memory and time of the contrastive losses computed in pieces, at the batch sizes that need it.

    python -m benchmarks.contrastive --output benchmarks/results/contrastive.json

Every size runs in a process of its own: loss and gradients of both embeddings, and where the batch is small enough the
difference to the loss computed whole.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from training.lib.checkpoints import peak_memory_mb, write_json
from training.lib.contrastive import info_nce, info_nce_in_pieces, sigmoid_in_pieces, sigmoid_loss


def whole_info_nce(z_image, z_text, image_owner, text_owner, scale, bias):
    return info_nce(scale * z_image @ z_text.T + bias, image_owner, text_owner)


LOSSES = {"sigmoid": (sigmoid_in_pieces, sigmoid_loss), "infonce": (info_nce_in_pieces, whole_info_nce)}


def gradients(loss, z_image, z_text, *args):
    z_image, z_text = (z.clone().requires_grad_(True) for z in (z_image, z_text))
    value = loss(z_image, z_text, *args)
    value.backward()
    return value.item(), z_image.grad, z_text.grad


def measure(kind: str, batch: int, dim: int, chunk: int, compare: bool) -> dict:
    torch.manual_seed(0)
    z_image, z_text = (F.normalize(torch.randn(batch, dim), dim=-1) for _ in range(2))
    owner = torch.arange(batch)
    settings = owner, owner, torch.tensor(20.0), torch.tensor(-10.0)
    in_pieces, whole = LOSSES[kind]
    start = time.perf_counter()
    value, *grads = gradients(in_pieces, z_image, z_text, *settings, chunk)
    result = {"loss": value, "seconds": time.perf_counter() - start, "peak_memory_mb": peak_memory_mb()}
    if compare:
        expected, *their = gradients(whole, z_image, z_text, *settings)
        result["loss_apart"] = abs(value - expected)
        result["gradients_apart"] = max((a - b).abs().max().item() for a, b in zip(grads, their))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--kind", choices=LOSSES, help="measure one, in this process")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    if args.kind:
        compare = args.batches[0] <= 4096  # the loss computed whole holds several matrices of batch x batch
        print(json.dumps(measure(args.kind, args.batches[0], args.dim, args.chunk, compare)))
        return
    results = {}
    for kind in LOSSES:
        for batch in args.batches:
            command = [sys.executable, "-m", "benchmarks.contrastive", "--kind", kind, "--batches", str(batch)]
            command += ["--dim", str(args.dim), "--chunk", str(args.chunk)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[f"{kind}, {batch:,}"] = json.loads(out)
            print(f"{kind}, {batch:,}: {out.strip()}", flush=True)
    if args.output:
        settings = {"dim": args.dim, "chunk": args.chunk, "threads": torch.get_num_threads()}
        write_json(args.output, settings | {"rows": results})


if __name__ == "__main__":
    main()
