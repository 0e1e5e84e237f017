"""What can an RBM learn that a linear map cannot? Each question with its controls, of equal parameters and the same losses, on pooled images.

    python -m experiments.few_pairs --model checkpoints/blip-rbm-small --dataset flickr8k web flickr30k_captions.jsonl.gz,text=true \
        --worlds flickr8k=flickr8k web=web coco=coco --judged experiments/few_pairs/judged_web.tsv --work runs/few_pairs

Every training is kept in `--work`: a stopped run goes on. `results.json`, curves and the tables of README.md are written to `--output`.
"""

import csv
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional

import numpy as np

from experiments.few_pairs.learning import SPACE, Material, World, read_candidates
from experiments.few_pairs.questions import few_pairs, hybrid, words_said, wrong_captions
from experiments.few_pairs.report import write_report
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.capfilt import shuffled
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.checkpoints import write_json
from training.lib.data import CaptionWords, caption_words, choose_words, fold_of, split_held_back
from training.lib.features import load_features
from training.lib.mixture import image_sources, part_of, read_text_sources
from training.lib.rbm_objective import RBMArguments
from training.lib.stage import run_stage


QUESTIONS = ("pairs", "said", "noisy", "hybrid")


@dataclass
class FewPairsArguments:
    model: str = field(metadata={"help": "folder or Hub id of a captioner, whose vision tower encodes"})
    worlds: list[str] = field(
        metadata={"nargs": "+", "help": "NAME=DATASET, whose validation split is measured, each by itself in retrieval"}
    )
    world_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images of a world"})
    candidates: list[str] = field(
        default_factory=list,
        metadata={
            "nargs": "*",
            "help": "NAME=FILE of candidates, of a world or held_back; without them nothing is re-ranked",
        },
    )
    judged: Optional[str] = field(
        default=None,
        metadata={"help": "table of `experiments.few_pairs.sheet`, filled in: captions of training images"},
    )
    questions: list[str] = field(
        default_factory=lambda: list(QUESTIONS), metadata={"nargs": "+", "choices": list(QUESTIONS)}
    )
    systems: list[str] = field(
        default_factory=lambda: list(SPACE),
        metadata={"nargs": "+", "choices": list(SPACE), "help": "of question pairs"},
    )
    pairs: list[int] = field(
        default_factory=lambda: [250, 500, 1000, 2000, 6000, 100_000],
        metadata={"nargs": "+", "help": "images with captions; what is more than there are is all"},
    )
    said_pairs: list[int] = field(default_factory=lambda: [1000, 100_000], metadata={"nargs": "+", "help": "of said"})
    hybrid_pairs: list[int] = field(
        default_factory=lambda: [1000, 100_000], metadata={"nargs": "+", "help": "of hybrid, each among --pairs"}
    )
    num_words: int = field(default=1000, metadata={"help": "K, the most frequent content words of all captions"})
    seeds: int = field(default=3, metadata={"help": "trainings of each chosen setting"})
    tries: int = field(default=4, metadata={"help": "settings of each system at each number of pairs"})
    steps: int = field(default=1000, metadata={"help": "of each training"})
    batch_size: int = field(default=125, metadata={"help": "of each step"})
    folds: int = field(default=3, metadata={"help": "of noisy: a caption is judged by a system trained on the others"})
    exchanged: float = field(default=0.3, metadata={"help": "of noisy: share of captions exchanged"})
    temperatures: int = field(default=1000, metadata={"help": "of hybrid: of annealed importance sampling"})
    resamples: int = field(default=1000, metadata={"help": "of each bootstrap interval"})
    work: str = field(default="runs/few_pairs", metadata={"help": "where trainings are kept"})
    output: str = field(
        default="experiments/few_pairs", metadata={"help": "folder of results.json, curves and README.md"}
    )


@dataclass
class NoisyPairs:
    """Captions of all rows with some exchanged within each data set: `words` of them, `wrong` of each row (captions,), and of each row its
    fold and its data set, of which `titles` has the names. `labels`: of rows that were judged by eye as they are."""

    words: CaptionWords
    wrong: list[np.ndarray]
    folds: np.ndarray
    part: np.ndarray
    titles: list[str]
    labels: dict[int, str]


def named(entries: list[str], flag: str) -> dict[str, str]:
    """Raises ValueError if an entry is no NAME=VALUE."""
    for entry in entries:
        if not all(entry.partition("=")):
            raise ValueError(f"--{flag} {entry}: must be NAME={'DATASET' if flag == 'worlds' else 'FILE'}")
    return dict(entry.split("=", 1) for entry in entries)


def read_labels(file: str, image_ids: list[str]) -> dict[int, str]:
    """Labels of a judged table by row number.

    Raises:
        ValueError: for a label that is none, or an image that is not among `image_ids`.
    """
    rows, labels = {name: row for row, name in enumerate(image_ids)}, {}
    with open(file, newline="", encoding="utf-8") as table:
        for line in csv.DictReader(table, delimiter="\t"):
            if line["label"] not in ("right", "partly", "wrong"):
                raise ValueError(
                    f"{file}: pair {line['number']} is {line['label']!r}, but must be right, partly or wrong"
                )
            if line["image_id"] not in rows:
                raise ValueError(f"{file}: image {line['image_id']} is not among the images of --dataset")
            labels[rows[line["image_id"]]] = line["label"]
    return labels


def read_material(data: DataArguments, args: FewPairsArguments):
    """`Material`, the training pairs and the processor."""
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    processor = BlipRBMProcessor.from_pretrained(args.model)
    encode = lambda data, **more: load_features(
        data, model.vision_model, processor.image_processor, pooling="mean", **more
    )
    dataset, store = encode(data)
    rows, held = split_held_back(dataset, data.held_back)
    texts = [captions for _, of_source in read_text_sources(data) for captions in of_source]
    if not texts:
        raise ValueError("--dataset names no texts alone: add a file of captions with ,text=true behind it")
    captions, tokenizer = dataset["captions"][:], processor.tokenizer
    word_ids = choose_words(tokenizer, [*(captions[row] for row in rows), *texts], args.num_words)
    as_words = lambda captions: caption_words(tokenizer, captions, word_ids)
    files = named(args.candidates, "candidates")
    candidates = lambda name, references: (
        read_candidates(files[name], word_ids, processor, references) if name in files else None
    )
    words, worlds = as_words(captions), {}
    for name, path in named(args.worlds, "worlds").items():
        of_world, features = encode(
            replace(data, dataset=[path], max_images=args.world_images), split="validation", views=1
        )
        said, references = as_words(of_world["captions"]), dict(enumerate(of_world["captions"]))
        features = features.batch(range(len(of_world)))
        worlds[name] = World(features, [said[i] for i in references], candidates(name, references))
    references = {int(row): captions[row] for row in held}
    held_back = World(store.batch(held), [words[row] for row in held], candidates("held_back", references))
    settings = RBMArguments(model=args.model, output_dir=args.work, num_words=len(word_ids), batch_size=args.batch_size)
    return Material(store, rows, words, as_words(texts), held_back, worlds, settings), dataset, as_words


def exchange(material: Material, dataset, as_words, data: DataArguments, args: FewPairsArguments) -> NoisyPairs:
    captions, part = [list(of_image) for of_image in dataset["captions"][:]], part_of(dataset)
    wrong = [np.zeros(len(of_image), bool) for of_image in captions]
    for number in np.unique(part):
        here = material.rows[part[material.rows] == number]
        mixed, which = shuffled([captions[row] for row in here], args.exchanged, 0)
        for row, of_image, of_wrong in zip(here, mixed, which):
            captions[row], wrong[row] = of_image, of_wrong
    labels = read_labels(args.judged, dataset["image_id"][:]) if args.judged else {}
    labels = {row: label for row, label in labels.items() if row in set(material.rows.tolist())}
    titles = [Path(source.path).name for source in image_sources(data)]
    return NoisyPairs(as_words(captions), wrong, fold_of(dataset["image_id"], args.folds), part, titles, labels)


def main():
    data, args = parse_arguments(DataArguments, FewPairsArguments)
    material, dataset, as_words = read_material(data, args)
    work, file = Path(args.work), Path(args.output) / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    V, K = material.sizes
    results["settings"] = {
        "arguments": asdict(args),
        "data": asdict(data),
        "training_images": len(material.rows),
        "texts": len(material.texts.ends) - 1,
        "image_units": V,
        "words": K,
        "hidden_units": material.equal_hidden_size(),
    }

    def answer(question: str, compute):
        if question in args.questions:
            results[question] = compute()
            write_json(file, results)

    answer("pairs", lambda: few_pairs(material, args, work))
    answer("said", lambda: words_said(material, args, work))
    if {"noisy", "hybrid"} & set(args.questions) and "pairs" not in results:
        raise ValueError(
            "noisy and hybrid take their settings from the answer to pairs: name pairs in --questions first"
        )
    most = max(results.get("pairs", {}).get("chosen", {"0": {}}), key=int)
    chosen = results.get("pairs", {}).get("chosen", {})
    answer(
        "noisy",
        lambda: wrong_captions(material, args, work, exchange(material, dataset, as_words, data, args), chosen[most]),
    )
    answer("hybrid", lambda: hybrid(material, args, work, chosen))
    write_report(Path(args.output), results)


if __name__ == "__main__":
    run_stage(main)
