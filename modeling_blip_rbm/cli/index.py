"""What the RBM makes of a folder's images, computed once: a small file in the folder, renewed where images are new or changed."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from modeling_blip_rbm.cli.console import Report, complain
from modeling_blip_rbm.cli.reading import read_ahead


NAME = ".blip-rbm-index.safetensors"


def state_of(file: Path) -> str:
    """Differs if the file was changed."""
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def fingerprint(model) -> str:
    """Differs if a weight of the model was changed, whatever the order in which they are summed."""
    sums = [
        int(weight.detach().cpu().contiguous().flatten().view(torch.uint8).sum())
        for weight in [
            *model.vision_model.parameters(),
            *model.vision_model.buffers(),
            *model.rbm_layer.rbm.parameters(),
        ]
        if weight.numel()
    ]
    return json.dumps(["image_energy", model.config.rbm_pooling, *sums])


@torch.no_grad()
def look_at(model, pixel_values) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden causes' input a (B, H) and `image_energy` (B,) of images (B, 3, S, S), both on the CPU."""
    tokens = model.vision_hidden_states(pixel_values.to(model.device))
    hidden_input = model.rbm_layer.hidden_input(tokens)
    return hidden_input.float().cpu(), model.image_energy(vision_hidden_states=tokens).float().cpu()


class Index:
    """The images of a folder as the RBM sees them.

    Attributes:
        files: N paths below the folder.
        hidden_input: a (N, H).
        energy: `image_energy` (N,) in nats.

    Args:
        file: where it is kept.
        model: whose index it is: that of other weights is made anew.
    """

    def __init__(self, folder: Path, file: Path, model):
        self.folder, self.file, self.key = folder, file, fingerprint(model)
        self.rows: dict[str, tuple[str, torch.Tensor, torch.Tensor]] = {}  # path: state, a (H,), energy ()
        if not file.is_file():
            return
        try:
            with safe_open(file, "pt") as kept:
                metadata = kept.metadata() or {}
                if metadata.get("model") == self.key:
                    states, a, energy = json.loads(metadata["states"]), kept.get_tensor("a"), kept.get_tensor("energy")
                    self.rows = {path: (state, a[i], energy[i]) for i, (path, state) in enumerate(states)}
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            complain(f"{file}: the index is damaged and is made anew ({type(error).__name__})")

    def renew(self, files: list[Path], model, processor, batch_size: int, report: Report):
        """Look at images that are new or changed, and forget those that are gone. What is stopped keeps what it has."""
        names = {file: file.relative_to(self.folder).as_posix() for file in files}
        missing = [file for file in files if not self._knows(file, names[file])]
        self.rows = {names[file]: self.rows[names[file]] for file in files if names[file] in self.rows}
        waiting = []

        def read(file):
            # of a link to nothing the processor says what is wrong
            state = state_of(file) if os.path.exists(file) else ""
            return state, processor(images=file)["pixel_values"]

        def look_at_waiting():
            a, energy = look_at(model, torch.cat([pixels for _, _, pixels in waiting]))
            for (name, state, _), *row in zip(waiting, a, energy):
                self.rows[name] = (state, *row)
            waiting.clear()

        try:
            with tqdm(total=len(missing), desc="look", unit="image", disable=None) as bar:
                for file, content in read_ahead(read, missing, 2 * batch_size):
                    bar.update()
                    if isinstance(content, ValueError):
                        self.rows.pop(names[file], None)
                        report.fail(file, content)
                        continue
                    waiting.append((names[file], *content))
                    if len(waiting) == batch_size:
                        look_at_waiting()
                if waiting:
                    look_at_waiting()
        finally:
            if missing:
                self._save()

    def _knows(self, file: Path, name: str) -> bool:
        try:
            return name in self.rows and self.rows[name][0] == state_of(file)
        except OSError:  # gone, or a link to nothing: said where it is read
            return False

    def _save(self):
        states = json.dumps([[name, state] for name, (state, _, _) in self.rows.items()])
        part = self.file.with_name(f"{self.file.name}.part")
        tensors = {"a": self.hidden_input, "energy": self.energy}
        try:
            save_file(tensors, part, metadata={"model": self.key, "states": states})
            os.replace(part, self.file)
        except (OSError, SafetensorError) as error:
            complain(f"{self.file}: the index cannot be kept, so all is looked at again next time ({error})")

    @property
    def files(self) -> list[Path]:
        return [self.folder / name for name in self.rows]

    @property
    def hidden_input(self) -> torch.Tensor:
        return torch.stack([a for _, a, _ in self.rows.values()]) if self.rows else torch.zeros(0, 0)

    @property
    def energy(self) -> torch.Tensor:
        return torch.stack([energy for _, _, energy in self.rows.values()]) if self.rows else torch.zeros(0)
