"""BLIP-RBM against BLIP, against itself, and against the faults of BLIP in docs/blip-faults.md."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BlipForConditionalGeneration,
    BlipVisionConfig,
    CLIPVisionConfig,
    Dinov2Config,
    DynamicCache,
    EfficientNetConfig,
    EncoderDecoderCache,
)

from modeling_blip_rbm import BlipRBMForConditionalGeneration
from modeling_blip_rbm.rbm import free_energy, token_free_energy
from modeling_blip_rbm.vision_blip_rbm import pool_tokens, vision_tokens
from tests.conftest import RBM_SETTINGS, TEXT_CONFIG, VOCABULARY, randomise, tiny_config


DEC, SEP, PAD = VOCABULARY.index("[DEC]"), VOCABULARY.index("[SEP]"), 0
DECODING = {
    "greedy": {},
    "3 beams": {"num_beams": 3},
    "length penalty": {"num_beams": 3, "length_penalty": 2.0, "min_length": 5},
    "repetition penalty": {"repetition_penalty": 1.7, "max_new_tokens": 9},
    "3 of 5 beams": {"num_beams": 5, "num_return_sequences": 3},
}


def captions_of(sequences):
    """Token lists up to the first [SEP]: what follows is filled up, with [PAD] or [SEP] as transformers pleases."""
    rows = sequences.tolist()
    return [row[: row.index(SEP)] if SEP in row else row for row in rows]


def assert_same_tokens(ours, theirs):
    assert captions_of(ours) == captions_of(theirs)


# ---------------------------------------------------------------- converted BLIP = BLIP


@pytest.mark.parametrize("decoding", DECODING)
def test_converted_blip_gives_blips_tokens(blip, model, pixel_values, decoding):
    settings = DECODING[decoding]
    expected = blip.generate(pixel_values, **settings)
    assert len({tuple(row) for row in expected.tolist()}) > 1  # or the comparison would say little
    assert_same_tokens(model.generate(pixel_values, **settings), expected)


@pytest.mark.parametrize("decoding", ["greedy", "3 beams"])
def test_converted_blip_gives_blips_tokens_after_a_prompt(blip, model, pixel_values, decoding):
    prompt = torch.tensor([[VOCABULARY.index(w) for w in ("[CLS]", "a", "picture", "of", "[SEP]")]]).repeat(5, 1)
    expected = blip.generate(
        pixel_values, input_ids=prompt.clone(), attention_mask=torch.ones_like(prompt), **DECODING[decoding]
    )
    assert_same_tokens(model.generate(pixel_values, input_ids=prompt, **DECODING[decoding]), expected)


def test_converted_blip_gives_blips_logits(blip, model, pixel_values):
    ids = torch.randint(5, 40, (5, 11))
    expected = blip(pixel_values, ids).logits
    # these weights are large: they magnify the fused kernel's rounding in the tower a thousand times
    torch.testing.assert_close(model(pixel_values, ids).logits, expected, atol=5e-3, rtol=1e-2)
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(model(pixel_values, ids).logits, expected)


def test_from_blip_reads_a_folder(blip, pixel_values, tmp_path):
    blip.save_pretrained(tmp_path)
    model = BlipRBMForConditionalGeneration.from_blip(tmp_path, **RBM_SETTINGS)
    assert_same_tokens(model.generate(pixel_values), blip.generate(pixel_values))
    assert model.config.model_type == "blip_rbm" and model.config.rbm_word_ids == RBM_SETTINGS["rbm_word_ids"]


def test_interpolated_positions(blip, model):
    large = torch.randn(2, 3, 40, 40)
    expected = blip.generate(large, interpolate_pos_encoding=True)
    assert_same_tokens(model.generate(large, interpolate_pos_encoding=True), expected)


# ---------------------------------------------------------------- any vision tower

TOWERS = {
    "blip": BlipVisionConfig(
        hidden_size=22, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    ),
    "efficientnet": EfficientNetConfig(
        image_size=65, width_coefficient=0.3, depth_coefficient=0.2, hidden_dim=384, depthwise_padding=[]
    ),
    "dinov2": Dinov2Config(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7),
    "clip": CLIPVisionConfig(
        hidden_size=22, intermediate_size=29, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    ),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_any_vision_tower(tower, tmp_path):
    config = tiny_config(vision_config=TOWERS[tower].to_dict())
    model = randomise(BlipRBMForConditionalGeneration(config), std=0.05)
    size = config.vision_config.image_size
    pixel_values = torch.randn(3, 3, size, size)
    tokens = vision_tokens(model.vision_model(pixel_values))
    assert tokens.dim() == 3
    if tower == "efficientnet":  # a feature map, row by row
        feature_map = model.vision_model(pixel_values).last_hidden_state
        torch.testing.assert_close(tokens[:, 1], feature_map[:, :, 0, 1])
    assert (model.projector is None) == (tower == "blip")
    model.generation_config.rbm_guidance = 0.5
    captions = model.generate(pixel_values, num_beams=3)
    cached = model.generate(vision_hidden_states=tokens, num_beams=3)
    assert torch.equal(captions, cached)
    model.save_pretrained(tmp_path)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again.vision_model) is type(model.vision_model)
    assert again.config.num_image_tokens == model.config.num_image_tokens
    assert torch.equal(again.generate(pixel_values, num_beams=3), captions)


def test_pooling():
    tokens = torch.randn(5, 7, 11)
    torch.testing.assert_close(pool_tokens(tokens, "mean"), tokens.mean(1))
    pooled = pool_tokens(tokens, "cls_mean")
    torch.testing.assert_close(pooled[:, :11], tokens[:, 0])
    torch.testing.assert_close(pooled[:, 11:], tokens[:, 1:].mean(1))
    pooled = pool_tokens(tokens, "mean_max")
    torch.testing.assert_close(pooled[:, :11], tokens.mean(1))
    torch.testing.assert_close(pooled[:, 11:], tokens.max(1).values)
    assert tiny_config(rbm_pooling="mean_max").rbm_visible_size == 44


def test_rbm_of_tokens(model, pixel_values, tmp_path):
    """Its hidden input and free energy are those of the tower's tokens; `word_map` says where a word's causes are."""
    whole = randomise(BlipRBMForConditionalGeneration(tiny_config(rbm_pooling="tokens")))
    rbm, word_ids = whole.rbm_layer.rbm, whole.config.rbm_word_ids
    rbm.image_mean.normal_(), rbm.image_std.uniform_(0.5, 2.0)
    tokens = whole.vision_hidden_states(pixel_values).detach()  # (5, 10, 22): a class token and 3 x 3
    x, p = (tokens - rbm.image_mean) / rbm.image_std, rbm.parameters_fp32
    A = p.c + (x * (-p.log_var).exp()) @ p.W
    a = A.exp().mean(1).log()
    torch.testing.assert_close(whole.encode_image(pixel_values).hidden_input, a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.image_free_energy(pixel_values), token_free_energy(p, x), rtol=1e-4, atol=1e-3)
    mean = torch.zeros_like(x[:1])
    of_image, of_mean = (token_free_energy(p, y) - token_free_energy(p._replace(W=0 * p.W), y) for y in (x, mean))
    relative = whole.image_relative_free_energy(pixel_values)
    torch.testing.assert_close(relative, of_image - of_mean, rtol=1e-3, atol=1e-3)
    assert torch.equal(whole.image_energy(pixel_values), relative)
    found = whole.word_map(pixel_values, word_ids[3:5])
    assert found.shape == (5, 2, 10)
    said = torch.sigmoid(a[:, None] + p.U[3:5]) - torch.sigmoid(a)[:, None]
    torch.testing.assert_close(found.sum(-1), said.sum(-1), rtol=1e-4, atol=1e-4)
    assert whole.word_map(vision_hidden_states=tokens, words=[]).shape == (5, 0, 10)
    with pytest.raises(ValueError, match=r"does not know the tokens \[28\]"):
        whole.word_map(pixel_values, [28])
    with pytest.raises(ValueError, match="rbm_pooling is 'cls_mean': train one with .*--pooling tokens"):
        model.word_map(pixel_values, word_ids[:1])
    whole.save_pretrained(tmp_path)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again.word_map(pixel_values, word_ids[3:5]), found)
    again.generate(pixel_values, rbm_guidance=0.5, rbm_rerank=True, rbm_rerank_pmi=0.1, num_beams=2, max_new_tokens=4)


def test_rbm_that_does_not_fit_the_encoder():
    with pytest.raises(ValueError, match="rbm_visible_size is 13, but tokens of width 22.*give 44 units"):
        tiny_config(rbm_visible_size=13)
    with pytest.raises(ValueError, match="rbm_visible_size is 13, but tokens of width 384 .* efficientnet"):
        BlipRBMForConditionalGeneration(tiny_config(vision_config=TOWERS["efficientnet"], rbm_visible_size=13))


def test_wrong_image_size_for_the_projector():
    model = BlipRBMForConditionalGeneration(tiny_config(vision_config=TOWERS["efficientnet"])).eval()
    with pytest.raises(ValueError, match="gave 9 tokens an image, but the model was built for 4"):
        model.generate(torch.randn(1, 3, 97, 97))


# ---------------------------------------------------------------- loss


def caption_batch():
    ids = torch.tensor(
        [[DEC, 5, 13, 20, SEP, PAD, PAD], [DEC, 5, 14, 21, 8, 22, SEP], [DEC, 6, 15, SEP, PAD, PAD, PAD]]
    )
    return ids, (ids != PAD).long()


def test_pads_do_not_count(model, pixel_values):
    ids, mask = caption_batch()
    pixel_values = pixel_values[:3]
    longer = torch.nn.functional.pad(ids, (0, 4))
    loss = model(pixel_values, ids, mask, labels=ids).loss
    more_pads = model(pixel_values, longer, (longer != PAD).long(), labels=longer).loss
    torch.testing.assert_close(loss, more_pads)
    by_hand = []
    for i in range(3):
        row = ids[i, mask[i].bool()][None]
        logits = model(pixel_values[i : i + 1], row).logits
        by_hand.append(torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="none"))
    torch.testing.assert_close(loss, torch.cat(by_hand).mean())


def test_labels_alone(model, pixel_values):
    ids, mask = caption_batch()
    expected = model(pixel_values[:3], ids, mask, labels=ids).loss
    torch.testing.assert_close(model(pixel_values[:3], labels=ids.masked_fill(ids == PAD, -100)).loss, expected)
    torch.testing.assert_close(model(pixel_values[:3], labels=ids).loss, expected)
    with pytest.raises(ValueError, match="pass input_ids as well"):
        model(pixel_values[:3], labels=ids.index_fill(1, torch.tensor([2]), -100))


def test_masked_prompt_does_not_count(model, pixel_values):
    ids = torch.tensor([[DEC, 5, 13, 20, SEP]])
    labels = ids.masked_fill(torch.arange(5) < 3, -100)
    logits = model(pixel_values[:1], ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, 2:-1], ids[0, 3:])
    torch.testing.assert_close(model(pixel_values[:1], ids, labels=labels).loss, expected)


def test_label_smoothing_of_the_config(model, pixel_values):
    ids, mask = caption_batch()
    plain = model(pixel_values[:3], ids, mask, labels=ids)
    model.config.text_config.label_smoothing = 0.1
    counted = mask[:, 1:].bool()
    uniform = -plain.logits[:, :-1].log_softmax(-1).mean(-1)[counted].mean()
    smoothed = model(pixel_values[:3], ids, mask, labels=ids).loss
    torch.testing.assert_close(smoothed, 0.9 * plain.loss + 0.1 * uniform)


def test_inputs_are_not_changed(model, pixel_values):
    ids, mask = caption_batch()
    ids[:, 0] = VOCABULARY.index("[CLS]")
    inputs = {"pixel_values": pixel_values[:3], "input_ids": ids, "attention_mask": mask}
    before = {name: value.clone() for name, value in inputs.items()}
    model.generate(**inputs, num_beams=3, rbm_guidance=0.3, rbm_rerank=True)
    model(**inputs, labels=inputs["input_ids"])
    model(inputs["pixel_values"], labels=inputs["input_ids"])
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


def test_gradient_checkpointing_gives_the_same_gradients(model, pixel_values):
    ids, mask = caption_batch()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.train()  # no dropout in this config
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixel_values[:3], ids, mask, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 50 and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---------------------------------------------------------------- generate


def test_prompts_of_different_lengths(model, pixel_values, processor):
    prompts = ["a dog", "a picture of the red ball on", "the"]
    batch = processor(images=None, text=prompts, as_prompt=True)
    for settings in ({}, {"num_beams": 3}, {"rbm_guidance": 0.5, "num_beams": 3}):
        together = model.generate(pixel_values[:3], **batch, max_new_tokens=7, **settings)
        for i, prompt in enumerate(prompts):
            alone = model.generate(
                pixel_values[i : i + 1], **processor(text=prompt, as_prompt=True), max_new_tokens=7, **settings
            )
            assert processor.captions(together[i : i + 1]) == processor.captions(alone)


def test_prompts_padded_on_either_side_with_sep(model, pixel_values):
    left = torch.tensor([[PAD, PAD, DEC, 5, 13], [DEC, 6, 14, 20, 8]])
    right = torch.tensor([[DEC, 5, 13, SEP, PAD, PAD], [DEC, 6, 14, 20, 8, SEP]])
    assert torch.equal(model.generate(pixel_values[:2], left), model.generate(pixel_values[:2], right))


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 3, "rbm_guidance": 0.4}, {"rbm_rerank": True}]
)
def test_batch_is_alone(model, pixel_values, settings):
    model.generation_config.rbm_rerank_consensus = model.generation_config.rbm_rerank_pmi = 0.3
    together = model.generate(pixel_values, **settings)
    for i in range(len(pixel_values)):
        assert_same_tokens(model.generate(pixel_values[i : i + 1], **settings), together[i : i + 1])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_cached_is_uncached(model, pixel_values, settings):
    fast = model.generate(pixel_values, rbm_guidance=0.4, use_cache=True, **settings)
    assert torch.equal(fast, model.generate(pixel_values, rbm_guidance=0.4, use_cache=False, **settings))


def test_generation_config_is_honoured(model, pixel_values):
    model.generation_config.max_new_tokens = 3
    assert model.generate(pixel_values).shape[1] <= 4


def test_end_and_pad_tokens_may_be_given(model, pixel_values):
    plain = model.generate(pixel_values)
    end = plain[0, 2].item()
    out = model.generate(pixel_values, eos_token_id=end, pad_token_id=1)
    ended = out[0].tolist().index(end)
    assert ended <= 2 and (out[0, ended + 1 :] == 1).all()


def test_image_tokens_may_be_masked(model, pixel_values):
    tokens = vision_tokens(model.vision_model(pixel_values))
    mask = torch.ones(tokens.shape[:2], dtype=torch.long)
    assert torch.equal(model.generate(pixel_values, encoder_attention_mask=mask), model.generate(pixel_values))
    mask[:, 3:] = 0
    ids = torch.full((5, 1), DEC)
    masked = model(pixel_values, ids, encoder_attention_mask=mask).logits
    cut = model(image_embeds=tokens[:, :3], input_ids=ids).logits
    torch.testing.assert_close(masked, cut, atol=1e-4, rtol=1e-4)


def test_cross_attentions_on_request(model, pixel_values):
    out = model(pixel_values, torch.randint(5, 40, (5, 11)), output_attentions=True)
    assert len(out.cross_attentions) == 3 and out.cross_attentions[0].shape == (5, 4, 11, 10)


def test_prompt_longer_than_the_context(model, pixel_values):
    with pytest.raises(ValueError, match="the prompt has 40 tokens, but the decoder's context has 31"):
        model.generate(pixel_values[:1], torch.full((1, 40), 5))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_captions_end_where_the_context_does(model, pixel_values, settings):
    assert model.generate(pixel_values, max_new_tokens=256, **settings).shape[1] <= 31


def test_image_is_encoded_once(model, pixel_values):
    images = []
    model.vision_model.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    model.generate(pixel_values, num_beams=3, rbm_rerank=True, rbm_guidance=0.2)
    assert sum(images) == len(pixel_values)


def test_refine_changes_captions_only_when_its_gate_opens(model, pixel_values):
    plain = model.generate(pixel_values, rbm=False)
    assert torch.equal(model.generate(pixel_values), plain)
    with torch.no_grad():
        model.rbm_layer.gate.fill_(2.0)
        model.rbm_layer.shift.weight.normal_()
    assert not torch.equal(model.generate(pixel_values), plain)
    assert torch.equal(model.generate(pixel_values, rbm=False), plain)


def test_an_rbm_of_tokens_refines_each_token_by_its_own_causes(blip, pixel_values):
    model = BlipRBMForConditionalGeneration.from_blip(blip, **RBM_SETTINGS, rbm_pooling="tokens")
    randomise(model.rbm_layer)
    plain = model.encode_image(pixel_values, rbm=False).image_embeds
    with torch.no_grad():
        model.rbm_layer.gate.fill_(0.7)
        refined, hidden_input = model.encode_image(pixel_values)
        rbm = model.rbm_layer.rbm
        for place in (0, 4):  # a token alone: its own causes are those of an image that has no other
            own = rbm(plain[:, place : place + 1])
            expected = plain[:, place] + 0.7 * model.rbm_layer.shift(torch.sigmoid(own))
            torch.testing.assert_close(refined[:, place], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden_input, model.encode_image(pixel_values, rbm=False).hidden_input)


def test_cause_tokens_stand_beside_the_images(blip, pixel_values, tmp_path):
    model = BlipRBMForConditionalGeneration.from_blip(blip, **RBM_SETTINGS, rbm_cause_tokens=3)
    randomise(model.rbm_layer)
    plain = model.encode_image(pixel_values, rbm=False).image_embeds
    with torch.no_grad():
        model.rbm_layer.gate.zero_()
    assert torch.equal(model.encode_image(pixel_values).image_embeds, plain)  # the identity at the start
    with torch.no_grad():
        model.rbm_layer.gate.fill_(0.7)
    refined, hidden_input = model.encode_image(pixel_values)
    assert refined.shape == (5, plain.shape[1] + 3, plain.shape[2])
    q = torch.sigmoid(hidden_input)
    torch.testing.assert_close(refined[:, : plain.shape[1]], plain + 0.7 * model.rbm_layer.shift(q)[:, None])
    torch.testing.assert_close(refined[:, plain.shape[1] :].flatten(1), 0.7 * model.rbm_layer.causes(q))
    captions = model.generate(pixel_values, num_beams=3, max_new_tokens=7)
    uncached = model.generate(pixel_values, num_beams=3, max_new_tokens=7, use_cache=False)
    assert captions_of(captions) == captions_of(uncached)
    model.save_pretrained(tmp_path)
    loaded = BlipRBMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert captions_of(loaded.generate(pixel_values, num_beams=3, max_new_tokens=7)) == captions_of(captions)
    with pytest.raises(ValueError, match="rbm_cause_tokens is -1"):
        tiny_config(rbm_cause_tokens=-1)


def test_confidence_is_a_logistic_function_of_the_evidence(model, pixel_values):
    encoding = model.encode_image(pixel_values)
    sequences = model.generate(encoding=encoding, num_beams=3, num_return_sequences=2, max_new_tokens=7)
    evidence = model.caption_evidence(encoding, sequences)
    log_prob, length = model.score_captions(encoding, sequences)
    torch.testing.assert_close(evidence[:, 0], log_prob / length)
    parts = model.candidate_parts(encoding, sequences)
    torch.testing.assert_close(evidence[:, 1], parts["pmi"].flatten())
    with pytest.raises(ValueError, match="rbm_confidence is None"):
        model.confidence(evidence)
    model.config.rbm_confidence = [0.3, 1.7, -0.2]
    expected = torch.sigmoid(0.3 + 1.7 * evidence[:, 0] - 0.2 * evidence[:, 1])
    torch.testing.assert_close(model.confidence(evidence), expected)
    with pytest.raises(ValueError, match="rbm_confidence is "):
        tiny_config(rbm_confidence=[1.0, 2.0])


def test_fused_attention_of_the_tower_is_blips(blip, model, pixel_values, tmp_path):
    expected = blip.vision_model(pixel_values)[0]
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model.vision_model(pixel_values)[0], expected)
    asked = model.vision_model(pixel_values, output_attentions=True)
    theirs = blip.vision_model(pixel_values, output_attentions=True)
    for ours, their in zip(asked.attentions, theirs.attentions):
        torch.testing.assert_close(ours, their)
    model.save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        loaded = BlipRBMForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.config._attn_implementation == implementation
        torch.testing.assert_close(loaded.eval().vision_model(pixel_values)[0], expected)


def test_gate_and_shift_learn(model, pixel_values):
    ids, mask = caption_batch()
    model(pixel_values[:3], ids, mask, labels=ids).loss.backward()
    assert model.rbm_layer.gate.grad.abs().item() > 0


def test_scores_are_log_probabilities(model, pixel_values):
    encoding = model.encode_image(pixel_values)
    out = model.generate(
        pixel_values,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    log_prob, length = model.score_captions(encoding, out.sequences)
    torch.testing.assert_close(log_prob, out.sequences_scores, atol=1e-4, rtol=1e-4)
    assert length.tolist() == [min(len(row), out.sequences.shape[1] - 1) for row in captions_of(out.sequences)]


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True, "num_beams": 1}, {"num_beams": 2, "do_sample": True}]
)
def test_rerank_scores_what_decoding_computed(model, pixel_values, settings, monkeypatch):
    """log P of the candidates from the logits of decoding: as decoding them once more gives it; of the tokens after the prompt."""
    encoding, seen = model.encode_image(pixel_values), []
    of_outputs = model._score_generated
    monkeypatch.setattr(
        model,
        "_score_generated",
        lambda outputs, *args, **kw: seen.append((outputs, of_outputs(outputs, *args, **kw))) or seen[-1][1],
    )
    for prompt in (None, torch.tensor([[DEC, 41, 29]] * 5)):
        model.generate(
            encoding=encoding, input_ids=prompt, rbm_rerank=True, rbm_guidance=0.7, max_new_tokens=7, repetition_penalty=1.3,
            num_return_sequences=2, **settings,
        )  # fmt: skip
        outputs, (log_prob, length) = seen.pop()
        expected, tokens = model.score_captions(encoding, outputs.sequences)
        if prompt is not None:
            of_prompt = model.score_captions(encoding, prompt)
            n = len(expected) // 5
            expected = expected - of_prompt[0].repeat_interleave(n)
            tokens = tokens - of_prompt[1].repeat_interleave(n)
        torch.testing.assert_close(log_prob, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(length, tokens)


def test_rerank_returns_the_best_candidates_in_order(model, pixel_values):
    model.generation_config.rbm_rerank_candidates = 7
    model.generation_config.rbm_rerank_pmi, model.generation_config.rbm_rerank_consensus = 0.7, 2.0
    encoding = model.encode_image(pixel_values)
    candidates = model.generate(pixel_values, num_beams=7, num_return_sequences=7)
    scores = model.candidate_scores(encoding, candidates)
    out = model.generate(
        pixel_values, rbm_rerank=True, num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    )
    best = scores.topk(2, dim=1)
    torch.testing.assert_close(out.rerank_scores, best.values.flatten(), atol=1e-4, rtol=1e-4)
    assert out.logits is None  # were not asked for
    rows = (best.indices + 7 * torch.arange(5)[:, None]).flatten()
    assert_same_tokens(out.sequences, candidates[rows])
    assert len(out.sequences_scores) == len(out.sequences)
    assert not torch.equal(best.indices[:, 0], torch.zeros(5, dtype=torch.long))  # it did choose otherwise somewhere


def test_samples_are_drawn_by_one_number_a_row(model, pixel_values, monkeypatch):
    """Samples do not go by `torch.multinomial`, have the temperature asked for, and differ; their scores are still to be had."""
    monkeypatch.setattr(torch, "multinomial", None)
    settings = {"do_sample": True, "rbm": False, "max_new_tokens": 7}
    first, second = (model.generate(pixel_values, **settings, num_return_sequences=7) for _ in range(2))
    assert not torch.equal(first, second)
    cold = model.generate(pixel_values, **settings, temperature=1e-4)
    assert_same_tokens(cold, model.generate(pixel_values, rbm=False, max_new_tokens=7))
    monkeypatch.undo()
    torch.manual_seed(1)
    out = model.generate(pixel_values, **settings, return_dict_in_generate=True, output_scores=True)
    assert all(torch.isfinite(scores).sum() > len(scores) for scores in out.scores)


def test_rerank_of_samples(model, pixel_values):
    torch.manual_seed(1)
    out = model.generate(pixel_values, rbm_rerank=True, do_sample=True, num_return_sequences=3)
    assert out.shape[0] == 15


def test_rbm_without_words(blip, pixel_values):
    model = BlipRBMForConditionalGeneration.from_blip(blip)
    assert torch.equal(model.generate(pixel_values), blip.generate(pixel_values))
    with pytest.raises(ValueError, match="rbm_word_ids is empty"):
        model.generate(pixel_values, rbm_guidance=0.1)


def test_image_words_and_free_energy(model, pixel_values):
    encoding = model.encode_image(pixel_values)
    prob, ids = model.image_words(encoding.hidden_input, top_k=4)
    assert prob.shape == ids.shape == (5, 4) and (prob.diff(dim=1) <= 0).all()
    assert set(ids.flatten().tolist()) <= set(RBM_SETTINGS["rbm_word_ids"])
    p = model.rbm_layer.rbm.parameters_fp32
    rbm, column = model.rbm_layer.rbm, RBM_SETTINGS["rbm_word_ids"].index(ids[0, 0].item())
    x = rbm.standardise(pool_tokens(vision_tokens(model.vision_model(pixel_values)), "cls_mean"))
    word, none = torch.zeros(5, 11), torch.zeros(5, 11)
    word[:, column] = 1.0
    exact = torch.sigmoid(rbm.free_energy(x, none) - rbm.free_energy(x, word))
    torch.testing.assert_close(prob[0, 0], exact[0], atol=1e-4, rtol=1e-4)
    assert p.U is not None
    torch.testing.assert_close(model.image_free_energy(pixel_values), rbm.free_energy(x))
    relative = rbm.free_energy(x) - free_energy(p._replace(W=0 * p.W), x)  # the average image's input is c
    torch.testing.assert_close(model.image_relative_free_energy(pixel_values), relative, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.image_energy(pixel_values), model.image_free_energy(pixel_values))


# ---------------------------------------------------------------- weights on disk


def test_save_and_load(model, pixel_values, tmp_path):
    with torch.no_grad():
        model.rbm_layer.gate.fill_(0.3)
        model.rbm_layer.rbm.image_mean.normal_()
        model.rbm_layer.rbm.image_std.uniform_(0.5, 2.0)
    ids = torch.randint(5, 40, (5, 11))
    model.save_pretrained(tmp_path)
    again = BlipRBMForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(pixel_values, ids).logits, model(pixel_values, ids).logits, rtol=0, atol=0)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(a, b), name


def test_checkpoint_without_rbm_weights_is_named_and_is_the_identity(blip, pixel_values, tmp_path, caplog):
    blip.save_pretrained(tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = BlipRBMForConditionalGeneration.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert "has no RBM weights (rbm_layer.gate" in caplog.text and "identity" in caplog.text
    for name, tensor in model.rbm_layer.state_dict().items():
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 2, name
    assert model.rbm_layer.gate.item() == 0 and (model.rbm_layer.rbm.image_std == 1).all()
    assert_same_tokens(model.generate(pixel_values), blip.generate(pixel_values))


def test_nan_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["rbm_layer.rbm.word_weight"][2, 3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="NaN or infinite values in rbm_layer.rbm.word_weight"):
        BlipRBMForConditionalGeneration.from_pretrained(tmp_path)


def test_every_rbm_parameter_is_initialised():
    model = BlipRBMForConditionalGeneration(tiny_config())
    rbm = model.rbm_layer.rbm
    assert 0.005 < rbm.image_weight.std() < 0.02 and rbm.word_weight.std() > 0.005
    for name in ("hidden_bias", "word_bias", "image_bias", "image_log_var", "image_mean"):
        assert (getattr(rbm, name) == 0).all()
    assert (rbm.image_std == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_rbm_in_fp32(model, pixel_values, tmp_path, dtype):
    model.save_pretrained(tmp_path)
    half = BlipRBMForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert half.text_decoder.dtype == dtype
    encoding = half.encode_image(pixel_values)
    assert encoding.image_embeds.dtype == dtype and encoding.hidden_input.dtype == torch.float32
    half.generate(pixel_values, num_beams=3, rbm_guidance=0.3, rbm_rerank=True)


def test_a_model_that_is_no_captioner_is_refused(blip):
    blip.extra = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="without a counterpart: extra"):
        BlipRBMForConditionalGeneration.from_blip(blip)


def test_stock_blip_still_loads_from_its_own_config(blip, tmp_path):
    blip.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "blip"
    assert isinstance(BlipForConditionalGeneration.from_pretrained(tmp_path), BlipForConditionalGeneration)
    assert TEXT_CONFIG["vocab_size"] == len(VOCABULARY)


# ---------------------------------------------------------------- the image's keys and values


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 5, "num_return_sequences": 2}, {}])
def test_image_cache_is_of_images_not_of_beams(model, pixel_values, settings):
    """Same tokens and scores as with transformers' cache, at a fraction of its size."""
    model, pixel_values = model.double(), pixel_values.double()  # two ways of computing it, which round differently
    encoding = model.encode_image(pixel_values, rbm=False)
    settings |= {"rbm": False, "max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
    ours = model.generate(encoding=encoding, **settings)
    stock = model.generate(
        encoding=encoding, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), **settings
    )
    assert torch.equal(ours.sequences, stock.sequences)
    for a, b in zip(ours.scores, stock.scores):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    rows = [output.past_key_values.cross_attention_cache.layers[0].keys.shape[0] for output in (ours, stock)]
    assert rows == [len(pixel_values), len(pixel_values) * settings.get("num_beams", 1)]


def test_image_mask_a_row_with_beams(model, pixel_values):
    encoding = model.encode_image(pixel_values, rbm=False)
    mask = torch.ones(encoding.image_embeds.shape[:2], dtype=torch.long)
    mask[0, 3:] = 0
    settings = {"rbm": False, "num_beams": 3, "max_new_tokens": 7, "encoder_attention_mask": mask}
    ours = model.generate(encoding=encoding, **settings)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(ours, model.generate(encoding=encoding, past_key_values=cache, **settings))


# ---------------------------------------------------------------- several captions by sampled causes


def test_captions_by_sampled_causes_differ(model, pixel_values):
    settings = {"rbm_guidance": 0.1, "num_beams": 2, "num_return_sequences": 5, "max_new_tokens": 7}
    model.generation_config.rbm_guidance_clip = 100.0
    torch.manual_seed(0)
    varied = model.generate(pixel_values, rbm_diversity=20.0, **settings)
    assert len(varied) == 5 * len(pixel_values)
    assert len({tuple(row) for row in captions_of(varied)[:5]}) > 1
    torch.manual_seed(0)
    assert torch.equal(varied, model.generate(pixel_values, rbm_diversity=20.0, **settings))
    settings["num_return_sequences"] = 1
    almost = model.generate(pixel_values, rbm_diversity=1e-9, **settings)
    assert_same_tokens(almost, model.generate(pixel_values, rbm_rerank=False, **settings))
