"""Stage 3: choose how the finished model decodes, on training images that were held back.

    python -m training.tune_decoding --model runs/rbm/best --dataset flickr8k --output_dir runs/tuned

Every number here is of held-back *training* images; no validation image is looked at. In this order:

1. plain BLIP: how much of the words' log frequency is taken off the output bias (logit adjustment, Menon et al., ICLR 2021,
   arXiv 2007.07314), the repetition penalty and beam search's length penalty. Of the settings whose CIDEr-D is within
   `tolerance` of the best, and BLEU-4 within `bleu_tolerance`, the one with the largest vocabulary: variety where it
   costs little. They become part of plain BLIP, the baseline.
2. guide and re-rank together: for every weight of guide the candidates that it gives, and the weights of the parts of each
   candidate's score, at most `most_weights` in all, by cross-validation (`training/lib/decoding_rule.py`). With
   `rerank_vocabulary` the chosen weights get more and more weight on rare words until the vocabulary is so many times plain
   BLIP's.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import candidate_parts, caption_rows, caption_tokens, unigram_bias
from training.lib.checkpoints import refuse_other_output, save_captioner, write_json
from training.lib.data import fold_of, split_held_back
from training.lib.decoding_rule import Choices, simplest_rule
from training.lib.distributed import own_processes
from training.lib.features import cache_features
from training.lib.metrics import CiderD, bleu, corpus_diversity
from training.lib.mixture import read_images
from training.lib.stage import run_stage


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
    most_weights: int = field(default=3, metadata={"help": "weights of guide and re-rank that may be on together"})
    folds: int = field(
        default=10, metadata={"help": "parts of the held-back images, by which the weights are cross-validated"}
    )
    rerank_vocabulary: float = field(
        default=0.0,
        metadata={
            "help": "guide and re-rank are to use so many times as many different words as plain BLIP, by weight on rare ones; 0: no such weight"
        },
    )
    guidance: list[float] = field(default_factory=lambda: [0.1, 0.3], metadata={"help": "weights of guide tried"})
    guidance_rarity: list[float] = field(
        default_factory=lambda: [0.0],
        metadata={"help": "shares by which its weight grows with rarity tried, with each weight"},
    )
    order: str = field(default="second", metadata={"help": "how word gains are computed: exact, second, first"})
    half: bool = field(default=False, metadata={"help": "store fp16 weights"})


GUIDE = ("rbm_guidance", "rbm_guidance_rarity")


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


def most_varied(entries: list[dict], tolerance: float, bleu_tolerance: float | None = None) -> dict:
    """Of the entries within `tolerance` of the best CIDEr-D and `bleu_tolerance` of the best BLEU-4, the one with the
    largest vocabulary; the one with the best CIDEr-D if none is."""
    tolerances = {"cider": tolerance} if bleu_tolerance is None else {"cider": tolerance, "bleu_4": bleu_tolerance}
    least = {name: max(entry[name] for entry in entries) - within for name, within in tolerances.items()}
    good = [entry for entry in entries if all(entry[name] >= value for name, value in least.items())]
    if not good:
        return max(entries, key=lambda entry: entry["cider"])
    return max(good, key=lambda entry: entry["vocabulary"])


def best_of_varied(series: list[list[dict]], vocabulary: float) -> dict:
    """Of each series of outcomes the first with so large a vocabulary; of these the one with the best CIDEr-D. If there
    is none, the one with the largest vocabulary."""
    enough = ([o for o in outcomes if o["vocabulary"] >= vocabulary] for outcomes in series)
    reached = [outcomes[0] for outcomes in enough if outcomes]
    if reached:
        return max(reached, key=lambda outcome: outcome["cider"])
    best = max(itertools.chain(*series), key=lambda outcome: outcome["vocabulary"])
    print(
        f"a vocabulary of {vocabulary:.0f} words was asked for, but none of these weights reaches it: {best['vocabulary']} at most"
    )
    return best


@torch.no_grad()
def tune_plain(model, held_back: HeldBack, log_frequency: torch.Tensor, args: TuningArguments) -> list[dict]:
    """Set the output bias, the repetition and the length penalty of plain BLIP; what was tried."""
    bias = model.text_decoder.cls.predictions.bias
    log_frequency = log_frequency.to(bias.device)
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


def tune_guide_and_rerank(
    model, held_back: HeldBack, fold: np.ndarray, plain_vocabulary: int, args: TuningArguments
) -> dict:
    """What was tried, and under `chosen` what is best; `fold` (images,) as of `simplest_rule`."""
    guides, candidates = [], {}
    for guidance in itertools.product(sorted(args.guidance), sorted(args.guidance_rarity)):
        if not guidance[0] and guidance[1] != min(args.guidance_rarity):
            continue  # the same: nothing grows
        guide = dict(zip(GUIDE, guidance))
        for name, value in guide.items():
            setattr(model.generation_config, name, value)
        outputs, parts = candidate_parts(model, held_back.processor, held_back.store, held_back.rows, args.candidates)
        cider = np.array([[held_back.scorer.score(i, text) for text in of] for i, of in enumerate(outputs)])
        guides.append((guide, Choices(outputs, parts, cider)))
        candidates[", ".join(str(weight) for weight in guidance if weight)] = {
            "first_candidate": 100 * cider[:, 0].mean(),
            "random_candidate": 100 * cider.mean(),
            "oracle": 100 * cider.max(1).mean(),
        }
    setting, rules = simplest_rule(guides, fold, args.most_weights)
    guide, choices = next(one for one in guides if one[0].items() <= setting.items())
    chosen = guide | choices.outcome({name: value for name, value in setting.items() if name not in guide})
    rerank = {"candidates": candidates, "rules": rules}
    if args.rerank_vocabulary:
        rerank["rarity"] = [[guide | outcome for outcome in choices.with_rarity(chosen)] for guide, choices in guides]
        chosen = best_of_varied(rerank["rarity"], args.rerank_vocabulary * plain_vocabulary)
    rerank["chosen"] = chosen
    return rerank


def main():
    data, args = parse_arguments(DataArguments, TuningArguments)
    refuse_other_output(args.output_dir)
    processes, processor = own_processes(), BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(processes.device)
    config = model.config
    if (args.rerank_vocabulary or any(args.guidance_rarity)) and not config.rbm_num_phrases:
        raise ValueError(
            f"--rerank_vocabulary and --guidance_rarity need phrases, which {args.model} has not: run training.fit_phrases first"
        )
    dataset = read_images(data)
    train_rows, rows = split_held_back(dataset, data.held_back)
    held_images = dataset.select(rows)
    with processes.main_process_first():  # the others find what it has encoded
        store = cache_features(model.vision_model, processor.image_processor, held_images, data.cache_dir)
    captions = dataset["captions"][:]
    tokens = [token for i in train_rows for ids in caption_tokens(processor, captions[i]) for token in ids[1:]]
    log_frequency = unigram_bias(tokens, config.text_config.vocab_size, least=5.0)
    model.generation_config.max_length = None  # max_new_tokens takes its place
    model.generation_config.num_beams, model.generation_config.max_new_tokens = args.num_beams, args.max_new_tokens
    held_back = HeldBack(processor, store, range(len(rows)), [captions[row] for row in rows])
    decoding = model.generation_config
    decoding.rbm_guidance_order, decoding.rbm_rerank_candidates = args.order, args.candidates

    plain = tune_plain(model, held_back, log_frequency, args)
    chosen_plain = most_varied(plain, args.tolerance, args.bleu_tolerance)
    fold = fold_of(held_images["image_id"], args.folds)
    rerank = tune_guide_and_rerank(model, held_back, fold, chosen_plain["vocabulary"], args)
    print(json.dumps(rerank, indent=1))
    settings = {name: value for name, value in rerank["chosen"].items() if name.startswith("rbm_")}
    for name, value in {"rbm_rerank": True, **settings}.items():
        setattr(decoding, name, value)
    guide = held_back.measure(model, rbm_rerank=False)
    if not processes.is_main_process:
        return
    save_captioner(model, processor, args.output_dir, half=args.half)
    report = {
        "images": len(rows),
        "plain": plain,
        "chosen_plain": chosen_plain,
        "guide": guide,
        "rerank": rerank,
    }
    write_json(Path(args.output_dir) / "tuning.json", report)


if __name__ == "__main__":
    run_stage(main)
