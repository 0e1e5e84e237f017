"""Stage 3: fit the RBM's energy to captions that a captioner writes itself, so that re-rank chooses the better ones.

    python -m experiments.reranker.train_reranker experiments/reranker/reranker-small.yaml --model runs/rbm/best \
        --writer runs/fold-0/best runs/fold-1/best \
        --dataset flickr8k --output_dir runs/reranker

A `writer` samples candidates for training images, each with its sentence CIDEr-D. A candidate's score is that of
re-rank (log P per token, PMI, consensus, and their weights, which are learned along); the loss is minus the expected
CIDEr-D under the softmax of the scores over an image's candidates (listwise, as ListNet, Cao et al. 2007; an energy
trained on a metric, Bhattacharyya et al., EACL 2021), beside the losses that the RBM was trained with.

A writer that knows the training images by heart makes none of the faults there that it makes on new images. So there
may be several, each trained without a part of the images (`train_captioner --folds 2 --fold 0`, `--fold 1`), for which
it then writes: cross-fitting. Writer number k of n must be the one without fold k. `reranker.json` says how good the
samples are on training and on held-back images.
"""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.generation_blip_rbm import caption_similarity, consensus, word_columns, words_said
from modeling_blip_rbm.rbm import pointwise_mutual_information
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import caption_tokens, other_tokens
from training.lib.checkpoints import record_of_training, refuse_other_output, save_captioner, write_json
from training.lib.data import caption_words, fold_of, split_held_back
from training.lib.distributed import new_accelerator
from training.lib.features import load_features
from training.lib.metrics import CiderD
from training.lib.rbm_evaluation import evaluate_rbm
from training.lib.rbm_objective import PooledPairs, RBMArguments, RBMObjective
from training.lib.rbm_training import prepared, train_epoch
from training.lib.stage import run_stage


FASTER = 30  # times the learning rate, of the weights of a score's parts


@dataclass
class RerankerArguments(RBMArguments):
    writer: list[str] = field(
        default_factory=list,
        metadata={
            "help": "captioners that write the candidates, number k for the images of fold k; default: the model"
        },
    )
    writer_images: int = field(default=3000, metadata={"help": "training images that get candidates"})
    candidates: int = field(default=16, metadata={"help": "samples an image"})
    temperature: float = field(default=0.7, metadata={"help": "of the samples"})
    max_new_tokens: int = field(default=20, metadata={"help": "longest candidate"})
    listwise: float = field(default=20.0, metadata={"help": "weight of minus the expected CIDEr-D (1 is 100 points)"})


@torch.no_grad()
def write_candidates(writer, processor, store, rows, active, args: RerankerArguments) -> dict[str, torch.Tensor]:
    """Sampled candidates of these rows: sequences (rows, n, T), log P per token and consensus (rows, n)."""
    n, batch_size, text = args.candidates, 32, writer.config.text_config
    settings = {
        "do_sample": True,
        "num_beams": 1,
        "top_k": 0,
        "temperature": args.temperature,
        "max_new_tokens": args.max_new_tokens,
        "suppress_tokens": other_tokens(active, text.vocab_size),
        "rbm": False,
    }
    parts = {"sequences": [], "log_prob": [], "consensus": []}
    for start in tqdm(range(0, len(rows), batch_size), desc=f"write {n} candidates for {len(rows)} images"):
        features = store.batch(rows[start : start + batch_size])
        encoding = writer.encode_image(vision_hidden_states=features, rbm=False)
        prompt = torch.full((len(features) * n, 1), text.bos_token_id)
        sequences = writer.generate(encoding=encoding, input_ids=prompt, **settings)
        log_prob, length = writer.score_captions(encoding, sequences)
        sequences = torch.nn.functional.pad(
            sequences, (0, args.max_new_tokens + 1 - sequences.shape[1]), value=text.pad_token_id
        ).view(len(features), n, -1)
        special = (text.pad_token_id, text.sep_token_id, text.bos_token_id)
        parts["sequences"].append(sequences)
        parts["log_prob"].append((log_prob / length.clamp(min=1)).view(-1, n))
        parts["consensus"].append(consensus(caption_similarity(sequences, "jaccard", special)))
    return {name: torch.cat(values) for name, values in parts.items()}


def refuse_other_fold(writer: str, fold: int, folds: int):
    """ValueError if the record of a writer's training says that it was trained on the images for which it is to
    write."""
    trained = (record_of_training(writer) or {}).get("captioner", {})
    if folds > 1 and (found := (trained.get("fold"), trained.get("folds"))) not in ((None, None), (fold, folds)):
        raise ValueError(
            f"--writer number {fold} of {folds} must have been trained with --folds {folds} --fold {fold}, but {writer} was with "
            f"--folds {found[1]} --fold {found[0]}: it would write for images that it knows"
        )


class Candidates:
    """The candidates of some images, ready for the loss.

    Args:
        writers: (captioner, its `FeatureStore`) each. folds (rows,): the number of the one that writes for a row.
    """

    def __init__(self, writers, processor, rows, folds, references, active, columns, num_words, args):
        parts = {}
        for number, (writer, store) in enumerate(writers):
            which = np.flatnonzero(folds == number)
            if len(which):
                for name, values in write_candidates(writer, processor, store, rows[which], active, args).items():
                    whole = parts.setdefault(name, values.new_empty(len(rows), *values.shape[1:]))
                    whole[which] = values
        sequences = parts.pop("sequences")
        scorer = CiderD(references)
        texts = [processor.captions(of_image) for of_image in sequences]
        self.cider = torch.tensor([[scorer.score(i, text) for text in of_image] for i, of_image in enumerate(texts)])
        self.cider = self.cider.float()
        self.words = words_said(sequences.flatten(0, 1), columns, num_words).view(*sequences.shape[:2], -1).bool()
        self.log_prob, self.consensus = parts["log_prob"], parts["consensus"]

    def scores(self, p, weights, a_image, which):
        """(B, n) of the candidates of the images number `which`, with hidden inputs a_image (B, H) from the image."""
        pmi = pointwise_mutual_information(p, a_image[:, None], self.words[which].float())
        return weights[0] * self.log_prob[which] + weights[1] * pmi + weights[2] * self.consensus[which]

    def chosen(self, p, weights, a_image) -> float:
        """Mean CIDEr-D of the candidates with the best scores."""
        best = self.scores(p, weights, a_image, torch.arange(len(a_image))).argmax(1, keepdim=True)
        return 100 * self.cider.gather(1, best).mean().item()

    def summary(self) -> dict[str, float]:
        return {"sampled_cider": 100 * self.cider.mean().item(), "oracle_cider": 100 * self.cider.amax(1).mean().item()}


class RerankObjective(torch.nn.Module):
    """The RBM's own losses on references, and minus the expected CIDEr-D of its choice among the candidates."""

    def __init__(self, rbm, candidates: Candidates, candidate_images, settings: RerankerArguments):
        super().__init__()
        self.own, self.settings = RBMObjective(rbm, settings), settings
        self.candidates, self.candidate_images = candidates, candidate_images  # (images, views, V)
        # of log P, PMI and consensus; three numbers that have further to go than the RBM's weights
        self.log_weights = torch.nn.Parameter(torch.tensor([10.0, 0.5, 10.0]).log() / FASTER)

    @property
    def weights(self):
        return (FASTER * self.log_weights).exp()

    def forward(self, pooled, w, noise):
        loss, terms = self.own(pooled, w, noise)
        rbm, images = self.own.rbm, self.candidate_images
        which = torch.randint(len(images), (len(pooled),))
        x = rbm.standardise(images[which, torch.randint(images.shape[1], which.shape)])
        x = x * (torch.rand_like(x) >= self.settings.image_dropout).float()
        p = rbm.parameters_fp32
        probs = self.candidates.scores(p, self.weights, rbm.hidden_input(x), which).softmax(-1)
        terms["expected_cider"] = (probs * self.candidates.cider[which]).sum(-1).mean()
        return loss - self.settings.listwise * terms["expected_cider"], terms


@torch.no_grad()
def evaluate(objective, held_candidates, held_back) -> dict[str, float]:
    rbm = objective.own.rbm
    p = rbm.parameters_fp32
    chosen = held_candidates.chosen(p, objective.weights, rbm(held_back[0]))
    weights = dict(zip(("log_prob", "pmi", "consensus"), objective.weights.tolist()))
    return {"chosen_cider": chosen, "weights": weights} | evaluate_rbm(rbm, *held_back)


def train(accelerator, objective, train_set, held_candidates, held_back, settings) -> list[dict]:
    """Train; the RBM of the epoch whose choices on held-back images were best stays in `objective`."""
    objective, optimizer, loader, schedule = prepared(accelerator, objective, train_set, settings)
    plain = accelerator.unwrap_model(objective)
    history = [{"epoch": 0} | evaluate(plain, held_candidates, held_back)]
    best = {name: t.clone() for name, t in plain.state_dict().items()}
    bar = tqdm(range(settings.epochs), desc="train re-ranker", disable=not accelerator.is_main_process)
    for epoch in bar:
        train_set.set_epoch(epoch)
        loader.set_epoch(epoch)
        sums = train_epoch(accelerator, objective, optimizer, loader, schedule)
        if not np.isfinite(list(sums.values())).all():
            raise FloatingPointError(f"training diverged in epoch {epoch + 1} ({sums}): lower --learning_rate")
        history.append({"epoch": epoch + 1, **sums, **evaluate(plain, held_candidates, held_back)})
        bar.set_postfix({name: f"{history[-1][name]:.2f}" for name in ("expected_cider", "chosen_cider")})
        if history[-1]["chosen_cider"] > max(entry["chosen_cider"] for entry in history[:-1]):
            best = {name: t.clone() for name, t in plain.state_dict().items()}
    plain.load_state_dict(best)
    return history


def main():
    data, args = parse_arguments(DataArguments, RerankerArguments)
    refuse_other_output(args.output_dir)
    accelerator = new_accelerator(args.seed)
    set_seed(args.seed)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    model.set_phrases(None)  # they were fitted to causes that change here
    pooling = model.config.rbm_pooling
    dataset, store = load_features(data, model.vision_model, processor.image_processor, pooling=pooling)
    writers = []
    for number, path in enumerate(args.writer or [args.model]):
        refuse_other_fold(path, number, len(args.writer))
        writer = BlipRBMForConditionalGeneration.from_pretrained(path).eval()
        sizes = [m.config.text_config.vocab_size for m in (model, writer)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the writer {path} has {sizes[1]} word-pieces, the model {sizes[0]}: their token ids differ; shrink the writer too "
                "(training.shrink_vocabulary, with the same data)"
            )
        one_view = replace(data, views=1)
        writers.append((writer, load_features(one_view, writer.vision_model, processor.image_processor)[1]))
    folds = fold_of(dataset["image_id"], len(writers))
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    captions = dataset["captions"][:]
    tokens = {token for i in train_rows for ids in caption_tokens(processor, captions[i]) for token in ids[1:]}
    word_ids = model.config.rbm_word_ids
    words = caption_words(processor.tokenizer, captions, word_ids)
    columns = word_columns(word_ids, model.config.text_config.vocab_size)
    active = torch.tensor(sorted(tokens))
    some_rows = train_rows[np.random.default_rng(args.seed).permutation(len(train_rows))[: args.writer_images]]
    candidates, held_candidates = (
        Candidates(
            writers, processor, rows, folds[rows], [captions[i] for i in rows], active, columns, len(word_ids), args
        )
        for rows in (some_rows, held_rows)
    )
    quality = {"training": candidates.summary(), "held_back": held_candidates.summary()}
    print(json.dumps(quality))
    views = torch.stack([store.batch(some_rows, view) for view in range(store.num_views)], 1)
    objective = RerankObjective(model.rbm_layer.rbm, candidates, views, args)
    train_set = PooledPairs(store, train_rows, words, args.seed)
    held_back = (store.batch(held_rows), [words[i] for i in held_rows])
    start = time.time()
    history = train(accelerator, objective, train_set, held_candidates, held_back, args)
    if accelerator.is_main_process:
        save_captioner(model, processor, Path(args.output_dir) / "best")
        report = {
            "minutes": (time.time() - start) / 60,
            "candidates": quality,
            "held_back": history,
            "reranker": asdict(args),
            "data": asdict(data),
        }
        write_json(Path(args.output_dir) / "reranker.json", report)
        best = max(history, key=lambda entry: entry["chosen_cider"])
        print(f"{args.output_dir}/best: {json.dumps(best)}; before: {json.dumps(history[0])}")


if __name__ == "__main__":
    run_stage(main)
