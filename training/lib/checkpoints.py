"""Captioners on disk: written whole or not at all."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Optional

import numpy as np
import torch


def write_json(path: str | Path, value) -> None:
    """Write under a temporary name, then move: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(temporary, path)


def write_array(path: str | Path, array: np.ndarray):
    """As `write_json`, a .npy file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, array)
    os.replace(temporary, path)


def peak_memory_mb() -> float:
    """The most memory that this process has had, memory-mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def record_file(model: str | Path) -> Optional[Path]:
    """Where `train_captioner` wrote what it did to make a captioner: a finished model has it in its folder, a stage's `best` beside it."""
    files = (folder / "captioner.json" for folder in (Path(model), Path(model).parent))
    return next((file for file in files if file.exists()), None)


def record_of_training(model: str | Path) -> Optional[dict]:
    """The content of `record_file`."""
    file = record_file(model)
    return json.loads(file.read_text()) if file else None


def refuse_other_output(output_dir: str | Path, *own: str) -> None:
    """Stop before a stage writes into a folder that holds something else.

    Args:
        own: patterns of files that show that the folder is this stage's, which may go on in it.

    Raises:
        ValueError: if the folder holds a model (config.json), or other files and none of `own`.
    """
    folder = Path(output_dir)
    if not folder.is_dir() or any(next(folder.glob(pattern), None) for pattern in own):
        return
    found = sorted(file.name for file in folder.iterdir())
    if found:
        what = "a model" if "config.json" in found else "other files"
        raise ValueError(
            f"--output_dir {folder} holds {what} that this stage did not write ({', '.join(found[:4])}): nothing was changed; give a new folder"
        )


def save_captioner(model, processor, output_dir: str | Path, half: bool = False, max_shard_size: str = "45MB") -> None:
    """Model, processor, generation config and code in `output_dir`, as the Hub repo carries them.

    Args:
        half: store fp16 weights; they load as fp32 all the same.

    Raises:
        ValueError: if a weight is not finite, or the folder holds a model of another kind, before anything is written.
    """
    output_dir = Path(output_dir)
    other = output_dir / "config.json"
    kind = json.loads(other.read_text()).get("model_type") if other.exists() else None
    if other.exists() and kind != model.config.model_type:
        raise ValueError(f"{output_dir} holds a model of another kind ({kind}): nothing was changed; give a new folder")
    state = model.state_dict()
    if half:  # tensors that are tied stay tied, or they would be written twice
        halves = {t.data_ptr(): t.half() for t in state.values() if t.is_floating_point()}
        state = {name: halves.get(t.data_ptr(), t) for name, t in state.items()}
    broken = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"not saved: NaN or infinite values in {', '.join(broken[:5])} (fp16: {half})")
    temporary = output_dir.with_name(output_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
    processor.save_pretrained(temporary)
    config = json.loads((temporary / "config.json").read_text())
    config["dtype"] = "float32"
    write_json(temporary / "config.json", config)
    output_dir.mkdir(parents=True, exist_ok=True)
    for old in output_dir.glob("*.safetensors*"):
        old.unlink()
    for file in temporary.iterdir():
        os.replace(file, output_dir / file.name)
    temporary.rmdir()
