"""Stage 0: one BLIP out of two unimodal models, in the spirit of SAIL (arXiv 2412.04616).

    python -m training.build_captioner --vision google/efficientnet-b2 --text sentence-transformers/all-MiniLM-L6-v2 \
        --output_dir runs/untrained

The vision encoder becomes the tower, the BERT-type text encoder BLIP's decoder: its token-type row 0 is folded into the
positions, cross-attention starts as a copy of self-attention, and two tokens are added, [DEC] and [ENC].

With `--decoder` the words are those of a trained captioner and only the way from image to words is new; with
`--aligned` as well, tokens are expected to have gone through an alignment layer: `experiments/alignment/` tests SAIL's last
claim so.
"""

import argparse
from pathlib import Path
from typing import Optional

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput

from modeling_blip_rbm import BlipRBMConfig, BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.vision_blip_rbm import vision_tokens
from training.lib.aligned import load_image_layer
from training.lib.checkpoints import record_of_training, refuse_other_output, save_captioner, write_json
from training.lib.encoders import load_image_processor, load_vision_model, states_of_blank
from training.lib.stage import run_stage


IMAGENET_WORDS = str(Path(__file__).with_name("imagenet_words.tsv"))


def build_tokenizer(text: str, sources: tuple[str, ...] = ()):
    tokenizer = AutoTokenizer.from_pretrained(text)
    # in BLIP's order: ids 30522 and 30523
    tokenizer.add_tokens(["[DEC]", "[ENC]", *(f"[{source}]" for source in sources)], special_tokens=True)
    # [ENC] is not named among the tokenizer's special tokens: transformers 5 would write a list that 4.57 cannot read.
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def load_tower(vision: str):
    """A vision model by folder or Hub id, or the tower of a BLIP-RBM; `NAME@10`: its first 10 layers. Those of a tower
    that was tuned for something else may say more of an image than the last (`experiments/alignment/`).

    Raises:
        ValueError: for the first layers of a BLIP-RBM.
    """
    name, _, layers = vision.partition("@")
    if not layers:
        return load_vision_model(name), load_image_processor(name)
    config = AutoConfig.from_pretrained(name)
    if config.model_type == BlipRBMConfig.model_type:
        raise ValueError(
            f"{vision} asks for the first layers of a BLIP-RBM, whose tower is only taken whole: give {name}"
        )
    settings = config.to_dict() | {"num_hidden_layers": int(layers)}
    for derived in ("stage_names", "out_features", "out_indices"):  # of backbones, by the number of layers
        settings.pop(derived, None)
    config = type(config)(**settings)
    return AutoModel.from_pretrained(name, config=config, dtype=torch.float32), load_image_processor(name)


def shape_of_tokens(tower, image_processor) -> dict[str, int]:
    """Number and width of the tokens of an image, for the config."""
    tokens = vision_tokens(BaseModelOutput(states_of_blank(tower.eval(), image_processor)))
    return {"num_image_tokens": tokens.shape[1], "vision_hidden_size": tokens.shape[2]}


def class_words(file: str, tokenizer) -> list[int]:
    """Token id of each class's everyday word, -1 without one, of a table `class index, label, word` with tabs between.

    Raises:
        ValueError: if a line is not of that form.
    """
    ids = []
    for number, line in enumerate(Path(file).read_text(encoding="utf-8").splitlines()):
        columns = line.split("\t")
        if len(columns) != 3 or columns[0] != str(number):
            raise ValueError(f"{file}, line {number + 1}: must be {number}, a label and a word, but is {line!r:.80}")
        pieces = tokenizer(columns[2], add_special_tokens=False)["input_ids"]
        ids.append(pieces[0] if len(pieces) == 1 else -1)
    return ids


@torch.no_grad()
def load_class_head(head: torch.nn.Linear, file: str):
    """Weights of a classifier, (classes, width) and (classes,), out of a .safetensors or a PyTorch file; a tower may have
    more channels than the classifier was made for: they are zero, as transformers rounds the width up.

    Raises:
        ValueError: if the file has no such weights.
    """
    tensors = (
        load_file(file) if file.endswith(".safetensors") else torch.load(file, map_location="cpu", weights_only=True)
    )
    weights = [
        t for t in tensors.values() if t.dim() == 2 and len(t) == len(head.bias) and t.shape[1] <= head.in_features
    ]
    biases = [t for t in tensors.values() if t.shape == head.bias.shape]
    if len(weights) != 1 or len(biases) != 1:
        raise ValueError(
            f"{file} must hold one classifier of {len(head.bias)} classes for at most {head.in_features} channels, but has "
            f"{len(weights)} weights and {len(biases)} biases of such shapes"
        )
    head.weight.zero_()
    head.weight[:, : weights[0].shape[1]] = weights[0]
    head.bias.copy_(biases[0])


def build_captioner(
    vision: str,
    text: str,
    dropout: float = 0.1,
    max_position_embeddings: int = 512,
    sources: tuple[str, ...] = (),
    classes: Optional[tuple[str, str]] = None,
):
    """An untrained captioner: (model, processor).

    Args:
        vision: folder or Hub id of any vision model that transformers' AutoModel loads, as in `load_tower`.
        text: folder or Hub id of a BERT-type encoder with its tokenizer.
        sources: names of sources of captions, each with a token of its own (`training/lib/mixture.py`).
        classes: files of the tower's classification head and of its classes' words (`load_class_head`, `class_words`).

    Raises:
        ValueError: if the text model is not of BERT's kind.
    """
    tower, image_processor = load_tower(vision)
    encoder = AutoModel.from_pretrained(text, dtype=torch.float32)
    if encoder.config.model_type != "bert":
        raise ValueError(
            f"{text} is a {encoder.config.model_type!r} model, but BLIP's decoder is a BERT: choose a model of type "
            "'bert', such as sentence-transformers/all-MiniLM-L6-v2 or bert-base-uncased"
        )
    tokenizer = build_tokenizer(text, sources)
    vision_config = getattr(tower.config, "vision_config", tower.config)  # CLIP and the like: their vision half
    tower = getattr(tower, "vision_model", tower) if vision_config is not tower.config else tower
    bert = encoder.config
    config = BlipRBMConfig(
        vision_config=vision_config,
        **({} if vision_config.model_type == "blip_vision_model" else shape_of_tokens(tower, image_processor)),
        text_config={
            **{
                name: getattr(bert, name)
                for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            },
            "hidden_act": bert.hidden_act,
            "layer_norm_eps": bert.layer_norm_eps,
            "max_position_embeddings": min(max_position_embeddings, bert.max_position_embeddings),
            "encoder_hidden_size": bert.hidden_size,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        },
        class_word_ids=class_words(classes[1], tokenizer) if classes else None,
    )
    model = BlipRBMForConditionalGeneration(config)
    if classes:
        load_class_head(model.class_tokens.head, classes[0])
    model.vision_model.load_state_dict(tower.state_dict())
    _start_decoder_from_bert(model.text_decoder, encoder.state_dict())
    return model, BlipRBMProcessor(image_processor, tokenizer)


@torch.no_grad()
def _start_decoder_from_bert(decoder, bert: dict):
    own = decoder.bert.state_dict()
    words = bert["embeddings.word_embeddings.weight"]
    own["embeddings.word_embeddings.weight"][: len(words)] = words
    own["embeddings.word_embeddings.weight"][len(words) :] = words.mean(0)
    positions = bert["embeddings.position_embeddings.weight"] + bert["embeddings.token_type_embeddings.weight"][0]
    own["embeddings.position_embeddings.weight"].copy_(positions[: decoder.config.max_position_embeddings])
    for name in list(own):
        source = name.replace(".crossattention.", ".attention.")
        if name.startswith(("encoder.", "embeddings.LayerNorm")):
            own[name].copy_(bert[source])
    decoder.bert.load_state_dict(own)
    # The prediction head's transform, which sentence encoders lack, starts as the identity.
    transform = decoder.cls.predictions.transform
    transform.dense.weight.copy_(torch.eye(len(transform.dense.weight)))


@torch.no_grad()
def with_decoder_of(
    captioner: str, vision: str, aligned: Optional[str] = None, classes: Optional[tuple[str, str]] = None
):
    """A trained captioner's decoder on another tower, the projector untrained, cross-attention a copy of self-attention
    again.

    Args:
        captioner: folder or Hub id of a BLIP-RBM.
        aligned: output of `training.align`: the projector takes tokens of its width, not of the tower's. Such a model
            captions cached tokens (`train_captioner --aligned`), not pixels.
        classes: as in `build_captioner`.
    """
    trained = BlipRBMForConditionalGeneration.from_pretrained(captioner, dtype=torch.float32)
    tower, image_processor = load_tower(vision)
    words = trained.config.text_config.to_dict()
    shape = shape_of_tokens(tower, image_processor)
    if aligned is not None:
        layer = load_image_layer(aligned)
        shape["vision_hidden_size"] = layer(torch.zeros(1, len(layer[0].weight))).shape[1]
    tokenizer = BlipRBMProcessor.from_pretrained(captioner).tokenizer
    if classes:
        shape["class_word_ids"] = class_words(classes[1], tokenizer)
    model = BlipRBMForConditionalGeneration(BlipRBMConfig(vision_config=tower.config, text_config=words, **shape))
    if classes:
        load_class_head(model.class_tokens.head, classes[0])
    model.vision_model.load_state_dict(tower.state_dict())
    model.text_decoder.load_state_dict(trained.text_decoder.state_dict())
    for block in model.text_decoder.bert.encoder.layer:
        block.crossattention.load_state_dict(block.attention.state_dict(), strict=False)
    return model, BlipRBMProcessor(image_processor, tokenizer)


def main():
    parser = argparse.ArgumentParser(description="Build an untrained captioner from two unimodal models.")
    parser.add_argument(
        "--vision", required=True, help="folder or Hub id of a vision model; NAME@10: its first 10 layers"
    )
    language = parser.add_mutually_exclusive_group(required=True)
    language.add_argument("--text", help="folder or Hub id of a BERT-type text encoder")
    language.add_argument("--decoder", help="folder or Hub id of a trained captioner, in the place of --text")
    parser.add_argument("--aligned", help="output of training.align; with --decoder")
    parser.add_argument(
        "--sources", nargs="*", default=[], help="names of sources of captions, such as web: see mixture.py"
    )
    parser.add_argument(
        "--class_head",
        help="file with the weights of the vision model's classification head: the decoder is told its classes",
    )
    parser.add_argument(
        "--class_words", default=IMAGENET_WORDS, help="table of the classes' words (default: ImageNet's)"
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    refuse_other_output(args.output_dir)
    torch.manual_seed(args.seed)
    if args.aligned and not args.decoder:
        parser.error("--aligned needs --decoder: the captioner whose words the new one begins with")
    classes = (args.class_head, args.class_words) if args.class_head else None
    if args.decoder:
        model, processor = with_decoder_of(args.decoder, args.vision, args.aligned, classes)
    else:
        model, processor = build_captioner(args.vision, args.text, sources=tuple(args.sources), classes=classes)
    save_captioner(model, processor, args.output_dir)
    if args.decoder and (record := record_of_training(args.decoder)):  # what is trained next goes on from it
        write_json(Path(args.output_dir) / "captioner.json", record)
    print(f"{args.output_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    run_stage(main)
