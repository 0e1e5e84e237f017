"""The cases: what is called, and how a right result is told from a wrong one. All are made from a seed, none reads outside of a temporary
folder."""

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor, DecodingSettings, load_image
from modeling_blip_rbm.__main__ import main as command_line
from modeling_blip_rbm.configuration_blip_rbm import DECODING_SETTINGS
from tests.conftest import VOCABULARY, WORD_IDS, tiny_config
from training.lib.pairs import read_pairs


COLOUR = (200, 60, 20)  # of every image that is to be read


@dataclass
class Case:
    area: str
    name: str
    call: Callable[[], Any]
    right: Callable[[Any], bool]  # of what the call gave; a case that must be refused says False of everything
    refusals: tuple[type, ...] = (ValueError,)


def never(result) -> bool:
    return False


# ---------------------------------------------------------------------- images


def has_colour(image, colour=COLOUR, tolerance=12) -> bool:
    """Whether the image is RGB and of this colour all over."""
    pixels = np.asarray(image, dtype=float)
    return image.mode == "RGB" and bool((abs(pixels.mean((0, 1)) - colour) < tolerance).all())


def grey_of(image: Image.Image) -> tuple:
    return tuple(np.asarray(image.convert("L").convert("RGB"), dtype=float).mean((0, 1)))


def images(folder: Path) -> Iterator[Case]:
    case = lambda name, call, right=never: Case("images", name, call, right)
    plain = Image.new("RGB", (37, 29), COLOUR)
    for mode in ("RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "P", "RGBX"):
        with contextlib.suppress(ValueError):
            yield case(f"PIL {mode}", lambda i=plain.convert(mode): load_image(i), has_colour)
    for mode in ("L", "LA", "La", "1", "I", "F", "I;16"):
        with contextlib.suppress(ValueError):
            grey = plain.convert("L").convert(mode)
            right = (lambda r: r.mode == "RGB") if mode == "1" else lambda r: has_colour(r, grey_of(plain))
            yield case(f"PIL {mode}", lambda i=grey: load_image(i), right)
    for ending in (
        "png",
        "bmp",
        "ppm",
        "tga",
        "tiff",
        "webp",
        "gif",
        "jpg",
        "jpeg",
        "jfif",
        "jp2",
        "ico",
        "pcx",
        "avif",
        "dib",
        "sgi",
        "im",
    ):
        file = folder / f"image.{ending}"
        try:
            plain.save(file)
        except (KeyError, ValueError, OSError):
            continue
        whole = file.read_bytes()
        yield case(f"file {ending}", lambda f=file: load_image(f), has_colour)
        yield case(f"bytes {ending}", lambda b=whole: load_image(b), has_colour)
        for share in (0.0, 0.1, 0.5, 0.9):
            cut = folder / f"cut{share}.{ending}"
            cut.write_bytes(whole[: int(len(whole) * share)])
            # what is left of an uncompressed file may be all there is to see
            yield case(
                f"{share:.0%} of a file {ending}", lambda f=cut: load_image(f), lambda r: has_colour(r, tolerance=200)
            )
        rng = np.random.default_rng(len(whole))
        for number in range(3):
            noise = bytearray(whole)
            for place in rng.integers(0, len(noise), 5):
                noise[place] = rng.integers(0, 256)
            yield case(f"damaged {ending} {number}", lambda b=bytes(noise): load_image(b), lambda r: r.mode == "RGB")
    yield from arrays(case)
    for name, value in {"None": None, "int": 7, "text": "no such file.jpg", "empty text": "", "dict": {}, "set": {1}, "object": object(),
                        "folder": str(folder), "nul": "a\0b.jpg", "long name": "a" * 5000, "bytes": b"", "garbage": b"\x89PNG garbage",
                        "html": b"<html><body>404</body></html>", "lambda": lambda: 1}.items():  # fmt: skip
        yield case(f"not an image: {name}", lambda v=value: load_image(v))


def arrays(case) -> Iterator[Case]:
    solid = np.empty((29, 37, 3), dtype=np.uint8)
    solid[:] = COLOUR
    unit = solid / 255
    for dtype in ("uint8", "int16", "uint16", "int32", "int64", "float32", "float64"):
        yield case(f"array {dtype} to 255", lambda a=solid.astype(dtype): load_image(a), has_colour)
        yield case(
            f"channels first {dtype}", lambda a=solid.transpose(2, 0, 1).astype(dtype): load_image(a), has_colour
        )
    for dtype in ("float16", "float32", "float64"):
        yield case(f"array {dtype} to 1", lambda a=unit.astype(dtype): load_image(a), has_colour)
        yield case(
            f"tensor {dtype} to 1",
            lambda a=torch.tensor(unit.astype(dtype)).permute(2, 0, 1): load_image(a),
            has_colour,
        )
        for bad in (math.nan, math.inf, -math.inf):
            broken = unit.astype(dtype)
            broken[3, 5, 1] = bad
            yield case(f"array {dtype} with {bad}", lambda a=broken: load_image(a))
    normalised = ((unit - 0.5) / 0.25).astype("float32")
    yield case("normalised array", lambda: load_image(normalised))
    yield case("normalised tensor", lambda: load_image(torch.tensor(normalised).permute(2, 0, 1)))
    yield case("negative integers", lambda: load_image(solid.astype("int32") - 100))
    for shape in ((0, 0, 3), (0, 5, 3), (5, 0), (0,), (), (3,), (5, 7, 2), (5, 7, 5), (2, 5, 7, 3), (1, 1, 5, 7, 3)):
        yield case(f"array of shape {shape}", lambda s=shape: load_image(np.zeros(s, dtype=np.uint8)))
    yield case(
        "array (29, 37, 4)", lambda: load_image(np.dstack([solid, np.full((29, 37), 255, np.uint8)])), has_colour
    )
    yield case("list of lists", lambda: load_image(solid.tolist()), has_colour)
    for dtype in ("datetime64[s]", "object", "U3", "complex64"):
        yield case(f"array {dtype}", lambda d=dtype: load_image(np.zeros((5, 7, 3), dtype=d)))


# ---------------------------------------------------------------------- generate


BAD_NUMBERS = (math.nan, math.inf, -math.inf, 1e9, -1e9, "strong", [], {}, object())


def generate_arguments(model, pixel_values: torch.Tensor) -> Iterator[Case]:
    def case(name, right=never, pixels=pixel_values, **settings):
        call = lambda: model.generate(pixels, **{"max_new_tokens": 5} | settings)
        return Case("generate", name, call, right, (ValueError, TypeError))

    def tokens(rows):
        return lambda out: out.shape[0] == rows and bool(((out >= 0) & (out < len(VOCABULARY))).all())

    numbers = [name for name in DECODING_SETTINGS if isinstance(getattr(DecodingSettings(), name), float)]
    for name in numbers:
        for value in BAD_NUMBERS:
            yield case(f"{name}={value!r:.20}", **{name: value, "rbm_rerank": True})
    for value in BAD_NUMBERS:
        yield case(f"rbm_diversity={value!r:.20}", rbm_diversity=value, num_return_sequences=2)
    for value in ("no", "yes", 2, [], 0.5):
        yield case(f"rbm_rerank={value!r}", rbm_rerank=value)
    for value in (0, -3, 2.5, "ten", math.nan):
        yield case(f"rbm_rerank_candidates={value!r}", rbm_rerank=True, rbm_rerank_candidates=value)
    for name in ("rbm_guidance_order", "rbm_rerank_similarity"):
        for value in ("third", "", 1, "cosine"):
            yield case(f"{name}={value!r}", **{name: value, "rbm_guidance": 0.1})
    for beta in (0.0, 0.3, -0.3, 100.0):
        for rerank in (False, True):
            for beams in (1, 3):
                yield case(
                    f"good: beta {beta}, re-rank {rerank}, {beams} beams",
                    tokens(len(pixel_values)),
                    rbm_guidance=beta,
                    rbm_rerank=rerank,
                    num_beams=beams,
                )
    yield case("ten to the sixth tokens", tokens(len(pixel_values)), max_new_tokens=10**6)
    for value in (0, -5):
        yield case(f"num_beams={value}", num_beams=value)
        yield case(f"num_return_sequences={value}", num_return_sequences=value)
    prompts = {
        "one for all": (torch.tensor([[5, 9]]), tokens(len(pixel_values))),
        "of one dimension": (torch.tensor([5, 9]), tokens(len(pixel_values))),
        "a list": ([[5, 9]] * len(pixel_values), tokens(len(pixel_values))),
        "too few": (torch.full((3, 2), 5), never),
        "too long": (torch.full((1, 40), 5), never),
        "600 ids": (torch.full((600,), 5), never),
        "unknown ids": (torch.full((len(pixel_values), 2), 10**6), never),
        "negative ids": (torch.full((len(pixel_values), 2), -7), never),
        "fractions": (torch.full((len(pixel_values), 2), 0.5), never),
        "no rows": (torch.zeros(0, 2, dtype=torch.long), never),
        "text": ("a photo of", never),
    }
    for name, (value, right) in prompts.items():
        yield Case(
            "generate",
            f"prompt: {name}",
            lambda v=value: model.generate(pixel_values, v, max_new_tokens=5),
            right,
            (ValueError, TypeError),
        )
    for name, pixels in {"NaN": pixel_values * math.nan, "infinite": pixel_values / 0, "of another size": torch.zeros(5, 3, 7, 7), "one channel": pixel_values[:, :1],
                         "no image": pixel_values[:0], "three dimensions": pixel_values[0], "None": None, "a string": "cat.jpg"}.items():  # fmt: skip
        yield case(f"pixels: {name}", pixels=pixels, right=tokens(0) if name == "no image" else never)
    for seed in range(20):  # whatever is drawn, samples are tokens, one caption for each image asked for
        n = 1 + seed % 3
        yield case(
            f"samples {seed}",
            tokens(n * len(pixel_values)),
            do_sample=True,
            temperature=0.2 + seed / 7,
            top_k=seed,
            num_return_sequences=n,
            rbm_rerank=bool(seed % 2),
            rbm_rerank_candidates=3,
        )


# ---------------------------------------------------------------------- config fields


def config_fields() -> Iterator[Case]:
    case = lambda name, right=never, **s: Case("config", name, lambda: tiny_config(**s), right, (ValueError, TypeError))
    for name in ("rbm_hidden_size", "num_image_tokens", "vision_hidden_size", "rbm_visible_size"):
        for value in (0, -3, 2.5, "many", math.nan, [], True):
            yield case(f"{name}={value!r}", **{name: value})
    for name in ("rbm_num_phrases", "rbm_cause_tokens"):
        for value in (-1, 1.5, "three", math.inf, [3]):
            yield case(f"{name}={value!r}", **{name: value})
    for value in ([5, 3], [3, 3], [10**6], [-1], ["dog"], [1.5], "dog", [None], [[3]]):
        yield case(f"rbm_word_ids={value!r}", rbm_word_ids=value)
    for name, length in (("rbm_confidence", 3), ("rbm_match", 2)):
        for value in ([], [1.0], [1.0] * 7, [math.nan] * length, ["a"] * length, "abc", 1.0):
            yield case(f"{name}={value!r}", **{name: value})
    for name in ("rbm_pooling", "rbm_visible_type"):
        for value in ("max", 3, ["mean"], "CLS_MEAN"):
            yield case(f"{name}={value!r}", **{name: value})
    for value in ({"model_type": "no_such_tower"}, {"model_type": 7}):
        yield case(f"vision_config={value!r}", vision_config=value)
    for name in DECODING_SETTINGS:  # as a checkpoint of before has them
        for value in (math.nan, [], "x"):
            yield case(f"{name}={value!r}", **{name: value})
    yield case("good", lambda c: c.rbm_word_ids == WORD_IDS and c.rbm_visible_size == 44)


# ---------------------------------------------------------------------- checkpoints


def checkpoints(saved: Path, folder: Path, expected: list[str], picture: Path) -> Iterator[Case]:
    """Each file gone, empty, cut and garbage; weights of other shapes and kinds: the same captions, or no model."""

    def captions(at: Path):
        model, processor = (
            BlipRBMForConditionalGeneration.from_pretrained(at).eval(),
            BlipRBMProcessor.from_pretrained(at),
        )
        return processor.captions(model.generate(**processor(images=picture), max_new_tokens=7))

    def damaged(name: str, damage: Callable[[Path], None]) -> Case:
        at = folder / f"{len(list(folder.iterdir()))}"
        shutil.copytree(saved, at)
        damage(at)
        return Case("checkpoints", name, lambda: captions(at), lambda said: said == expected, (ValueError, OSError))

    yield damaged("whole", lambda at: None)
    for file in sorted(file.name for file in saved.iterdir() if file.suffix != ".py"):
        yield damaged(f"{file} gone", lambda at, f=file: (at / f).unlink())
        yield damaged(f"{file} empty", lambda at, f=file: (at / f).write_bytes(b""))
        yield damaged(f"{file} cut", lambda at, f=file: (at / f).write_bytes((at / f).read_bytes()[:57]))
        yield damaged(f"{file} garbage", lambda at, f=file: (at / f).write_bytes(b"\xff\x00garbage" * 9))
        if file.endswith(".json"):
            yield damaged(f"{file} a list", lambda at, f=file: (at / f).write_text("[1, 2]"))
            yield damaged(f"{file} a folder", lambda at, f=file: ((at / f).unlink(), (at / f).mkdir()))
    weights = load_file(saved / "model.safetensors")
    save = lambda at, changed: save_file(changed, at / "model.safetensors", metadata={"format": "pt"})
    rng = np.random.default_rng(0)
    for name in rng.choice(sorted(weights), 20, replace=False):
        yield damaged(f"without {name}", lambda at, n=name: save(at, {k: v for k, v in weights.items() if k != n}))
        broken = weights | {
            name: torch.full_like(weights[name], math.nan) if weights[name].is_floating_point() else weights[name][:1]
        }
        yield damaged(f"{name} is NaN", lambda at, b=broken: save(at, b))
        yield damaged(f"{name} of another shape", lambda at, n=name: save(at, weights | {n: torch.zeros(2, 3, 5)}))
    for name, at in {"no such folder": folder / "none", "a file": picture, "an empty folder": folder / "empty"}.items():
        (folder / "empty").mkdir(exist_ok=True)
        yield Case("checkpoints", name, lambda at=at: captions(at), never, (ValueError, OSError))


# ---------------------------------------------------------------------- data files


def data_files(folder: Path) -> Iterator[Case]:
    Image.new("RGB", (37, 29), COLOUR).save(folder / "a.png")
    Image.new("RGB", (29, 37), (20, 60, 200)).save(folder / "b.png")
    good = [("a.png", "a red square"), ("b.png", "a blue square")]

    def paired(data) -> bool:
        """Every image with its own caption."""
        rows = [(row["captions"], np.asarray(row["image"].convert("RGB"), dtype=float).mean((0, 1))) for row in data[0]]
        return (
            all(
                (mean[0] > mean[2]) == ("red" in caption)
                for captions, mean in rows
                for caption in captions
                if "square" in caption
            )
            and len(rows) > 0
        )

    def case(name, file, text, right=paired):
        at = folder / f"{len(list(folder.iterdir()))}-{file}"
        at.write_bytes(text if isinstance(text, bytes) else text.encode())
        return Case("data", name, lambda: read_pairs(str(at), "train"), right, (ValueError, OSError))

    lines = lambda rows: "\n".join(json.dumps(dict(zip(("image", "caption"), row))) for row in rows)
    table = lambda rows, by=",", head=("image", "caption"): "\n".join(by.join(row) for row in [head, *rows]) + "\n"
    yield case("jsonl", "x.jsonl", lines(good))
    for by, ending in ((",", "csv"), (";", "csv"), ("\t", "tsv")):
        yield case(f"table by {by!r}", f"x.{ending}", table(good, by))
        yield case(f"table by {by!r} with CRLF", f"x.{ending}", table(good, by).replace("\n", "\r\n"))
        yield case(f"table by {by!r} with BOM", f"x.{ending}", b"\xef\xbb\xbf" + table(good, by).encode())
    for word in ("null", "None", "NA", "n/a", "nan", "12", "1.50", "true", "inf", "#N/A", "-"):
        text_stays = lambda data, w=word: paired(data) and any(w in row["captions"] for row in data[0])
        yield case(f"the caption {word}", "x.csv", table([*good, ("a.png", word)]), text_stays)
        yield case(f"the caption {word} in JSON lines", "x.jsonl", lines([*good, ("a.png", word)]), text_stays)
    for ending in ("jsonl", "csv", "tsv", "json", "txt", "parquet", "xml", ""):
        for name, text in {
            "empty": b"",
            "garbage": b"\xff\xfe\x00garbage\x00",
            "blank lines": b"\n\n\n",
            "a number": b"7",
            "html": b"<html></html>",
            "half": lines(good).encode()[:40],
        }.items():
            yield case(f"{name} .{ending}", f"x.{ending}" if ending else "x", text, never)
    for name, row in {"a missing image": ("none.png", "a green square"), "no caption": ("a.png", ""), "blanks": ("a.png", "   "), "a folder": (".", "a square of nothing"),
                      "an address": ("http://localhost:9/x.png", "never fetched"), "a long name": ("a" * 4000 + ".png", "long")}.items():  # fmt: skip
        only_good = lambda data: paired(data) and all("square" in c for row in data[0] for c in row["captions"])
        yield case(f"a row with {name}", "x.jsonl", lines([*good, row]), only_good)
        yield case(f"a table row with {name}", "x.csv", table([*good, row]), only_good)
    broken = {"caption is a number": {"image": "a.png", "caption": 7}, "caption is null": {"image": "a.png", "caption": None}, "caption is a dict": {"image": "a.png", "caption": {"x": 1}},
              "image is null": {"image": None, "caption": "x"}, "image is a number": {"image": 7, "caption": "x"}, "no image": {"caption": "x"}, "other names": {"picture": "a.png", "words": "x"}}  # fmt: skip
    for name, row in broken.items():
        yield case(f"JSON line: {name}", "x.jsonl", lines(good) + "\n" + json.dumps(row), paired)
        yield case(
            f"only JSON lines: {name}",
            "x.jsonl",
            json.dumps(row),
            lambda data: len(data[0]) == 1 and data[0][0]["captions"] == ["7"],
        )
    ids = "\n".join(json.dumps({"image": i, "caption": c, "image_id": 7}) for i, c in good)
    yield case("one id for two images", "x.jsonl", ids, lambda data: paired(data) and len(data[0]) == 2)
    for first, second in (("1", "1.0"), ("01", "1"), ("", ""), ("None", ""), ("a", "A")):
        both = "\n".join(
            json.dumps({"image": i, "caption": c, "image_id": n}) for (i, c), n in zip(good, (first, second))
        )
        yield case(
            f"the ids {first!r} and {second!r}", "x.jsonl", both, lambda data: paired(data) and len(data[0]) == 2
        )


# ---------------------------------------------------------------------- the command line


def command_lines(model: Path, folder: Path, picture: Path) -> Iterator[Case]:
    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command_line([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        if code not in (0, None):
            last = err.getvalue().strip().splitlines()
            raise (
                ValueError(f"exit code {code}: {last[-1] if last else ''}")
                if last
                else AssertionError("no word of why")
            )
        return out.getvalue()

    def case(name, *arguments, right=never):
        return Case("command line", name, lambda: run("caption", *arguments, "--model", model), right)

    one_line = lambda out: len(out.splitlines()) == 1
    yield case("a photograph", picture, right=one_line)
    yield case("the same twice", picture, picture, right=one_line)
    for flag in ("--words", "--num-beams", "--num-captions", "--batch-size"):
        for value in ("-1", "0", "x", "1.5", "nan"):
            yield case(
                f"{flag} {value}", picture, flag, value, right=one_line if (flag, value) == ("--words", "0") else never
            )
    for name, text in {"blank": " ", "long": "a dog " * 99, "newlines": "a\ndog"}.items():
        yield case(f"prompt: {name}", picture, "--prompt", text, right=one_line)
    names = ("no such file.jpg", "", "a\x1b[31mred.jpg", "-", "--", "http://localhost:9/x.jpg", "a" * 5000)
    for name in names:
        yield case(f"path {name!r:.20}", name)
    bad = folder / "bad"
    bad.mkdir()
    for name, content in {"empty.jpg": b"", "text.jpg": b"hello", "half.png": picture.read_bytes()[:60]}.items():
        (bad / name).write_bytes(content)
        yield case(name, bad / name)
    yield case("a folder of bad files", bad)
    (folder / "nothing").mkdir()
    yield case("an empty folder", folder / "nothing")
    os.mkfifo(folder / "pipe.jpg")
    yield case("a pipe", folder / "pipe.jpg")
    mixed = folder / "mixed"
    mixed.mkdir()
    shutil.copy(picture, mixed / "a.png")
    os.mkfifo(mixed / "b.png")
    (mixed / "loop").symlink_to(mixed)
    (mixed / "._a.png").write_bytes(b"\0\5\x16\7")
    (mixed / ".hidden").mkdir()
    yield case("a folder with a pipe, a loop and hidden files", mixed, right=one_line)
    for command in (
        [],
        ["no-such-command"],
        ["caption"],
        ["caption", picture, "--model", folder / "none"],
        ["caption", picture, "--model", folder],
    ):
        yield Case("command line", f"blip-rbm {' '.join(map(str, command))[:20]!r}", lambda c=command: run(*c), never)
