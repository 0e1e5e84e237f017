"""Stage 5: can a caption be trusted, and an image? Calibrates the confidence of captions, and measures it on unseen
images.

    python -m training.evaluate_confidence --model runs/blip-rbm-small --dataset flickr8k --output runs/confidence.json

*Confidence*: the chance that a caption is right, by logistic regression (Platt 1999) on its log P per token and its PMI
by the RBM, fitted on held-back training images, and saved in the model's config (the pipeline returns it). Right means:
at least as near to the references, by CIDEr-D, as half of the human captions are to the other ones of their image. On
`--split`: reliability curve, expected calibration error, CIDEr-D of the captions that are left when the least confident
ones are withheld.

*Energy*: F(x) of `--split` against images of other kinds (noise, textures, pages of text, a medical scan, drawings),
AUC of each.

Writes `--output`, and a picture beside it.
"""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.checkpoints import write_json
from training.lib.data import split_held_back
from training.lib.distributed import once_each, own_processes
from training.lib.features import cache_features
from training.lib.metrics import CiderD
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class ConfidenceArguments(MeasureArguments):
    train_split: str = field(default="train", metadata={"help": "split whose held-back images calibrate"})
    held_back: int = field(default=400, metadata={"help": "how many they are, as in the stages before"})
    kind_images: int = field(default=200, metadata={"help": "images of every other kind"})
    batch_size: int = field(default=16, metadata={"help": "images at a time"})
    save: bool = field(default=True, metadata={"help": "write the calibration into the model's config.json"})
    seed: int = field(default=0, metadata={"help": "of the images of other kinds"})


# ---------------------------------------------------------------------- confidence


def human_cider(references: list[list[str]]) -> np.ndarray:
    """CIDEr-D of the first caption of each image against its others."""
    others = CiderD([of_image[1:] for of_image in references])
    return others.scores([of_image[0] for of_image in references])


@torch.no_grad()
def captions_with_evidence(model, processor, store, rows, batch_size) -> tuple[list[str], np.ndarray]:
    """Captions as the model writes them, and (n, 2) log P per token and PMI. Under `accelerate launch` as `caption_rows`."""

    def of_rows(rows) -> list[tuple[str, np.ndarray]]:
        written = []
        for start in tqdm(range(0, len(rows), batch_size), desc="caption", leave=False):
            features = store.batch(rows[start : start + batch_size]).to(model.device)
            encoding = model.encode_image(vision_hidden_states=features)
            sequences = model.generate(encoding=encoding)
            evidence = model.caption_evidence(encoding, sequences).cpu().numpy()
            written += zip(processor.captions(sequences), evidence)
        return written

    captions, evidence = zip(*once_each(of_rows, rows))
    return list(captions), np.stack(evidence)


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


def other_kinds(n: int, seed: int, size: int = 224) -> dict[str, list[Image.Image]]:
    """n images of each kind that are no photographs of everyday scenes; made or shipped with a package, none
    downloaded."""
    rng = np.random.default_rng(seed)
    return {
        "noise": [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)],
        "textures": [texture(rng, size) for _ in range(n)],
        "text pages": [text_page(rng, size) for _ in range(n)],
        "medical": medical(rng, n, size),
        "drawings": [drawing(rng, size) for _ in range(n)],
    }


def texture(rng, size):
    """Waves of two random directions and lengths, in two random colours."""
    y, x = np.mgrid[:size, :size] / size
    waves = 0.0
    for _ in range(2):
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.02, 0.3)
        waves = waves + np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + rng.uniform(0, 6))
    share = ((waves + 2) / 4)[..., None]
    one, other = rng.integers(0, 256, (2, 3))
    return Image.fromarray((share * one + (1 - share) * other).astype(np.uint8))


def text_page(rng, size):
    """Lines of random words, black on white."""
    page = Image.new("RGB", (size, size), "white")
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(int(rng.integers(8, 16))), 8
    while y < size - 8:
        words = ("".join(rng.choice(list("abcdefghiklmnoprstuvwy"), rng.integers(2, 9))) for _ in range(8))
        draw.text((8, y), " ".join(words), fill="black", font=font)
        y += font.size * 1.4
    return page


def medical(rng, n, size):
    """Random views of the MRI slice that matplotlib ships."""
    with gzip.open(Path(matplotlib.get_data_path()) / "sample_data" / "s1045.ima.gz") as file:
        scan = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(float)
    scan = Image.fromarray((255 * np.clip(scan / np.quantile(scan, 0.995), 0, 1)).astype(np.uint8)).convert("RGB")
    images = []
    for _ in range(n):
        side, angle = int(rng.integers(150, 256)), rng.uniform(-30, 30)
        left, top = rng.integers(0, 256 - side + 1, 2)
        images.append(scan.rotate(angle).crop((left, top, left + side, top + side)).resize((size, size)))
    return images


def drawing(rng, size):
    """A few coloured shapes with outlines on a plain ground."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(180, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 9)):
        (left, top), (width, height) = rng.integers(0, size - 40, 2), rng.integers(20, 120, 2)
        shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
        box = tuple(int(v) for v in (left, top, left + width, top + height))
        shape(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)), outline="black", width=2)
    return picture


@torch.no_grad()
def energies_of(model, processor, images, batch_size) -> np.ndarray:
    """F(x) (n,) of PIL images."""
    result = []
    for start in range(0, len(images), batch_size):
        pixel_values = processor(images=images[start : start + batch_size])["pixel_values"].to(model.device)
        result.append(model.image_free_energy(pixel_values))
    return torch.cat(result).cpu().numpy()


# ---------------------------------------------------------------------- results


def plot(result: dict, energies: dict[str, np.ndarray], path: Path):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    confidence = result["confidence"]
    left.plot([0, 1], [0, 1], color="grey", linestyle=":")
    left.plot(confidence["reliability"]["stated"], confidence["reliability"]["right"], marker="o")
    left.set(xlabel="stated chance that the caption is right", ylabel="share that is right", title="reliability")
    shares, values = zip(*confidence["cider_of_most_confident"].items())
    middle.plot(shares, values, marker="o")
    middle.set(xlabel="share of captions kept, most confident first", ylabel="CIDEr-D", title="abstaining")
    right.boxplot(energies.values(), tick_labels=list(energies), showfliers=False)
    right.set(ylabel="F(x), nats", title="energy of images")
    right.tick_params(axis="x", rotation=20)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    (args,) = parse_arguments(ConfidenceArguments)
    processes, processor = own_processes(), BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(processes.device)
    train = load_pairs(args.dataset, args.train_split, **args.columns)
    train = train.select(split_held_back(train, args.held_back)[1])
    unseen = load_pairs(args.dataset, args.split, args.max_images, **args.columns)

    parts = {}
    for name, dataset in (("fit", train), ("test", unseen)):
        references = dataset["captions"][:]
        with processes.main_process_first():  # the others find what it has encoded
            store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir)
        captions, evidence = captions_with_evidence(model, processor, store, range(len(dataset)), args.batch_size)
        cider = CiderD(references).scores(captions)
        parts[name] = evidence, cider, cider >= np.median(human_cider(references))
    evidence, _, right = parts["fit"]
    if right.all() or not right.any():
        raise ValueError(f"{right.sum()} of {len(right)} held-back captions are right: nothing to calibrate on")
    fitted = LogisticRegression(C=100.0).fit(evidence, right)
    weights = [float(fitted.intercept_[0]), *map(float, fitted.coef_[0])]
    model.config.rbm_confidence = weights
    evidence, cider, right = parts["test"]
    prob = model.confidence(torch.from_numpy(evidence)).numpy()
    result = {
        "split": args.split,
        "images": len(unseen),
        "weights": dict(zip(("bias", "log_prob_per_token", "pmi"), weights)),
        "confidence": measure_confidence(prob, right, cider),
    }
    energies = {args.split: energies_of(model, processor, unseen["image"][:], args.batch_size)}
    for kind, images in tqdm(other_kinds(args.kind_images, args.seed).items(), desc="images of other kinds"):
        energies[kind] = energies_of(model, processor, images, args.batch_size)
    inside = energies[args.split]
    result["energy_auc"] = {
        kind: roc_auc_score(np.r_[np.zeros(len(inside)), np.ones(len(outside))], np.r_[inside, outside])
        for kind, outside in energies.items()
        if kind != args.split
    }
    if not processes.is_main_process:
        return
    output = Path(args.output)
    write_json(output, result)
    plot(result, energies, output.with_suffix(".png"))
    config_file = Path(args.model) / "config.json"
    if args.save and config_file.exists():
        write_json(config_file, json.loads(config_file.read_text()) | {"rbm_confidence": weights})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_stage(main)
