"""Stage 3: choose how the finished model decodes, on training images that were held back.

    python -m training.tune_decoding --model runs/rbm/best --dataset flickr8k --output_dir runs/tuned

Every number here is of held-back *training* images; no validation image is looked at. In this order:

1. plain BLIP: how much of the words' log frequency is taken off the output bias (logit adjustment, Menon et al., ICLR 2021,
   arXiv 2007.07314), and beam search's length penalty. Of the weights whose CIDEr-D is within `tolerance` of the best,
   the one with the largest vocabulary: variety where it costs nothing. Both become part of plain BLIP, the baseline.
2. guide: its weight, in the same way with `guide_tolerance`.
3. re-rank: its weights on the candidates that guide gives, by a grid over the parts of each candidate's score.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.arguments import DataArguments, parse_arguments
from training.checkpoints import save_captioner, write_json
from training.data import load_pairs, split_held_back
from training.evaluate_captions import caption_rows
from training.features import cache_features
from training.metrics import CiderD, bleu, corpus_diversity
from training.train_captioner import caption_tokens, unigram_bias


@dataclass
class TuningArguments:
    model: str = field(metadata={"help": "folder or Hub id of a captioner with a trained RBM"})
    output_dir: str = field(metadata={"help": "where the captioner with its weights goes, and tuning.json"})
    num_beams: int = field(default=3, metadata={"help": "beams of guide; saved as the default of `generate`"})
    candidates: int = field(default=10, metadata={"help": "beams from which re-rank chooses"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest caption; saved as the default of `generate`"})
    prior: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3],
        metadata={"help": "shares of the log frequency taken off the bias"},
    )
    length_penalty: list[float] = field(
        default_factory=lambda: [1.0, 1.4], metadata={"help": "beam search's length penalties tried"}
    )
    tolerance: float = field(default=1.0, metadata={"help": "CIDEr-D points that plain BLIP may give for vocabulary"})
    guide_tolerance: float = field(default=0.5, metadata={"help": "the same for guide, before re-rank"})
    guidance: list[float] = field(default_factory=lambda: [0.0, 0.03, 0.06, 0.1], metadata={"help": "weights tried"})
    order: str = field(default="second", metadata={"help": "how word gains are computed: exact, second, first"})
    half: bool = field(default=False, metadata={"help": "store fp16 weights"})


RERANK_GRID = {
    "rbm_rerank_length_penalty": (0.0, 0.5, 1.0),
    "rbm_rerank_pmi": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    "rbm_rerank_consensus": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}


@torch.no_grad()
def candidate_parts(model, processor, store, rows, n: int, batch_size: int = 8, **generate_kwargs):
    """Of each image's n beams: captions, and log-probability, length, PMI and consensus as arrays (images, n)."""
    config, captions, parts = model.config, [], []
    weights = ("rbm_rerank_length_penalty", "rbm_rerank_pmi", "rbm_rerank_consensus")
    saved = {name: getattr(config, name) for name in weights}
    for start in tqdm(range(0, len(rows), batch_size), desc="candidates"):
        features = store.batch(rows[start : start + batch_size])
        encoding = model.encode_image(vision_hidden_states=features)
        sequences = model.generate(
            encoding=encoding, num_beams=n, num_return_sequences=n, rbm_rerank=False, **generate_kwargs
        )
        texts = processor.captions(sequences)
        captions += [texts[i : i + n] for i in range(0, len(texts), n)]
        # The score is linear in the weights: its parts are its values with one weight at a time.
        log_prob, length = model.score_captions(encoding, sequences)
        values = [log_prob.view(-1, n), length.view(-1, n)]
        for pmi, consensus in ((1.0, 0.0), (0.0, 1.0)):
            for name, value in zip(weights, (0.0, pmi, consensus)):
                setattr(config, name, value)
            values.append(model.candidate_scores(encoding, sequences) - values[0])
        parts.append(torch.stack(values))
    for name, value in saved.items():
        setattr(config, name, value)
    return captions, torch.cat(parts, dim=1).numpy()


def tune_rerank(parts: np.ndarray, cider: np.ndarray) -> tuple[dict[str, float], list]:
    """The weights with the best mean sentence CIDEr-D of the chosen candidate, and what the grid gave."""
    log_prob, length, pmi, consensus = parts
    tried = []
    for penalty, l_pmi, l_consensus in itertools.product(*RERANK_GRID.values()):
        score = log_prob / np.maximum(length, 1) ** penalty + l_pmi * pmi + l_consensus * consensus
        chosen = np.take_along_axis(cider, score.argmax(1)[:, None], 1).mean()
        tried.append((100 * chosen, dict(zip(RERANK_GRID, (penalty, l_pmi, l_consensus)))))
    tried.sort(key=lambda entry: -entry[0])
    return tried[0][1], tried


class HeldBack:
    """The held-back images, and how good a model's captions of them are."""

    def __init__(self, processor, store, rows, references, **generate_kwargs):
        self.processor, self.store, self.rows, self.generate_kwargs = processor, store, rows, generate_kwargs
        self.scorer, self.references = CiderD(references), references

    def measure(self, model, **settings) -> dict[str, float]:
        captions = caption_rows(model, self.processor, self.store, self.rows, **self.generate_kwargs, **settings)
        entry = {"cider": 100 * self.scorer.scores(captions).mean(), "bleu_4": 100 * bleu(captions, self.references)[3]}
        entry |= corpus_diversity(captions)
        print(json.dumps(settings | entry))
        return settings | entry


def most_varied(entries: list[dict], tolerance: float) -> dict:
    """Of the entries within `tolerance` of the best CIDEr-D, the one with the largest vocabulary."""
    best = max(entry["cider"] for entry in entries)
    return max(
        (entry for entry in entries if entry["cider"] >= best - tolerance), key=lambda entry: entry["vocabulary"]
    )


@torch.no_grad()
def tune_plain(model, held_back: HeldBack, log_frequency: torch.Tensor, args: TuningArguments) -> list[dict]:
    """Set the output bias and the length penalty of plain BLIP; what was tried."""
    bias = model.text_decoder.cls.predictions.bias
    trained, tried = bias.clone(), []
    for prior in args.prior:
        bias.copy_(trained - prior * log_frequency)
        tried.append({"prior": prior, **held_back.measure(model, rbm=False, length_penalty=args.length_penalty[0])})
    chosen = most_varied(tried, args.tolerance)
    bias.copy_(trained - chosen["prior"] * log_frequency)
    for penalty in args.length_penalty[1:]:
        tried.append({"prior": chosen["prior"], **held_back.measure(model, rbm=False, length_penalty=penalty)})
    penalties = [entry for entry in tried if entry["prior"] == chosen["prior"]]
    model.generation_config.length_penalty = most_varied(penalties, args.tolerance)["length_penalty"]
    return tried


def main():
    data, args = parse_arguments(DataArguments, TuningArguments)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    config = model.config
    dataset = load_pairs(data.dataset, data.train_split, data.max_images)
    store = cache_features(model.vision_model, processor.image_processor, dataset, data.cache_dir, data.views)
    train_rows, rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"][:]
    tokens = [token for i in train_rows for ids in caption_tokens(processor, captions[i]) for token in ids[1:]]
    log_frequency = unigram_bias(tokens, config.text_config.vocab_size, least=5.0)
    model.generation_config.max_length = None  # max_new_tokens takes its place
    model.generation_config.num_beams, model.generation_config.max_new_tokens = args.num_beams, args.max_new_tokens
    held_back = HeldBack(processor, store, rows, [captions[row] for row in rows])
    config.rbm_guidance_order, config.rbm_rerank_candidates = args.order, args.candidates

    plain = tune_plain(model, held_back, log_frequency, args)
    guide = [held_back.measure(model, rbm_guidance=beta, rbm_rerank=False) for beta in args.guidance]
    config.rbm_guidance = most_varied(guide, args.guide_tolerance)["rbm_guidance"]
    outputs, parts = candidate_parts(model, processor, store, rows, args.candidates)
    cider = np.array([[held_back.scorer.score(i, text) for text in of_image] for i, of_image in enumerate(outputs)])
    chosen, tried = tune_rerank(parts, cider)
    rerank = {
        "first_candidate": 100 * cider[:, 0].mean(),
        "random_candidate": 100 * cider.mean(),
        "oracle": 100 * cider.max(1).mean(),
        "best": tried[:10],
        "without_pmi": max(score for score, weights in tried if weights["rbm_rerank_pmi"] == 0),
        "without_consensus": max(score for score, weights in tried if weights["rbm_rerank_consensus"] == 0),
    }
    print(json.dumps(rerank, indent=1))
    for name, value in {"rbm_rerank": True, **chosen}.items():
        setattr(config, name, value)
    save_captioner(model, processor, args.output_dir, half=args.half)
    report = {"images": len(rows), "plain": plain, "guide": guide, "rerank": rerank, "chosen": chosen}
    write_json(Path(args.output_dir) / "tuning.json", report)


if __name__ == "__main__":
    main()
