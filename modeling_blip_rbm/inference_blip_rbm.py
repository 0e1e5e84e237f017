"""Where the speed comes from: what `generate` runs in place of the model's own modules, behind one door.

`model.optimize_for_inference()` opens the door, and `generate` opens it by itself. Behind it stands a [`FastInference`], made of the
model's weights and kept beside the model, which stays as it is: it can be trained, saved, pickled and quantised before and after.

    vision tower   batch normalisation folded into convolutions, a few images at a time on a CPU, packed linear layers
    text decoder   an image's keys and values once, not once a beam (`ImageCache`); a step without what BLIP decides anew in every layer,
                   which may be compiled (static_blip_rbm.py)
    linear layers  weights packed in the order in which oneDNN reads them, or in 8 bits

The results are the model's own up to rounding (tests/modeling_blip_rbm/test_inference.py). What is used is decided by the kind of
processor, the dtype and the number of rows (`PACKING`, `fused_attention`), never by a clock: every process computes the same.

Axes: B images, R rows of text (a multiple of B, an image's adjacent), T new tokens, P past tokens, N image tokens, D width,
I inputs and O outputs of a linear layer.
"""

import copy
import math
import threading
import weakref
from functools import partial
from itertools import pairwise
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip import BlipMLP
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from .rbm import autocasts, gain_weights
from .vision_blip_rbm import ImageSelfAttention, vision_tokens


IMAGES_AT_ONCE = 4  # on a CPU: what lies between the layers of so many images stays in its caches
STEPS = (389, 97, 23)  # one number of so many tells whether a weight changed; primes, so that every column has its turn
BLOCK = 512  # rows at a time of a product in 8 bits, so that its 32-bit sums stay in the cache


# ---------------------------------------------------------------------- what the processor is


class Packing(NamedTuple):
    least_rows: int  # for which packed weights are faster than others
    many_rows: bool  # whether they still are for hundreds, as in a vision tower


# (dtype, whether the processor has AMX): measured by `python -m benchmarks.linear` on a Xeon with AMX and an EPYC (Zen 4) without. A
# processor without AVX-512 was not measured: nothing is packed there.
PACKING = {
    (torch.float32, True): Packing(4, False),
    (torch.bfloat16, True): Packing(1, True),
    (torch.float32, False): Packing(1, True),
    (torch.bfloat16, False): Packing(1, True),
}


def has_amx() -> bool:
    """Whether this processor has matrix units that PyTorch uses for bfloat16 and 8 bits."""
    return torch.cpu._is_amx_tile_supported()


def packing(dtype: torch.dtype) -> Optional[Packing]:
    """From how many rows on packed weights of this dtype are faster on this processor; None: never, or not measured."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    return PACKING.get((dtype, has_amx()))


def fused_attention(dtype: torch.dtype) -> bool:
    """Whether PyTorch's fused attention is faster on a CPU than `attention_by_blocks`: in half precision only with AMX, where it takes
    half of the time; without, it takes twice."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_amx())


# ---------------------------------------------------------------------- linear layers


def product(*layers: nn.Module, activation: Optional[Callable] = None, int8: bool = False, few_rows: bool = True):
    """The outputs of linear layers of one input x (..., I), side by side, as a function f(x, residual=None) that is called many times.

    Weights of plain `nn.Linear` layers on a CPU are packed where `PACKING` says so: reading a large weight is what multiplying a few rows
    costs, and oneDNN reads its own order several times faster. On a GPU several of them are one product. All other layers (adapters,
    quantised ones) are called as they are.

    Args:
        activation: applied to the outputs.
        int8: weights and inputs in 8 bits, where that is faster.
        few_rows: the rows are as many as there are beams, not hundreds.

    Returns:
        f(x, residual) = activation(x W' + b) + residual, each optional.
    """
    in_turn = _in_turn(layers[0] if len(layers) == 1 else lambda x: torch.cat([f(x) for f in layers], -1), activation)
    if not all(_is_plain(layer) for layer in layers):
        return in_turn
    weight = (layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])).detach()
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers]).detach()
    if weight.device.type != "cpu":  # one kernel, not four
        return _in_turn(lambda x: F.linear(x, weight, bias), activation)
    if not all(_can_be_packed(layer) for layer in layers):
        return in_turn
    # a few rows in 16 bits: rounding them takes longer than reading half of the weight less
    if int8 and not (few_rows and weight.dtype == torch.bfloat16):
        rounded = Int8Weight.of(weight)
        bias = None if bias is None else bias.float()
        return _in_turn(lambda x: int8_product(x, rounded, bias, activation))
    kind = packing(weight.dtype)
    if kind is None or not (few_rows or kind.many_rows):
        return in_turn
    packed = _pack(weight)
    if activation is None:
        fast = lambda x, residual=None: (
            _linear(x, packed, bias) if residual is None else _linear_and_sum(x, residual, packed, bias)
        )
    elif _is_gelu(activation):
        fast = _in_turn(lambda x: _linear(x, packed, bias, "gelu"))
    else:
        fast = _in_turn(lambda x: _linear(x, packed, bias), activation)
    # a compiler knows of no packed weights
    plain = lambda x: _rows(x) < kind.least_rows or torch.compiler.is_compiling()
    return lambda x, residual=None: (in_turn if plain(x) else fast)(x, residual)


def packed_product(weight: torch.Tensor) -> Callable:
    """x -> x W' of a weight (O, I) of its own, packed where that is faster for a few rows."""
    kind = packing(weight.dtype) if weight.device.type == "cpu" else None
    if kind is None:
        return lambda x: F.linear(x, weight)
    packed = _pack(weight)
    return lambda x: F.linear(x, weight) if _rows(x) < kind.least_rows else _linear(x, packed)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def _can_be_packed(layer: nn.Module) -> bool:
    return (
        _is_plain(layer) and layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.float32, torch.bfloat16)
    )


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _in_turn(function: Callable, activation: Optional[Callable] = None) -> Callable:
    """The product, the activation and the sum with the residual as operations of their own."""

    def in_turn(x, residual=None):
        y = function(x) if activation is None else activation(function(x))
        return y if residual is None else y + residual

    return in_turn


def _is_gelu(activation) -> bool:
    """Whether it is the exact GELU, for which there are several classes."""
    return getattr(activation, "act", activation) is F.gelu or (
        type(activation) is nn.GELU and activation.approximate == "none"
    )


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def _linear(x, packed_weight, bias=None, activation="none"):
    return torch.ops.mkldnn._linear_pointwise.default(x, packed_weight, bias, activation, [], "none")


def _linear_and_sum(x, residual, packed_weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed_weight, bias, "add")


class Int8Weight(NamedTuple):
    """A weight rounded to 8 bits, each output with a scale of its own."""

    rounded: torch.Tensor  # (O, I), int8
    scale: torch.Tensor  # (O,), fp32

    @classmethod
    def of(cls, weight: torch.Tensor) -> "Int8Weight":
        rounded, step = _rounded(weight)
        return cls(rounded, step.flatten())


def _rounded(x: torch.Tensor, room: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in steps of 1/127 of its greatest number: int8 (n, I), and the steps (n, 1), fp32. `room` (n, I), fp32, to compute in."""
    y = (torch.empty(x.shape, dtype=torch.float32) if room is None else room).copy_(x.detach())
    step = torch.maximum(y.amax(1, keepdim=True), y.amin(1, keepdim=True).neg_()).clamp_(min=1e-10).div_(127)
    return y.mul_(1 / step).round_().to(torch.int8), step


def int8_product(x, weight: Int8Weight, bias=None, activation=None) -> torch.Tensor:
    """activation(x W' + b) in 8 bits, each row of x (..., I) with a scale of its own, so that a caption does not depend on its batch:
    torchao's "int8 dynamic activation, int8 weight", in PyTorch's own product."""
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight.rounded))
    # shared by all blocks: fresh memory would cost more than these passes
    widths = x.shape[-1], len(weight.rounded)
    inputs, sums = (torch.empty(min(BLOCK, len(rows)), width, dtype=torch.float32) for width in widths)
    for some, into in zip(rows.split(BLOCK), out.split(BLOCK)):
        rounded, step = _rounded(some, inputs[: len(some)])
        y = sums[: len(some)].copy_(torch._int_mm(rounded, weight.rounded.T)).mul_(weight.scale).mul_(step)
        y = y if bias is None else y.add_(bias)
        into.copy_(y if activation is None else activation(y))
    return out.view(*x.shape[:-1], -1)


# ---------------------------------------------------------------------- the vision tower


class FastLinear(nn.Module):
    """A linear layer of a copied tower, by `product`."""

    def __init__(self, layer: nn.Linear, int8: bool, activation: Optional[Callable] = None):
        super().__init__()
        self.product = product(layer, activation=activation, int8=int8, few_rows=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


def attention_by_blocks(query, key, value, scale: float, block: int = 192) -> torch.Tensor:
    """(B, N, heads, d) softmax(scale Q K') V of (B, heads, N, d) each, about `block` queries of an image at a time, so that what lies
    between the products stays in the cache: in bf16 two thirds of the time of all at once."""
    blocks = max(1, round(query.shape[2] / block))  # of the same size: one of a few rows takes as long as a whole one
    images = [
        torch.cat([(some @ k.transpose(1, 2)).softmax(-1) @ v for some in q.chunk(blocks, 1)], 1)
        for q, k, v in zip(query * scale, key.contiguous(), value.contiguous())
    ]
    return torch.stack(images).transpose(1, 2)


def fast_tower(tower: nn.Module, int8: bool = False) -> nn.Module:
    """A copy of a vision tower that computes the same, to rounding, in less time. For inference alone.

    Batch normalisation goes into the convolution before it (Jacob et al., CVPR 2018), ReLU6 works in place, linear layers are packed. All
    other weights are the tower's own, not copies.
    """
    weights = [*tower.parameters(), *tower.buffers()]
    on_cpu, dtype = weights[0].device.type == "cpu", weights[0].dtype
    tower = copy.deepcopy(tower, {id(weight): weight for weight in weights}).eval()
    for module in list(tower.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        if isinstance(module, BlipMLP) and _can_be_packed(module.fc1):
            module.fc1 = FastLinear(module.fc1, int8, module.activation_fn)
            module.activation_fn = nn.Identity()
        children = list(module.named_children())
        for name, child in children:
            if isinstance(child, ImageSelfAttention) and on_cpu and not fused_attention(dtype):
                child.attend = partial(attention_by_blocks, scale=child.scale)
            if _can_be_packed(child):
                setattr(module, name, FastLinear(child, int8))
        for (name, first), (next_name, second) in pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                folded = fuse_conv_bn_eval(first, second).requires_grad_(False)
                setattr(module, name, folded.to(memory_format=torch.channels_last))
                setattr(module, next_name, nn.Identity())
    return tower


def image_tokens(tower: nn.Module, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    """(B, N, C) of images (B, 3, S, S) by a vision tower: on a CPU `IMAGES_AT_ONCE`, as 16 images take up to twice the time at once, and
    with the channels last, in which convolutions are up to 1.3 times as fast."""
    if pixel_values.device.type != "cpu":
        return vision_tokens(tower(pixel_values, **kwargs))
    if any(isinstance(module, nn.Conv2d) for module in tower.modules()):
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    return torch.cat([vision_tokens(tower(some, **kwargs)) for some in pixel_values.split(IMAGES_AT_ONCE)])


# ---------------------------------------------------------------------- the text decoder


class ImageCache(EncoderDecoderCache):
    """The decoder's cache, with the image's keys and values computed once an image, and neither copied nor reordered with its beams:
    they are the same for all captions of an image. Stock BLIP repeats them for every beam and copies them all at every step.

    The rows of the text must be a multiple of the images, an image's rows adjacent.

    Args:
        decoder: that reads it. image_embeds (B, N, D).
    """

    def __init__(self, decoder: "FastDecoder", image_embeds: torch.Tensor):
        super().__init__(DynamicCache(), DynamicCache())
        self.decoder, self.image_embeds = decoder, image_embeds
        for layer in decoder.layers:
            keys, values = layer.keys_and_values(image_embeds)
            # `update` would make a copy of them
            self.cross_attention_cache.update(keys[:, :, :0], values[:, :, :0], layer.number)
            cached = self.cross_attention_cache.layers[layer.number]
            cached.keys, cached.values = keys, values
            self.is_updated[layer.number] = True

    def logits(
        self, input_ids, attention_mask=None, position_ids=None, image_mask=None, keep=slice(None)
    ) -> torch.Tensor:
        """(R, kept, vocabulary) of the tokens (R, T) that the cache does not hold yet."""
        if image_mask is not None and len(image_mask) > len(self.image_embeds):
            # generate repeats it for every beam; here is one of each image
            image_mask = image_mask[:: len(image_mask) // len(self.image_embeds)]
        return self.scores(input_ids, attention_mask, position_ids, image_mask, keep)

    def scores(self, input_ids, attention_mask, position_ids, image_mask, keep) -> torch.Tensor:
        states = self.decoder.states(input_ids, self, attention_mask, position_ids, image_mask)
        return self.decoder.logits(states[:, keep])

    def update_text(self, key, value, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values (R, heads, P + T, d) of the text in a layer, with those of new tokens (R, heads, T, d)."""
        return self.self_attention_cache.update(key, value, layer)

    def reorder_cache(self, beam_idx):
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices):
        self.self_attention_cache.batch_select_indices(indices)


class FastDecoder:
    """BLIP's text decoder with its head: the same parameters and the same arithmetic, without dropout and without records."""

    def __init__(self, text_decoder, int8: bool):
        self.embeddings = text_decoder.bert.embeddings
        self.layers = [FastLayer(layer, int8) for layer in text_decoder.bert.encoder.layer]
        head = text_decoder.cls.predictions
        self.transform = product(head.transform.dense, activation=head.transform.transform_act_fn, int8=int8)
        self.norm, self.words = head.transform.LayerNorm, product(head.decoder, int8=int8)

    def states(
        self,
        input_ids: torch.Tensor,
        cache: ImageCache,
        attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.Tensor] = None,
        image_mask: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The last hidden states (R, T, D), as of `BlipTextModel`.

        Args:
            input_ids (R, T): the tokens that the cache does not hold yet.
            attention_mask (R, P + T): 0 on pads; (R, 1, T, P + T): added to attention scores.
            image_mask (B, N): 0 on image tokens to leave out.
        """
        past, weight = cache.get_seq_length(), self.embeddings.word_embeddings.weight
        mask = text_mask(attention_mask, input_ids.shape[1], past, weight)
        if image_mask is not None:
            image_mask = added_mask(image_mask[:, None, None].bool(), weight.dtype)
        return self.step(cache, input_ids, position_ids, mask, image_mask, past)

    def step(
        self, cache: ImageCache, input_ids, position_ids=None, mask=None, image_mask=None, past: int = 0
    ) -> torch.Tensor:
        """As `states`, with masks that are added to attention scores: what may be compiled."""
        states = self.embeddings(input_ids=input_ids, position_ids=position_ids, past_key_values_length=past)
        for layer in self.layers:
            states = layer(states, cache, mask, image_mask)
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(..., vocabulary) of the last hidden states (..., D)."""
        return self.words(self.norm(self.transform(states)))


class FastLayer:
    """A layer of BLIP's text decoder, to be run for one token after another: what is the same every time is looked up once."""

    def __init__(self, layer, int8: bool):
        text, image = layer.attention.self, layer.crossattention.self
        self.number, self.heads, self.head_size = (text.layer_idx, text.num_attention_heads, text.attention_head_size)
        self.text_products = product(text.query, text.key, text.value, int8=int8)
        self.image_query = product(image.query, int8=int8)
        self.image_key, self.image_value = (
            product(layer, int8=int8, few_rows=False) for layer in (image.key, image.value)
        )
        self.intermediate = product(
            layer.intermediate.dense, activation=layer.intermediate.intermediate_act_fn, int8=int8
        )
        outputs = layer.attention.output, layer.crossattention.output, layer.output
        self.after_text, self.after_image, self.after_intermediate = (
            added_and_normalised(output, int8) for output in outputs
        )

    def keys_and_values(self, image_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, heads, N, head size) each, of image_embeds (B, N, D): on a CPU some images at a time into their places, which takes hardly
        more memory than these."""
        images, tokens, _ = image_embeds.shape
        shape = images, self.heads, tokens, self.head_size
        keys, values = image_embeds.new_empty(shape), image_embeds.new_empty(shape)
        at_once = IMAGES_AT_ONCE if image_embeds.device.type == "cpu" else images
        for first in range(0, images, at_once):
            some = slice(first, first + at_once)
            for states, projected in ((keys, self.image_key), (values, self.image_value)):
                states[some] = projected(image_embeds[some]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return keys, values

    def __call__(self, states: torch.Tensor, cache: ImageCache, mask=None, image_mask=None) -> torch.Tensor:
        """(R, T, D) of (R, T, D); the new keys and values go into the cache."""
        rows, length, width = states.shape
        of_text = self.text_products(states).view(rows, length, 3, self.heads, -1)
        query, key, value = of_text.permute(2, 0, 3, 1, 4)
        key, value = cache.update_text(key, value, self.number)
        context = attend_to_text(query, key, value, mask).reshape(rows, length, width)
        states = self.after_text(context, states)
        context = attend_to_image(self.image_query(states), cache, self.number, image_mask)
        states = self.after_image(context, states)
        return self.after_intermediate(self.intermediate(states), states)


def added_and_normalised(output, int8: bool) -> Callable:
    """What BLIP's `output` makes of an input and the states before, as a function of both."""
    added, norm = product(output.dense, int8=int8), output.LayerNorm
    settings = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x, states: torch.layer_norm(added(x, states), *settings)


def attend_to_image(query: torch.Tensor, cache: ImageCache, layer: int, mask: Optional[torch.Tensor] = None):
    """Context (R, T, D) of queries (R, T, D), the captions of an image as so many queries to the same keys; `mask` (B, 1, 1, N) is added
    to the scores."""
    cached = cache.cross_attention_cache.layers[layer]
    images, heads, _, size = cached.keys.shape
    grouped = query.view(images, -1, heads, size)
    attend = attention_in_turn if query.device.type == "cpu" else F.scaled_dot_product_attention
    context = attend(grouped.transpose(1, 2), cached.keys, cached.values, attn_mask=mask)
    return context.transpose(1, 2).reshape(query.shape)


def attention_in_turn(query, key, value, attn_mask: Optional[torch.Tensor] = None) -> torch.Tensor:
    """What PyTorch's fused kernel gives. On a CPU it takes longer for a few queries to many keys."""
    scores = (query * (1 / math.sqrt(query.shape[-1]))).contiguous() @ key.transpose(-1, -2)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ value


def attend_to_text(query, key, value, mask=None) -> torch.Tensor:
    """Context (R, T, heads, d) of (R, heads, T, d) and, for key and value, (R, heads, P + T, d)."""
    if query.shape[2] == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu":
        # a few numbers only: the fused kernel in bf16 takes twice the time of these four passes
        scores = (query * (1 / math.sqrt(query.shape[-1])) * key).sum(-1, keepdim=True)
        if mask is not None:
            scores = scores + mask.transpose(-1, -2)
        return (scores.softmax(-2) * value).sum(-2)[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


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


# ---------------------------------------------------------------------- the door


class FastInference:
    """What stands behind the door: a model's tower, decoder and guide, prepared for inference.

    Args:
        model: a `BlipRBMForConditionalGeneration`. Its weights are read now; `open_door` makes another one when they have changed.
        int8: linear layers in 8 bits.
    """

    def __init__(self, model, int8: bool = False):
        self.int8, self.weights = int8, state_of_weights(model)
        with torch.no_grad():
            self.tower = fast_tower(model.vision_model, int8)
            self.decoder = FastDecoder(model.text_decoder, int8)
        self.products, self.steps = {}, {}

    def vision_hidden_states(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """(B, N, C) of images (B, 3, S, S), the vision tower's output."""
        return image_tokens(self.tower, pixel_values, **kwargs)

    def new_cache(self, image_embeds: torch.Tensor) -> ImageCache:
        return ImageCache(self.decoder, image_embeds)

    def gain_product(self, U: torch.Tensor, order: str) -> Optional[Callable]:
        """What multiplies `rbm.gain_moments` with `rbm.gain_weights` of this order; None for "exact", which is no product."""
        if order not in self.products:
            self.products[order] = None if order == "exact" else packed_product(gain_weights(U, order))
        return self.products[order]


_opened = (
    weakref.WeakKeyDictionary()
)  # model -> FastInference: beside the model, so that it is neither saved nor copied
_opening = threading.Lock()


def open_door(model, int8: bool = False) -> FastInference:
    """The model's `FastInference`, made anew if there is none, if it is of another kind or if a weight has changed."""
    with _opening:
        fast = _opened.get(model)
        if fast is None or fast.int8 != int8 or fast.weights != state_of_weights(model):
            fast = _opened[model] = FastInference(model, int8)
        return fast


def behind_the_door(model) -> Optional[FastInference]:
    """The model's `FastInference` if the door was opened, with the weights as they are now; else None."""
    fast = _opened.get(model)
    return None if fast is None else open_door(model, fast.int8)


def may_be_fast(model) -> bool:
    """Whether nothing asks for the model's own modules: gradients, training, tracing, hooks (of Accelerate, of a user who looks at
    activations), weights that are elsewhere."""
    device = next(model.parameters()).device.type
    if model.training or torch.is_grad_enabled() or is_traced() or autocasts(device):
        return False
    for module in model.modules():
        hooks = [hook for hook in module._forward_hooks.values() if not is_capturing_hook(hook)]
        if hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return False
    attention = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
    return all(isinstance(one, BlipTextSelfAttention) for one in attention) and not any(
        weight.is_meta for weight in model.parameters()
    )


def is_capturing_hook(hook) -> bool:
    """Whether it is one of those that transformers leaves in a model which was asked for attentions or hidden states once: they do nothing
    until it is asked again."""
    return getattr(hook, "__name__", "") == "output_capturing_hook"


def is_traced() -> bool:
    """Whether the model is being compiled or exported, so that nothing may be prepared."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def state_of_weights(model) -> tuple:
    """Differs if a weight of the model was changed, moved or replaced."""
    modules = [(id(module), type(module)) for module in model.modules()]
    return modules, *state_of([*model.parameters(), *model.buffers()])


def state_of(tensors: list[torch.Tensor]) -> tuple:
    """Differs if one of the tensors was changed, moved or replaced. PyTorch counts changes, but not those through `weight.data`: so some
    numbers are looked at, of a large weight a few in every row and every column, as all of them would take a twentieth of the time of a
    caption. Single numbers that are changed through `weight.data` may go unseen; on a GPU, which would be waited for, all."""
    seen, some = [], {}
    for tensor in tensors:
        if type(tensor) not in (nn.Parameter, torch.Tensor):  # a quantised one, of a class of its own
            seen.append(id(tensor))
            continue
        seen.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype))
        if tensor.device.type == "cpu":
            rows, columns = (len(tensor), tensor.numel() // max(len(tensor), 1)) if tensor.dim() > 1 else (1, 1)
            step = next((step for step in STEPS if step < min(rows, columns) and columns % step), 1)
            some.setdefault(tensor.dtype, []).append(tensor.detach().flatten()[::step])
    return seen, [torch.cat(parts).sum(dtype=torch.float64).item() for parts in some.values()]
