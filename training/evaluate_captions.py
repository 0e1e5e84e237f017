"""Caption a split with plain BLIP and with BLIP-RBM, measure both, and write one results file.

    python -m training.evaluate_captions --model checkpoints/blip-rbm-small --dataset flickr8k \
        --output checkpoints/blip-rbm-small/results.json --pictures runs/report

README and the model card take their numbers from that file (`python -m training.report`). With `--pictures`: a random grid, the
best and the worst ten, the histogram of differences, where the decoder looks. With `--ablation`: each strategy alone, and
what the same number of beams gives without the RBM.
"""

import platform
import time
from dataclasses import dataclass, field
from typing import Optional, Sequence

import accelerate
import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.decoding_blip_rbm import SIMILARITIES, rerank_scores
from training.lib import pictures
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.checkpoints import write_json
from training.lib.features import cache_features
from training.lib.metrics import (
    CiderD,
    bleu_of_statistics,
    bleu_statistics,
    corpus_diversity,
    meteor,
    paired_bootstrap,
    rouge_l,
    tokenize,
)
from training.lib.pairs import load_pairs


@dataclass
class EvaluationArguments(MeasureArguments):
    train_split: Optional[str] = field(default="train", metadata={"help": "for novelty: captions seen in training"})
    num_beams: int = field(default=3, metadata={"help": "beams of both systems (re-rank may raise its own)"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest caption"})
    batch_size: int = field(default=16, metadata={"help": "images at a time"})
    plain: bool = field(default=False, metadata={"help": "measure plain BLIP alone, of a captioner without an RBM"})
    ablation: bool = field(default=False, metadata={"help": "measure each strategy alone, and baselines of equal cost"})
    int8: bool = field(default=False, metadata={"help": "linear layers in 8 bits (`pack_linears`), on a CPU"})
    pictures: Optional[str] = field(
        default=None, metadata={"help": "folder for pictures; they show the dataset's images"}
    )


@torch.no_grad()
def caption_rows(
    model, processor, store, rows: Sequence[int], batch_size: int = 16, side_by_side: int = 1, **generate_kwargs
) -> list[str]:
    """Captions of the images with these row numbers in a `FeatureStore`, in order; `generate_kwargs` as for `generate`.

    Args:
        side_by_side: so many captions of every image are begun as rows of one batch.
    """
    captions = []
    for start in tqdm(range(0, len(rows), batch_size), desc="caption", leave=False):
        features = store.batch(rows[start : start + batch_size])
        if side_by_side > 1:
            prompt = torch.full((len(features) * side_by_side, 1), model.decoder_input_ids)
            generate_kwargs["input_ids"] = prompt
        captions += processor.captions(model.generate(vision_hidden_states=features, **generate_kwargs))
    return captions


@torch.no_grad()
def candidate_parts(model, processor, store, rows, n: int, batch_size: int = 8, **generate_kwargs):
    """Of each image's n candidates: captions, and the parts of their scores as arrays (images, n).

    Candidates are beams, or samples with `do_sample=True`.
    """
    captions, parts = [], []
    if not generate_kwargs.get("do_sample"):
        generate_kwargs["num_beams"] = n
    for start in tqdm(range(0, len(rows), batch_size), desc="candidates"):
        encoding = model.encode_image(vision_hidden_states=store.batch(rows[start : start + batch_size]))
        sequences = model.generate(encoding=encoding, num_return_sequences=n, rbm_rerank=False, **generate_kwargs)
        texts = processor.captions(sequences)
        captions += [texts[i : i + n] for i in range(0, len(texts), n)]
        parts.append(model.candidate_parts(encoding, sequences, SIMILARITIES))
    return captions, {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def per_image(captions: list[str], references: list[list[str]]) -> dict[str, np.ndarray]:
    """Per image: cider (n,), rouge_l (n,), and BLEU's statistics (n, 10), which add up."""
    tokens = [(tokenize(c), [tokenize(r) for r in rs]) for c, rs in zip(captions, references)]
    return {
        "cider": CiderD(references).scores(captions),
        "rouge_l": np.array([rouge_l(c, rs) for c, rs in zip(captions, references)]),
        "bleu": np.array([bleu_statistics(c, rs) for c, rs in tokens]),
    }


def summary(captions, scores, training_captions) -> dict[str, float]:
    """The numbers of one system: metrics times 100, diversity as it is."""
    bleu = 100 * bleu_of_statistics(scores["bleu"].sum(0))
    return {
        "CIDEr-D": 100 * scores["cider"].mean(),
        **{f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)},
        "ROUGE-L": 100 * scores["rouge_l"].mean(),
        **corpus_diversity(captions, training_captions),
    }


def differences(ours, baseline) -> dict[str, dict[str, float]]:
    """BLIP-RBM minus BLIP with 95 % intervals, points of each metric."""
    scaled = {
        "CIDEr-D": paired_bootstrap(ours["cider"], baseline["cider"]),
        "BLEU-4": paired_bootstrap(ours["bleu"], baseline["bleu"], lambda mean: bleu_of_statistics(mean)[..., 3]),
        "ROUGE-L": paired_bootstrap(ours["rouge_l"], baseline["rouge_l"]),
    }
    return {
        metric: {name: value if name == "p" else 100 * value for name, value in result.items()}
        for metric, result in scaled.items()
    }


def chosen_by_rerank(parts: dict[str, np.ndarray], settings: dict) -> np.ndarray:
    """(images,) which candidate re-rank takes with these weights, of `candidate_parts`."""
    return rerank_scores({name: torch.from_numpy(part) for name, part in parts.items()}, settings).argmax(1).numpy()


@torch.no_grad()
def ablation(model, processor, store, scorer, **settings) -> dict[str, list[str]]:
    """Captions by each strategy alone, and by what costs as many beams without an RBM. `oracle` looks at the references."""
    config = model.config
    rows, n = range(len(store)), config.rbm_rerank_candidates
    settings = {name: settings[name] for name in ("max_new_tokens", "num_beams")}
    captions = {}
    if model.rbm_layer.gate != 0:
        captions["refine alone"] = caption_rows(
            model, processor, store, rows, rbm_guidance=0.0, rbm_rerank=False, **settings
        )
    captions["guide alone"] = caption_rows(model, processor, store, rows, rbm_rerank=False, **settings)
    for guided in (False, True):
        beta = config.rbm_guidance if guided else 0.0
        outputs, parts = candidate_parts(
            model, processor, store, rows, n, rbm_guidance=beta, max_new_tokens=settings["max_new_tokens"]
        )
        cider = np.array([[scorer.score(i, text) for text in of_image] for i, of_image in enumerate(outputs)])
        choices = {
            "first": np.zeros(len(rows), int),
            "random": np.random.default_rng(0).integers(n, size=len(rows)),
            "consensus alone": parts[config.rbm_rerank_similarity].argmax(1),
            **({"expected CIDEr-D alone": parts["cider"].argmax(1)} if "cider" in parts else {}),
            "re-rank": chosen_by_rerank(parts, vars(config)),
            "oracle": cider.argmax(1),
        }
        if config.rbm_rerank_rarity:
            choices["re-rank without rarity"] = chosen_by_rerank(parts, vars(config) | {"rbm_rerank_rarity": 0.0})
        for name, chosen in choices.items():
            of = f"{n} {'guided ' * guided}beams: {name}"
            captions[of] = [of_image[i] for of_image, i in zip(outputs, chosen)]
    return captions


def seconds_of_vision(model, processor, dataset, batch_size: int, images: int = 128) -> float:
    """Seconds that the vision tower takes for the whole dataset, measured on some of its images."""
    images = min(images, len(dataset))
    pixel_values = processor(images=dataset[:images]["image"])["pixel_values"]
    model.encode_image(pixel_values[:batch_size])
    start = time.time()
    for batch in pixel_values.split(batch_size):
        model.encode_image(batch)
    return (time.time() - start) * len(dataset) / images


@torch.no_grad()
def main():
    (args,) = parse_arguments(EvaluationArguments)
    if args.plain and (args.ablation or args.pictures):
        raise ValueError("--plain measures BLIP alone: there is no difference for --ablation or --pictures to show")
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    model.pack_linears = "int8" if args.int8 else True
    dataset = load_pairs(args.dataset, args.split, args.max_images, **args.columns)
    references, image_ids = dataset["captions"][:], dataset["image_id"][:]
    seen = load_pairs(args.dataset, args.train_split, **args.columns)["captions"] if args.train_split else []
    training_captions = [caption for of_image in seen for caption in of_image] or None
    store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir)

    settings = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}
    vision = seconds_of_vision(model, processor, dataset, args.batch_size)
    systems, scores, captions = {}, {}, {}
    for name in ("BLIP",) if args.plain else ("BLIP", "BLIP-RBM"):
        start = time.time()
        captions[name] = caption_rows(model, processor, store, range(len(dataset)), rbm=name != "BLIP", **settings)
        seconds = time.time() - start
        scores[name] = per_image(captions[name], references)
        systems[name] = summary(captions[name], scores[name], training_captions) | {
            "seconds": vision + seconds,
            "seconds_of_vision": vision,
        }
        if (by_java := meteor(captions[name], references)) is not None:
            systems[name]["METEOR"] = 100 * by_java[0]
        print(name, {key: round(float(value), 3) for key, value in systems[name].items()})
    difference, alone = {}, {}
    if not args.plain:
        difference = differences(scores["BLIP-RBM"], scores["BLIP"])
        print("difference", difference)
    if args.ablation:
        for name, said in ablation(model, processor, store, CiderD(references), **settings).items():
            alone[name] = summary(said, per_image(said, references), training_captions)
            print(name, {key: round(float(value), 3) for key, value in alone[name].items()})
    if args.pictures:
        images = dataset["image"]
        pictures.draw(args.pictures, model, processor, store, images, captions, scores, difference["CIDEr-D"])
        print(f"pictures in {args.pictures}")
    config, phrases = model.config, model.rbm_layer.phrases
    fitted = [*model.parameters(), *([phrases.weight, phrases.bias] if phrases is not None else [])]
    write_json(
        args.output,
        {
            "images": len(dataset),
            "references_per_image": len(references[0]),
            "dataset": args.dataset.rstrip("/").split("/")[-1],
            "split": args.split,
            "settings": settings
            | {"int8": args.int8}
            | {name: getattr(model.generation_config, name) for name in ("length_penalty", "repetition_penalty")},
            "rbm": {
                name: getattr(config, name)
                for name in vars(config)
                if name.startswith("rbm_") and name not in ("rbm_word_ids", "rbm_confidence", "rbm_match")
            },
            "rbm_words": len(config.rbm_word_ids),
            "parameters": sum(p.numel() for p in fitted),
            "systems": systems,
            "difference": difference,
            "ablation": alone,
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
            | {"python": platform.python_version(), "threads": torch.get_num_threads()},
            "captions": [
                {"image_id": i, **{name: captions[name][row] for name in captions}} for row, i in enumerate(image_ids)
            ],
        },
    )


if __name__ == "__main__":
    main()
