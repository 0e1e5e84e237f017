"""A window in the browser: drop photographs, see BLIP beside BLIP-RBM, what the RBM sees and how sure it is.

    make app                        # http://127.0.0.1:7860
    python app.py --space SPACE     # the folder of a Hugging Face Space

Works offline, with the embedded checkpoint or the one that BLIP_RBM_MODEL names, and on a GPU if there is one.
"""

import argparse
import csv
import html
import importlib.metadata
import os
import shutil
import tempfile
import time
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # no request to any other host

import gradio as gr
import matplotlib
import torch
from PIL import Image

from modeling_blip_rbm import BlipRBMImageToTextPipeline, load_image
from modeling_blip_rbm.__main__ import EMBEDDED_MODEL
from modeling_blip_rbm.cli.arguments import chosen_device
from modeling_blip_rbm.cli.models import load
from modeling_blip_rbm.cli.reading import read_heic
from modeling_blip_rbm.cli.sheet import base64_jpeg
from modeling_blip_rbm.cli.tables import COLUMNS
from modeling_blip_rbm.configuration_blip_rbm import TOWERS_WITH_CLS


MOST_IMAGES = 20
MOST_BYTES = "30mb"  # of one file
KEPT = (600, 1800)  # seconds: every 10 minutes, uploads older than half an hour are deleted
DIVERSITY = 0.4  # of varied captions
MAPS = 3  # words whose place in the image is shown
ENERGY = "in nats: the higher, the less like what the RBM knows"
STYLE = """
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: 1rem}
.cards article {border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .75rem; overflow-wrap: anywhere}
.cards img {max-width: 100%; border-radius: .25rem} .cards p {margin: .4rem 0} .cards meter {width: 45%}
.cards .broken {border-color: var(--error-border-color); background: var(--error-background-fill)}
"""
FONTS = [gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")]  # those of the reader's machine
SERVER = {
    "max_file_size": MOST_BYTES,
    "ssr_mode": False,
    "css": STYLE,
    "footer_links": [],
    "theme": gr.themes.Default(font=FONTS),
}
SPACE = """---
title: BLIP-RBM
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: {version}
app_file: app.py
license: apache-2.0
---

Captions by BLIP, and by BLIP with a restricted Boltzmann machine. Uploads are deleted after half an hour.
"""


class Window:
    """The captioner behind the page.

    Args:
        model: folder or Hub id.
    """

    def __init__(self, model: str):
        read_heic()
        device = chosen_device("auto")
        self.model, self.processor = load(model)
        self.model.to(device)
        self.captioner = BlipRBMImageToTextPipeline(model=self.model, processor=self.processor, device=device)
        self.settings = self.model.decoding_settings()
        self.folder = tempfile.TemporaryDirectory(prefix="blip-rbm-")  # of what is downloaded
        self.has_words = bool(self.model.config.rbm_word_ids)

    def caption(self, files: list[str] | None, guide: float, candidates: int, number: int):
        """The page's results for files: cards (HTML), all captions as text, and the same as a text and a CSV file.

        Args:
            guide: weight of the RBM's word gains. candidates: of re-rank; 1 switches it off. number: of varied captions of an image.

        Raises:
            gr.Error: if there is no file, or too many.
        """
        if not files:
            raise gr.Error("Drop one or more photographs first.")
        if len(files) > MOST_IMAGES:
            raise gr.Error(f"{len(files)} images are too many at a time: at most {MOST_IMAGES}.")
        cards, captions = [], []
        for file in files:
            name = Path(file).name
            try:
                image = load_image(Path(file))
            except ValueError as error:
                reason = str(error).partition(": ")[2]
                cards.append(
                    f'<article class="broken"><b>{html.escape(name)}</b><p>{html.escape(reason)}</p></article>'
                )
                continue
            plain, ours, energy, words = self.look(image, guide, int(candidates), int(number))
            cards.append(card(name, image, plain, ours, energy, self.maps(image, words)))
            captions += [(name, caption["generated_text"], caption) for caption in ours]
        text = "\n".join(f"{name}: {caption}" for name, caption, _ in captions)
        return f'<div class="cards">{"".join(cards)}</div>', text, *downloads(Path(self.folder.name), text, captions)

    def look(self, image: Image.Image, guide: float, candidates: int, number: int):
        """BLIP's caption, BLIP-RBM's, the image's energy (nats) and the RBM's words of one image."""
        pixels = self.captioner.preprocess(image)
        plain = self.captioner(pixels, rbm=False)[0]
        settings = {"num_return_sequences": number, "top_words": 6}
        if self.has_words:
            settings |= {"rbm_guidance": guide, "rbm_rerank": candidates > 1 and number == 1}
        if self.has_words and candidates > 1:
            settings["rbm_rerank_candidates"] = candidates
        if number > 1:
            torch.manual_seed(0)  # the same image and sliders, the same captions
            settings |= {"rbm_diversity": DIVERSITY} if self.has_words else {"do_sample": True}
        ours = self.captioner(pixels, **settings)
        energy = self.model.image_energy(pixels["pixel_values"].to(self.model.device))
        return plain, ours, float(energy), list(ours[0]["words"])

    @torch.no_grad()
    def maps(self, image: Image.Image, words: list[str]) -> list[tuple[str, Image.Image]]:
        """(word, the image with where the word's causes are) of the first words, if the RBM reads tokens."""
        if self.model.config.rbm_pooling != "tokens" or not words:
            return []
        words = words[:MAPS]
        pixels = self.processor(images=image)["pixel_values"].to(self.model.device)
        ids = self.processor.tokenizer.convert_tokens_to_ids(words)
        of_words = self.model.word_map(pixels, words=ids)[0].float().cpu()  # (words, N)
        if self.model.config.vision_config.model_type in TOWERS_WITH_CLS:
            of_words = of_words[:, 1:]
        side = round(of_words.shape[1] ** 0.5)
        if side * side != of_words.shape[1]:  # of a tower whose grid is not square
            return []
        return [(word, overlaid(image, one.view(side, side))) for word, one in zip(words, of_words)]


def overlaid(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """The image (W x H) under a heat map (rows, columns), whose least value is dark."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-9)
    colours = (matplotlib.colormaps["inferno"](heat.numpy())[..., :3] * 255).astype("uint8")
    small = image.copy()
    small.thumbnail((320, 320))
    return Image.blend(small, Image.fromarray(colours).resize(small.size, Image.Resampling.BICUBIC), 0.55)


def card(name: str, image: Image.Image, plain: dict, ours: list[dict], energy: float, maps) -> str:
    """One image's results as HTML."""
    said = lambda caption: html.escape(caption["generated_text"])
    sure = "".join(f"<p>confidence {one['confidence']:.0%}</p>" for one in ours[:1] if "confidence" in one)
    bars = "".join(
        f'<p><meter value="{chance:.3f}" aria-label="{html.escape(word)}"></meter> {html.escape(word)} {chance:.2f}</p>'
        for word, chance in ours[0]["words"].items()
    )
    pictures = "".join(
        f'<figure><img alt="where {html.escape(word)} is" src="data:image/jpeg;base64,{base64_jpeg(one)}">'
        f"<figcaption>{html.escape(word)}</figcaption></figure>"
        for word, one in maps
    )
    return (
        f'<article><img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64_jpeg(image, 480)}">'
        f'<p class="blip">BLIP: {said(plain)}</p>'
        + "".join(f'<p class="ours"><b>BLIP-RBM: {said(one)}</b></p>' for one in ours)
        + f'{sure}<p title="{ENERGY}">energy {energy:.0f}</p>{bars}{pictures}</article>'
    )


def downloads(folder: Path, text: str, captions: list[tuple[str, str, dict]]) -> tuple[str | None, str | None]:
    """Paths of captions.txt and captions.csv with the captions. Those of long ago are deleted."""
    for old in folder.iterdir():
        if time.time() - old.stat().st_mtime > KEPT[1]:
            shutil.rmtree(old, ignore_errors=True)
    if not captions:
        return None, None
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "captions.txt").write_text(text + "\n", encoding="utf-8")
    with open(own / "captions.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        rows.writerows((name, one, info["score"], info.get("confidence", "")) for name, one, info in captions)
    return str(own / "captions.txt"), str(own / "captions.csv")


def page(model: str) -> gr.Blocks:
    """The page, with its events."""
    window = Window(model)
    with gr.Blocks(title="BLIP-RBM", analytics_enabled=False, delete_cache=KEPT) as blocks:
        gr.Markdown(
            "# BLIP beside BLIP-RBM\nCaptions of your photographs. They stay on this machine, for half an hour."
        )
        files = gr.File(file_count="multiple", file_types=["image"], label=f"Photographs, at most {MOST_IMAGES}")
        with gr.Row():
            guide = gr.Slider(
                0, 2, window.settings.rbm_guidance, step=0.05, label="Guide", info="weight of the RBM's words"
            )
            candidates = gr.Slider(
                1,
                20,
                window.settings.rbm_rerank_candidates if window.settings.rbm_rerank else 1,
                step=1,
                label="Re-rank",
                info="candidates to choose from; 1 is off",
            )
            number = gr.Slider(1, 5, 1, step=1, label="Captions", info="several are varied, and not re-ranked")
        go = gr.Button("Caption", variant="primary")
        cards = gr.HTML(label="Captions", elem_id="cards")
        text = gr.Textbox(label="All captions", buttons=["copy"], interactive=False, lines=3)
        with gr.Row():
            downloads_ = [gr.DownloadButton(f"Download {kind}", elem_id=kind) for kind in ("txt", "csv")]
        settings = {"inputs": [files, guide, candidates, number], "outputs": [cards, text, *downloads_]}
        go.click(window.caption, **settings)
        for slider in (guide, candidates, number):
            slider.change(
                lambda *values: window.caption(*values) if values[0] else (gr.skip(),) * 4,
                trigger_mode="always_last",  # not once for each step on the way
                api_visibility="private",
                **settings,
            )
        photographs = sorted(str(file) for file in (Path(__file__).parent / "examples").glob("*.jpg"))
        if photographs:
            gr.Examples([[[one]] for one in photographs], files, label="Examples")
    return blocks.queue(max_size=50, default_concurrency_limit=1)


def write_space(folder: Path):
    """The folder of a Hugging Face Space: this file, the package, the checkpoint, and what the Hub asks for.

    Raises:
        ValueError: if the folder exists.
    """
    if folder.exists():
        raise ValueError(f"--space {folder} exists: give a new folder")
    root, links = Path(__file__).resolve().parent, {"symlinks": False, "ignore": shutil.ignore_patterns("__pycache__")}
    shutil.copytree(root / "modeling_blip_rbm", folder / "modeling_blip_rbm", **links)
    shutil.copytree(EMBEDDED_MODEL, folder / "checkpoints" / EMBEDDED_MODEL.name, **links)
    shutil.copytree(
        root / "examples", folder / "examples", ignore=lambda _, names: [n for n in names if n[-4:] != ".jpg"]
    )
    shutil.copy(__file__, folder / "app.py")
    needed = [one for one in importlib.metadata.requires("blip-rbm") if "extra ==" not in one]
    (folder / "requirements.txt").write_text("\n".join([*needed, "matplotlib"]) + "\n")
    (folder / "README.md").write_text(SPACE.format(version=gr.__version__))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("BLIP_RBM_MODEL") or str(EMBEDDED_MODEL))
    parser.add_argument("--port", type=int, help="(default: the first that is free from 7860 on)")
    parser.add_argument(
        "--space", type=Path, metavar="FOLDER", help="write the folder of a Hugging Face Space, and end"
    )
    args = parser.parse_args()
    if args.space:
        write_space(args.space)
        return
    page(args.model).launch(server_port=args.port, **SERVER)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"app.py: {error}") from None
