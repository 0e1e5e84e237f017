"""`blip-rbm caption`: captions of images, to the terminal or to files."""

import string
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_blip_rbm.cli import arguments
from modeling_blip_rbm.cli.arguments import number, whole_number
from modeling_blip_rbm.cli.console import Report, complain
from modeling_blip_rbm.cli.models import load_captioner
from modeling_blip_rbm.cli.outputs import Beside, new_output
from modeling_blip_rbm.cli.reading import read_ahead, read_frames
from modeling_blip_rbm.files import find_images


EXAMPLES = """
images: files, folders (with all below them; hidden files are passed over,
links followed once), quoted patterns ("photos/**/*.jpg"), addresses
(https://...), zip and tar archives, and - for names on standard input. What
cannot be read is named on standard error, and the rest is captioned.

output: without --output, lines "file: caption", or with --json objects
{"image": file, "captions": [{"generated_text": ..., "score": ...}]}.
With --output, captions are kept as they come. Ctrl-C loses none, and the same
command goes on where it was stopped. training.pairs reads every form.

several processes (torchrun --nproc_per_node 2 -m modeling_blip_rbm caption ...,
or accelerate launch on several GPUs) share the images among themselves.

exit code:
  0  everything was captioned
  2  something could not be read, or an argument is wrong

examples:
  blip-rbm caption photo.jpg holiday/
  blip-rbm caption holiday/ --output txt --prefix "sks dog,"
  blip-rbm caption holiday/ --output captions.csv --min-confidence 0.5
  blip-rbm caption "holiday/**/*.jpg" --output captions.jsonl --existing overwrite
  find . -newer last.txt -name '*.jpg' -print0 | blip-rbm caption - --json
  blip-rbm caption photo.jpg --num-captions 3 --sample --top-p 0.9 --seed 1
  blip-rbm caption photo.jpg --prompt "a photo of" --model org/blip-rbm
"""


def caption_command(args) -> int:
    """Caption what can be read. Returns the exit code: 0, or 2 if something could not be read."""
    rank, processes = arguments.place()
    settings = generation_settings(args)
    images, errors = find_images(arguments.named_on_input(args.images))
    for error in errors if rank == 0 else ():
        complain(error)
    if not images:
        return 2
    images = images[rank::processes]
    output = new_output(args, (rank, processes))
    if isinstance(output, Beside):
        output.check(images)
    failed = args.failed if processes == 1 else args.failed.with_suffix(f".{rank}{args.failed.suffix}")
    with output:
        report = Report(failed if args.output else None)
        try:
            left = [image for image in images if not output.has(image)]
            report.counts["skipped"] = len(images) - len(left)
            if left:
                captioner = load_captioner(args)
                check_confidence(args, captioner.model)
                settings["num_beams"] = number_of_beams(args, captioner.model)
                with tqdm(total=len(left), desc="caption", unit="image", disable=rank > 0 or None) as bar:
                    caption_all(captioner, left, output, report, bar, settings, args)
        finally:
            report.close()
            if sum(report.counts.values()) > 1 or args.output:
                report.summary(f"process {rank + 1} of {processes}: " if processes > 1 else "")
    return 2 if errors or report.counts["failed"] else 0


def caption_all(captioner, images: list, output, report: Report, bar, settings: dict, args):
    """Caption the images, write each when it is done, and count them."""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    batch = BatchSize(args.batch_size, captioner.device.type)
    prompt = {} if args.prompt is None else {"prompt": args.prompt}
    waiting = []  # (image, frame, whether it is the image's last, what the model takes)
    captions_of_image = []

    def caption_waiting():
        results = batch.run(captioner, [one[-1] for one in waiting], {**settings, **prompt})
        for (image, frame, last, _), captions in zip(waiting, results):
            captions_of_image.extend(caption | ({} if frame is None else {"frame": frame}) for caption in captions)
            if last:
                record = record_of(image, captions_of_image, args)
                output.write(image, record)
                report.counts["captioned" if record["captions"] else "withheld"] += 1
                bar.update()
                captions_of_image.clear()
        waiting.clear()

    read = lambda image: read_frames(captioner.preprocess, image, args.frames)
    for image, content in read_ahead(read, images, 2 * batch.size):
        if isinstance(content, ValueError):
            report.fail(image, content)
            bar.update()
            continue
        for frame, tensors in content:
            waiting.append((image, frame, frame == content[-1][0], tensors))
            if len(waiting) >= batch.size:
                caption_waiting()
    if waiting:
        caption_waiting()


class BatchSize:
    """How many images the model has at a time. If nobody said how many, it is halved when the accelerator's memory ends."""

    def __init__(self, asked: int | None, device: str):
        self.fixed = asked is not None
        self.size = asked or (8 if device == "cpu" else 64)

    def run(self, captioner, contents: list, settings: dict) -> list:
        """The captions of each."""
        results = []
        while len(results) < len(contents):
            some = contents[len(results) : len(results) + self.size]
            try:
                results += captioner(some, batch_size=len(some), **settings)
            except torch.cuda.OutOfMemoryError as error:
                if self.fixed or self.size == 1:
                    raise ValueError(f"memory ends at --batch-size {self.size}: give a smaller one") from error
                self.size = (self.size + 1) // 2
                torch.cuda.empty_cache()
        return results


def record_of(image, captions: list[dict], args) -> dict:
    """{"image", "captions"} with prefix and suffix; captions less sure than --min-confidence are in "withheld"."""
    record = {"image": str(image), "captions": []}
    for caption in captions:
        caption = caption | {"generated_text": with_affixes(caption["generated_text"], args.prefix, args.suffix)}
        sure = args.min_confidence is None or caption["confidence"] >= args.min_confidence
        record.setdefault("captions" if sure else "withheld", []).append(caption)
    return record


def with_affixes(caption: str, prefix: str, suffix: str) -> str:
    """The caption between both, with a space where words would touch."""
    if prefix and not prefix[-1].isspace():
        prefix += " "
    if suffix and not (suffix[0].isspace() or suffix[0] in string.punctuation):
        suffix = " " + suffix
    return f"{prefix}{caption}{suffix}"


def generation_settings(args) -> dict:
    """What `generate` is told.

    Raises:
        ValueError: if two options contradict each other.
    """
    given = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    sampling = {name: value for name, value in given.items() if value is not None}
    if sampling and not args.sample:
        raise ValueError(f"--{next(iter(sampling)).replace('_', '-')} is of sampling: give --sample as well")
    if args.min_length and args.max_length and args.min_length > args.max_length:
        raise ValueError(f"--min-length {args.min_length} is more than --max-length {args.max_length}")
    for name in ("prefix", "suffix"):
        if getattr(args, name).splitlines() not in ([], [getattr(args, name)]):
            raise ValueError(f"--{name} has several lines, but a caption is one")
    if args.output is not None and args.json:
        raise ValueError("--json is the form of standard output, and --output names a file: give one of them")
    lengths = {"min_new_tokens": args.min_length, "max_new_tokens": args.max_length}
    settings = {name: value for name, value in lengths.items() if value is not None} | sampling
    if args.sample:
        settings["do_sample"] = True
    return settings | {"num_return_sequences": args.num_captions, "top_words": args.words, "rbm": not args.plain}


def number_of_beams(args, model) -> int:
    """Of beam search as many as captions at least; of sampling one, unless more are asked for."""
    if args.sample:
        return args.num_beams or 1
    return max(args.num_beams or model.generation_config.num_beams or 1, args.num_captions)


def check_confidence(args, model):
    """Raises ValueError if --min-confidence is given and the model cannot say how sure it is."""
    if args.min_confidence is not None and model.config.rbm_confidence is None:
        raise ValueError(
            "--min-confidence: this model was never calibrated, so it cannot say how sure it is "
            "(training/evaluate_confidence.py does that)"
        )


def add_parser(commands, model: str | None):
    """Add `caption` to the commands."""
    parser = arguments.add_command(commands, "caption", "caption images, or the images in folders", EXAMPLES)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder, pattern, address, archive, or -")
    arguments.add_model(parser, model)
    add_caption_options(parser.add_argument_group("captions"))
    add_output_options(parser.add_argument_group("output"))
    group = parser.add_argument_group("speed")
    arguments.add_batch_size(group)
    group.add_argument("--int8", action="store_true", help="linear layers in 8 bits: faster, and captions may differ")
    parser.set_defaults(run=caption_command)


def add_caption_options(group):
    several = {"type": whole_number(1), "metavar": "N"}
    group.add_argument("--num-captions", default=1, help="captions of an image, best first (default: 1)", **several)
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="how every caption begins, such as 'a photo of': the model reads it, in lower case, and goes on from it",
    )
    group.add_argument(
        "--prefix", default="", metavar="TEXT", help="written before every caption, as it is; the model never sees it"
    )
    group.add_argument("--suffix", default="", metavar="TEXT", help="written after every caption, likewise")
    group.add_argument("--plain", action="store_true", help="without the RBM: plain BLIP")
    group.add_argument("--num-beams", help="beams of beam search (default: the model's)", **several)
    group.add_argument("--min-length", help="at least so many tokens, which are words or parts of words", **several)
    group.add_argument("--max-length", help="at most so many tokens (default: the model's)", **several)
    group.add_argument("--sample", action="store_true", help="draw words by chance in the place of beam search")
    group.add_argument("--temperature", type=number(0), metavar="T", help="of --sample: below 1 likelier words")
    group.add_argument(
        "--top-p", type=number(0, 1), metavar="P", help="of --sample: the likeliest words of this chance"
    )
    group.add_argument("--top-k", help="of --sample: so many of the likeliest words", **several)
    group.add_argument("--seed", type=whole_number(0), metavar="N", help="of --sample: the same captions every time")
    group.add_argument("--frames", default=1, help="of an animation, evenly spread (default: 1, the first)", **several)
    group.add_argument(
        "--min-confidence",
        type=number(0, 1, including=True),
        metavar="P",
        help="leave out captions that are right with a smaller chance, by the model's calibration",
    )


def add_output_options(group):
    group.add_argument(
        "--output",
        metavar="WHERE",
        help="txt: photo.txt beside photo.jpg; or a file that ends in .jsonl, .csv, .json (COCO results) or .parquet",
    )
    group.add_argument(
        "--existing",
        choices=("skip", "overwrite", "append"),
        default="skip",
        help="of images that --output has captions of already (default: skip, and so go on where a run was stopped)",
    )
    group.add_argument(
        "--failed",
        type=Path,
        default=Path("failed.jsonl"),
        metavar="FILE",
        help="with --output: where images that could not be read are listed (default: failed.jsonl)",
    )
    group.add_argument("--json", action="store_true", help="one JSON object a line, with scores and the RBM's words")
    group.add_argument(
        "--words", type=whole_number(0), metavar="N", default=5, help="the RBM's words of an image (default: 5)"
    )
