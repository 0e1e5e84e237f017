"""The configuration of BLIP-RBM: BLIP's, with any vision tower, and the RBM's ([`BlipRBMConfig`]); and how captions are decoded, which is
stored in generation_config.json ([`DecodingSettings`])."""

import os
import shutil
import warnings
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path

import torch
from transformers import AutoConfig, BlipConfig, BlipTextConfig, BlipVisionConfig, PretrainedConfig
from transformers.utils import cached_file, logging

from .rbm import WORD_GAIN_ORDERS


logger = logging.get_logger(__name__)

# The code that a model's folder carries, and all of it.
HUB_FILES = (
    "configuration_blip_rbm.py",
    "generation_blip_rbm.py",
    "inference_blip_rbm.py",
    "modeling_blip_rbm.py",
    "phrases_blip_rbm.py",
    "pipeline_blip_rbm.py",
    "processing_blip_rbm.py",
    "rbm.py",
    "vision_blip_rbm.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_blip_rbm.BlipRBMConfig",
    "AutoModel": "modeling_blip_rbm.BlipRBMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_blip_rbm.BlipRBMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_blip_rbm.BlipRBMForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_blip_rbm.BlipRBMForConditionalGeneration",
    "AutoModelForZeroShotImageClassification": "modeling_blip_rbm.BlipRBMForImageTextRetrieval",
    "AutoProcessor": "processing_blip_rbm.BlipRBMProcessor",
}
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_blip_rbm.BlipRBMImageToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}
POOLINGS = {"cls_mean": 2, "mean": 1, "mean_max": 2, "tokens": 1}  # V as a multiple of the tower's width
SIMILARITIES = ("jaccard", "overlap")
PHRASE_WEIGHTS = ("rbm_guidance_rarity", "rbm_rerank_cider", "rbm_rerank_rarity")  # of what the phrase block says
TOWERS_WITH_CLS = ("blip_vision_model", "dinov2", "dinov2_with_registers", "clip_vision_model", "vit", "deit", "beit")


def _tower_config(vision_config) -> PretrainedConfig:
    if vision_config is None:
        return BlipVisionConfig()
    if isinstance(vision_config, PretrainedConfig):
        return vision_config
    settings = dict(vision_config)
    model_type = settings.pop("model_type", BlipVisionConfig.model_type)
    if model_type == BlipVisionConfig.model_type:  # AutoConfig knows only whole BLIPs
        return BlipVisionConfig(**settings)
    return AutoConfig.for_model(model_type, **settings)


class BlipRBMConfig(BlipConfig):
    """Configuration of [`BlipRBMForConditionalGeneration`].

    Args:
        text_config (`dict` or `BlipTextConfig`): BLIP's text decoder. For a vision tower that is not BLIP's, its
            `encoder_hidden_size` is the width D to which the tower's output is projected.
        vision_config (`dict` or `PretrainedConfig`): BLIP's vision encoder by default, or any vision config that
            transformers knows (`{"model_type": "efficientnet", ...}`).
        num_image_tokens (`int`, *optional*): N, tokens that a tower other than BLIP's gives for an image. `None`: the
            model finds out when it is built.
        vision_hidden_size (`int`, *optional*): C, their width; found out likewise.
        rbm_word_ids (`list[int]`, *optional*): token ids of the K words of the word block, ascending and unique. None:
            an RBM of the image alone, which can refine but neither guide nor re-rank.
        rbm_hidden_size (`int`, defaults to 512): H.
        rbm_visible_type (`str`, defaults to "gaussian"): units of the image block, "gaussian" or "binary".
        rbm_pooling (`str`, *optional*): how the tower's tokens (B, N, C) become the image block: "cls_mean" ([CLS ;
            mean of the other tokens], V = 2C), "mean" (V = C) or "mean_max" ([mean ; greatest of each channel], V = 2C);
            or "tokens": the block is all tokens, V = C, and a hidden cause is on at one of them (`rbm.token_input`).
            Default: "cls_mean" for towers with a CLS token, else "mean".
        rbm_visible_size (`int`, *optional*): V. Follows from tower and pooling; given, it must agree.
        rbm_num_phrases (`int`, defaults to 0): P, n-grams of which the hidden causes tell how likely they are said
            (`phrases_blip_rbm.PhraseBlock`, `training/fit_phrases.py`).
        rbm_cause_tokens (`int`, defaults to 0): m, tokens made of the hidden causes that refine appends to the image's.
        rbm_confidence (`list[float]`, *optional*): bias and weights of log P per token and of PMI in the log-odds that a
            caption is right (`training/evaluate_confidence.py`); None: not calibrated.
        rbm_match (`list[float]`, *optional*): bias of the log-odds that a text was written for an image, and weight of their PMI in it
            ([`BlipRBMForImageTextRetrieval`], `training/capfilt.py`); None: not fitted.
        class_word_ids (`list[int]`, *optional*): token id of the everyday word of each class that the vision tower's own classification head
            knows, -1 for a class without one; empty: the decoder is not told of classes. See `ClassTokens`.
        num_class_tokens (`int`, defaults to 5): how many of these words the decoder is told.

    Raises:
        ValueError: for an impossible value, saying which, and what is allowed.
    """

    model_type = "blip_rbm"
    # What Trainer.predict must not hoard: (B, N, D) per image.
    keys_to_ignore_at_inference = ["past_key_values", "image_embeds", "hidden_states", "attentions", "cross_attentions"]

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        num_image_tokens=None,
        vision_hidden_size=None,
        rbm_word_ids=None,
        rbm_hidden_size=512,
        rbm_visible_type="gaussian",
        rbm_pooling=None,
        rbm_visible_size=None,
        rbm_num_phrases=0,
        rbm_cause_tokens=0,
        rbm_confidence=None,
        rbm_match=None,
        class_word_ids=None,
        num_class_tokens=5,
        **kwargs,
    ):
        # whatever a checkpoint says: its folder carries the code of the package that saves it
        kwargs["auto_map"] = {**(kwargs.get("auto_map") or {}), **AUTO_MAP}
        kwargs["custom_pipelines"] = {task: dict(entry) for task, entry in CUSTOM_PIPELINES.items()}
        moved = {name: kwargs.pop(name) for name in DECODING_SETTINGS if name in kwargs}
        # transformers chooses a pipeline's class before it loads the model: importing ours makes it choose that
        from .pipeline_blip_rbm import BlipRBMImageToTextPipeline  # noqa: F401
        from .processing_blip_rbm import load_image  # noqa: F401

        tower = _tower_config(vision_config)
        if text_config is not None and not isinstance(text_config, dict):
            text_config = text_config.to_dict()
        own_tower = tower.model_type == BlipVisionConfig.model_type
        width = tower.hidden_size if own_tower else (text_config or {}).get("encoder_hidden_size")
        # BlipConfig ties encoder_hidden_size to the hidden_size of a BlipVisionConfig, so both are set after it.
        super().__init__(text_config=text_config, vision_config=None, **kwargs)
        self.vision_config = tower
        if self._attn_implementation is not None:
            self._attn_implementation = self._attn_implementation  # the setter hands it on to the tower's config
        self.text_config.encoder_hidden_size = width or self.text_config.hidden_size
        if getattr(self, "pad_token_id", None) is None:  # where Seq2SeqTrainer looks for it
            self.pad_token_id = self.text_config.pad_token_id

        self.num_image_tokens = num_image_tokens
        self.vision_hidden_size = self._width_of_tower(vision_hidden_size)
        self.rbm_word_ids = list(rbm_word_ids or [])
        self.rbm_hidden_size = rbm_hidden_size
        self.rbm_visible_type = rbm_visible_type
        self.rbm_pooling = rbm_pooling or ("cls_mean" if tower.model_type in TOWERS_WITH_CLS else "mean")
        self.rbm_visible_size = rbm_visible_size
        self.rbm_num_phrases = rbm_num_phrases
        self.rbm_cause_tokens = rbm_cause_tokens
        self.rbm_confidence = rbm_confidence
        self.rbm_match = rbm_match
        self.class_word_ids = list(class_word_ids or [])
        self.num_class_tokens = num_class_tokens
        if moved:  # of a checkpoint from before they were in generation_config.json; the model takes them over
            DecodingSettings(**moved)  # refuses what cannot be
            self.decoding_settings = moved
        self._check()
        if self.vision_hidden_size is not None:
            self.set_visible_size()

    def _width_of_tower(self, asked):
        """C: what was asked for, or, as no other can be, that of BLIP's own tower."""
        if not self.has_blip_tower:
            return asked
        if asked not in (None, self.vision_config.hidden_size):
            raise ValueError(
                f"vision_hidden_size is {asked!r}, but BLIP's tower has width {self.vision_config.hidden_size}: leave it out"
            )
        return self.vision_config.hidden_size

    def __setattr__(self, name, value):
        if name in DECODING_SETTINGS:
            warnings.warn(
                f"{name} is stored in the generation config: set model.generation_config.{name}, or pass it to generate",
                DeprecationWarning,
                stacklevel=2,
            )
            self.__dict__.setdefault("decoding_settings", {})[name] = value  # the model takes it over
        else:
            super().__setattr__(name, value)

    def set_visible_size(self):
        """V from the tower's width and the pooling. The model calls it once it knows the tower's width.

        Raises:
            ValueError: if another V was asked for: the RBM would not fit the encoder.
        """
        size = self.vision_hidden_size * POOLINGS[self.rbm_pooling]
        if self.rbm_visible_size not in (None, size):
            raise ValueError(
                f"rbm_visible_size is {self.rbm_visible_size}, but tokens of width {self.vision_hidden_size} from the "
                f"{self.vision_config.model_type} tower, pooled by {self.rbm_pooling!r}, give {size} units. Leave "
                "rbm_visible_size out, or change rbm_pooling (one of " + ", ".join(POOLINGS) + ")."
            )
        self.rbm_visible_size = size

    @property
    def has_blip_tower(self) -> bool:
        """Whether the vision tower is BLIP's own: then its output goes to the decoder as it is, without projector."""
        return self.vision_config.model_type == BlipVisionConfig.model_type

    def _check(self):
        ids, vocab_size = self.rbm_word_ids, self.text_config.vocab_size
        for name in ("num_image_tokens", "vision_hidden_size", "rbm_visible_size"):
            check(self, name, getattr(self, name) is None or is_int(getattr(self, name), 1), "an int from 1, or None")
        check(
            self,
            "rbm_word_ids",
            all(is_int(i, 0) for i in ids) and ids == sorted(set(ids)) and (not ids or ids[-1] < vocab_size),
            f"token ids, ascending, unique, from 0 to {vocab_size - 1}",
        )
        classes = self.class_word_ids
        check(
            self,
            "class_word_ids",
            all(is_int(i, -1) and i < vocab_size for i in classes) and (not classes or max(classes) >= 0),
            f"token ids from 0 to {vocab_size - 1}, -1 for a class without a word",
        )
        words = len(set(classes) - {-1})
        check(self, "num_class_tokens", is_int(self.num_class_tokens, 1), "an int from 1")
        check(
            self,
            "num_class_tokens",
            not words or self.num_class_tokens <= words,
            f"at most the {words} words of classes",
        )
        check(self, "rbm_hidden_size", is_int(self.rbm_hidden_size, 1), "an int from 1")
        check(self, "rbm_num_phrases", is_int(self.rbm_num_phrases, 0), "an int from 0")
        check(self, "rbm_cause_tokens", is_int(self.rbm_cause_tokens, 0), "an int from 0")
        check(self, "rbm_visible_type", self.rbm_visible_type in ("gaussian", "binary"), "'gaussian', 'binary'")
        check(self, "rbm_pooling", self.rbm_pooling in POOLINGS, ", ".join(map(repr, POOLINGS)))
        for name, length in (("rbm_confidence", 3), ("rbm_match", 2)):
            value = getattr(self, name)
            ok = value is None or (
                isinstance(value, (list, tuple)) and len(value) == length and all(map(is_number, value))
            )
            check(self, name, ok, f"a list of {length} finite numbers, or None")


@dataclass
class DecodingSettings:
    """How the RBM takes part in `generate`. Stored in generation_config.json under these names; an argument of `generate` of the same name
    overrides one for a call.

    Args:
        rbm_guidance: beta, weight of the word gains (nats) on the decoder's logits. 0: guide is off.
        rbm_guidance_rarity: by how much, as a share, a word's weight grows with a nat of its rarity (`PhraseBlock.token_rarity`).
        rbm_guidance_clip: bound on a word's gain, in nats.
        rbm_guidance_order: how the gains are computed: "exact", or expanded in the word weights to "second" or "first" order, which is
            many times cheaper (`rbm.word_gains`).
        rbm_rerank: return the best of the candidates.
        rbm_rerank_candidates: beams (or samples) among which to choose, at least.
        rbm_rerank_length_penalty: alpha in log P / length^alpha.
        rbm_rerank_pmi: weight of the RBM's pointwise mutual information (nats).
        rbm_rerank_consensus: weight of the mean similarity to the other candidates.
        rbm_rerank_similarity: which similarity, see `generation_blip_rbm.caption_similarity`.
        rbm_rerank_cider: weight of the CIDEr-D that the hidden causes let expect of a candidate (`PhraseBlock.expected_cider`).
        rbm_rerank_rarity: weight of how rare a candidate's words are (nats, `PhraseBlock.rarity`): a larger vocabulary, at a cost in
            CIDEr-D.

    Raises:
        ValueError: for an impossible value, naming it and what is allowed.
    """

    rbm_guidance: float = 0.0
    rbm_guidance_rarity: float = 0.0
    rbm_guidance_clip: float = 5.0
    rbm_guidance_order: str = "second"
    rbm_rerank: bool = False
    rbm_rerank_candidates: int = 10
    rbm_rerank_length_penalty: float = 1.0
    rbm_rerank_pmi: float = 0.0
    rbm_rerank_consensus: float = 0.0
    rbm_rerank_similarity: str = "jaccard"
    rbm_rerank_cider: float = 0.0
    rbm_rerank_rarity: float = 0.0

    def __post_init__(self):
        weights = [name for name in DECODING_SETTINGS if type(getattr(type(self), name)) is float]
        for name in weights:
            check(self, name, is_number(getattr(self, name), -1000, 1000), "a number from -1000 to 1000")
        check(self, "rbm_guidance_clip", self.rbm_guidance_clip >= 0, "a number from 0 to 1000")
        check(self, "rbm_guidance", abs(self.rbm_guidance) <= 100, "a number from -100 to 100")
        check(
            self,
            "rbm_guidance_order",
            self.rbm_guidance_order in WORD_GAIN_ORDERS,
            ", ".join(map(repr, WORD_GAIN_ORDERS)),
        )
        check(self, "rbm_rerank", isinstance(self.rbm_rerank, bool), "True, False")
        check(self, "rbm_rerank_candidates", is_int(self.rbm_rerank_candidates, 1), "an int from 1")
        check(
            self,
            "rbm_rerank_similarity",
            self.rbm_rerank_similarity in SIMILARITIES,
            ", ".join(map(repr, SIMILARITIES)),
        )

    @classmethod
    def of(cls, generation_config, overrides: dict | None = None) -> "DecodingSettings":
        """The settings of a generation config, each overridden where `overrides` has a value of its name other than None."""
        given = {name: getattr(generation_config, name, None) for name in DECODING_SETTINGS} | {
            name: value for name, value in (overrides or {}).items() if name in DECODING_SETTINGS and value is not None
        }
        return cls(**{name: value for name, value in given.items() if value is not None})

    def to_dict(self) -> dict:
        return asdict(self)


DECODING_SETTINGS = tuple(field.name for field in fields(DecodingSettings))


def check(owner, name: str, ok: bool, allowed: str):
    """Raises ValueError that names an impossible value and what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {getattr(owner, name)!r}; allowed: {allowed}")


def is_int(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value, least: float = float("-inf"), most: float = float("inf")) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and isfinite(value) and least <= value <= most


def check_loaded(model, missing: list[str], other_shapes: list[str], source):
    """Raises ValueError if what was loaded is no whole model; warns if it has no RBM."""
    if other_shapes:
        raise ValueError(
            f"{source} has weights of other shapes than its config.json says: {', '.join(sorted(other_shapes)[:5])}. Use the config that was "
            "saved with them, or pass ignore_mismatched_sizes=True to make these weights anew"
        )
    of_rbm = [name for name in missing if name.startswith("rbm_layer.")]
    if without := [name for name in missing if name not in of_rbm]:
        raise ValueError(
            f"{source} lacks the weights {', '.join(without[:5])}{' and others' if len(without) > 5 else ''}: the file is "
            "incomplete, or of another kind of model. Use a whole checkpoint"
        )
    machine = [name for name in of_rbm if name.startswith("rbm_layer.rbm.")]
    if machine and len(machine) < len([*model.rbm_layer.rbm.state_dict()]):
        raise ValueError(
            f"{source} has only a part of an RBM: it lacks {', '.join(machine)}. Use a whole checkpoint, or train its "
            "RBM anew (training/train_rbm.py)"
        )
    if of_rbm:
        logger.warning(
            f"{source} has no RBM weights ({', '.join(of_rbm)}). They were initialised as the identity: captions are "
            "those of BLIP until the RBM is trained (training/train_rbm.py)."
        )
    plain = {
        n: t for n, t in model.state_dict().items() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta
    }
    broken = [n for n, t in plain.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(
            f"{source} has NaN or infinite values in {', '.join(broken[:5])}{' and others' if len(broken) > 5 else ''}. "
            "The file is damaged or training diverged: use an earlier checkpoint."
        )


def copy_code(folder, source=None, revision=None):
    """Put the files of this package that a model's folder carries (`HUB_FILES`) into a folder, each whole or not at all. A link there
    stays a link: its owner has said where the code is.

    Args:
        source, revision: folder or Hub id that a model came from. As remote code it runs without the files that it does not import, such as
            the pipeline's: they are taken from there.
    """
    here = Path(__file__).resolve().parent
    for name in HUB_FILES:
        file, target = here / name, Path(folder) / name
        if not file.exists() and source:
            found = cached_file(
                str(source), name, revision=revision,
                _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
            file = Path(found or file)
        if target.is_symlink() or not file.exists() or (target.exists() and target.samefile(file)):
            continue
        part = target.with_name(f".{name}.{os.getpid()}")
        shutil.copyfile(file, part)
        os.replace(part, target)


__all__ = ["BlipRBMConfig", "BlipTextConfig", "BlipVisionConfig", "DecodingSettings"]
