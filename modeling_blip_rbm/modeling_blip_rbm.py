"""BLIP-RBM: what differs from transformers' BLIP, and nothing else.

    pixel_values -> vision tower -> [projector] -> RBM layer -> text decoder -> caption
                                                   |- refine: the hidden causes shift image_embeds, and become tokens beside them
                                                   |- guide: word gains on the logits     } generation_blip_rbm.py
                                                   '- re-rank: candidates by free energy  }

The tower, the projector and the RBM layer are in vision_blip_rbm.py, the mathematics in rbm.py and phrases_blip_rbm.py. `generate` runs a
faster copy of all this where it may (inference_blip_rbm.py), with the same results up to rounding.

Axes: B images, N image tokens, C width of the vision tower's output, D width that the decoder attends to, T text tokens, V = 2C or C
pooled image units, H hidden causes, K words of the RBM, M texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import BlipForConditionalGeneration, GenerationConfig
from transformers.models.blip.modeling_blip import BlipPreTrainedModel
from transformers.models.blip.modeling_blip_text import (
    BlipTextLMHeadModel,
    BlipTextLMPredictionHead,
    BlipTextSelfAttention,
)
from transformers.utils import ModelOutput, can_return_tuple, logging

from .configuration_blip_rbm import PHRASE_WEIGHTS, BlipRBMConfig, check_loaded, copy_code
from .generation_blip_rbm import (
    BlipRBMGenerationMixin,
    ImageEncoding,
    word_columns,
    words_said,
)
from .inference_blip_rbm import ImageCache, is_capturing_hook
from .phrases_blip_rbm import PhraseBlock
from .rbm import JointRBM, RBMParameters, pairwise_mutual_information, relative_free_energy, word_gains
from .vision_blip_rbm import (
    ClassTokens,
    ImageEnergies,
    RBMLayer,
    VisionProjector,
    WordMaps,
    check_pixels,
    new_vision_tower,
    unused_by_tokens,
    vision_tokens,
    weights_here,
)


try:  # transformers 5: initialises only what a checkpoint did not give
    from transformers import initialization as init
except ImportError:
    from torch.nn import init

logger = logging.get_logger(__name__)


class BlipRBMPreTrainedModel(ImageEnergies, WordMaps, BlipPreTrainedModel):
    """What the captioner and the retrieval head share: weights' initialisation, loading checks, the image's way to the RBM."""

    config_class = BlipRBMConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    # of fp16, of bf16 too: energies are differences of large sums
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ["rbm_layer"]
    _no_split_modules = "BlipVisionEmbeddings BlipEncoderLayer BlipTextEmbeddings BlipTextLayer RBMLayer VisionProjector ClassTokens".split()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, JointRBM):
            module.reset_parameters(init)
        elif isinstance(module, RBMLayer):
            init.zeros_(module.gate)
        elif isinstance(module, VisionProjector):
            init.normal_(module.position, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, ClassTokens):
            init.zeros_(module.sureness)
            init.eye_(module.linear.weight)
        else:
            super()._init_weights(module)
            if isinstance(module, BlipTextLMPredictionHead):  # which transformers leaves as the memory was
                init.zeros_(module.bias)

    def train(self, mode: bool = True):
        """As PyTorch's, but the vision tower's batch normalisation keeps the statistics that it was trained with: the batches of a
        captioner are too small for others, and a frozen tower would change. To train them on purpose, call `model.vision_model.train()`
        afterwards."""
        super().train(mode)
        for module in self.vision_model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As transformers' own.

        Raises:
            ValueError: if the checkpoint lacks weights of BLIP's, or only some of the RBM's (unless `output_loading_info=True` hands the
                caller what is missing), or has weights of other shapes or that are not finite. Without any RBM it says so: the RBM is then
                the identity.
        """
        source = pretrained_model_name_or_path
        any_size = kwargs.setdefault("ignore_mismatched_sizes", False)
        kwargs |= {
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }  # they are named below, not in a table of the log
        try:
            if (Path(source or "") / "generation_config.json").exists():  # transformers passes over a damaged one
                GenerationConfig.from_pretrained(source)
            model, info = super().from_pretrained(source, *args, **kwargs)
        except (SafetensorError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{source} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}). A file is damaged, or of another kind of "
                "model: get the checkpoint again"
            ) from error
        other_shapes = [] if any_size else [str(k[0] if isinstance(k, tuple) else k) for k in info["mismatched_keys"]]
        missing = [] if output_loading_info else sorted(set(info["missing_keys"]) - set(other_shapes))
        check_loaded(model, missing, other_shapes, source)
        model._made()
        return (model, info) if output_loading_info else model

    def _made(self):
        """Called when the model has been built, and again when its weights have been loaded, which replaces parameters."""

    def save_pretrained(self, save_directory, *args, is_main_process: bool = True, **kwargs):
        """As transformers' own, with the package's code beside the weights, so that `trust_remote_code` finds it."""
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            copy_code(save_directory, self.name_or_path, getattr(self.config, "_commit_hash", None))
        return super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)

    def __getstate__(self):
        """For pickle and deepcopy, without the hooks by which transformers records attentions: they cannot be pickled, and it installs them
        again when they are asked for."""
        for module in self.modules():
            for key in [key for key, hook in module._forward_hooks.items() if is_capturing_hook(hook)]:
                del module._forward_hooks[key]
            module.__dict__.pop("_output_capturing_hooks_installed", None)
        return self.__dict__.copy()

    # ------------------------------------------------------------------ the image, once

    def vision_hidden_states(self, pixel_values=None, vision_hidden_states=None, **kwargs) -> torch.Tensor:
        """(B, N, C): the vision tower's output for images (B, 3, S, S), or what was computed before (`training/lib/features.py`).

        Raises:
            ValueError: if both or neither are given, or a pixel is not a finite number.
        """
        if (pixel_values is None) == (vision_hidden_states is None):
            raise ValueError("give either pixel_values or vision_hidden_states (the tower's cached output)")
        if vision_hidden_states is not None:
            return vision_hidden_states.to(self.dtype)
        check_pixels(pixel_values, self.config, "interpolate_pos_encoding" in kwargs)
        return vision_tokens(self.vision_model(pixel_values.to(self.dtype), **kwargs))

    def rbm_parameters(self) -> RBMParameters:
        """The RBM's parameters in fp32, for the functions of rbm.py."""
        rbm = self.rbm_layer.rbm
        with weights_here(rbm) as moved:
            parameters = rbm.parameters_fp32
            return RBMParameters(*(None if p is None else p.clone() for p in parameters)) if moved else parameters


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


RECORDED = ("past_key_values", "hidden_states", "attentions", "cross_attentions")  # of the text decoder's output


class ImageCrossAttention(BlipTextSelfAttention):
    """BLIP's cross-attention, which reads the image tokens' mask: it arrives under the name that BLIP's does not read."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return super().forward(hidden_states, encoder_attention_mask=attention_mask, **kwargs)


def caption_loss(logits, labels, label_smoothing: float = 0.0):
    """Mean next-token cross entropy (nats) over the labels that are not -100. logits (B, T, vocabulary), labels (B, T)."""
    logits, labels = logits[:, :-1], labels[:, 1:].to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing)


class BlipRBMForConditionalGeneration(BlipRBMGenerationMixin, BlipRBMPreTrainedModel, BlipForConditionalGeneration):
    """BLIP with an RBM between its vision encoder and its text decoder.

    Differs from [`BlipForConditionalGeneration`] in: any vision tower; `RBMLayer`; the image is encoded once and the *top-level* forward
    decodes, so generation_config, eos and pad arguments and export work; a loss that masks pads and is right under gradient accumulation;
    prompts of different lengths in one batch.

    ```python
    model = AutoModelForImageTextToText.from_pretrained("org/blip-rbm", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("org/blip-rbm", trust_remote_code=True)
    processor.captions(model.generate(**processor(images=photos)))
    ```
    """

    accepts_loss_kwargs = False  # the loss is a mean over this batch: Trainer must divide by the accumulation steps

    def __init__(self, config):
        # BlipForConditionalGeneration.__init__ would build BLIP's tower whatever the config says
        super(BlipForConditionalGeneration, self).__init__(config)
        config.text_config._attn_implementation = "eager"  # all that BLIP's own decoder knows
        self.vision_model = new_vision_tower(config)
        if config.has_blip_tower:
            self.projector = None
        else:
            self.projector = VisionProjector(
                config.num_image_tokens, config.vision_hidden_size, config.text_config.encoder_hidden_size
            )
        self.class_tokens = ClassTokens(config) if config.class_word_ids else None
        self.text_decoder = BlipTextLMHeadModel(config.text_config)
        for i, layer in enumerate(self.text_decoder.bert.encoder.layer):
            layer.crossattention.self = ImageCrossAttention(config.text_config, True, layer_idx=i)
        config.set_visible_size()
        self.rbm_layer = RBMLayer(config)

        self.decoder_input_ids = config.text_config.bos_token_id
        self.decoder_pad_token_id = config.text_config.pad_token_id
        self.post_init()
        text = config.text_config  # what stock BLIP writes into the code of `generate`
        self.generation_config = GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.sep_token_id, pad_token_id=text.pad_token_id
        )
        self._moved_settings = config.__dict__.pop("decoding_settings", {})
        self._made()

    def _made(self):
        # the loss of captions does not reach the RBM's words, and phrases are fitted to its causes: training/train_rbm.py trains it
        self.rbm_layer.rbm.requires_grad_(False)
        if self.class_tokens is not None:  # it has learned from a million images
            self.class_tokens.head.requires_grad_(False)
        for name, parameter in self.vision_model.named_parameters():
            if unused_by_tokens(name, self.config.vision_config):
                parameter.requires_grad_(False)
        # settings of a config from before; a generation config that was loaded goes first
        for name, value in self._moved_settings.items():
            if getattr(self.generation_config, name, None) is None:
                setattr(self.generation_config, name, value)

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
        extra = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        tokens = self.vision_hidden_states(pixel_values, vision_hidden_states, **extra)
        image_embeds = tokens if self.projector is None else self.projector(tokens)
        if self.class_tokens is not None:
            words = self.text_decoder.get_input_embeddings().weight
            image_embeds = torch.cat([image_embeds, self.class_tokens(tokens, words)], 1)
        return ImageEncoding(*self.rbm_layer(tokens, image_embeds, refine=rbm))

    def __setattr__(self, name, value):
        if name == "pack_linears":  # of 0.1.0
            logger.warning_once(
                "pack_linears is gone: model.optimize_for_inference(int8=...), model.auto_optimize = False"
            )
            name, value = "auto_optimize", bool(value)
        super().__setattr__(name, value)

    def set_phrases(self, phrases: Optional[PhraseBlock]):
        """Give the RBM these phrases, or, as when it learns on and its causes change, none."""
        self.rbm_layer.phrases = phrases
        self.config.rbm_num_phrases = 0 if phrases is None else len(phrases.numbers)
        if phrases is None:
            for name in PHRASE_WEIGHTS:
                setattr(self.generation_config, name, 0.0)

    def resize_token_embeddings(self, new_num_tokens: Optional[int] = None, *args, **kwargs):
        """As transformers' own. The RBM's words and phrases keep their tokens.

        Raises:
            ValueError: if the RBM has a word or phrase whose token the vocabulary would not have.
        """
        size = new_num_tokens or self.config.text_config.vocab_size
        if self.config.rbm_word_ids and self.config.rbm_word_ids[-1] >= size:
            raise ValueError(
                f"the RBM has the token {self.config.rbm_word_ids[-1]}, but the vocabulary would have {size} tokens"
            )
        phrases = self.rbm_layer.phrases
        if phrases is not None:
            phrases.set_vocab_size(size)  # raises before anything is changed
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if phrases is not None:
            phrases.set_vocab_size(self.config.text_config.vocab_size)  # larger with pad_to_multiple_of
        return embeddings

    @torch.no_grad()
    def image_words(self, hidden_input: torch.Tensor, top_k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        """The RBM's most probable words for images of which nothing has been said.

        Returns:
            P(w_k = 1 | x, no other word) of the top_k words, descending, and their token ids: both (B, top_k).
        """
        p = self.rbm_parameters()
        if p.U is None:
            raise ValueError("this RBM has no words: its config's rbm_word_ids is empty")
        prob = torch.sigmoid(p.b + word_gains(p, hidden_input))
        values, columns = prob.topk(min(top_k, prob.shape[-1]), dim=-1)
        return values, torch.tensor(self.config.rbm_word_ids, device=columns.device)[columns]

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
        return_dict: Optional[bool] = None,  # for can_return_tuple; exporters look at the signature
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
        image_embeds = self._image_of(
            pixel_values, vision_hidden_states, image_embeds, past_key_values, interpolate_pos_encoding
        )
        input_ids, labels = self._tokens_of(input_ids, labels, attention_mask, image_embeds)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if isinstance(
            past_key_values, ImageCache
        ):  # one step of `generate`, which made this cache: inference_blip_rbm.py
            logits = past_key_values.logits(input_ids, attention_mask, position_ids, encoder_attention_mask, keep)
            return BlipRBMOutput(logits=logits, past_key_values=past_key_values, image_embeds=image_embeds)
        outputs = self.text_decoder.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            encoder_hidden_states=image_embeds,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache if labels is None else False,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states,
            is_decoder=True,
            return_dict=True,
        )
        logits = self.text_decoder.cls(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else caption_loss(logits, labels, self.config.text_config.label_smoothing)
        recorded = {name: outputs[name] for name in RECORDED if name in outputs}
        return BlipRBMOutput(loss=loss, logits=logits, image_embeds=image_embeds, **recorded)

    def _image_of(self, pixel_values, vision_hidden_states, image_embeds, past_key_values, interpolate_pos_encoding):
        """(B, N, D) what the decoder attends to, from whichever the image is given as."""
        if isinstance(past_key_values, ImageCache):
            return past_key_values.image_embeds
        if image_embeds is not None:
            return image_embeds
        if pixel_values is not None or vision_hidden_states is not None:
            return self.encode_image(pixel_values, vision_hidden_states, interpolate_pos_encoding).image_embeds
        return self._image_of_cache(past_key_values)

    def _tokens_of(self, input_ids, labels, attention_mask, image_embeds):
        """input_ids (B, T), and labels (B, T) in which what does not count is -100; each may stand for the other."""
        if labels is not None:
            labels = self._masked_labels(labels, attention_mask)
            return self._input_ids_from_labels(labels) if input_ids is None else input_ids, labels
        if input_ids is None:
            input_ids = torch.full((image_embeds.shape[0], 1), self.decoder_input_ids, device=image_embeds.device)
        return input_ids, None

    def _image_of_cache(self, past_key_values) -> torch.Tensor:
        """Stands for image_embeds where the cache holds the image's keys and values already: a token that nobody reads."""
        updated = getattr(past_key_values, "is_updated", {})
        if not updated or not all(updated.values()):
            raise ValueError(
                "give an image: pixel_values, vision_hidden_states (the tower's cached output) or image_embeds"
            )
        keys = past_key_values.cross_attention_cache.layers[0].keys
        return keys.new_zeros(len(keys), 1, self.config.text_config.encoder_hidden_size)

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

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        image_embeds=None,
        encoder_attention_mask=None,
        use_cache=True,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ):
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, past_length:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "image_embeds": image_embeds,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }

    def get_output_embeddings(self):
        return self.text_decoder.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.text_decoder.set_output_embeddings(value)


@dataclass
class BlipRBMRetrievalOutput(ModelOutput):
    """How well each image and each text go together."""

    logits_per_image: Optional[torch.FloatTensor] = None  # (B, M) PMI of image and words, nats
    logits_per_text: Optional[torch.FloatTensor] = None  # (M, B) the same
    match_probability: Optional[torch.FloatTensor] = None  # (B, M) chance that the text was written for the image
    image_free_energy: Optional[torch.FloatTensor] = None  # (B,) F(x), nats
    image_relative_free_energy: Optional[torch.FloatTensor] = (
        None  # (B,) F(x) - F_0(x): high where there are few causes
    )


class BlipRBMForImageTextRetrieval(BlipRBMPreTrainedModel):
    """Image-text retrieval and matching by the RBM of a BLIP-RBM.

    The similarity (BLIP's ITC) is the pointwise mutual information of image and words under the RBM: a difference of free energies, of
    the image and the text's words. The matching head (BLIP's ITM) is a logistic function of it, fitted against hard negatives, the texts
    of other images that the energy likes best (`training/capfilt.py`): `config.rbm_match`.

    ```python
    model = AutoModelForZeroShotImageClassification.from_pretrained("org/blip-rbm", trust_remote_code=True)
    inputs = processor(images=photos) | processor(text=["a dog on the beach", "two men on bikes"])
    model(**inputs).logits_per_image
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^text_decoder\.", r"^projector\."]  # the captioner's

    def __init__(self, config):
        super().__init__(config)
        if not config.rbm_word_ids:
            raise ValueError(
                "texts are compared by the RBM's words, but config.rbm_word_ids is empty: train it with words"
            )
        self.vision_model = new_vision_tower(config)
        config.set_visible_size()
        self.rbm_layer = RBMLayer(config)
        self.post_init()

    def get_image_features(self, pixel_values=None, vision_hidden_states=None) -> torch.Tensor:
        """a (B, H): the hidden input from images (B, 3, S, S), or from the tower's output (B, N, C)."""
        return self.rbm_layer.hidden_input(self.vision_hidden_states(pixel_values, vision_hidden_states))

    def get_text_features(self, input_ids, attention_mask=None) -> torch.Tensor:
        """w (M, K) in {0, 1}: which of the RBM's words stand in the texts (M, T)."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.text_config.pad_token_id)
        word_ids = self.config.rbm_word_ids
        columns = word_columns(word_ids, self.config.text_config.vocab_size, input_ids.device)
        return words_said(input_ids, columns, len(word_ids))

    def match_probability(self, pmi: torch.Tensor) -> torch.Tensor:
        """Chance that a text was written for an image and not for another one like it, of their PMI.

        Raises:
            ValueError: if the head was never fitted.
        """
        if self.config.rbm_match is None:
            raise ValueError("config.rbm_match is None: fit the matching head with training/capfilt.py")
        bias, weight = self.config.rbm_match
        return torch.sigmoid(bias + weight * pmi)

    def forward(
        self,
        pixel_values=None,
        input_ids=None,
        attention_mask=None,
        vision_hidden_states=None,
        token_type_ids=None,
        return_dict=None,
    ) -> BlipRBMRetrievalOutput:
        """
        Args:
            pixel_values (B, 3, S, S) or vision_hidden_states (B, N, C). input_ids, attention_mask (M, T): of texts, as the processor
                makes them. token_type_ids: of tokenizers that give them; not read.
        """
        tokens = self.vision_hidden_states(pixel_values, vision_hidden_states)
        p, hidden_input = self.rbm_parameters(), self.rbm_layer.hidden_input(tokens)
        pmi = pairwise_mutual_information(p, hidden_input, self.get_text_features(input_ids, attention_mask))
        output = BlipRBMRetrievalOutput(
            logits_per_image=pmi,
            logits_per_text=pmi.T,
            match_probability=None if self.config.rbm_match is None else self.match_probability(pmi),
            image_free_energy=self._free_energy(tokens),
            image_relative_free_energy=relative_free_energy(p, hidden_input),
        )
        return output.to_tuple() if return_dict is False else output


__all__ = [
    "BlipRBMForConditionalGeneration",
    "BlipRBMForImageTextRetrieval",
    "BlipRBMOutput",
    "BlipRBMPreTrainedModel",
    "BlipRBMRetrievalOutput",
]
