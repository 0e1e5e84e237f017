"""Retrieval in two steps, as BLIP retrieves: similarities of embeddings first, then the best few again with the decoder.

    python -m training.rerank_retrieval --runs runs/align-probe runs/align-sail runs/align-rbm --captioner checkpoints/blip-rbm-small \
        --dataset flickr8k --output benchmarks/results/retrieval.json

The similarity is the sum of what the runs of `training.align` give, standardised. Two things are added to it:

- **hubs**: some captions are like most images, and some images like most captions. How alike each is to a bank of *training* captions or
  images is taken off (querybank normalisation, Bogolin et al., CVPR 2022; the inverted softmax of Smith et al., ICLR 2017). Of the
  other queries of the evaluated split nothing is used but the mean and the spread by which similarities are standardised.
- **likelihood**: where BLIP looks at the best candidates again with its matching head, here the captioner says log P(caption | image), less
  what it says of the caption for the training images most like it, so that every word is compared with the regions of the image.

Their weights are chosen on training images that were held back from both, and applied to the split.
"""

import argparse
import itertools
import json

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.linear_blip_rbm import packed_linears
from training.align import embed, sum_of_recalls
from training.checkpoints import write_json
from training.data import split_held_back
from training.evaluate_alignment import runs_of, trained_aligner
from training.features import cache_features
from training.pairs import load_pairs
from training.report import retrieval_table
from training.retrieval import recalls, without_hubs


TEMPERATURES, HUB_WEIGHTS, LIKELIHOOD_WEIGHTS = (0.5, 1.0, 2.0, 4.0), (0.5, 1.0), (0.05, 0.1, 0.2, 0.3, 0.5)


class Gallery:
    """Images and captions of which each is to find the others, beside a bank of training images and captions.

    Attributes:
        similarity (n, m) of n images and m captions, owner (m,) the image of each caption; bank_images (r, m) and bank_captions (n, s): the
        same of the bank's images and these captions, and of these images and the bank's captions. likelihood (n, m) log P(caption | image)
        of candidates, NaN elsewhere; bank_likelihood (m, c): of each caption for the c training images most like it.
    """

    def __init__(self, dataset, rows):
        self.dataset, self.rows = dataset, rows
        self.similarity = self.bank_images = self.bank_captions = 0.0

    def add(self, aligner, data, bank):
        """One more similarity, standardised over this gallery."""
        images, captions, self.owner = embed(aligner, data, self.rows)
        similarity = aligner.similarity(images, captions)
        mean, std = similarity.mean(), similarity.std()
        self.similarity = self.similarity + (similarity - mean) / std
        bank_images, bank_captions = bank
        self.bank_images = self.bank_images + (aligner.similarity(bank_images, captions) - mean) / std
        self.bank_captions = self.bank_captions + (aligner.similarity(images, bank_captions) - mean) / std

    def candidates(self, count: int, temperature: float = 1.0) -> torch.Tensor:
        """(n, m) whether a caption is among the best `count` of the image, or the image among those of the caption."""
        score = without_hubs(self.similarity, self.bank_images, self.bank_captions, temperature)
        chosen = torch.zeros_like(score, dtype=torch.bool)
        for matrix, marks in ((score, chosen), (score.T, chosen.T)):
            marks.scatter_(1, matrix.topk(min(count, matrix.shape[1]), 1).indices, True)
        return chosen

    def score(self, temperature=None, hub_weight=1.0, likelihood_weight=None) -> torch.Tensor:
        score = self.similarity
        if temperature is not None:
            score = without_hubs(score, self.bank_images, self.bank_captions, temperature, hub_weight)
        if likelihood_weight is not None:
            usual = self.bank_likelihood.logsumexp(1) - np.log(self.bank_likelihood.shape[1])
            scored = ~self.likelihood.isnan()
            gain = likelihood_weight * (self.likelihood - usual)
            # what was not looked at again stays behind what was
            score = torch.where(scored, score + gain, score - 1e3)
        return score


@torch.no_grad()
def galleries(args) -> tuple[Gallery, Gallery, np.ndarray]:
    """The held-back training images, the images of the split, and the training images of the bank."""
    train = load_pairs(args.dataset, args.train_split)
    of_split = load_pairs(args.dataset, args.split)
    held, split = None, Gallery(of_split, np.arange(len(of_split)))
    for run, settings, _, _, load in runs_of(args):
        if held is None:
            held_back = settings.held_back
            rest, held_rows = split_held_back(train, held_back)
            held = Gallery(train, held_rows)
            bank_rows = np.sort(np.random.default_rng(args.seed).choice(rest, min(args.bank, len(rest)), replace=False))
        elif settings.held_back != held_back:
            raise ValueError(f"{run} held back {settings.held_back} images, {args.runs[0]} {held_back}: not the same")
        data, _ = load(args.train_split)
        aligner = trained_aligner(run, settings, data)
        bank_images, bank_captions, bank_owner = embed(aligner, data, bank_rows)
        first = torch.cat([torch.ones(1, dtype=torch.bool), bank_owner[1:] != bank_owner[:-1]])
        bank = bank_images, bank_captions[first]  # one caption of each image
        held.add(aligner, data, bank)
        split.add(aligner, load(args.split)[0], bank)
    return held, split, bank_rows


class Likelihoods:
    """log P(caption | image) by a captioner, of images by their cached features."""

    def __init__(self, captioner: str, cache_dir: str, batch_size: int = 64):
        self.model = BlipRBMForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32).eval()
        self.processor = BlipRBMProcessor.from_pretrained(captioner)
        self.cache_dir, self.batch_size = cache_dir, batch_size

    def features(self, dataset):
        tower, image_processor = self.model.vision_model, self.processor.image_processor
        return cache_features(tower, image_processor, dataset, self.cache_dir, dtype="auto")

    def token_ids(self, gallery: Gallery) -> list[torch.Tensor]:
        texts = [text for of_image in gallery.dataset.select(gallery.rows)["captions"] for text in of_image]
        encoded = self.processor(text=texts)
        return [ids[mask.bool()] for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"])]

    @torch.no_grad()
    def of_pairs(self, store, rows, token_ids: list[torch.Tensor], chosen: torch.Tensor, desc: str) -> torch.Tensor:
        """(n, m) of the pairs of image, one of these rows of the store, and caption that are chosen (n, m), NaN elsewhere."""
        result = torch.full(chosen.shape, float("nan"))
        pad = self.model.config.text_config.pad_token_id
        lengths = torch.tensor([len(ids) for ids in token_ids])
        with packed_linears(self.model), tqdm(total=int(chosen.sum()), desc=desc) as bar:
            for image, mask in enumerate(chosen):
                captions = mask.nonzero().flatten()
                if not len(captions):
                    continue
                captions = captions[lengths[captions].argsort()]  # rows of like length together
                encoding = self.model.encode_image(vision_hidden_states=store.batch([rows[image]]), rbm=False)
                for some in captions.split(self.batch_size):
                    ids = pad_sequence([token_ids[caption] for caption in some], batch_first=True, padding_value=pad)
                    result[image, some], _ = self.model.score_captions(encoding, ids)
                bar.update(len(captions))
        return result


def add_likelihoods(gallery: Gallery, likelihoods: Likelihoods, bank: tuple, args):
    """`bank`: a store of features, and the bank's rows in it."""
    ids = likelihoods.token_ids(gallery)
    store = likelihoods.features(gallery.dataset)
    chosen = gallery.candidates(args.candidates)
    gallery.likelihood = likelihoods.of_pairs(store, gallery.rows, ids, chosen, "likelihood")
    nearest = torch.zeros_like(gallery.bank_images, dtype=torch.bool)
    nearest.scatter_(0, gallery.bank_images.topk(args.bank_candidates, 0).indices, True)
    of_bank = likelihoods.of_pairs(*bank, ids, nearest, "likelihood, bank")
    gallery.bank_likelihood = of_bank.T[nearest.T].view(nearest.shape[1], -1)


def choose(gallery: Gallery) -> dict[str, dict]:
    """Weights of each way, by the sum of its recalls on held-back images."""
    best = lambda ways: max(ways, key=lambda way: sum_of_recalls(recalls(gallery.score(**way), gallery.owner)))
    hubs = best([{"temperature": t, "hub_weight": w} for t, w in itertools.product(TEMPERATURES, HUB_WEIGHTS)])
    likelihood = best([{"likelihood_weight": w} for w in LIKELIHOOD_WEIGHTS])
    both = best([hubs | {"likelihood_weight": w} for w in LIKELIHOOD_WEIGHTS])
    return {"together": {}, "hubs": hubs, "likelihood": likelihood, "hubs and likelihood": both}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="output folders of training.align")
    parser.add_argument("--captioner", required=True, help="folder or Hub id of a BLIP-RBM")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--candidates", type=int, default=16, help="of each image and caption that are looked at again")
    parser.add_argument("--bank", type=int, default=2000, help="training images that tell which captions are hubs")
    parser.add_argument(
        "--bank_candidates", type=int, default=8, help="of them, for which a caption's usual likelihood is asked"
    )
    parser.add_argument("--cache_dir", default="runs/features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="results, JSON")
    args = parser.parse_args()
    held, split, bank_rows = galleries(args)
    likelihoods = Likelihoods(args.captioner, args.cache_dir)
    bank = likelihoods.features(held.dataset), bank_rows
    for gallery in (held, split):
        add_likelihoods(gallery, likelihoods, bank, args)
    ways = choose(held)
    results = {"settings": vars(args), "ways": ways, "images": len(split.similarity), "captions": len(split.owner)}
    for name, gallery in (("held_back", held), ("runs", split)):
        results[name] = {way: recalls(gallery.score(**settings), gallery.owner) for way, settings in ways.items()}
    print(json.dumps(ways))
    print(retrieval_table(results))
    write_json(args.output, results)


if __name__ == "__main__":
    main()
