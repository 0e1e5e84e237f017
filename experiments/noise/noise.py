"""What CapFilt gives a captioner: trained on noisy pairs, on those that the filter keeps, and with synthetic captions
in place of the others.

    python -m experiments.noise.noise --dataset flickr8k --vision EfficientNet-lite2 \
        --output experiments/noise/noise.json

Captions are exchanged between the training images (30 and 60 % of them). Nothing that knows the right pairs takes part:
the vision tower never saw a caption, the way from image to words is trained anew on the pairs in question, and
synthetic captions are written by the captioner of the noisy pairs. Only the decoder's language comes from `--decoder`,
the same for all. CIDEr-D on the validation split, 3 beams. A part that is in `--work` already is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from training.lib.checkpoints import write_json
from training.lib.stage import run_stage


KINDS = ("noisy", "filtered", "filtered + synthetic")


def stage(module: str, *args):
    subprocess.run([sys.executable, "-m", f"training.{module}", *map(str, args)], check=True)


def captions_of(result: Path) -> dict:
    return json.loads(result.read_text())["systems"]["BLIP"]


def measured_captioner(args, pairs: str | Path, folder: Path) -> dict:
    """A captioner trained on these pairs, measured on validation."""
    if not (folder / "captioner.json").exists():
        train = ["training/recipes/captioner-cross-attention.yaml", "--model", args.work / "start", "--dataset", pairs]
        train += ["--cache_dir", args.cache_dir, "--num_train_epochs", args.epochs, "--output_dir", folder]
        stage("train_captioner", *train)
    if not (folder / "results.json").exists():
        data = ["--dataset", args.dataset, "--cache_dir", args.cache_dir, "--output", folder / "results.json"]
        stage("evaluate_captions", "--model", folder / "last", "--plain", "true", *data)
    return captions_of(folder / "results.json")


def filtered(args, model: Path, percent: int, folder: Path, *more) -> dict:
    if not (folder / "capfilt.json").exists():
        data = ["--dataset", args.dataset, "--views", 1, "--rounds", 3, "--cache_dir", args.cache_dir]
        stage("capfilt", "--model", model, *data, "--shuffle", percent / 100, "--output_dir", folder, *more)
    return json.loads((folder / "capfilt.json").read_text())


def experiment(args, percent: int) -> dict:
    folder = args.work / str(percent)
    found = filtered(args, args.work / "start", percent, folder / "filtered")
    noisy = measured_captioner(args, folder / "filtered-noisy", folder / "captioner-noisy")
    writer = folder / "captioner-noisy" / "last"
    replaced = filtered(args, writer, percent, folder / "synthetic", "--synthetic", "true")
    systems = [
        noisy,
        measured_captioner(args, folder / "filtered", folder / "captioner-filtered"),
        measured_captioner(args, folder / "synthetic", folder / "captioner-synthetic"),
    ]
    wanted = ("auc_of_wrong_captions", "share_right_before", "share_right_after", "captions", "kept", "images_kept")
    return {name: found[name] for name in wanted} | {
        "synthetic_kept": replaced["synthetic_kept"],
        "captioners": dict(zip(KINDS, systems)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--vision", required=True, help="folder or Hub id of a tower that never saw captions")
    parser.add_argument("--decoder", default="checkpoints/blip-rbm-small", help="captioner whose language is used")
    parser.add_argument("--percent", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--epochs", type=int, default=1, help="of each captioner")
    parser.add_argument("--work", type=Path, default=Path("runs/noise"))
    parser.add_argument("--cache_dir", default="runs/features")
    parser.add_argument("--output", required=True, help="results file")
    args = parser.parse_args()
    if not (args.work / "start").exists():
        start = ["--decoder", args.decoder, "--vision", args.vision]
        stage("build_captioner", *start, "--output_dir", args.work / "start")
    results = {"right pairs": measured_captioner(args, args.dataset, args.work / "captioner-right")}
    print("right pairs", round(results["right pairs"]["CIDEr-D"], 1), flush=True)
    for percent in args.percent:
        results[str(percent)] = experiment(args, percent)
        print(percent, {name: round(s["CIDEr-D"], 1) for name, s in results[str(percent)]["captioners"].items()})
        settings = {name: str(value) for name, value in vars(args).items()}
        write_json(args.output, {"settings": settings, "results": results})


if __name__ == "__main__":
    run_stage(main)
