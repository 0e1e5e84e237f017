"""Stage 3: choose how the finished model decodes, on training images that were held back.

    python -m training.tune_decoding --model runs/rbm/best --dataset flickr8k --output_dir runs/tuned

Every number here is of held-back *training* images; no validation image is looked at. In this order:

1. plain BLIP: how much of the words' log frequency is taken off the output bias (logit adjustment, Menon et al., ICLR 2021,
   arXiv 2007.07314), the repetition penalty and beam search's length penalty. Of the settings whose CIDEr-D is within
   `tolerance` of the best, and BLEU-4 within `bleu_tolerance`, the one with the largest vocabulary: variety where it costs
   little. They become part of plain BLIP, the baseline.
2. guide: its weight, in the same way with `guide_tolerance`.
3. re-rank: its weights on the candidates that guide gives, by a grid over the parts of each candidate's score.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.decoding_blip_rbm import SIMILARITIES, rerank_scores
from training.arguments import DataArguments, parse_arguments
from training.checkpoints import refuse_other_output, save_captioner, write_json
from training.data import split_held_back
from training.evaluate_captions import candidate_parts, caption_rows
from training.features import cache_features
from training.metrics import CiderD, bleu, corpus_diversity
from training.pairs import load_pairs
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
    repetition_penalty: list[float] = field(
        default_factory=lambda: [1.0, 1.1, 1.2], metadata={"help": "repetition penalties tried"}
    )
    length_penalty: list[float] = field(
        default_factory=lambda: [1.0, 1.4], metadata={"help": "beam search's length penalties tried"}
    )
    tolerance: float = field(default=1.0, metadata={"help": "CIDEr-D points that plain BLIP may give for vocabulary"})
    bleu_tolerance: float = field(
        default=0.6, metadata={"help": "BLEU-4 points that plain BLIP may give for vocabulary"}
    )
    guide_tolerance: float = field(default=0.5, metadata={"help": "the same for guide, before re-rank"})
    guidance: list[float] = field(default_factory=lambda: [0.0, 0.03, 0.06, 0.1], metadata={"help": "weights tried"})
    order: str = field(default="second", metadata={"help": "how word gains are computed: exact, second, first"})
    half: bool = field(default=False, metadata={"help": "store fp16 weights"})


RERANK_GRID = {
    "rbm_rerank_length_penalty": (0.0, 0.5, 1.0),
    "rbm_rerank_pmi": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    "rbm_rerank_consensus": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "rbm_rerank_similarity": SIMILARITIES,
}


def tune_rerank(parts: dict[str, np.ndarray], cider: np.ndarray) -> tuple[dict, list]:
    """The weights with the best mean sentence CIDEr-D of the chosen candidate, and what the grid gave."""
    tried = []
    for values in itertools.product(*RERANK_GRID.values()):
        weights = dict(zip(RERANK_GRID, values))
        if weights["rbm_rerank_consensus"] == 0 and weights["rbm_rerank_similarity"] != SIMILARITIES[0]:
            continue  # the same as with the first
        score = rerank_scores(
            *(
                torch.from_numpy(parts[name])
                for name in ("log_prob", "length", "pmi", weights["rbm_rerank_similarity"])
            ),
            weights["rbm_rerank_length_penalty"],
            weights["rbm_rerank_pmi"],
            weights["rbm_rerank_consensus"],
        ).numpy()
        chosen = np.take_along_axis(cider, score.argmax(1)[:, None], 1).mean()
        tried.append((100 * chosen, weights))
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


def most_varied(entries: list[dict], tolerance: float, bleu_tolerance: float = float("inf")) -> dict:
    """Of the entries within `tolerance` of the best CIDEr-D and `bleu_tolerance` of the best BLEU-4, the one with the largest
    vocabulary; the one with the best CIDEr-D if none is."""
    best = {name: max(entry[name] for entry in entries) for name in ("cider", "bleu_4")}
    good = [
        entry
        for entry in entries
        if entry["cider"] >= best["cider"] - tolerance and entry["bleu_4"] >= best["bleu_4"] - bleu_tolerance
    ]
    if not good:
        return max(entries, key=lambda entry: entry["cider"])
    return max(good, key=lambda entry: entry["vocabulary"])


@torch.no_grad()
def tune_plain(model, held_back: HeldBack, log_frequency: torch.Tensor, args: TuningArguments) -> list[dict]:
    """Set the output bias, the repetition and the length penalty of plain BLIP; what was tried."""
    bias = model.text_decoder.cls.predictions.bias
    trained, tried = bias.clone(), []

    def measure(prior, **settings):
        bias.copy_(trained - prior * log_frequency)
        tried.append({"prior": prior, **held_back.measure(model, rbm=False, **settings)})

    for prior, penalty in itertools.product(args.prior, args.repetition_penalty):
        measure(prior, repetition_penalty=penalty, length_penalty=args.length_penalty[0])
    chosen = most_varied(tried, args.tolerance, args.bleu_tolerance)
    for penalty in args.length_penalty[1:]:
        measure(chosen["prior"], repetition_penalty=chosen["repetition_penalty"], length_penalty=penalty)
    chosen = most_varied(tried, args.tolerance, args.bleu_tolerance)
    bias.copy_(trained - chosen["prior"] * log_frequency)
    for name in ("repetition_penalty", "length_penalty"):
        setattr(model.generation_config, name, chosen[name])
    return tried


def main():
    data, args = parse_arguments(DataArguments, TuningArguments)
    refuse_other_output(args.output_dir, "tuning.json")
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    config = model.config
    dataset = load_pairs(data.dataset, data.train_split, data.max_images, **data.columns)
    train_rows, rows = split_held_back(dataset, data.held_back)
    held_images = dataset.select(rows)
    store = cache_features(model.vision_model, processor.image_processor, held_images, data.cache_dir)
    captions = dataset["captions"][:]
    tokens = [token for i in train_rows for ids in caption_tokens(processor, captions[i]) for token in ids[1:]]
    log_frequency = unigram_bias(tokens, config.text_config.vocab_size, least=5.0)
    model.generation_config.max_length = None  # max_new_tokens takes its place
    model.generation_config.num_beams, model.generation_config.max_new_tokens = args.num_beams, args.max_new_tokens
    held_back = HeldBack(processor, store, range(len(rows)), [captions[row] for row in rows])
    config.rbm_guidance_order, config.rbm_rerank_candidates = args.order, args.candidates

    plain = tune_plain(model, held_back, log_frequency, args)
    guide = [held_back.measure(model, rbm_guidance=beta, rbm_rerank=False) for beta in args.guidance]
    config.rbm_guidance = most_varied(guide, args.guide_tolerance)["rbm_guidance"]
    outputs, parts = candidate_parts(model, processor, store, range(len(rows)), args.candidates)
    cider = np.array([[held_back.scorer.score(i, text) for text in of_image] for i, of_image in enumerate(outputs)])
    chosen, tried = tune_rerank(parts, cider)
    rerank = {
        "first_candidate": 100 * cider[:, 0].mean(),
        "random_candidate": 100 * cider.mean(),
        "oracle": 100 * cider.max(1).mean(),
        "best": tried[:10],
        "without_pmi": max(score for score, weights in tried if weights["rbm_rerank_pmi"] == 0),
        "by_similarity": {
            kind: max(score for score, weights in tried if weights["rbm_rerank_similarity"] == kind)
            for kind in SIMILARITIES
        },
        "without_consensus": max(score for score, weights in tried if weights["rbm_rerank_consensus"] == 0),
    }
    print(json.dumps(rerank, indent=1))
    for name, value in {"rbm_rerank": True, **chosen}.items():
        setattr(config, name, value)
    save_captioner(model, processor, args.output_dir, half=args.half)
    chosen_plain = most_varied(plain, args.tolerance, args.bleu_tolerance)
    report = {
        "images": len(rows),
        "plain": plain,
        "chosen_plain": chosen_plain,
        "guide": guide,
        "rerank": rerank,
        "chosen": chosen,
    }
    write_json(Path(args.output_dir) / "tuning.json", report)


if __name__ == "__main__":
    main()
