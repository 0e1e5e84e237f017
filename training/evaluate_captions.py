"""Caption a split with plain BLIP and with BLIP-RBM, measure both, and write one results file.

    python -m training.evaluate_captions --model checkpoints/blip-rbm-small --dataset flickr8k \
        --output checkpoints/blip-rbm-small/results.json --pictures runs/report

README and the model card take their numbers from that file (`python -m training.report`). With `--pictures`: a random
grid, the best and the worst ten, the histogram of differences, where the decoder looks. With `--ablation`: each
strategy alone, and what the same number of beams gives without the RBM.
"""

import platform
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Optional

import accelerate
import numpy as np
import torch
import transformers

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib import pictures
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.captions import candidate_parts, caption_rows, chosen_by_rerank
from training.lib.checkpoints import write_json
from training.lib.distributed import own_processes
from training.lib.features import cache_features
from training.lib.metrics import (
    CiderD,
    bleu_of_statistics,
    bleu_statistics,
    chair_of_statistics,
    corpus_diversity,
    hallucination_statistics,
    meteor,
    paired_bootstrap,
    rouge_l,
    tokenize,
)
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


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


def per_image(captions: list[str], references: list[list[str]]) -> dict[str, np.ndarray]:
    """Per image: cider (n,), rouge_l (n,), and the statistics of BLEU (n, 10) and of objects (n, 3), which add up."""
    tokens = [(tokenize(c), [tokenize(r) for r in rs]) for c, rs in zip(captions, references)]
    return {
        "cider": CiderD(references).scores(captions),
        "rouge_l": np.array([rouge_l(c, rs) for c, rs in zip(captions, references)]),
        "bleu": np.array([bleu_statistics(c, rs) for c, rs in tokens]),
        "objects": hallucination_statistics(captions, references),
    }


def summary(captions, scores, training_captions) -> dict[str, float]:
    """The numbers of one system: metrics times 100, diversity as it is."""
    bleu = 100 * bleu_of_statistics(scores["bleu"].sum(0))
    chair_i, chair_s = 100 * chair_of_statistics(scores["objects"].mean(0))
    return {
        "CIDEr-D": 100 * scores["cider"].mean(),
        **{f"BLEU-{n}": value for n, value in enumerate(bleu, start=1)},
        "ROUGE-L": 100 * scores["rouge_l"].mean(),
        "CHAIR-i": chair_i,
        "CHAIR-s": chair_s,
        **corpus_diversity(captions, training_captions),
    }


def differences(ours, baseline) -> dict[str, dict[str, float]]:
    """BLIP-RBM minus BLIP with 95 % intervals, points of each metric.

    METEOR, where both have it: of the captions' mean, as corpus METEOR does not add up over images.
    """
    scaled = {
        "CIDEr-D": paired_bootstrap(ours["cider"], baseline["cider"]),
        "BLEU-4": paired_bootstrap(ours["bleu"], baseline["bleu"], lambda mean: bleu_of_statistics(mean)[..., 3]),
        "ROUGE-L": paired_bootstrap(ours["rouge_l"], baseline["rouge_l"]),
    }
    if "meteor" in ours and "meteor" in baseline:
        scaled["METEOR"] = paired_bootstrap(ours["meteor"], baseline["meteor"])
    for column, name in enumerate(("CHAIR-i", "CHAIR-s")):
        share = lambda mean, column=column: chair_of_statistics(mean)[..., column]
        scaled[name] = paired_bootstrap(ours["objects"], baseline["objects"], share)
    return {
        metric: {name: value if name == "p" else 100 * value for name, value in result.items()}
        for metric, result in scaled.items()
    }


@torch.no_grad()
def ablation(model, processor, store, scorer, **settings) -> dict[str, list[str]]:
    """Captions by each strategy alone, and by what costs as many beams without an RBM. `oracle` looks at the
    references."""
    decoding = model.decoding_settings()
    rows, n = range(len(store)), decoding.rbm_rerank_candidates
    settings = {name: settings[name] for name in ("max_new_tokens", "num_beams")}
    captions = {}
    if model.rbm_layer.gate != 0:
        captions["refine alone"] = caption_rows(
            model, processor, store, rows, rbm_guidance=0.0, rbm_rerank=False, **settings
        )
    captions["guide alone"] = caption_rows(model, processor, store, rows, rbm_rerank=False, **settings)
    for guided in (False, True):
        beta = decoding.rbm_guidance if guided else 0.0
        outputs, parts = candidate_parts(
            model, processor, store, rows, n, rbm_guidance=beta, max_new_tokens=settings["max_new_tokens"]
        )
        cider = np.array([[scorer.score(i, text) for text in of_image] for i, of_image in enumerate(outputs)])
        choices = {
            "first": np.zeros(len(rows), int),
            "random": np.random.default_rng(0).integers(n, size=len(rows)),
            "consensus alone": parts[decoding.rbm_rerank_similarity].argmax(1),
            **({"expected CIDEr-D alone": parts["cider"].argmax(1)} if "cider" in parts else {}),
            "re-rank": chosen_by_rerank(parts, decoding),
            "oracle": cider.argmax(1),
        }
        if decoding.rbm_rerank_rarity:
            choices["re-rank without rarity"] = chosen_by_rerank(parts, replace(decoding, rbm_rerank_rarity=0.0))
        for name, chosen in choices.items():
            of = f"{n} {'guided ' * guided}beams: {name}"
            captions[of] = [of_image[i] for of_image, i in zip(outputs, chosen)]
    return captions


def seconds_of_vision(model, processor, dataset, batch_size: int, images: int = 128) -> float:
    """Seconds that the vision tower takes for the whole dataset, measured on some of its images."""
    images = min(images, len(dataset))
    pixel_values = processor(images=dataset[:images]["image"])["pixel_values"].to(model.device)
    model.encode_for_generation(pixel_values[:batch_size])
    start = time.time()
    for batch in pixel_values.split(batch_size):
        encoding = model.encode_for_generation(batch)
    encoding.hidden_input.cpu()  # a GPU is not done when the call is
    return (time.time() - start) * len(dataset) / images


@torch.no_grad()
def measure(model, processor, dataset, store, training_captions, args: EvaluationArguments):
    """Captions, scores and numbers of plain BLIP and, unless `--plain`, of BLIP-RBM, each by the system's name."""
    settings = settings_of_generate(args)
    references = dataset["captions"][:]
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
            systems[name]["METEOR"], scores[name]["meteor"] = 100 * by_java[0], by_java[1]
        show(name, systems[name])
    return captions, scores, systems


def settings_of_generate(args: EvaluationArguments) -> dict:
    return {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}


def show(name: str, numbers: dict[str, float]):
    print(name, {key: round(float(value), 3) for key, value in numbers.items()})


def description(model, dataset, args: EvaluationArguments) -> dict:
    """What was measured and how: data, decoding, model, versions."""
    config, phrases = model.config, model.rbm_layer.phrases
    fitted = [*model.parameters(), *([phrases.weight, phrases.bias] if phrases is not None else [])]
    not_settings = ("rbm_word_ids", "rbm_confidence", "rbm_match")
    of_rbm = {name: v for name, v in vars(config).items() if name.startswith("rbm_") and name not in not_settings}
    return {
        "images": len(dataset),
        "references_per_image": len(dataset[0]["captions"]),
        "dataset": args.dataset.rstrip("/").split("/")[-1],
        "split": args.split,
        "settings": settings_of_generate(args)
        | {"int8": args.int8}
        | {name: getattr(model.generation_config, name) for name in ("length_penalty", "repetition_penalty")},
        "rbm": of_rbm | asdict(model.decoding_settings()),
        "rbm_words": len(config.rbm_word_ids),
        "parameters": sum(p.numel() for p in fitted),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, accelerate)}
        | {"python": platform.python_version(), "threads": torch.get_num_threads()},
    }


def main():
    (args,) = parse_arguments(EvaluationArguments)
    if args.plain and (args.ablation or args.pictures):
        raise ValueError("--plain measures BLIP alone: there is no difference for --ablation or --pictures to show")
    processor = BlipRBMProcessor.from_pretrained(args.model)
    processes = own_processes()
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(processes.device)
    model.optimize_for_inference(int8=args.int8)
    dataset = load_pairs(args.dataset, args.split, args.max_images, **args.columns)
    references, image_ids = dataset["captions"][:], dataset["image_id"][:]
    seen = load_pairs(args.dataset, args.train_split, **args.columns)["captions"] if args.train_split else []
    training_captions = [caption for of_image in seen for caption in of_image] or None
    with processes.main_process_first():  # the others find what it has encoded
        store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir)
    captions, scores, systems = measure(model, processor, dataset, store, training_captions, args)
    difference, alone = {}, {}
    if not args.plain:
        difference = differences(scores["BLIP-RBM"], scores["BLIP"])
        print("difference", difference)
    if args.ablation:
        said_by = ablation(model, processor, store, CiderD(references), **settings_of_generate(args))
        for name, said in said_by.items():
            alone[name] = summary(said, per_image(said, references), training_captions)
            show(name, alone[name])
    if not processes.is_main_process:
        return
    if args.pictures:
        images = dataset["image"]
        pictures.draw(args.pictures, model, processor, store, images, captions, scores, difference["CIDEr-D"])
        print(f"pictures in {args.pictures}")
    results = description(model, dataset, args) | {"systems": systems, "difference": difference, "ablation": alone}
    results["captions"] = [
        {"image_id": image_id, **{name: said[row] for name, said in captions.items()}}
        for row, image_id in enumerate(image_ids)
    ]
    write_json(args.output, results)


if __name__ == "__main__":
    run_stage(main)
