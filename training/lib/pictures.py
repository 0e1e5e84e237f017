"""Pictures of an evaluation: what the systems say of images, where they differ, where the decoder looks.

They show images of the dataset, so they belong in a folder of one's own, not in a repository.
"""

import math
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save(figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def caption_grid(path: Path, images, captions: dict[str, list[str]], scores: dict, rows, title: str, across: int = 5):
    """Images number `rows` with what every system says of them, and its CIDEr-D."""
    down = math.ceil(len(rows) / across)
    figure, axes = plt.subplots(down, across, figsize=(3.4 * across, 4.2 * down), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row in zip(axes.flat, rows):
        axis.imshow(images[int(row)])
        lines = [f"{name} ({100 * scores[name]['cider'][row]:.0f}): {said[row]}" for name, said in captions.items()]
        axis.set_title("\n".join(textwrap.fill(line, 40) for line in lines), fontsize=8, loc="left")
    figure.suptitle(title)
    save(figure, path)


def difference_histogram(path: Path, difference: np.ndarray, result: dict):
    """Distribution of CIDEr-D differences per image (points), with the mean and its interval."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.hist(difference, bins=60, color="tab:blue", log=True)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(result["low"], result["high"], color="tab:orange", alpha=0.5)
    axis.axvline(result["difference"], color="tab:red")
    same = (difference == 0).mean()
    axis.set(
        xlabel="CIDEr-D of BLIP-RBM minus BLIP, points",
        ylabel="images",
        title=f"mean {result['difference']:+.1f}, 95 % interval [{result['low']:+.1f}, {result['high']:+.1f}]; better on "
        f"{(difference > 0).mean():.0%}, equal on {same:.0%}",
    )
    save(figure, path)


@torch.no_grad()
def attention_maps(model, vision_hidden_states, sequence) -> torch.Tensor:
    """(T - 1, side, side): where the decoder looks when it writes each token of a caption, mean over layers and heads.

    Raises:
        ValueError: if the tower's tokens are no square grid, with or without one token before it.
    """
    encoding = model.encode_image(vision_hidden_states=vision_hidden_states)
    attentions = model(input_ids=sequence[None], image_embeds=encoding.image_embeds, output_attentions=True)
    weights = torch.stack(attentions.cross_attentions).mean((0, 2))[0, :-1]  # (T - 1, N)
    weights = weights[:, : vision_hidden_states.shape[1]]  # without cause tokens
    side = math.isqrt(weights.shape[1])
    if weights.shape[1] - side * side not in (0, 1):
        raise ValueError(f"{weights.shape[1]} image tokens are no square grid")
    return weights[:, -side * side :].unflatten(1, (side, side))


def attention_figure(path: Path, model, processor, image, vision_hidden_states, sequence):
    """A caption's words, each over where the decoder looked for it."""
    ended = sequence.tolist()
    ended = ended[: ended.index(model.config.text_config.sep_token_id) + 1]
    maps = attention_maps(model, vision_hidden_states, torch.tensor(ended))
    words = processor.tokenizer.convert_ids_to_tokens(ended[1:])
    across = 6
    down = math.ceil(len(words) / across)
    figure, axes = plt.subplots(down, across, figsize=(2.3 * across, 2.6 * down), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, word, weights in zip(axes.flat, words, maps):
        axis.imshow(image)
        extent = (0, image.width, image.height, 0)
        axis.imshow(weights.numpy(), extent=extent, cmap="inferno", alpha=0.55, interpolation="bicubic")
        axis.set_title(word, fontsize=10)
    save(figure, path)


def draw(folder, model, processor, store, images, captions, scores, difference: dict, seed: int = 0):
    """Every picture of an evaluation of BLIP-RBM against BLIP.

    Args:
        images: PIL by row number. captions, scores: of "BLIP" and "BLIP-RBM". difference: of CIDEr-D, as `differences`
            gives it.
    """
    folder = Path(folder)
    change = 100 * (scores["BLIP-RBM"]["cider"] - scores["BLIP"]["cider"])
    order = np.argsort(change)
    some = np.random.default_rng(seed).permutation(len(change))[:20]
    caption_grid(
        folder / "random.png", images, captions, scores, some, f"20 random images, seed {seed}; CIDEr-D in brackets"
    )
    caption_grid(folder / "best.png", images, captions, scores, order[::-1][:10], "where BLIP-RBM gains most")
    caption_grid(folder / "worst.png", images, captions, scores, order[:10], "where BLIP-RBM loses most")
    difference_histogram(folder / "difference.png", change, difference)
    for number, row in enumerate(some[:3]):
        features = store.batch([row])
        sequence = model.generate(vision_hidden_states=features)[0]
        attention_figure(folder / f"attention-{number + 1}.png", model, processor, images[int(row)], features, sequence)
