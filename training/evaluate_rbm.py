"""What an RBM knows of images and words: retrieval both ways through its hidden units, words of images, images of
words.

    python -m training.evaluate_rbm --model checkpoints/blip-rbm-small --dataset flickr8k \
        --output runs/rbm-validation.json

Numbers of a split that the RBM has not seen go to `--output`, and beside it a picture: images with their most probable
words, and words with their most probable images.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.rbm import word_gains
from training.lib.arguments import MeasureArguments, parse_arguments
from training.lib.checkpoints import write_json
from training.lib.data import caption_words
from training.lib.distributed import own_processes
from training.lib.features import cache_features
from training.lib.pairs import load_pairs
from training.lib.rbm_evaluation import evaluate_rbm, image_inputs
from training.lib.stage import run_stage


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class EvaluateRBMArguments(MeasureArguments):
    queries: list[str] = field(
        default_factory=lambda: ["dog", "snow", "beach", "bike", "girl", "climbing"],
        metadata={"help": "words whose images are shown"},
    )
    seed: int = field(default=0, metadata={"help": "of the images that are shown"})


def show(path: Path, images, prob, words: list[str], queries: list[str], seed: int, across: int = 6):
    """Images with their words above, words with their images below."""
    generator = torch.Generator().manual_seed(seed)
    figure, axes = plt.subplots(
        1 + len(queries), across, figsize=(2.2 * across, 2.5 * (1 + len(queries))), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes[0], torch.randperm(len(prob), generator=generator)[:across].tolist()):
        axis.imshow(images[i])
        top = prob[i].topk(6).indices.tolist()
        axis.set_title("\n".join(" ".join(words[k] for k in top[j : j + 3]) for j in (0, 3)), fontsize=9)
    for row, query in zip(axes[1:], queries):
        for place, (axis, i) in enumerate(zip(row, prob[:, words.index(query)].topk(across).indices.tolist())):
            axis.imshow(images[i])
            axis.set_title(f"{query}, {place + 1}" if place else f"most like “{query}”", fontsize=9)
    figure.suptitle(f"words of {across} random images (seed {seed}); images of words")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    (args,) = parse_arguments(EvaluateRBMArguments)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(own_processes().device)
    dataset = load_pairs(args.dataset, args.split, args.max_images, **args.columns)
    settings = {"pooling": model.config.rbm_pooling}
    store = cache_features(model.vision_model, processor.image_processor, dataset, args.cache_dir, **settings)
    rows = range(len(dataset))
    word_ids = list(model.config.rbm_word_ids)
    names = processor.tokenizer.convert_ids_to_tokens(word_ids)
    unknown = sorted(set(args.queries) - set(names))
    if unknown:
        raise SystemExit(
            f"--queries: the RBM does not know {', '.join(unknown)}; its {len(names)} words are in the config"
        )
    words = caption_words(processor.tokenizer, dataset["captions"], word_ids)
    rbm = model.rbm_layer.rbm
    result = {
        "model": args.model,
        "split": args.split,
        "images": len(dataset),
        **evaluate_rbm(rbm, store.batch(rows), words),
    }
    p = rbm.parameters_fp32
    with torch.no_grad():
        prob = torch.sigmoid(p.b + word_gains(p, image_inputs(rbm, store, rows), order="second")).cpu()
    picture = Path(args.output).with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    show(picture, dataset["image"], prob, names, args.queries, args.seed)
    write_json(Path(args.output), result)
    print(json.dumps(result, indent=1))
    print(f"wrote {args.output} and {picture}")


if __name__ == "__main__":
    run_stage(main)
