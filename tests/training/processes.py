"""What `test_processes.py` starts with `accelerate launch`, in one process or two: a few steps of training, and captions of some images.

python -m tests.training.processes results.json
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import DistributedType

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import VOCABULARY, randomise, tiny_config
from training.evaluate_confidence import looked_at
from training.lib import distributed
from training.lib.captions import candidate_parts, caption_rows


STEPS, BATCH, IMAGES = 4, 6, 7
CLIP = 1.0  # gradients, as zero2.yaml does


def accelerator():
    """Accelerate shards on accelerators alone, by the name of what it runs on: FSDP2 and DeepSpeed, which know CPUs, are the same."""
    PartialState(cpu=distributed.on_several_cpus())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return distributed.new_accelerator(seed=3)
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)  # takes the processes' group that is there
    with mock.patch.object(distributed, "on_several_cpus", lambda: False):
        processes = distributed.new_accelerator(seed=3)
    processes.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH // 2
    return processes


def losses(processes) -> list[float]:
    """The mean over all processes in every step, each process with its part of the batch."""
    torch.manual_seed(0)
    model = randomise(BlipRBMForConditionalGeneration(tiny_config()), std=0.1).train()
    images = torch.randn(STEPS, BATCH, 3, 24, 24)
    texts = torch.randint(5, 40, (STEPS, BATCH, 7))
    if processes.distributed_type == DistributedType.FSDP:
        distributed.ready_to_be_sharded(model)
    model, optimizer = processes.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    own, history = slice(processes.process_index, None, processes.num_processes), []
    for image, text in zip(images, texts):
        loss = model(pixel_values=image[own], input_ids=text[own], labels=text[own]).loss
        processes.backward(loss)
        processes.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append(processes.gather(loss.detach().reshape(1)).mean().item())
    return history


class Store:
    """As a `FeatureStore`; notes which rows were asked for."""

    def __init__(self, width: int):
        self.features, self.seen = torch.randn(IMAGES, 10, width, generator=torch.Generator().manual_seed(5)), []

    def batch(self, rows) -> torch.Tensor:
        self.seen += list(rows)
        return self.features[list(rows)]


class Words:
    def captions(self, sequences) -> list[str]:
        return [" ".join(VOCABULARY[i] for i in row) for row in sequences]


def captions(processes) -> dict:
    """Captions, candidates and evidence of all images, captions of the first alone, and in how many processes each was looked at."""
    torch.manual_seed(0)
    model = randomise(BlipRBMForConditionalGeneration(tiny_config()))
    store = Store(model.config.vision_config.hidden_size)
    settings = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "batch_size": 2}
    written = caption_rows(model, Words(), store, range(IMAGES), **settings)
    first = caption_rows(model, Words(), store, range(1), **settings)
    candidates, parts = candidate_parts(model, Words(), store, range(IMAGES), 3, 2, max_new_tokens=7)
    looked, evidence = looked_at(model, Words(), store.batch, range(IMAGES), 2)
    seen = torch.bincount(torch.tensor(store.seen, dtype=torch.long), minlength=IMAGES)
    numbers = [*parts["log_prob"].flatten().tolist(), *evidence["evidence"].flatten().tolist()]
    texts = {"all": written, "first": first, "candidates": candidates, "looked at": looked}
    return texts | {"numbers": numbers, "seen": processes.reduce(seen).tolist()}


def main():
    processes = accelerator()
    kind = str(processes.distributed_type)
    results = {
        "kind": kind,
        "processes": processes.num_processes,
        "losses": losses(processes),
        "captions": captions(processes),
    }
    if processes.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(results))
    processes.end_training()


if __name__ == "__main__":
    main()
