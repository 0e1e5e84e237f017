"""Captions for images, by a BLIP with a restricted Boltzmann machine: `blip-rbm caption photo.jpg`."""

import argparse
import json
import os
import sys
import unicodedata
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig
from transformers.utils import logging

from modeling_blip_rbm import (
    BlipRBMForConditionalGeneration,
    BlipRBMImageToTextPipeline,
    BlipRBMProcessor,
    __version__,
)
from modeling_blip_rbm.files import find_images, image_files


EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "blip-rbm-small"
EXAMPLES = """
A line on standard output is "file: caption". With --json it is an object,
{"image": file, "captions": [{"generated_text": ..., "score": ...}]}, which
training.pairs reads. In folders, hidden files are passed over and links
followed. A file named twice is captioned once. What cannot be read is named
on standard error, and the rest is captioned.

exit code:
  0  everything was captioned
  2  something could not be read, or an argument is wrong

examples:
  blip-rbm caption photo.jpg holiday/
  blip-rbm caption holiday/ --json > captions.jsonl
  blip-rbm caption photo.jpg --num-captions 3 --prompt "a photo of"
  blip-rbm caption photo.jpg --model org/blip-rbm
"""


def shown(text: str, encoding: str | None = "utf-8") -> str:
    """Text as one line that a terminal only displays: line breaks, escape codes and what it cannot encode are escaped."""
    kept = lambda c: c.isprintable() or unicodedata.category(c) == "Zs"
    text = "".join(c if kept(c) else ascii(c)[1:-1] for c in str(text))
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def complain(error):
    """One line on standard error."""
    tqdm.write(f"blip-rbm: {shown(' '.join(str(error).split()), sys.stderr.encoding)}", file=sys.stderr)


def print_captions(file, captions, as_json: bool):
    """At once: what is stopped later has printed what it has done."""
    encoding = sys.stdout.encoding
    if as_json:
        entry = {"image": str(file), "captions": captions}
        line = json.dumps(entry, ensure_ascii=False)
        lines = [line if shown(line, encoding) == line else json.dumps(entry)]  # which escapes so that JSON reads it
    else:
        lines = [shown(f"{file}: {caption['generated_text']}", encoding) for caption in captions]
    for line in lines:
        tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def read_ahead(read, files: list[Path], number: int):
    """(file, what `read` gives of it or the ValueError that it raises) of one file after the other, up to `number` of them read ahead."""

    def attempt(file):
        try:
            return read(file)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(1) as reader:
        reading = deque()
        try:
            for file in [*files, *[None] * number]:
                reading.append((file, file and reader.submit(attempt, file)))
                if len(reading) > number:
                    file, content = reading.popleft()
                    yield file, content.result()
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def load_captioner(name: str | None, int8: bool) -> BlipRBMImageToTextPipeline:
    """
    Raises:
        ValueError: in one sentence, whatever is wrong with the model.
    """
    if name is None:
        raise ValueError(
            "no model: this installation has none beside it. Give --model, a folder or a Hub id, or set BLIP_RBM_MODEL"
        )
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise ValueError(f"{name}: no such folder, and no Hub id, which would be of the form user/name")
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in ("blip_rbm", "blip"):
            raise ValueError(f"it is a {kind}, not a BLIP-RBM")
        model = BlipRBMForConditionalGeneration.from_pretrained(name)
        processor = BlipRBMProcessor.from_pretrained(name)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{name}: cannot be loaded as a BLIP-RBM ({type(error).__name__}: {error})") from error
    return BlipRBMImageToTextPipeline(model=model.eval().optimize_for_inference(int8=int8), processor=processor)


def caption_command(args) -> int:
    """Caption what can be read. Returns the exit code: 0, or 2 if something could not be read."""
    files, errors = find_images(args.images)
    for error in errors:
        complain(error)
    if not files:
        return 2
    captioner = load_captioner(args.model, args.int8)
    beams = args.num_beams or captioner.model.generation_config.num_beams or 1
    settings = {"num_beams": max(beams, args.num_captions), "num_return_sequences": args.num_captions}
    captioned = deque()
    with tqdm(total=len(files), desc="caption", unit="image", disable=None) as bar:

        def report(error):
            errors.append(error)
            complain(error)

        def readable():
            for file, content in read_ahead(captioner.preprocess, files, 2 * args.batch_size):
                if isinstance(content, ValueError):
                    report(content)
                    bar.update()
                else:
                    captioned.append(file)
                    yield content

        for captions in captioner(
            readable(),
            batch_size=args.batch_size,
            prompt=args.prompt,
            top_words=args.words,
            rbm=not args.plain,
            **settings,
        ):
            print_captions(captioned.popleft(), captions, args.json)
            bar.update()
    return 2 if errors else 0


def whole_number(least: int):
    """What argparse checks an argument by."""

    def of(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, and at least {least}")
        return int(text)

    return of


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blip-rbm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"blip-rbm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    caption = commands.add_parser(
        "caption",
        help="caption images, or the images in folders",
        description="Caption images, or the images in folders.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    caption.add_argument("images", nargs="+", metavar="IMAGE", help="image file or folder")
    model = os.environ.get("BLIP_RBM_MODEL") or (str(EMBEDDED_MODEL) if EMBEDDED_MODEL.is_dir() else None)
    caption.add_argument(
        "--model",
        default=model,
        help="folder or Hub id (default: $BLIP_RBM_MODEL, or the checkpoint of this repository)",
    )
    group = caption.add_argument_group("captions")
    several = {"type": whole_number(1), "metavar": "N"}
    group.add_argument("--num-captions", default=1, help="captions of an image, best first (default: 1)", **several)
    group.add_argument("--prompt", metavar="TEXT", help="how every caption begins, such as 'a photo of'")
    group.add_argument("--plain", action="store_true", help="without the RBM: plain BLIP")
    group.add_argument("--num-beams", help="beams of beam search (default: the model's)", **several)
    group = caption.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object a line, with scores and the RBM's words")
    group.add_argument(
        "--words",
        type=whole_number(0),
        metavar="N",
        default=5,
        help="the RBM's words of an image in --json (default: 5)",
    )
    group = caption.add_argument_group("speed")
    group.add_argument("--batch-size", default=8, help="images at a time (default: 8)", **several)
    group.add_argument("--int8", action="store_true", help="linear layers in 8 bits: faster, and captions may differ")
    caption.set_defaults(run=caption_command)
    return parser


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large photographs are decoded smaller
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    try:
        return args.run(args)
    except BrokenPipeError:  # whoever reads the captions wants no more, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 141
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        complain(error)
        return 2


__all__ = ["EMBEDDED_MODEL", "image_files", "main"]

if __name__ == "__main__":
    sys.exit(main())
