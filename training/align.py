"""Align a frozen vision with a frozen text encoder by a small layer on their cached embeddings, and see how well they
are aligned.

    python -m training.align training/recipes/align-sail.yaml --vision VISION [VISION ...] --text TEXT \
        --dataset flickr8k --output_dir runs/align

Three kinds of similarity between an image and a sentence, trained on the same pairs:

- `probe`: cosine of two linear layers: alignment probing, how aligned the frozen encoders are (SAIL, arXiv 2412.04616);
- `sail`: cosine of two gated layers, LayerNorm -> g(ReLU6(f1 x) * f2 x), trained with the sigmoid loss (SigLIP, arXiv
  2303.15343);
- `rbm`: the free energy of a joint RBM of image, words and sentence: their pointwise mutual information, trained to
  match.

Several captions of an image are drawn a step, all of them right: none is ever taken for a negative of its own image.
Batches may be as large as the data (`training/lib/contrastive.py` computes the loss in pieces). Goes on from its last
epoch when it is started again.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_blip_rbm.rbm import JointRBM, hidden_input, pairwise_information
from training.lib.aligned import Projection
from training.lib.arguments import SourceArguments, parse_arguments
from training.lib.checkpoints import peak_memory_mb, refuse_other_output, write_json
from training.lib.contrastive import info_nce
from training.lib.data import CaptionWords, caption_words, choose_words, split_held_back
from training.lib.distributed import Checkpoint, from_all_processes, new_accelerator
from training.lib.encoders import TextEncoder, VisionEncoder
from training.lib.pairs import load_pairs
from training.lib.retrieval import recalls
from training.lib.stage import run_stage


@dataclass(kw_only=True)
class AlignArguments(SourceArguments):
    vision: list[str] = field(
        metadata={"help": "folders or Hub ids of vision towers, side by side; NAME@6,12: of these layers"}
    )
    text: str = field(metadata={"help": "folder or Hub id of a text encoder"})
    output_dir: str = field(metadata={"help": "where the layer and what was measured go"})
    kind: str = field(default="sail", metadata={"help": "probe, sail or rbm", "choices": ["probe", "sail", "rbm"]})
    loss: str = field(
        default="infonce",
        metadata={"help": "sigmoid or infonce (of probe and sail)", "choices": ["sigmoid", "infonce"]},
    )
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    max_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images"})
    held_back: int = field(
        default=400,
        metadata={"help": "training images on which the best epoch is chosen; 0: train on all, the last epoch stays"},
    )
    views: int = field(default=1, metadata={"help": "cached views an image: 1 plain, 2 mirrored, more: random crops"})
    cache_dir: str = field(default="runs/features", metadata={"help": "where embeddings are kept"})
    dim: int = field(default=512, metadata={"help": "of the shared space"})
    hidden_size: int = field(default=1024, metadata={"help": "of the gated layer; hidden causes of the rbm"})
    num_words: int = field(default=1000, metadata={"help": "words of the rbm; 0: its sentence block alone"})
    captions: int = field(default=2, metadata={"help": "captions of an image a step"})
    epochs: int = field(default=40, metadata={"help": "an epoch shows every image once"})
    batch_size: int = field(default=1024, metadata={"help": "images a step, over all processes"})
    chunk: int = field(default=1024, metadata={"help": "rows of the loss at a time: memory, not results"})
    learning_rate: float = field(default=1e-3, metadata={"help": "warmed up over a tenth of the steps, then cosine"})
    weight_decay: float = field(default=0.01, metadata={"help": "on weights; not on biases, norms and the scale"})
    dropout: float = field(default=0.3, metadata={"help": "of embeddings going in"})
    eval_every: int = field(default=5, metadata={"help": "epochs between evaluations"})
    seed: int = field(default=0, metadata={"help": "of everything random"})


class Energy(nn.Module):
    """A joint RBM of image x, sentence t (one Gaussian block) and words w: similarity is PMI(t, w; x), as in
    re-rank."""

    def __init__(self, image_size: int, text_size: int, num_words: int, hidden_size: int, dropout: float):
        super().__init__()
        self.rbm = JointRBM(image_size + text_size, num_words, hidden_size)
        self.rbm.reset_parameters(std=0.02)
        self.image_size, self.dropout = image_size, nn.Dropout(dropout)
        self.log_scale = nn.Parameter(torch.zeros(()))  # of the energies against one another: a temperature

    def standardised(self, part, start: int):
        """A part of the visible block, the others at their means."""
        columns = slice(start, start + part.shape[1])
        x = (part - self.rbm.image_mean[columns]) / self.rbm.image_std[columns]
        return F.pad(self.dropout(x), (start, self.rbm.visible_size - start - part.shape[1]))

    def embed_images(self, images):
        """a (n, H), the hidden input from the image."""
        return hidden_input(self.rbm.parameters_fp32, self.standardised(images, 0))

    def embed_texts(self, texts, words=None):
        """(m, H) what sentence and words add to the hidden input."""
        p = self.rbm.parameters_fp32
        return hidden_input(p, self.standardised(texts, self.image_size), words) - p.c

    def similarity(self, images, texts):
        return pairwise_information(self.rbm.parameters_fp32.c, images, texts)

    def forward(self, images, texts, words, image_owner, text_owner, chunk: int):
        a, said = from_all_processes(self.embed_images(images)), from_all_processes(self.embed_texts(texts, words))
        logits = self.similarity(a, said) * self.log_scale.exp()
        return info_nce(logits, from_all_processes(image_owner), from_all_processes(text_owner))


class AlignmentData(torch.utils.data.Dataset):
    """Cached embeddings of images, in a random view, and of some of their captions, chosen by (seed, epoch, image)
    alone."""

    def __init__(
        self, stores, columns, sentences, words: Optional[CaptionWords], starts, rows, captions: int, seed: int
    ):
        self.stores, self.columns, self.sentences, self.words = stores, columns, sentences, words
        self.starts, self.rows, self.captions, self.seed, self.epoch = starts, np.asarray(rows), captions, seed, 0

    def __len__(self):
        return len(self.rows)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def images(self, rows, views=0) -> torch.Tensor:
        """(n, V) of all encoders side by side."""
        return torch.cat([store.batch(rows, views)[:, c] for store, c in zip(self.stores, self.columns)], 1)

    def texts(self, captions: np.ndarray):
        """(m, D) sentences and (m, K) words of the captions with these numbers."""
        sentences = torch.from_numpy(np.asarray(self.sentences[captions], dtype=np.float32))
        return sentences, None if self.words is None else self.words.of_captions(captions)

    def captions_of(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of all captions of these images, and whose each is."""
        numbers = [np.arange(*self.starts[[row, row + 1]]) for row in rows]
        return np.concatenate(numbers), np.repeat(np.asarray(rows), [len(n) for n in numbers])

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        rows = self.rows[np.asarray(indices)]
        views, chosen = [], []
        for row in rows:
            rng = np.random.default_rng([self.seed, self.epoch, row])
            views.append(rng.integers(self.stores[0].num_views))
            of_image = np.arange(*self.starts[[row, row + 1]])
            # as many of each image, so that processes have as many: an image with few captions shows one twice
            chosen.append(rng.choice(of_image, self.captions, replace=len(of_image) < self.captions))
        texts, words = self.texts(np.concatenate(chosen))
        owner = torch.from_numpy(rows)
        return {
            "images": self.images(rows, np.array(views)),
            "texts": texts,
            "words": texts.new_zeros(len(texts), 0) if words is None else words,
            "image_owner": owner,
            "text_owner": owner.repeat_interleave(self.captions),
        }


def load_data(args, split: str, rows=None, word_ids=None, encoders=None) -> tuple[AlignmentData, list[list[str]]]:
    """All images and captions of a split as the encoders see them, and the captions themselves."""
    dataset = load_pairs(args.dataset, split, args.max_images, **args.columns)
    encoders = encoders or load_encoders(args)
    vision, text = encoders
    stores = [encoder.embed(dataset, args.cache_dir, args.views) for encoder in vision]
    columns = [np.concatenate(list(encoder.parts.values())) for encoder in vision]
    captions = dataset["captions"][:]
    flat = [caption for of_image in captions for caption in of_image]
    words = None
    if args.kind == "rbm" and args.num_words:
        if word_ids is None:
            word_ids = choose_words(text.tokenizer, (captions[i] for i in rows.tolist()), args.num_words)
        words = caption_words(text.tokenizer, captions, word_ids)
    starts = np.cumsum([0, *(len(of_image) for of_image in captions)])
    sentences = text.embed(flat, args.cache_dir)
    every = np.arange(len(captions)) if rows is None else rows
    return AlignmentData(
        stores, columns, sentences, words, starts, every, getattr(args, "captions", 1), args.seed
    ), captions


def load_encoders(args) -> tuple[list[VisionEncoder], TextEncoder]:
    return [VisionEncoder(spec) for spec in args.vision], TextEncoder(args.text)


def new_aligner(args, data: AlignmentData) -> nn.Module:
    """The similarity to train, of the sizes of the data and, for an RBM, standardised by them."""
    image_size, text_size = data.images(data.rows[:1]).shape[1], data.sentences.shape[1]
    if args.kind != "rbm":
        hidden_size = args.hidden_size if args.kind == "sail" else None
        return Projection(image_size, text_size, args.dim, hidden_size, args.dropout, args.loss)
    num_words = 0 if data.words is None else data.words.num_words
    return Energy(image_size, text_size, num_words, args.hidden_size, args.dropout)


def set_statistics(energy: Energy, data: AlignmentData):
    """Standardise images and sentences by the training pairs, and start the words at their frequencies."""

    def parts():
        for rows in np.array_split(data.rows, max(1, len(data.rows) // 2048)):
            captions, owner = data.captions_of(rows)
            yield torch.cat([data.images(owner), data.texts(captions)[0]], 1)

    energy.rbm.set_image_statistics(parts())
    if data.words is not None:
        with torch.no_grad():
            energy.rbm.word_bias.copy_(torch.logit(data.words.share(data.rows).clamp(1e-4, 1 - 1e-4)))


@torch.no_grad()
def embed(aligner, data: AlignmentData, rows, size: int = 2048):
    """What `similarity` takes, of these images and of all their captions; and whose each caption is. Of an image that
    is cached in several views, the mean of them."""
    aligner.eval()
    views, device = range(data.stores[0].num_views), next(aligner.parameters()).device
    view_of = lambda part, view: aligner.embed_images(data.images(part, view).to(device))
    images_of = lambda part: torch.stack([view_of(part, view) for view in views]).mean(0)
    texts_of = lambda part: aligner.embed_texts(*(t if t is None else t.to(device) for t in data.texts(part)))
    captions, owner = data.captions_of(rows)
    images = torch.cat([images_of(part) for part in np.array_split(rows, len(rows) // size + 1)])
    texts = [texts_of(part) for part in np.array_split(captions, len(captions) // size + 1)]
    place = {row: i for i, row in enumerate(rows)}
    return images, torch.cat(texts), torch.tensor([place[row] for row in owner], device=device)


def evaluate(aligner, data: AlignmentData, rows) -> dict[str, float]:
    images, texts, owner = embed(aligner, data, rows)
    with torch.no_grad():
        return recalls(aligner.similarity(images, texts), owner)


def train(accelerator, aligner, data: AlignmentData, held_rows, args: AlignArguments) -> list[dict]:
    """Train; the layer of the epoch with the best recalls on held-back images, or of the last where none are, stays in
    `aligner`."""
    output_dir, plain = Path(args.output_dir), aligner
    matrices = [p for p in aligner.parameters() if p.dim() > 1]
    rest = [p for p in aligner.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    whole = len(data) >= args.batch_size
    loader = torch.utils.data.DataLoader(
        data, args.batch_size, shuffle=True, collate_fn=lambda batch: batch, drop_last=whole
    )
    aligner, optimizer, loader = accelerator.prepare(aligner, optimizer, loader)
    steps = args.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, steps // 10, steps)
    accelerator.register_for_checkpointing(schedule)
    checkpoint = Checkpoint(accelerator, output_dir / "state")
    history = checkpoint.load()
    bar = tqdm(range(history[-1]["epoch"] if history else 0, args.epochs), desc=f"align, {args.kind}")
    for epoch in bar:
        aligner.train()
        data.set_epoch(epoch)
        loader.set_epoch(epoch)
        total = 0.0
        for batch in loader:
            loss = aligner(**batch, chunk=args.chunk)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(aligner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() / len(loader)
        if not np.isfinite(total):
            raise FloatingPointError(f"training diverged in epoch {epoch + 1} (loss {total}): lower --learning_rate")
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            entry = {"epoch": epoch + 1, "loss": total} | (evaluate(plain, data, held_rows) if len(held_rows) else {})
            history.append(entry)
            # with no image held back all sums are 0
            if accelerator.is_main_process and sum_of_recalls(entry) == max(map(sum_of_recalls, history)):
                output_dir.mkdir(parents=True, exist_ok=True)
                torch.save(plain.state_dict(), output_dir / "best.tmp")
                (output_dir / "best.tmp").replace(output_dir / "best.pt")
            checkpoint.save(history)
            shown = ("loss", "image_to_text_r1", "text_to_image_r1")
            bar.set_postfix({name: f"{entry[name]:.1f}" for name in shown if name in entry})
    accelerator.wait_for_everyone()
    plain.load_state_dict(torch.load(output_dir / "best.pt", weights_only=True))
    return history


def sum_of_recalls(entry: dict) -> float:
    return sum(value for name, value in entry.items() if "_r" in name and name[-1].isdigit())


def main():
    (args,) = parse_arguments(AlignArguments)
    refuse_other_output(args.output_dir)
    accelerator = new_accelerator(args.seed)
    set_seed(args.seed)
    with accelerator.main_process_first():
        encoders = load_encoders(args)
        ids = load_pairs(args.dataset, args.train_split, args.max_images, **args.columns).select_columns(["image_id"])
        train_rows, held_rows = split_held_back(ids, args.held_back)
        data, _ = load_data(args, args.train_split, train_rows, encoders=encoders)
    aligner = new_aligner(args, data)
    if args.kind == "rbm":
        set_statistics(aligner, data)
    start = time.time()
    history = train(accelerator, aligner, data, held_rows, args)
    if accelerator.is_main_process:
        best = max(history, key=lambda entry: (sum_of_recalls(entry), entry["epoch"]))
        report = {
            "minutes": (time.time() - start) / 60,
            "threads": torch.get_num_threads() * accelerator.num_processes,
            "peak_memory_mb": peak_memory_mb(),
            "parameters": sum(p.numel() for p in aligner.parameters()),
            "word_ids": None if data.words is None else data.words.word_ids,
            "held_back": history,
            "align": asdict(args),
        }
        write_json(Path(args.output_dir) / "align.json", report)
        print(f"{args.output_dir}/best.pt: {json.dumps(best)}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
