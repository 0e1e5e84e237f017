"""What the stages write: whole or not at all, never over another's work, and read without running what is in it."""

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import CHECKPOINT, REPO
from training.lib import checkpoints
from training.lib.checkpoints import refuse_other_output, save_captioner, whole_folder, write_array, write_json
from training.lib.distributed import Checkpoint, new_accelerator


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("write, value", [(write_json, {"a": 1}), (write_array, np.arange(3))])
def test_a_file_is_replaced_whole_or_stays(tmp_path, monkeypatch, write, value):
    file = tmp_path / "folder" / "file"
    write(file, value)
    before = file.read_bytes()
    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match=r"file was not written: the disk is full \([\d,]+ MB left\)") as error:
        write(file, value)
    assert error.value.errno == errno.ENOSPC
    assert file.read_bytes() == before and names(file.parent) == ["file"]


def test_each_process_writes_under_its_own_name(tmp_path):
    """A stopped process leaves its file, which the next one removes; that of a running process stays."""
    running, stopped = (tmp_path / f"a.json.tmp-{pid}.blip-rbm" for pid in (os.getppid(), 2**30))
    for file in (running, stopped):
        file.write_text("half")
    write_json(tmp_path / "a.json", [3])
    assert names(tmp_path) == ["a.json", running.name] and json.loads((tmp_path / "a.json").read_text()) == [3]


# ---------------------------------------------------------------- folders


def test_a_folder_is_replaced_by_a_rename_and_keeps_what_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "old.safetensors").write_text("old")
    with whole_folder(folder, replaced=("*.safetensors",)) as new:
        (new / "new.safetensors").write_text("new")
        assert names(folder) == ["notes.txt", "old.safetensors"]
    assert names(folder) == ["new.safetensors", "notes.txt"] and names(tmp_path) == ["model"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    with whole_folder(tmp_path / "model") as new:
        (new / "a").write_text("a")
    assert (tmp_path / "model").is_symlink() and names(tmp_path / "disk" / "model") == ["a"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    """The old folder is beside, and comes back; what a person called alike is his own."""
    old, new = (tmp_path / f"model.{kind}-{2**30}.blip-rbm" for kind in ("old", "tmp"))
    for folder in (old, new, tmp_path / "model.old-2024"):
        folder.mkdir()
        (folder / "a").write_text(folder.name)
    with pytest.raises(KeyboardInterrupt):
        with whole_folder(tmp_path / "model"):
            assert (tmp_path / "model" / "a").read_text() == old.name
            raise KeyboardInterrupt
    assert names(tmp_path) == ["model", "model.old-2024"] and (tmp_path / "model" / "a").read_text() == old.name


def test_a_folder_that_cannot_be_renamed_stays(tmp_path, monkeypatch):
    """Such as a mount point, or where the second rename fails."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    rename, calls = checkpoints.Path.rename, []

    def second_fails(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(checkpoints.Path, "rename", second_fails)
    with pytest.raises(OSError, match="busy"):
        with whole_folder(tmp_path / "model") as new:
            (new / "a").write_text("new")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "a").read_text() == "old"


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("(os error 28): No space left on device")]
)
def test_a_full_disk_leaves_the_old_model_whole(model, processor, tmp_path, monkeypatch, error):
    save_captioner(model, processor, tmp_path / "kept", max_shard_size="20KB")
    before = {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()}
    assert sum(name.endswith(".safetensors") for name in before) > 2
    with torch.no_grad():
        model.rbm_layer.rbm.word_bias += 1
    written, save_file = [], safetensors.torch.save_file

    def second_shard_fails(*args, **kwargs):
        written.append(args)
        if len(written) == 2:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", second_shard_fails)
    with pytest.raises(OSError, match="kept was not written: the disk is full .* What was there before is as it was"):
        save_captioner(model, processor, tmp_path / "kept", max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in (tmp_path / "kept").iterdir()} == before
    assert names(tmp_path) == ["kept"]


def test_a_model_that_is_saved_again_has_no_old_shards(model, processor, tmp_path):
    save_captioner(model, processor, tmp_path / "again", max_shard_size="20KB")
    (tmp_path / "again" / "captioner.json").write_text("{}")
    save_captioner(model, processor, tmp_path / "again")
    assert [name for name in names(tmp_path / "again") if "safetensors" in name] == ["model.safetensors"]
    assert (tmp_path / "again" / "captioner.json").exists()
    BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "again")


SAVE = """
import sys
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.checkpoints import save_captioner
model = BlipRBMForConditionalGeneration.from_pretrained(sys.argv[1])
processor = BlipRBMProcessor.from_pretrained(sys.argv[1])
print("go", flush=True)
while True:
    model.rbm_layer.rbm.word_bias.data += 1
    save_captioner(model, processor, sys.argv[2], max_shard_size="20KB")
"""


def test_a_killed_save_leaves_a_whole_model(saved_model, model, processor, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SAVE, saved_model, tmp_path / "out" / "kept"]
    saving = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    saving.stdout.readline()
    while not (tmp_path / "out" / "kept").exists():
        assert saving.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(saving.pid, signal.SIGKILL)
    saving.wait()
    checkpoints.remove_leftovers(tmp_path / "out" / "kept")
    assert names(tmp_path / "out") == ["kept"]
    _, info = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "out" / "kept", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_a_folder_with_a_damaged_config_is_not_replaced(model, processor, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="its config.json cannot be read.*: nothing was changed"):
        save_captioner(model, processor, tmp_path)
    assert names(tmp_path) == ["config.json"]


# ---------------------------------------------------------------- where a stage may write


def test_a_run_goes_on_in_its_own_folder(tmp_path):
    for _ in range(2):
        refuse_other_output(tmp_path / "run")
        (tmp_path / "run" / "log.jsonl").write_text("")
    assert names(tmp_path / "run") == ["log.jsonl", "test_checkpoints.run"]


@pytest.mark.parametrize(
    "files, found",
    [
        (["train_other.run"], r"what this stage did not write \(train_other.run\)"),
        (["rbm.json", "tuning.json"], r"what this stage did not write \(rbm.json, tuning.json\)"),
        (["config.json", "rbm.json"], r"a model .*\(config.json, rbm.json\)"),
        (["model-00001-of-00002.safetensors", "test_checkpoints.run"], "a model"),
    ],
)
def test_what_another_wrote_is_refused_by_name(tmp_path, files, found):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"--output_dir .* holds {found}.*: nothing was changed; give a new folder"):
        refuse_other_output(tmp_path)
    assert names(tmp_path) == sorted(files)


def test_the_checkpoint_of_the_repository_is_refused():
    before = {file.name: file.lstat().st_mtime_ns for file in CHECKPOINT.iterdir()}
    with pytest.raises(ValueError, match="holds a model that this stage did not write"):
        refuse_other_output(CHECKPOINT)
    assert {file.name: file.lstat().st_mtime_ns for file in CHECKPOINT.iterdir()} == before


def test_a_saved_model_is_no_longer_a_run(model, processor, tmp_path):
    refuse_other_output(tmp_path / "tuned")
    save_captioner(model, processor, tmp_path / "tuned")
    with pytest.raises(ValueError, match="holds a model that this stage did not write or has finished"):
        refuse_other_output(tmp_path / "tuned")


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="is a file: nothing was changed"):
        refuse_other_output(tmp_path / "a")


# ---------------------------------------------------------------- going on


@pytest.fixture
def run(tmp_path):
    """A checkpoint, and a model with its optimizer and schedule after three steps."""

    def start(steps):
        AcceleratorState._reset_state(True)
        accelerator = new_accelerator(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer, optimizer = accelerator.prepare(layer, optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 0.7**step)
        accelerator.register_for_checkpointing(schedule)
        for _ in range(steps):
            layer(torch.ones(5, 3)).sum().backward()
            optimizer.step()
            schedule.step()
        return Checkpoint(accelerator, tmp_path / "state"), layer, schedule

    yield start
    AcceleratorState._reset_state(True)


def test_a_checkpoint_holds_no_pickled_object_and_brings_back_the_schedule(run, tmp_path):
    checkpoint, layer, schedule = run(steps=3)
    checkpoint.save([{"epoch": 1}])
    assert not list((tmp_path / "state").glob("custom_checkpoint*"))
    again, other, other_schedule = run(steps=0)
    assert again.load() == [{"epoch": 1}]
    assert other_schedule.get_last_lr() == schedule.get_last_lr() == [0.1 * 0.7**3]
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin"])
@pytest.mark.parametrize("zipped", [False, True])
def test_going_on_in_a_strangers_folder_runs_no_code(run, tmp_path, name, zipped):
    checkpoint, _, _ = run(steps=3)
    checkpoint.save([{"epoch": 1}])
    content = io.BytesIO()
    torch.save(Bomb(tmp_path / "ran"), content) if zipped else pickle.dump(Bomb(tmp_path / "ran"), content)
    (tmp_path / "state" / name).write_bytes(content.getvalue())
    try:
        run(steps=0)[0].load()
    except ValueError as error:
        assert "the run cannot go on from" in str(error) and "nothing was changed" in str(error)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["registered.json", "model.safetensors", "optimizer.bin", "history.json"])
def test_a_damaged_checkpoint_is_named(run, tmp_path, name):
    checkpoint, _, _ = run(steps=3)
    checkpoint.save([{"epoch": 1}])
    file = tmp_path / "state" / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="state, which is damaged or of an earlier version .*delete that folder"):
        run(steps=0)[0].load()


def test_a_full_disk_leaves_the_last_checkpoint(run, tmp_path, monkeypatch):
    checkpoint, _, _ = run(steps=3)
    checkpoint.save([{"epoch": 1}])
    before = {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()}
    monkeypatch.setattr("accelerate.checkpointing.save", full)
    with pytest.raises(OSError, match="state was not written: the disk is full"):
        checkpoint.save([{"epoch": 1}, {"epoch": 2}])
    assert {file.name: file.read_bytes() for file in (tmp_path / "state").iterdir()} == before
    assert names(tmp_path) == ["state"]
