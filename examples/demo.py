"""Caption the photographs of this folder: BLIP beside BLIP-RBM with the RBM's words, as a table, a page and a picture.

    python examples/demo.py                                # what `make demo` runs
    python examples/demo.py my_photos/                     # any images or folders
    python examples/demo.py --picture docs/captions.png    # README's picture

Writes a page, demo.html, and a contact sheet, demo.png, into the current folder.
"""

import argparse
import base64
import html
import io
import sys
import textwrap
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # a picture in a file: no screen needed

import matplotlib.pyplot as plt
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline, BlipRBMProcessor, load_image
from modeling_blip_rbm.__main__ import EMBEDDED_MODEL, image_files


def caption_both(captioner, image) -> dict:
    """One image by both systems: caption, score and words."""
    plain = captioner(image, rbm=False)[0]
    ours = captioner(image, top_words=6)[0]
    return {
        "BLIP": plain["generated_text"],
        "BLIP-RBM": ours["generated_text"],
        "score": ours["score"],
        "words": ours["words"],
    }


def print_table(rows):
    wide = max(len(row["BLIP"]) for row in rows.values())
    print(f"\n{'image':14s}  {'BLIP':{wide}s}  BLIP-RBM  [the RBM's words for the image]")
    for file, row in rows.items():
        print(f"{file.stem:14s}  {row['BLIP']:{wide}s}  {row['BLIP-RBM']}  [{', '.join(row['words'])}]")


def write_page(rows, images, path: Path, model: str):
    cells = []
    for file, row in rows.items():
        jpeg = io.BytesIO()
        thumbnail = images[file].copy()
        thumbnail.thumbnail((360, 360))
        thumbnail.save(jpeg, "JPEG")
        words = ", ".join(f"{html.escape(word)} <small>{prob:.2f}</small>" for word, prob in row["words"].items())
        cells.append(
            f'<figure><img alt="{html.escape(file.name)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
            f"<figcaption><p>BLIP: {html.escape(row['BLIP'])}</p><p><b>BLIP-RBM: {html.escape(row['BLIP-RBM'])}</b> "
            f"<small>{row['score']:.2f}</small></p><p>the RBM's words: {words}</p></figcaption></figure>"
        )
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>BLIP-RBM demo</title><style>body{font:16px system-ui;margin:2rem}"
        "main{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;width:360px}img{max-width:100%}"
        "p{margin:.3rem 0}small{color:#666}</style>"
        f"<h1>BLIP beside BLIP-RBM</h1><p>Model: {html.escape(model)}. Small numbers: caption score (geometric mean of "
        f"token probabilities) and word probabilities.</p><main>{''.join(cells)}</main>"
    )


def write_contact_sheet(rows, images, path: Path, columns: int = 4):
    """Square thumbnails in a grid, the captions below each; 256 colours, which keeps the file small."""
    lines, side, room = -(-len(rows) // columns), 2.9, 1.5  # inches: of a thumbnail, and of the text below it
    height = lines * (side + room)
    figure, axes = plt.subplots(lines, columns, figsize=(columns * (side + 0.2), height), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.1 / height, bottom=room / height, wspace=0.06, hspace=room / side
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (file, row) in zip(axes.flat, rows.items()):
        axis.imshow(ImageOps.pad(images[file].convert("RGB"), (300, 300), color="whitesmoke"))
        said = [f"BLIP: {row['BLIP']}", f"BLIP-RBM: {row['BLIP-RBM']}", f"RBM's words: {', '.join(row['words'])}"]
        text = "\n".join(textwrap.fill(line, 38, subsequent_indent="  ") for line in said)
        axis.text(0, -0.03, text, transform=axis.transAxes, va="top", fontsize=10, parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=[str(Path(__file__).parent)], help="images or folders")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="the contact sheet (default: demo.png)")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="folder or Hub id")
    args = parser.parse_args()
    start = time.time()
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().optimize_for_inference()
    captioner = BlipRBMImageToTextPipeline(model=model, processor=BlipRBMProcessor.from_pretrained(args.model))
    try:
        images = {file: load_image(file) for file in image_files(args.images)}
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    rows = {file: caption_both(captioner, image) for file, image in tqdm(images.items(), desc="caption", unit="image")}
    print_table(rows)
    write_page(rows, images, Path("demo.html"), Path(args.model).name)
    write_contact_sheet(rows, images, args.picture)
    print(f"\n{len(rows)} images in {time.time() - start:.0f} s: demo.html, {args.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
