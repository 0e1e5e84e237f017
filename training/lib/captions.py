"""Captions as token ids, and what a captioner writes of cached images."""

import re
import sys
from typing import Optional, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_blip_rbm import DecodingSettings
from modeling_blip_rbm.configuration_blip_rbm import SIMILARITIES
from modeling_blip_rbm.generation_blip_rbm import rerank_scores
from modeling_blip_rbm.processors_blip_rbm import ChosenLogProb
from training.lib.distributed import once_each
from training.lib.pairs import unknown_token_message


def caption_tokens(
    processor, captions: list[str], max_length: int = 40, start: Optional[int] = None
) -> list[list[int]]:
    """Token ids [DEC] w1 ... wn [SEP] of captions, without the final full stop that only some of them have.

    Args:
        start: a token in the place of [DEC], see `source_token`.
    """
    texts = [" ".join(caption.strip().rstrip(".").split()) for caption in captions]
    # the processor's own tokenizer, which warns of unknown words in every call, where a stage does so once
    tokens = processor.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
    return tokens if start is None else [[start, *ids[1:]] for ids in tokens]


def source_token(processor, source: Optional[str]) -> Optional[int]:
    """The token `[SOURCE]` with which captions of a source begin (`training/lib/mixture.py`); None without a source.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    if source is None:
        return None
    token = processor.tokenizer.get_added_vocab().get(f"[{source}]")
    if token is None:
        raise ValueError(
            f"source={source}: the tokenizer has no token [{source}]: build the captioner with --sources {source}"
        )
    return token


# What a caption must not hold if a captioner shall not learn to say it: of the web's captions, names of months and
# days, agencies, addresses; digits of any.
NOT_OF_THE_IMAGE = re.compile(
    r"\d|https?:|www\.|@|©|\b(?:january|february|april|june|july|august|september|october|november|december|"
    r"monday|tuesday|wednesday|thursday|friday|saturday|sunday|copyright|getty|reuters|shutterstock|stock|photo by|courtesy)\b",
    re.IGNORECASE,
)


def of_the_image(captions: list[str]) -> list[str]:
    """The captions without digits, dates, addresses and agencies, which nobody can see in a photograph."""
    return [caption for caption in captions if not NOT_OF_THE_IMAGE.search(caption)]


def say_unknown_tokens(captions, tokenizer):
    """Say on stderr which share of the captions' tokens the vocabulary lacks, if it is one in a hundred or more."""
    if message := unknown_token_message(captions, tokenizer):
        print(message, file=sys.stderr)


def unigram_bias(token_ids: list[int], vocab_size: int, least: float = 0.01) -> torch.Tensor:
    """(vocab_size,) log frequency of each token as the next one; rarer ones as if seen `least` times."""
    counts = torch.bincount(torch.tensor(token_ids), minlength=vocab_size).float().clamp(min=least)
    return (counts / counts.sum()).log()


def other_tokens(tokens: torch.Tensor, vocab_size: int) -> list[int]:
    """All token ids but these, as `suppress_tokens` of `generate`."""
    return sorted(set(range(vocab_size)) - set(tokens.tolist()))


@torch.no_grad()
def caption_rows(
    model, processor, store, rows: Sequence[int], batch_size: int = 16, side_by_side: int = 1, **generate_kwargs
) -> list[str]:
    """Captions of the images with these row numbers in a `FeatureStore`, in order; `generate_kwargs` as for `generate`. Under `accelerate
    launch` each process writes those of its share, and all of them get all.

    Args:
        side_by_side: so many captions of every image are begun as rows of one batch.
    """

    def captions_of(rows: Sequence[int]) -> list[str]:
        captions = []
        for start in tqdm(range(0, len(rows), batch_size), desc="caption", leave=False):
            features = store.batch(rows[start : start + batch_size]).to(model.device)
            if side_by_side > 1:
                prompt = torch.full((len(features) * side_by_side, 1), model.decoder_input_ids)
                generate_kwargs["input_ids"] = prompt
            captions += processor.captions(model.generate(vision_hidden_states=features, **generate_kwargs))
        return captions

    return once_each(captions_of, rows)


@torch.no_grad()
def candidates_of(model, encoding, n: int, logits_processor=(), **generate_kwargs):
    """n candidates of each image: token ids (B * n, T), and what `score_captions` gives of them, summed while they were written.

    Candidates are beams, or samples with `do_sample=True`.
    """
    beams = 1 if generate_kwargs.get("do_sample") else n
    log_prob = ChosenLogProb(beams)
    outputs = model.generate(
        encoding=encoding,
        num_return_sequences=n,
        rbm_rerank=False,
        return_dict_in_generate=True,
        logits_processor=[log_prob, *logits_processor],
        stopping_criteria=[log_prob.chosen],
        **{"num_beams": beams} | generate_kwargs,
    )
    return outputs.sequences, model._score_generated(outputs, log_prob, prompt_length=1)


@torch.no_grad()
def candidate_parts(model, processor, store, rows, n: int, batch_size: int = 8, **generate_kwargs):
    """Of each image's n candidates (`candidates_of`): captions, and the parts of their scores as arrays (images, n). Under `accelerate launch`
    as `caption_rows`."""

    def of_rows(rows: Sequence[int]) -> list[tuple[list[str], dict[str, np.ndarray]]]:
        candidates = []
        for start in tqdm(range(0, len(rows), batch_size), desc="candidates"):
            features = store.batch(rows[start : start + batch_size]).to(model.device)
            encoding = model.encode_image(vision_hidden_states=features)
            sequences, scored = candidates_of(model, encoding, n, **generate_kwargs)
            texts = processor.captions(sequences)
            parts = model.candidate_parts(encoding, sequences, SIMILARITIES, scored)
            parts = {name: part.cpu().numpy() for name, part in parts.items()}
            for i in range(len(features)):
                candidates.append((texts[i * n : i * n + n], {name: part[i] for name, part in parts.items()}))
        return candidates

    captions, parts = zip(*once_each(of_rows, rows))
    return list(captions), {name: np.stack([of_image[name] for of_image in parts]) for name in parts[0]}


def chosen_by_rerank(parts: dict[str, np.ndarray], settings: DecodingSettings) -> np.ndarray:
    """(images,) which candidate re-rank takes with these weights, of `candidate_parts`."""
    return rerank_scores({name: torch.from_numpy(part) for name, part in parts.items()}, settings).argmax(1).numpy()
