"""Retrieval in two steps, as BLIP retrieves: similarities of embeddings first, then the best few again with the
decoder.

    python -m experiments.retrieval.rerank_retrieval --runs runs/align/probe runs/align/sail runs/align/rbm \
        --captioners checkpoints/blip-rbm-small runs/second-captioner/best --dataset flickr8k \
        --output experiments/retrieval/retrieval.json

The similarity is the mean of what the runs of `training.align` give, standardised. Two things are added to it:

- **hubs**: some captions are like most images, and some images like most captions. How alike each is to the bank of
  *training* captions or images is taken off (querybank normalisation, Bogolin et al., CVPR 2022; the inverted softmax
  of Smith et al., ICLR 2017). Of the other queries of the evaluated split nothing is used but the mean and the spread
  by which similarities are standardised.
- **likelihood**: where BLIP looks at the best candidates again with its matching head, here captioners say log
  P(caption | image), less what they say of the caption for the training images most like it, so that every word is
  compared with the regions of the image. The first captioner is asked of the best 32, say, and the next of those that
  are then the best 24.

Their weights are chosen on training images that were held back from both, and applied to the split, which may be
embedded by runs that were trained on all images (`--final_runs`). Several processes (`accelerate launch`) share the
images; likelihoods are kept beside the features and not asked for again.
"""

import argparse
import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, reduce
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from experiments.alignment.evaluate_alignment import runs_of, settings_of, trained_aligner
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.align import embed, sum_of_recalls
from training.lib.arguments import bf16_is_fast
from training.lib.checkpoints import write_array, write_json
from training.lib.data import split_held_back
from training.lib.distributed import new_accelerator
from training.lib.features import cache_features, tower_fingerprint
from training.lib.pairs import load_pairs
from training.lib.retrieval import recalls, without_hubs
from training.lib.stage import run_stage
from training.report import retrieval_table


TEMPERATURES, HUB_WEIGHTS, LIKELIHOOD_WEIGHTS = (
    (1.5, 2.0, 3.0, 4.0, 6.0),
    (0.5, 1.0),
    (0.03, 0.05, 0.07, 0.1, 0.15, 0.2),
)
FIRST = {"temperature": 3.0, "hub_weight": 1.0, "likelihood_weight": 0.1}  # by which candidates are found


class Gallery:
    """Images and captions of which each is to find the others, beside a bank of training images and captions.

    Attributes:
        similarity (n, m) of n images and m captions, owner (m,) the image of each caption; bank_images (r, m) and
            bank_captions (n, s): the
        same of the bank's images and these captions, and of these images and the bank's captions. gains: of each
            captioner (n, m), how
        much likelier a caption is for the image than for the training images most like it, nats; NaN where it was not
            asked.
    """

    def __init__(self, dataset, rows):
        self.dataset, self.rows = dataset, rows
        self.similarity = self.bank_images = self.bank_captions = 0.0
        self.runs, self.gains = 0, []

    def add(self, aligner, data, bank):
        """One more similarity, standardised over this gallery, into the mean."""
        images, captions, self.owner = embed(aligner, data, self.rows)
        similarity = aligner.similarity(images, captions)
        mean, std = similarity.mean(), similarity.std()
        self.runs += 1
        into_mean = lambda before, more: before + ((more - mean) / std - before) / self.runs
        bank_images, bank_captions = bank
        self.similarity = into_mean(self.similarity, similarity)
        self.bank_images = into_mean(self.bank_images, aligner.similarity(bank_images, captions))
        self.bank_captions = into_mean(self.bank_captions, aligner.similarity(images, bank_captions))

    def candidates(self, count: int) -> torch.Tensor:
        """(n, m) whether a caption is among the best `count` of the image, or the image among those of the caption."""
        score = self.score(**FIRST)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        for matrix, marks in ((score, chosen), (score.T, chosen.T)):
            marks.scatter_(1, matrix.topk(min(count, matrix.shape[1]), 1).indices, True)
        return chosen

    def score(self, temperature=None, hub_weight=1.0, likelihood_weight=None) -> torch.Tensor:
        score = self.similarity
        if temperature is not None:
            score = without_hubs(score, self.bank_images, self.bank_captions, temperature, hub_weight)
        if likelihood_weight is not None and self.gains:
            gains = torch.stack(self.gains)
            looks = len(gains) - gains.isnan().sum(0)
            # what fewer captioners have looked at stays behind
            score = score + likelihood_weight * gains.nansum(0) / looks.clamp(min=1) + 100 * looks
        return score


@torch.no_grad()
def gallery_of(args, runs: list[str], accelerator, split: Optional[str] = None) -> tuple[Gallery, np.ndarray]:
    """The images of `split`, or (None) the training images that these runs held back, as they see them; and the rows of
    the bank: the training images that they were trained on, in random order.

    Raises:
        ValueError: if the runs held back different images, or none where such are asked for.
    """
    train = load_pairs(args.dataset, args.train_split)
    gallery = None
    for run, settings, _, _, load in runs_of(runs, args):
        if gallery is None:
            held_back = settings.held_back
            trained_on, held_rows = split_held_back(train, held_back)
            if not split and not len(held_rows):
                raise ValueError(
                    f"{run} held no image back, on which weights could be chosen: give it as one of --final_runs"
                )
            of_split = load_pairs(args.dataset, split) if split else train
            gallery = Gallery(of_split, np.arange(len(of_split)) if split else held_rows)
            bank_rows = np.random.default_rng(args.seed).permutation(trained_on)[: args.bank]
        elif settings.held_back != held_back:
            raise ValueError(f"{run} held back {settings.held_back} images, {runs[0]} {held_back}: not the same")
        with accelerator.main_process_first():  # encodes what is not encoded yet
            data = load(args.train_split)[0]
            data_of_split = load(split)[0] if split else data
        aligner = trained_aligner(run, settings, data)
        gallery.add(aligner, data_of_split, embed(aligner, data, bank_rows)[:2])
    return gallery, bank_rows


class Likelihoods:
    """log P(caption | image) by a captioner, of images by their cached features.

    Args:
        dtype: in which the decoder computes: "float32", "bfloat16", or "auto": bf16 where the processor is faster in
            it.
    """

    def __init__(self, captioner: str, cache_dir: str, batch_size: int = 64, dtype: str = "auto"):
        # features are found by the tower's weights, which are not to be rounded
        self.tower = BlipRBMForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).vision_model.eval()
        self.processes = PartialState()
        if dtype == "auto":
            dtype = "bfloat16" if bf16_is_fast() else "float32"
        self.model = BlipRBMForConditionalGeneration.from_pretrained(captioner, dtype=getattr(torch, dtype)).eval()
        self.model.optimize_for_inference()
        self.processor = BlipRBMProcessor.from_pretrained(captioner)
        self.cache_dir, self.batch_size = cache_dir, batch_size

    def features(self, dataset):
        return cache_features(self.tower, self.processor.image_processor, dataset, self.cache_dir, dtype="auto")

    def token_ids(self, gallery: Gallery) -> list[torch.Tensor]:
        texts = [text for of_image in gallery.dataset.select(gallery.rows)["captions"] for text in of_image]
        encoded = self.processor(text=texts)
        return [ids[mask.bool()] for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"])]

    @torch.no_grad()
    def of_pairs(self, store, rows, token_ids: list[torch.Tensor], chosen: torch.Tensor, desc: str) -> torch.Tensor:
        """(n, m) of the pairs of image, one of these rows of the store, and caption that are chosen (n, m), NaN
        elsewhere."""
        file = self.file(store, rows, token_ids)
        known = torch.from_numpy(np.load(file)) if file.exists() else torch.full(chosen.shape, float("nan"))
        # the first process decides: similarities of others may differ in the last bit
        missing = broadcast((chosen & known.isnan()).byte()).bool()
        result = torch.zeros(chosen.shape)
        pad = self.model.config.text_config.pad_token_id
        lengths = torch.tensor([len(ids) for ids in token_ids])
        images = missing.any(1).nonzero().flatten()[self.processes.process_index :: self.processes.num_processes]
        with tqdm(total=int(missing[images].sum()), desc=desc) as bar:
            for image in images.tolist():
                captions = missing[image].nonzero().flatten()
                captions = captions[lengths[captions].argsort()]  # rows of like length together
                states = store.batch([rows[image]]).to(self.model.dtype)
                encoding = self.model.encode_image(vision_hidden_states=states, rbm=False)
                for some in captions.split(self.batch_size):
                    ids = pad_sequence([token_ids[caption] for caption in some], batch_first=True, padding_value=pad)
                    result[image, some] = self.model.score_captions(encoding, ids)[0].float()
                bar.update(len(captions))
        known = torch.where(missing, reduce(result, "sum"), known)
        if self.processes.is_main_process:
            write_array(file, known.numpy())
        self.processes.wait_for_everyone()  # all find the same likelihoods there
        return torch.where(chosen | missing, known, float("nan"))

    def file(self, store, rows, token_ids: list[torch.Tensor]) -> Path:
        """Where the likelihoods of these images and captions are kept: its name is a hash of all that they depend
        on."""
        digest = hashlib.sha256(tower_fingerprint(self.model).encode())
        digest.update(f"{self.model.dtype} {store.folder.name} {np.asarray(rows).tolist()}".encode())
        digest.update(torch.cat(token_ids).numpy().tobytes())
        return Path(self.cache_dir) / f"likelihood-{digest.hexdigest()[:16]}.npy"


def add_gain(gallery: Gallery, likelihoods: Likelihoods, bank: tuple, candidates: int, of_bank: int):
    """One more captioner's opinion.

    Args:
        bank: a store of features, and rows in it: of the bank's first images, among which the `of_bank` most like a
            caption tell its usual likelihood.
    """
    ids = likelihoods.token_ids(gallery)
    store = likelihoods.features(gallery.dataset)
    chosen = gallery.candidates(candidates)
    likelihood = likelihoods.of_pairs(store, gallery.rows, ids, chosen, "likelihood")
    alike = gallery.bank_images[: len(bank[1])]
    nearest = torch.zeros_like(alike, dtype=torch.bool)
    nearest.scatter_(0, alike.topk(of_bank, 0).indices, True)
    found = likelihoods.of_pairs(*bank, ids, nearest, "likelihood, bank")
    usual = found.T[nearest.T].view(-1, of_bank).logsumexp(1) - np.log(of_bank)
    gallery.gains.append(likelihood - usual)


def choose(gallery: Gallery) -> dict[str, dict]:
    """Weights of each way, by the sum of its recalls on held-back images."""
    best = lambda ways: max(ways, key=lambda way: sum_of_recalls(recalls(gallery.score(**way), gallery.owner)))
    hubs = best([{"temperature": t, "hub_weight": w} for t, w in itertools.product(TEMPERATURES, HUB_WEIGHTS)])
    likelihood = best([{"likelihood_weight": w} for w in LIKELIHOOD_WEIGHTS])
    both = best([hubs | {"likelihood_weight": w} for w in LIKELIHOOD_WEIGHTS])
    return {"together": {}, "hubs": hubs, "likelihood": likelihood, "hubs and likelihood": both}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="output folders of training.align")
    parser.add_argument("--captioners", nargs="+", required=True, help="folders or Hub ids of BLIP-RBMs")
    parser.add_argument(
        "--final_runs",
        nargs="+",
        help="the same, in this order, trained on the images that --runs held back as well: for the split",
    )
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--split", default="validation")
    parser.add_argument(
        "--candidates",
        type=int,
        nargs="+",
        default=[32, 24],
        help="of each image and caption, how many each captioner looks at",
    )
    parser.add_argument("--bank", type=int, help="at most so many training images tell which captions are hubs")
    parser.add_argument(
        "--likelihood_bank", type=int, default=2000, help="and so many of them which captions are likely for any image"
    )
    parser.add_argument(
        "--bank_candidates", type=int, default=8, help="of them, for which a caption's usual likelihood is asked"
    )
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the captioners")
    parser.add_argument("--cache_dir", default="runs/features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="results, JSON")
    args = parser.parse_args()
    if len(args.candidates) < len(args.captioners) or args.candidates != sorted(args.candidates, reverse=True):
        parser.error(
            f"--candidates {args.candidates}: a number for each of {len(args.captioners)} captioners is needed, none above the one before"
        )
    args.final_runs = args.final_runs or args.runs
    if len(args.final_runs) != len(args.runs):
        parser.error(f"--final_runs {args.final_runs}: one for each of {len(args.runs)} runs is needed")
    return args


def main():
    args = parsed_arguments()
    accelerator = new_accelerator(args.seed)
    # weights are chosen on what no run was trained on, and applied to the split
    galleries = [
        gallery_of(args, args.runs, accelerator),
        gallery_of(args, args.final_runs, accelerator, args.split),
    ]
    (held, _), (split, _) = galleries
    start = time.time()
    for captioner, candidates in zip(args.captioners, args.candidates):
        likelihoods = Likelihoods(captioner, args.cache_dir, dtype=args.dtype)
        with accelerator.main_process_first():
            of_training_images = likelihoods.features(held.dataset)
            likelihoods.features(split.dataset)
        for gallery, bank_rows in galleries:
            bank = of_training_images, bank_rows[: args.likelihood_bank]
            add_gain(gallery, likelihoods, bank, candidates, args.bank_candidates)
    minutes = (time.time() - start) / 60
    ways = choose(held)
    results = {"settings": vars(args), "ways": ways, "images": len(split.similarity), "captions": len(split.owner)}
    reports = [settings_of(run, args)[1] for run in args.final_runs]
    # runs of older versions do not say their threads
    results["core_minutes_of_training"] = sum(report["minutes"] * report.get("threads", 1) for report in reports)
    results["minutes_of_likelihoods"] = minutes
    for name, gallery in (("held_back", held), ("runs", split)):
        results[name] = {way: recalls(gallery.score(**settings), gallery.owner) for way, settings in ways.items()}
    if accelerator.is_main_process:
        print(json.dumps(ways))
        print(retrieval_table(results))
        write_json(args.output, results)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_stage(main)
