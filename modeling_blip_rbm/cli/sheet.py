"""A page of thumbnails with a line below each: one file that needs no other."""

import base64
import html
import io
from pathlib import Path

from PIL import Image

from modeling_blip_rbm import load_image


SIDE = 256  # pixels of a thumbnail
STYLE = (
    "body{font:16px system-ui;margin:1.5rem}main{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));"
    "gap:1rem}figure{margin:0}img{max-width:100%}figcaption{overflow-wrap:anywhere}"
)


def write_sheet(file: Path, title: str, rows: list[tuple[Path, str]]):
    """Write the page of images and what stands below each."""
    with open(file, "w", encoding="utf-8", errors="backslashreplace") as page:
        page.write(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1><main>"
        )
        for image, line in rows:
            name = html.escape(image.name)
            page.write(
                f'<figure><img alt="{name}" src="data:image/jpeg;base64,{thumbnail(image)}">'
                f"<figcaption>{name}<br>{html.escape(line)}</figcaption></figure>\n"
            )
        page.write("</main></html>\n")


def thumbnail(image: Path) -> str:
    """A small JPEG of an image, as base64."""
    return base64_jpeg(load_image(image))


def base64_jpeg(image: Image.Image, side: int = SIDE) -> str:
    """An RGB image as JPEG of at most `side` pixels, as base64."""
    small = image.copy()
    small.thumbnail((side, side))
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=80)
    return base64.b64encode(jpeg.getvalue()).decode()
