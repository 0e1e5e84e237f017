"""Does BLIP-RBM need its RBM? The same decoding with simpler things in its place.

    python -m experiments.controls --model checkpoints/blip-rbm-small --dataset flickr8k web \
        --worlds flickr8k web coco --output experiments/controls/controls.json

Of every image the same candidates, plain BLIP's beams, and those that a stand-in's own guide gives. Each stand-in (`stand_ins.py`) tells the
PMI of their words and the CIDEr-D to be expected, and has its weights chosen by the same rule on the same held-back training
images (`training/lib/decoding_rule.py`). Measured on the validation split of each of the worlds, with paired intervals.
Candidates are kept in `--work`: a second run goes on from them.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from experiments.controls.stand_ins import STAND_INS, Images, StandIn, class_evidence
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.configuration_blip_rbm import SIMILARITIES
from modeling_blip_rbm.generation_blip_rbm import caption_similarity, consensus
from modeling_blip_rbm.phrases_blip_rbm import ORDERS
from modeling_blip_rbm.processors_blip_rbm import word_columns, words_said
from training.evaluate_captions import differences, per_image, summary
from training.fit_phrases import choose_phrases, fit, mean_vectors, words_of
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import candidates_of, caption_rows
from training.lib.checkpoints import whole_file, write_json
from training.lib.data import caption_words, fold_of, split_held_back
from training.lib.decoding_rule import Choices, simplest_rule
from training.lib.features import cache_features, load_features
from training.lib.metrics import CiderD
from training.lib.pairs import load_pairs
from training.lib.stage import run_stage


# Shares of the features' mean variance; chosen on held-back images for each stand-in.
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
HELD_BACK = "held back"


@dataclass
class ControlArguments:
    model: str = field(metadata={"help": "folder or Hub id of a BLIP-RBM"})
    worlds: list[str] = field(metadata={"nargs": "+", "help": "data sets to measure on"})
    output: str = field(metadata={"help": "results file, JSON"})
    work: str = field(default="runs/controls", metadata={"help": "where candidates are kept"})
    split: str = field(default="validation", metadata={"help": "split of the worlds"})
    stand_ins: list[str] = field(default_factory=lambda: list(STAND_INS), metadata={"help": "which are compared"})
    guides: list[str] = field(
        default_factory=lambda: ["RBM", "linear", "MLP"],
        metadata={"help": "stand-ins that are measured with their own guide too"},
    )
    guidance: float = field(default=0.4, metadata={"help": "weight of guide"})
    most_weights: int = field(default=3, metadata={"help": "weights of guide and re-rank that may be on together"})
    candidates: int = field(default=9, metadata={"help": "beams of an image"})
    num_beams: int = field(default=3, metadata={"help": "of plain BLIP, the baseline"})


class GainsOfImage(LogitsProcessor):
    """Guide by gains g (B, K) that depend on the image alone, as `RBMGuidance` by the RBM's."""

    def __init__(self, gains, word_ids, vocab_size: int, beta: float, clip: float = 5.0):
        self.bonus = beta * gains.clamp(-clip, clip)
        self.word_ids, self.columns = torch.tensor(word_ids), word_columns(word_ids, vocab_size)

    def __call__(self, input_ids, scores):
        said = words_said(input_ids, self.columns, len(self.word_ids))
        bonus = self.bonus.repeat_interleave(len(said) // len(self.bonus), 0) * (1 - said)
        return scores.index_add(1, self.word_ids, bonus.to(scores.dtype))


@dataclass
class Candidates:
    """What was written of some images: token ids (n, m, T) and what the decoder and the candidates themselves say of them."""

    sequences: torch.Tensor
    log_prob: torch.Tensor  # (n, m)
    length: torch.Tensor
    texts: list[list[str]]
    cider: np.ndarray  # (n, m)


def read_candidates(file: Path, processor, references: list[list[str]]) -> Candidates:
    found = torch.load(file, weights_only=True)
    n = found["sequences"].shape[1]
    texts = processor.captions(found["sequences"].flatten(0, 1))
    texts = [texts[i : i + n] for i in range(0, len(texts), n)]
    scorer = CiderD(references)
    cider = np.array([[scorer.score(i, text) for text in of_image] for i, of_image in enumerate(texts)])
    return Candidates(**found, texts=texts, cider=cider)


class Phrases:
    """The phrases of the training captions, fitted anew for each stand-in."""

    def __init__(self, processor, text_config, train: Images, held: Images, min_images: int = 10):
        self.pad = text_config.pad_token_id
        self.special = (text_config.pad_token_id, text_config.sep_token_id, text_config.bos_token_id)
        words, image = words_of(processor, train.captions)
        self.block = choose_phrases(words, image, self.pad, min_images, 1, text_config.vocab_size)
        self.targets = mean_vectors(self.block, words, image, self.pad)
        self.held_targets = mean_vectors(self.block, *words_of(processor, held.captions), self.pad).toarray()

    def predictor(self, stand_in: StandIn, train: Images, held: Images):
        """A function of images: their expected mean CIDEr vectors (n, P). And the ridge, if there is a regression."""
        if stand_in.phrases is not None:
            return (lambda images: stand_in.phrases(images, self.targets)), None
        views = [stand_in.features(train, view) for view in range(len(train.pooled))]
        self.block.weight = torch.zeros(len(self.block.numbers), views[0].shape[1])
        best, kept = -np.inf, None
        for ridge in RIDGES:
            fit(self.block, views, self.targets, ridge)
            weight, bias = self.block.weight, self.block.bias
            guess = (bias + stand_in.features(held, 0) @ weight.T).numpy()
            fitness = -((self.held_targets - guess) ** 2).sum()
            if fitness > best:
                best, kept = fitness, (weight.clone(), bias.clone(), ridge)
        weight, bias, ridge = kept
        return (lambda images: bias + stand_in.features(images, 0) @ weight.T), ridge

    def expected_cider(self, predicted: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        """(n, m), as `PhraseBlock.expected_cider`, of predicted mean vectors (n, P) and captions (n, m, T)."""
        parts = []
        for vector, of_image in zip(predicted, sequences):
            columns, values = self.block.vectors(of_image, self.special)
            length = (~torch.isin(of_image, torch.tensor(self.special))).sum(-1)
            parts.append((values * vector[columns]).sum(-1) * self.block.length_factor[length])
        return 10 / len(ORDERS) * torch.stack(parts)


def gather(model, processor, data: DataArguments, worlds: list[str], split: str):
    """Training, held-back and each world's images; the ids of the held-back ones."""
    rbm, config = model.rbm_layer.rbm, model.config
    dataset, store = load_features(data, model.vision_model, processor.image_processor)
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions, ids = dataset["captions"][:], dataset["image_id"][:]

    def images(captions, store, rows, views: int, scale=None) -> Images:
        pooled = [
            torch.cat([store.batch(rows[i : i + 256], view).mean(1) for i in range(0, len(rows), 256)])
            for view in range(views)
        ]
        evidence = None
        if model.class_tokens is not None:
            evidence = class_evidence(model.class_tokens, pooled[0], config.rbm_word_ids)
        mean, std = scale or (pooled[0].mean(0), pooled[0].std(0))
        pooled = [(x - mean) / std.clamp(min=1e-6) for x in pooled]
        words = caption_words(processor.tokenizer, captions, config.rbm_word_ids)
        made = Images(captions, words, pooled, [], store, rows, config.rbm_pooling, evidence)
        made.hidden_input = [made.hidden_input_of(rbm, view) for view in range(views)]
        return made, (mean, std)

    train, scale = images([captions[i] for i in train_rows], store, train_rows, store.num_views)
    sets = {HELD_BACK: images([captions[i] for i in held_rows], store, held_rows, 1, scale)[0]}
    for world in worlds:
        of_world = load_pairs(world, split, data.max_images)
        features = cache_features(model.vision_model, processor.image_processor, of_world, data.cache_dir, dtype="auto")
        name = Path(world).name
        sets[name] = images(of_world["captions"][:], features, np.arange(len(of_world)), 1, scale)[0]
    return train, sets, [ids[row] for row in held_rows]


class Comparison:
    """The same images, candidates and phrases for every stand-in."""

    def __init__(
        self, model, processor, train: Images, sets: dict[str, Images], fold: np.ndarray, args: ControlArguments
    ):
        self.model, self.processor, self.args = model, processor, args
        self.train, self.sets, self.fold = train, sets, fold
        self.word_ids, text = model.config.rbm_word_ids, model.config.text_config
        self.vocab_size, self.columns = text.vocab_size, word_columns(self.word_ids, text.vocab_size)
        self.phrases = Phrases(processor, text, train, sets[HELD_BACK])
        self.share = train.words.share(np.arange(len(train.captions)))

    @property
    def worlds(self) -> list[str]:
        return [name for name in self.sets if name != HELD_BACK]

    def baseline(self) -> dict[str, list[str]]:
        settings = {"rbm": False, "num_beams": self.args.num_beams}
        of_world = lambda images: caption_rows(self.model, self.processor, images.tokens, images.rows, **settings)
        return {world: of_world(self.sets[world]) for world in self.worlds}

    def candidates(self, of: str, by: str = "plain", gains=None) -> Candidates:
        """The beams of one set of images, plain or guided by a stand-in: by the RBM itself, or by these gains (n, K)."""
        file = Path(self.args.work) / f"{of}-{by}.pt"
        if not file.exists():
            self.write_candidates(file, self.sets[of], by, gains)
        return read_candidates(file, self.processor, self.sets[of].captions)

    def write_candidates(self, file: Path, images: Images, by: str, gains, batch_size: int = 8):
        settings, parts = {"rbm_guidance": self.args.guidance if by == "RBM" else 0.0}, []
        for start in tqdm(range(0, len(images.rows), batch_size), desc=file.stem):
            some = slice(start, start + batch_size)
            if gains is not None:
                settings["logits_processor"] = [
                    GainsOfImage(gains[some], self.word_ids, self.vocab_size, self.args.guidance)
                ]
            encoding = self.model.encode_image(vision_hidden_states=images.tokens.batch(images.rows[some]))
            sequences, scored = candidates_of(self.model, encoding, self.args.candidates, **settings)
            parts.append([part.unflatten(0, (-1, self.args.candidates)) for part in (sequences, *scored)])
        sequences, log_prob, length = zip(*parts)
        longest, end = max(s.shape[2] for s in sequences), self.model.config.text_config.sep_token_id
        sequences = torch.cat([F.pad(s, (0, longest - s.shape[2]), value=end) for s in sequences])
        with whole_file(file) as temporary:
            torch.save(
                {"sequences": sequences, "log_prob": torch.cat(log_prob), "length": torch.cat(length)}, temporary
            )

    def choices(self, stand_in: StandIn, predict, of: str, candidates: Candidates) -> Choices:
        """What re-rank can weigh of the candidates if this stands in the RBM's place."""
        images, sequences = self.sets[of], candidates.sequences
        parts = {"log_prob": candidates.log_prob, "length": candidates.length}
        for kind in SIMILARITIES:
            parts[kind] = consensus(caption_similarity(sequences, kind, self.phrases.special))
        parts["cider"] = self.phrases.expected_cider(predict(images), sequences)
        if stand_in.information is not None:
            said = words_said(sequences.flatten(0, 1), self.columns, len(self.word_ids))
            parts["pmi"] = stand_in.information(images, said.unflatten(0, sequences.shape[:2]))
        return Choices(candidates.texts, {name: part.numpy() for name, part in parts.items()}, candidates.cider)

    def captions(self, name: str, fitted, guided: bool) -> tuple[dict[str, list[str]], dict]:
        """What is said of each world with a stand-in, `fitted` as below, and its settings."""
        stand_in, predict, ridge = fitted
        gains = lambda of: stand_in.gains(self.sets[of]) if guided and stand_in.gains else None
        choices = lambda of, by: self.choices(stand_in, predict, of, self.candidates(of, by, gains(of)))
        by, guidance = (name, self.args.guidance) if guided else ("plain", 0.0)
        of_held_back = [({"rbm_guidance": guidance}, choices(HELD_BACK, by))]
        weights, rules = simplest_rule(of_held_back, self.fold, self.args.most_weights - guided)
        rerank, said = {n: value for n, value in weights.items() if n.startswith("rbm_rerank")}, {}
        for world in self.worlds:
            texts = self.candidates(world, by, gains(world)).texts
            said[world] = [of_image[i] for of_image, i in zip(texts, choices(world, by).chosen(rerank))]
        return said, {"weights": weights, "ridge": ridge, "rules": rules[:5]}

    def fitted(self, name: str):
        """A stand-in, the function of images that gives their expected mean CIDEr vectors, and its ridge."""
        held = self.sets[HELD_BACK]
        with torch.enable_grad():
            stand_in = STAND_INS[name](self.model.rbm_layer.rbm, self.train, held, self.share)
        return stand_in, *self.phrases.predictor(stand_in, self.train, held)


@torch.no_grad()
def main():
    data, args = parse_arguments(DataArguments, ControlArguments)
    if unknown := sorted({*args.stand_ins, *args.guides} - set(STAND_INS)):
        raise ValueError(f"--stand_ins {', '.join(unknown)}: unknown; there are {', '.join(STAND_INS)}")
    torch.manual_seed(0)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    train, sets, held_ids = gather(model, processor, data, args.worlds, args.split)
    comparison = Comparison(model, processor, train, sets, fold_of(held_ids, 10), args)
    said, settings = {"BLIP": comparison.baseline()}, {}
    for name in args.stand_ins:
        fitted = comparison.fitted(name)
        for guided in (False, True) if name in args.guides else (False,):
            system = f"{name}, with guide" if guided else name
            said[system], settings[system] = comparison.captions(name, fitted, guided)
            print(system, settings[system]["weights"])
    write_json(args.output, {"model": args.model, "systems": settings, "worlds": compare(said, sets)})


def compare(said: dict[str, dict[str, list[str]]], sets: dict[str, Images]) -> dict:
    """The measures of each system on each world and on all together; there also less BLIP, and the RBM (with guide where it was tried) less
    it, with intervals."""
    worlds = list(said["BLIP"])
    ours = next((name for name in ("RBM, with guide", "RBM") if name in said), None)
    scores = {s: {w: per_image(said[s][w], sets[w].captions) for w in worlds} for s in said}
    result = {}
    for world in [*worlds, "all"]:
        part = {}
        for system in said:
            of_system = [scores[system][w] for w in (worlds if world == "all" else [world])]
            together = {name: np.concatenate([of_world[name] for of_world in of_system]) for name in of_system[0]}
            captions = [text for w in (worlds if world == "all" else [world]) for text in said[system][w]]
            part[system] = {"scores": together, "measures": summary(captions, together, None)}
        result[world] = {system: {"measures": entry["measures"]} for system, entry in part.items()}
        if world == "all":  # intervals of each world alone would take minutes, and say less
            for system, entry in part.items():
                result[world][system]["minus_blip"] = differences(entry["scores"], part["BLIP"]["scores"])
                if ours:
                    result[world][system]["rbm_minus_it"] = differences(part[ours]["scores"], entry["scores"])
    return result


if __name__ == "__main__":
    run_stage(main)
