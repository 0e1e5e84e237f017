"""Stage 2: train the RBM of a captioner, BLIP frozen, on the same cached features of the vision tower.

    accelerate launch -m training.train_rbm training/recipes/rbm-small.yaml --model runs/captioner/best \
        --dataset flickr8k --output_dir runs/rbm

One loss, each term a flag: `words` (predict the held-out words of a caption from the image and a random part of its
words: what guide does), `match` (InfoNCE over the pointwise mutual information in the batch: what re-rank does) and `cd`
(contrastive divergence, with `--cd_persistent` from chains that go on from step to step). Goes on from its last epoch when it
is started again. What is kept is the epoch with the best retrieval on held-back training images; `log.jsonl` and
`curves.png` show all that was measured.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.configuration_blip_rbm import PHRASE_WEIGHTS
from modeling_blip_rbm.rbm import (
    GibbsState,
    bernoulli,
    free_energy,
    gibbs,
    hidden_input,
    pairwise_mutual_information,
    prob_h_given_v,
    word_gains,
)
from training.evaluate_rbm import evaluate_rbm, free_energy_gap, log_likelihood
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.checkpoints import peak_memory_mb, refuse_other_output, save_captioner, write_json
from training.lib.data import CaptionWords, caption_words, split_held_back
from training.lib.distributed import Checkpoint, from_all_processes, new_accelerator
from training.lib.features import load_features


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Words without content, which the decoder's grammar needs and the image does not decide.
FUNCTION_WORDS = set(
    "a an the this that these those some any each every another other his her hers its their theirs my your our he she "
    "it they them him himself herself itself themselves i you we who whom whose which what where when while as if than "
    "then so and or but nor not no of in on at by for from with without to into onto off out up down over under through "
    "across along around about above below behind beside near next between among during after before against toward "
    "towards upon is are was were be been being am has have had having do does did can could will would may might there "
    "here very just also too s t".split()
)


@dataclass
class RBMArguments:
    model: str = field(metadata={"help": "folder or Hub id of the captioner"})
    output_dir: str = field(metadata={"help": "where log, state and the captioner with its RBM go"})
    hidden_size: int = field(default=512, metadata={"help": "H, hidden causes"})
    num_words: int = field(default=1000, metadata={"help": "K, the most frequent content word-pieces"})
    pooling: Optional[str] = field(
        default=None, metadata={"help": "of image tokens: mean, cls_mean or mean_max; default: the model's"}
    )
    epochs: int = field(default=100, metadata={"help": "an epoch shows each image once, with one of its captions"})
    batch_size: int = field(default=256, metadata={"help": "images a step, over all processes"})
    learning_rate: float = field(default=1e-3, metadata={"help": "warmed up for one epoch, then cosine"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw or sgd", "choices": ["adamw", "sgd"]})
    momentum: float = field(default=0.9, metadata={"help": "of sgd"})
    weight_decay: float = field(default=1e-2, metadata={"help": "on the weights only; decoupled in adamw"})
    image_dropout: float = field(default=0.2, metadata={"help": "share of image units set to the average image's"})
    init_std: float = field(default=0.02, metadata={"help": "of the weights at the start"})
    words: float = field(default=1.0, metadata={"help": "weight of the held-out words' log-likelihood"})
    match: float = field(default=1.0, metadata={"help": "weight of InfoNCE over PMI"})
    cd: float = field(default=0.0, metadata={"help": "weight of contrastive divergence"})
    cd_steps: int = field(default=1, metadata={"help": "Gibbs steps of contrastive divergence"})
    cd_clamp_image: bool = field(default=False, metadata={"help": "contrastive divergence for P(w | x) only"})
    cd_persistent: bool = field(
        default=False, metadata={"help": "PCD: chains go on from step to step, image not clamped"}
    )
    sparsity_target: Optional[float] = field(default=None, metadata={"help": "mean activity hidden units are drawn to"})
    sparsity_cost: float = field(default=1.0, metadata={"help": "weight of the cross entropy to the sparsity target"})
    eval_every: int = field(default=5, metadata={"help": "epochs between evaluations"})
    ais_every: int = field(default=0, metadata={"help": "epochs between log-likelihoods by AIS; 0: never"})
    patience: Optional[int] = field(
        default=None, metadata={"help": "stop after so many evaluations without a better one"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})


def choose_words(tokenizer, captions: Iterable[list[str]], num_words: int) -> list[int]:
    """Token ids of the most frequent content words (whole word-pieces, letters only), ascending."""
    counts = torch.zeros(len(tokenizer), dtype=torch.long)
    for of_image in captions:
        for ids in tokenizer(list(of_image), add_special_tokens=False)["input_ids"]:
            counts[torch.tensor(sorted(set(ids)), dtype=torch.long)] += 1
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    content = torch.tensor([token.isalpha() and token not in FUNCTION_WORDS for token in tokens])
    order = (counts * content).argsort(descending=True, stable=True)[:num_words]
    return sorted(order[counts[order] > 0].tolist())


class PooledPairs(torch.utils.data.Dataset):
    """Images in a random view, pooled, the words of one of their captions, and the random numbers of a step.

    All chance is drawn from (seed, epoch, image): a step is the same in whatever process its images are, and after a stop.

    Args:
        store: `FeatureStore` of pooled images. rows: its rows that belong to the set. words: of all its rows.
    """

    def __init__(self, store, rows, words: CaptionWords, seed: int = 0):
        self.store, self.rows, self.words, self.seed, self.epoch = store, np.asarray(rows), words, seed, 0

    def __len__(self):
        return len(self.rows)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        """A whole batch: pooled (B, V), w (B, K), noise (B, 1 + V + K) uniform in [0, 1)."""
        rows = self.rows[np.asarray(indices)]
        size = 3 + self.store.shape[-1] + self.words.num_words
        chance = np.stack(
            [np.random.default_rng([self.seed, self.epoch, row]).random(size, np.float32) for row in rows]
        )
        views = (chance[:, 0] * self.store.num_views).astype(np.int64)
        return {
            "pooled": self.store.batch(rows, views),
            "w": self.words.choose(rows, chance[:, 1]),
            "noise": torch.from_numpy(chance[:, 2:]),
        }


def whole_batch(batch: dict) -> dict:  # what `PooledPairs` gives is collated already
    return batch


def words_loss(p, a_image, w, noise):
    """-log P(w_k | x, some of the other words), mean over captions (nats per caption): what guide relies on.

    A random share of the words is shown, as noise (B, 1 + K), uniform in [0, 1), says; each hidden word's conditional is sigmoid(b_k + gain_k), which is exact for the
    RBM (gains to second order, for speed: `benchmarks/guidance.py` measures the difference).
    """
    shown = w * (noise[:, 1:] < noise[:, :1]).float()
    logits = p.b + word_gains(p, a_image + shown @ p.U, order="second")
    loss = F.binary_cross_entropy_with_logits(logits, w, reduction="none")
    return (loss * (1 - shown)).sum(-1).mean()


def match_loss(p, a_image, w):
    """InfoNCE over s_ij = PMI(w_j; x_i), both ways (BLIP's ITC with the RBM as the similarity), in nats.

    Under several processes the images and captions of all of them are each other's negatives, as if they were one batch.
    """
    all_images, all_words = from_all_processes(a_image), from_all_processes(w)
    to_words = pairwise_mutual_information(p, a_image, all_words)  # (b, B)
    if len(all_images) == len(a_image):
        to_images = to_words.T
    else:
        to_images = pairwise_mutual_information(p, all_images, w).T
    first = 0 if len(all_images) == len(a_image) else dist.get_rank() * len(a_image)
    target = torch.arange(first, first + len(a_image), device=w.device)
    return 0.5 * (F.cross_entropy(to_words, target) + F.cross_entropy(to_images, target))


def cd_loss(p, x, w, steps, clamp_image, chains=None):
    """<F>_data - <F>_model with the samples held fixed: its gradient is that of contrastive divergence.

    Args:
        chains: where persistent chains stand; None: they start at the data.

    Returns:
        the loss, and where the chains ended.
    """
    with torch.no_grad():
        if chains is None:
            chains = GibbsState(bernoulli(prob_h_given_v(p, x, w)), x, w)
        chains = gibbs(p, chains, steps, clamp=("x",) if clamp_image else ())
    return free_energy(p, x, w).mean() - free_energy(p, chains.x, chains.w).mean(), chains


def sparsity_loss(a, target: float):
    """Cross entropy between the target and each hidden unit's mean activity, mean over units (Lee et al. 2007)."""
    mean_q = torch.sigmoid(a).mean(0).clamp(1e-6, 1 - 1e-6)
    return F.binary_cross_entropy(mean_q, torch.full_like(mean_q, target))


class RBMObjective(torch.nn.Module):
    """The loss as a module, so that every process and precision that Accelerate knows can run it."""

    def __init__(self, rbm, settings: RBMArguments, processes: int = 1):
        super().__init__()
        if settings.cd_persistent and settings.cd_clamp_image:
            raise ValueError("cd_persistent and cd_clamp_image exclude each other: a chain has one image, a batch many")
        self.rbm, self.settings = rbm, settings
        if settings.cd and settings.cd_persistent:  # buffers: saved and resumed with the rest
            n = settings.batch_size // processes
            self.register_buffer("chain_h", torch.full((n, rbm.hidden_size), 0.5).bernoulli())
            self.register_buffer("chain_x", torch.randn(n, rbm.visible_size))
            self.register_buffer("chain_w", torch.sigmoid(rbm.word_bias.detach()).expand(n, -1).bernoulli())

    def cd_term(self, p, x, w):
        settings = self.settings
        if not settings.cd_persistent:
            return cd_loss(p, x, w, settings.cd_steps, settings.cd_clamp_image)[0]
        loss, chains = cd_loss(p, x, w, settings.cd_steps, False, GibbsState(self.chain_h, self.chain_x, self.chain_w))
        self.chain_h, self.chain_x, self.chain_w = chains
        return loss

    def forward(self, pooled, w, noise):
        """The loss and its terms, for a batch of `PooledPairs`."""
        p, settings = self.rbm.parameters_fp32, self.settings
        full = self.rbm.standardise(pooled)
        for_words, for_image = noise.split([1 + w.shape[1], pooled.shape[1]], dim=1)
        x = full * (for_image >= settings.image_dropout).float()
        a = hidden_input(p, x)
        terms = {}
        if settings.words:
            terms["words"] = words_loss(p, a, w, for_words)
        if settings.match:
            terms["match"] = match_loss(p, a, w)
        if settings.cd:
            terms["cd"] = self.cd_term(p, full, w)
        loss = sum(getattr(settings, name) * term for name, term in terms.items())
        if settings.sparsity_target is not None:
            terms["sparsity"] = sparsity_loss(from_all_processes(a + w @ p.U), settings.sparsity_target)
            loss = loss + settings.sparsity_cost * terms["sparsity"]
        return loss, terms


def with_new_rbm(model, word_ids, settings: RBMArguments, pooled: Iterable[torch.Tensor], word_share):
    """The same captioner with a fresh RBM over these words, standardised by these pooled images, (n, V) at a time."""
    config = BlipRBMConfig.from_dict(
        model.config.to_dict()
        | {"rbm_word_ids": word_ids, "rbm_hidden_size": settings.hidden_size}
        | {"rbm_num_phrases": 0}
        | dict.fromkeys(PHRASE_WEIGHTS, 0.0)  # they were fitted to other causes
        | ({"rbm_pooling": settings.pooling, "rbm_visible_size": None} if settings.pooling else {})
    )
    fresh = BlipRBMForConditionalGeneration(config)
    frozen = {name: t for name, t in model.state_dict().items() if not name.startswith("rbm_layer.")}
    fresh.load_state_dict(frozen, strict=False)
    fresh.generation_config = model.generation_config
    rbm = fresh.rbm_layer.rbm
    rbm.reset_parameters(std=settings.init_std)
    rbm.set_image_statistics(pooled)
    with torch.no_grad():
        rbm.word_bias.copy_(torch.logit(word_share.clamp(1e-4, 1 - 1e-4)))
    return fresh


def in_pieces(store, rows, size: int = 1024) -> Iterator[torch.Tensor]:
    """All views of these rows of a `FeatureStore` of pooled images, (n, V) at a time."""
    for start in range(0, len(rows), size):
        for view in range(store.num_views):
            yield store.batch(rows[start : start + size], view)


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


def prepared(accelerator, objective, train_set, settings: RBMArguments):
    """Objective, optimizer, loader and schedule, in the accelerator's hands."""
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


def write_log(history: list[dict], file: Path):
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))
    temporary.replace(file)


def train(accelerator, model, train_set: PooledPairs, held_back, settings: RBMArguments):
    """Train; what is measured goes to `log.jsonl`, the best machine to `best.pt` and, at the end, into `model`."""
    rbm = model.rbm_layer.rbm
    some = train_set.rows[: len(held_back[0])]
    seen = (train_set.store.batch(some), [train_set.words[i] for i in some])
    objective = RBMObjective(rbm, settings, accelerator.num_processes)
    objective, optimizer, loader, schedule = prepared(accelerator, objective, train_set, settings)
    output_dir = Path(settings.output_dir)
    log_file, best_file = output_dir / "log.jsonl", output_dir / "best.pt"
    checkpoint = Checkpoint(accelerator, output_dir / "state")
    history = checkpoint.load()
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        write_log(history, log_file)
    done = history[-1]["epoch"] if history else 0
    bar = tqdm(range(done, settings.epochs), desc="train RBM", disable=not accelerator.is_main_process)
    for epoch in bar:
        objective.train()
        train_set.set_epoch(epoch)
        loader.set_epoch(epoch)
        sums = train_epoch(accelerator, objective, optimizer, loader, schedule)
        finite = all(torch.isfinite(parameter).all() for parameter in rbm.parameters())
        if not finite or not np.isfinite(list(sums.values())).all():
            raise FloatingPointError(
                f"training diverged in epoch {epoch + 1} (loss {sums}): lower --learning_rate; what was saved before is "
                f"still in {output_dir}"
            )
        if (epoch + 1) % settings.eval_every and epoch + 1 != settings.epochs:
            continue
        entry = {"epoch": epoch + 1, **sums, **evaluate_rbm(rbm, *held_back)} | free_energy_gap(rbm, held_back, seen)
        if settings.ais_every and ((epoch + 1) % settings.ais_every == 0 or epoch + 1 == settings.epochs):
            entry |= log_likelihood(rbm, held_back, seen)
        if entry["dead"] + entry["saturated"] > 0.5:
            bar.write(
                f"epoch {epoch + 1}: the RBM has collapsed, {entry['dead']:.0%} of its hidden units are always off and "
                f"{entry['saturated']:.0%} always on; lower --learning_rate, or set --sparsity_target"
            )
        history.append(entry)
        if accelerator.is_main_process:
            if evaluations_since_best(history) == 0:
                torch.save(rbm.state_dict(), best_file.with_suffix(".tmp"))
                best_file.with_suffix(".tmp").replace(best_file)
            write_log(history, log_file)
            plot_curves(history, output_dir / "curves.png")
        checkpoint.save(history)
        bar.set_postfix({name: f"{entry[name]:.2f}" for name in (*sums, "text_to_image_r10", "word_ap")})
        if settings.patience is not None and evaluations_since_best(history) >= settings.patience:
            bar.write(f"epoch {epoch + 1}: no better for {settings.patience} evaluations, stopped")
            break
    accelerator.wait_for_everyone()
    rbm.load_state_dict(torch.load(best_file, weights_only=True))
    return history


def evaluations_since_best(history: list[dict]) -> int:
    quality = [entry["text_to_image_r10"] + entry["image_to_text_r10"] for entry in history]
    return len(quality) - 1 - quality.index(max(quality))


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


def main():
    data, settings = parse_arguments(DataArguments, RBMArguments)
    refuse_other_output(settings.output_dir, "rbm.json", "log.jsonl", "pairs.json")
    accelerator = new_accelerator(settings.seed)
    set_seed(settings.seed)
    processor = BlipRBMProcessor.from_pretrained(settings.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(settings.model)
    pooling = settings.pooling or model.config.rbm_pooling
    start = time.time()
    with accelerator.main_process_first():
        card_file = Path(settings.output_dir) / "pairs.json" if accelerator.is_main_process else None
        dataset, store = load_features(
            data, model.vision_model, processor.image_processor, card_file=card_file, pooling=pooling
        )
    encoded = time.time()
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"]
    word_ids = choose_words(processor.tokenizer, (captions[i] for i in train_rows.tolist()), settings.num_words)
    words = caption_words(processor.tokenizer, captions, word_ids)
    model = with_new_rbm(model, word_ids, settings, in_pieces(store, train_rows), words.share(train_rows))
    held_back = (store.batch(held_rows), [words[i] for i in held_rows])
    history = train(accelerator, model, PooledPairs(store, train_rows, words, settings.seed), held_back, settings)
    if accelerator.is_main_process:
        save_captioner(model, processor, Path(settings.output_dir) / "best")
        write_json(
            Path(settings.output_dir) / "rbm.json",
            {
                "minutes": (time.time() - encoded) / 60,
                "minutes_of_encoding": (encoded - start) / 60,
                "peak_memory_mb": peak_memory_mb(),
                "num_words": len(word_ids),
                "held_back": history,
                "rbm": asdict(settings),
                "data": asdict(data),
            },
        )
        print(f"{settings.output_dir}/best: {json.dumps(history[-1])}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
