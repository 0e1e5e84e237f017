"""CapFilt with the RBM's energy: find captions that do not belong to their images, drop them, and put the model's own
in their place.

    python -m training.capfilt --model checkpoints/blip-rbm-small --dataset my-web-pairs --output_dir runs/filtered
    python -m training.train_captioner ... --dataset runs/filtered

A caption is judged by how much likelier the RBM finds its words for its image than for other images, and kept if it is
likelier right than wrong by a logistic function of that (BLIP, arXiv 2201.12086, section 3.3, with the energy for its
matching head), fitted on held-back images: their captions, of which an unknown share is wrong, and exchanged ones,
which all are. `capfilt.json` says how large that share is found. The head of `BlipRBMForImageTextRetrieval` is fitted
too, on PMI alone and against hard negatives, the best of a few captions of other images, and written into the model's
config.

With `--cross_fit` the RBMs that judge are trained here, one on each half of the images, which judges the other half: a
model that was trained on the pairs finds all of them right. The captioner needs no RBM then.

With `--shuffle 0.3` that share of the captions is first exchanged between images and an RBM is trained on the noisy
pairs of each half of the images, which judges the other half, its synthetic captions as well; with `--rounds 2` once
more, on what the first two left. `capfilt.json` says how well the wrong ones are found. For an honest measurement the
model must not know the right pairs: a tower that never saw captions, a captioner trained on the noisy pairs, which are
written to `OUTPUT_DIR-noisy` (beside, as a data set is all parquet files below a folder).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.rbm import pairwise_mutual_information, pointwise_mutual_information
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import caption_rows
from training.lib.checkpoints import refuse_other_output, write_json
from training.lib.data import CaptionWords, caption_words, choose_words, split_held_back
from training.lib.distributed import new_accelerator, own_processes
from training.lib.features import cache_features, load_features
from training.lib.rbm_evaluation import image_inputs
from training.lib.rbm_objective import PooledPairs, RBMArguments
from training.lib.rbm_training import in_pieces, train, with_new_rbm
from training.lib.stage import run_stage


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
    cross_fit: bool = field(
        default=False,
        metadata={
            "help": "judge each half of the pairs by an RBM trained on the other half, as none that knew them could"
        },
    )
    epochs: int = field(default=15, metadata={"help": "of the RBMs trained with --shuffle or --cross_fit"})
    rounds: int = field(
        default=1,
        metadata={"help": "times that those are trained, from the second on with the captions that are likelier right"},
    )
    batch_size: int = field(default=192, metadata={"help": "of their training"})
    negatives: int = field(
        default=4, metadata={"help": "captions of other images among which the hard negative is chosen"}
    )
    save: bool = field(
        default=True,
        metadata={"help": "write the fitted matching head into the model's config.json, if it is a folder"},
    )
    seed: int = field(default=0, metadata={"help": "of everything random"})

    @property
    def trains(self) -> bool:
        """Whether the RBMs that judge are trained here."""
        return self.cross_fit or self.shuffle > 0


def shuffled(captions: list[list[str]], share: float, seed: int) -> tuple[list[list[str]], list[np.ndarray]]:
    """The captions with a share of them exchanged between images; and which those are."""
    rng = np.random.default_rng(seed)
    places = [(i, k) for i, of_image in enumerate(captions) for k in range(len(of_image))]
    chosen = rng.permutation(len(places))[: round(share * len(places))]
    # in the order of their images, half a round on: no caption meets its own image again unless an image has half of
    # them
    chosen = np.sort(chosen)
    given = np.roll(chosen, len(chosen) // 2)
    noisy, wrong = [list(of_image) for of_image in captions], [np.zeros(len(of_image), bool) for of_image in captions]
    for place, source in zip(chosen, given):
        (i, k), (j, m) = places[place], places[source]
        noisy[i][k], wrong[i][k] = captions[j][m], i != j
    return noisy, wrong


@torch.no_grad()
def caption_evidence(rbm, store, words: CaptionWords, rows, references, whose=None) -> list[np.ndarray]:
    """Of each of these images' captions, how much likelier its words are for its image than for others, nats.

    PMI(w; x) - log mean exp PMI(w; x') over the reference images x': some captions go with many images, whatever theirs
    is.

    Args:
        whose: the image whose captions are held against each of `rows`; default: itself.
    """
    p, result = rbm.parameters_fp32, []
    others = image_inputs(rbm, store, references)
    whose = np.asarray(rows if whose is None else whose)
    pieces = max(1, len(rows) // 512)
    for part, source in zip(np.array_split(np.asarray(rows), pieces), np.array_split(whose, pieces)):
        a = image_inputs(rbm, store, part)
        w = [words[i].float().to(a.device) for i in source]
        with_others = pairwise_mutual_information(p, others, torch.cat(w)).logsumexp(0) - np.log(len(others))
        own = torch.cat([pointwise_mutual_information(p, row[None], of_image) for row, of_image in zip(a, w)])
        result += [e.numpy() for e in (own - with_others).cpu().split([len(of_image) for of_image in w])]
    return result


def fit_head(match: np.ndarray, other: np.ndarray) -> tuple[list[float], float]:
    """Bias and weight of the log-odds of a match, from what both kinds of pairs score; and the AUC."""
    score, label = np.concatenate([match, other])[:, None], np.repeat([True, False], [len(match), len(other)])
    fitted = LogisticRegression(C=100.0, class_weight="balanced").fit(score, label)
    return [float(fitted.intercept_[0]), float(fitted.coef_[0, 0])], float(roc_auc_score(label, score[:, 0]))


@torch.no_grad()
def fit_matching_head(rbm, store, words: CaptionWords, rows, negatives: int, seed: int) -> tuple[list[float], float]:
    """The head of `BlipRBMForImageTextRetrieval`, on PMI: captions against hard negatives, each the best of a few of
    other images."""
    p, rng = rbm.parameters_fp32, np.random.default_rng(seed)
    a = image_inputs(rbm, store, rows)
    w = words.choose(np.asarray(rows), rng.random(len(rows))).to(a.device)
    similarity = pairwise_mutual_information(p, a, w).cpu().numpy()
    hard = []
    for i, row in enumerate(similarity):
        others = np.delete(np.arange(len(rows)), i)
        hard.append(row[rng.choice(others, min(negatives, len(others)), replace=False)].max())
    return fit_head(similarity.diagonal(), np.array(hard))


def fit_mixture(own: np.ndarray, other: np.ndarray, iterations: int = 30) -> tuple[list[float], float]:
    """Bias and weight of the log-odds that one of `own` is right, and the share of those that are wrong.

    Positive and unlabelled learning (Elkan & Noto, KDD 2008): an unknown share of `own` is wrong, and scores as `other`
    does, where all are. Below the median of `other` hardly a right one is found, which gives the share; then logistic
    regression and the chances of `own` in turns (EM).

    Args:
        own (n,), other (m,): evidence for captions of their images, and for exchanged ones.
    """
    share = float(np.clip((own <= np.median(other)).mean() / 0.5, 0.01, 0.99))
    score = np.concatenate([own, own, other])[:, None]
    label = np.repeat([True, False, False], [len(own), len(own), len(other)])
    chance = np.full(len(own), 1 - share)
    for _ in range(iterations):
        weight = np.concatenate([chance, 1 - chance, np.ones(len(other))])
        fitted = LogisticRegression(C=100.0).fit(score, label, sample_weight=weight)
        # its prior is of all that it was fitted to; that of `own` is 1 - share
        right = chance.sum()
        bias = fitted.intercept_[0] + np.log((1 - share) / share) - np.log(right / (len(own) + len(other) - right))
        chance = expit(bias + fitted.coef_[0, 0] * own)
    return [float(bias), float(fitted.coef_[0, 0])], share


@torch.no_grad()
def fit_filter(rbm, store, words: CaptionWords, rows, seed: int) -> tuple[list[float], float]:
    """`fit_mixture` of `caption_evidence` on these images: their captions, and those of others, exchanged at random."""
    own = np.concatenate(caption_evidence(rbm, store, words, rows, rows))
    other = caption_evidence(rbm, store, words, rows, rows, np.random.default_rng(seed).permutation(rows))
    return fit_mixture(own, np.concatenate(other))


def kept_captions(captions: list[str], chance: np.ndarray, least: float) -> list[str]:
    return [caption for caption, p in zip(captions, chance) if p >= least]


def chances(head: list[float], evidence: list[np.ndarray]) -> list[np.ndarray]:
    return [expit(head[0] + head[1] * of_image) for of_image in evidence]


def rbm_of_noisy_pairs(model, store, words, rows, held_rows, args: CapFiltArguments, name: str):
    """A new RBM, trained on these images and their captions as they are."""
    set_seed(args.seed)
    settings = RBMArguments(
        model=args.model, output_dir=str(Path(args.output_dir) / name), epochs=args.epochs, eval_every=args.epochs,
        batch_size=min(args.batch_size, len(rows)), hidden_size=model.config.rbm_hidden_size, seed=args.seed,
    )  # fmt: skip
    fresh = with_new_rbm(model, words.word_ids, settings, in_pieces(store, rows), words.share(rows))
    held_back = store.batch(held_rows), [words[i] for i in held_rows]
    train(new_accelerator(args.seed), fresh, PooledPairs(store, rows, words, args.seed), held_back, settings)
    return fresh.rbm_layer.rbm


def noisy_judges(model, store, words, train_rows, held_rows, args: CapFiltArguments, round_number: int = 0):
    """Two RBMs of noisy pairs, each with the rows of the half of the images that it has not seen."""
    halves = np.array_split(np.random.default_rng(args.seed).permutation(train_rows), 2)
    judges = []
    for k, half in enumerate(halves):
        seen = np.array([row for row in np.sort(half) if len(words[row])])
        if not len(seen):
            raise ValueError(f"--least {args.least} leaves no caption to train on once more: give a lower one")
        name = f"rbm-{k}" + (f"-{round_number}" if round_number else "")
        judges.append((rbm_of_noisy_pairs(model, store, words, seen, held_rows, args, name), halves[1 - k]))
    return judges


@dataclass
class Filter:
    """Judges captions of the training images.

    Args:
        judges: RBMs, and the rows of the images that each judges; the scale of each is fitted once, here.
        words: of the captions of all images. Those of the held-back ones make the scale, against exchanged ones; they
            may be as wrong as the others.
        least: chance from which a caption is kept.
    """

    judges: list
    store: object
    words: CaptionWords
    held_rows: np.ndarray
    least: float
    seed: int

    def __post_init__(self):
        fitted = [fit_filter(rbm, self.store, self.words, self.held_rows, self.seed) for rbm, _ in self.judges]
        self.heads = [head for head, _ in fitted]
        self.share_wrong = float(np.mean([share for _, share in fitted]))

    def __call__(self, rows, words: CaptionWords) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of these images, the evidence for each caption in `words`, and its chance of being right."""
        evidence, chance = {}, {}
        for (rbm, own), head in zip(self.judges, self.heads):
            part = np.intersect1d(rows, own)
            found = caption_evidence(rbm, self.store, words, part, self.held_rows)
            evidence |= dict(zip(part, found))
            chance |= dict(zip(part, chances(head, found)))
        return [evidence[row] for row in rows], [chance[row] for row in rows]


@torch.no_grad()
def synthetic_captions(model, processor, dataset, cache_dir) -> list[str]:
    """One caption of each image, by plain BLIP: greedy, so that it is cheap."""
    store = cache_features(model.vision_model, processor.image_processor, dataset, cache_dir)
    return caption_rows(model, processor, store, range(len(dataset)), rbm=False, num_beams=1, max_new_tokens=20)


def write_pairs(dataset: Dataset, kept: dict[int, list[str]], captions: list[list[str]], folder: Path, split: str):
    """The images that have a caption left, as a parquet data set. Held-back images, of which `kept` says nothing, stay as
    they are: whatever stage reads the result holds the same ones back."""
    left = [kept.get(row, of_image) for row, of_image in enumerate(captions)]
    rows = [row for row, of_image in enumerate(left) if of_image]
    pairs = dataset.select_columns(["image", "image_id"]).select(rows)
    pairs = pairs.add_column("captions", [left[row] for row in rows])
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "unfinished"
    pairs.to_parquet(temporary)
    temporary.replace(folder / f"{split}.parquet")


def add_synthetic(model, processor, images, kept, rows, words: CaptionWords, judge: Filter, data) -> int:
    """Add the model's own caption to images that lost captions, if it passes the same filter; how many did."""
    lost = [i for i, row in enumerate(rows) if len(kept[i]) < len(words[row])]
    if not lost:
        return 0
    written = dict(zip(rows[lost].tolist(), synthetic_captions(model, processor, images.select(lost), data.cache_dir)))
    every = [[written[i]] if i in written else [] for i in range(len(words))]
    chance = np.concatenate(judge(rows[lost], caption_words(processor.tokenizer, every, words.word_ids))[1])
    passed = [i for i, p in zip(lost, chance) if p >= judge.least]
    for i in passed:
        kept[i].append(written[int(rows[i])])
    return len(passed)


def refuse_impossible(data: DataArguments, args: CapFiltArguments):
    """Raises ValueError for settings that cannot be, before anything is read."""
    if args.rounds < 1 or (args.rounds > 1 and not args.trains):
        raise ValueError(
            f"--rounds is {args.rounds}, but must be at least 1, and 1 without --shuffle or --cross_fit, which train RBMs"
        )
    if data.streaming:
        raise ValueError("capfilt writes the images that it keeps, so it cannot stream them: leave --streaming out")


def judges_of_noisy_pairs(model, processor, store, captions, words, train_rows, held_rows, args: CapFiltArguments):
    """Two RBMs of noisy pairs; in every round but the first they are trained on the captions that the two before found
    right."""
    judges = noisy_judges(model, store, words, train_rows, held_rows, args)
    for round_number in range(1, args.rounds):
        chance = Filter(judges, store, words, held_rows, args.least, args.seed)(train_rows, words)[1]
        left = [list(of_image) for of_image in captions]  # of held-back images all
        for i, of_image in zip(train_rows, chance):
            left[i] = kept_captions(captions[i], of_image, args.least)
        left = caption_words(processor.tokenizer, left, words.word_ids)
        judges = noisy_judges(model, store, left, train_rows, held_rows, args, round_number)
    return judges


def save_matching_head(model, store, words, held_rows, args: CapFiltArguments) -> dict:
    """Fit the matching head to the model's own RBM, and write it into the model's config.json if it is a folder."""
    head, auc = fit_matching_head(model.rbm_layer.rbm, store, words, held_rows, args.negatives, args.seed)
    config_file = Path(args.model) / "config.json"
    if args.save and config_file.exists():
        write_json(config_file, json.loads(config_file.read_text()) | {"rbm_match": head})
    return {"matching_head": head, "auc_against_hard_negatives": auc}


def how_well_found(wrong, rows, evidence, chance, least: float) -> dict[str, float]:
    """How well exchanged captions are found: `wrong`, of each image which those are."""
    is_wrong = np.concatenate([wrong[i] for i in rows])
    right = [~wrong[i][of_image >= least] for i, of_image in zip(rows, chance)]
    return {
        "auc_of_wrong_captions": float(roc_auc_score(is_wrong, -np.concatenate(evidence))),
        "share_right_before": float(1 - is_wrong.mean()),
        "share_right_after": float(np.concatenate(right).mean()),
    }


def words_to_judge_by(model, processor, captions, train_rows, args: CapFiltArguments) -> CaptionWords:
    """The RBM's words in the captions; of a captioner without an RBM, whose pairs are shuffled, the commonest ones."""
    word_ids = model.config.rbm_word_ids
    if not word_ids:
        if not args.trains:
            raise ValueError(
                f"{args.model} has no RBM that knows words: train one first (training.train_rbm), or here with --cross_fit true"
            )
        word_ids = choose_words(processor.tokenizer, (captions[i] for i in train_rows), RBMArguments.num_words)
    return caption_words(processor.tokenizer, captions, word_ids)


def main():
    data, args = parse_arguments(DataArguments, CapFiltArguments)
    output_dir = Path(args.output_dir)
    refuse_impossible(data, args)
    refuse_other_output(output_dir)
    noisy_dir = output_dir.with_name(output_dir.name + "-noisy")
    if args.shuffle:
        refuse_other_output(noisy_dir)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval().to(own_processes().device)
    pooling = model.config.rbm_pooling
    dataset, store = load_features(data, model.vision_model, processor.image_processor, pooling=pooling)
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions, wrong = shuffled(dataset["captions"][:], args.shuffle, args.seed)
    words, report = words_to_judge_by(model, processor, captions, train_rows, args), {}
    if args.trains:
        judges = judges_of_noisy_pairs(model, processor, store, captions, words, train_rows, held_rows, args)
    else:
        judges = [(model.rbm_layer.rbm, train_rows)]
        report |= save_matching_head(model, store, words, held_rows, args)
    judge = Filter(judges, store, words, held_rows, args.least, args.seed)
    evidence, chance = judge(train_rows, words)
    kept = [kept_captions(captions[i], of_image, args.least) for i, of_image in zip(train_rows, chance)]
    if not any(kept):
        raise ValueError(
            f"no caption is right with a chance of --least {args.least} or more: give a lower one; nothing was written"
        )
    if args.shuffle:
        report |= how_well_found(wrong, train_rows, evidence, chance, args.least)
    report |= {
        "captions": sum(len(captions[i]) for i in train_rows), "kept": sum(map(len, kept)),
        "share_wrong_estimated": judge.share_wrong,
        "capfilt": asdict(args), "data": asdict(data),
    }  # fmt: skip
    images = dataset.select(train_rows)
    if args.synthetic:
        report["synthetic_kept"] = add_synthetic(model, processor, images, kept, train_rows, words, judge, data)
    report["images_kept"] = sum(map(bool, kept))
    write_pairs(dataset, dict(zip(train_rows, kept)), captions, output_dir, data.train_split)
    if args.shuffle:
        write_pairs(dataset, {}, captions, noisy_dir, data.train_split)
    write_json(output_dir / "capfilt.json", report)
    print(json.dumps({name: value for name, value in report.items() if name not in ("capfilt", "data")}, indent=1))


if __name__ == "__main__":
    run_stage(main)
