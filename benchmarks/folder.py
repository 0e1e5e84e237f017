"""Where the time of `blip-rbm caption FOLDER` goes: seconds in the model, in loading it, and in all else, on real images; and its memory.

python -m benchmarks.folder --dataset flickr8k --output benchmarks/results/folder.json
python -m benchmarks.folder --dataset flickr8k --images 2000 --broken 0.05    # images are taken again if there are fewer
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
import torch
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline
from modeling_blip_rbm.__main__ import main as command_line
from training.lib.checkpoints import write_json
from training.lib.pairs import load_pairs


def watched(function, seconds: list[float], memory: list[float]):
    """The function, with the seconds of every call appended to `seconds`, and this process's megabytes after it to `memory`."""

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        memory.append(psutil.Process().memory_info().rss / 2**20)
        return result

    return call


def write_images(folder: Path, images, number: int, broken: int):
    """`number` JPEG files of the images, of which `broken`, evenly spread, are cut off at their beginning."""
    for i in tqdm(range(number), desc="write JPEG files"):
        file = folder / f"{i:05}.jpg"
        images[i % len(images)].convert("RGB").save(file, quality=95)
        if i * broken // number != (i + 1) * broken // number:
            file.write_bytes(file.read_bytes()[:20])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="where the images are from, as of the training stages")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--broken", type=float, default=0.0, help="share of the files that cannot be read")
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    dataset = load_pairs(args.dataset, args.split, args.images)
    broken = round(args.broken * args.images)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), dataset["image"], args.images, broken)
        in_model, loading, memory = [], [], []
        table = Path(folder, "captions.csv")
        with (
            mock.patch.object(
                BlipRBMImageToTextPipeline, "_forward", watched(BlipRBMImageToTextPipeline._forward, in_model, memory)
            ),
            mock.patch.object(
                BlipRBMForConditionalGeneration,
                "from_pretrained",
                watched(BlipRBMForConditionalGeneration.from_pretrained, loading, []),
            ),
        ):
            start = time.perf_counter()
            code = command_line(["caption", folder, "--output", str(table), "--failed", f"{folder}/failed.jsonl"])
            total = time.perf_counter() - start
        captions = len(table.read_text().splitlines()) - 1
    if code != (2 if broken else 0) or captions != args.images - broken:
        raise RuntimeError(f"the command ended with {code} and {captions} captions for {args.images - broken} images")
    load, model = sum(loading), sum(in_model)
    captioning = total - load
    result = {
        "images": captions, "broken": broken, "threads": torch.get_num_threads(), "seconds": total, "seconds_of_loading": load,
        "seconds_in_the_model": model, "share_in_the_model": model / captioning,
        "share_of_all_in_the_model": model / total, "images_per_second": captions / captioning,
        "megabytes_after_quarters": [round(memory[(len(memory) - 1) * i // 4]) for i in range(5)],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
