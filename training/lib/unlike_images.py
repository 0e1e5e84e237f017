"""Images unlike the photographs that a captioner learned from. None is downloaded.

`made_images`: no photographs at all. `spoiled_images`: photographs that something was done to, which are harder to tell apart.
"""

import gzip
import io
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps


def made_images(n: int, seed: int, size: int = 224) -> dict[str, list[Image.Image]]:
    """n images of each kind; the medical ones are views of a scan that matplotlib ships."""
    rng = np.random.default_rng(seed)
    return {
        "noise": [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)],
        "textures": [texture(rng, size) for _ in range(n)],
        "text pages": [text_page(rng, size) for _ in range(n)],
        "medical": medical(rng, n, size),
        "drawings": [drawing(rng, size) for _ in range(n)],
    }


def spoiled_images(photographs: list[Image.Image], seed: int) -> dict[str, list[Image.Image]]:
    """The same photographs, spoiled in each way. Strengths are relative to the shorter side, and sizes stay as they are."""
    rng = np.random.default_rng(seed)
    photographs = [photograph.convert("RGB") for photograph in photographs]
    return {
        "upside down": [one.transpose(Image.Transpose.ROTATE_180) for one in photographs],
        "blurred": [one.filter(ImageFilter.GaussianBlur(min(one.size) / 25)) for one in photographs],
        "JPEG-crushed": [crushed(one, quality=2) for one in photographs],
        "pixelated": [pixelated(one, across=16) for one in photographs],
        "inverted colours": [ImageOps.invert(one) for one in photographs],
        "shuffled patches": [shuffled(one, rng, across=4) for one in photographs],
        "edges only": [edges(one) for one in photographs],
    }


# ---------------------------------------------------------------------- photographs, spoiled


def crushed(photograph, quality):
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def pixelated(photograph, across):
    """So many squares along the shorter side."""
    side = min(photograph.size) / across
    small = photograph.resize([max(1, round(length / side)) for length in photograph.size], Image.Resampling.BOX)
    return small.resize(photograph.size, Image.Resampling.NEAREST)


def shuffled(photograph, rng, across):
    """across x across patches in random order. What is left of the sides when they are divided is cut off."""
    width, height = (length // across for length in photograph.size)
    corners = [(column * width, row * height) for row in range(across) for column in range(across)]
    result = Image.new("RGB", (across * width, across * height))
    for (left, top), place in zip(corners, rng.permutation(len(corners))):
        result.paste(photograph.crop((left, top, left + width, top + height)), corners[place])
    return result


def edges(photograph):
    """Dark lines on white, where the brightness changes."""
    found = ImageOps.grayscale(photograph).filter(ImageFilter.FIND_EDGES)
    return ImageOps.invert(ImageOps.autocontrast(found, cutoff=1)).convert("RGB")


# ---------------------------------------------------------------------- images of other kinds


def texture(rng, size):
    """Waves of two random directions and lengths, in two random colours."""
    y, x = np.mgrid[:size, :size] / size
    waves = 0.0
    for _ in range(2):
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.02, 0.3)
        waves = waves + np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + rng.uniform(0, 6))
    share = ((waves + 2) / 4)[..., None]
    one, other = rng.integers(0, 256, (2, 3))
    return Image.fromarray((share * one + (1 - share) * other).astype(np.uint8))


def text_page(rng, size):
    """Lines of random words, black on white."""
    page = Image.new("RGB", (size, size), "white")
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(int(rng.integers(8, 16))), 8
    while y < size - 8:
        words = ("".join(rng.choice(list("abcdefghiklmnoprstuvwy"), rng.integers(2, 9))) for _ in range(8))
        draw.text((8, y), " ".join(words), fill="black", font=font)
        y += font.size * 1.4
    return page


def medical(rng, n, size):
    """Random views of the MRI slice that matplotlib ships."""
    with gzip.open(Path(matplotlib.get_data_path()) / "sample_data" / "s1045.ima.gz") as file:
        scan = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(float)
    scan = Image.fromarray((255 * np.clip(scan / np.quantile(scan, 0.995), 0, 1)).astype(np.uint8)).convert("RGB")
    images = []
    for _ in range(n):
        side, angle = int(rng.integers(150, 256)), rng.uniform(-30, 30)
        left, top = rng.integers(0, 256 - side + 1, 2)
        images.append(scan.rotate(angle).crop((left, top, left + side, top + side)).resize((size, size)))
    return images


def drawing(rng, size):
    """A few coloured shapes with outlines on a plain ground."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(180, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 9)):
        (left, top), (width, height) = rng.integers(0, size - 40, 2), rng.integers(20, 120, 2)
        shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
        box = tuple(int(v) for v in (left, top, left + width, top + height))
        shape(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)), outline="black", width=2)
    return picture
