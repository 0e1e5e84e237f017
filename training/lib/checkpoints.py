"""What the stages write: whole or not at all, and never over another's work (docs/reliability.md)."""

import errno
import glob
import json
import os
import resource
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np
import psutil
import torch


WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
MARKER = ".run"  # suffix of the file that says which stage's run a folder holds
DISK_FULL = ("No space left", "quota exceeded", "requested and")  # the last: NumPy's words for a cut write


def write_json(path: str | Path, value) -> None:
    """Write a JSON file, whole or not at all (see [`whole_file`])."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Write a .npy file, whole or not at all (see [`whole_file`])."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a path of this process alone; what is written there replaces `path` at the end, in one step.

    After a kill, or with two writers, `path` holds what one of them wrote or what was there before: never half a file.

    Raises:
        OSError: if the disk is full. Nothing of the new file stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    temporary = _beside(path, "tmp")
    try:
        with full_disk_named(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path, replaced: tuple[str, ...] = ("*",)) -> Iterator[Path]:
    """Yield an empty folder of this process alone, which takes the place of `folder` at the end.

    The old folder is complete until the new one is: it is renamed, not emptied. A kill between the two renames leaves
    both beside `folder`, and the next call puts the old one back.

    Args:
        replaced: patterns of the old folder's files that the new folder stands for. Its other files are kept.

    Raises:
        OSError: if the disk is full, or the folder cannot be renamed (it is a mount point). The old folder stays.
    """
    folder = Path(folder).resolve()  # a link to a folder stays a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, replaced)
    temporary, old = _beside(folder, "tmp"), _beside(folder, "old")
    try:
        with full_disk_named(folder):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                flush(file)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
            flush(folder.parent)
    finally:
        remove_leftovers(folder, replaced)


def remove_leftovers(path: Path, replaced: tuple[str, ...] = ("*",)) -> None:
    """Remove what stopped processes left beside `path`. A folder that was on its way out is put back, or gives up its
    other files."""
    for old in _leftovers(path, "old"):
        if not path.exists():
            old.rename(path)
            continue
        gone = {file for pattern in replaced for file in old.glob(pattern)}
        for file in set(old.iterdir()) - gone:
            if not (path / file.name).exists():
                file.rename(path / file.name)
        shutil.rmtree(old)
    for temporary in _leftovers(path, "tmp"):
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _beside(path: Path, kind: str) -> Path:
    """A name that nobody gives a file of his own, so that what has it may be removed."""
    return path.with_name(f"{path.name}.{kind}-{os.getpid()}.blip-rbm")


def _leftovers(path: Path, kind: str) -> list[Path]:
    """What is called `_beside(path, kind)` by this process and by those that no longer run."""
    found = []
    for file in sorted(path.parent.glob(f"{glob.escape(path.name)}.{kind}-*.blip-rbm")):
        pid = file.name.removeprefix(f"{path.name}.{kind}-").removesuffix(".blip-rbm")
        if pid.isdecimal() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            found.append(file)
    return found


def flush(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's names, before what follows."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """One error for a full disk. Safetensors, tokenizers and NumPy each raise another, which names no file."""
    try:
        yield
    except Exception as error:
        if not any(words in str(error) for words in DISK_FULL):
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        message = f"{path} was not written: the disk is full ({free:,.0f} MB left). What was there before is as it was"
        raise OSError(errno.ENOSPC, f"{message}; make room, and start again") from error


def checksum(file: Path) -> int:
    """CRC-32, read in pieces."""
    crc = 0
    with file.open("rb") as opened:
        while piece := opened.read(2**22):
            crc = zlib.crc32(piece, crc)
    return crc


def peak_memory_mb() -> float:
    """The most memory that this process has had, memory-mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def record_file(model: str | Path) -> Optional[Path]:
    """The record that `train_captioner` wrote of a captioner's training: a finished model has it in its folder, a
    stage's `best` beside it."""
    files = (folder / "captioner.json" for folder in (Path(model), Path(model).parent))
    return next((file for file in files if file.exists()), None)


def record_of_training(model: str | Path) -> Optional[dict]:
    """The content of [`record_file`]."""
    file = record_file(model)
    return json.loads(file.read_text()) if file else None


def refuse_other_output(output_dir: str | Path) -> None:
    """Stop before a stage writes into a folder that holds something else; else mark the folder as this stage's run.

    The folder may be absent, empty, or hold the marker `STAGE.run` that an earlier run of the same stage left, which
    then goes on. A folder with a model in it is finished, and refused whatever else it holds: [`save_captioner`] takes
    the marker away.

    Raises:
        ValueError: if the folder holds a model, another stage's run, or anything else. Nothing was changed.
    """
    folder, module = Path(output_dir), calling_module()
    marker = folder / (module.rsplit(".", 1)[-1] + MARKER)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: nothing was changed; give a new folder")
    found = sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) if folder.exists() else []
    has_model = "config.json" in found or any(name.endswith(".safetensors") for name in found)
    if has_model or (found and marker.name not in found):
        what = "a model that this stage did not write or has finished" if has_model else "what this stage did not write"
        way_out = (
            "give a new folder" if has_model else f"give a new folder, or one with this stage's marker {marker.name}"
        )
        raise ValueError(f"--output_dir {folder} holds {what} ({', '.join(found[:4])}): nothing was changed; {way_out}")
    folder.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        marker.write_text(f"python -m {module} writes here, and goes on here if it is started again.\n")


def calling_module() -> str:
    """The module outside `training.lib` that the call came from, also where it is run as `python -m MODULE`."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith("training.lib"):
        frame = frame.f_back
    spec = frame.f_globals.get("__spec__")  # None in a script that is run by its path
    return spec.name if spec else Path(frame.f_globals.get("__file__", "python")).stem


def save_captioner(model, processor, output_dir: str | Path, half: bool = False, max_shard_size: str = "45MB") -> None:
    """Write model, processor, generation config and code to `output_dir`, whole or not at all.

    An earlier model there is replaced (see [`whole_folder`]); files that are not a model's, such as records and notes,
    stay.

    Args:
        half: store fp16 weights; they load as fp32 all the same.

    Raises:
        ValueError: if a weight is not finite, or the folder holds a model of another kind, before anything is written.
        OSError: if the disk is full. What was there before stays whole.
    """
    kind = kind_of_model(output_dir)
    if kind not in (None, model.config.model_type):
        raise ValueError(f"{output_dir} holds a model of another kind ({kind}): nothing was changed; give a new folder")
    state = model.state_dict()
    if half:  # tensors that are tied stay tied, or they would be written twice
        halves = {t.data_ptr(): t.half() for t in state.values() if t.is_floating_point()}
        state = {name: halves.get(t.data_ptr(), t) for name, t in state.items()}
    broken = [name for name, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"not saved: NaN or infinite values in {', '.join(broken[:5])} (fp16: {half})")
    with whole_folder(output_dir, replaced=(*WEIGHTS, f"*{MARKER}")) as temporary:
        model.save_pretrained(temporary, state_dict=state, max_shard_size=max_shard_size)
        processor.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text())
        write_json(temporary / "config.json", config | {"dtype": "float32"})


def kind_of_model(folder: str | Path) -> Optional[str]:
    """`model_type` of the config in a folder; None if there is no config."""
    config = Path(folder) / "config.json"
    try:
        return str(json.loads(config.read_text()).get("model_type")) if config.exists() else None
    except (ValueError, AttributeError):
        return "its config.json cannot be read"
