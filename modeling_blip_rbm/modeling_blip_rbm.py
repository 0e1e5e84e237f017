"""BLIP-RBM: what differs from `transformers.BlipForConditionalGeneration`, and nothing else.

    pixel_values -> vision_model -> [projector] -> RBM layer -> text_decoder -> caption
                                                   |- refine: the hidden causes shift image_embeds, and become tokens beside them
                                                   |- guide: word gains on the logits     } decoding_blip_rbm.py
                                                   '- re-rank: candidates by free energy  }

Axes: B images, N image tokens, C width of the vision tower's output, D width that the decoder attends to,
T text tokens, V = 2C or C pooled image units, H hidden causes, K words of the RBM.
"""

import contextvars
import copy
import functools
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import (
    AutoModel,
    BlipForConditionalGeneration,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.blip.modeling_blip import BlipAttention, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_blip_rbm import PHRASE_WEIGHTS, BlipRBMConfig
from .decoder_blip_rbm import IMAGES_AT_ONCE, ImageCache, ImageCrossAttention, decode, plan_products
from .decoding_blip_rbm import (
    ContextLimit,
    InverseTransformSampling,
    RBMGuidance,
    caption_similarity,
    consensus,
    rerank_scores,
    word_columns,
    words_said,
)
from .linear_blip_rbm import is_traced, make_packable, product_with, time_ratio, with_packed_linears
from .phrases_blip_rbm import PhraseBlock
from .rbm import JointRBM, bernoulli, gain_weights, pointwise_mutual_information, word_gains


try:  # transformers 5: initialises only what a checkpoint did not give
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

logger = logging.get_logger(__name__)

_searching = contextvars.ContextVar("the cache of the beam search that runs", default=None)  # of this thread
WEIGHTS_OF_GAINS = {
    order: functools.partial(gain_weights, order=order) for order in ("first", "second")
}  # each is made once


def _files_of_the_package():  # never called: transformers copies along with a model the files that this one imports
    from .pipeline_blip_rbm import BlipRBMImageToTextPipeline  # noqa: F401
    from .processing_blip_rbm import BlipRBMProcessor  # noqa: F401
    from .retrieval_blip_rbm import BlipRBMForImageTextRetrieval  # noqa: F401


@dataclass
class BlipRBMOutput(ModelOutput):
    """What the forward pass returns. `image_embeds` (B, N, D) is what the decoder attended to."""

    loss: Optional[torch.FloatTensor] = None
    logits: Optional[torch.FloatTensor] = None
    past_key_values: Optional[object] = None
    image_embeds: Optional[torch.FloatTensor] = None
    hidden_states: Optional[tuple] = None
    attentions: Optional[tuple] = None
    cross_attentions: Optional[tuple] = None


class ImageEncoding(NamedTuple):
    """An image, encoded once."""

    image_embeds: torch.Tensor  # (B, N, D) what the decoder attends to
    hidden_input: torch.Tensor  # a (B, H), the RBM's hidden input from the image alone


def vision_tokens(outputs) -> torch.Tensor:
    """(B, N, C) of a vision tower's output: a token sequence as it is, a feature map (B, C, H, W) row by row."""
    states = outputs.last_hidden_state
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states


def image_tokens(tower: nn.Module, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    """(B, N, C) of images (B, 3, S, S) by a vision tower. On a CPU `IMAGES_AT_ONCE`, whose feature maps stay in its caches and in memory that
    the process has already: 16 images take up to twice the time at once. Not where gradients keep all feature maps anyway."""
    whole = pixel_values.device.type != "cpu" or torch.is_grad_enabled() or tower.training or is_traced()
    pieces = [pixel_values] if whole else pixel_values.split(IMAGES_AT_ONCE)
    return torch.cat([vision_tokens(tower(some, **kwargs)) for some in pieces])


def folded_tower(tower: nn.Module) -> nn.Module:
    """A copy of a vision tower that computes the same, to rounding, in less time: every batch normalisation in the convolution before
    it (Jacob et al., CVPR 2018), no copy of what ReLU6 cuts off. For inference alone: there is nothing left to train or to save."""
    tower = copy.deepcopy(tower).eval()
    for module in list(tower.modules()):
        if isinstance(module, nn.ReLU6):
            module.inplace = True
        children = list(module.named_children())
        for (name, first), (next_name, second) in pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, next_name, nn.Identity())
    return tower.requires_grad_(False).to(memory_format=torch.channels_last)


def pool_tokens(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """(B, N, C) -> (B, 2C) [CLS ; mean of the others] for "cls_mean" (SAIL, arXiv 2412.04616), (B, C) for "mean", (B, 2C)
    [mean ; greatest of each channel] for "mean_max", which keeps what is small in the image."""
    if pooling == "mean":
        return tokens.mean(1)
    if pooling == "mean_max":
        return torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)


def caption_loss(logits, labels, label_smoothing: float = 0.0):
    """Mean next-token cross entropy (nats) over the labels that are not -100. logits (B, T, vocabulary), labels (B, T)."""
    logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing)


class VisionProjector(nn.Module):
    """From the tokens of a tower that is not BLIP's to what BLIP's decoder attends to: the Llava pattern."""

    def __init__(self, num_tokens: int, in_size: int, out_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_size)
        self.linear = nn.Linear(in_size, out_size)
        self.output_norm = nn.LayerNorm(out_size)
        self.position = nn.Parameter(torch.zeros(num_tokens, out_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, N, C) -> (B, N, D)
        if tokens.shape[1] != self.position.shape[0]:
            raise ValueError(
                f"the vision tower gave {tokens.shape[1]} tokens an image, but the model was built for "
                f"{self.position.shape[0]}: resize images to what the processor of this model says"
            )
        return self.output_norm(self.linear(self.norm(tokens))) + self.position


class RBMLayer(nn.Module):
    """The RBM between vision tower and decoder, and the one way in which it changes image_embeds: `refine`."""

    def __init__(self, config):
        super().__init__()
        self.pooling = config.rbm_pooling
        self.rbm = JointRBM(
            config.rbm_visible_size, len(config.rbm_word_ids), config.rbm_hidden_size, config.rbm_visible_type
        )
        width, self.cause_tokens = config.text_config.encoder_hidden_size, config.rbm_cause_tokens
        self.shift = nn.Linear(config.rbm_hidden_size, width, bias=False)
        if self.cause_tokens:
            self.causes = nn.Linear(config.rbm_hidden_size, self.cause_tokens * width, bias=False)
        self.phrases = None
        if config.rbm_num_phrases:
            self.phrases = PhraseBlock(config.rbm_num_phrases, config.rbm_hidden_size, config.text_config.vocab_size)
        self.gate = nn.Parameter(torch.zeros(1))  # 0: refine is the identity, and so a converted BLIP is BLIP

    def hidden_input(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, N, C) -> a (B, H)
        return self.rbm.hidden_input(self.rbm.standardise(pool_tokens(tokens, self.pooling)))

    def refine(self, image_embeds: torch.Tensor, hidden_input: torch.Tensor) -> torch.Tensor:
        """(B, N, D), or (B, N + m, D) with m cause tokens, of image_embeds (B, N, D) and a (B, H)."""
        q = torch.sigmoid(hidden_input).to(self.shift.weight.dtype)
        refined = image_embeds + (self.gate * self.shift(q))[:, None].to(image_embeds.dtype)
        if self.cause_tokens and self.gate != 0:  # a token of zeros would still draw attention
            tokens = (self.gate * self.causes(q)).view(len(q), self.cause_tokens, -1)
            refined = torch.cat([refined, tokens.to(refined.dtype)], 1)
        return refined


class ImageSelfAttention(BlipAttention):
    """The attention of BLIP's vision tower without ever holding all (N, N) weights: by PyTorch's fused kernel, or in half precision on a
    CPU where that is slow, some rows at a time. As BLIP computes it where the weights are asked for, and with
    `attn_implementation="eager"`.

    Args:
        whole: config of the whole model, whose attn_implementation counts: BLIP's towers know "eager" alone.
    """

    def __init__(self, config, whole):
        super().__init__(config)
        self.whole = whole

    def forward(self, hidden_states, *args, **kwargs):
        wanted = kwargs.get("output_attentions") or (args and args[-1] is True) or self.config.output_attentions
        if wanted or self.whole._attn_implementation == "eager":
            return super().forward(hidden_states, *args, **kwargs)
        rows, length, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        on_cpu = hidden_states.device.type == "cpu" and not self.training
        if on_cpu and not fused_attention_pays(hidden_states.dtype, torch.get_num_threads()):
            context = attention_by_blocks(*qkv, self.scale)
        else:
            dropout = self.dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(*qkv, dropout_p=dropout, scale=self.scale).transpose(1, 2)
        return self.projection(context.reshape(rows, length, width)), None


def attention_by_blocks(query, key, value, scale: float, block: int = 192) -> torch.Tensor:
    """(B, N, heads, d) softmax(scale Q K') V of (B, heads, N, d) each, about `block` queries of an image at a time, so that what lies
    between the products stays in the cache: in bf16 two thirds of the time of all at once."""
    blocks = max(1, round(query.shape[2] / block))  # of the same size: one of a few rows takes as long as a whole one
    images = [
        torch.cat([(some @ k.transpose(1, 2)).softmax(-1) @ v for some in q.chunk(blocks, 1)], 1)
        for q, k, v in zip(query * scale, key.contiguous(), value.contiguous())
    ]
    return torch.stack(images).transpose(1, 2)


@functools.lru_cache
def fused_attention_pays(dtype: torch.dtype, threads: int) -> bool:
    """Whether PyTorch's fused kernel is faster here than `attention_by_blocks`: measured once, on an image of BLIP-base's tower, 50 ms. With
    bfloat16 and matrix units (AMX) it takes half of the time, without them twice; in fp32 it always was faster.

    Args:
        threads: of PyTorch, on which the answer depends.
    """
    if dtype == torch.float32 or is_traced():
        return True
    qkv = torch.linspace(-1, 1, 3 * 12 * 577 * 64).to(dtype).view(3, 1, 577, 12, 64).transpose(2, 3)
    fused, by_blocks = lambda: F.scaled_dot_product_attention(*qkv), lambda: attention_by_blocks(*qkv, 0.125)
    return time_ratio(fused, by_blocks, times=3) < 1


def _tower_output_shape(config) -> tuple[int, int]:
    """(N, C) that the tower of this config gives for an image, found by running it without weights or arithmetic."""
    size = getattr(config.vision_config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        tower = AutoModel.from_config(config.vision_config).eval()
        channels = getattr(config.vision_config, "num_channels", 3)
        return tuple(vision_tokens(tower(pixel_values=torch.zeros(1, channels, height, width))).shape[1:])


def new_vision_tower(config) -> nn.Module:
    """The tower of a config, without weights; writes the shape of its output into the config if it is not there."""
    if not config.has_blip_tower:
        if config.num_image_tokens is None or config.vision_hidden_size is None:
            config.num_image_tokens, config.vision_hidden_size = _tower_output_shape(config)
        return AutoModel.from_config(config.vision_config)
    config.vision_config._attn_implementation = "eager"
    tower = BlipVisionModel(config.vision_config)
    for layer in tower.encoder.layers:
        layer.self_attn = ImageSelfAttention(config.vision_config, config)
    return tower


class BlipRBMForConditionalGeneration(BlipForConditionalGeneration, GenerationMixin):
    """BLIP with an RBM between its vision encoder and its text decoder.

    Differs from [`BlipForConditionalGeneration`] in: any vision tower; `RBMLayer`; the image is encoded once and
    the *top-level* forward decodes, so generation_config, eos and pad arguments and export work; a loss that masks
    pads and is right under gradient accumulation; prompts of different lengths in one batch.
    """

    config_class = BlipRBMConfig
    main_input_name = "input_ids"  # of the forward that decodes
    _supports_sdpa = True
    accepts_loss_kwargs = False  # the loss is a mean over this batch: Trainer must divide by the accumulation steps
    # while captions are generated on a CPU. False: slower, but their weights are not in memory twice; "int8": faster, in 8 bits
    pack_linears = True
    _keep_in_fp32_modules = ["rbm_layer"]  # energies are differences of large sums
    _no_split_modules = ["BlipEncoderLayer", "BlipTextEmbeddings", "BlipTextLayer", "RBMLayer", "VisionProjector"]

    def __init__(self, config):
        # BlipForConditionalGeneration.__init__ would build BLIP's tower whatever the config says
        super(BlipForConditionalGeneration, self).__init__(config)
        config.text_config._attn_implementation = "eager"  # all that BLIP's own parts know; see ImageSelfAttention
        self.vision_model = new_vision_tower(config)
        if config.has_blip_tower:
            self.projector = None
        else:
            self.projector = VisionProjector(
                config.num_image_tokens, config.vision_hidden_size, config.text_config.encoder_hidden_size
            )
        self.text_decoder = BlipTextLMHeadModel(config.text_config)
        for i, layer in enumerate(self.text_decoder.bert.encoder.layer):
            layer.crossattention.self = ImageCrossAttention(config.text_config, True, layer_idx=i)
        config.set_visible_size()
        self.rbm_layer = RBMLayer(config)

        make_packable(self)
        plan_products(self.text_decoder)

        self.decoder_input_ids = config.text_config.bos_token_id
        self.decoder_pad_token_id = config.text_config.pad_token_id
        self.post_init()
        self.generation_config = blip_generation_config(config)

    # ------------------------------------------------------------------ weights: initial, loaded, converted

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, JointRBM):
            module.reset_parameters(init)
        elif isinstance(module, RBMLayer):
            init.zeros_(module.gate)
        elif isinstance(module, VisionProjector):
            init.normal_(module.position, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As transformers' own. Says so if the checkpoint has no RBM, and refuses weights that are not finite."""
        kwargs["output_loading_info"] = True
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        without = sorted(name for name in info["missing_keys"] if name.startswith("rbm_layer."))
        if without:
            logger.warning(
                f"{pretrained_model_name_or_path} has no RBM weights ({', '.join(without)}). They were initialised as "
                "the identity: captions are those of BLIP until the RBM is trained (training/train_rbm.py)."
            )
        broken = [n for n, t in model.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
        if broken:
            raise ValueError(
                f"{pretrained_model_name_or_path} has NaN or infinite values in {', '.join(broken[:5])}"
                f"{' and others' if len(broken) > 5 else ''}. The file is damaged or training diverged: use an "
                "earlier checkpoint."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_blip(cls, blip: Union[str, Path, BlipForConditionalGeneration], **rbm_settings):
        """Convert any BLIP captioning checkpoint: same tokens out, until the RBM is trained and switched on.

        Args:
            blip: folder, Hub id, or a `BlipForConditionalGeneration`.
            rbm_settings: of [`BlipRBMConfig`], such as `rbm_word_ids` and `rbm_hidden_size`.
        """
        if not isinstance(blip, BlipForConditionalGeneration):
            blip = BlipForConditionalGeneration.from_pretrained(blip)
        settings = blip.config.to_dict()
        for name in ("model_type", "architectures", "auto_map", "custom_pipelines", "transformers_version"):
            settings.pop(name, None)
        model = cls(BlipRBMConfig(**{**settings, **rbm_settings})).to(blip.dtype)
        missing, unexpected = model.load_state_dict(blip.state_dict(), strict=False)
        wrong = [name for name in missing if not name.startswith("rbm_layer.")] + unexpected
        if wrong:
            raise ValueError(f"not a BLIP captioning model: weights without a counterpart: {', '.join(wrong[:5])}")
        return model.eval()

    # ------------------------------------------------------------------ the image, once

    def encode_image(
        self, pixel_values=None, vision_hidden_states=None, interpolate_pos_encoding: bool = False, rbm: bool = True
    ) -> ImageEncoding:
        """What the decoder attends to, and the RBM's hidden input.

        Args:
            pixel_values (B, 3, S, S): or else
            vision_hidden_states (B, N, C): the vision tower's output, computed before (`training/lib/features.py`).
            rbm: False leaves image_embeds as BLIP has them.
        """
        if (pixel_values is None) == (vision_hidden_states is None):
            raise ValueError("give either pixel_values or vision_hidden_states (the tower's cached output)")
        if vision_hidden_states is None:
            extra = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
            vision_hidden_states = self._vision_hidden_states(pixel_values, **extra)
        tokens = vision_hidden_states.to(self.dtype)
        image_embeds = tokens if self.projector is None else self.projector(tokens)
        hidden_input = self.rbm_layer.hidden_input(tokens)
        if rbm:
            image_embeds = self.rbm_layer.refine(image_embeds, hidden_input)
        return ImageEncoding(image_embeds, hidden_input)

    def set_phrases(self, phrases: Optional[PhraseBlock]):
        """Give the RBM these phrases, or, as when it learns on and its causes change, none."""
        self.rbm_layer.phrases = phrases
        self.config.rbm_num_phrases = 0 if phrases is None else len(phrases.numbers)
        if phrases is None:
            for name in PHRASE_WEIGHTS:
                setattr(self.config, name, 0.0)

    def optimize_for_inference(self):
        """Fold the vision tower (`folded_tower`), in place; the model itself. Afterwards it captions, but can be neither trained nor
        saved."""
        if not self.config.has_blip_tower:
            self.vision_model = folded_tower(self.vision_model)
        return self

    def _vision_hidden_states(self, pixel_values, **extra) -> torch.Tensor:  # (B, N, C)
        pixel_values = pixel_values.to(self.dtype)
        if not self.config.has_blip_tower:  # a convolutional tower is up to 1.3 times as fast so, on CPUs
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return image_tokens(self.vision_model, pixel_values, **extra)

    @torch.no_grad()
    def image_words(self, hidden_input: torch.Tensor, top_k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        """The RBM's most probable words for images of which nothing has been said.

        Returns:
            P(w_k = 1 | x, no other word) of the top_k words, descending, and their token ids: both (B, top_k).
        """
        p = self.rbm_layer.rbm.parameters_fp32
        if p.U is None:
            raise ValueError("this RBM has no words: its config's rbm_word_ids is empty")
        prob = torch.sigmoid(p.b + word_gains(p, hidden_input))
        values, columns = prob.topk(min(top_k, prob.shape[-1]), dim=-1)
        return values, torch.tensor(self.config.rbm_word_ids, device=columns.device)[columns]

    @torch.no_grad()
    def image_free_energy(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """F(x) (B,) of the image block alone, in nats: high for images unlike those that the RBM was trained on."""
        if vision_hidden_states is None:
            vision_hidden_states = self._vision_hidden_states(pixel_values)
        rbm = self.rbm_layer.rbm
        return rbm.free_energy(rbm.standardise(pool_tokens(vision_hidden_states, self.config.rbm_pooling)))

    # ------------------------------------------------------------------ forward: loss, or one step of decoding

    @can_return_tuple
    def forward(
        self,
        pixel_values: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.LongTensor] = None,
        labels: Optional[torch.LongTensor] = None,
        interpolate_pos_encoding: bool = False,
        logits_to_keep: Union[int, torch.Tensor] = 0,
        vision_hidden_states: Optional[torch.Tensor] = None,
        image_embeds: Optional[torch.Tensor] = None,
        encoder_attention_mask: Optional[torch.Tensor] = None,
        position_ids: Optional[torch.LongTensor] = None,
        past_key_values=None,
        use_cache: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: Optional[bool] = None,
        return_dict: Optional[
            bool
        ] = None,  # can_return_tuple heeds it; named here for exporters, which look at the signature
    ) -> BlipRBMOutput:
        """
        Args:
            pixel_values (B, 3, S, S), vision_hidden_states (B, N, C) or image_embeds (B, N, D): the image as pixels,
                as the vision tower's output, or as the decoder sees it (`encode_image`).
            input_ids (B, T): [DEC] w1 ... wn [SEP], as the processor makes them.
            attention_mask (B, T): 0 on pads. A 4D mask (B, 1, T, T), added to attention scores, is used as it is.
            labels (B, T): same layout as input_ids; -100 and pads do not count. Alone, they stand for input_ids too.
            encoder_attention_mask (B, N): image tokens to attend to.

        Returns:
            [`BlipRBMOutput`]; `loss` in nats per token, with `text_config.label_smoothing`.
        """
        if image_embeds is None:
            image_embeds = self.encode_image(pixel_values, vision_hidden_states, interpolate_pos_encoding).image_embeds
        if labels is not None:
            labels = self._masked_labels(labels, attention_mask)
            if input_ids is None:
                input_ids = self._input_ids_from_labels(labels)
        elif input_ids is None:
            input_ids = torch.full((image_embeds.shape[0], 1), self.decoder_input_ids, device=image_embeds.device)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]

        if encoder_attention_mask is not None and len(encoder_attention_mask) > len(image_embeds):
            # generate repeats it for every beam; with an ImageCache there is one of each image
            encoder_attention_mask = encoder_attention_mask[:: len(encoder_attention_mask) // len(image_embeds)]

        outputs = self._text_states(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.text_decoder.cls(outputs.last_hidden_state[:, keep])
        if isinstance(past_key_values, ImageCache):
            logits = past_key_values.all_rows(logits)
        loss = None if labels is None else caption_loss(logits, labels, self.config.text_config.label_smoothing)
        return BlipRBMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            image_embeds=image_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def _text_states(self, input_ids, **inputs) -> BaseModelOutputWithPastAndCrossAttentions:
        """What the text decoder makes of tokens, given its inputs by BLIP's names: the lean way (`decode`, of the rows that the cache says are
        left) if the image's keys and values are cached and nothing is to be recorded, else BLIP's own."""
        cache, text_config = inputs["past_key_values"], self.config.text_config
        recorded = any(
            getattr(text_config, name) if inputs[name] is None else inputs[name]
            for name in ("output_attentions", "output_hidden_states")
        )
        if not isinstance(cache, ImageCache) or recorded or self.training:
            return self.text_decoder.bert(input_ids, **inputs, is_decoder=True, return_dict=True)
        masks = inputs["attention_mask"], inputs["position_ids"], inputs["encoder_attention_mask"]
        states = decode(self.text_decoder.bert, input_ids, cache, *masks)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states, past_key_values=cache)

    def _masked_labels(self, labels, attention_mask):
        ignored = labels == self.decoder_pad_token_id
        if attention_mask is not None and attention_mask.dim() == 2:
            ignored = ignored | (attention_mask == 0)
        return labels.masked_fill(ignored, -100)

    def _input_ids_from_labels(self, labels):
        counted = labels[:, 1:] != -100
        if (counted[:, 1:] & ~counted[:, :-1]).any():
            raise ValueError(
                "labels without input_ids must hold the whole caption, but they mask (-100) tokens before others that "
                "count, such as a prompt: pass input_ids as well"
            )
        input_ids = labels.masked_fill(labels == -100, self.decoder_pad_token_id)
        input_ids[:, 0] = self.decoder_input_ids  # masked_fill made a copy: the caller's labels stay as they are
        return input_ids

    # ------------------------------------------------------------------ generate

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        image_embeds=None,
        encoder_attention_mask=None,
        use_cache=True,
        logits_to_keep=None,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past_length:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "image_embeds": past_key_values.image_embeds if isinstance(past_key_values, ImageCache) else image_embeds,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """Transformers' own, which on a CPU draws tokens by `InverseTransformSampling`, unless their scores are asked for."""
        if generation_config.do_sample and not generation_config.output_scores and input_ids.device.type == "cpu":
            logits_processor = LogitsProcessorList([*logits_processor, InverseTransformSampling()])
            generation_config = copy.copy(generation_config)
            generation_config.do_sample = False
        return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)

    def _beam_search(self, *args, **kwargs):
        token = _searching.set(kwargs.get("past_key_values"))
        try:
            return super()._beam_search(*args, **kwargs)
        finally:
            _searching.reset(token)

    def _check_early_stop_heuristic(self, *args, **kwargs):
        """(B, 1) for which images beam search, which asks after every step, goes on: the cache leaves out the others."""
        going_on = super()._check_early_stop_heuristic(*args, **kwargs)
        if isinstance(cache := _searching.get(), ImageCache):
            cache.going_on = going_on
        return going_on

    def get_output_embeddings(self):
        return self.text_decoder.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.text_decoder.set_output_embeddings(value)

    @torch.no_grad()
    @with_packed_linears
    def generate(
        self,
        pixel_values: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.LongTensor] = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: Optional[torch.Tensor] = None,
        encoding: Optional[ImageEncoding] = None,
        rbm: bool = True,
        rbm_guidance: Optional[float] = None,
        rbm_rerank: Optional[bool] = None,
        rbm_diversity: float = 0.0,
        logits_processor: Optional[LogitsProcessorList] = None,
        stopping_criteria: Optional[StoppingCriteriaList] = None,
        **generate_kwargs,
    ):
        """Captions of images, with the RBM's strategies.

        Args:
            pixel_values (B, 3, S, S): or `vision_hidden_states` (B, N, C), or `encoding` from `encode_image`.
            input_ids (B, T): prompts, of any lengths (padded on either side); a final [SEP] is dropped and the first
                token becomes [DEC]. Not changed in place.
            rbm: False switches refine, guide and re-rank off together: plain BLIP.
            rbm_guidance: beta of `guide` in place of `config.rbm_guidance`.
            rbm_rerank: `re-rank` on or off in place of `config.rbm_rerank`. Candidates are beams (num_beams is raised
                to `config.rbm_rerank_candidates`), or samples with `do_sample=True`.
            rbm_diversity: weight of sampled hidden causes. Each of the `num_return_sequences` captions of an image is guided
                by causes of its own, h ~ P(h | x), so that they are about different things; not re-ranked.
            generate_kwargs: of `GenerationMixin.generate`: num_beams, max_new_tokens, eos_token_id, ...

        Returns:
            token ids (B * num_return_sequences, T), or with `return_dict_in_generate=True` an output whose
            `rerank_scores` (B * num_return_sequences) are those that chose.

        Raises:
            ValueError: if the prompt leaves no room for a new token, or the RBM cannot do what is asked.
        """
        beta = (self.config.rbm_guidance if rbm_guidance is None else rbm_guidance) if rbm else 0.0
        rerank = (self.config.rbm_rerank if rbm_rerank is None else rbm_rerank) if rbm else False
        diversity = rbm_diversity if rbm else 0.0
        if (beta or rerank or diversity) and not self.config.rbm_word_ids:
            raise ValueError(
                "rbm_guidance, rbm_rerank and rbm_diversity need an RBM with words, but config.rbm_word_ids is empty"
            )
        if encoding is None:
            encoding = self.encode_image(pixel_values, vision_hidden_states, interpolate_pos_encoding, rbm)
        if input_ids is None:
            device = encoding.image_embeds.device
            input_ids = torch.full((encoding.image_embeds.shape[0], 1), self.decoder_input_ids, device=device)
            attention_mask = torch.ones_like(input_ids)
        else:
            input_ids, attention_mask = self._left_padded_prompts(input_ids, attention_mask)

        limit = self.config.text_config.max_position_embeddings
        logits_processor = LogitsProcessorList(logits_processor or [])
        if diversity:
            rerank, n = False, _setting(generate_kwargs, self.generation_config, "num_return_sequences", 1)
            generate_kwargs["num_return_sequences"] = 1
            input_ids, attention_mask = input_ids.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
            hidden_input = encoding.hidden_input.repeat_interleave(n, 0)
            causes = bernoulli(torch.sigmoid(hidden_input))
            logits_processor.append(self._guidance(hidden_input, beta, causes=causes, diversity=diversity))
        elif beta:
            logits_processor.append(self._guidance(encoding.hidden_input, beta))
        generate_kwargs.update(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=logits_processor,
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or []), ContextLimit(limit)]),
        )
        if generate_kwargs.get("use_cache") is False or generate_kwargs.get("past_key_values") is not None:
            generate_kwargs["image_embeds"] = encoding.image_embeds
        else:
            generate_kwargs["past_key_values"] = ImageCache(self.text_decoder, encoding.image_embeds)
        if rerank:
            return self._generate_reranked(encoding, **generate_kwargs)
        return GenerationMixin.generate(self, **generate_kwargs)

    def _left_padded_prompts(self, input_ids, attention_mask):
        """Per row: pads and a final [SEP] dropped, first token [DEC]; then padded on the left. New tensors."""
        if isinstance(input_ids, list):
            input_ids = torch.tensor(input_ids, device=self.device)
        if attention_mask is None:
            attention_mask = (input_ids != self.decoder_pad_token_id).long()
        sep, limit = self.config.text_config.sep_token_id, self.config.text_config.max_position_embeddings
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            ids = ids[mask.bool()]
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == sep else ids
            if len(ids) >= limit:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens, but the decoder's context has {limit}, of which at least one "
                    "must be left for the caption: shorten the prompt"
                )
            rows.append(torch.cat([ids.new_tensor([self.decoder_input_ids]), ids[1:]]))
        longest = max(len(row) for row in rows)
        ids = torch.stack([F.pad(row, (longest - len(row), 0), value=self.decoder_pad_token_id) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return ids, mask

    def _guidance(self, hidden_input, beta: float, **causes) -> RBMGuidance:
        config, rbm = self.config, self.rbm_layer.rbm
        p, order, product = rbm.parameters_fp32, config.rbm_guidance_order, None
        if order != "exact" and self.pack_linears:
            product = product_with(rbm, p.U, WEIGHTS_OF_GAINS[order])
        vocab_size, clip = config.text_config.vocab_size, config.rbm_guidance_clip
        if config.rbm_guidance_rarity:
            words = torch.tensor(config.rbm_word_ids, device=hidden_input.device)
            beta = beta * (1 + config.rbm_guidance_rarity * self.rbm_layer.phrases.token_rarity(words))
        return RBMGuidance(
            p, hidden_input, config.rbm_word_ids, vocab_size, beta, clip, order, product=product, **causes
        )

    @torch.no_grad()
    def score_captions(self, encoding: ImageEncoding, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log P(caption | image) by the decoder alone, in nats.

        Args:
            sequences (B * n, T): as `generate` returns them, an image's n captions adjacent. Pads on the left, and
                whatever follows the first [SEP] (transformers 5 fills beams up with it), do not count.

        Returns:
            log-probability (B * n,) and number of tokens scored (B * n,), [SEP] included.
        """
        is_sep = (sequences == self.config.text_config.sep_token_id).long()
        before_end = is_sep.cumsum(1) - is_sep == 0
        mask = (before_end & (sequences != self.decoder_pad_token_id)).long()
        cache = ImageCache(self.text_decoder, encoding.image_embeds)
        logits = self(
            input_ids=sequences,
            attention_mask=mask,
            image_embeds=cache.image_embeds,
            past_key_values=cache,
            use_cache=True,
        ).logits
        log_prob = logits[:, :-1].float().log_softmax(-1).gather(-1, sequences[:, 1:, None])[..., 0]
        counted = mask[:, 1:] * mask[:, :-1]
        return (log_prob * counted).sum(-1), counted.sum(-1)

    def _score_generated(self, outputs, prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `score_captions`, of the tokens after the prompt, from the logits (steps of (R, vocabulary)) that `generate` has computed
        anyway: decoding them once more took as long as decoding them. There may be more steps than the longest candidate has tokens.

        transformers' `compute_transition_scores` gives the same, but copies all logits several times: 16 images with 10 beams took three times
        as long and 280 MB more."""
        tokens = outputs.sequences[:, prompt_length:]
        is_sep = (tokens == self.config.text_config.sep_token_id).long()
        counted = (is_sep.cumsum(1) - is_sep == 0) & (tokens != self.decoder_pad_token_id)
        # in which row of the step's logits a token was chosen, -1 after the end
        rows = getattr(outputs, "beam_indices", None)
        if rows is None:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        rows = rows[:, : tokens.shape[1]].clamp(min=0)
        log_prob = []
        for logits, row, token in zip(outputs.logits, rows.T, tokens.T):
            used, place = row.unique(return_inverse=True)  # candidates share what they begin with
            log_prob.append(logits[used].log_softmax(-1)[place, token])
        log_prob = torch.stack(log_prob, 1)
        return (log_prob * counted).sum(-1), counted.sum(-1)

    def _generate_reranked(self, encoding: ImageEncoding, **kwargs):
        config = self.config
        defaults = self.generation_config
        wanted = _setting(kwargs, defaults, "num_return_sequences", 1)
        num_beams = _setting(kwargs, defaults, "num_beams", 1)
        n = max(config.rbm_rerank_candidates, wanted)
        kwargs["num_return_sequences"] = n
        if not _setting(kwargs, defaults, "do_sample", False) or num_beams > 1:
            kwargs["num_beams"] = max(num_beams, n)
        as_dict = _setting(kwargs, defaults, "return_dict_in_generate", False)
        with_logits = _setting(kwargs, defaults, "output_logits", False)
        outputs = GenerationMixin.generate(self, **kwargs | {"return_dict_in_generate": True, "output_logits": True})
        sequences = outputs.sequences
        scored = self._score_generated(outputs, prompt_length=kwargs["input_ids"].shape[1])
        scores = self.candidate_scores(encoding, sequences, scored)  # (B, n)
        best, order = scores.topk(wanted, dim=1)
        rows = (order + n * torch.arange(len(order), device=order.device)[:, None]).flatten()
        if not as_dict:
            return sequences[rows]
        if not with_logits:
            outputs.logits = None
        outputs.sequences = sequences[rows]
        for name in ("sequences_scores", "beam_indices"):
            if getattr(outputs, name, None) is not None:
                outputs[name] = getattr(outputs, name)[rows]
        outputs["rerank_scores"] = best.flatten()
        return outputs

    @torch.no_grad()
    def caption_evidence(self, encoding: ImageEncoding, sequences: torch.Tensor) -> torch.Tensor:
        """(B * n, 2) for the captions (B * n, T) of B images: log P per token by the decoder, PMI by the RBM (nats; 0 without
        words)."""
        log_prob, length = self.score_captions(encoding, sequences)
        pmi = torch.zeros_like(log_prob)
        if self.config.rbm_word_ids:
            words = self._words_said(sequences).view(len(encoding.image_embeds), -1, len(self.config.rbm_word_ids))
            p = self.rbm_layer.rbm.parameters_fp32
            pmi = pointwise_mutual_information(p, encoding.hidden_input[:, None], words).flatten()
        return torch.stack([log_prob / length.clamp(min=1), pmi], -1)

    def confidence(self, evidence: torch.Tensor) -> torch.Tensor:
        """Chance (...) that a caption is right, from its `caption_evidence` (..., 2).

        Raises:
            ValueError: if the model was never calibrated.
        """
        if self.config.rbm_confidence is None:
            raise ValueError("config.rbm_confidence is None: calibrate the model with training/evaluate_confidence.py")
        bias, *weights = self.config.rbm_confidence
        return torch.sigmoid(bias + evidence @ torch.tensor(weights, dtype=evidence.dtype, device=evidence.device))

    def _words_said(self, sequences: torch.Tensor) -> torch.Tensor:  # (R, T) -> (R, K)
        word_ids = self.config.rbm_word_ids
        columns = word_columns(word_ids, self.config.text_config.vocab_size, sequences.device)
        return words_said(sequences, columns, len(word_ids))

    @torch.no_grad()
    def candidate_parts(
        self, encoding: ImageEncoding, sequences: torch.Tensor, similarities=None, scored=None
    ) -> dict[str, torch.Tensor]:
        """What re-rank weighs of the candidates (B * n, T) of B images: (B, n) each.

        Args:
            scored: what `score_captions` gives of them, if it is known.
            similarities: kinds of `decoding_blip_rbm.caption_similarity`; default the config's.

        Returns:
            `log_prob` by the decoder (nats), `length` (tokens), `pmi` by the RBM (nats), if it has phrases `cider` that it expects and
            the words' `rarity` (nats), and of every similarity, under its name, the consensus.
        """
        config, p = self.config, self.rbm_layer.rbm.parameters_fp32
        text = config.text_config
        n = len(sequences) // len(encoding.image_embeds)
        log_prob, length = scored or self.score_captions(encoding, sequences)
        words = self._words_said(sequences).view(-1, n, len(config.rbm_word_ids))
        pmi = pointwise_mutual_information(p, encoding.hidden_input[:, None], words)
        parts = {"log_prob": log_prob.view(-1, n), "length": length.view(-1, n), "pmi": pmi}
        q = torch.sigmoid(encoding.hidden_input[:, None] + words @ p.U)
        special = (text.pad_token_id, text.sep_token_id, text.bos_token_id)
        sequences = sequences.view(len(words), n, -1)
        if config.rbm_num_phrases:
            causes = torch.sigmoid(encoding.hidden_input)
            parts["cider"] = self.rbm_layer.phrases.expected_cider(causes, sequences, special)
            parts["rarity"] = self.rbm_layer.phrases.rarity(sequences, special)
        for kind in (config.rbm_rerank_similarity,) if similarities is None else similarities:
            parts[kind] = consensus(caption_similarity(sequences, kind, special, q))
        return parts

    def candidate_scores(self, encoding: ImageEncoding, sequences: torch.Tensor, scored=None) -> torch.Tensor:
        """(B, n) by which re-rank chooses among the candidates (B * n, T) of B images; `scored` as of `candidate_parts`."""
        config = self.config
        similarities = (config.rbm_rerank_similarity,) if config.rbm_rerank_consensus else ()
        return rerank_scores(self.candidate_parts(encoding, sequences, similarities, scored), vars(config))


def _setting(kwargs: dict, generation_config, name: str, default):
    """A setting of `generate` as transformers will see it: an argument, else of the generation config."""
    value = kwargs.get(name)
    if value is None:
        value = getattr(kwargs.get("generation_config") or generation_config, name, None)
    return default if value is None else value


def blip_generation_config(config) -> GenerationConfig:
    """What stock BLIP hard-codes in `generate`, as a generation config that a caller can override."""
    text = config.text_config
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id
    )


BlipRBMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["BlipRBMForConditionalGeneration", "BlipRBMOutput", "ImageEncoding"]
