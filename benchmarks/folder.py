"""Where the time of `blip-rbm caption FOLDER` goes: seconds in the model, in loading it, and in all else, on real images.

python -m benchmarks.folder --dataset flickr8k --output benchmarks/results/folder.json
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline
from modeling_blip_rbm.__main__ import main as command_line
from training.lib.checkpoints import write_json
from training.lib.pairs import load_pairs


def watched(function, seconds: list[float]):
    """The function, with the seconds of every call appended to `seconds`."""

    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="where the images are from, as of the training stages")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    dataset = load_pairs(args.dataset, args.split, args.images)
    with tempfile.TemporaryDirectory() as folder:
        for number, image in enumerate(tqdm(dataset["image"], desc="write JPEG files")):
            image.convert("RGB").save(Path(folder) / f"{number:05}.jpg", quality=95)
        in_model, loading, said = [], [], io.StringIO()
        with (
            mock.patch.object(
                BlipRBMImageToTextPipeline, "_forward", watched(BlipRBMImageToTextPipeline._forward, in_model)
            ),
            mock.patch.object(
                BlipRBMForConditionalGeneration,
                "from_pretrained",
                watched(BlipRBMForConditionalGeneration.from_pretrained, loading),
            ),
            contextlib.redirect_stdout(said),
        ):
            start = time.perf_counter()
            if command_line(["caption", folder]):
                raise RuntimeError("the command failed")
            total = time.perf_counter() - start
    if len(said.getvalue().splitlines()) != len(dataset):
        raise RuntimeError(f"{len(said.getvalue().splitlines())} captions for {len(dataset)} images")
    load, model = sum(loading), sum(in_model)
    captioning = total - load
    result = {
        "images": len(dataset), "threads": torch.get_num_threads(), "seconds": total, "seconds_of_loading": load,
        "seconds_in_the_model": model, "share_in_the_model": model / captioning,
        "share_of_all_in_the_model": model / total, "images_per_second": len(dataset) / captioning,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
