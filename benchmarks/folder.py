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
from training.checkpoints import write_json
from training.pairs import load_pairs


class Watch:
    """Adds up the seconds spent in a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start

    def __get__(self, instance, owner=None):  # takes the place of a method
        return self if instance is None else lambda *args, **kwargs: self(instance, *args, **kwargs)


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
        model, load = Watch(BlipRBMImageToTextPipeline._forward), Watch(BlipRBMForConditionalGeneration.from_pretrained)
        said = io.StringIO()
        with (
            mock.patch.object(BlipRBMImageToTextPipeline, "_forward", model),
            mock.patch.object(BlipRBMForConditionalGeneration, "from_pretrained", load),
            contextlib.redirect_stdout(said),
        ):
            start = time.perf_counter()
            if command_line(["caption", folder]):
                raise RuntimeError("the command failed")
            total = time.perf_counter() - start
    if len(said.getvalue().splitlines()) != len(dataset):
        raise RuntimeError(f"{len(said.getvalue().splitlines())} captions for {len(dataset)} images")
    captioning = total - load.seconds
    result = {
        "images": len(dataset), "threads": torch.get_num_threads(), "seconds": total, "seconds_of_loading": load.seconds,
        "seconds_in_the_model": model.seconds, "share_in_the_model": model.seconds / captioning,
        "share_of_all_in_the_model": model.seconds / total, "images_per_second": len(dataset) / captioning,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
