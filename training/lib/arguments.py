"""Command lines of the stages: `python -m training.STAGE [recipe.yaml] [--flag value ...]`, flags win over the
recipe."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import yaml
from transformers import HfArgumentParser

from training.lib.mixture import DataSource, parse_source


def bf16_is_fast() -> bool:
    """Whether products in bf16 are faster than in fp32 here, by what the processor has: the same answer in every
    process.

    Two cores of each, matrix products of 2,048, GFLOP/s (docs/experiments/):

    | processor                        | fp32 | bf16        |
    |----------------------------------|------|-------------|
    | Xeon with AMX                    |  300 | 800 to 1,100|
    | EPYC Zen 4, AVX-512 with bf16    |  151 | 420         |
    | Xeon, AVX-512 without bf16       |  327 | 165         |
    | EPYC without AVX-512             |      | emulated    |
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@dataclass
class SourceArguments:
    """Where image-caption pairs come from, see `training/lib/pairs.py`."""

    dataset: str = field(metadata={"help": "Hub id, folder, or data file (see training/lib/readers.py)"})
    image_dir: Optional[str] = field(
        default=None, metadata={"help": "folder that relative image paths are meant from, if not the data file's"}
    )
    image_column: Optional[str] = field(default=None, metadata={"help": "its name, if it is not found by itself"})
    caption_column: Optional[str] = field(default=None, metadata={"help": "its name, if it is not found by itself"})

    @property
    def columns(self) -> dict:
        names = ("image_column", "caption_column", "image_dir")
        return {name: getattr(self, name) for name in names}


@dataclass
class DataArguments(SourceArguments):
    dataset: list[str] = field(
        metadata={
            "nargs": "+",
            "help": "Hub ids, folders, or data files (training/lib/readers.py), each with ,weight= ,source= ,text= or ,without= behind "
            "it if need be (training/lib/mixture.py)",
        }
    )
    train_split: str = field(default="train", metadata={"help": "split to train on, and to hold back from"})
    max_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images"})
    held_back: int = field(
        default=400,
        metadata={
            "help": "training images kept out of training, on which everything is tuned: as many of each data set"
        },
    )
    views: int = field(default=4, metadata={"help": "cached views an image: 1 plain, 2 mirrored, more: random crops"})
    cache_dir: str = field(default="runs/features", metadata={"help": "where outputs of the vision tower are kept"})
    encode_dtype: str = field(
        default="auto",
        metadata={
            "help": "in which the tower encodes training views: float32, bfloat16, or auto: as cached, else the faster one here"
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "read the data once, keep features and captions only: for data larger than the disk"},
    )

    @property
    def sources(self) -> list[DataSource]:
        return [parse_source(entry) for entry in ([self.dataset] if isinstance(self.dataset, str) else self.dataset)]


@dataclass(kw_only=True)
class MeasureArguments(SourceArguments):
    """What every stage that measures a finished model on a split takes."""

    model: str = field(metadata={"help": "folder or Hub id of a BLIP-RBM"})
    output: str = field(metadata={"help": "results file, JSON; a picture of it, if there is one, stands beside it"})
    split: str = field(default="validation", metadata={"help": "split to measure on, unseen in training"})
    max_images: Optional[int] = field(default=None, metadata={"help": "use only the first so many images"})
    cache_dir: str = field(default="runs/features", metadata={"help": "where outputs of the vision tower are kept"})


@dataclass
class CaptionerArguments:
    model: str = field(metadata={"help": "folder or Hub id of the captioner to train, from training.build_captioner"})
    parts: str = field(
        default="captioner",
        metadata={
            "help": "what is trained, all else frozen: captioner (decoder and projector), cross_attention (projector and the decoder's "
            "cross-attention), lora (low-rank changes of the decoder's attention, merged when saved), refine (the RBM layer's)",
            "choices": ["captioner", "cross_attention", "lora", "refine"],
        },
    )
    aligned: Optional[str] = field(
        default=None,
        metadata={
            "help": "output of training.align on this tower alone: cached tokens go through its image layer first, so that "
            "the captioner sees the aligned space (its tower must be built with --aligned too)"
        },
    )
    folds: int = field(
        default=1, metadata={"help": "parts of the training images, of which one is left out if there are several"}
    )
    fold: int = field(
        default=0,
        metadata={"help": "the part that is left out, for which another stage may have captions written"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the changes with --parts lora"})
    cause_tokens: int = field(default=4, metadata={"help": "m, of refine"})
    of_the_image: bool = field(
        default=False,
        metadata={"help": "leave out training captions with digits, dates, addresses or agencies, as the web's have"},
    )
    captions_at_once: int = field(
        default=0,
        metadata={"help": "of an image with more captions a step takes so many, drawn anew: shorter epochs; 0: all"},
    )
    dropout: float = field(default=0.1, metadata={"help": "in the decoder"})
    image_token_dropout: float = field(default=0.0, metadata={"help": "share of image tokens hidden in a step"})
    dim_images: float = field(
        default=0.0,
        metadata={
            "help": "share of the images of which a step sees a tenth of the tokens, so that class tokens are read"
        },
    )
    token_dropout: float = field(
        default=0.0,
        metadata={"help": "share of the words so far that the decoder sees as [MASK], so that it looks at the image"},
    )
    tower_learning_rate: float = field(
        default=0.0,
        metadata={
            "help": "of the vision tower, which then sees a new random crop of each image; 0: frozen, cached features"
        },
    )
    tower_share: float = field(
        default=1.0,
        metadata={
            "help": "last share of the tower's parameters that is trained: the first layers cost most, learn least"
        },
    )
    label_smoothing: float = field(default=0.1, metadata={"help": "over the word-pieces that occur in training"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the averaged weights, which are what is kept"})
    full_vocabulary_share: float = field(
        default=0.1, metadata={"help": "last share of the steps with the softmax over the whole vocabulary"}
    )
    unigram_bias: bool = field(
        default=True,
        metadata={"help": "start the output bias at the words' frequencies; false to go on from a trained one"},
    )
    eval_beams: int = field(default=3, metadata={"help": "beams with which the held-back images are captioned"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest caption"})


def recipe_flags(parser: HfArgumentParser, file: str) -> list[str]:
    """The flags that a recipe (YAML) stands for. What is wrong with it is an error of `parser`."""
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"the recipe cannot be read: {error}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{file} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(recipe, dict):
        parser.error(f"{file} must have a line `flag: value` for each setting, but holds {recipe!r:.60}")
    known = {name for action in parser._actions for name in action.option_strings}
    unknown = sorted(str(key) for key in recipe if f"--{key}" not in known)
    if unknown:
        parser.error(f"{file} has keys that are no flags of this stage: {', '.join(unknown)}")
    flags = []
    for key, value in recipe.items():
        flags += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


def parse_arguments(*argument_classes):
    """Instances of the dataclasses from a recipe (YAML, optional first argument) and flags, which win over it.

    Raises:
        SystemExit: with the message of argparse, or if the recipe has a key that no flag has.
    """
    parser, argv = HfArgumentParser(argument_classes), sys.argv[1:]
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = recipe_flags(parser, argv[0]) + argv[1:]
    if getattr(parser.parse_args(argv), "bf16", False) and not bf16_is_fast():
        print("bf16 is slower than fp32 on this processor: training in fp32", file=sys.stderr)
        argv = [*argv, "--bf16", "false"]
    if not torch.cuda.is_available() and "--use_cpu" in (o for a in parser._actions for o in a.option_strings):
        argv = ["--use_cpu", "true", *argv]  # bf16 on a machine without accelerator wants it said
    return parser.parse_args_into_dataclasses(args=argv)
