"""Arguments that the commands share, and how their values are checked."""

import argparse
import codecs
import math
import os
import sys

import torch


DEVICE = r"auto, cpu, cuda, cuda:N or mps"
# what torchrun, accelerate launch and MPI tell a process of its place
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # of files that someone may pipe in place of names


def whole_number(least: int):
    """What argparse checks an argument by."""

    def of(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, and at least {least}")
        return int(text)

    return of


def number(above: float, most: float = math.inf, including: bool = False):
    """What argparse checks a number by: more than `above` (or as much, if `including`), at most `most`."""

    def of(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not ((value >= above if including else value > above) and value <= most and math.isfinite(value)):
            least = f"{'at least' if including else 'more than'} {above:g}"
            greatest = "" if most == math.inf else f", and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a number, {least}{greatest}")
        return value

    return of


def batch_size(text: str) -> int | None:
    """A number, or None for auto."""
    if text == "auto":
        return None
    try:
        return whole_number(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


def device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("auto", "cpu", "cuda", "mps") or (index and (kind != "cuda" or not index.isdecimal())):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: {DEVICE}")
    return text


def chosen_device(name: str) -> str:
    """The device that is meant: `auto` is an accelerator if there is one, and of several each process has its own.

    Raises:
        ValueError: if there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name.partition(":")[0]]:
        raise ValueError(f"--device {name}: this PyTorch has no such device; --device auto takes what there is")
    if name == "cuda":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    return name


def place() -> tuple[int, int]:
    """(number of this process, how many there are) as torchrun, `accelerate launch` and MPI say it; (0, 1) without them."""
    rank, size = (
        next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), default)
        for names, default in ((RANKS, 0), (SIZES, 1))
    )
    return (rank, size) if rank < size else (0, 1)


def named_on_input(paths: list[str]) -> list[str]:
    """The paths, with those of standard input in the place of "-": one a line, or ended by NUL as `find -print0` does.

    Raises:
        ValueError: if an image is piped in.
    """
    named = []
    for path in paths:
        if path != "-":
            named.append(path)
            continue
        content = getattr(sys.stdin, "buffer", sys.stdin).read()
        content = content if isinstance(content, bytes) else os.fsencode(content)
        if content.startswith(IMAGE_STARTS):
            raise ValueError("standard input is an image, but names of files are read there, one a line: give the file")
        content = content.removeprefix(codecs.BOM_UTF8)  # of lists that Windows writes
        names = content.split(b"\0") if b"\0" in content else content.splitlines()
        named += [os.fsdecode(name) for name in names if name.strip()]
    return named


def add_command(commands, name: str, does: str, epilog: str) -> argparse.ArgumentParser:
    """The parser of a command. `does`: what it does, in lower case; `epilog`: its examples, as they are."""
    return commands.add_parser(
        name,
        help=does,
        description=f"{does[0].upper()}{does[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model(parser: argparse.ArgumentParser, model: str | None):
    """--model, --device and --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=model,
        help="folder or Hub id (default: $BLIP_RBM_MODEL, or the checkpoint of this repository)",
    )
    group.add_argument("--device", type=device, default="auto", help=f"{DEVICE} (default: auto, the fastest there is)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="numbers of the model (default: auto, as its checkpoint has them)",
    )


def add_batch_size(group):
    group.add_argument(
        "--batch-size",
        type=batch_size,
        metavar="N",
        help="images at a time (default: auto: 8 on a CPU, else 64)",
    )
