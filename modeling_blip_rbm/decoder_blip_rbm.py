"""BLIP's text decoder while captions are generated: the same parameters and the same arithmetic, without what a step does not need.

An image's keys and values are computed once and shared by its captions (`ImageCache`), text attends to itself by PyTorch's fused
kernel, and what BLIP decides anew in every layer is decided once a step. BLIP's own forward stays for training, and wherever
attention weights or hidden states are asked for.

Axes: B images, R rows of text (a multiple of B, an image's adjacent), T new tokens, P past tokens, N image tokens, D width.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from .linear_blip_rbm import PackableLinear, join, prepared


IMAGES_AT_ONCE = 4  # on a CPU, where all that lies between the layers is to stay in its caches


class ImageCache(EncoderDecoderCache):
    """The decoder's cache with the image's keys and values computed once an image, and neither copied nor reordered with
    its beams: they are the same for all captions of an image.

    Stock BLIP repeats them for every beam and copies them all at every step. The rows of the text must be a multiple of
    the images, an image's rows adjacent.

    Beam search goes on until the last image of a batch is done, with rows of all of them. Those of images that are done are left out here,
    a quarter of all rows in batches of 16 real images: whoever searches says by `going_on` (n, 1) for which of n captions, an image's adjacent,
    it does; an image goes on with any of its captions.

    Args:
        text_decoder: BLIP's. image_embeds (B, N, D).
    """

    going_on: Optional[torch.Tensor] = None
    images: Optional[torch.Tensor] = None  # (A,) which ones are left, in the order in which they stand here; None: all

    def __init__(self, text_decoder, image_embeds: torch.Tensor):
        super().__init__(DynamicCache(), DynamicCache())
        self.image_embeds = image_embeds
        self.layers_of_decoder = [DecoderLayer(layer) for layer in text_decoder.bert.encoder.layer]
        for i, layer in enumerate(text_decoder.bert.encoder.layer):
            self._store_image(i, layer.crossattention.self)

    def _store_image(self, number: int, attention: "ImageCrossAttention"):
        """Keys and values of a layer's attention, on a CPU those of some images at a time into their places: hardly more memory than these take."""
        images, tokens, _ = self.image_embeds.shape
        shape = images, attention.num_attention_heads, tokens, attention.attention_head_size
        keys, values = self.image_embeds.new_empty(shape), self.image_embeds.new_empty(shape)
        at_once = IMAGES_AT_ONCE if self.image_embeds.device.type == "cpu" else images
        for first in range(0, images, at_once):
            some = slice(first, first + at_once)
            keys[some], values[some] = attention.keys_and_values(self.image_embeds[some])
        # of all of them `update` would make a copy
        self.cross_attention_cache.update(keys[:, :, :0], values[:, :, :0], number)
        layer = self.cross_attention_cache.layers[number]
        layer.keys, layer.values = keys, values
        self.is_updated[number] = True

    def leave_out_finished(self):
        """Keep images and their text that beam search goes on with. On a GPU, which would be waited for, all."""
        if self.going_on is None or self.going_on.device.type != "cpu":
            return
        images = torch.arange(len(self.image_embeds)) if self.images is None else self.images
        going_on = self.going_on.view(len(self.image_embeds), -1).any(1)[images]
        left = int(going_on.sum())
        if left in (0, len(images)):
            return
        # an image's keys and values are large: those behind move into the places of those that go
        places = torch.arange(left)
        to = (~going_on[:left]).nonzero()[:, 0]
        places[to] = going_on[left:].nonzero()[:, 0] + left
        for layer in self.cross_attention_cache.layers:
            for states in (layer.keys, layer.values):
                states[to] = states[places[to]]
            layer.keys, layer.values = layer.keys[:left], layer.values[:left]
        rows = torch.arange(len(self.self_attention_cache.layers[0].keys)).view(len(images), -1)
        self.self_attention_cache.batch_select_indices(rows[places].flatten())
        self.images = images[places]

    def rows_left(self, states: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """Of (R, ...) of all rows, or (B, ...) of all images, what belongs to those that are left."""
        if self.images is None or states is None:
            return states
        return states.unflatten(0, (len(self.image_embeds), -1))[self.images].flatten(0, 1)

    def all_rows(self, states: torch.Tensor) -> torch.Tensor:
        """(R, ...) of the states (r, ...) of the rows that are left: 0 for the others."""
        if self.images is None:
            return states
        states = states.unflatten(0, (len(self.images), -1))
        every = states.new_zeros(len(self.image_embeds), *states.shape[1:])
        every[self.images] = states
        return every.flatten(0, 1)

    def reorder_cache(self, beam_idx):
        if self.images is not None:
            beams = beam_idx.view(len(self.image_embeds), -1)[self.images]  # of each image left, by their old numbers
            first = torch.arange(len(beams))[:, None] * beams.shape[1]
            beam_idx = (first + beams % beams.shape[1]).flatten()
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        self.self_attention_cache.batch_select_indices(indices)


def in_heads(states: torch.Tensor, attention: BlipTextSelfAttention) -> torch.Tensor:
    """(R, T, D) -> (R, heads, T, head size)."""
    return states.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)


class ImageCrossAttention(BlipTextSelfAttention):
    """BLIP's cross-attention with two differences: it reads the image tokens' mask, which arrives under the name that BLIP's
    does not read; and with an [`ImageCache`] the captions of an image are so many queries to the same keys."""

    def keys_and_values(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, heads, N, head size) each, of image_embeds (B, N, D)."""
        if getattr(self.key, "packed", None) is None:
            # prepared would only put together what is then taken apart
            both = self.key(image_embeds), self.value(image_embeds)
        else:
            both = prepared(self.key, self.value)(image_embeds).chunk(2, -1)
        return tuple(in_heads(states, self) for states in both)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **kwargs):
        if not isinstance(past_key_values, ImageCache):
            kwargs |= {"encoder_hidden_states": encoder_hidden_states, "past_key_values": past_key_values}
            return super().forward(hidden_states, encoder_attention_mask=attention_mask, **kwargs)
        context, probs = attend_to_image(self.query(hidden_states), past_key_values, self.layer_idx, attention_mask)
        images, heads, _, tokens = probs.shape
        rows, length, _ = hidden_states.shape
        probs = probs.view(images, heads, -1, length, tokens).transpose(1, 2).reshape(rows, heads, length, tokens)
        return context, probs


def attend_to_image(query: torch.Tensor, cache: ImageCache, layer: int, mask: Optional[torch.Tensor] = None):
    """Context (R, T, D) and weights (B, heads, R / B * T, N) of queries (R, T, D); `mask` (B, 1, 1 or T, N) is added to the scores."""
    cached = cache.cross_attention_cache.layers[layer]
    images, heads, _, size = cached.keys.shape
    shape = query.shape
    query = (query * (1 / math.sqrt(size))).view(images, -1, heads, size)
    scores = query.transpose(1, 2).contiguous() @ cached.keys.transpose(-1, -2)
    if mask is not None:  # the same for every query
        scores = scores + mask[:, :, :1]
    probs = scores.softmax(-1)
    return (probs @ cached.values).transpose(1, 2).reshape(shape), probs


def plan_products(text_decoder):
    """Which of BLIP's linear layers are computed together, and which multiply a few rows at a time: all but the image's."""
    for module in text_decoder.modules():
        if isinstance(module, PackableLinear):
            module.few_rows = True
    for layer in text_decoder.bert.encoder.layer:
        text, image = layer.attention.self, layer.crossattention.self
        join(text.query, text.key, text.value)
        join(image.key, image.value)
        image.key.few_rows = image.value.few_rows = False


def attend_to_text(query, key, value, mask=None) -> torch.Tensor:
    """Context (R, T, heads, d) of (R, heads, T, d) and, for key and value, (R, heads, P + T, d)."""
    if query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # a few numbers only: the fused kernel in bf16 takes twice the time of these four passes
        scores = (query * (1 / math.sqrt(query.shape[-1])) * key).sum(-1, keepdim=True)
        if mask is not None:
            scores = scores + mask.transpose(-1, -2)
        return (scores.softmax(-2) * value).sum(-2)[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


class DecoderLayer:
    """A layer of BLIP's text decoder, to be run for one token after another: what is the same every time is looked up once, a tenth of the
    time of a step."""

    def __init__(self, layer):
        text, image = layer.attention.self, layer.crossattention.self
        self.number, self.heads = text.layer_idx, text.num_attention_heads
        self.text_products = prepared(text.query, text.key, text.value)
        self.image_query = prepared(image.query)
        self.intermediate = prepared(layer.intermediate.dense, activation=layer.intermediate.intermediate_act_fn)
        outputs = layer.attention.output, layer.crossattention.output, layer.output
        self.after_text, self.after_image, self.after_intermediate = map(added_and_normalised, outputs)

    def __call__(self, states: torch.Tensor, cache: ImageCache, mask=None, image_mask=None) -> torch.Tensor:
        """(R, T, D) of (R, T, D); the new keys and values go into the cache."""
        rows, length, width = states.shape
        of_text = self.text_products(states).view(rows, length, 3, self.heads, -1)
        query, key, value = of_text.permute(2, 0, 3, 1, 4)
        key, value = cache.self_attention_cache.update(key, value, self.number)
        context = attend_to_text(query, key, value, mask).reshape(rows, length, width)
        states = self.after_text(context, states)
        context, _ = attend_to_image(self.image_query(states), cache, self.number, image_mask)
        states = self.after_image(context, states)
        return self.after_intermediate(self.intermediate(states), states)


def added_and_normalised(output):
    """What BLIP's `output` makes of an input and the states before, as a function of both."""
    product, norm = prepared(output.dense), output.LayerNorm
    settings = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x, states: torch.layer_norm(product(x, states), *settings)


def added_mask(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where something is kept, else the least number: not -inf, as a pad may have nothing to attend to."""
    return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill_(~kept, torch.finfo(dtype).min)


def text_mask(attention_mask: Optional[torch.Tensor], tokens: int, past: int, like: torch.Tensor):
    """(R or 1, 1, T, P + T) to add to scores: no token sees later ones or pads. None if there is nothing to hide.

    Transformers' functions for it differ between the versions that are supported, and older ones are removed."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is None and tokens == 1:
        return None
    kept = torch.ones(tokens, past + tokens, dtype=torch.bool, device=like.device).tril_(past)
    if attention_mask is not None:
        kept = kept & attention_mask[:, None, None].bool()
    return added_mask(kept, like.dtype)


def decode(
    bert,
    input_ids: torch.Tensor,
    cache: ImageCache,
    attention_mask: Optional[torch.Tensor] = None,
    position_ids: Optional[torch.Tensor] = None,
    image_mask: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """The last hidden states (r, T, D) of `BlipTextModel`, without dropout, of the rows that the cache says are left: `cache.all_rows`.

    Args:
        input_ids (R, T): the tokens that the cache does not hold yet.
        attention_mask (R, P + T): 0 on pads; (R, 1, T, P + T): added to attention scores.
        image_mask (B, N): 0 on image tokens to leave out.
    """
    cache.leave_out_finished()
    input_ids, attention_mask, position_ids, image_mask = map(
        cache.rows_left, (input_ids, attention_mask, position_ids, image_mask)
    )
    past = cache.get_seq_length()
    states = bert.embeddings(input_ids=input_ids, position_ids=position_ids, past_key_values_length=past)
    mask = text_mask(attention_mask, input_ids.shape[1], past, states)
    if image_mask is not None:
        image_mask = added_mask(image_mask[:, None, None].bool(), states.dtype)
    for layer in cache.layers_of_decoder:
        states = layer(states, cache, mask, image_mask)
    return states
