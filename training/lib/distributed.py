"""What the Accelerate stages share: one batch over all processes, in the same order after a stop."""

import json
import os
import shutil
from pathlib import Path
from typing import Callable, Sequence

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.distributed.nn.functional import all_gather

from training.lib.checkpoints import flush, full_disk_named, write_json


class JSONAccelerator(Accelerator):
    """An Accelerator that keeps registered objects, such as a learning rate's schedule, as JSON.

    Accelerate pickles them. Loading a pickle runs whatever code it holds, and a run's folder may come from a stranger.
    Everything else in the folder is safetensors, or loaded with `weights_only=True`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.registered = []

    def register_for_checkpointing(self, *objects):
        self.registered += objects

    def save_state(self, output_dir: str, **kwargs):
        super().save_state(output_dir, **kwargs)
        if self.is_main_process:
            write_json(Path(output_dir) / "registered.json", [thing.state_dict() for thing in self.registered])

    def load_state(self, input_dir: str, **kwargs):
        states = json.loads((Path(input_dir) / "registered.json").read_text())
        super().load_state(input_dir, **kwargs)
        for thing, state in zip(self.registered, states, strict=True):
            thing.load_state_dict(state)


def on_several_cpus() -> bool:
    """Whether several processes run on CPUs: not told, Accelerate takes each for the only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def own_processes() -> PartialState:
    """This process among all of them. Its `device` is where a stage computes: the accelerator, or a CPU where there is none."""
    return PartialState(cpu=on_several_cpus())


def new_accelerator(seed: int) -> Accelerator:
    """One batch split over the processes, in an order that seed and epoch alone decide."""
    return JSONAccelerator(
        cpu=on_several_cpus(),
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed),
        kwargs_handlers=[
            # persistent chains are each process's own; a term of the loss that is switched off leaves parameters
            # without gradient
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        ],
    )


def from_all_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensors (B, ...) of all processes, one after the other; gradients go back to where each came from."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    return torch.cat(all_gather(tensor.contiguous()))


def ready_to_be_sharded(model: torch.nn.Module) -> torch.nn.Module:
    """A captioner whose head's bias has one name, where BLIP gives it two: FSDP2 refuses a parameter that two of its groups hold. Nothing
    reads the name that goes; `head.bias = head.decoder.bias` brings it back."""
    head = model.text_decoder.cls.predictions
    if head.bias is head.decoder.bias:
        del head.bias
    return model


def share(length: int, process: int, processes: int) -> slice:
    """Which of so many items a process takes: each item one process, in order, none where there are fewer items than processes."""
    return slice(length * process // processes, length * (process + 1) // processes)


def once_each(function: Callable[[Sequence], list], items: Sequence) -> list:
    """What `function` gives of items, one result an item, in their order: every item in one process, all results in all of them. Accelerate's
    `split_between_processes` would give the last item to several where there are few."""
    if not (dist.is_available() and dist.is_initialized()):
        return function(items)
    parts = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, function(items[share(len(items), dist.get_rank(), len(parts))]))
    return [result for part in parts for result in part]


class Checkpoint:
    """The state of a run and what was measured until then, in one folder that is whole or not there."""

    def __init__(self, accelerator, folder: Path):
        self.accelerator, self.folder, self.new = accelerator, folder, folder.with_name(folder.name + ".new")

    def save(self, history: list[dict]) -> None:
        """Replace the last checkpoint, which stays until the new one is whole.

        Raises:
            OSError: if the disk is full. The last checkpoint stays.
        """
        if self.accelerator.is_main_process:
            shutil.rmtree(self.new, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with full_disk_named(self.folder):
                self.accelerator.save_state(str(self.new))
                # each process writes its random state; the folder must not be moved under one
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    self.replace(history)
        except OSError:
            shutil.rmtree(self.new, ignore_errors=True)
            raise

    def replace(self, history: list[dict]) -> None:
        for file in self.new.iterdir():
            flush(file)
        write_json(self.new / "history.json", history)  # the last thing written: with it the folder is whole
        shutil.rmtree(self.folder, ignore_errors=True)
        self.new.rename(self.folder)

    def load(self) -> list[dict]:
        """What was measured until the last checkpoint, whose state is loaded; nothing if there is none.

        Raises:
            ValueError: if the checkpoint is damaged, or an earlier version wrote it. No code in it is run.
        """
        folder = next((f for f in (self.new, self.folder) if (f / "history.json").exists()), None)
        if folder is None:
            return []
        try:
            history = json.loads((folder / "history.json").read_text())
            self.accelerator.load_state(str(folder))
        except Exception as error:  # safetensors, pickle and JSON each have their own
            raise ValueError(
                f"the run cannot go on from {folder}, which is damaged or of an earlier version ({error}): nothing was "
                "changed; give a new --output_dir, or delete that folder to start anew"
            ) from error
        return history
