"""How well trained similarities align images and sentences of a split that they have not seen.

Retrieval and zero-shot classification of each run, and of all together:

    python -m experiments.alignment.evaluate_alignment --runs runs/align-probe runs/align-sail runs/align-rbm \
        --dataset flickr8k --output runs/alignment.json

The study of encoders:

    python -m experiments.alignment.evaluate_alignment --study --vision A B@6,12 --text TEXT --dataset flickr8k \
        --output runs/study.json

The study asks what SAIL asks of frozen encoders (arXiv 2412.04616): is it how their classes cluster (nearest
neighbours), or how they separate linearly, that tells how well they align? Each encoder or layer is probed with linear
layers. Classes come from the captions: an image belongs to one of `--classes` if most of its captions name it and none
of them another.
"""

import argparse
import json
import tempfile
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from accelerate.utils import set_seed
from scipy.spatial.distance import cdist
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm.auto import tqdm

from training.align import AlignArguments, embed, load_data, load_encoders, new_aligner, train
from training.lib.aligned import Projection
from training.lib.checkpoints import write_json
from training.lib.data import split_held_back
from training.lib.distributed import new_accelerator
from training.lib.metrics import tokenize
from training.lib.pairs import load_pairs
from training.lib.retrieval import recalls
from training.lib.stage import run_stage
from training.report import retrieval_table


matplotlib.use("Agg")
import matplotlib.pyplot as plt


CLASSES = ("dog", "horse", "bike", "snow", "beach", "football", "water", "rock", "street", "grass")
TEMPLATES = ("a photo of a {}", "a picture of the {}", "there is a {}", "a {} in the picture", "the {}")
SIMILARITIES = {  # of two matrices of embeddings, (n, d) and (m, d): (n, m), larger is more alike
    "cosine": lambda a, b: 1 - cdist(a, b, "cosine"),
    "euclidean": lambda a, b: -cdist(a, b, "euclidean"),
    "inverse_euclidean": lambda a, b: 1 / (1 + cdist(a, b, "euclidean")),
    "jensen_shannon": lambda a, b: -cdist(softmax(a), softmax(b), "jensenshannon"),
    "kullback_leibler": lambda a, b: -kullback_leibler(softmax(a), softmax(b)),
}


def softmax(z: np.ndarray, temperature: float = 0.05) -> np.ndarray:
    return torch.from_numpy(np.asarray(z, dtype=np.float64) / temperature).softmax(-1).numpy()


def kullback_leibler(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(n, m) KL(p_i || q_k) of distributions p (n, d) and q (m, d), nats."""
    return (p * np.log(p)).sum(1)[:, None] - p @ np.log(q).T


def settings_of(run: str, args) -> tuple[AlignArguments, dict]:
    """What a run was trained with, on this data set, and its report."""
    report = json.loads((Path(run) / "align.json").read_text())
    settings = {field.name: report["align"][field.name] for field in fields(AlignArguments)}
    return AlignArguments(**settings | {"dataset": args.dataset, "cache_dir": args.cache_dir}), report


def runs_of(runs: list[str], args):
    """Of each run: its folder, settings, report, encoders, and what loads a split's data and captions as the run sees
    them."""
    encoders = {}
    for run in tqdm(runs, desc="runs"):
        settings, report = settings_of(run, args)
        key = (*settings.vision, settings.text)
        encoders[key] = encoders.get(key) or load_encoders(settings)
        load = partial(load_data, settings, word_ids=report["word_ids"], encoders=encoders[key])
        yield run, settings, report, encoders[key], load


def trained_aligner(run: str, settings: AlignArguments, data):
    aligner = new_aligner(settings, data)
    aligner.load_state_dict(torch.load(Path(run) / "best.pt", weights_only=True))
    return aligner


def class_of_images(captions: list[list[str]], classes) -> np.ndarray:
    """Number of the one class that most captions of an image name, if none names another; else -1."""
    said = np.array([[sum(c in tokenize(text) for text in of_image) for c in classes] for of_image in captions])
    one = ((said > 0).sum(1) == 1) & (said.max(1) * 2 > [len(of_image) for of_image in captions])
    return np.where(one, said.argmax(1), -1)


@torch.no_grad()
def zero_shot(aligner, data, encoders, labels: np.ndarray, classes, cache_dir: str) -> dict:
    """Accuracy of the class whose templates are, on average, most like the image."""
    rows = np.flatnonzero(labels >= 0)
    texts = [template.format(c) for c in classes for template in TEMPLATES]
    sentences = torch.from_numpy(np.asarray(encoders[1].embed(texts, cache_dir), dtype=np.float32))
    words = None
    if data.words is not None:
        found = encoders[1].tokenizer(texts, add_special_tokens=False)["input_ids"]
        column = {token: k for k, token in enumerate(data.words.word_ids)}
        words = torch.zeros(len(texts), len(column))
        for row, ids in zip(words, found):
            row[[column[token] for token in ids if token in column]] = 1
    similarity = aligner.similarity(aligner.embed_images(data.images(rows)), aligner.embed_texts(sentences, words))
    guess = similarity.view(len(rows), len(classes), len(TEMPLATES)).mean(-1).argmax(1).numpy()
    chance = np.bincount(labels[rows]).max() / len(rows)
    return {"images": len(rows), "accuracy": float((guess == labels[rows]).mean()), "largest_class": float(chance)}


@torch.no_grad()
def evaluate_runs(args) -> dict:
    results, standardised = {}, []
    for run, settings, report, encoders, load in runs_of(args.runs, args):
        data, captions = load(args.split)
        aligner = trained_aligner(run, settings, data)
        images, texts, owner = embed(aligner, data, data.rows)
        similarity = aligner.similarity(images, texts)
        standardised.append((similarity - similarity.mean()) / similarity.std())
        entry = {"kind": settings.kind, "minutes": report["minutes"], "parameters": report["parameters"]}
        entry |= recalls(similarity, owner)
        labels = class_of_images(captions, args.classes)
        entry["zero_shot"] = zero_shot(aligner, data, encoders, labels, args.classes, args.cache_dir)
        if isinstance(aligner, Projection):
            compared = {name: like(images.numpy(), texts.numpy()) for name, like in SIMILARITIES.items()}
            entry["similarities"] = {name: recalls(torch.from_numpy(s), owner) for name, s in compared.items()}
        results[Path(run).name] = entry
    if len(standardised) > 1:
        results["together"] = {"kind": "sum of standardised similarities", **recalls(sum(standardised), owner)}
    return {"split": args.split, "images": len(data), "captions": len(owner), "runs": results}


def clustering(train_x, train_y, x, y, neighbours: int = 10) -> dict[str, float]:
    """Accuracy on unseen images of nearest neighbours by cosine, and of a linear classifier."""
    knn = KNeighborsClassifier(neighbours, metric="cosine", weights="distance").fit(train_x, train_y)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(train_x, train_y)
    return {"knn": float(knn.score(x, y)), "linear": float(linear.score(x, y))}


def study(args) -> dict:
    """Of each encoder or layer, and of all side by side: how its classes cluster, how they separate, and how well a
    linear probe aligns it."""
    settings = AlignArguments(
        vision=args.vision, text=args.text, dataset=args.dataset, output_dir="", kind="probe", cache_dir=args.cache_dir,
        epochs=args.epochs, batch_size=256, eval_every=args.epochs, seed=args.seed, held_back=args.held_back, max_images=args.max_images,
    )  # fmt: skip
    vision, text = load_encoders(settings)
    ids = load_pairs(args.dataset, args.train_split, args.max_images).select_columns(["image_id"])
    train_rows, held_rows = split_held_back(ids, settings.held_back)
    probed = {
        name: [SimpleNamespace(parts={name: columns}, embed=encoder.embed)]
        for encoder in vision
        for name, columns in encoder.parts.items()
    }
    if len(vision) > 1:
        probed["all together"] = vision
    results = {}
    for name, encoders in tqdm(probed.items(), desc="encoders"):
        data, captions = load_data(settings, args.train_split, train_rows, encoders=(encoders, text))
        unseen, unseen_captions = load_data(settings, args.split, encoders=(encoders, text))
        labels, unseen_labels = (class_of_images(c, args.classes) for c in (captions, unseen_captions))
        rows, unseen_rows = np.flatnonzero(labels >= 0), np.flatnonzero(unseen_labels >= 0)
        entry = clustering(
            data.images(rows).numpy(), labels[rows], unseen.images(unseen_rows).numpy(), unseen_labels[unseen_rows]
        )
        set_seed(args.seed)
        aligner = new_aligner(settings, data)
        with tempfile.TemporaryDirectory() as settings.output_dir:
            train(new_accelerator(args.seed), aligner, data, held_rows, settings)
        with torch.no_grad():
            images, texts, owner = embed(aligner, unseen, unseen.rows)
            entry |= recalls(aligner.similarity(images, texts), owner)
        entry["alignment"] = (entry["image_to_text_r10"] + entry["text_to_image_r10"]) / 2
        results[name] = entry
        print(name, {key: round(value, 3) for key, value in entry.items()}, flush=True)
    aligned = [entry["alignment"] for entry in results.values()]
    correlation = {}
    for measure in ("knn", "linear"):
        values = [entry[measure] for entry in results.values()]
        if len(values) > 2:
            correlation[measure] = {
                "pearson": float(pearsonr(values, aligned)[0]),
                "spearman": float(spearmanr(values, aligned)[0]),
            }
    return {"split": args.split, "images": len(ids), "encoders": results, "correlation_with_alignment": correlation}


def plot(results: dict, path: Path):
    """Clustering and linear separability of encoders against their alignment."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, measure, title in zip(axes, ("knn", "linear"), ("nearest neighbours", "linear classifier")):
        for name, entry in results["encoders"].items():
            axis.plot(100 * entry[measure], entry["alignment"], "o")
            axis.annotate(
                name, (100 * entry[measure], entry["alignment"]), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
        found = results["correlation_with_alignment"].get(measure)
        axis.margins(x=0.35, y=0.1)
        axis.set(xlabel=f"{title}: accuracy (%)" + (f"; r = {found['pearson']:.2f}" if found else ""))
    axes[0].set_ylabel("alignment: mean R@10 of a linear probe (%)")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", help="output folders of training.align")
    parser.add_argument("--study", action="store_true", help="clustering against alignment, of frozen encoders")
    parser.add_argument(
        "--vision", nargs="+", help="for the study, as in training.align; every layer by itself, and all together"
    )
    parser.add_argument("--text", help="for the study")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), help="words that captions name")
    parser.add_argument("--epochs", type=int, default=30, help="of a probe of the study")
    parser.add_argument("--max_images", type=int, help="images of a split that the study uses at most")
    parser.add_argument(
        "--held_back", type=int, default=400, help="training images that the study's probes are not trained on"
    )
    parser.add_argument("--cache_dir", default="runs/features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="results, JSON; the study's picture stands beside it")
    args = parser.parse_args()
    if bool(args.runs) == args.study or (args.study and not (args.vision and args.text)):
        parser.error("give either --runs, or --study with --vision and --text")
    if args.study:
        results = study(args)
        plot(results, Path(args.output).with_suffix(".png"))
        print(json.dumps(results["correlation_with_alignment"]))
    else:
        results = evaluate_runs(args)
        print(retrieval_table(results))
    write_json(args.output, results)


if __name__ == "__main__":
    run_stage(main)
