"""The captioner stage's batches and loss: the captions of an image packed in one row."""

from typing import Optional

import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LengthGroupedSampler

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


class PackedCaptions(torch.utils.data.Dataset):
    """An image in a random view, and its captions packed in one row.

    Args:
        images: has `training_view(row)`, a dict of what the model takes for the image.
        rows: numbers of the images.
        captions: of each row, the token ids of its captions.
        texts: of each row, its captions as they were written, for a loss that scores against them.
    """

    def __init__(self, images, rows, captions: list[list[list[int]]], texts: Optional[list[list[str]]] = None):
        self.images, self.rows, self.captions, self.texts = images, rows, captions, texts

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
    """Rows of about the same length together, in an order that seed and epoch alone decide: the same in every process,
    and after a stop."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.generator = torch.Generator().manual_seed(self.seed + epoch)
