"""From pixels to what the text decoder attends to: any vision tower, the pooled image, the projector, and the RBM layer.

    pixel_values (B, 3, S, S) -> vision tower -> tokens (B, N, C) -> [projector] -> image_embeds (B, N, D)
                                                    |- pooled image x (B, V) -> hidden input a (B, H) of the RBM
                                                                                    '- refine: changes image_embeds

A new vision tower is plugged in by its config alone (`new_vision_tower`): any that `AutoModel` knows.

Axes: B images, N image tokens, C width of the vision tower's output, D width that the decoder attends to, V = 2C or C pooled image
units, H hidden causes, m cause tokens.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModel
from transformers.models.blip.modeling_blip import BlipAttention, BlipVisionModel

from .phrases_blip_rbm import PhraseBlock
from .rbm import JointRBM, relative_free_energy, token_input, token_word_map


try:
    from accelerate.utils import align_module_device
except ImportError:  # then no module has its weights elsewhere
    align_module_device = None


def vision_tokens(outputs) -> torch.Tensor:
    """(B, N, C) of a vision tower's output: a token sequence as it is, a feature map (B, C, H, W) row by row."""
    states = outputs.last_hidden_state
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states


def check_pixels(pixel_values: torch.Tensor, config, any_size: bool = True):
    """Raises ValueError if these are no images for the tower of a config: of the wrong shape or, on a CPU, not all finite numbers. A GPU
    would have to be waited for."""
    channels = getattr(config.vision_config, "num_channels", 3)
    shape = getattr(pixel_values, "shape", None)
    if not isinstance(pixel_values, torch.Tensor) or len(shape) != 4 or shape[1] != channels or not shape[0]:
        given = f"a {type(pixel_values).__name__}" if shape is None else f"of shape {tuple(shape)}"
        raise ValueError(
            f"pixel_values is {given}; allowed: a tensor (images, {channels}, height, width), as the processor makes it"
        )
    size = getattr(config.vision_config, "image_size", None)
    if config.has_blip_tower and not any_size and tuple(shape[2:]) != (size, size):
        raise ValueError(
            f"images have {shape[2]} x {shape[3]} pixels, but this model's tower takes {size} x {size}: resize them as the processor does, or "
            "pass interpolate_pos_encoding=True"
        )
    if (
        pixel_values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.isfinite(pixel_values.sum())
    ):
        raise ValueError("pixel_values has NaN or infinite values: look at the images and at how they were processed")


def pool_tokens(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """The pooled image of tokens (B, N, C).

    Args:
        pooling: "cls_mean" gives (B, 2C), [CLS ; mean of the others] (SAIL, arXiv 2412.04616); "mean" gives (B, C); "mean_max" gives
            (B, 2C), [mean ; greatest of each channel], which keeps what is small in the image; "tokens" leaves them as they are.
    """
    if pooling == "tokens":
        return tokens
    if pooling == "mean":
        return tokens.mean(1)
    if pooling == "mean_max":
        return torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1)
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1)


class VisionProjector(nn.Module):
    """From the tokens of a tower that is not BLIP's to what BLIP's decoder attends to, as in Llava: LayerNorm, linear, positions."""

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


class ClassTokens(nn.Module):
    """What the vision tower's own classification head sees, in words that the decoder can read.

    A tower trained on ImageNet names a thousand kinds of things, more than the captions of a small dataset speak of. The probabilities of the
    classes of one everyday word ("tabby", "Egyptian cat": cat) are added; each of the k likeliest words becomes a token: a linear
    map, at first the identity, of its embedding in the decoder, which is also its output weight, so that to read it is almost to say it; and
    a direction times log P, which says how sure the head is. Concepts as tokens: Fang et al., CVPR 2015 (arXiv 1411.4952), detect words for a captioner in the same way.
    """

    def __init__(self, config):
        super().__init__()
        text = config.text_config
        self.k = config.num_class_tokens
        self.head = nn.Linear(config.vision_hidden_size, len(config.class_word_ids))
        self.norm = nn.LayerNorm(text.hidden_size)
        self.linear = nn.Linear(text.hidden_size, text.encoder_hidden_size, bias=False)
        self.sureness = nn.Parameter(torch.zeros(text.encoder_hidden_size))
        word_ids = sorted(set(config.class_word_ids))  # the first is -1 if there is a class without a word
        self.register_buffer("word_ids", torch.tensor(word_ids))  # (W,)
        self.register_buffer("word_of_class", torch.tensor([word_ids.index(i) for i in config.class_word_ids]))

    def word_probabilities(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, W) of the words `word_ids`, of a tower's tokens (B, N, C)."""
        classes = self.head(tokens.mean(1)).float().softmax(-1)
        words = classes.new_zeros(len(tokens), len(self.word_ids)).index_add(1, self.word_of_class, classes)
        return words.masked_fill(self.word_ids < 0, 0.0)

    def forward(self, tokens: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, k, D) of tokens (B, N, C) and the decoder's word embeddings (vocabulary, D)."""
        return self.of_words(self.word_probabilities(tokens).clamp(min=1e-4).log(), embeddings)

    def of_words(self, log_probabilities: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """The same (B, k, D) of words' log-probabilities (B, W), in nats."""
        sure, which = log_probabilities.topk(self.k)
        words = self.linear(self.norm(embeddings[self.word_ids[which].clamp(min=0)]))
        return words + sure[..., None].to(words.dtype) * self.sureness


class RBMLayer(nn.Module):
    """The RBM between vision tower and decoder, and the one way in which it changes image_embeds: `refine`."""

    def __init__(self, config):
        super().__init__()
        self.pooling = config.rbm_pooling
        self.rbm = JointRBM(
            config.rbm_visible_size,
            len(config.rbm_word_ids),
            config.rbm_hidden_size,
            config.rbm_visible_type,
            tokens=self.pooling == "tokens",
        )
        width, self.cause_tokens = config.text_config.encoder_hidden_size, config.rbm_cause_tokens
        self.shift = nn.Linear(config.rbm_hidden_size, width, bias=False)
        if self.cause_tokens:
            self.causes = nn.Linear(config.rbm_hidden_size, self.cause_tokens * width, bias=False)
        self.phrases = None
        if config.rbm_num_phrases:
            self.phrases = PhraseBlock(config.rbm_num_phrases, config.rbm_hidden_size, config.text_config.vocab_size)
        self.gate_seen = None
        self.gate = nn.Parameter(torch.zeros(1))  # 0: refine is the identity, and so a converted BLIP is BLIP

    def forward(self, tokens: torch.Tensor, image_embeds: torch.Tensor, refine: bool = True):
        """What the decoder attends to, (B, N, D) or (B, N + m, D), and the hidden input a (B, H) of tokens (B, N, C)."""
        if not refine or not self.changes_images():
            return image_embeds, self.hidden_input(tokens)
        if self.pooling != "tokens":
            hidden_input = self.hidden_input(tokens)
            return self.refine(image_embeds, hidden_input), hidden_input
        hidden_input, places = self.rbm(tokens, places=True)
        return self.refine(image_embeds, hidden_input, places), hidden_input

    def changes_images(self) -> bool:
        """Whether refine may differ from the identity: the gate is open, is being trained, or cannot be read for nothing."""
        if self.gate.device.type != "cpu" or torch.compiler.is_compiling():
            return True
        return (self.gate.requires_grad and torch.is_grad_enabled()) or bool(self.gate != 0)

    def hidden_input(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, N, C) -> a (B, H)
        return self.rbm(pool_tokens(tokens, self.pooling))

    def gate_is_open(self) -> bool:
        """Whether the gate is not 0. On a GPU, which is waited for, it is read again when PyTorch has counted a change of it: one through
        `gate.data` may go unseen there."""
        gate = self.gate
        if not is_waited_for(gate):
            return self.gate != 0
        state = id(gate), gate.data_ptr(), 0 if gate.is_inference() else gate._version
        if self.gate_seen is None or self.gate_seen[0] != state:
            self.gate_seen = state, bool(gate != 0)
        return self.gate_seen[1]

    def refine(self, image_embeds: torch.Tensor, hidden_input: torch.Tensor, places=None) -> torch.Tensor:
        """(B, M, D), or (B, M + m, D) with m cause tokens, of image_embeds (B, M, D) and a (B, H).

        Args:
            places A (B, N, H): of an RBM of tokens. Then each of the first N image_embeds is shifted by the causes at its own place,
                sigmoid(A_n), and not all by those of the whole image.
        """
        dtype = self.shift.weight.dtype
        shift = self.shift(torch.sigmoid(hidden_input[:, None] if places is None else places).to(dtype))
        if places is not None:  # class tokens have no place
            shift = F.pad(shift, (0, 0, 0, image_embeds.shape[1] - shift.shape[1]))
        refined = image_embeds + (self.gate * shift).to(image_embeds.dtype)
        if self.cause_tokens and self.gate_is_open():  # a token of zeros would still draw attention
            q = torch.sigmoid(hidden_input).to(dtype)
            tokens = (self.gate * self.causes(q)).view(len(q), self.cause_tokens, -1)
            refined = torch.cat([refined, tokens.to(refined.dtype)], 1)
        return refined


class ImageEnergies:
    """For a model with `vision_hidden_states`, `rbm_layer`, `rbm_parameters` and `config`: what the RBM thinks of an image alone."""

    @torch.no_grad()
    def image_free_energy(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """F(x) (B,) of the image block alone, in nats. Of an RBM that reads all tokens it is mostly how far these are from their mean."""
        return self._free_energy(self.vision_hidden_states(pixel_values, vision_hidden_states))

    @torch.no_grad()
    def image_relative_free_energy(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """F(x) - F_0(x) (B,) in nats, of images (B, 3, S, S) or the tower's output (B, N, C): minus a log-likelihood ratio, high where the
        RBM finds few causes (`rbm.relative_free_energy`)."""
        tokens = self.vision_hidden_states(pixel_values, vision_hidden_states)
        return relative_free_energy(self.rbm_parameters(), self.rbm_layer.hidden_input(tokens))

    def image_energy(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """(B,) in nats, the higher, the more unlike what the RBM knows: whichever of the two tells more unlike images apart, as measured in
        `docs/results.md`. That is the relative free energy of an RBM that reads all tokens, and F(x) of one that reads the pooled image."""
        of_image = self.image_relative_free_energy if self.rbm_layer.rbm.tokens else self.image_free_energy
        return of_image(pixel_values, vision_hidden_states)

    def _free_energy(self, tokens: torch.Tensor) -> torch.Tensor:
        rbm = self.rbm_layer.rbm
        with weights_here(rbm):
            pooled = pool_tokens(tokens, self.config.rbm_pooling)
            pooled = pooled.to(rbm.hidden_bias.device)  # no hook of Accelerate's sees this
            return rbm.free_energy(rbm.standardise(pooled))


class WordMaps:
    """For a model with `vision_hidden_states`, `rbm_layer` and `config`: where in an image the RBM finds a word."""

    @torch.no_grad()
    def word_map(self, pixel_values=None, words=(), vision_hidden_states=None) -> torch.Tensor:
        """Where in images the causes of words are, for an RBM of tokens: (B, words, N), see `rbm.token_word_map`.

        Positive where a word's causes are, negative where what speaks against it is. The sum over an entry's N tokens is the change of the
        word's log-odds when the input of all causes grows alike. Token n = row * width + column of the tower's feature map, `map.unflatten(-1,
        (height, width))`; of a tower with a class token, that is the first, and the grid is the rest.

        Args:
            pixel_values (B, 3, S, S), or else vision_hidden_states (B, N, C).
            words: their token ids, among `config.rbm_word_ids`.

        Raises:
            ValueError: if the RBM does not read tokens, or does not know a word.
        """
        rbm, config = self.rbm_layer.rbm, self.config
        if not rbm.tokens:
            raise ValueError(
                f"word_map needs an RBM that reads the image's tokens, but rbm_pooling is {config.rbm_pooling!r}: train one with "
                "training/train_rbm.py --pooling tokens"
            )
        if unknown := sorted(set(words) - set(config.rbm_word_ids)):
            raise ValueError(f"the RBM does not know the tokens {unknown}; config.rbm_word_ids has those that it knows")
        tokens = self.vision_hidden_states(pixel_values, vision_hidden_states)
        with weights_here(rbm):
            p = rbm.parameters_fp32
            U = p.U[[config.rbm_word_ids.index(i) for i in words]] if words else p.c.new_zeros(0, len(p.c))
            return token_word_map(p, token_input(p, rbm.standardise(tokens.to(p.c.device))), U)


def is_waited_for(tensor: torch.Tensor) -> bool:
    """Whether reading a tensor's numbers here waits for a device to have done all that was begun on it."""
    return tensor.device.type != "cpu" and not torch.compiler.is_compiling()


class ImageSelfAttention(BlipAttention):
    """The attention of BLIP's vision tower by PyTorch's fused kernel, which never holds all (N, N) weights. As BLIP computes it where
    the weights are asked for, and with `attn_implementation="eager"`.

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
        return self.projection(self.attend(*qkv).reshape(rows, length, width)), None

    def attend(self, query, key, value) -> torch.Tensor:
        """Context (B, N, heads, d) of (B, heads, N, d) each."""
        dropout = self.dropout.p if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=self.scale).transpose(1, 2)


def new_vision_tower(config) -> nn.Module:
    """The tower of a config, without weights; writes the shape of its output into the config if it is not there."""
    if config.has_blip_tower:
        config.vision_config._attn_implementation = "eager"
        tower = BlipVisionModel(config.vision_config)
        for layer in tower.encoder.layers:
            layer.self_attn = ImageSelfAttention(config.vision_config, config)
        return tower
    if config.num_image_tokens is None or config.vision_hidden_size is None:
        config.num_image_tokens, config.vision_hidden_size = tower_output_shape(config.vision_config)
    tower = AutoModel.from_config(config.vision_config)
    for module in tower.modules():
        # Keras counts what is kept, PyTorch what is new: transformers' EfficientNet hands Keras' 0.99 to PyTorch
        if isinstance(module, _BatchNorm) and (module.momentum or 0.0) > 0.5:
            module.momentum = 1 - module.momentum
    return tower


@contextmanager
def weights_here(module: nn.Module):
    """While inside, a module's own weights are where it computes, though Accelerate keeps them elsewhere between calls of `forward`. Gives
    whether they had to be brought."""
    moved = hasattr(module, "_hf_hook")
    with align_module_device(module) if moved else nullcontext():
        yield moved


def unused_by_tokens(name: str, vision_config) -> bool:
    """Whether a parameter of a tower has no part in its tokens, and so no gradient, for which DistributedDataParallel would wait: the
    pooler's, the token of masked-image modelling, CLIP's norm of the pooled output."""
    of_clip = vision_config.model_type == "clip_vision_model" and "post_layernorm." in name
    return of_clip or name.endswith("mask_token") or "pooler." in name


def tower_output_shape(vision_config) -> tuple[int, int]:
    """(N, C) that the tower of this config gives for an image, found by running it without weights or arithmetic."""
    size = getattr(vision_config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config).eval()
        channels = getattr(vision_config, "num_channels", 3)
        return tuple(vision_tokens(tower(pixel_values=torch.zeros(1, channels, height, width))).shape[1:])
