"""Are captions right, by the eye of a person who does not know which system wrote which?

    python -m experiments.by_eye --model checkpoints/blip-rbm-small --dataset web --output runs/sheet
    python -m experiments.by_eye --judge runs/sheet

The first command captions random images and writes a folder: numbered pages (page-1.png ...), on which every image has its
captions as A, B, ... in an order of its own; judgements.tsv, to be filled in with 1 (right) or 0; and sheet.json, the key.
The second prints each system's share of right captions. The pages show the dataset's images: keep them out of git.
"""

import argparse
import csv
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.stats import binomtest

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.checkpoints import write_json
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PER_PAGE, ACROSS = 10, 5


def arguments_of_decoding(model, name: str) -> dict:
    """What `generate` is given for `plain` (BLIP alone), `rbm` (the model's defaults) or a preset of the model.

    Raises:
        ValueError: for any other name.
    """
    known = {"plain": {"rbm": False}, "rbm": {}} | model.presets
    if name not in known:
        raise ValueError(f"--decodings {name}: unknown, must be of {', '.join(known)}")
    return known[name]


@torch.no_grad()
def captions_of_systems(models: list[str], decodings: list[str], images: list, **settings) -> dict[str, list[str]]:
    """A caption of every image by each decoding of each model, by the system's name."""
    said = {}
    for path in models:
        processor = BlipRBMProcessor.from_pretrained(path)
        model = BlipRBMForConditionalGeneration.from_pretrained(path).eval()
        for decoding in decodings:
            chosen, texts = arguments_of_decoding(model, decoding), []
            for start in range(0, len(images), PER_PAGE):
                inputs = processor(images=images[start : start + PER_PAGE], return_tensors="pt")
                texts += processor.captions(model.generate(**inputs, **settings | chosen))
            said[f"{path}, {decoding}"] = texts
    return said


def shuffled_key(said: dict[str, list[str]], image_ids: list, rng: np.random.Generator) -> list[dict]:
    """Of every image its number, id and letters: letter -> caption and the systems that wrote it. A caption of several
    systems has one letter, so that it is judged once."""
    key = []
    for row, image_id in enumerate(image_ids):
        systems = {}
        for name, captions in said.items():
            systems.setdefault(captions[row], []).append(name)
        captions = [list(systems)[i] for i in rng.permutation(len(systems))]
        letters = {chr(ord("A") + i): {"caption": c, "systems": systems[c]} for i, c in enumerate(captions)}
        key.append({"number": row + 1, "image_id": image_id, "letters": letters})
    return key


def draw_page(path: Path, images: list, entries: list[dict]):
    """Images with their numbers above and their captions, by letter alone, below."""
    lines = [
        [textwrap.fill(f"{letter}: {entry['caption']}", 38) for letter, entry in each["letters"].items()]
        for each in entries
    ]
    longest = max("\n".join(of_image).count("\n") + 1 for of_image in lines)
    down = -(-len(images) // ACROSS)
    height = 3.4 + 0.19 * longest
    figure, axes = plt.subplots(down, ACROSS, figsize=(3.3 * ACROSS, height * down), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, entry, of_image in zip(axes.flat, images, entries, lines):
        axis.imshow(image.convert("RGB").resize((224, 224)))
        axis.set_title(str(entry["number"]), loc="left")
        text = "\n".join(of_image)
        axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=9, parse_math=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.97, bottom=0.19 * longest / (height * down), wspace=0.08)
    figure.subplots_adjust(hspace=0.19 * longest / 3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def write_sheet(args: argparse.Namespace):
    """The pages, the key and the empty table of `args.output`.

    Raises:
        ValueError: if that folder holds anything, or the split has fewer images than wanted.
    """
    folder = Path(args.output)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--output {folder} holds files, perhaps judgements: name another folder, or empty it")
    dataset, rng = load_pairs(args.dataset, args.split), np.random.default_rng(args.seed)
    if not 0 < args.images <= len(dataset):
        raise ValueError(f"--images {args.images}: must be of 1 to {len(dataset)}, which {args.split} has")
    chosen = dataset.select(rng.choice(len(dataset), args.images, replace=False))
    images, settings = chosen["image"][:], {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    said = captions_of_systems(args.model, args.decodings, images, **settings)
    key = shuffled_key(said, chosen["image_id"][:], rng)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), PER_PAGE):
        page = slice(start, start + PER_PAGE)
        draw_page(folder / f"page-{start // PER_PAGE + 1}.png", images[page], key[page])
    with open(folder / "judgements.tsv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["image", "letter", "right"])
        writer.writerows([entry["number"], letter, ""] for entry in key for letter in entry["letters"])
    asked = {name: getattr(args, name) for name in ("model", "decodings", "dataset", "split", "seed")}
    write_json(folder / "sheet.json", asked | settings | {"images": key})
    print(f"{folder}: look at the pages, fill in judgements.tsv with 1 or 0, then --judge {folder}")


def judged(folder: Path) -> dict[str, list[bool]]:
    """Of each system, whether its captions are right, of those captions that were judged.

    Raises:
        ValueError: for a judgement that is not 0, 1 or empty, or of a caption that the sheet does not have or has twice.
    """
    images = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))["images"]
    systems = {
        (str(entry["number"]), letter): of["systems"] for entry in images for letter, of in entry["letters"].items()
    }
    right, seen = {name: [] for name in sorted(set().union(*systems.values()))}, set()
    with open(folder / "judgements.tsv", newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.DictReader(file, delimiter="\t"), start=2):
            caption, judgement = (row.get("image"), row.get("letter")), (row.get("right") or "").strip()
            if caption not in systems or caption in seen or judgement not in ("0", "1", ""):
                raise ValueError(
                    f"{folder / 'judgements.tsv'}, line {line}: {list(row.values())!r:.80} must be an image and a letter of the "
                    "sheet, once, and 1 for right, 0 for wrong or nothing"
                )
            seen.add(caption)
            for name in systems[caption] if judgement else ():
                right[name].append(judgement == "1")
    return right


def print_judgements(folder: Path):
    """A line a system: the share of right captions with Wilson's 95 % interval.

    Raises:
        ValueError: as `judged`, or if nothing is judged.
    """
    judgements = judged(folder)
    if not any(judgements.values()):
        raise ValueError(f"{folder / 'judgements.tsv'} is empty: fill in the column `right` with 1 or 0")
    for name, right in judgements.items():
        if not right:
            print(f"{name}: none judged")
            continue
        interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
        print(f"{name}: {np.mean(right):.0%} [{interval.low:.0%}, {interval.high:.0%}] of {len(right)} captions right")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", metavar="FOLDER", help="join a folder's judgements with its key")
    parser.add_argument("--model", nargs="+", help="folders or Hub ids of BLIP-RBMs")
    parser.add_argument("--decodings", nargs="+", default=["plain", "rbm"], help="plain, rbm, or names of presets")
    parser.add_argument("--dataset", help="Hub id, folder or data file")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=50, help="how many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and the order of captions")
    parser.add_argument("--num_beams", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=20)
    parser.add_argument("--output", help="folder of the sheet, not in git")
    args = parser.parse_args()
    if args.judge:
        print_judgements(Path(args.judge))
    elif args.model and args.dataset and args.output:
        write_sheet(args)
    else:
        parser.error("--model, --dataset and --output are needed for a sheet, or --judge FOLDER")


if __name__ == "__main__":
    run_stage(main)
