"""Stage 1: train a captioner's decoder and projector on cached features of its frozen vision tower; then, if wanted,
the tower too.

    python -m training.train_captioner training/recipes/captioner-small.yaml --model runs/untrained \
        --dataset flickr8k --output_dir runs/captioner

`<output_dir>/best` is what to go on with: the moving average of the weights at the epoch whose captions of the
held-back training images had the highest CIDEr-D. `last` is that average as it was at the end, `first` as it was at the
first evaluation, when it does not know the training images by heart yet. The Trainer's checkpoints are in
`<output_dir>` itself, and a stopped run goes on from the last one.

With `--tower_learning_rate` the vision tower is trained as well, on a new random view of each image at every pass.
"""

import copy
import time
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.vision_blip_rbm import vision_tokens
from training.lib.aligned import AlignedTokens, load_image_layer
from training.lib.arguments import CaptionerArguments, DataArguments, parse_arguments
from training.lib.captions import (
    caption_rows,
    caption_tokens,
    of_the_image,
    say_unknown_tokens,
    source_token,
    unigram_bias,
)
from training.lib.checkpoints import peak_memory_mb, record_of_training, refuse_other_output, save_captioner, write_json
from training.lib.data import fold_of, random_view, split_held_back
from training.lib.features import load_features
from training.lib.metrics import CiderD, corpus_diversity
from training.lib.mixture import DataSource, image_sources, part_of, read_images, read_text_sources
from training.lib.packed import LengthGrouped, PackedCaptioner, PackedCaptions, collate
from training.lib.stage import run_stage


EMA_FILE = "ema.safetensors"


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
    """Low-rank changes of the decoder's queries and values (Hu et al., ICLR 2022), all else frozen. `plain_model`
    merges them."""
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
    """The parameters that `--parts` names, all others frozen."""
    if captioner.parts == "lora":
        return add_lora(model, captioner.lora_rank)
    layer = model.rbm_layer
    if captioner.parts == "refine":
        modules = [layer.shift, *([layer.causes] if layer.cause_tokens else [])]
    elif captioner.parts == "cross_attention":
        modules = [
            model.projector,
            model.class_tokens,
            *(block.crossattention for block in model.text_decoder.bert.encoder.layer),
        ]
    else:
        modules = [model.projector, model.class_tokens, model.text_decoder]
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    if captioner.parts == "refine":
        parameters.append(layer.gate)
    elif captioner.tower_learning_rate:
        parameters += last_share(list(model.vision_model.parameters()), captioner.tower_share)
    return train_only(model, parameters)


def train_only(model, parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """These parameters, all others of the model frozen."""
    model.requires_grad_(False)
    head = set() if model.class_tokens is None else set(model.class_tokens.head.parameters())
    parameters = [parameter for parameter in parameters if parameter not in head]  # of the tower's own training
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
            features[row] = vision_tokens(model.vision_model(pixel_values.to(model.device)))[0]
        return EncodedImages(features)


class EncodedImages(dict):
    """Features (N, C) by row number, in memory: `batch` as of a `FeatureStore`."""

    def batch(self, rows) -> torch.Tensor:
        return torch.stack([self[row] for row in rows])


class CaptionTrainer(Trainer):
    """Evaluates by captioning, with the averaged weights, and keeps the best of them."""

    measure, sign, said = "eval_cider", 1, "held-back CIDEr-D {:.1f}"  # sign -1: the lower the better

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
        args = self.args
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGrouped(batch_size, self.train_dataset, args.seed)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        model = self.ema.module.eval()
        images, rows, references, parts = self.held_back
        start = time.time()
        with torch.no_grad():
            store = images.plain(model, rows)
        captions = caption_rows(
            model, self.processor, store, rows, rbm_guidance=0.0, rbm_rerank=False, **self.generation
        )
        scores = 100 * CiderD(references).scores(captions)
        metrics = {
            f"{metric_key_prefix}_cider": scores.mean(),
            **{f"{metric_key_prefix}_cider_{part}": scores[parts == part].mean() for part in np.unique(parts)},
            f"{metric_key_prefix}_vocabulary": corpus_diversity(captions)["vocabulary"],
            f"{metric_key_prefix}_length": corpus_diversity(captions)["mean_length"],
            f"{metric_key_prefix}_seconds": time.time() - start,
        }
        if not any(self.measure in entry for entry in self.state.log_history) and self.is_world_process_zero():
            save_captioner(plain_model(model), self.processor, Path(self.args.output_dir) / "first")
        return self.keep_best(model, metrics, metrics[f"{metric_key_prefix}_cider"])

    def keep_best(self, model, metrics: dict, quality: float) -> dict:
        """Log what was measured, and save the model as `best` if its quality is the highest so far."""
        known = [self.sign * entry[self.measure] for entry in self.state.log_history if self.measure in entry]
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if quality > max(known, default=-float("inf")) and self.is_world_process_zero():
            save_captioner(plain_model(model), self.processor, Path(self.args.output_dir) / "best")
        return metrics


class LanguageTrainer(CaptionTrainer):
    """Of texts alone: what is kept is best by the nats a token of the held-back texts."""

    measure, sign, said = "eval_nats", -1, "{:.3f} nats a token of held-back texts"

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        model, nats, tokens = self.ema.module.eval(), 0.0, 0
        smoothing, model.label_smoothing = model.label_smoothing, 0.0
        whole, model.full_vocabulary = model.full_vocabulary, True
        for batch in torch.utils.data.DataLoader(self.held_back, self.args.eval_batch_size, collate_fn=collate):
            counted = int((batch["labels"] != -100).sum())
            nats += float(model(**{name: part.to(model.device) for name, part in batch.items()})["loss"]) * counted
            tokens += counted
        model.label_smoothing, model.full_vocabulary = smoothing, whole
        return self.keep_best(model, {f"{metric_key_prefix}_nats": nats / tokens}, -nats / tokens)


def moving_average(decay: float):
    """For `AveragedModel`: an average over few steps at first, so that it does not lag behind; over 1 / (1 - decay)
    later."""

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


def load_captioner(captioner: CaptionerArguments, processor) -> PackedCaptioner:
    """The model to go on from, with the dropout and the losses' settings; for refine with as many cause tokens as asked
    for."""
    config = BlipRBMConfig.from_pretrained(captioner.model)
    if captioner.parts == "refine":
        config.rbm_cause_tokens = captioner.cause_tokens
    model = PackedCaptioner.from_pretrained(captioner.model, config=config)
    for name, module in model.text_decoder.named_modules():
        if isinstance(module, torch.nn.Dropout):  # not of attention weights: it cost a fifth of the time
            module.p = 0.0 if name.endswith("self.dropout") else captioner.dropout
    model.generation_config.max_length = None  # max_new_tokens takes its place
    model.label_smoothing, model.image_token_dropout = captioner.label_smoothing, captioner.image_token_dropout
    model.dim_images = captioner.dim_images
    model.token_dropout, model.mask_token_id = captioner.token_dropout, processor.tokenizer.mask_token_id
    if captioner.tower_learning_rate:
        model.vision_model.to(memory_format=torch.channels_last)  # convolutions up to 1.8 times as fast
    return model


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
    if captioner.aligned and captioner.tower_learning_rate:
        raise ValueError("--aligned and --tower_learning_rate exclude each other: the layer is put on cached tokens")


def load_images(model, processor, data: DataArguments, captioner: CaptionerArguments, args: TrainingArguments):
    """The pairs, and their images as what is trained sees them: pixels if the tower is trained, else what it makes of
    them. (None, None) if there are texts alone."""
    if not image_sources(data):
        return None, None
    if captioner.tower_learning_rate:
        dataset = read_images(data)
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
    history = [entry for entry in trainer.state.log_history if trainer.measure in entry]
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
    best = max(history, key=lambda entry: trainer.sign * entry[trainer.measure])
    print(f"{output_dir}/best: epoch {best['epoch']:.0f}, {trainer.said.format(best[trainer.measure])}")


class Gathered:
    """What is trained on, gathered from several data sets."""

    def __init__(self, processor, captioner: CaptionerArguments):
        self.processor, self.clean, self.at_once = processor, captioner.of_the_image, captioner.captions_at_once
        self.rows, self.tokens, self.texts, self.weights, self.left_out = [], [], [], [], 0
        self.start_of = cache(partial(source_token, processor))

    def add(self, row: int, captions: list[str], source: DataSource):
        """The captions of one row of a data set; -1 if it has no image."""
        kept = of_the_image(captions) if self.clean else captions
        self.left_out += len(captions) - len(kept)
        if kept:
            self.rows.append(row)
            self.tokens.append(caption_tokens(self.processor, kept, start=self.start_of(source.source)))
            self.texts.append(kept)
            self.weights.append(source.weight)

    def packed(self, images) -> PackedCaptions:
        if self.left_out:
            print(f"left out {self.left_out:,} captions with digits, dates, addresses or agencies (--of_the_image)")
        say_unknown_tokens(self.texts, self.processor.tokenizer)
        return PackedCaptions(images, self.rows, self.tokens, self.texts, self.weights, self.at_once)


def training_captions(data: DataArguments, captioner: CaptionerArguments, dataset, images, processor):
    """The captions to train on, and (images, rows, references, which data set) of the held-back images; of texts alone,
    the held-back texts as `PackedCaptions`."""
    train, held_texts = Gathered(processor, captioner), Gathered(processor, captioner)
    held_back = None
    if dataset is not None:
        train_rows, held_rows = split_held_back(dataset, data.held_back)
        if captioner.folds > 1:
            train_rows = train_rows[fold_of(dataset["image_id"], captioner.folds)[train_rows] != captioner.fold]
        captions, parts, sources = dataset["captions"][:], part_of(dataset), image_sources(data)
        for row in train_rows:
            train.add(int(row), captions[row], sources[parts[row]])
        held_back = images, held_rows, [captions[row] for row in held_rows], parts[held_rows]
    for source, texts in read_text_sources(data):
        held = set() if dataset is not None else set(range(0, len(texts), max(2, len(texts) // max(data.held_back, 1))))
        for number, of_image in enumerate(texts):
            (held_texts if number in held else train).add(-1, of_image, source)
    return train.packed(images), held_back or held_texts.packed(None)


def train_captioner(
    data: DataArguments, captioner: CaptionerArguments, args: TrainingArguments, trainer_class=None, choose_parts=None
) -> None:
    """The stage, from its arguments to `captioner.json`.

    Args:
        trainer_class: in place of [`CaptionTrainer`], with the same arguments.
        choose_parts: in place of [`trained_parts`].

    Raises:
        ValueError: for settings that cannot be, or an output folder that holds something else.
    """
    refuse_other_output(args.output_dir)
    refuse_impossible(captioner, args)
    args.remove_unused_columns = False
    set_seed(args.seed)
    processor = BlipRBMProcessor.from_pretrained(captioner.model)
    model = load_captioner(captioner, processor).to(args.device)  # before its average is made, and images are encoded
    trained = (choose_parts or trained_parts)(model, captioner)
    print(f"training {captioner.parts}: {sum(p.numel() for p in trained):,} parameters")
    dataset, images = load_images(model, processor, data, captioner, args)
    train_set, held_back = training_captions(data, captioner, dataset, images, processor)
    seen = [token for of_image in train_set.captions for caption in of_image for token in caption[1:]]
    model.active = torch.tensor(sorted(set(seen)), device=model.device)
    last_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if captioner.unigram_bias and last_checkpoint is None:
        bias = model.text_decoder.cls.predictions.bias
        bias.data.copy_(unigram_bias(seen, len(bias)))

    ema = AveragedModel(model, multi_avg_fn=moving_average(captioner.ema_decay))
    average = AverageWeights(model, ema, captioner.full_vocabulary_share)
    if last_checkpoint is not None:
        average.resume(last_checkpoint)
    trainer_class = trainer_class or (LanguageTrainer if dataset is None else CaptionTrainer)
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=[],
        data_collator=collate,
        callbacks=[average],
        held_back=held_back,
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


def main():
    train_captioner(*parse_arguments(DataArguments, CaptionerArguments, TrainingArguments))


if __name__ == "__main__":
    run_stage(main)
