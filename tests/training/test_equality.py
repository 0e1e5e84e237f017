"""A training run is the same however its batches are split, over however many processes, and after a stop."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import REPO
from tests.stages import in_process, module_of, succeed
from training.lib.distributed import Checkpoint


TWO_PROCESSES = ("--config_file", str(REPO / "training" / "accelerate" / "multi-cpu.yaml"))


@pytest.mark.parametrize("batch, accumulation", [(2, 4), (1, 8)])
def test_accumulation_does_not_change_loss_or_gradient(blip, processor, tmp_path, batch, accumulation):
    """HF Trainer: 8x1 = 2x4 = 1x8. Stock BLIP's loss grows with the accumulation steps."""
    texts = ["a dog runs", "the red ball", "a white cat", "two people standing", "a black horse", "snow on grass"]
    ids = processor(text=[*texts, "blue water plays", "a child sits"])["input_ids"]
    images = torch.randn(8, 3, 24, 24)
    rows = [{"pixel_values": image, "input_ids": row, "labels": row} for image, row in zip(images, ids)]

    def first_step(batch, accumulation):
        model = BlipRBMForConditionalGeneration.from_blip(blip)
        args = TrainingArguments(
            tmp_path / f"{batch}", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            max_steps=1, logging_steps=1, report_to="none", save_strategy="no", learning_rate=1e-3, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()
        return trainer.state.log_history[0]

    whole, parts = first_step(8, 1), first_step(batch, accumulation)
    assert float(parts["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-4)
    assert float(parts["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=1e-3)


@pytest.fixture
def untrained(pairs, towers, tmp_path):
    command = ["--vision", towers / "vision", "--text", towers / "text", "--output_dir", tmp_path / "untrained"]
    in_process("build_captioner", *command, cwd=tmp_path)
    return tmp_path / "untrained"


def test_the_captioner_stage_does_not_depend_on_how_a_batch_is_split(pairs, untrained, tmp_path):
    """8x1 = 2x4 = 1x8 = 2 processes of 4: the same loss and the same weights after two steps, captions of unlike
    lengths."""
    data = [
        "--dataset",
        pairs,
        "--held_back",
        4,
        "--views",
        1,
        "--cache_dir",
        tmp_path / "features",
        "--model",
        untrained,
    ]
    exact = ["--dropout", 0, "--ema_decay", 0, "--max_steps", 2, "--logging_steps", 1, "--max_new_tokens", 3]
    exact += ["--learning_rate", 1e-3, "--eval_strategy", "steps", "--eval_steps", 2, "--seed", 3]
    results = {}
    for batch, steps, processes in ((8, 1, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2)):
        name = f"{batch}x{steps}x{processes}"
        size = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", steps, "--output_dir", name]
        if processes == 1:
            out = in_process("train_captioner", *data, *exact, *size, cwd=tmp_path)
        else:
            size += ["--ddp_backend", "gloo"]
            out = succeed("train_captioner", *data, *exact, *size, cwd=tmp_path, launcher=TWO_PROCESSES)
        losses = [float(loss) for loss in re.findall(r"'loss': '([0-9.]+)'", out)]
        results[name] = losses, load_file(tmp_path / name / "last" / "model.safetensors")
    losses, weights = results.pop("8x1x1")
    assert len(losses) == 2
    for name, (other_losses, other_weights) in results.items():
        assert other_losses == pytest.approx(losses, rel=1e-3), name  # as printed
        far = {key: (other_weights[key] - t).abs().max().item() for key, t in weights.items()}
        apart = max(abs(a - b) for a, b in zip(other_losses, losses))
        print(f"captioner {name}: losses {apart:.1e} apart, weights {max(far.values()):.1e}")  # shown by pytest -s
        assert max(far.values()) <= 1e-5, (name, max(far, key=far.get), max(far.values()))


@pytest.fixture
def rbm_command(pairs, untrained, tmp_path):
    command = ["--model", untrained, "--dataset", pairs, "--held_back", 4, "--views", 2, "--num_words", 9]
    command += ["--cache_dir", tmp_path / "features", "--hidden_size", 7, "--batch_size", 10, "--sparsity_target", 0.2]
    return command


def rbm_of(folder):
    weights = torch.load(folder / "best.pt", weights_only=True)
    return {name: t.double() for name, t in weights.items()}


def farthest(ours, theirs) -> float:
    return max((t - theirs[name]).abs().max().item() for name, t in ours.items())


def test_the_rbm_stage_does_not_depend_on_the_number_of_processes(rbm_command, tmp_path):
    """The images of all processes are each other's negatives, and what is random belongs to an image, not to a
    process."""
    command = [*rbm_command, "--epochs", 3, "--eval_every", 1]
    in_process("train_rbm", *command, "--output_dir", "one", cwd=tmp_path)
    succeed("train_rbm", *command, "--output_dir", "two", cwd=tmp_path, launcher=TWO_PROCESSES)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open()] for name in ("one", "two")]
    terms = ("words", "match", "sparsity")
    apart = max(abs(theirs[term] - ours[term]) for ours, theirs in zip(*logs) for term in terms)
    far = farthest(rbm_of(tmp_path / "one"), rbm_of(tmp_path / "two"))
    print(f"RBM, 2 processes: losses {apart:.1e} apart, weights {far:.1e}")
    assert len(logs[0]) == len(logs[1]) == 3 and max(apart, far) <= 1e-5


def killed_and_started_again(module, command, output_dir, appears, tmp_path):
    """Run a stage, kill it (SIGKILL) as soon as a file appears, run it again to its end."""
    environment = {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", module_of(module), *map(str, command), "--output_dir", output_dir]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.time() + 600
    while not (tmp_path / output_dir / appears).exists():
        assert running.poll() is None, running.stderr.read()[-3000:]
        assert time.time() < deadline
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()


def test_a_killed_rbm_run_ends_with_the_same_weights(rbm_command, tmp_path):
    command = [*rbm_command, "--epochs", 12, "--eval_every", 3]
    in_process("train_rbm", *command, "--output_dir", "whole", cwd=tmp_path)
    killed_and_started_again("train_rbm", command, "stopped", "state/history.json", tmp_path)
    assert not (tmp_path / "stopped" / "rbm.json").exists()
    in_process("train_rbm", *command, "--output_dir", "stopped", cwd=tmp_path)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "stopped")]
    assert len(logs[0].splitlines()) == 4 and logs[0] == logs[1]
    assert farthest(rbm_of(tmp_path / "whole"), rbm_of(tmp_path / "stopped")) == 0


def test_a_killed_captioner_run_ends_with_the_same_weights(pairs, untrained, tmp_path):
    command = ["--model", untrained, "--dataset", pairs, "--held_back", 4, "--views", 2, "--max_new_tokens", 3]
    command += ["--cache_dir", tmp_path / "features", "--max_steps", 30, "--per_device_train_batch_size", 4]
    command += [
        "--dropout",
        0.1,
        "--image_token_dropout",
        0.2,
        "--ema_decay",
        0.8,
        "--learning_rate",
        1e-3,
        "--eval_steps",
    ]
    command += [10, "--eval_strategy", "steps", "--save_strategy", "steps", "--save_steps", 10]
    in_process("train_captioner", *command, "--output_dir", "whole", cwd=tmp_path)
    appears = "checkpoint-10/ema.safetensors"
    killed_and_started_again("train_captioner", command, "stopped", appears, tmp_path)
    assert not (tmp_path / "stopped" / "captioner.json").exists()
    in_process("train_captioner", *command, "--output_dir", "stopped", cwd=tmp_path)
    whole, stopped = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "stopped"))
    assert farthest(whole, stopped) == 0


class SlowProcess:
    """What `Checkpoint` asks of an accelerator; process 1 takes longer to write its state."""

    def __init__(self, rank, barrier):
        self.rank, self.wait_for_everyone, self.is_main_process = rank, barrier.wait, rank == 0

    def save_state(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        time.sleep(0.3 * self.rank)
        (Path(folder) / f"random_states_{self.rank}.pkl").write_text(str(self.rank))


def test_a_checkpoint_waits_for_the_slowest_process(tmp_path):
    barrier = threading.Barrier(2, timeout=10)
    with ThreadPoolExecutor(2) as processes:
        checkpoints = [Checkpoint(SlowProcess(rank, barrier), tmp_path / "state") for rank in (0, 1)]
        for saved in [processes.submit(checkpoint.save, [{"epoch": 1}]) for checkpoint in checkpoints]:
            saved.result()
    assert {file.name for file in (tmp_path / "state").iterdir()} == {
        "history.json",
        "random_states_0.pkl",
        "random_states_1.pkl",
    }
