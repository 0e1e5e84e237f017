"""What the Accelerate stages share: one batch over all processes, in the same order after a stop."""

import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.distributed.nn.functional import all_gather

from training.lib.checkpoints import write_json


def new_accelerator(seed: int) -> Accelerator:
    """One batch split over the processes, in an order that seed and epoch alone decide."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Accelerator(
        cpu=several and not torch.cuda.is_available(),  # not said, each process takes itself for the only one
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed),
        kwargs_handlers=[
            # persistent chains are each process's own; a term of the loss that is switched off leaves parameters without gradient
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        ],
    )


def from_all_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (B, ...) of all processes, one after the other; gradients go back to where each came from."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    return torch.cat(all_gather(tensor.contiguous()))


class Checkpoint:
    """The state of a run and what was measured until then, in one folder that is whole or not there."""

    def __init__(self, accelerator, folder: Path):
        self.accelerator, self.folder, self.new = accelerator, folder, folder.with_name(folder.name + ".new")

    def save(self, history: list[dict]):
        if self.accelerator.is_main_process:
            shutil.rmtree(self.new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(self.new))
        self.accelerator.wait_for_everyone()  # each process writes its random state; the folder must not be moved under one
        if self.accelerator.is_main_process:
            write_json(self.new / "history.json", history)  # the last thing written: with it the folder is whole
            shutil.rmtree(self.folder, ignore_errors=True)
            self.new.rename(self.folder)

    def load(self) -> list[dict]:
        """What was measured until the last checkpoint, whose state is loaded; nothing if there is none."""
        folder = next((f for f in (self.new, self.folder) if (f / "history.json").exists()), None)
        if folder is None:
            return []
        self.accelerator.load_state(str(folder))
        return json.loads((folder / "history.json").read_text())
