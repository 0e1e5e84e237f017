"""Several data sets as one: how they are named, weighed, held back from; texts alone; the tower's own classes."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from tests.conftest import VOCABULARY, tiny_config
from tests.stages import in_process
from training.build_captioner import class_words, load_class_head
from training.lib.arguments import DataArguments
from training.lib.captions import caption_tokens, of_the_image, source_token
from training.lib.data import split_held_back
from training.lib.mixture import DataSource, image_number, parse_source, part_of, read_images, read_text_sources
from training.lib.packed import LengthGrouped, PackedCaptioner, PackedCaptions, collate


def test_entries_of_dataset():
    assert parse_source("flickr8k") == DataSource("flickr8k")
    assert parse_source("a,b.jsonl,weight=0.5,source=web") == DataSource("a,b.jsonl", 0.5, "web")
    assert parse_source("c.jsonl,text=true,without=coco:val").without == "coco:val"
    for entry, named in (("x,wieght=2", "wieght"), ("x,weight=-1", "-1"), ("x,weight=two", "two"), ("x,text=1", "'1'")):
        with pytest.raises(ValueError, match=named):
            parse_source(entry)


def test_one_image_has_one_number_in_two_data_sets():
    assert image_number("COCO_val2014_000000199055.jpg") == image_number("199055") == "199055"
    assert image_number("no digits") is None


def test_what_nobody_sees_in_a_photograph():
    kept = ["a man may sit here", "people march in a street"]
    assert of_the_image([*kept, "a match on 3 march", "dog, january", "photo by someone", "see www.x.org"]) == kept


def test_held_back_of_each_data_set(pairs):
    data = DataArguments([str(pairs), str(pairs)], max_images=11)
    dataset = read_images(data)
    train, held = split_held_back(dataset, 6)
    assert part_of(dataset).tolist() == [0] * 11 + [1] * 11
    assert np.bincount(part_of(dataset)[held]).tolist() == [3, 3] and len(train) == 16
    uneven = dataset.select(range(14))
    with pytest.raises(ValueError, match="number 2 has 3"):
        split_held_back(uneven, 8)


def test_texts_without_the_images_of_another_data_set(tmp_path, pairs):
    ids = Dataset.from_parquet(str(pairs / "validation-00000-of-00001.parquet"))["image_id"]
    rows = [{"image_id": 10**6, "captions": ["a dog"]}, {"image_id": int(ids[3].split(".")[0]), "captions": ["a cat"]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataArguments([f"{tmp_path / 't.jsonl'},text=true,without={pairs}:validation"])
    ((source, texts),) = read_text_sources(data)
    assert texts == [["a dog"]] and source.text


def batches(sampler, size, rows):
    order = list(sampler)
    assert len(order) == len(sampler)
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def test_batches_are_of_one_kind_and_weights_count():
    rows = [*range(17), *[-1] * 13]
    data = PackedCaptions(None, rows, [[[1, 2, 3]]] * 30, None, [1.5] * 17 + [0.7] * 13)
    sampler = LengthGrouped(3, data, seed=0)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        found = batches(sampler, 3, rows)
        assert all(len({row < 0 for row in batch}) == 1 for batch in found)
        counts = np.bincount([row for batch in found for row in batch if row >= 0], minlength=17)
        assert set(counts) == {1, 2} and counts.sum() == 17 + round(0.5 * 17)
        assert sum(row < 0 for batch in found for row in batch) == 9  # whole batches of round(0.7 * 13)
        epochs.append(found)
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert batches(sampler, 3, rows) == epochs[0]


def test_captions_of_a_source_begin_with_its_token(processor):
    processor.tokenizer.add_tokens(["[web]"], special_tokens=True)
    (own,), (web,) = (caption_tokens(processor, ["a dog"], start=source_token(processor, s)) for s in (None, "web"))
    assert own[1:] == web[1:] and web[0] == len(VOCABULARY) and own[0] == VOCABULARY.index("[DEC]")
    with pytest.raises(ValueError, match="--sources sbu"):
        source_token(processor, "sbu")


def with_classes(**settings):
    """A captioner whose tower's head knows five classes of three words: dog, cat, dog, none, ball."""
    dog, cat, ball = (VOCABULARY.index(word) for word in ("dog", "cat", "ball"))
    config = tiny_config(class_word_ids=[dog, cat, dog, -1, ball], num_class_tokens=2, **settings)
    return BlipRBMForConditionalGeneration(config).eval(), (dog, cat, ball)


def test_class_tokens_are_the_likeliest_words():
    model, (dog, cat, ball) = with_classes()
    part = model.class_tokens
    tokens = torch.randn(3, 10, 22)
    classes = part.head(tokens.mean(1)).softmax(-1)
    words = dict(zip(part.word_ids.tolist(), part.word_probabilities(tokens).T))
    torch.testing.assert_close(words[dog], classes[:, 0] + classes[:, 2])
    torch.testing.assert_close(words[ball], classes[:, 4])
    assert not words[-1].any()
    torch.nn.init.normal_(part.sureness)
    embeddings = model.text_decoder.get_input_embeddings().weight
    found = part(tokens, embeddings)
    best = torch.stack([words[i] for i in (dog, cat, ball)]).T.sort(descending=True)
    for row in range(3):
        for place in range(2):
            word = (dog, cat, ball)[best.indices[row, place]]
            expected = part.linear(part.norm(embeddings[word])) + best.values[row, place].log() * part.sureness
            torch.testing.assert_close(found[row, place], expected)
    encoding = model.encode_image(vision_hidden_states=tokens)
    torch.testing.assert_close(encoding.image_embeds[:, 10:], found)


def test_a_model_with_class_tokens_saves_and_captions(tmp_path, processor):
    model, _ = with_classes()
    pixel_values = torch.randn(2, 3, 24, 24)
    model.save_pretrained(tmp_path)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.class_tokens.word_ids, model.class_tokens.word_ids)
    settings = {"max_new_tokens": 7, "num_beams": 2, "rbm": False}
    captions = model.generate(pixel_values=pixel_values, **settings)
    assert torch.equal(again.generate(pixel_values=pixel_values, **settings), captions)
    assert not any(p.requires_grad for p in again.class_tokens.head.parameters())


def test_texts_alone_go_through_the_class_tokens_that_they_imagine():
    model, _ = with_classes()
    captioner = PackedCaptioner(model.config).train()
    captioner.load_state_dict(model.state_dict())
    captioner.full_vocabulary = True
    dog, ball = VOCABULARY.index("dog"), VOCABULARY.index("ball")
    start, end = VOCABULARY.index("[DEC]"), VOCABULARY.index("[SEP]")
    batch = collate([PackedCaptions(None, [-1], [[[start, dog, ball, end]]])[0]])
    seen = []
    captioner.class_tokens.of_words = lambda sure, embeddings: seen.append(sure) or torch.zeros(1, 2, 22)
    for _ in range(40):
        captioner(**batch)
    sure = torch.cat(seen)
    words = captioner.class_tokens.word_ids.tolist()
    assert (
        (sure[:, words.index(dog)] > -3).float().mean()
        > 0.5
        > (sure[:, words.index(VOCABULARY.index("cat"))] > -3).float().mean()
    )


def test_head_and_words_of_classes_are_read(tmp_path, processor):
    table = tmp_path / "words.tsv"
    table.write_text("0\tBeagle\tdog\n1\ttabby\tcat\n2\tthing\t\n")
    assert class_words(str(table), processor.tokenizer) == [VOCABULARY.index("dog"), VOCABULARY.index("cat"), -1]
    head, weights = torch.nn.Linear(7, 3), {"fc.weight": torch.randn(3, 5), "fc.bias": torch.randn(3)}
    torch.save(weights | {"conv": torch.randn(2, 2, 2)}, tmp_path / "head.pth")
    load_class_head(head, str(tmp_path / "head.pth"))
    assert torch.equal(head.weight[:, :5], weights["fc.weight"]) and not head.weight[:, 5:].any()
    table.write_text("1\tBeagle\tdog\n")
    with pytest.raises(ValueError, match="line 1: must be 0"):
        class_words(str(table), processor.tokenizer)
    with pytest.raises(ValueError, match="one classifier of 3 classes"):
        load_class_head(torch.nn.Linear(3, 3), str(tmp_path / "head.pth"))


def test_the_decoder_learns_from_texts_then_from_a_mixture(tmp_path, towers, pairs):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"image_id": i, "captions": ["a dog", "the red ball"]}) + "\n" for i in range(12))
    )
    build = ("--vision", towers / "vision", "--text", towers / "text", "--sources", "web", "--output_dir", "built")
    in_process("build_captioner", *build, cwd=tmp_path)
    run = (
        "--num_train_epochs",
        1,
        "--per_device_train_batch_size",
        4,
        "--eval_strategy",
        "epoch",
        "--report_to",
        "none",
    )
    run += ("--use_cpu", "true", "--unigram_bias", "false", "--held_back", 4, "--save_strategy", "no")
    said = in_process(
        "train_captioner",
        "--model",
        "built",
        "--dataset",
        f"{texts},text=true",
        "--output_dir",
        "language",
        *run,
        cwd=tmp_path,
    )
    assert "nats a token of held-back texts" in said
    history = json.loads((tmp_path / "language" / "captioner.json").read_text())["held_back"]
    assert 0 < history[0]["eval_nats"] < 10
    mixture = (str(pairs), f"{pairs},source=web,weight=0.5", f"{texts},text=true")
    said = in_process(
        "train_captioner",
        "--model",
        "language/best",
        "--dataset",
        *mixture,
        "--output_dir",
        "mixed",
        "--views",
        1,
        *run,
        cwd=tmp_path,
    )
    assert "held-back CIDEr-D" in said and (tmp_path / "mixed" / "best" / "config.json").exists()
    assert isinstance(json.loads((tmp_path / "mixed" / "pairs.json").read_text()), list)


def test_class_tokens_start_as_the_words_themselves():
    model, _ = with_classes()
    part = model.class_tokens
    assert torch.equal(part.linear.weight, torch.eye(22, 28)) and not part.sureness.any()
