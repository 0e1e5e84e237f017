"""The captioner stage's batches and loss: the captions of an image packed in one row."""

from typing import Optional

import numpy as np
import torch
import torch.nn.functional as F

from modeling_blip_rbm import BlipRBMForConditionalGeneration


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
    dim_images = 0.0
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
            num_items_in_batch: tokens over which the mean is, if they are more than are here (other processes and
                steps).
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
        image_embeds, image_mask = self.embeds_of(pixel_values, vision_hidden_states, labels), None
        if self.training and self.token_dropout:
            hidden_words = (torch.rand(input_ids.shape, device=input_ids.device) < self.token_dropout) & (
                position_ids > 0
            )
            input_ids = input_ids.masked_fill(hidden_words, self.mask_token_id)
        if self.training and image_embeds is not None:
            image_mask = self.seen_tokens(*image_embeds.shape[:2])
        hidden = self.text_decoder.bert(
            input_ids,
            attention_mask=packed_mask(segments, self.dtype),
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

    def embeds_of(self, pixel_values, vision_hidden_states, labels) -> Optional[torch.Tensor]:
        """What the decoder attends to; of texts alone None, for which BLIP's decoder leaves out its cross-attention, or
        what `imagined` gives."""
        if pixel_values is not None or vision_hidden_states is not None:
            return self.encode_image(pixel_values, vision_hidden_states).image_embeds
        return None if self.class_tokens is None else self.imagined(labels)

    def seen_tokens(self, rows: int, tokens: int) -> Optional[torch.Tensor]:
        """(rows, tokens) which image tokens the decoder sees in this step, by `image_token_dropout`; of a share `dim_images` of the images
        a tenth, but all class tokens, so that it learns to read those."""
        if not self.image_token_dropout and not self.dim_images:
            return None
        dropped = torch.full((rows, 1), self.image_token_dropout, device=self.device)
        dropped[torch.rand(rows, device=self.device) < self.dim_images] = 0.9
        seen = torch.rand(rows, tokens, device=self.device) >= dropped
        if self.class_tokens is not None:
            seen[:, -self.class_tokens.k :] = True
        return seen.long()

    def imagined(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, k, D): the class tokens of an image that the captions (B, T) without one may have had. Of the classes' words that are in the
        captions most are seen, more or less surely, and others besides, as a classifier errs. So the decoder learns from texts alone to
        speak of what it is told (Fei et al., ViECap, ICCV 2023, arXiv 2307.16525)."""
        words = self.class_tokens.word_ids
        said = torch.stack([torch.isin(words, row) for row in labels])
        chance = torch.rand(said.shape, device=said.device)
        seen = said & (torch.rand(said.shape, device=said.device) < 0.7)
        sure = torch.where(seen, -3 * chance**2, -3 - 6 * chance).masked_fill(words < 0, -9.0)
        return self.class_tokens.of_words(sure, self.text_decoder.get_input_embeddings().weight)


def packed_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, T, T) to add to attention scores: a token sees itself and what precedes it in its segment (B, T)."""
    length = segments.shape[1]
    sees = segments[:, :, None] == segments[:, None, :]
    sees = sees & torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


class PackedCaptions(torch.utils.data.Dataset):
    """An image in a random view, and its captions packed in one row; or captions without an image.

    Args:
        images: has `training_view(row)`, a dict of what the model takes for the image.
        rows: numbers of the images; -1 for texts alone.
        captions: of each row, the token ids of its captions.
        texts: of each row, its captions as they were written, for a loss that scores against them.
        weights: how often each row comes in an epoch (`training/lib/mixture.py`); default: once.
        at_once: of a row with more captions so many are drawn, anew at every call; 0: all.
    """

    def __init__(
        self,
        images,
        rows,
        captions: list[list[list[int]]],
        texts: Optional[list[list[str]]] = None,
        weights: Optional[np.ndarray] = None,
        at_once: int = 0,
    ):
        self.at_once = at_once
        self.images, self.rows, self.captions, self.texts = images, np.asarray(rows), captions, texts
        self.weights = np.ones(len(self.rows)) if weights is None else np.asarray(weights, float)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = int(self.rows[index])
        view = self.images.training_view(row) if row >= 0 else {}
        captions = self.captions[index]
        if 0 < self.at_once < len(captions):
            captions = [captions[i] for i in torch.randperm(len(captions))[: self.at_once].sort().values]
        return {"index": index, **view, **packed(captions)}


def packed(captions: list[list[int]]) -> dict[str, list[int]]:
    """The token ids [DEC] w1 ... wn [SEP] of an image's captions as one row: what goes in and what comes out."""
    return {
        "input_ids": [token for caption in captions for token in caption[:-1]],
        "labels": [token for caption in captions for token in caption[1:]],
        "position_ids": [place for caption in captions for place in range(len(caption) - 1)],
        "segments": [number for number, caption in enumerate(captions) for _ in caption[:-1]],
    }


GROUP = 50  # batches among which rows are sorted by length
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
    """A batch of rows of one kind: all with images, or all without (`LengthGrouped` sees to it)."""
    image = next((name for name in ("pixel_values", "vision_hidden_states") if name in items[0]), None)
    return {
        "index": torch.tensor([item["index"] for item in items]),
        **({image: torch.stack([item[image] for item in items])} if image else {}),
        **pad_rows(items),
    }


class LengthGrouped(torch.utils.data.Sampler):
    """The rows of an epoch, those of about the same length in one batch, and with or without image in one; in an order
    that seed and epoch alone decide: the same in every process, and after a stop.

    A row of weight 2.3 comes twice in an epoch, and in three of ten epochs a third time. Batches of texts are whole
    ones, so that a batch never has both kinds.
    """

    def __init__(self, batch_size: int, data: PackedCaptions, seed: int):
        self.batch_size, self.data, self.seed = batch_size, data, seed
        self.lengths = [sum(map(len, captions)) for captions in data.captions]
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def rows_of_epoch(self, rng) -> tuple[np.ndarray, np.ndarray]:
        """Which rows come, with an image and without."""
        chosen = []
        for weight in np.unique(self.data.weights):
            rows = np.flatnonzero(self.data.weights == weight)
            for kind in (rows[self.data.rows[rows] >= 0], rows[self.data.rows[rows] < 0]):
                share = round((weight - int(weight)) * len(kind))
                chosen.append(np.concatenate([np.repeat(kind, int(weight)), rng.permutation(kind)[:share]]))
        chosen = np.concatenate(chosen)
        texts = chosen[self.data.rows[chosen] < 0]
        return chosen[self.data.rows[chosen] >= 0], rng.permutation(texts)[
            : len(texts) // self.batch_size * self.batch_size
        ]

    def __len__(self):
        return sum(map(len, self.rows_of_epoch(np.random.default_rng(0))))

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for rows in self.rows_of_epoch(rng):
            rows = rng.permutation(rows)
            for start in range(0, len(rows), GROUP * self.batch_size):  # by length within so many batches
                some = rows[start : start + GROUP * self.batch_size]
                some = some[np.argsort([-self.lengths[row] for row in some], kind="stable")]
                batches += [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        rest = [batch for batch in batches if len(batch) < self.batch_size]
        for batch in [*(whole[i] for i in rng.permutation(len(whole))), *rest]:
            yield from batch.tolist()
