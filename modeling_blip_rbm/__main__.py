"""The command line: `python -m modeling_blip_rbm caption photo.jpg`, or `blip-rbm caption photo.jpg`."""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_blip_rbm import (
    BlipRBMForConditionalGeneration,
    BlipRBMImageToTextPipeline,
    BlipRBMProcessor,
    load_image,
)


IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}
EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "blip-rbm-small"


def image_files(paths: list[str]) -> list[Path]:
    """The files named, and in place of every folder the image files below it, sorted.

    Raises:
        ValueError: if a folder holds no image.
    """
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
            if not inside:
                raise ValueError(f"{path}: no image in this folder (looked for {' '.join(sorted(IMAGE_ENDINGS))})")
            files += inside
        else:
            files.append(path)
    return files


def read_images(files: list[Path]) -> tuple[dict, list[ValueError]]:
    """Images by file, and what was wrong with the others."""
    images, errors = {}, []
    for file in files:
        try:
            images[file] = load_image(file)
        except ValueError as error:
            errors.append(error)
    return images, errors


def batches_ahead(files: list[Path], batch_size: int):
    """(number of files, images, errors) of one batch after the other, the next one read while the model has this one."""
    parts = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(read_images, parts[0]) if parts else None
        for part, following in zip(parts, [*parts[1:], []]):
            images, errors = reading.result()
            reading = reader.submit(read_images, following)
            yield len(part), images, errors


def print_captions(file, captions, as_json: bool):
    if as_json:
        print(json.dumps({"image": str(file), "captions": captions}, ensure_ascii=False))
        return
    for caption in captions:
        print(f"{file}: {caption['generated_text']}")


def caption_command(args) -> int:
    """Caption what can be read. Returns the exit code: 0, or 2 if something could not be read."""
    failures = 0

    def complain(error):
        nonlocal failures
        failures += 1
        tqdm.write(f"blip-rbm: {error}", file=sys.stderr)

    files = []
    for path in args.images:
        try:
            files += image_files([path])
        except ValueError as error:
            complain(error)
    try:
        model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
        processor = BlipRBMProcessor.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        complain(error)
        return 2
    model.optimize_for_inference(int8=args.int8)
    captioner = BlipRBMImageToTextPipeline(model=model, processor=processor)
    settings = {"rbm": not args.plain, "num_return_sequences": args.num_captions}
    settings["num_beams"] = max(args.num_beams or model.generation_config.num_beams or 1, args.num_captions)
    with tqdm(total=len(files), desc="caption", unit="image", disable=None) as bar:
        for number, images, errors in batches_ahead(files, args.batch_size):
            for error in errors:
                complain(error)
            if images:
                try:
                    outputs = captioner(
                        list(images.values()),
                        batch_size=len(images),
                        prompt=args.prompt,
                        top_words=args.words,
                        **settings,
                    )
                except ValueError as error:  # such as a prompt that is too long: the same for every image
                    complain(error)
                    return 2
                for file, captions in zip(images, outputs):
                    print_captions(file, captions, args.json)
            bar.update(number)
    return 2 if failures else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="blip-rbm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    caption = commands.add_parser("caption", help="caption images, or the images in folders")
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image file or folder")
    caption.add_argument(
        "--model",
        default=os.environ.get("BLIP_RBM_MODEL") or str(EMBEDDED_MODEL),
        help="folder or Hub id (default: $BLIP_RBM_MODEL, or the checkpoint in this repository)",
    )
    caption.add_argument("--num-captions", type=int, default=1, metavar="N", help="captions an image, best first")
    caption.add_argument("--num-beams", type=int, default=None, metavar="N", help="default: the model's")
    caption.add_argument("--prompt", help="how every caption begins, such as 'a photo of'")
    caption.add_argument("--words", type=int, default=5, metavar="N", help="the RBM's words in --json (default: 5)")
    caption.add_argument("--json", action="store_true", help="a JSON object a line, with scores and the RBM's words")
    caption.add_argument("--plain", action="store_true", help="RBM off: plain BLIP")
    caption.add_argument("--int8", action="store_true", help="linear layers in 8 bits: faster, captions a little other")
    caption.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    caption.set_defaults(run=caption_command)
    args = parser.parse_args(argv)
    for name in ("num_captions", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be at least 1")
    logging.disable_progress_bar()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
