"""Stage 2: train the RBM of a captioner, BLIP frozen, on the same cached features of the vision tower.

    accelerate launch -m training.train_rbm training/recipes/rbm-small.yaml --model runs/captioner/best \
        --dataset flickr8k --output_dir runs/rbm

One loss, each term a flag: `words` (predict the held-out words of a caption from the image and a random part of its
words: what guide does), `match` (InfoNCE over the pointwise mutual information in the batch: what re-rank does) and `cd`
(contrastive divergence). Goes on from its last epoch when it is started again. What is kept is the epoch with the best
retrieval on held-back training images.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.decoding_blip_rbm import word_columns, words_said
from modeling_blip_rbm.modeling_blip_rbm import pool_tokens
from modeling_blip_rbm.rbm import (
    GibbsState,
    bernoulli,
    free_energy,
    gibbs,
    hidden_input,
    pointwise_mutual_information,
    prob_h_given_v,
    word_gains,
)
from training.arguments import DataArguments, parse_arguments
from training.checkpoints import save_captioner, write_json
from training.data import load_pairs, split_held_back
from training.features import cache_features


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
    epochs: int = field(default=100, metadata={"help": "an epoch shows each image once, with one of its captions"})
    batch_size: int = field(default=256, metadata={"help": "images a step and process"})
    learning_rate: float = field(default=1e-3, metadata={"help": "Adam's, warmed up for one epoch, then cosine"})
    weight_decay: float = field(default=1e-2, metadata={"help": "decoupled, on the weights only"})
    image_dropout: float = field(default=0.2, metadata={"help": "share of image units set to the average image's"})
    init_std: float = field(default=0.02, metadata={"help": "of the weights at the start"})
    words: float = field(default=1.0, metadata={"help": "weight of the held-out words' log-likelihood"})
    match: float = field(default=1.0, metadata={"help": "weight of InfoNCE over PMI"})
    cd: float = field(default=0.0, metadata={"help": "weight of contrastive divergence"})
    cd_steps: int = field(default=1, metadata={"help": "Gibbs steps of contrastive divergence"})
    cd_clamp_image: bool = field(default=False, metadata={"help": "contrastive divergence for P(w | x) only"})
    eval_every: int = field(default=5, metadata={"help": "epochs between evaluations"})
    seed: int = field(default=0, metadata={"help": "of everything random"})


def choose_words(tokenizer, captions: list[list[str]], num_words: int) -> list[int]:
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
    """An image in a random view, pooled, and the words of one of its captions."""

    def __init__(self, pooled: torch.Tensor, words: list[torch.Tensor]):
        self.pooled, self.words = pooled, words  # (n, views, V); of each image (captions, K)

    def __len__(self):
        return len(self.pooled)

    def __getitem__(self, index):
        words = self.words[index]
        view, caption = torch.randint(self.pooled.shape[1], ()), torch.randint(len(words), ())
        return self.pooled[index, view], words[caption].float()


def words_loss(p, a_image, w):
    """-log P(w_k | x, some of the other words), mean over captions (nats per caption): what guide relies on.

    A random share of the words is shown; each hidden word's conditional is sigmoid(b_k + gain_k), which is exact for the
    RBM (gains to second order, for speed: `benchmarks/guidance.py` measures the difference).
    """
    shown = w * (torch.rand_like(w) < torch.rand_like(w[:, :1])).float()
    logits = p.b + word_gains(p, a_image + shown @ p.U, order="second")
    loss = F.binary_cross_entropy_with_logits(logits, w, reduction="none")
    return (loss * (1 - shown)).sum(-1).mean()


def match_loss(p, a_image, w):
    """InfoNCE over s_ij = PMI(w_j; x_i), both ways (BLIP's ITC with the RBM as the similarity), in nats."""
    scores = pointwise_mutual_information(p, a_image[:, None], w[None])  # (B, B)
    target = torch.arange(len(scores), device=scores.device)
    return 0.5 * (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target))


def cd_loss(p, x, w, steps, clamp_image):
    """<F>_data - <F>_model with the samples held fixed: its gradient is that of contrastive divergence."""
    with torch.no_grad():
        h = bernoulli(prob_h_given_v(p, x, w))
        chains = gibbs(p, GibbsState(h, x, w), steps, clamp=("x",) if clamp_image else ())
    return (free_energy(p, x, w) - free_energy(p, chains.x, chains.w)).mean()


class RBMObjective(torch.nn.Module):
    """The loss as a module, so that every process and precision that Accelerate knows can run it."""

    def __init__(self, rbm, settings: RBMArguments):
        super().__init__()
        self.rbm, self.settings = rbm, settings

    def forward(self, pooled, w):
        p, settings = self.rbm.parameters_fp32, self.settings
        x = self.rbm.standardise(pooled)
        x = x * (torch.rand_like(x) >= settings.image_dropout).float()
        a = hidden_input(p, x)
        terms = {}
        if settings.words:
            terms["words"] = words_loss(p, a, w)
        if settings.match:
            terms["match"] = match_loss(p, a, w)
        if settings.cd:
            terms["cd"] = cd_loss(p, x, w, settings.cd_steps, settings.cd_clamp_image)
        return sum(getattr(settings, name) * term for name, term in terms.items()), terms


@torch.no_grad()
def evaluate_rbm(rbm, pooled: torch.Tensor, words: list[torch.Tensor]) -> dict[str, float]:
    """Retrieval by PMI among these images and all their captions, word AP, dead and saturated hidden units.

    Args:
        pooled (n, V): plain views. words: of each image (captions, K).
    """
    p = rbm.parameters_fp32
    a = hidden_input(p, rbm.standardise(pooled))
    owner = torch.tensor([i for i, of_image in enumerate(words) for _ in of_image])
    w = torch.cat([of_image.float() for of_image in words])
    scores = torch.cat([pointwise_mutual_information(p, row[None], w)[None] for row in a])  # (n, captions)
    own = owner[None] == torch.arange(len(words))[:, None]
    best_own = scores.masked_fill(~own, float("-inf")).max(1, keepdim=True).values
    rank_of_caption = (scores.masked_fill(own, float("-inf")) > best_own).sum(1)
    rank_of_image = (scores > scores[owner, torch.arange(len(owner))]).sum(0)
    target = torch.stack([of_image.any(0) for of_image in words])
    prob = torch.sigmoid(p.b + word_gains(p, a, order="second"))
    q = torch.sigmoid(a).mean(0)
    result = {"word_ap": average_precision(prob, target)}
    for k in (1, 5, 10):
        result[f"image_to_text_r{k}"] = 100 * (rank_of_caption < k).float().mean().item()
        result[f"text_to_image_r{k}"] = 100 * (rank_of_image < k).float().mean().item()
    return result | {"dead": (q < 0.01).float().mean().item(), "saturated": (q > 0.99).float().mean().item()}


def average_precision(prob: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over images of the average precision of the words that any of its captions holds: (n, K) each."""
    order = prob.argsort(1, descending=True)
    hits = target.gather(1, order).float()
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return ((precision * hits).sum(1) / hits.sum(1).clamp(min=1)).mean().item()


def caption_words(tokenizer, captions, word_ids) -> list[torch.Tensor]:
    """Of each image, which words its captions hold: bool (captions, K)."""
    columns = word_columns(word_ids, len(tokenizer))
    result = []
    for of_image in captions:
        ids = tokenizer(list(of_image), add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        result.append(words_said(ids, columns, len(word_ids)).bool())
    return result


def with_new_rbm(model, word_ids, settings: RBMArguments, pooled, word_share):
    """The same captioner with a fresh RBM over these words, standardised by these pooled images (n, V)."""
    config = BlipRBMConfig.from_dict(
        model.config.to_dict() | {"rbm_word_ids": word_ids, "rbm_hidden_size": settings.hidden_size}
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


def pool_store(store, rows, pooling: str) -> torch.Tensor:
    """(rows, views, V) fp32."""
    pooled = [pool_tokens(torch.from_numpy(np.array(store[row])).float(), pooling) for row in tqdm(rows, desc="pool")]
    return torch.stack(pooled)


def train(accelerator, model, train_set, held_back, settings: RBMArguments):
    rbm = model.rbm_layer.rbm
    objective = RBMObjective(rbm, settings)
    decay = [p for n, p in rbm.named_parameters() if n.endswith("_weight")]
    rest = [p for n, p in rbm.named_parameters() if not n.endswith("_weight")]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    loader = torch.utils.data.DataLoader(train_set, settings.batch_size, shuffle=True)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    steps = settings.epochs * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer.optimizer, len(loader), steps)
    accelerator.register_for_checkpointing(schedule)
    output_dir = Path(settings.output_dir)
    state_dir, log_file, best_file = output_dir / "state", output_dir / "log.jsonl", output_dir / "best.pt"
    history = [json.loads(line) for line in log_file.read_text().splitlines()] if state_dir.exists() else []
    if history:
        accelerator.load_state(str(state_dir))
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        log_file.write_text("")
    done = history[-1]["epoch"] if history else 0
    bar = tqdm(range(done, settings.epochs), desc="train RBM", disable=not accelerator.is_main_process)
    for epoch in bar:
        sums = {}
        objective.train()
        for pooled, w in loader:
            loss, terms = objective(pooled, w)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(objective.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item() / len(loader)
        if not np.isfinite(list(sums.values())).all():
            raise FloatingPointError(
                f"the loss is {sums} in epoch {epoch + 1}: lower --learning_rate; nothing was saved"
            )
        if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == settings.epochs:
            entry = {"epoch": epoch + 1, **sums, **evaluate_rbm(rbm, *held_back)}
            quality = entry["text_to_image_r10"] + entry["image_to_text_r10"]
            best = max((e["text_to_image_r10"] + e["image_to_text_r10"] for e in history), default=-1.0)
            history.append(entry)
            accelerator.save_state(str(state_dir))
            if accelerator.is_main_process:
                with log_file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                if quality > best:
                    torch.save(rbm.state_dict(), best_file)
            bar.set_postfix({name: f"{entry[name]:.2f}" for name in (*sums, "text_to_image_r10", "word_ap")})
    rbm.load_state_dict(torch.load(best_file, weights_only=True))
    return history


def main():
    data, settings = parse_arguments(DataArguments, RBMArguments)
    accelerator = Accelerator()
    set_seed(settings.seed)
    processor = BlipRBMProcessor.from_pretrained(settings.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(settings.model)
    dataset = load_pairs(data.dataset, data.train_split, data.max_images)
    store = cache_features(model.vision_model, processor.image_processor, dataset, data.cache_dir, data.views)
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"]
    word_ids = choose_words(processor.tokenizer, [captions[i] for i in train_rows], settings.num_words)
    words = caption_words(processor.tokenizer, captions, word_ids)
    pooled = pool_store(store, range(len(dataset)), model.config.rbm_pooling)
    word_share = torch.cat([words[i] for i in train_rows]).float().mean(0)
    model = with_new_rbm(model, word_ids, settings, pooled[train_rows].flatten(0, 1), word_share)
    held_back = (pooled[held_rows, 0], [words[i] for i in held_rows])
    train_set = PooledPairs(pooled[train_rows], [words[i] for i in train_rows])
    start = time.time()
    history = train(accelerator, model, train_set, held_back, settings)
    if accelerator.is_main_process:
        save_captioner(model, processor, Path(settings.output_dir) / "best")
        minutes = (time.time() - start) / 60
        write_json(
            Path(settings.output_dir) / "rbm.json",
            {
                "minutes": minutes,
                "num_words": len(word_ids),
                "held_back": history,
                "rbm": asdict(settings),
                "data": asdict(data),
            },
        )
        print(f"{settings.output_dir}/best: {json.dumps(history[-1])}")


if __name__ == "__main__":
    main()
