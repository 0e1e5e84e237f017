"""Caption the images of this folder: BLIP beside BLIP-RBM with the RBM's words, as a table, a page and a picture.

    python examples/demo.py                                # what `make demo` runs
    python examples/demo.py my_photos/                     # any images or folders
    python examples/demo.py --picture docs/captions.png --table docs/demo.md    # the documents' picture and table

Writes a page, demo.html, and a contact sheet, demo.png, into the current folder. Images in a folder named not_photographs come
last and are marked: the model never saw their like.
"""

import argparse
import base64
import html
import io
import os
import sys
import textwrap
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # a picture in a file: no screen needed

import matplotlib.pyplot as plt
from PIL import Image, ImageOps
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMImageToTextPipeline, BlipRBMProcessor, load_image
from modeling_blip_rbm.__main__ import EMBEDDED_MODEL, image_files
from training import report


NOT_A_PHOTOGRAPH = "not a photograph: expect nonsense"


def is_photograph(file: Path) -> bool:
    return file.parent.name != "not_photographs"


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
        note = "" if is_photograph(file) else f" ({NOT_A_PHOTOGRAPH})"
        print(f"{file.stem:14s}  {row['BLIP']:{wide}s}  {row['BLIP-RBM']}  [{', '.join(row['words'])}]{note}")


def table_of(rows, folder: Path) -> str:
    """A Markdown table for a document in `folder`: each file as a link, and both captions."""
    cells = []
    for file, row in rows.items():
        link = f"[{file.name}]({Path(os.path.relpath(file, folder)).as_posix()})"
        cells.append([link if is_photograph(file) else f"{link}, {NOT_A_PHOTOGRAPH}", row["BLIP"], row["BLIP-RBM"]])
    return report.table(["image", "BLIP", "BLIP-RBM"], cells)


def document_for_table(path: Path) -> str:
    """The text of the document whose table is renewed.

    Raises:
        ValueError: if it cannot be read, or has no place for the table.
    """
    try:
        text = path.read_text()
        if report.filled(text, {"captions": "renewed"}) == text:
            raise ValueError("no <!-- captions --> and <!-- /captions --> lines: add them where the table shall be")
    except OSError as error:
        raise ValueError(f"{path}: --table takes a Markdown file that can be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return text


def write_page(rows, images, path: Path, model: str):
    cells = []
    for file, row in rows.items():
        jpeg = io.BytesIO()
        thumbnail = images[file].copy()
        thumbnail.thumbnail((360, 360))
        thumbnail.save(jpeg, "JPEG")
        note = "" if is_photograph(file) else f"<p class='note'>{NOT_A_PHOTOGRAPH}</p>"
        words = ", ".join(f"{html.escape(word)} <small>{prob:.2f}</small>" for word, prob in row["words"].items())
        cells.append(
            f'<figure><img alt="{html.escape(file.name)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
            f"<figcaption>{note}<p>BLIP: {html.escape(row['BLIP'])}</p><p><b>BLIP-RBM: {html.escape(row['BLIP-RBM'])}</b> "
            f"<small>{row['score']:.2f}</small></p><p>the RBM's words: {words}</p></figcaption></figure>"
        )
    path.write_text(
        "<!doctype html><meta charset='utf-8'><title>BLIP-RBM demo</title><style>body{font:16px system-ui;margin:2rem}"
        "main{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0;width:360px}img{max-width:100%}"
        "p{margin:.3rem 0}small{color:#666}.note{color:firebrick}</style>"
        f"<h1>BLIP beside BLIP-RBM</h1><p>Model: {html.escape(model)}. Small numbers: caption score (geometric mean of "
        f"token probabilities) and word probabilities.</p><main>{''.join(cells)}</main>"
    )


def write_contact_sheet(rows, images, path: Path, columns: int = 4):
    """Thumbnails in a grid, the captions below each; 256 colours, which keeps the file small.

    Four columns are 890 pixels, about the width of a README on GitHub, so that the text stays as large as it is drawn.
    """
    texts = {}
    for file, row in rows.items():
        said = [f"BLIP: {row['BLIP']}", f"BLIP-RBM: {row['BLIP-RBM']}", f"RBM's words: {', '.join(row['words'])}"]
        if not is_photograph(file):
            said.insert(0, NOT_A_PHOTOGRAPH)
        texts[file] = "\n".join(textwrap.fill(line, 33, subsequent_indent="  ") for line in said)
    lines, wide, high = -(-len(rows) // columns), 2.6, 1.95  # inches: a thumbnail
    room = 0.2 + 0.17 * max(text.count("\n") + 1 for text in texts.values())  # and the longest text below it
    height = lines * (high + room)
    figure, axes = plt.subplots(lines, columns, figsize=(columns * (wide + 0.18), height), squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.1 / height, bottom=room / height, wspace=0.06, hspace=room / high
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (file, text) in zip(axes.flat, texts.items()):
        axis.imshow(ImageOps.pad(images[file].convert("RGB"), (320, 240), color="whitesmoke"))
        colour = "black" if is_photograph(file) else "firebrick"
        axis.text(0, -0.04, text, transform=axis.transAxes, va="top", fontsize=10, color=colour, parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256, kmeans=3).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", default=[str(Path(__file__).parent)], help="images or folders")
    parser.add_argument("--picture", type=Path, default=Path("demo.png"), help="the contact sheet (default: demo.png)")
    parser.add_argument("--table", type=Path, help="a Markdown file: renew its table between <!-- captions --> markers")
    parser.add_argument("--model", default=str(EMBEDDED_MODEL), help="folder or Hub id")
    args = parser.parse_args()
    start = time.time()
    try:
        images = {file: load_image(file) for file in sorted(image_files(args.images), key=is_photograph, reverse=True)}
        document = args.table and document_for_table(args.table)
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().optimize_for_inference()
    captioner = BlipRBMImageToTextPipeline(model=model, processor=BlipRBMProcessor.from_pretrained(args.model))
    rows = {file: caption_both(captioner, image) for file, image in tqdm(images.items(), desc="caption", unit="image")}
    print_table(rows)
    write_page(rows, images, Path("demo.html"), Path(args.model).name)
    write_contact_sheet(rows, images, args.picture)
    if args.table:
        args.table.write_text(report.filled(document, {"captions": table_of(rows, args.table.parent)}))
    written = ", ".join(str(path) for path in ("demo.html", args.picture, args.table) if path)
    print(f"\n{len(rows)} images in {time.time() - start:.0f} s: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
