"""CapFilt with the RBM's energy: find captions that do not belong to their images, drop them, and put the model's own in their place.

    python -m training.capfilt --model checkpoints/blip-rbm-small --dataset my-web-pairs --output_dir runs/filtered
    python -m training.train_captioner ... --dataset runs/filtered

The matching head (BLIP's ITM) is a logistic function of the RBM's pointwise mutual information of an image and a caption, fitted on
held-back images: their captions against hard negatives, the captions of other images that the energy likes best (BLIP, arXiv
2201.12086, section 3.3, with the energy for its similarity). A caption is kept if it is likelier right than wrong.

With `--shuffle 0.3` that share of the captions is first exchanged between images, an RBM is trained on the noisy pairs, each half of the
images scored by the RBM of the other, and `capfilt.json` says how well the wrong ones are found.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.rbm import hidden_input, pairwise_mutual_information, pointwise_mutual_information
from training.arguments import DataArguments, parse_arguments
from training.checkpoints import refuse_other_output, write_json
from training.data import CaptionWords, caption_words, split_held_back
from training.distributed import new_accelerator
from training.evaluate_captions import caption_rows
from training.features import cache_features, load_features
from training.train_rbm import PooledPairs, RBMArguments, in_pieces, train, with_new_rbm


@dataclass
class CapFiltArguments:
    model: str = field(metadata={"help": "folder or Hub id of a BLIP-RBM"})
    output_dir: str = field(metadata={"help": "where the filtered pairs go: parquet, read by every stage"})
    least: float = field(default=0.5, metadata={"help": "chance of being right from which a caption is kept"})
    synthetic: bool = field(
        default=False, metadata={"help": "caption the images whose captions were dropped, and filter those too"}
    )
    shuffle: float = field(
        default=0.0, metadata={"help": "exchange this share of the captions first, to measure the filter"}
    )
    epochs: int = field(default=15, metadata={"help": "of the RBMs trained on shuffled pairs"})
    batch_size: int = field(default=192, metadata={"help": "of their training"})
    negatives: int = field(
        default=64, metadata={"help": "captions of other images among which the hard negative is chosen"}
    )
    save: bool = field(
        default=True,
        metadata={"help": "write the fitted matching head into the model's config.json, if it is a folder"},
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})


def shuffled(captions: list[list[str]], share: float, seed: int) -> tuple[list[list[str]], list[np.ndarray]]:
    """The captions with a share of them exchanged between images; and which those are."""
    rng = np.random.default_rng(seed)
    places = [(i, k) for i, of_image in enumerate(captions) for k in range(len(of_image))]
    chosen = rng.permutation(len(places))[: round(share * len(places))]
    # in the order of their images, half a round on: no caption meets its own image again unless an image has half of them
    chosen = np.sort(chosen)
    given = np.roll(chosen, len(chosen) // 2)
    noisy, wrong = [list(of_image) for of_image in captions], [np.zeros(len(of_image), bool) for of_image in captions]
    for place, source in zip(chosen, given):
        (i, k), (j, m) = places[place], places[source]
        noisy[i][k], wrong[i][k] = captions[j][m], i != j
    return noisy, wrong


@torch.no_grad()
def scores(rbm, store, words: CaptionWords, rows) -> list[np.ndarray]:
    """PMI (nats) of each of these images with each of its captions."""
    p, result = rbm.parameters_fp32, []
    for part in np.array_split(np.asarray(rows), max(1, len(rows) // 1024)):
        a = hidden_input(p, rbm.standardise(store.batch(part)))
        result += [pointwise_mutual_information(p, row[None], words[i].float()).numpy() for row, i in zip(a, part)]
    return result


@torch.no_grad()
def fit_matching_head(rbm, store, words: CaptionWords, rows, negatives: int, seed: int) -> tuple[list[float], dict]:
    """Bias and weight of PMI in the log-odds of a match, on these images: captions against hard negatives."""
    p, rng = rbm.parameters_fp32, np.random.default_rng(seed)
    a = hidden_input(p, rbm.standardise(store.batch(rows)))
    own = np.concatenate(scores(rbm, store, words, rows))
    one_of_each = words.choose(np.asarray(rows), rng.random(len(rows)))
    similarity = pairwise_mutual_information(p, a, one_of_each).numpy()
    hard = []
    for i, row in enumerate(similarity):
        others = np.delete(np.arange(len(rows)), i)
        hard.append(row[rng.choice(others, min(negatives, len(others)), replace=False)].max())
    evidence = np.concatenate([own, hard])[:, None]
    match = np.repeat([True, False], [len(own), len(hard)])
    fitted = LogisticRegression(C=100.0, class_weight="balanced").fit(evidence, match)
    head = [float(fitted.intercept_[0]), float(fitted.coef_[0, 0])]
    return head, {"auc_against_hard_negatives": float(roc_auc_score(match, evidence[:, 0])), "images": len(rows)}


def rbm_of_noisy_pairs(model, store, words, rows, held_rows, args: CapFiltArguments, name: str):
    """A new RBM, trained on these images and their captions as they are."""
    set_seed(args.seed)
    settings = RBMArguments(
        model=args.model, output_dir=str(Path(args.output_dir) / name), epochs=args.epochs, eval_every=args.epochs,
        batch_size=min(args.batch_size, len(rows)), hidden_size=model.config.rbm_hidden_size, seed=args.seed,
    )  # fmt: skip
    fresh = with_new_rbm(model, model.config.rbm_word_ids, settings, in_pieces(store, rows), words.share(rows))
    held_back = store.batch(held_rows), [words[i] for i in held_rows]
    train(new_accelerator(args.seed), fresh, PooledPairs(store, rows, words, args.seed), held_back, settings)
    return fresh.rbm_layer.rbm


def crossed(model, store, words, train_rows, held_rows, args: CapFiltArguments) -> tuple[list[np.ndarray], np.ndarray]:
    """PMI of every training image's captions by an RBM that has not seen the image, and their chance of being right."""
    halves = np.array_split(np.random.default_rng(args.seed).permutation(train_rows), 2)
    found, chance = {}, {}
    for k, (seen, unseen) in enumerate((halves, halves[::-1])):
        rbm = rbm_of_noisy_pairs(model, store, words, np.sort(seen), held_rows, args, f"rbm-{k}")
        bias, weight = fit_matching_head(rbm, store, words, held_rows, args.negatives, args.seed)[0]
        for row, pmi in zip(unseen, scores(rbm, store, words, unseen)):
            found[row], chance[row] = pmi, 1 / (1 + np.exp(-(bias + weight * pmi)))
    return [found[row] for row in train_rows], [chance[row] for row in train_rows]


@torch.no_grad()
def synthetic_captions(model, processor, dataset, cache_dir) -> list[str]:
    """One caption of each image, by plain BLIP: greedy, so that it is cheap."""
    store = cache_features(model.vision_model, processor.image_processor, dataset, cache_dir)
    return caption_rows(model, processor, store, range(len(dataset)), rbm=False, num_beams=1, max_new_tokens=20)


def write_pairs(images: Dataset, captions: list[list[str]], folder: Path, split: str):
    """The images that have a caption left, as a parquet data set."""
    kept = [i for i, of_image in enumerate(captions) if of_image]
    pairs = images.select_columns(["image", "image_id"]).select(kept)
    pairs = pairs.add_column("captions", [captions[i] for i in kept])
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "unfinished"
    pairs.to_parquet(temporary)
    temporary.replace(folder / f"{split}.parquet")
    return len(kept)


def main():
    data, args = parse_arguments(DataArguments, CapFiltArguments)
    refuse_other_output(args.output_dir, "capfilt.json", "rbm-0")
    if data.streaming:
        raise ValueError("capfilt writes the images that it keeps, so it cannot stream them: leave --streaming out")
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    dataset, store = load_features(
        data, model.vision_model, processor.image_processor, pooling=model.config.rbm_pooling
    )
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions, wrong = shuffled(dataset["captions"][:], args.shuffle, args.seed)
    words = caption_words(processor.tokenizer, captions, model.config.rbm_word_ids)
    rbm = model.rbm_layer.rbm
    head, report = fit_matching_head(rbm, store, words, held_rows, args.negatives, args.seed)
    if args.shuffle:
        pmi, chance = crossed(model, store, words, train_rows, held_rows, args)
        is_wrong = np.concatenate([wrong[i] for i in train_rows])
        report["auc_of_wrong_captions"] = float(roc_auc_score(is_wrong, -np.concatenate(pmi)))
    else:
        model.config.rbm_match = head
        config_file = Path(args.model) / "config.json"
        if args.save and config_file.exists():
            write_json(config_file, json.loads(config_file.read_text()) | {"rbm_match": head})
        pmi = scores(rbm, store, words, train_rows)
        chance = [1 / (1 + np.exp(-(head[0] + head[1] * of_image))) for of_image in pmi]
    kept = [[c for c, p in zip(captions[i], of_image) if p >= args.least] for i, of_image in zip(train_rows, chance)]
    if args.shuffle:
        right = [~wrong[i][of_image >= args.least] for i, of_image in zip(train_rows, chance)]
        report["share_right_before"] = float(1 - is_wrong.mean())
        report["share_right_after"] = float(np.concatenate(right).mean())
    report |= {
        "captions": sum(len(captions[i]) for i in train_rows), "kept": sum(map(len, kept)), "matching_head": head,
        "capfilt": asdict(args), "data": asdict(data),
    }  # fmt: skip
    images, output_dir = dataset.select(train_rows), Path(args.output_dir)
    if args.synthetic:
        report["synthetic_kept"] = add_synthetic(model, processor, images, kept, store, train_rows, head, args, data)
    report["images_kept"] = write_pairs(images, kept, output_dir, data.train_split)
    if args.shuffle:
        write_pairs(images, [captions[i] for i in train_rows], output_dir / "noisy", data.train_split)
    write_json(output_dir / "capfilt.json", report)
    print(json.dumps({name: value for name, value in report.items() if name not in ("capfilt", "data")}, indent=1))


def add_synthetic(model, processor, images, kept, store, rows, head, args, data) -> int:
    """Add the model's own caption to images that lost captions, if it passes the same filter; how many did."""
    written = synthetic_captions(model, processor, images, data.cache_dir)
    words = caption_words(processor.tokenizer, [[text] for text in written], model.config.rbm_word_ids)
    p, rbm, added = model.rbm_layer.rbm.parameters_fp32, model.rbm_layer.rbm, 0
    for i, (text, row) in enumerate(zip(tqdm(written, desc="filter synthetic captions"), rows)):
        a = hidden_input(p, rbm.standardise(store.batch([row])))
        pmi = pointwise_mutual_information(p, a, words[i].float()).item()
        if 1 / (1 + np.exp(-(head[0] + head[1] * pmi))) >= args.least:
            kept[i].append(text)
            added += 1
    return added


if __name__ == "__main__":
    main()
