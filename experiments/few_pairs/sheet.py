"""Pages of random pairs, to judge by eye whether a caption belongs to its image.

    python -m experiments.few_pairs.sheet --dataset web --output runs/pairs-sheet

Writes numbered pages and judged.tsv (number, image_id, and two columns to fill in: `label`, which is right, partly or wrong, and `judge`). The pages show images of the data set: they stay out of git.
"""

import argparse
import csv
import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from training.lib.data import split_held_back
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


matplotlib.use("Agg")
import matplotlib.pyplot as plt


ACROSS, DOWN = 5, 4


def draw_page(path: Path, images: list, lines: list[str]):
    figure, axes = plt.subplots(DOWN, ACROSS, figsize=(3.2 * ACROSS, 4.0 * DOWN), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, line in zip(axes.flat, images, lines):
        axis.imshow(image.convert("RGB"))
        axis.set_title(textwrap.fill(line, 36), fontsize=10, loc="left", parse_math=False)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def write_sheet(args: argparse.Namespace):
    """The pages and the empty table of `args.output`.

    Raises:
        ValueError: if the split has fewer pairs than wanted, or the folder holds anything.
    """
    folder = Path(args.output)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output {folder} holds files, perhaps judgements: name another folder, or empty it")
    dataset = load_pairs(args.dataset, "train")
    rows, _ = split_held_back(dataset, args.held_back)
    if not 0 < args.pairs <= len(rows):
        raise ValueError(f"--pairs {args.pairs}: must be of 1 to {len(rows)}, the training images of {args.dataset}")
    chosen = dataset.select(np.random.default_rng(args.seed).choice(rows, args.pairs, replace=False))
    folder.mkdir(parents=True, exist_ok=True)
    table = [[i + 1, row["image_id"], row["captions"][0]] for i, row in enumerate(chosen.remove_columns("image"))]
    for page, start in enumerate(range(0, len(table), ACROSS * DOWN), start=1):
        part = slice(start, start + ACROSS * DOWN)
        draw_page(
            folder / f"page-{page:02}.png", chosen[part]["image"], [f"{n}: {caption}" for n, _, caption in table[part]]
        )
    with open(folder / "judged.tsv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["number", "image_id", "label", "judge"])
        writer.writerows([number, image_id, "", ""] for number, image_id, _ in table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="Hub id or folder, one caption an image")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--held_back", type=int, default=500, help="images of the split that are not training images")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--output", required=True, help="folder of pages and table, outside the repository or in runs/")
    write_sheet(parser.parse_args())


if __name__ == "__main__":
    run_stage(main)
