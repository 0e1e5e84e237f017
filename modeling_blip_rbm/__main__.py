"""Captions for images, by a BLIP with a restricted Boltzmann machine: `blip-rbm caption photo.jpg`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from PIL import Image
from transformers.utils import logging

from modeling_blip_rbm import __version__
from modeling_blip_rbm.cli import caption, search
from modeling_blip_rbm.cli.console import complain
from modeling_blip_rbm.cli.reading import read_heic
from modeling_blip_rbm.files import image_files


EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "blip-rbm-small"
EXAMPLES = """
examples:
  blip-rbm caption photo.jpg
  blip-rbm caption holiday/ --output txt
  blip-rbm search holiday/ "two dogs on a beach"
  blip-rbm energy holiday/
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blip-rbm",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"blip-rbm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    model = os.environ.get("BLIP_RBM_MODEL") or (str(EMBEDDED_MODEL) if EMBEDDED_MODEL.is_dir() else None)
    for command in (caption, search):
        command.add_parser(commands, model)
    return parser


def main(argv=None) -> int:
    args = parser().parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # large photographs are decoded smaller
    warnings.filterwarnings("ignore", module="transformers")  # advice to those who write the code
    read_heic()
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
