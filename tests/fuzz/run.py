"""Runs the cases and counts how they end."""

import contextlib
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
from transformers.utils import logging

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from tests.conftest import RBM_SETTINGS, TEXT_CONFIG, VISION_CONFIG, random_image, randomise, tiny_tokenizer
from tests.fuzz import cases
from tests.fuzz.cases import Case


ENDS = ("right", "refused", "raw", "silent", "hanging")
SECONDS = 60


class Hanging(BaseException):
    """Not an Exception, so that nothing catches it on the way."""


@contextlib.contextmanager
def at_most(seconds: int):
    def stop(*args):
        raise Hanging

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def end_of(case: Case) -> tuple[str, str]:
    """How the case ends, and what was said."""
    try:
        with at_most(SECONDS):
            result = case.call()
            return ("right", "") if case.right(result) else ("silent", repr(result)[:120])
    except case.refusals as error:
        said = str(error).strip()
        return ("refused", said.splitlines()[0][:120]) if len(said) > 15 else ("raw", repr(error)[:120])
    except Hanging:
        return "hanging", f"no result after {SECONDS} seconds"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"[:120]


def all_cases(folder: Path) -> Iterator[Case]:
    """Of all areas, with a tiny model of random weights."""
    torch.manual_seed(0)
    config = BlipConfig(vision_config=VISION_CONFIG, text_config=TEXT_CONFIG)
    blip = randomise(BlipForConditionalGeneration(config))
    model = BlipRBMForConditionalGeneration.from_blip(blip, **RBM_SETTINGS)
    randomise(model.rbm_layer.rbm)
    processor = BlipRBMProcessor(BlipImageProcessor(size={"height": 24, "width": 24}), tiny_tokenizer())
    saved, picture = folder / "model", folder / "photo.png"
    model.save_pretrained(saved), processor.save_pretrained(saved)
    random_image().save(picture)
    expected = processor.captions(model.generate(**processor(images=picture), max_new_tokens=7))
    places = {name: folder / name for name in ("images", "checkpoints", "data", "commands")}
    for place in places.values():
        place.mkdir()
    yield from cases.images(places["images"])
    yield from cases.generate_arguments(model, torch.randn(5, 3, 24, 24))
    yield from cases.config_fields()
    yield from cases.checkpoints(saved, places["checkpoints"], expected, picture)
    yield from cases.data_files(places["data"])
    yield from cases.command_lines(saved, places["commands"], picture)


def run_all() -> tuple[dict[str, Counter], list[str]]:
    """Of every area how many cases ended how, and a line on each that ended badly."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    counts, bad = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for case in all_cases(Path(folder)):
            end, said = end_of(case)
            counts.setdefault(case.area, Counter())[end] += 1
            if end not in ("right", "refused"):
                bad.append(f"{case.area}: {case.name}: {end}: {said}")
    return counts, bad


def table(counts: dict[str, Counter]) -> str:
    lines = ["| area | cases | " + " | ".join(ENDS) + " |", "|---" * (len(ENDS) + 2) + "|"]
    total = sum(counts.values(), Counter())
    for area, ends in [*counts.items(), ("**all**", total)]:
        lines.append(f"| {area} | {sum(ends.values())} | " + " | ".join(str(ends[end]) for end in ENDS) + " |")
    return "\n".join(lines)
