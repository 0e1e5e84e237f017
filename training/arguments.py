"""Command lines of the stages: `python -m training.STAGE [recipe.yaml] [--flag value ...]`, flags win over the recipe."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import yaml
from transformers import HfArgumentParser


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "folder or Hub id with `image` and `captions` columns"})
    train_split: str = field(default="train", metadata={"help": "split to train on, and to hold back from"})
    max_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images"})
    held_back: int = field(
        default=400, metadata={"help": "training images kept out of training, on which everything is tuned"}
    )
    views: int = field(default=4, metadata={"help": "cached views an image: 1 plain, 2 mirrored, more: random crops"})
    cache_dir: str = field(default="runs/features", metadata={"help": "where outputs of the vision tower are kept"})


@dataclass
class MeasureArguments:
    """What every stage that measures a finished model on a split takes."""

    model: str = field(metadata={"help": "folder or Hub id of a BLIP-RBM"})
    dataset: str = field(metadata={"help": "folder or Hub id with `image` and `captions` columns"})
    output: str = field(metadata={"help": "results file, JSON; a picture of it, if there is one, stands beside it"})
    split: str = field(default="validation", metadata={"help": "split to measure on, unseen in training"})
    max_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images"})
    cache_dir: str = field(default="runs/features", metadata={"help": "where outputs of the vision tower are kept"})


@dataclass
class CaptionerArguments:
    model: str = field(metadata={"help": "folder or Hub id of the captioner to train, from training.build_captioner"})
    dropout: float = field(default=0.1, metadata={"help": "in the decoder"})
    image_token_dropout: float = field(default=0.0, metadata={"help": "share of image tokens hidden in a step"})
    label_smoothing: float = field(default=0.1, metadata={"help": "over the word-pieces that occur in training"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights, which are what is kept"})
    full_vocabulary_share: float = field(
        default=0.1, metadata={"help": "last share of the steps with the softmax over the whole vocabulary"}
    )
    unigram_bias: bool = field(
        default=True,
        metadata={"help": "start the output bias at the words' frequencies; false to go on from a trained one"},
    )
    samples: int = field(
        default=0, metadata={"help": "captions sampled an image for minimum-risk training; 0: train on the references"}
    )
    reference_weight: float = field(
        default=0.1, metadata={"help": "in minimum-risk training, weight of the usual loss on one reference"}
    )
    eval_beams: int = field(default=3, metadata={"help": "beams with which the held-back images are captioned"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest caption"})


def parse_arguments(*argument_classes):
    """Instances of the dataclasses from a recipe (YAML, optional first argument) and flags.

    Raises:
        SystemExit: with the message of argparse, or if the recipe has a key that no flag has.
    """
    parser, argv = HfArgumentParser(argument_classes), sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(argv[0]).read_text()) or {}
        known = {name for action in parser._actions for name in action.option_strings}
        unknown = sorted(key for key in recipe if f"--{key}" not in known)
        if unknown:
            parser.error(f"{argv[0]} has keys that are no flags of this stage: {', '.join(unknown)}")
        flags = []
        for key, value in recipe.items():
            flags += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        argv = flags + argv[1:]
    return parser.parse_args_into_dataclasses(args=argv)
