"""The stages from end to end, on drawn images with a tiny tower and a tiny BERT; and what must hold in each."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import Dinov2Config, Dinov2Model, Seq2SeqTrainingArguments, TrainingArguments

from experiments.minimum_risk.train_minimum_risk import MinimumRiskTrainer
from modeling_blip_rbm import BlipRBMForConditionalGeneration, BlipRBMProcessor
from modeling_blip_rbm.rbm import JointRBM, hidden_input
from modeling_blip_rbm.vision_blip_rbm import vision_tokens
from tests.conftest import VOCABULARY, WORD_IDS, random_image, tiny_tokenizer
from tests.stages import in_process, process
from training import tune_decoding
from training.average_captioners import average
from training.lib import decoding_rule
from training.lib.captions import caption_rows, caption_tokens
from training.lib.checkpoints import save_captioner
from training.lib.data import CaptionWords, choose_words, fold_of, split_held_back
from training.lib.distributed import new_accelerator
from training.lib.metrics import CiderD
from training.lib.packed import PackedCaptioner, PackedCaptions, collate, packed, packed_mask
from training.lib.pairs import load_pairs
from training.lib.rbm_evaluation import average_precision, image_inputs
from training.lib.rbm_objective import (
    PooledPairs,
    RBMArguments,
    RBMObjective,
    match_loss,
    sparsity_loss,
    token_cd_loss,
    words_loss,
)
from training.lib.rbm_training import evaluations_since_best, in_pieces, prepared, with_new_rbm
from training.lib.rbm_training import train as train_rbm
from training.lib.trainer import CaptionCollator, CaptionSeq2SeqTrainer, caption_metrics
from training.shrink_vocabulary import kept_tokens, shrink_captioner, shrink_tokenizer


def test_missing_columns_and_wrong_recipes_are_named(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"no column for the caption was found among \['image', 'picture'\]"):
        Dataset.from_dict({"image": ["y"], "picture": ["x"]}).to_parquet(tmp_path / "train.parquet")
        load_pairs(tmp_path, "train")
    (tmp_path / "recipe.yaml").write_text("lerning_rate: 1\n")
    result = process("train_rbm", "recipe.yaml", "--model", "x", "--dataset", "x", "--output_dir", "x", cwd=tmp_path)
    assert result.returncode == 2 and "keys that are no flags of this stage: lerning_rate" in result.stderr


def test_a_text_model_that_is_no_bert_is_refused(towers, tmp_path):
    config = Dinov2Config(hidden_size=22, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(tmp_path / "no-bert")
    command = ["--vision", towers / "vision", "--text", "no-bert", "--output_dir", "x"]
    with pytest.raises(ValueError, match="is a 'dinov2' model, but BLIP's decoder is a BERT"):
        in_process("build_captioner", *command, cwd=tmp_path)


# ---------------------------------------------------------------- data and features


def test_held_back_images_do_not_depend_on_the_order(pairs):
    dataset = load_pairs(pairs, "train")
    train, held = split_held_back(dataset, 5)
    assert len(train) == 19 and not set(train) & set(held)
    shuffled = dataset.shuffle(seed=1)
    _, held_again = split_held_back(shuffled, 5)
    assert {dataset[int(i)]["image_id"] for i in held} == {shuffled[int(i)]["image_id"] for i in held_again}
    with pytest.raises(ValueError, match="held_back is 24"):
        split_held_back(dataset, 24)


def test_folds_are_of_the_images_not_of_their_order():
    ids = [f"image-{i}" for i in range(1009)]
    folds = fold_of(ids, 3)
    assert np.array_equal(fold_of(ids[::-1], 3), folds[::-1])
    assert min(np.bincount(folds)) > 1009 / 3 - 60 and len(np.bincount(folds)) == 3
    held_back = split_held_back(Dataset.from_dict({"image_id": ids}), 97)[1]
    assert min(np.bincount(folds[held_back])) > 15  # independent of which are held back


# ---------------------------------------------------------------- vocabulary


def test_a_smaller_vocabulary_says_the_same(model, processor, pixel_values, tmp_path):
    """Tokens that no caption holds go; those that stay have the same probabilities up to the normalisation."""
    gone = {"street", "horse", "##ing"}
    kept = [i for i, token in enumerate(VOCABULARY) if token not in gone]
    with torch.no_grad():  # never said, as after training
        model.text_decoder.cls.predictions.bias[[VOCABULARY.index(token) for token in gone]] = -50.0
    small = shrink_captioner(model, kept)
    tokenizer = shrink_tokenizer(processor.tokenizer, kept)
    assert len(tokenizer) == len(kept) == small.config.text_config.vocab_size == len(VOCABULARY) - 3
    assert tokenizer.bos_token == "[DEC]" and tokenizer.bos_token_id == small.decoder_input_ids == kept.index(
        VOCABULARY.index("[DEC]")
    )
    small_processor = type(processor)(processor.image_processor, tokenizer)
    for settings in ({}, {"num_beams": 3}, {"rbm_guidance": 0.5, "rbm_rerank": True}):
        expected = processor.captions(model.generate(pixel_values, max_new_tokens=9, **settings))
        assert small_processor.captions(small.generate(pixel_values, max_new_tokens=9, **settings)) == expected
    save_captioner(small, small_processor, tmp_path / "small")
    again = type(processor).from_pretrained(tmp_path / "small")
    assert again(text="a dog runs on the beach")["input_ids"].tolist() == [
        [kept.index(i) for i in row] for row in processor(text="a dog runs on the beach")["input_ids"].tolist()
    ]
    with pytest.raises(ValueError, match="the RBM has words that would go, such as tokens"):
        shrink_captioner(model, [i for i in kept if VOCABULARY[i] != "dog"])


def test_kept_tokens(processor):
    tokenizer = processor.tokenizer
    said = {VOCABULARY.index("dog"), VOCABULARY.index("red")}
    tokens = tokenizer.convert_ids_to_tokens(kept_tokens(tokenizer, said))
    assert tokens == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "red", "##s", "[DEC]"]


# ---------------------------------------------------------------- losses


def test_packed_loss_is_the_loss_of_single_captions(model, processor, pixel_values):
    captions = [["a dog runs", "the red ball on the grass"], ["a cat", "two people in a park", "white snow"]]
    items, single = [], []
    tokens = vision_tokens(model.vision_model(pixel_values)).detach()
    for i, of_image in enumerate(captions):
        ids = caption_tokens(processor, of_image)
        items.append({"index": i, "vision_hidden_states": tokens[i], **packed(ids)})
        for caption in ids:
            row = torch.tensor([caption])
            logits = model(vision_hidden_states=tokens[i : i + 1], input_ids=row).logits[0, :-1]
            single.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"))
    captioner = PackedCaptioner(model.config).eval()
    captioner.load_state_dict(model.state_dict())
    captioner.full_vocabulary = True
    torch.testing.assert_close(captioner(**collate(items))["loss"], torch.cat(single).mean())
    captioner.full_vocabulary, captioner.active = False, torch.arange(len(VOCABULARY))
    torch.testing.assert_close(captioner(**collate(items))["loss"], torch.cat(single).mean())
    weighted = [item | {"weights": [float(s + 1) for s in item["segments"]]} for item in items]
    expected = sum(n * loss.sum() for n, loss in zip((1, 2, 1, 2, 3), single)) / len(torch.cat(single))
    torch.testing.assert_close(captioner(**collate(weighted))["loss"], expected)


def test_minimum_risk_makes_better_captions_likelier(model, processor, tmp_path):
    """One image, two captions it may sample: the one that is a reference gains, the other loses."""
    good, bad = caption_tokens(processor, ["a dog runs on grass", "the red ball"])
    captioner = PackedCaptioner(model.config)
    captioner.load_state_dict(model.state_dict())
    captioner.full_vocabulary = True
    features = vision_tokens(model.vision_model(torch.randn(1, 3, 24, 24))).detach()
    references = [["a dog runs on grass", "a dog runs on the grass"], ["a white cat", "two people"]]
    data = PackedCaptions(None, [0, 1], [[good], [bad]], references)
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, max_steps=1)
    trainer = MinimumRiskTrainer(
        model=captioner, args=args, train_dataset=data, data_collator=collate, held_back=None, ema=None,
        processor=processor, eval_beams=1, max_new_tokens=9, samples=2, reference_weight=0.0,
    )  # fmt: skip
    trainer.sample = lambda model, features: [[list(good), list(bad)]]

    def log_prob(caption):
        row = torch.tensor([caption])
        logits = captioner(vision_hidden_states=features, input_ids=row).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, row[0, 1:, None]).sum().item()

    captioner.eval()
    before = log_prob(good), log_prob(bad)
    optimizer = torch.optim.SGD(captioner.text_decoder.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        trainer.compute_loss(captioner, {"index": torch.tensor([0]), "vision_hidden_states": features}).backward()
        optimizer.step()
    captioner.eval()
    assert log_prob(good) > before[0] and log_prob(bad) < before[1]
    assert trainer.rewards[0] > 1  # half of a perfect caption's


def test_average_of_captioners(model, blip):
    other = BlipRBMForConditionalGeneration(model.config)
    mean = average([model, other])
    name = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(mean[name], 0.5 * (model.state_dict()[name] + other.state_dict()[name]))
    model.load_state_dict(mean)
    with pytest.raises(ValueError, match="not of one kind"):
        average([model, BlipRBMForConditionalGeneration.from_blip(blip)])


def test_packed_mask():
    sees = packed_mask(torch.tensor([[0, 0, 1, -1]]), torch.float32)[0, 0] == 0
    assert sees.tolist() == [
        [True] + [False] * 3,
        [True, True, False, False],
        [False, False, True, False],
        [False] * 3 + [True],
    ]


def test_rbm_losses_fall_when_image_and_words_agree(model):
    p = model.rbm_layer.rbm.parameters_fp32
    a = hidden_input(p, torch.randn(5, 44))
    w = torch.rand(5, 11).round()
    assert match_loss(p, a, w).item() > 0 and words_loss(p, a, w, torch.rand(5, 12)).item() > 0
    aligned = p._replace(U=torch.zeros_like(p.U))
    assert match_loss(aligned, a, w).item() == pytest.approx(np.log(5), rel=1e-4)  # no words: chance


class Pooled:
    """As a `FeatureStore` of pooled images, in memory."""

    def __init__(self, features):
        self.features, self.shape, self.num_views = features, features.shape, features.shape[1]

    def batch(self, rows, view=0):
        return self.features[torch.as_tensor(rows), torch.as_tensor(view)]


def random_pairs(rbm, images=23):
    """Pairs of random images and words, and their words."""
    token_ids = [torch.randint(5, 20, (2, 4)).tolist() for _ in range(images)]
    words = CaptionWords(token_ids, list(range(6, 6 + rbm.word_size)), 29)
    return PooledPairs(Pooled(torch.randn(images, 2, rbm.visible_size)), range(images), words), words


def test_words_of_captions(processor):
    token_ids = [[[7, 9, 7], [3]], [], [[8, 20, 9]]]
    words = CaptionWords(token_ids, [7, 8, 9, 11], 29)
    assert len(words) == 3 and words[0].tolist() == [[True, False, True, False], [False] * 4] and len(words[1]) == 0
    assert words.share(np.array([0, 2])).tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 0])
    chosen = words.choose(np.array([0, 0, 2]), np.array([0.1, 0.9, 0.99]))
    assert chosen.tolist() == [[1, 0, 1, 0], [0] * 4, [0, 1, 1, 0]]


def test_divergence_leaves_the_last_good_rbm(model, tmp_path):
    rbm = model.rbm_layer.rbm
    pairs, words = random_pairs(rbm)
    held_back = (torch.randn(7, rbm.visible_size), [words[i] for i in range(7)])
    settings = RBMArguments("x", str(tmp_path), epochs=2, batch_size=11, eval_every=1)
    assert len(train_rbm(new_accelerator(settings.seed), model, pairs, held_back, settings)) == 2
    good = (tmp_path / "best.pt").read_bytes()
    settings = RBMArguments("x", str(tmp_path), epochs=5, batch_size=11, eval_every=1)
    pairs.store.features[5] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged in epoch 3 .*lower --learning_rate"):
        train_rbm(new_accelerator(settings.seed), model, pairs, held_back, settings)
    assert (tmp_path / "best.pt").read_bytes() == good
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_collapse_is_said(model, tmp_path, capsys):
    rbm = model.rbm_layer.rbm
    pairs, words = random_pairs(rbm)
    rbm.hidden_bias.data.fill_(-60.0)
    settings = RBMArguments("x", str(tmp_path), epochs=1, batch_size=11, eval_every=1)
    history = train_rbm(
        new_accelerator(settings.seed),
        model,
        pairs,
        (pairs.store.features[:7, 0], [words[i] for i in range(7)]),
        settings,
    )
    assert history[-1]["dead"] == 1.0
    assert "collapsed, 100% of its hidden units are always off" in capsys.readouterr().out


def test_persistent_chains_go_on(model):
    rbm = model.rbm_layer.rbm
    settings = RBMArguments("x", "x", words=0.0, match=0.0, cd=1.0, cd_persistent=True, batch_size=13)
    objective = RBMObjective(rbm, settings)
    start = objective.chain_h.clone()
    pooled, w = torch.randn(5, rbm.visible_size), torch.rand(5, rbm.word_size).round()
    loss, terms = objective(pooled, w, torch.rand(5, 1 + w.shape[1] + pooled.shape[1]))
    loss.backward()
    assert set(terms) == {"cd"} and rbm.image_weight.grad.abs().sum() > 0
    assert objective.chain_h.shape == start.shape and not torch.equal(objective.chain_h, start)
    assert "chain_x" in objective.state_dict()  # saved, so that a stopped run goes on with them
    with pytest.raises(ValueError, match="exclude each other"):
        RBMObjective(rbm, RBMArguments("x", "x", cd=1.0, cd_persistent=True, cd_clamp_image=True))


def test_contrastive_divergence_of_tokens_is_the_likelihoods_gradient():
    """Many chains, long enough to forget the data, against the partition sum over all tokens and words."""
    torch.manual_seed(0)
    rbm = JointRBM(3, 2, 4, "binary", tokens=True)
    rbm.reset_parameters(std=0.7)
    all_states = lambda n: torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))
    images, words = all_states(6).view(64, 2, 3), all_states(2)
    x, w = images[[5, 38, 63]], words[[2, 1, 1]]
    pairs = images.repeat_interleave(4, 0), words.repeat(64, 1)
    exact = rbm.free_energy(x, w).mean() + torch.logsumexp(-rbm.free_energy(*pairs), 0)  # -log P(x, w)
    of_words = rbm.free_energy(x, w) + torch.logsumexp(
        -torch.stack([rbm.free_energy(x, said.expand(3, 2)) for said in words]), 0
    )  # -log P(w | x)
    for clamped, loss in ((False, exact), (True, of_words.mean())):
        expected = torch.autograd.grad(loss, list(rbm.parameters()), allow_unused=True, retain_graph=True)
        many = x.repeat(5000, 1, 1), w.repeat(5000, 1)
        estimate = token_cd_loss(rbm.parameters_fp32, *many, steps=25, clamp_image=clamped)
        got = torch.autograd.grad(estimate, list(rbm.parameters()), allow_unused=True)
        for (name, _), a, b in zip(rbm.named_parameters(), got, expected):
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0.02, msg=f"{name}, image clamped: {clamped}")
        assert max(b.abs().max() for b in expected if b is not None) > 0.1


def test_rbm_of_tokens_learns_words_and_where_they_are(model, tmp_path):
    """One token of an image, anywhere, has the pattern of its word; the others are noise. The map finds it."""
    torch.manual_seed(0)
    images, tokens, word_ids = 150, 7, WORD_IDS[:3]
    word, place = torch.randint(3, (images,)), torch.randint(tokens, (images, 2))  # of each of two views
    features, patterns = torch.randn(images, 2, tokens, 22), torch.randn(3, 22).sign()
    for view in range(2):
        features[torch.arange(images), view, place[:, view]] += 3 * patterns[word]
    store = Pooled(features)
    words = CaptionWords([[[word_ids[k]]] for k in word.tolist()], word_ids, 29)
    rows = np.arange(100)
    settings = RBMArguments(
        "x", str(tmp_path), hidden_size=13, pooling="tokens", epochs=30, batch_size=25, learning_rate=0.03, cd=0.01,
        eval_every=30,
    )  # fmt: skip
    fresh = with_new_rbm(model, word_ids, settings, in_pieces(store, rows, 40), words.share(rows))
    assert fresh.config.rbm_pooling == "tokens" and fresh.config.rbm_visible_size == 22
    held_back = (features[100:, 0], [words[i] for i in range(100, images)])
    [entry] = train_rbm(new_accelerator(0), fresh, PooledPairs(store, rows, words), held_back, settings)
    assert entry["word_ap"] > 0.9 and np.isfinite([entry["cd"], entry["free_energy_gap"]]).all()
    maps = fresh.word_map(vision_hidden_states=features[100:, 0], words=word_ids)
    found = maps[torch.arange(50), word[100:]].argmax(-1) == place[100:, 0]
    assert found.float().mean() > 0.9
    for change in ({"ais_every": 1}, {"cd_persistent": True}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}.*pooled images alone: leave it out"):
            prepared(
                new_accelerator(0),
                RBMObjective(fresh.rbm_layer.rbm, replace(settings, **change)),
                None,
                replace(settings, **change),
            )


def test_hidden_inputs_a_few_rows_at_a_time():
    rbm, features = JointRBM(11, 3, 5, tokens=True), torch.randn(7, 2, 3, 11)
    with torch.no_grad():
        torch.testing.assert_close(image_inputs(rbm, Pooled(features), range(1, 7), 1, size=4), rbm(features[1:, 1]))
    assert image_inputs(rbm, Pooled(features), []).shape == (0, 5)


def test_a_captioner_that_is_never_evaluated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--eval_strategy is no, but what is kept is the best of the evaluations"):
        in_process("train_captioner", "--model", "m", "--dataset", "d", "--output_dir", "o", cwd=tmp_path)


def test_sparsity_loss_is_least_at_its_target():
    at = lambda share: sparsity_loss(torch.logit(torch.full((7, 5), share)), 0.2).item()
    assert at(0.2) < min(at(0.1), at(0.3)) and at(0.2) == pytest.approx(
        -0.2 * np.log(0.2) - 0.8 * np.log(0.8), rel=1e-5
    )


def test_early_stopping_counts_from_the_best():
    entries = [{"text_to_image_r10": r, "image_to_text_r10": 0} for r in (3, 5, 4, 4)]
    assert [evaluations_since_best(entries[:n]) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]


def test_average_precision_by_hand():
    prob, target = torch.tensor([[0.9, 0.8, 0.7, 0.1]]), torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(average_precision(prob, target), torch.tensor([(1 + 2 / 3) / 2]))


def test_words_are_frequent_and_have_content():
    ids = choose_words(tiny_tokenizer(), [["a dog", "the dog on the beach"], ["dogs and a ball"]], 2)
    assert {VOCABULARY[i] for i in ids} <= {"dog", "beach", "ball"} and VOCABULARY.index("dog") in ids


# ---------------------------------------------------------------- saving


def test_saved_in_half_loads_as_float(model, processor, pixel_values, tmp_path):
    save_captioner(model, processor, tmp_path / "half", half=True)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.float32
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a.half().to(a.dtype), b, rtol=0, atol=0, msg=name)


def test_a_model_of_another_kind_is_never_overwritten(model, processor, tmp_path):
    Dinov2Config().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"holds a model of another kind \(dinov2\): nothing was changed"):
        save_captioner(model, processor, tmp_path)
    assert (tmp_path / "config.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_nan_is_never_written_over_a_good_checkpoint(model, processor, tmp_path):
    save_captioner(model, processor, tmp_path / "kept")
    before = (tmp_path / "kept" / "model.safetensors").read_bytes()
    with torch.no_grad():
        model.rbm_layer.rbm.word_bias[3] = float("nan")
    with pytest.raises(ValueError, match="not saved: NaN or infinite values in rbm_layer.rbm.word_bias"):
        save_captioner(model, processor, tmp_path / "kept")
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == before


def test_captions_from_cached_features_are_those_from_pixels(model, processor, pixel_values, tmp_path):
    tokens = vision_tokens(model.vision_model(pixel_values)).detach()

    class Store:
        def batch(self, rows):
            return tokens[list(rows)]

    cached = caption_rows(model, processor, Store(), range(5), batch_size=2, num_beams=3)
    assert cached == processor.captions(model.generate(pixel_values, num_beams=3))


# ---------------------------------------------------------------- a user's own Trainer


def test_trainer_writes_captions_from_the_image_alone(model, processor, tmp_path):
    """Seq2SeqTrainer hands the right caption to `generate` as its prompt; ours does not, and rates what is said."""
    rows = [
        {"image": random_image(seed=i), "captions": [f"a {word} dog", f"the {word} dog runs"]}
        for i, word in enumerate(("red", "blue", "black"))
    ]
    args = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, generation_max_length=7, generation_num_beams=1, report_to="none", use_cpu=True,
        remove_unused_columns=False, per_device_eval_batch_size=2,
    )  # fmt: skip
    settings = {
        "model": model,
        "args": args,
        "processing_class": processor,
        "data_collator": CaptionCollator(processor, first=True),
    }
    metrics = caption_metrics(processor, [row["captions"] for row in rows])
    trainer = CaptionSeq2SeqTrainer(**settings, compute_metrics=metrics)
    said = processor.captions(torch.from_numpy(trainer.predict(rows).predictions))
    pixel_values = processor(images=[row["image"] for row in rows])["pixel_values"]
    assert said == processor.captions(model.generate(pixel_values, max_new_tokens=7, num_beams=1))
    measured = trainer.evaluate(rows)
    assert measured["eval_cider_d"] == pytest.approx(100 * CiderD([r["captions"] for r in rows]).scores(said).mean())
    assert measured["eval_loss"] > 0 and measured["eval_vocabulary"] > 0


def test_convert_blip(blip, processor, pixel_values, tmp_path):
    blip.save_pretrained(tmp_path / "blip")
    processor.image_processor.save_pretrained(tmp_path / "blip")
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None  # BLIP's tokenizers name none
    tokenizer.save_pretrained(tmp_path / "blip")
    out = in_process("convert_blip", "--blip", "blip", "--output_dir", "converted", cwd=tmp_path)
    assert "says what blip says" in out
    converted = BlipRBMForConditionalGeneration.from_pretrained(tmp_path / "converted")
    again = BlipRBMProcessor.from_pretrained(tmp_path / "converted")
    settings = {"num_beams": 3, "max_new_tokens": 9}
    assert torch.equal(converted.generate(pixel_values, **settings), blip.generate(pixel_values, **settings)[:, :10])
    assert again.tokenizer.bos_token == "[DEC]"


@pytest.mark.slow
def test_onnx_runtime_says_the_same(saved_model, tmp_path):
    out = in_process("export_onnx", "--model", saved_model, "--output_dir", "onnx", cwd=tmp_path)
    assert "ONNX Runtime says what PyTorch says" in out and (tmp_path / "onnx" / "decode.onnx").exists()


def test_rerank_counts_what_it_chooses(monkeypatch, capsys):
    """Two images, three candidates each: what the score chooses is what CIDEr-D and vocabulary are of."""
    captions = [["a dog runs", "a dog", "an ibex"], ["a dog", "a dog runs", "a heron wades"]]
    cider = np.array([[0.3, 0.5, 0.2], [0.7, 0.4, 0.1]])
    parts = {name: np.zeros((2, 3)) for name in ("log_prob", "pmi", "overlap", "jaccard")}
    parts |= {"length": np.ones((2, 3)), "cider": np.array([[0.1, 0.4, 0.2], [0.3, 0.2, 0.1]])}
    parts["rarity"] = np.array([[0, 0, 2], [0, 0, 2]])
    monkeypatch.setattr(decoding_rule, "RARITY", (0.0, 0.07, 9.0))
    off = {name: values[0] for name, values in decoding_rule.RERANK_VALUES.items()} | decoding_rule.ALWAYS
    choices = decoding_rule.Choices(captions, parts, cider)
    first, common = choices.outcome(off), choices.outcome(off | {"rbm_rerank_cider": 1.0})
    assert first["cider"] == pytest.approx(50) and first["vocabulary"] == 3  # a, dog, runs
    assert common["cider"] == pytest.approx(60) and common["vocabulary"] == 2
    series = choices.with_rarity(common)
    assert [outcome["rbm_rerank_rarity"] for outcome in series] == [0.0, 0.07, 9.0]
    assert [outcome["vocabulary"] for outcome in series] == [2, 2, 5]  # an, ibex, a, heron, wades
    assert series[2]["cider"] == pytest.approx(15)
    assert tune_decoding.best_of_varied([series], 2) == series[0]
    other = [common | {"cider": 61, "vocabulary": words} for words in (3, 4)]
    assert tune_decoding.best_of_varied([series, other], 2.5) is other[0]
    assert tune_decoding.best_of_varied([series, other], 4.5) is series[2]
    assert tune_decoding.best_of_varied([other], 5) is other[1]
    assert "5 words was asked for, but none of these weights reaches it: 4 at most" in capsys.readouterr().out


def rerank_choices(rng, images: int, **informed):
    """Choices among five candidates of random CIDEr-D, of which each named part knows so much."""
    cider = rng.normal(1, 0.5, (images, 5))
    noise = lambda: rng.normal(0, 0.5, cider.shape)
    parts = {name: informed.get(name, 0.0) * cider + noise() for name in ("pmi", "cider", "overlap", "jaccard")}
    parts |= {"log_prob": noise(), "length": np.full(cider.shape, 7.0)}
    return decoding_rule.Choices([["a dog"] * 5] * images, parts, cider)


def test_a_weight_that_helps_is_found_and_others_stay_off():
    rng = np.random.default_rng(3)
    choices, fold = rerank_choices(rng, 307, cider=1.0), rng.integers(5, size=307)
    chosen, report = decoding_rule.simplest_rule([({"rbm_guidance": 0.0}, choices)], fold)
    assert chosen["rbm_rerank_cider"] > 0
    assert all(chosen[name] == 0 for name in ("rbm_rerank_pmi", "rbm_rerank_consensus", "rbm_guidance"))
    assert report[0]["below_best"] == 0 and all(len(rule["weights"]) <= 3 for rule in report)
    assert report[0]["cider_held_out"] <= report[0]["cider"] + 1e-3  # chosen on other images


def test_without_anything_to_know_no_weight_is_on():
    rng = np.random.default_rng(5)
    choices, fold = rerank_choices(rng, 211), rng.integers(5, size=211)
    chosen, _ = decoding_rule.simplest_rule([({"rbm_guidance": 0.0}, choices)], fold)
    assert (
        chosen
        == {"rbm_guidance": 0.0}
        | {name: v[0] for name, v in decoding_rule.RERANK_VALUES.items()}
        | decoding_rule.ALWAYS
    )


def test_guide_counts_as_a_weight():
    """Better candidates come from guide: it is on, and with `most_weights` 1 nothing else is."""
    rng = np.random.default_rng(7)
    plain, guided, fold = (
        rerank_choices(rng, 199, cider=1.0),
        rerank_choices(rng, 199, cider=1.0),
        rng.integers(5, size=199),
    )
    guided.cider += 0.9
    guides = [({"rbm_guidance": 0.0}, plain), ({"rbm_guidance": 0.3}, guided)]
    chosen, _ = decoding_rule.simplest_rule(guides, fold, most_weights=1)
    assert chosen["rbm_guidance"] == 0.3 and chosen["rbm_rerank_cider"] == 0
    chosen, _ = decoding_rule.simplest_rule(guides, fold)
    assert chosen["rbm_guidance"] == 0.3 and chosen["rbm_rerank_cider"] > 0
