"""The training loop of an RBM: epochs, evaluation, the best machine, curves."""

import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration
from training.lib.distributed import Checkpoint
from training.lib.rbm_evaluation import evaluate_rbm, free_energy_gap, log_likelihood
from training.lib.rbm_objective import PooledPairs, RBMArguments, RBMObjective, whole_batch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def with_new_rbm(model, word_ids, settings: RBMArguments, pooled: Iterable[torch.Tensor], word_share):
    """The same captioner with a fresh RBM over these words, standardised by these images, (n, V) or (n, N, V) at a time."""
    config = BlipRBMConfig.from_dict(
        model.config.to_dict()
        | {"rbm_word_ids": word_ids, "rbm_hidden_size": settings.hidden_size}
        | {"rbm_num_phrases": 0}  # phrases were fitted to other causes
        | ({"rbm_pooling": settings.pooling, "rbm_visible_size": None} if settings.pooling else {})
    )
    fresh = BlipRBMForConditionalGeneration(config)
    frozen = {name: t for name, t in model.state_dict().items() if not name.startswith("rbm_layer.")}
    fresh.load_state_dict(frozen, strict=False)
    fresh.generation_config = copy.deepcopy(model.generation_config)
    fresh.set_phrases(None)
    rbm = fresh.rbm_layer.rbm
    rbm.reset_parameters(std=settings.init_std)
    rbm.set_image_statistics(pooled)
    with torch.no_grad():
        rbm.word_bias.copy_(torch.logit(word_share.clamp(1e-4, 1 - 1e-4)))
    return fresh


def in_pieces(store, rows, size: int = 1024) -> Iterator[torch.Tensor]:
    """All views of these rows of a `FeatureStore`, about `size` vectors at a time: (n, V), or of tokens (n, N, V)."""
    size = max(1, size // math.prod(store.shape[2:-1]))
    for start in range(0, len(rows), size):
        for view in range(store.num_views):
            yield store.batch(rows[start : start + size], view)


def prepared(accelerator, objective, train_set, settings: RBMArguments):
    """Objective, optimizer, loader and schedule, in the accelerator's hands."""
    if settings.ais_every and objective.rbm.tokens:
        raise ValueError("--ais_every knows RBMs of pooled images alone: leave it out with --pooling tokens")
    if settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch_size is {settings.batch_size}, the images of a step over all {accelerator.num_processes} processes: it must be a "
            "multiple of their number"
        )
    decay = [p for n, p in objective.named_parameters() if n.endswith("_weight")]
    rest = [p for n, p in objective.named_parameters() if not n.endswith("_weight")]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    loader = torch.utils.data.DataLoader(
        train_set,
        settings.batch_size,
        shuffle=True,
        collate_fn=whole_batch,
        drop_last=len(train_set) >= settings.batch_size,  # so that all processes have as many images
    )
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    steps = settings.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, len(loader), steps)
    accelerator.register_for_checkpointing(schedule)
    return objective, optimizer, loader, schedule


def train_epoch(accelerator, objective, optimizer, loader, schedule=None) -> dict[str, float]:
    """One pass over the pairs; the mean of each term of the loss, over all processes."""
    sums = {}
    for batch in loader:
        loss, terms = objective(**batch)
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(objective.parameters(), 10.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + accelerator.reduce(term.detach(), "mean").item() / len(loader)
    return sums


def train(accelerator, model, train_set: PooledPairs, held_back, settings: RBMArguments) -> list[dict]:
    """Train the RBM of `model`. The best epoch's weights are in `model` at the end.

    `<output_dir>/log.jsonl` has what is measured, `best.pt` the best machine so far, `state/` what a stopped run goes
    on from.

    Args:
        held_back: pooled images (n, V) or tokens (n, N, V), and of each image its captions' words (captions, K).

    Returns:
        what was measured, an entry an evaluation.

    Raises:
        FloatingPointError: if a weight or a loss is not finite. What was saved before stays.
    """
    rbm, output_dir = model.rbm_layer.rbm, Path(settings.output_dir)
    some = train_set.rows[: len(held_back[0])]
    seen = (train_set.store.batch(some), [train_set.words[i] for i in some])
    objective = RBMObjective(rbm, settings, accelerator.num_processes)
    objective, optimizer, loader, schedule = prepared(accelerator, objective, train_set, settings)
    checkpoint = Checkpoint(accelerator, output_dir / "state")
    history = checkpoint.load()
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        write_log(history, output_dir / "log.jsonl")
    done = history[-1]["epoch"] if history else 0
    bar = tqdm(range(done, settings.epochs), desc="train RBM", disable=not accelerator.is_main_process)
    for epoch in bar:
        objective.train()
        train_set.set_epoch(epoch)
        loader.set_epoch(epoch)
        sums = train_epoch(accelerator, objective, optimizer, loader, schedule)
        refuse_divergence(rbm, sums, epoch, output_dir)
        if (epoch + 1) % settings.eval_every and epoch + 1 != settings.epochs:
            continue
        history.append(measured(rbm, epoch, sums, held_back, seen, settings))
        warn_of_collapse(history[-1], bar)
        if accelerator.is_main_process:
            keep(rbm, history, output_dir)
        checkpoint.save(history)
        bar.set_postfix({name: f"{history[-1][name]:.2f}" for name in (*sums, "text_to_image_r10", "word_ap")})
        if settings.patience is not None and evaluations_since_best(history) >= settings.patience:
            bar.write(f"epoch {epoch + 1}: no better for {settings.patience} evaluations, stopped")
            break
    accelerator.wait_for_everyone()
    rbm.load_state_dict(torch.load(output_dir / "best.pt", weights_only=True))
    return history


def measured(rbm, epoch: int, sums: dict[str, float], held_back, seen, settings: RBMArguments) -> dict:
    """An entry of the log: the loss, and how well the RBM knows pairs that it has not seen."""
    entry = {"epoch": epoch + 1, **sums, **evaluate_rbm(rbm, *held_back)} | free_energy_gap(rbm, held_back, seen)
    if settings.ais_every and ((epoch + 1) % settings.ais_every == 0 or epoch + 1 == settings.epochs):
        entry |= log_likelihood(rbm, held_back, seen)
    return entry


def refuse_divergence(rbm, sums: dict[str, float], epoch: int, output_dir: Path):
    finite = all(torch.isfinite(parameter).all() for parameter in rbm.parameters())
    if not finite or not np.isfinite(list(sums.values())).all():
        raise FloatingPointError(
            f"training diverged in epoch {epoch + 1} (loss {sums}): lower --learning_rate; what was saved before is "
            f"still in {output_dir}"
        )


def warn_of_collapse(entry: dict, bar):
    if entry["dead"] + entry["saturated"] > 0.5:
        bar.write(
            f"epoch {entry['epoch']}: the RBM has collapsed, {entry['dead']:.0%} of its hidden units are always off and "
            f"{entry['saturated']:.0%} always on; lower --learning_rate, or set --sparsity_target"
        )


def keep(rbm, history: list[dict], output_dir: Path):
    """Write the RBM if it is the best so far, the log and the curves."""
    if evaluations_since_best(history) == 0:
        torch.save(rbm.state_dict(), output_dir / "best.tmp")
        (output_dir / "best.tmp").replace(output_dir / "best.pt")
    write_log(history, output_dir / "log.jsonl")
    plot_curves(history, output_dir / "curves.png")


def evaluations_since_best(history: list[dict]) -> int:
    quality = [entry["text_to_image_r10"] + entry["image_to_text_r10"] for entry in history]
    return len(quality) - 1 - quality.index(max(quality))


def write_log(history: list[dict], file: Path):
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    temporary.replace(file)


def plot_curves(history: list[dict], path: Path):
    """Every number of the log against the epoch, one panel a kind."""
    panels = {
        "loss (nats)": ("words", "match", "cd", "sparsity"),
        "retrieval R@10 (%)": ("image_to_text_r10", "text_to_image_r10"),
        "average precision": ("word_ap", "per_word_ap"),
        "free energy, held back - training (nats)": ("free_energy_gap",),
        "share of hidden units": ("dead", "saturated"),
        "log P(image, words) by AIS (nats)": ("log_likelihood", "log_likelihood_training"),
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 7), layout="constrained")
    for axis, (title, names) in zip(axes.flat, panels.items()):
        for name in names:
            points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
            if points:
                axis.plot(*zip(*points), marker=".", label=name)
        axis.set(title=title, xlabel="epoch")
        if axis.lines:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
    figure.savefig(path.with_suffix(".tmp.png"), dpi=80)
    plt.close(figure)
    path.with_suffix(".tmp.png").replace(path)
