"""`blip-rbm search` and `blip-rbm energy`: a folder's images, ordered by how well the RBM thinks they go with a text, or by how unlike they are
to what it knows."""

import json
import textwrap
from pathlib import Path

import torch

from modeling_blip_rbm.cli import arguments
from modeling_blip_rbm.cli.arguments import whole_number
from modeling_blip_rbm.cli.console import Report, complain, json_line, say
from modeling_blip_rbm.cli.index import NAME, Index
from modeling_blip_rbm.cli.models import load
from modeling_blip_rbm.cli.sheet import write_sheet
from modeling_blip_rbm.files import find_images
from modeling_blip_rbm.rbm import pairwise_mutual_information


SEARCH_EXAMPLES = """
A line is "score file", the best image first: the pointwise mutual information
of the image and the text's words by the RBM, in nats. Above 0, the image makes
the words likelier. Words that the RBM does not know are named and left out; the
order of words does not count. What the RBM makes of the images is kept in
the folder (.blip-rbm-index.safetensors), so that the next search takes a moment.

examples:
  blip-rbm search holiday/ "two dogs on a beach"
  blip-rbm search holiday/ "snow" --top 50 --html snow.html
  blip-rbm search holiday/ "a boat" --json | jq -r .image
"""
ENERGY_EXAMPLES = """
A line is "energy file", in nats, the highest first. Of an RBM that reads all
tokens of an image (the embedded one) it is the relative free energy, minus the
logarithm of a likelihood ratio: high where the RBM finds few causes in the image.
Of an RBM that reads the pooled image it is the free energy: high far from the
training images. A caption may be wrong where it is low, and right where it is
high. Only the order, and differences of one model, mean something. {measured}
examples:
  blip-rbm energy holiday/ | head
  blip-rbm energy holiday/ --top 24 --html unlike.html
"""


LITTLE_WORDS = ("a", "an", "the", "of", "on", "in", "at", "to", "with", "and", "is", "are")  # never the RBM's


def indexed(args) -> tuple[Index, Report, object, object]:
    """The index of the folder, a report of what could not be read, model and processor.

    Raises:
        ValueError: if there is no such folder or no image in it.
    """
    folder = Path(args.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files, errors = find_images([folder])
    for error in errors:
        complain(error)
    if not files:
        raise ValueError(f"{folder}: there is nothing to look at")
    device = arguments.chosen_device(args.device)
    model, processor = load(args.model, args.dtype, retrieval=True)
    model.to(device)
    index, report = Index(folder, args.index or folder / NAME, model), Report()
    report.counts["failed"] += len(errors)
    index.renew(files, model, processor, args.batch_size or (8 if device == "cpu" else 64), report)
    return index, report, model, processor


@torch.no_grad()
def search_command(args) -> int:
    """Print the images that go best with a text. Returns the exit code: 0, or 2 if something could not be read."""
    if not args.text.strip():
        raise ValueError("the text to search for is empty")
    index, report, model, processor = indexed(args)
    if not model.config.rbm_word_ids:
        raise ValueError(f"{args.model}: its RBM knows no words, so it cannot search")
    words = known_words(args.text, model, processor)
    scores = pairwise_mutual_information(model.rbm_parameters(), index.hidden_input.to(model.device), words)[:, 0]
    return show(args, index, scores.cpu(), report, args.text)


def known_words(text: str, model, processor) -> torch.Tensor:
    """w (1, K): which of the RBM's words the text has. Names those that it does not know.

    Raises:
        ValueError: if it knows none.
    """
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, known = encoded["input_ids"], set(model.config.rbm_word_ids)
    if not known & set(tokens):
        raise ValueError(f"the RBM knows no word of {text!r}: use others, such as dog, beach, red")
    spans = (text[slice(*span)] for token, span in zip(tokens, encoded["offset_mapping"]) if token not in known)
    if unknown := [word for word in dict.fromkeys(spans) if word.lower() not in LITTLE_WORDS]:
        complain(f"the RBM has no word for {', '.join(unknown)}, which does not count")
    return model.get_text_features(torch.tensor([tokens], device=model.device))


def energy_command(args) -> int:
    """Print the images, those most unlike what the RBM knows first. Returns the exit code."""
    index, report, _, _ = indexed(args)
    return show(args, index, index.energy, report, "Images unlike what the model knows")


def measured(model: str | None) -> str:
    """Which images the energy of a model tells apart, by the results file in its folder; nothing if there is none."""
    try:
        unlike = json.loads((Path(model or "") / "confidence.json").read_text())["unlike"]
        said = ", ".join(f"{kind} {one['auc']:.2f}" for kind, one in unlike["auc"][unlike["sorted_by"]].items())
        chance = f"Measured on this model against {unlike['inside']} (AUC; 0.5 as by chance): {said}."
    except (OSError, ValueError, KeyError):
        return ""
    return f"\n\n{textwrap.fill(chance, 80)}\n"


def show(args, index: Index, scores: torch.Tensor, report: Report, title: str) -> int:
    """Print the images in the order of their scores (N,), the highest first."""
    files = index.files
    best = torch.sort(scores, descending=True, stable=True).indices[: args.top].tolist()
    for i in best:
        name, score = str(files[i]), float(scores[i])
        say(json_line({"image": name, args.score: score}) if args.json else f"{score:.2f} {name}")
    if args.html:
        write_sheet(args.html, title, [(files[i], f"{float(scores[i]):.2f}") for i in best])
    return 2 if report.counts["failed"] else 0


def add_parser(commands, model: str | None):
    """Add `search` and `energy` to the commands."""
    search = arguments.add_command(commands, "search", "find a folder's images by a text", SEARCH_EXAMPLES)
    does = "sort a folder's images by how unlike they are to what the model knows"
    energy = arguments.add_command(commands, "energy", does, ENERGY_EXAMPLES.format(measured=measured(model)))
    for parser in (search, energy):
        parser.add_argument("folder", metavar="FOLDER", help="its images, and all below it")
    search.add_argument("text", metavar="TEXT", help='what is looked for, such as "two dogs on a beach"')
    search.set_defaults(run=search_command, score="score")
    energy.set_defaults(run=energy_command, score="energy")
    for parser, top in ((search, 10), (energy, None)):
        arguments.add_model(parser, model)
        group = parser.add_argument_group("output")
        group.add_argument(
            "--top", type=whole_number(1), metavar="N", default=top, help=f"so many images (default: {top or 'all'})"
        )
        group.add_argument("--json", action="store_true", help="one JSON object a line")
        group.add_argument("--html", type=Path, metavar="FILE", help="write a page with the images as well")
        group = parser.add_argument_group("speed")
        group.add_argument("--index", type=Path, metavar="FILE", help=f"the index (default: {NAME} in the folder)")
        arguments.add_batch_size(group)
