"""Leave out of a trained captioner the word-pieces that its training captions do not hold.

    python -m training.shrink_vocabulary --model runs/captioner-tower/best --dataset flickr8k \
        --output_dir runs/captioner-shrunk

A BERT vocabulary has 30,522 word-pieces, the captions of a small dataset a fifth of them; the rest were only trained
never to be said. They cost a third of a small model's size, and with beams more than half of the time of decoding.
Pieces of one character stay, so every text can still be read, in smaller pieces. Embeddings and output weights of the
kept pieces do not change: captions stay the same.
"""

import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from training.lib.arguments import DataArguments, parse_arguments
from training.lib.captions import caption_tokens
from training.lib.checkpoints import refuse_other_output, save_captioner, write_json
from training.lib.data import split_held_back
from training.lib.mixture import image_sources, read_images, read_text_sources
from training.lib.stage import run_stage


@dataclass
class ShrinkArguments:
    model: str = field(metadata={"help": "folder or Hub id of the captioner, before its RBM is trained"})
    output_dir: str = field(metadata={"help": "where the smaller captioner goes"})
    least: int = field(default=1, metadata={"help": "times that a word-piece must occur in the captions to be kept"})


def kept_tokens(tokenizer, said: set[int]) -> list[int]:
    """Ids, ascending, of the tokens that are said, the special ones and those of one character."""
    single = {i for token, i in tokenizer.get_vocab().items() if len(token.removeprefix("##")) == 1}
    special = {i for i, token in tokenizer.added_tokens_decoder.items()}
    return sorted(said | single | special)


def shrink_tokenizer(tokenizer, kept: list[int]):
    """The same tokenizer with these tokens alone, numbered anew in their old order."""
    new = {old: i for i, old in enumerate(kept)}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: new[i] for token, i in vocabulary.items() if i in new}
        for token in content["added_tokens"]:
            token["id"] = new[token["id"]]
        for special in (content["post_processor"] or {}).get("special_tokens", {}).values():
            special["ids"] = [new[i] for i in special["ids"]]
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        for stale in ("vocab.txt", "added_tokens.json"):
            (Path(folder) / stale).unlink(missing_ok=True)
        added = {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in content["added_tokens"]
        }
        settings = Path(folder) / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "added_tokens_decoder": added}))
        return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def shrink_captioner(model, kept: list[int]):
    """The same captioner with the rows of these tokens alone.

    Raises:
        ValueError: if a word of its RBM is not among them.
    """
    new = {old: i for i, old in enumerate(kept)}
    config = model.config.to_dict()
    missing = [i for i in config["rbm_word_ids"] if i not in new]
    if missing:
        raise ValueError(f"the RBM has words that would go, such as tokens {missing[:5]}: shrink before it is trained")
    if config["rbm_num_phrases"]:
        raise ValueError(
            "the phrases of this model are n-grams of token ids that would change: shrink before they are fitted"
        )
    text = config["text_config"]
    size = text["vocab_size"]
    ids = ("bos_token_id", "sep_token_id", "eos_token_id", "pad_token_id")
    text |= {"vocab_size": len(kept)} | {name: new[text[name]] for name in ids}
    config["rbm_word_ids"] = [new[i] for i in config["rbm_word_ids"]]
    config["class_word_ids"] = [new.get(i, -1) for i in config["class_word_ids"]]
    small = BlipRBMForConditionalGeneration(BlipRBMConfig.from_dict(config))
    for name in ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty"):
        setattr(small.generation_config, name, getattr(model.generation_config, name))
    rows = torch.tensor(kept)
    own = {name for name, t in model.text_decoder.state_dict().items() if t.shape[:1] == (size,)}
    small.load_state_dict(
        {
            name: t[rows] if name.removeprefix("text_decoder.") in own else t
            for name, t in model.state_dict().items()
        }
        | {name: t for name, t in small.state_dict().items() if name == "class_tokens.word_ids"}
    )  # fmt: skip
    return small.eval()


def main():
    data, args = parse_arguments(DataArguments, ShrinkArguments)
    refuse_other_output(args.output_dir)
    processor = BlipRBMProcessor.from_pretrained(args.model)
    model = BlipRBMForConditionalGeneration.from_pretrained(args.model).eval()
    captions = [of_image for _, texts in read_text_sources(data) for of_image in texts]
    if image_sources(data):
        dataset = read_images(data)
        train_rows, _ = split_held_back(dataset, data.held_back)
        captions += dataset.select(train_rows)["captions"][:]
    counts = Counter(token for of_image in captions for ids in caption_tokens(processor, of_image) for token in ids)
    said = {token for token, count in counts.items() if count >= args.least}
    said |= {word for word in model.config.class_word_ids if word >= 0}
    kept = kept_tokens(processor.tokenizer, said)
    before = sum(p.numel() for p in model.parameters())
    small = shrink_captioner(model, kept)
    small_processor = BlipRBMProcessor(processor.image_processor, shrink_tokenizer(processor.tokenizer, kept))
    save_captioner(small, small_processor, args.output_dir)
    after = sum(p.numel() for p in small.parameters())
    tokens = len(processor.tokenizer)
    write_json(Path(args.output_dir) / "vocabulary.json", {"before": tokens, "after": len(kept), "said": len(said)})
    print(f"{args.output_dir}: {tokens:,} -> {len(kept):,} word-pieces, {before:,} -> {after:,} parameters")


if __name__ == "__main__":
    run_stage(main)
