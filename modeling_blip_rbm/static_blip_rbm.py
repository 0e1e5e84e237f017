"""Decoding with the same shapes in every step, for compiled code and CUDA graphs: `generate(cache_implementation="static")`.

    model.generate(**inputs, cache_implementation="static", compile_config=CompileConfig(mode="reduce-overhead"))

Without a compile_config the step is not compiled. Axes as in inference_blip_rbm.py.
"""

from typing import Callable, Optional

import torch
import torch.nn.functional as F

from .inference_blip_rbm import FastDecoder, FastInference, ImageCache, added_mask


class StaticImageCache(ImageCache):
    """An `ImageCache` with room for all tokens from the start: every step has the same shapes, at the same places in memory, as compiled
    code and CUDA graphs want them.

    Args:
        room: tokens, prompt and caption. step: `FastDecoder.step`, or it compiled.
    """

    def __init__(self, decoder: FastDecoder, image_embeds: torch.Tensor, room: int, step: Callable):
        super().__init__(decoder, image_embeds)
        self.room, self.step, self.length, self.text, self.place = room, step, 0, None, None
        for layer in self.cross_attention_cache.layers:
            torch._dynamo.mark_static_address(layer.keys)
            torch._dynamo.mark_static_address(layer.values)

    def scores(self, input_ids, attention_mask, position_ids, image_mask, keep) -> torch.Tensor:
        rows, new, device = *input_ids.shape, input_ids.device
        if self.text is None:  # now it is known how many rows an image has
            _, heads, _, size = self.cross_attention_cache.layers[0].keys.shape
            shape = len(self.decoder.layers), 2, rows, heads, self.room, size
            self.text = self.image_embeds.new_zeros(shape)
            torch._dynamo.mark_static_address(self.text)
        place = torch.arange(self.length, self.length + new, device=device)
        kept = torch.arange(self.room, device=device) <= place[:, None]
        if attention_mask is not None:
            kept = kept & F.pad(attention_mask, (0, self.room - attention_mask.shape[1]))[:, None, None].bool()
        mask = added_mask(kept.expand(rows, 1, new, -1), self.text.dtype)
        if image_mask is not None:
            image_mask = added_mask(image_mask[:, None, None].bool(), mask.dtype)
        if position_ids is None:
            position_ids = place[None].expand(rows, -1)
        self.place, self.length = place, self.length + new
        step = self.step if new == 1 else self.decoder.step  # the prompt is read once: not compiled
        # cut out of longer rows, they have other strides in every step
        input_ids, position_ids = input_ids.contiguous(), position_ids.contiguous()
        return self.decoder.logits(step(self, input_ids, position_ids, mask, image_mask)[:, keep])

    def update_text(self, key, value, layer: int):
        keys, values = self.text[layer]
        return keys.index_copy_(2, self.place, key), values.index_copy_(2, self.place, value)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def crop(self, *args):
        raise ValueError("a static cache cannot go back, as assisted decoding asks: leave cache_implementation out")

    def reorder_cache(self, beam_idx):
        self.text.copy_(self.text.index_select(2, beam_idx))  # in its place


def static_cache(fast: FastInference, image_embeds: torch.Tensor, room: int, options: Optional[dict] = None):
    """A `StaticImageCache` for images (B, N, D), with room for so many tokens; its step is compiled, once for all calls, where there are
    `options` of `torch.compile`."""
    step, key = fast.decoder.step, repr(options)
    if options is not None:
        step = fast.steps[key] = fast.steps.get(key) or torch.compile(step, **options)
    return StaticImageCache(fast.decoder, image_embeds, room, step)
