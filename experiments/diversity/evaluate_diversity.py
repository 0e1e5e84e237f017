"""Several captions of one image: quality against diversity, by sampled hidden causes and by the usual ways.

    python -m experiments.diversity.evaluate_diversity --model checkpoints/blip-rbm-small --dataset flickr8k \
        --output runs/diversity.json

Diverse beam search (Vijayakumar et al., AAAI 2018) stands here with groups of one beam each: transformers 5 has left it
to the Hub.

For every way and every one of its settings: CIDEr-D of an image's captions (mean, and best of them), Div-2 and mBLEU-4
among them. A curve that lies above another is better at the same diversity; the picture beside `--output` shows them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import LogitsProcessor, set_seed

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.captions import caption_rows
from training.lib.checkpoints import write_json
from training.lib.features import cache_features
from training.lib.metrics import CiderD, set_diversity
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class DiversityArguments(MeasureArguments):
    captions: int = field(default=5, metadata={"help": "of an image"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest caption"})
    causes: list[float] = field(
        default_factory=lambda: [0.4, 0.8, 1.6, 3.2], metadata={"help": "weights of the causes"}
    )
    temperatures: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.8, 1.0], metadata={"help": "of sampling"})
    top_p: float = field(default=0.9, metadata={"help": "of nucleus sampling"})
    penalties: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 2.0, 4.0], metadata={"help": "of diverse beam search, nats"}
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})


class HammingDiversity(LogitsProcessor):
    """Diverse beam search with groups of one beam: of an image's n captions, written side by side, each loses `penalty`
    nats on a token for every one before it that says the same token at the same place.

    Args:
        n: captions of an image; the rows of the scores must be a multiple of it, an image's rows adjacent.
    """

    def __init__(self, n: int, penalty: float):
        self.n, self.penalty = n, penalty

    def __call__(self, input_ids, scores):
        scores = scores.log_softmax(-1).view(-1, self.n, scores.shape[-1])
        said = torch.zeros_like(scores[:, 0])
        for group in range(self.n):
            scores[:, group] -= self.penalty * said
            chosen = scores[:, group].argmax(-1, keepdim=True)
            said.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=said.dtype))
        return scores.flatten(0, 1)


def ways(args: DiversityArguments) -> dict[str, dict[str, dict]]:
    """Name of each way -> label of each setting -> arguments of `generate`."""
    sampling = {"rbm": False, "do_sample": True, "num_beams": 1, "top_k": 0}
    return {
        "hidden causes, 3 beams": {
            f"{weight:g}": {"rbm_diversity": weight, "rbm_guidance": 0.0, "num_beams": 3} for weight in args.causes
        },
        "sampling": {f"T {t:g}": sampling | {"temperature": t} for t in args.temperatures},
        f"nucleus {args.top_p:g}": {
            f"T {t:g}": sampling | {"temperature": t, "top_p": args.top_p} for t in args.temperatures
        },
        "diverse beams": {
            f"{penalty:g}": {
                "rbm": False,
                "do_sample": False,
                "num_beams": 1,
                "num_return_sequences": 1,
                "side_by_side": args.captions,
                "logits_processor": [HammingDiversity(args.captions, penalty)],
            }
            for penalty in args.penalties
        },
        "beams": {"": {"rbm": False, "num_beams": args.captions}},
    }


def plot(points: dict, path: Path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharex=True)
    for axis, key in zip(axes, ("cider_mean", "cider_best")):
        for name, settings in points.items():
            x, y = ([entry[k] for entry in settings.values()] for k in ("div_2", key))
            axis.plot(x, y, marker="o", label=name)
            for label, a, b in zip(settings, x, y):
                axis.annotate(label, (a, b), fontsize=7, textcoords="offset points", xytext=(4, 4))
        axis.set(
            xlabel="Div-2 of an image's captions",
            ylabel=f"CIDEr-D, {key.removeprefix('cider_')} of an image's captions",
        )
        axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


@torch.no_grad()
def main():
    (args,) = parse_arguments(DiversityArguments)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    dataset = load_pairs(args.dataset, args.split, args.max_images, **args.columns)
    store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir)
    scorer, n = CiderD(dataset["captions"][:]), args.captions
    points, examples = {}, {}
    for name, settings in tqdm(ways(args).items(), desc="ways"):
        points[name] = {}
        for label, kwargs in settings.items():
            set_seed(args.seed)
            flat = caption_rows(
                model, processor, store, range(len(dataset)), max_new_tokens=args.max_new_tokens,
                **{"num_return_sequences": n, "rbm_rerank": False, **kwargs},
            )  # fmt: skip
            captions = [flat[i : i + n] for i in range(0, len(flat), n)]
            cider = 100 * np.array([[scorer.score(i, c) for c in of_image] for i, of_image in enumerate(captions)])
            entry = {"cider_mean": cider.mean(), "cider_best": cider.max(1).mean(), **set_diversity(captions)}
            points[name][label] = entry
            examples[f"{name} {label}".strip()] = captions[:10]
            print(name, label, json.dumps({k: round(float(v), 3) for k, v in entry.items()}), flush=True)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(points, output.with_suffix(".png"))
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    write_json(output, {"images": len(dataset), "settings": settings, "ways": points, "examples": examples})


if __name__ == "__main__":
    run_stage(main)
