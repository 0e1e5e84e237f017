"""Where the RBM touches the words: guide (while a caption is written) and re-rank (when candidates are finished).

    logits[k] += beta * g_k(x, words said)                        guide: `RBMGuidance` of processors_blip_rbm.py
    score = log P / length^alpha + l1 PMI + l2 consensus + l3 E[CIDEr-D] + l4 rarity       re-rank: `rerank_scores`

The weights are `DecodingSettings`, stored in generation_config.json.

Axes: B images, n candidates of an image, R rows (images * beams), T tokens, K words of the RBM, H hidden units.
"""

import copy
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from transformers import GenerationMixin, LogitsProcessorList
from transformers.utils import logging

from .configuration_blip_rbm import PHRASE_WEIGHTS, SIMILARITIES, DecodingSettings, is_int, is_number
from .inference_blip_rbm import behind_the_door, may_be_fast, open_door
from .processors_blip_rbm import ChosenLogProb, InverseTransformSampling, RBMGuidance, word_columns, words_said
from .rbm import bernoulli, pointwise_mutual_information
from .static_blip_rbm import static_cache
from .vision_blip_rbm import check_pixels, weights_here


logger = logging.get_logger(__name__)


class ImageEncoding(NamedTuple):
    """An image, encoded once."""

    image_embeds: torch.Tensor  # (B, N, D) what the decoder attends to
    hidden_input: torch.Tensor  # a (B, H), the RBM's hidden input from the image alone


def caption_similarity(sequences: torch.Tensor, kind: str, ignored: tuple[int, ...]) -> torch.Tensor:
    """(B, m, m) similarity of an image's m captions (B, m, T) to one another, of their sets of tokens.

    Args:
        kind: "jaccard" (shared / all) or "overlap" (shared / those of the shorter; Szymkiewicz 1934).
        ignored: ids of tokens that are no words, such as pads.
    """
    if kind not in SIMILARITIES:
        raise ValueError(f"similarity is {kind!r}; allowed are {', '.join(map(repr, SIMILARITIES))}")
    tokens, index = torch.unique(sequences, return_inverse=True)
    sets = torch.zeros(*sequences.shape[:2], len(tokens), device=sequences.device).scatter_(2, index, 1.0)
    sets = sets * ~torch.isin(tokens, torch.tensor(ignored, device=tokens.device))
    shared, sizes = sets @ sets.transpose(1, 2), sets.sum(-1)
    a, b = sizes[:, :, None], sizes[:, None, :]
    whole = a + b - shared if kind == "jaccard" else torch.minimum(a, b)
    return shared / whole.clamp(min=1.0)


def consensus(similarity: torch.Tensor) -> torch.Tensor:
    """(B, n) mean similarity (B, n, n) of each candidate to the others: the minimum-Bayes-risk choice under that similarity
    (Kumar & Byrne, NAACL 2004). One candidate: 0."""
    n = similarity.shape[-1]
    return (similarity.sum(-1) - similarity.diagonal(dim1=1, dim2=2)) / max(n - 1, 1)


def rerank_scores(parts: dict, settings: DecodingSettings) -> torch.Tensor:
    """(B, n) log P(caption | image) / length^alpha + l1 * PMI + l2 * consensus + l3 * expected CIDEr-D + l4 * rarity.

    Args:
        parts: of `candidate_parts`, (B, n) each; those whose weight is 0 may be left out.
        settings: `rbm_rerank_length_penalty` alpha, `rbm_rerank_pmi` l1, `rbm_rerank_consensus` l2 with its `rbm_rerank_similarity`,
            `rbm_rerank_cider` l3 and `rbm_rerank_rarity` l4.
    """
    score = parts["log_prob"] / parts["length"].clamp(min=1) ** settings.rbm_rerank_length_penalty
    weights = {
        "pmi": settings.rbm_rerank_pmi,
        settings.rbm_rerank_similarity: settings.rbm_rerank_consensus,
        "cider": settings.rbm_rerank_cider,
        "rarity": settings.rbm_rerank_rarity,
    }
    for name, weight in weights.items():
        if weight:
            score = score + weight * parts[name]
    return score


class BlipRBMGenerationMixin(GenerationMixin):
    """`generate` with guide and re-rank, for a model that has `encode_image`, `text_decoder` and `rbm_layer`."""

    auto_optimize = True  # `generate` calls `optimize_for_inference` by itself where it may

    def optimize_for_inference(self, int8: bool = False):
        """Prepare a faster copy of what `generate` runs; the model itself stays as it is. `generate` does so by itself, unless
        `model.auto_optimize` is False: then it takes less memory and more time.

        On a CPU the linear layers' weights are packed, so they are in memory twice. Weights that change later are prepared anew.

        Args:
            int8: linear layers in 8 bits: faster on large models, and captions may differ slightly.

        Returns:
            the model.
        """
        open_door(self, int8)
        return self

    @property
    def presets(self) -> dict[str, dict]:
        """Named decoding settings that the checkpoint carries: `model.generate(**inputs, **model.presets["varied"])`."""
        return getattr(self.generation_config, "rbm_presets", None) or {}

    def decoding_settings(self, generation_config=None, **overrides) -> DecodingSettings:
        """The RBM's part in `generate`: the generation config's, with what is overridden.

        Raises:
            ValueError: for an impossible value, or if this model's RBM cannot do what is asked.
        """
        for name, value in self.config.__dict__.pop("decoding_settings", {}).items():
            setattr(self.generation_config, name, value)
        settings = DecodingSettings.of(generation_config or self.generation_config, overrides)
        if (settings.rbm_guidance or settings.rbm_rerank) and not self.config.rbm_word_ids:
            raise ValueError("rbm_guidance and rbm_rerank need an RBM with words, but config.rbm_word_ids is empty")
        for name in PHRASE_WEIGHTS:
            if getattr(settings, name) and self.rbm_layer.phrases is None:
                raise ValueError(f"{name} is {getattr(settings, name)!r}, but this RBM has no phrases: allowed is 0")
        return settings

    @torch.no_grad()
    def encode_for_generation(self, pixel_values=None, vision_hidden_states=None, rbm=True, **kwargs) -> ImageEncoding:
        """As `encode_image`, by what `optimize_for_inference` prepares, as `generate` does."""
        return self._encode(self._prepared(), pixel_values, vision_hidden_states, rbm, **kwargs)

    def _prepared(self):
        """What `optimize_for_inference` made, or makes now; None where the model's own modules are asked for."""
        if not may_be_fast(self):
            return None
        fast = behind_the_door(self)
        if fast is None and self.auto_optimize:
            logger.info("the model is prepared for inference; model.auto_optimize = False leaves it as it is")
            fast = open_door(self)
        return fast

    def _encode(self, fast, pixel_values=None, vision_hidden_states=None, rbm=True, **kwargs) -> ImageEncoding:
        if fast is not None and pixel_values is not None and vision_hidden_states is None:
            check_pixels(pixel_values, self.config, "interpolate_pos_encoding" in kwargs)
            pixel_values, vision_hidden_states = None, fast.vision_hidden_states(pixel_values.to(self.dtype), **kwargs)
            kwargs = {}
        return self.encode_image(pixel_values, vision_hidden_states, rbm=rbm, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Optional[torch.Tensor] = None,
        input_ids: Optional[torch.LongTensor] = None,
        attention_mask: Optional[torch.LongTensor] = None,
        interpolate_pos_encoding: bool = False,
        vision_hidden_states: Optional[torch.Tensor] = None,
        encoding: Optional[ImageEncoding] = None,
        rbm: bool = True,
        rbm_diversity: float = 0.0,
        logits_processor: Optional[LogitsProcessorList] = None,
        **generate_kwargs,
    ):
        """Captions of images, with the RBM's strategies.

        Args:
            pixel_values (B, 3, S, S): or `vision_hidden_states` (B, N, C), or `encoding` from `encode_image`.
            input_ids (R, T): prompts, of any lengths (padded on either side): one for all images, or R a multiple of B, an image's
                adjacent. A final [SEP] is dropped and the first token becomes [DEC]. Not changed in place.
            rbm: False switches refine, guide and re-rank off together: plain BLIP.
            rbm_diversity: weight of sampled hidden causes. Each of the `num_return_sequences` captions of an image is guided by causes of
                its own, h ~ P(h | x), so that they are about different things; not re-ranked.
            generate_kwargs: the names of [`DecodingSettings`], in place of the generation config's; and those of
                `GenerationMixin.generate`: num_beams, max_new_tokens, eos_token_id, ... With re-rank the candidates are beams
                (num_beams is raised to `rbm_rerank_candidates`), or samples with `do_sample=True`.

        Returns:
            token ids (B * num_return_sequences, T), or with `return_dict_in_generate=True` an output whose `rerank_scores`
            (B * num_return_sequences) are those that chose.

        Raises:
            ValueError: if the images or prompts do not fit, the prompt leaves no room for a new token, or the RBM cannot do what is
                asked.
        """
        settings = self._settings_for(generate_kwargs, rbm, rbm_diversity)
        attention_mask = self._without_reference(input_ids, attention_mask, generate_kwargs.pop("labels", None))
        fast = self._prepared()
        if encoding is None:
            extra = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
            encoding = self._encode(fast, pixel_values, vision_hidden_states, rbm, **extra)
        elif pixel_values is not None or vision_hidden_states is not None:
            raise ValueError("encoding is the image already: leave pixel_values and vision_hidden_states out")
        alone = settings.rbm_rerank
        encoding, input_ids, attention_mask = self._fit_prompts(encoding, input_ids, attention_mask, alone)
        if rbm_diversity:  # each caption of an image is a row of its own
            n = self._setting(generate_kwargs, "num_return_sequences", 1)
            generate_kwargs["num_return_sequences"] = 1
            input_ids, attention_mask = input_ids.repeat_interleave(n, 0), attention_mask.repeat_interleave(n, 0)
        guides = self._guides(fast, encoding.hidden_input, settings, rbm_diversity, len(input_ids))
        generate_kwargs |= self._within_context(generate_kwargs, input_ids.shape[1])
        generate_kwargs |= self._image_inputs(fast, encoding, input_ids.shape, generate_kwargs)
        generate_kwargs |= {
            "inputs": input_ids,  # else transformers makes some where the weights are, which may be nowhere yet
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "logits_processor": LogitsProcessorList([*(logits_processor or []), *guides]),
        }
        if settings.rbm_rerank and not rbm_diversity:
            return self._generate_reranked(encoding, settings, **generate_kwargs)
        return GenerationMixin.generate(self, **generate_kwargs)

    # ------------------------------------------------------------------ what is asked

    def _settings_for(self, kwargs: dict, rbm: bool, diversity: float) -> DecodingSettings:
        """The decoding settings of a call, whose own are taken out of its arguments. Raises ValueError for what cannot be done."""
        own = {name: kwargs.pop(name) for name in vars(DecodingSettings()) if name in kwargs}
        if not is_number(diversity, -100, 100):
            raise ValueError(f"rbm_diversity is {diversity!r}; allowed: a number from -100 to 100")
        for name in ("num_beams", "num_return_sequences"):
            if not is_int(value := self._setting(kwargs, name, 1), 1):
                raise ValueError(f"{name} is {value!r}; allowed: an int from 1")
        if not rbm:
            return DecodingSettings()
        settings = self.decoding_settings(kwargs.get("generation_config"), **own)
        if diversity and not self.config.rbm_word_ids:
            raise ValueError("rbm_diversity needs an RBM with words, but config.rbm_word_ids is empty")
        if kwargs.get("assistant_model") is not None:
            raise ValueError("assistant_model is given, but an assistant is not shown the image: leave it out")
        if settings.rbm_rerank and kwargs.get("streamer") is not None:
            raise ValueError(
                "a streamer gets words as they are written, but re-rank chooses among finished captions: "
                "pass rbm_rerank=False, num_beams=1 with it"
            )
        return settings

    def _setting(self, kwargs: dict, name: str, default):
        """A setting of `generate` as transformers will see it: an argument, else of the generation config."""
        value = kwargs.get(name)
        if value is None:
            value = getattr(kwargs.get("generation_config") or self.generation_config, name, None)
        return default if value is None else value

    def _without_reference(self, input_ids, attention_mask, labels):
        """The prompts' mask without what `labels` count: transformers' Seq2SeqTrainer hands `generate` the whole batch, and the caption
        that is to be written would be its own prompt."""
        if labels is None or input_ids is None:
            return attention_mask
        counted = (labels != -100) & (labels != self.decoder_pad_token_id)
        before = counted.long().cumsum(1) == 0
        return before.long() if attention_mask is None else attention_mask * before

    def _within_context(self, kwargs: dict, prompt_length: int) -> dict:
        """Lengths that end where the decoder's positions do, so that no memory is taken for tokens that cannot be."""
        limit = self.config.text_config.max_position_embeddings
        new = self._setting(kwargs, "max_new_tokens", None)
        if new is not None:
            return {"max_new_tokens": min(new, limit - prompt_length)}
        return {"max_length": limit} if self._longest(kwargs, prompt_length) > limit else {}

    def _longest(self, kwargs: dict, prompt_length: int) -> int:
        """Tokens of prompt and caption."""
        new = self._setting(kwargs, "max_new_tokens", None)
        if new is not None:
            return prompt_length + new
        return self._setting(kwargs, "max_length", None) or 20 + prompt_length  # transformers' own default

    def _image_inputs(self, fast, encoding: ImageEncoding, prompts: tuple[int, int], kwargs: dict) -> dict:
        """How the decoder gets the image after so many prompts of such a length: by the fast path's cache, or as BLIP does, where something
        asks for BLIP's own modules."""
        recorded = any(
            self._setting(kwargs, name, False) or getattr(self.config.text_config, name, False)
            for name in ("output_attentions", "output_hidden_states")
        )
        named = self._setting(kwargs, "cache_implementation", None)
        may_be = fast is not None and not recorded and kwargs.get("use_cache") is not False
        if may_be and named == "static":
            options = self._setting(kwargs, "compile_config", None)
            room = self._longest(kwargs, prompts[1])
            cache = static_cache(fast, encoding.image_embeds, room, options and options.to_dict())
            # transformers would make a cache of its own, and compile what is around it
            return {"past_key_values": cache, "cache_implementation": None, "compile_config": None}
        if "static" in str(named):
            raise ValueError(
                f"cache_implementation is {named!r}, but BLIP's own modules have no room for the image's keys there: leave it out, or 'dynamic'. "
                "'static' is for the fast path, which gradients, hooks, autocast and output_attentions switch off"
            )
        if may_be and named is None and self._setting(kwargs, "past_key_values", None) is None:
            return {"past_key_values": fast.new_cache(encoding.image_embeds)}
        return {"image_embeds": encoding.image_embeds.repeat_interleave(prompts[0] // len(encoding.image_embeds), 0)}

    def _fit_prompts(self, encoding: ImageEncoding, input_ids, attention_mask, alone: bool):
        """The encoding, prompts (R, T) and their mask: R a multiple of the images, an image's prompts adjacent; with `alone` as many
        encodings as prompts."""
        images = len(encoding.image_embeds)
        if input_ids is None:
            input_ids = torch.full((images, 1), self.decoder_input_ids, device=encoding.image_embeds.device)
            return encoding, input_ids, torch.ones_like(input_ids)
        input_ids, attention_mask = self._left_padded_prompts(input_ids, attention_mask, encoding.image_embeds.device)
        prompts = len(input_ids)
        if prompts == 1 < images:
            input_ids, attention_mask = input_ids.expand(images, -1), attention_mask.expand(images, -1)
        elif prompts % images:
            raise ValueError(
                f"there are {prompts} prompts for {images} images: give one prompt for all images, or as many for each"
            )
        elif alone:
            encoding = ImageEncoding(*(part.repeat_interleave(prompts // images, 0) for part in encoding))
        return encoding, input_ids, attention_mask

    def _left_padded_prompts(self, input_ids, attention_mask, device):
        """Per row: pads and a final [SEP] dropped, first token [DEC]; then padded on the left. New tensors."""
        input_ids, vocab_size = (
            torch.atleast_2d(torch.as_tensor(input_ids, device=device)),
            self.config.text_config.vocab_size,
        )
        if input_ids.is_floating_point() or ((input_ids < 0) | (input_ids >= vocab_size)).any() or not len(input_ids):
            raise ValueError(
                f"input_ids is {input_ids}; allowed: token ids from 0 to {vocab_size - 1}, a row for each prompt"
            )
        if attention_mask is None:
            attention_mask = input_ids != self.decoder_pad_token_id
        attention_mask = torch.atleast_2d(torch.as_tensor(attention_mask, device=device))
        sep, limit = self.config.text_config.sep_token_id, self.config.text_config.max_position_embeddings
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            ids = ids[mask.bool()]
            ids = ids[:-1] if len(ids) > 1 and ids[-1] == sep else ids
            if len(ids) >= limit:
                raise ValueError(
                    f"the prompt has {len(ids)} tokens, but the decoder's context has {limit}, and at least one must be "
                    "left for the caption: shorten the prompt"
                )
            rows.append(torch.cat([ids.new_tensor([self.decoder_input_ids]), ids[1:]]))
        longest = max(len(row) for row in rows)
        ids = torch.stack([F.pad(row, (longest - len(row), 0), value=self.decoder_pad_token_id) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
        return ids, mask

    # ------------------------------------------------------------------ guide and samples

    def _guides(self, fast, hidden_input, settings: DecodingSettings, diversity: float, rows: int) -> list:
        """The RBM's logits processors for so many rows of text: one, or none."""
        if not (settings.rbm_guidance or diversity):
            return []
        config, order, parameters = self.config, settings.rbm_guidance_order, self.rbm_parameters()
        beta = settings.rbm_guidance or None
        if beta and settings.rbm_guidance_rarity:
            words = torch.tensor(config.rbm_word_ids, device=hidden_input.device)
            with weights_here(self.rbm_layer.phrases):
                beta = beta * (1 + settings.rbm_guidance_rarity * self.rbm_layer.phrases.token_rarity(words))
        product = fast.gain_product(parameters.U, order) if fast is not None else None
        causes = None
        if diversity:  # causes of its own for every row
            hidden_input = hidden_input.repeat_interleave(rows // len(hidden_input), 0)
            causes = bernoulli(torch.sigmoid(hidden_input))
        vocab_size, clip = config.text_config.vocab_size, settings.rbm_guidance_clip
        return [
            RBMGuidance(
                parameters, hidden_input, config.rbm_word_ids, vocab_size, beta, clip, order, causes, diversity, product
            )
        ]

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs):
        """Transformers' own, but tokens are drawn by `InverseTransformSampling`."""
        logits_processor = ChosenLogProb.first(logits_processor)
        if not generation_config.do_sample:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)
        scores = [] if generation_config.output_scores and generation_config.return_dict_in_generate else None
        sampler, generation_config = InverseTransformSampling(scores), copy.copy(generation_config)
        logits_processor.append(sampler)
        generation_config.do_sample = generation_config.output_scores = False
        outputs = super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)
        sampler.check()
        if scores is not None:
            outputs.scores = tuple(scores)
        return outputs

    def _beam_search(self, input_ids, logits_processor, *args, **kwargs):
        return super()._beam_search(input_ids, ChosenLogProb.first(logits_processor), *args, **kwargs)

    # ------------------------------------------------------------------ re-rank

    def _generate_reranked(self, encoding: ImageEncoding, settings: DecodingSettings, **kwargs):
        wanted, num_beams = self._setting(kwargs, "num_return_sequences", 1), self._setting(kwargs, "num_beams", 1)
        n = max(settings.rbm_rerank_candidates, wanted)
        kwargs["num_return_sequences"] = n
        if not self._setting(kwargs, "do_sample", False) or num_beams > 1:
            kwargs["num_beams"] = max(num_beams, n)
        as_dict = self._setting(kwargs, "return_dict_in_generate", False)
        log_prob = ChosenLogProb(self._setting(kwargs, "num_beams", 1))
        kwargs["logits_processor"] = [log_prob, *kwargs["logits_processor"]]
        kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or []), log_prob.chosen]
        outputs = GenerationMixin.generate(self, **kwargs | {"return_dict_in_generate": True})
        sequences = outputs.sequences
        scored = self._score_generated(outputs, log_prob, prompt_length=kwargs["input_ids"].shape[1])
        scores = self.candidate_scores(encoding, sequences, scored, settings)  # (B, n)
        best, order = scores.topk(wanted, dim=1)
        rows = (order + n * torch.arange(len(order), device=order.device)[:, None]).flatten()
        if not as_dict:
            return sequences[rows]
        outputs.sequences = sequences[rows]
        for name in ("sequences_scores", "beam_indices"):
            if getattr(outputs, name, None) is not None:
                outputs[name] = getattr(outputs, name)[rows]
        outputs["rerank_scores"] = best.flatten()
        return outputs

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
        fast, image_embeds = self._prepared(), encoding.image_embeds
        if fast is not None:
            image = {"past_key_values": fast.new_cache(image_embeds)}
        else:
            image = {"image_embeds": image_embeds.repeat_interleave(len(sequences) // len(image_embeds), 0)}
        logits = self(input_ids=sequences, attention_mask=mask, use_cache=True, **image).logits
        log_prob = logits[:, :-1].float().log_softmax(-1).gather(-1, sequences[:, 1:, None])[..., 0]
        counted = mask[:, 1:] * mask[:, :-1]
        return (log_prob * counted).sum(-1), counted.sum(-1)

    def _score_generated(self, outputs, log_prob: ChosenLogProb, prompt_length: int):
        """As `score_captions`, of the tokens after the prompt, from what decoding computed anyway: to decode them once more took as long as
        decoding them. None where it has not been seen (assisted decoding, of one candidate)."""
        tokens = outputs.sequences[:, prompt_length:]
        if not log_prob.tokens:
            return None
        is_sep = (tokens == self.config.text_config.sep_token_id).long()
        counted = (is_sep.cumsum(1) - is_sep == 0) & (tokens != self.decoder_pad_token_id)
        # in which row of the step's scores a token was chosen, -1 after the end
        rows = getattr(outputs, "beam_indices", None)
        if rows is None:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
        of_tokens = log_prob.of(tokens, rows[:, : tokens.shape[1]].clamp(min=0))
        return of_tokens.masked_fill(~counted, 0.0).sum(-1), counted.sum(-1)

    @torch.no_grad()
    def candidate_parts(
        self, encoding: ImageEncoding, sequences: torch.Tensor, similarities=SIMILARITIES[:1], scored=None
    ) -> dict[str, torch.Tensor]:
        """What re-rank weighs of the candidates (B * n, T) of B images: (B, n) each.

        Args:
            similarities: kinds of `caption_similarity`.
            scored: what `score_captions` gives of them, if it is known.

        Returns:
            `log_prob` by the decoder (nats), `length` (tokens), `pmi` by the RBM (nats), if it has phrases `cider` that it expects and
            the words' `rarity` (nats), and of every similarity, under its name, the consensus.
        """
        text, p = self.config.text_config, self.rbm_parameters()
        n = len(sequences) // len(encoding.image_embeds)
        log_prob, length = scored or self.score_captions(encoding, sequences)
        words = self._words_said(sequences).view(-1, n, len(self.config.rbm_word_ids))
        pmi = pointwise_mutual_information(p, encoding.hidden_input[:, None], words)
        parts = {"log_prob": log_prob.view(-1, n), "length": length.view(-1, n), "pmi": pmi}
        special = (text.pad_token_id, text.sep_token_id, text.bos_token_id)
        sequences = sequences.view(len(words), n, -1)
        if self.rbm_layer.phrases is not None:
            with weights_here(self.rbm_layer.phrases):
                causes = torch.sigmoid(encoding.hidden_input)
                parts["cider"] = self.rbm_layer.phrases.expected_cider(causes, sequences, special)
                parts["rarity"] = self.rbm_layer.phrases.rarity(sequences, special)
        for kind in similarities:
            parts[kind] = consensus(caption_similarity(sequences, kind, special))
        return parts

    def candidate_scores(self, encoding: ImageEncoding, sequences, scored=None, settings=None) -> torch.Tensor:
        """(B, n) by which re-rank chooses among the candidates (B * n, T) of B images; `scored` as of `candidate_parts`."""
        settings = settings or self.decoding_settings()
        similarities = (settings.rbm_rerank_similarity,) if settings.rbm_rerank_consensus else ()
        return rerank_scores(self.candidate_parts(encoding, sequences, similarities, scored), settings)

    # ------------------------------------------------------------------ what is known of a caption

    @torch.no_grad()
    def caption_evidence(self, encoding: ImageEncoding, sequences: torch.Tensor) -> torch.Tensor:
        """(B * n, 2) for the captions (B * n, T) of B images: log P per token by the decoder, PMI by the RBM (nats; 0 without
        words)."""
        log_prob, length = self.score_captions(encoding, sequences)
        pmi = torch.zeros_like(log_prob)
        if self.config.rbm_word_ids:
            words = self._words_said(sequences).view(len(encoding.image_embeds), -1, len(self.config.rbm_word_ids))
            pmi = pointwise_mutual_information(self.rbm_parameters(), encoding.hidden_input[:, None], words).flatten()
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


__all__ = ["BlipRBMGenerationMixin", "ImageEncoding"]
