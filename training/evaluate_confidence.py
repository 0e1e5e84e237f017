"""Stage 5: can a caption be trusted, and an image? Calibrates the confidence of captions, and measures it on unseen
images.

    python -m training.evaluate_confidence --model runs/blip-rbm-small --dataset flickr8k --output runs/confidence.json

*Confidence*: the chance that a caption is right, by logistic regression (Platt 1999) on its log P per token and its PMI
by the RBM, fitted on held-back training images, and saved in the model's config (the pipeline returns it). Right means:
at least as near to the references, by CIDEr-D, as half of the human captions are to the other ones of their image. On
`--split`: reliability curve, expected calibration error, CIDEr-D of the captions that are left when the least confident
ones are withheld.

*Unlike images*: photographs of `--split` against images of other kinds, made (noise, textures, pages of text, a medical
scan, drawings) and spoiled (the last photographs of `--split`, which are not among those that they are compared with). The AUC
of the RBM's free energy, of its relative free energy, and of controls that need no RBM: `training/lib/outliers.py`.

Writes `--output`, and a picture beside it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.inference_blip_rbm import fast_tower, image_tokens
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.checkpoints import write_json
from training.lib.data import split_held_back
from training.lib.distributed import once_each, own_processes
from training.lib.features import FeatureStore, cache_features
from training.lib.metrics import CiderD
from training.lib.outliers import TrainingImages, all_scores, aucs, means, model_scores
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage
from training.lib.unlike_images import made_images, spoiled_images


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class ConfidenceArguments(MeasureArguments):
    train_split: str = field(default="train", metadata={"help": "split whose held-back images calibrate"})
    held_back: int = field(default=400, metadata={"help": "how many they are, as in the stages before"})
    kind_images: int = field(default=100, metadata={"help": "images of every other kind"})
    fit_images: int = field(
        default=1500, metadata={"help": "training images of a data set to which the controls compare images, at most"}
    )
    also_trained_on: list[str] = field(
        default_factory=list,
        metadata={"help": "further data sets, to whose training images they compare images as well"},
    )
    other_photographs: list[str] = field(
        default_factory=list, metadata={"help": "further data sets, whose photographs should not stand out"}
    )
    batch_size: int = field(default=16, metadata={"help": "images at a time"})
    save: bool = field(default=True, metadata={"help": "write the calibration into the model's config.json"})
    seed: int = field(default=0, metadata={"help": "of the images of other kinds"})


# ---------------------------------------------------------------------- confidence


def human_cider(references: list[list[str]]) -> np.ndarray:
    """CIDEr-D of the first caption of each image against its others."""
    others = CiderD([of_image[1:] for of_image in references])
    return others.scores([of_image[0] for of_image in references])


@torch.no_grad()
def looked_at(model, processor, tokens_of: Callable, images: Sequence, batch_size: int):
    """Captions of images as the model writes them, and by name, (n, ...): "evidence", log P per token and PMI, and what `model_scores` gives.
    Under `accelerate launch` as `caption_rows`.

    Args:
        tokens_of: gives the tokens (B, N, C) of some of the images.
    """

    def of_images(images: Sequence) -> list[tuple[str, dict[str, np.ndarray]]]:
        found = []
        for start in tqdm(range(0, len(images), batch_size), desc="caption", leave=False):
            tokens = tokens_of(images[start : start + batch_size]).to(model.device)
            encoding = model.encode_image(vision_hidden_states=tokens)
            sequences = model.generate(encoding=encoding)
            seen = {"evidence": model.caption_evidence(encoding, sequences)}
            seen |= model_scores(model, tokens, encoding.hidden_input)
            seen = {name: values.cpu().numpy() for name, values in seen.items()}
            for i, caption in enumerate(processor.captions(sequences)):
                found.append((caption, {name: values[i] for name, values in seen.items()}))
        return found

    captions, seen = zip(*once_each(of_images, images))
    return list(captions), {name: np.stack([of_image[name] for of_image in seen]) for name in seen[0]}


def expected_calibration_error(prob, right, bins: int = 10) -> float:
    """Mean distance of stated chance and share that is right, over equally large groups of like chance."""
    order = np.array_split(np.argsort(prob), min(bins, len(prob)))
    return float(sum(len(g) * abs(prob[g].mean() - right[g].mean()) for g in order) / len(prob))


def measure_confidence(prob, right, cider) -> dict:
    order = np.argsort(-prob)
    kept = {share: 100 * cider[order[: round(share * len(order))]].mean() for share in np.linspace(0.1, 1, 10).round(1)}
    stated, true = calibration_curve(right, prob, n_bins=8, strategy="quantile")
    base = np.full(len(right), right.mean())
    return {
        "share_right": right.mean(),
        "auc": roc_auc_score(right, prob),
        "brier": brier_score_loss(right, prob),
        "brier_without_evidence": brier_score_loss(right, base),
        "expected_calibration_error": expected_calibration_error(prob, right),
        "reliability": {"stated": stated.tolist(), "right": true.tolist()},
        "cider_of_most_confident": kept,
        "cider_all": kept[1.0],
        "cider_abstaining_at_20_percent": kept[0.8],
    }


# ---------------------------------------------------------------------- images of other kinds


def other_photographs(args) -> dict[str, list[Image.Image]]:
    """Photographs of each of `--other_photographs`, as many as of any kind, by what the table calls them.

    Raises:
        ValueError: if a data set has too few, or the name of another.
    """
    photographs, names = {}, {Path(args.dataset).name}
    for path in args.other_photographs:
        if Path(path).name in names:
            raise ValueError(
                f"--other_photographs {path}: the table has a data set of that name already: leave it out, or rename it"
            )
        names.add(Path(path).name)
        dataset = load_pairs(path, args.split)
        if len(dataset) < args.kind_images:
            raise ValueError(f"{path} has {len(dataset)} images: give --kind_images {len(dataset)}, or less")
        photographs[f"photographs of {Path(path).name}"] = spread(dataset, args.kind_images)["image"][:]
    return photographs


def spread(dataset: Dataset, n: int) -> Dataset:
    """n rows, evenly spread; all if there are fewer."""
    return dataset.select(np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int))


def training_images(args, model, processor, train: Dataset) -> TrainingImages:
    """Those of train, and of `--also_trained_on`."""
    stores = []
    for dataset in (train, *(load_pairs(path, args.train_split) for path in args.also_trained_on)):
        some = spread(dataset, args.fit_images)
        stores.append(
            cache_features(model.vision_model, processor.image_processor, some, args.cache_dir, pooling="mean")
        )
    store = FeatureStore.joined(stores)
    return TrainingImages(np.stack([store.view(row, 0) for row in range(len(store))]).astype(np.float32))


def unlike_images(args, model, processor, train, photographs, others, inside: dict[str, np.ndarray]) -> dict:
    """How well each score tells images of other kinds from photographs, see `training/lib/outliers.py`.

    Args:
        train: images to which the controls compare. photographs: to be spoiled. others: of `other_photographs`.
        inside: what was seen (`looked_at`) of photographs that are not among these.
    """
    training, tower = training_images(args, model, processor, train), fast_tower(model.vision_model)
    unlike = made_images(args.kind_images, args.seed) | spoiled_images(photographs, args.seed)
    encode = lambda images: image_tokens(tower, processor(images=images)["pixel_values"].to(model.device))
    scores = {}
    for kind, images in tqdm((unlike | others).items(), desc="images of other kinds"):
        scores[kind] = all_scores(
            looked_at(model, processor, encode, images, args.batch_size)[1], training, model.confidence
        )
    inside = all_scores(inside, training, model.confidence)
    sorted_by = "relative free energy" if model.rbm_layer.rbm.tokens else "free energy"  # `image_energy`
    ours = f"photographs of {Path(args.dataset).name}"
    outside = {kind: scores[kind] for kind in unlike}
    return {
        "images": {"inside": len(inside[sorted_by]), "of_a_kind": len(photographs), "compared_to": training.count},
        "inside": ours,
        "sorted_by": sorted_by,
        "auc": aucs(inside, scores),
        "mean": {
            photographs: means(some, outside, sorted_by)
            for photographs, some in [(ours, inside), *((name, scores[name]) for name in others)]
        },
    }


# ---------------------------------------------------------------------- results


def plot(result: dict, path: Path):
    sizes = {"width_ratios": (1, 1, 1.9)}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(19, 5), layout="constrained", gridspec_kw=sizes)
    confidence = result["confidence"]
    left.plot([0, 1], [0, 1], color="grey", linestyle=":")
    left.plot(confidence["reliability"]["stated"], confidence["reliability"]["right"], marker="o")
    left.set(xlabel="stated chance that the caption is right", ylabel="share that is right", title="reliability")
    shares, values = zip(*confidence["cider_of_most_confident"].items())
    middle.plot(shares, values, marker="o")
    middle.set(xlabel="share of captions kept, most confident first", ylabel="CIDEr-D", title="abstaining")
    measured = result["unlike"]["auc"]
    values = np.array([[one["auc"] for one in of_kinds.values()] for of_kinds in measured.values()])
    right.imshow(values, cmap="RdBu", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value - 0.5) > 0.3 else "black"
        right.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    right.set_xticks(range(values.shape[1]), next(iter(measured.values())), rotation=40, ha="right")
    right.set_yticks(range(len(measured)), measured)
    right.set_title("telling other images from photographs: AUC, 0.5 by chance")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    (args,) = parse_arguments(ConfidenceArguments)
    processes, processor = own_processes(), BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(processes.device)
    train = load_pairs(args.dataset, args.train_split, **args.columns)
    trained_on, held_back = split_held_back(train, args.held_back)
    unseen = load_pairs(args.dataset, args.split, args.max_images, **args.columns)
    inside = len(unseen) - args.kind_images
    if inside < 1:
        raise ValueError(
            f"--kind_images {args.kind_images} leaves none of the {len(unseen)} images of {args.split} to compare with: give less"
        )
    others = other_photographs(args)

    parts = {}
    for name, dataset in (("fit", train.select(held_back)), ("test", unseen)):
        references = dataset["captions"][:]
        with processes.main_process_first():  # the others find what it has encoded
            store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir)
        captions, seen = looked_at(model, processor, store.batch, range(len(dataset)), args.batch_size)
        cider = CiderD(references).scores(captions)
        parts[name] = seen, cider, cider >= np.median(human_cider(references))
    seen, _, right = parts["fit"]
    if right.all() or not right.any():
        raise ValueError(f"{right.sum()} of {len(right)} held-back captions are right: nothing to calibrate on")
    fitted = LogisticRegression(C=100.0).fit(seen["evidence"], right)
    weights = [float(fitted.intercept_[0]), *map(float, fitted.coef_[0])]
    model.config.rbm_confidence = weights
    seen, cider, right = parts["test"]
    prob = model.confidence(torch.from_numpy(seen["evidence"])).numpy()
    photographs = unseen.select(range(inside, len(unseen)))["image"][:]
    seen = {name: values[:inside] for name, values in seen.items()}
    result = {
        "split": args.split,
        "images": len(unseen),
        "weights": dict(zip(("bias", "log_prob_per_token", "pmi"), weights)),
        "confidence": measure_confidence(prob, right, cider),
        "unlike": unlike_images(args, model, processor, train.select(trained_on), photographs, others, seen),
    }
    if not processes.is_main_process:
        return
    output = Path(args.output)
    write_json(output, result)
    plot(result, output.with_suffix(".png"))
    config_file = Path(args.model) / "config.json"
    if args.save and config_file.exists():
        write_json(config_file, json.loads(config_file.read_text()) | {"rbm_confidence": weights})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_stage(main)
