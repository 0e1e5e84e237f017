"""Stage 1: train a captioner's decoder and projector on cached features of its frozen vision tower; then, if wanted, all.

    python -m training.train_captioner training/recipes/captioner-small.yaml --model runs/untrained \
        --dataset flickr8k --output_dir runs/captioner

The Trainer's checkpoints are in `--output_dir`; a run that is stopped goes on from the last one when it is started
again. What is kept, in `<output_dir>/best`, is the moving average of the weights at the epoch whose captions of the
held-back training images had the highest CIDEr-D; in `<output_dir>/last` it is as at the end, in `<output_dir>/first` as at the
first evaluation, when it does not know the training images by heart yet (`experiments/reranker/train_reranker.py`).

With `--tower_learning_rate` the vision tower is trained as well, on a new random view of each image at every pass.

With `--samples N` a trained captioner goes on by minimum-risk training: it samples N captions an image, and those with a
higher CIDEr-D than the image's other samples become likelier (self-critical training, Rennie et al., CVPR 2017; the mean of
the other samples as the baseline, Luo 2020, arXiv 2003.09971).
"""

import copy
import functools
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.modeling_blip_rbm import pool_tokens, vision_tokens
from training.align import AlignedTokens, load_image_layer
from training.evaluate_captions import caption_rows
from training.lib.arguments import CaptionerArguments, DataArguments, parse_arguments
from training.lib.checkpoints import peak_memory_mb, record_of_training, refuse_other_output, save_captioner, write_json
from training.lib.data import fold_of, random_view, split_held_back
from training.lib.features import load_features
from training.lib.metrics import CiderD, corpus_diversity
from training.lib.pairs import load_pairs


RBM_PARTS = ("refine", "adapter")  # of `--parts`, those that stand between tower and decoder
EMA_FILE = "ema.safetensors"


class PackedCaptioner(BlipRBMForConditionalGeneration):
    """The captioner with the loss of *packed* captions: those of an image stand in one row, each seeing only itself.

    So the image's keys and values are computed once an image, not once a caption; and the softmax is over the
    word-pieces that occur in training (`active`), a fifth of the vocabulary, until `full_vocabulary` is set.
    """

    _auto_class = None  # its checkpoints are for resuming, not for users
    accepts_loss_kwargs = True  # num_items_in_batch: the same loss however a batch is split over steps and processes
    active = None  # (A,) token ids
    full_vocabulary = False
    label_smoothing = 0.0
    image_token_dropout = 0.0
    token_dropout = 0.0
    mask_token_id = None

    def train(self, mode: bool = True):
        super().train(mode)
        self.vision_model.eval()  # its batch normalisation keeps the statistics of its own training: 16 images are too few
        return self

    def forward(
        self,
        vision_hidden_states=None,
        pixel_values=None,
        input_ids=None,
        position_ids=None,
        segments=None,
        labels=None,
        weights=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """With `segments` (B, T) the packed loss: the mean over tokens of `weights` (B, T; default 1) * cross entropy.

        Args:
            num_items_in_batch: tokens over which the mean is, if they are more than are here (other processes and steps).
        """
        if segments is None:
            return super().forward(
                vision_hidden_states=vision_hidden_states,
                pixel_values=pixel_values,
                input_ids=input_ids,
                position_ids=position_ids,
                labels=labels,
                **kwargs,
            )
        image_embeds = self.encode_image(pixel_values, vision_hidden_states).image_embeds
        image_mask = None
        if self.training and self.token_dropout:
            hidden_words = (torch.rand(input_ids.shape) < self.token_dropout) & (position_ids > 0)
            input_ids = input_ids.masked_fill(hidden_words, self.mask_token_id)
        if self.training and self.image_token_dropout:
            image_mask = (torch.rand(image_embeds.shape[:2]) >= self.image_token_dropout).long()
        hidden = self.text_decoder.bert(
            input_ids,
            attention_mask=packed_mask(segments, image_embeds.dtype),
            position_ids=position_ids,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=image_mask,
            is_decoder=True,
            use_cache=False,
        ).last_hidden_state
        counted = labels != -100
        head = self.text_decoder.cls.predictions
        hidden, targets = head.transform(hidden[counted]), labels[counted]
        weight, bias = head.decoder.weight, head.decoder.bias
        if not self.full_vocabulary:
            weight, bias = weight[self.active], bias[self.active]
            targets = torch.searchsorted(self.active, targets)
        logits = F.linear(hidden, weight, bias)
        losses = F.cross_entropy(
            logits, targets, label_smoothing=self.label_smoothing if weights is None else 0.0, reduction="none"
        )
        if weights is not None:
            losses = losses * weights[counted]
        return {"loss": losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)}


def packed_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T) to add to attention scores: a token sees itself and what precedes it in its segment (B, T)."""
    length = segments.shape[1]
    sees = segments[:, :, None] == segments[:, None, :]
    sees = sees & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


class MLPAdapter(torch.nn.Module):
    """Refine without an RBM, for comparison: the same shift and tokens by an MLP on the same pooled image, of about as many
    parameters as `RBMLayer`'s shift and causes."""

    def __init__(self, rbm_layer, width: int):
        super().__init__()
        self.rbm, self.pooling, self.cause_tokens = rbm_layer.rbm, rbm_layer.pooling, rbm_layer.cause_tokens
        outputs = (1 + self.cause_tokens) * width
        own = rbm_layer.rbm.hidden_size * outputs
        bottleneck = max(1, round(own / (self.rbm.visible_size + outputs)))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(self.rbm.visible_size, bottleneck, bias=False),
            torch.nn.GELU(),
            torch.nn.Linear(bottleneck, outputs, bias=False),
        )
        self.gate = torch.nn.Parameter(torch.zeros(1))

    def hidden_input(self, tokens):  # here simply the standardised pooled image
        return self.rbm.standardise(pool_tokens(tokens, self.pooling))

    def refine(self, image_embeds, x):
        shift, *tokens = (
            (self.gate * self.mlp(x)).view(len(x), 1 + self.cause_tokens, -1).to(image_embeds.dtype).split(1, 1)
        )
        return torch.cat([image_embeds + shift, *(tokens if self.gate != 0 else [])], 1)


def last_share(parameters: list[torch.nn.Parameter], share: float) -> list[torch.nn.Parameter]:
    """The last parameters that hold this share of all numbers."""
    left, kept = share * sum(p.numel() for p in parameters), []
    for parameter in reversed(parameters):
        if left <= 0:
            break
        kept.append(parameter)
        left -= parameter.numel()
    return kept


def add_lora(model, rank: int) -> list[torch.nn.Parameter]:
    """Low-rank changes of the decoder's queries and values (Hu et al., ICLR 2022), all else frozen. `plain_model` merges them."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("--parts lora needs peft: pip install peft, or pip install 'blip-rbm[lora]'") from None
    model.requires_grad_(False)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"]), model.text_decoder
    )
    return [p for p in model.parameters() if p.requires_grad]


def trained_parts(model, captioner: CaptionerArguments) -> list[torch.nn.Parameter]:
    """The parameters that are trained, all others frozen. Puts adapters in their places if they are asked for."""
    if captioner.parts == "lora":
        return add_lora(model, captioner.lora_rank)
    if captioner.parts == "adapter":
        model.rbm_layer = MLPAdapter(model.rbm_layer, model.config.text_config.encoder_hidden_size)
    layer = model.rbm_layer
    cross_attention = [block.crossattention for block in model.text_decoder.bert.encoder.layer]
    modules = {
        "captioner": (model.projector, model.text_decoder),
        "cross_attention": (model.projector, *cross_attention),
        "refine": (layer.shift, layer.causes if layer.cause_tokens else None) if captioner.parts == "refine" else (),
        "adapter": (layer.mlp,) if captioner.parts == "adapter" else (),
    }[captioner.parts]
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    if captioner.parts in RBM_PARTS:
        parameters.append(layer.gate)
    elif captioner.tower_learning_rate:
        parameters += last_share(list(model.vision_model.parameters()), captioner.tower_share)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


class CachedViews:
    """The image of a row as the tower's output for one of its cached views."""

    def __init__(self, store):
        self.store = store

    def training_view(self, row: int) -> dict:
        return {"vision_hidden_states": self.store.view(row, int(torch.randint(self.store.num_views, ()))).float()}

    def plain(self, model, rows):
        return self.store


class Images:
    """The image of a row as pixels, for a tower that is trained."""

    def __init__(self, dataset, image_processor):
        self.dataset, self.image_processor = dataset, image_processor

    def training_view(self, row: int) -> dict:
        image = random_view(self.dataset[row]["image"].convert("RGB"))
        return {"pixel_values": self.image_processor(image, return_tensors="pt")["pixel_values"][0]}

    def plain(self, model, rows):
        """The plain images' features by the tower as it is now."""
        features = {}
        for row in tqdm(rows, desc="encode", leave=False):
            image = self.dataset[int(row)]["image"].convert("RGB")
            pixel_values = self.image_processor(image, return_tensors="pt")["pixel_values"]
            features[row] = vision_tokens(model.vision_model(pixel_values))[0]
        return EncodedImages(features)


class EncodedImages(dict):
    """Features (N, C) by row number, in memory: `batch` as of a `FeatureStore`."""

    def batch(self, rows) -> torch.Tensor:
        return torch.stack([self[row] for row in rows])


class PackedCaptions(torch.utils.data.Dataset):
    """An image in a random view, and its captions packed in one row."""

    def __init__(self, images, rows, captions: list[list[list[int]]]):
        self.images, self.rows, self.captions = images, rows, captions  # captions: of each row, lists of token ids

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"index": index, **self.images.training_view(int(self.rows[index])), **packed(self.captions[index])}


def packed(captions: list[list[int]]) -> dict[str, list[int]]:
    """The token ids [DEC] w1 ... wn [SEP] of an image's captions as one row: what goes in and what comes out."""
    return {
        "input_ids": [token for caption in captions for token in caption[:-1]],
        "labels": [token for caption in captions for token in caption[1:]],
        "position_ids": [place for caption in captions for place in range(len(caption) - 1)],
        "segments": [number for number, caption in enumerate(captions) for _ in caption[:-1]],
    }


PADS = {"input_ids": 0, "labels": -100, "position_ids": 0, "segments": -1, "weights": 0.0}


def pad_rows(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows from `packed` (and `weights` of the same length) as tensors (B, T)."""
    longest = max(len(row["labels"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [PADS[name]] * (longest - len(row[name])) for row in rows])
        for name in rows[0]
        if name in PADS
    }


def collate(items):
    image = "pixel_values" if "pixel_values" in items[0] else "vision_hidden_states"
    return {
        "index": torch.tensor([item["index"] for item in items]),
        image: torch.stack([item[image] for item in items]),
        **pad_rows(items),
    }


class LengthGrouped(LengthGroupedSampler):
    """Rows of about the same length together, in an order that seed and epoch alone decide: the same in every process, and after a
    stop."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class CaptionTrainer(Trainer):
    """Evaluates by captioning, with the averaged weights, and keeps the best of them."""

    def __init__(self, *args, held_back, ema, processor, eval_beams, max_new_tokens, tower_learning_rate=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.tower_learning_rate = tower_learning_rate
        self.held_back, self.ema, self.processor = held_back, ema, processor
        self.generation = {"num_beams": eval_beams, "max_new_tokens": max_new_tokens}

    def create_optimizer(self, *args, **kwargs):
        """The tower's parameters at a learning rate of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.tower_learning_rate:
            tower = {id(p) for p in self.model.vision_model.parameters()}
            for group in list(optimizer.param_groups):
                of_tower = [p for p in group["params"] if id(p) in tower]
                group["params"] = [p for p in group["params"] if id(p) not in tower]
                optimizer.add_param_group({**group, "params": of_tower, "lr": self.tower_learning_rate})
        return optimizer

    def _get_train_sampler(self, train_dataset=None):
        """Rows of about the same length together: a third of the batch would be pads otherwise."""
        lengths = [sum(map(len, captions)) for captions in self.train_dataset.captions]
        args = self.args
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGrouped(batch_size, lengths, args.seed)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        model = self.ema.module.eval()
        images, rows, references = self.held_back
        start = time.time()
        with torch.no_grad():
            store = images.plain(model, rows)
        captions = caption_rows(
            model, self.processor, store, rows, rbm_guidance=0.0, rbm_rerank=False, **self.generation
        )
        metrics = {
            f"{metric_key_prefix}_cider": 100 * CiderD(references).scores(captions).mean(),
            f"{metric_key_prefix}_vocabulary": corpus_diversity(captions)["vocabulary"],
            f"{metric_key_prefix}_length": corpus_diversity(captions)["mean_length"],
            f"{metric_key_prefix}_seconds": time.time() - start,
        }
        first = not any("eval_cider" in entry for entry in self.state.log_history)
        best = max((entry["eval_cider"] for entry in self.state.log_history if "eval_cider" in entry), default=-1.0)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if metrics[f"{metric_key_prefix}_cider"] > best and self.is_world_process_zero():
            save_captioner(plain_model(model), self.processor, Path(self.args.output_dir) / "best")
        if first and self.is_world_process_zero():
            save_captioner(plain_model(model), self.processor, Path(self.args.output_dir) / "first")
        return metrics


def other_tokens(tokens: torch.Tensor, vocab_size: int) -> list[int]:
    """All token ids but these, as `suppress_tokens` of `generate`."""
    return sorted(set(range(vocab_size)) - set(tokens.tolist()))


class MinimumRiskTrainer(CaptionTrainer):
    """Trains on captions that the model samples, each weighted by how much better it is than the image's others.

    Args:
        references: of every training image, its captions as text.
        samples: captions sampled an image.
        reference_weight: weight of the usual loss on one of the image's own captions, which keeps the language.
    """

    def __init__(self, *args, references: list[list[str]], samples: int, reference_weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.scorer, self.samples, self.reference_weight = CiderD(references), samples, reference_weight
        self.rewards = []  # since the last log
        self.model_accepts_loss_kwargs = False  # the batch's own labels are not what is trained on

    @functools.cached_property
    def never_seen(self) -> list[int]:
        return other_tokens(self.model.active, self.model.config.text_config.vocab_size)

    @torch.no_grad()
    def sample(self, model, features) -> list[list[list[int]]]:
        """Token ids [DEC] w1 ... wn [SEP] of `samples` captions of each image."""
        model.eval()
        encoding = model.encode_image(vision_hidden_states=features, rbm=False)
        start = torch.full((len(features) * self.samples, 1), model.decoder_input_ids)
        sequences = model.generate(
            encoding=encoding, input_ids=start, rbm=False, do_sample=True, num_beams=1, top_k=0,
            max_new_tokens=self.generation["max_new_tokens"], suppress_tokens=self.never_seen,
        )  # fmt: skip
        model.train()
        sep = self.processor.tokenizer.sep_token_id
        ended = [row[: row.index(sep) + 1] if sep in row else row for row in sequences.tolist()]
        return [ended[i : i + self.samples] for i in range(0, len(ended), self.samples)]

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        features = inputs["vision_hidden_states"]
        rows = []
        for index, captions in zip(inputs["index"].tolist(), self.sample(model, features)):
            texts = self.processor.captions([torch.tensor(caption) for caption in captions])
            reward = torch.tensor([self.scorer.score(index, text) for text in texts])
            others = (reward.sum() - reward) / (self.samples - 1)
            self.rewards.append(reward.mean().item())
            own = self.train_dataset.captions[index]
            captions.append(own[int(torch.randint(len(own), ()))])
            value = [*(reward - others).tolist(), self.reference_weight]
            weights = [v for caption, v in zip(captions, value) for _ in caption[:-1]]
            rows.append(packed(captions) | {"weights": weights})
        return model(vision_hidden_states=features, **pad_rows(rows))["loss"]

    def log(self, logs, *args, **kwargs):
        if self.rewards and "loss" in logs:
            logs["sampled_cider"] = 100 * sum(self.rewards) / len(self.rewards)
            self.rewards = []
        super().log(logs, *args, **kwargs)


def moving_average(decay: float):
    """For `AveragedModel`: an average over few steps at first, so that it does not lag behind; over 1 / (1 - decay) later."""

    def update(averages, currents, steps):
        now = min(decay, (1 + float(steps)) / (10 + float(steps)))
        torch._foreach_lerp_(averages, currents, 1 - now)

    return update


class AverageWeights(TrainerCallback):
    """Keeps the moving average, saves it beside each checkpoint, and widens the softmax for the last steps."""

    def __init__(self, model, ema, full_vocabulary_share):
        self.model, self.ema, self.full_vocabulary_share = model, ema, full_vocabulary_share

    def on_step_begin(self, args, state, control, **kwargs):
        self.model.full_vocabulary = state.global_step >= (1 - self.full_vocabulary_share) * state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        self.ema.update_parameters(self.model)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.exists():
            tensors = {
                name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in self.ema.named_parameters()
            }
            save_file(tensors | {"n_averaged": self.ema.n_averaged.clone()}, folder / EMA_FILE)

    def resume(self, checkpoint: str):
        tensors = load_file(Path(checkpoint) / EMA_FILE)
        self.ema.n_averaged.copy_(tensors.pop("n_averaged"))
        self.ema.load_state_dict(tensors, strict=False)


def plain_model(model):
    """The same model as the class that users load, low-rank changes merged into the weights that they change."""
    adapted = [name for name, module in model.named_modules() if hasattr(module, "get_base_layer")]
    model = copy.deepcopy(model) if adapted else copy.copy(model)
    for name in adapted:
        layer = model.get_submodule(name)
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.__class__ = BlipRBMForConditionalGeneration
    return model


def caption_tokens(processor, captions: list[str], max_length: int = 40) -> list[list[int]]:
    """Token ids [DEC] w1 ... wn [SEP] of captions, without the final full stop that only some of them have."""
    texts = [" ".join(caption.strip().rstrip(".").split()) for caption in captions]
    encoded = processor.encode_text(texts, as_prompt=False, max_length=max_length)
    return [row[mask.bool()].tolist() for row, mask in zip(encoded["input_ids"], encoded["attention_mask"])]


def unigram_bias(token_ids: list[int], vocab_size: int, least: float = 0.01) -> torch.Tensor:
    """(vocab_size,) log frequency of each token as the next one; rarer ones as if seen `least` times."""
    counts = torch.bincount(torch.tensor(token_ids), minlength=vocab_size).float().clamp(min=least)
    return (counts / counts.sum()).log()


def load_captioner(captioner: CaptionerArguments) -> PackedCaptioner:
    """The model to go on from; to train refine or its like, with as many cause tokens as asked for."""
    if captioner.parts not in RBM_PARTS:
        return PackedCaptioner.from_pretrained(captioner.model)
    config = BlipRBMConfig.from_pretrained(captioner.model)
    config.rbm_cause_tokens = captioner.cause_tokens
    return PackedCaptioner.from_pretrained(captioner.model, config=config)


def refuse_impossible(captioner: CaptionerArguments, args: TrainingArguments):
    """Raises ValueError for settings that cannot be, or exclude each other, before anything is loaded."""
    if not 0 <= captioner.fold < captioner.folds:
        raise ValueError(
            f"--fold is {captioner.fold}, but must be at least 0 and less than --folds, which is {captioner.folds}"
        )
    if args.eval_strategy == "no":
        raise ValueError(
            "--eval_strategy is no, but what is kept is the best of the evaluations: choose epoch, or steps with --eval_steps"
        )
    if captioner.samples and captioner.tower_learning_rate:
        raise ValueError(
            "--samples and --tower_learning_rate exclude each other: captions are sampled from cached features"
        )
    if captioner.aligned and captioner.tower_learning_rate:
        raise ValueError("--aligned and --tower_learning_rate exclude each other: the layer is put on cached tokens")


def load_images(model, processor, data: DataArguments, captioner: CaptionerArguments, args: TrainingArguments):
    """The pairs, and their images as what is trained sees them: pixels if the tower is trained, else what it makes of them."""
    if captioner.tower_learning_rate:
        dataset = load_pairs(data.dataset, data.train_split, data.max_images, **data.columns)
        return dataset, Images(dataset, processor.image_processor)
    with args.main_process_first(desc="encode"):
        card_file = Path(args.output_dir) / "pairs.json" if args.process_index == 0 else None
        dataset, store = load_features(data, model.vision_model, processor.image_processor, card_file=card_file)
    if captioner.aligned:
        store = AlignedTokens(store, load_image_layer(captioner.aligned))
    return dataset, CachedViews(store)


def write_results(trainer: CaptionTrainer, minutes: float, captioner: CaptionerArguments, settings: dict):
    """The averaged weights as at the end in `last`, and what was measured in captioner.json."""
    output_dir = Path(trainer.args.output_dir)
    save_captioner(plain_model(trainer.ema.module.eval()), trainer.processor, output_dir / "last")
    history = [entry for entry in trainer.state.log_history if "eval_cider" in entry]
    write_json(
        output_dir / "captioner.json",
        {
            "went_on_from": record_of_training(captioner.model),
            "minutes": minutes,
            "peak_memory_mb": peak_memory_mb(),
            "active_vocabulary": len(trainer.model.active),
            "held_back": history,
            **settings,
        },
    )
    best = max(history, key=lambda entry: entry["eval_cider"])
    print(f"{output_dir}/best: epoch {best['epoch']:.0f}, held-back CIDEr-D {best['eval_cider']:.1f}")


def main():
    data, captioner, args = parse_arguments(DataArguments, CaptionerArguments, TrainingArguments)
    refuse_other_output(args.output_dir, "captioner.json", "checkpoint-*", "best", "pairs.json")
    refuse_impossible(captioner, args)
    args.remove_unused_columns = False
    set_seed(args.seed)
    processor = BlipRBMProcessor.from_pretrained(captioner.model)
    model = load_captioner(captioner)
    for name, module in model.text_decoder.named_modules():
        if isinstance(module, torch.nn.Dropout):  # not of attention weights: it cost a fifth of the time
            module.p = 0.0 if name.endswith("self.dropout") else captioner.dropout
    model.generation_config.max_length = None  # max_new_tokens takes its place
    model.label_smoothing, model.image_token_dropout = captioner.label_smoothing, captioner.image_token_dropout
    model.token_dropout, model.mask_token_id = captioner.token_dropout, processor.tokenizer.mask_token_id
    trained = trained_parts(model, captioner)
    print(f"training {captioner.parts}: {sum(p.numel() for p in trained):,} parameters")
    if captioner.tower_learning_rate:
        model.vision_model.to(memory_format=torch.channels_last)  # convolutions up to 1.8 times as fast

    dataset, images = load_images(model, processor, data, captioner, args)
    train_rows, held_rows = split_held_back(dataset, data.held_back)
    if captioner.folds > 1:
        train_rows = train_rows[fold_of(dataset["image_id"], captioner.folds)[train_rows] != captioner.fold]
    captions = dataset["captions"][:]
    tokens = [caption_tokens(processor, captions[i]) for i in train_rows]
    seen = [token for of_image in tokens for caption in of_image for token in caption[1:]]
    model.active = torch.tensor(sorted(set(seen)))
    last_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if captioner.unigram_bias and last_checkpoint is None:
        bias = model.text_decoder.cls.predictions.bias
        bias.data.copy_(unigram_bias(seen, len(bias)))

    ema = AveragedModel(model, multi_avg_fn=moving_average(captioner.ema_decay))
    average = AverageWeights(model, ema, captioner.full_vocabulary_share)
    if last_checkpoint is not None:
        average.resume(last_checkpoint)
    train_captions = [captions[i] for i in train_rows]
    risk = {"references": train_captions, "samples": captioner.samples, "reference_weight": captioner.reference_weight}
    trainer = (MinimumRiskTrainer if captioner.samples else CaptionTrainer)(
        **(risk if captioner.samples else {}),
        model=model,
        args=args,
        train_dataset=PackedCaptions(images, train_rows, tokens),
        eval_dataset=[],
        data_collator=collate,
        callbacks=[average],
        held_back=(images, held_rows, [captions[i] for i in held_rows]),
        ema=ema,
        processor=processor,
        eval_beams=captioner.eval_beams,
        max_new_tokens=captioner.max_new_tokens,
        tower_learning_rate=captioner.tower_learning_rate,
    )
    start = time.time()
    trainer.train(resume_from_checkpoint=last_checkpoint)
    if trainer.is_world_process_zero():
        settings = {"data": asdict(data), "captioner": asdict(captioner), "training": args.to_sanitized_dict()}
        write_results(trainer, (time.time() - start) / 60, captioner, settings)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
