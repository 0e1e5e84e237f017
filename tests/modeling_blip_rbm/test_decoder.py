"""The lean way through the text decoder: BLIP's own numbers, whatever is masked, shared or cached."""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from modeling_blip_rbm import decoder_blip_rbm, modeling_blip_rbm
from modeling_blip_rbm.decoder_blip_rbm import IMAGES_AT_ONCE, ImageCache, decode
from modeling_blip_rbm.modeling_blip_rbm import attention_by_blocks


IMAGES, ROWS = 2, 3  # rows of text an image


@pytest.fixture
def image_embeds(model):
    model.double()
    return torch.randn(IMAGES, 7, model.config.text_config.encoder_hidden_size, dtype=torch.float64)


def in_steps(forward, ids, mask, steps):
    """Hidden states (R, T, D) of tokens that come so many at a time; `forward` sees the mask of all that have come."""
    start, states = 0, []
    for step in steps:
        states.append(forward(ids[:, start : start + step], mask[:, : start + step]))
        start += step
    return torch.cat(states, 1)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(11,), (5, 1, 1, 1, 1, 1, 1), (1, 3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_states_are_blips(model, image_embeds, steps, masked):
    """With pads on the left, some image tokens masked, an image's rows sharing it; against BLIP with the image repeated."""
    bert = model.text_decoder.bert
    ids, mask = torch.randint(5, 40, (IMAGES * ROWS, 11)), torch.ones(IMAGES * ROWS, 11, dtype=torch.long)
    image_mask = None
    if masked:
        mask[1, :2] = mask[4, :1] = 0
        image_mask = torch.ones(IMAGES, 7, dtype=torch.long)
        image_mask[1, 3:] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)

    ours, theirs = ImageCache(model.text_decoder, image_embeds), EncoderDecoderCache(DynamicCache(), DynamicCache())

    def positions(seen, new):
        return position_ids[:, seen.shape[1] - new.shape[1] : seen.shape[1]]

    def lean(new, seen):
        return decode(bert, new, ours, seen, positions(seen, new), image_mask)

    def blip(new, seen):
        return bert(
            new,
            attention_mask=seen,
            position_ids=positions(seen, new),
            encoder_hidden_states=image_embeds.repeat_interleave(ROWS, 0),
            encoder_attention_mask=None if image_mask is None else image_mask.repeat_interleave(ROWS, 0),
            past_key_values=theirs,
            use_cache=True,
            is_decoder=True,
        ).last_hidden_state

    # what a pad itself becomes nobody reads
    counted = mask.bool()
    expected = in_steps(blip, ids, mask, steps)
    if (
        masked
    ):  # BLIP reads the image's mask under another name, see ImageCrossAttention: without it there is a difference
        unmasked = decode(bert, ids, ImageCache(model.text_decoder, image_embeds), mask, position_ids)
        assert not torch.allclose(unmasked[counted], expected[counted], atol=1e-3)
    torch.testing.assert_close(in_steps(lean, ids, mask, steps)[counted], expected[counted])
    assert ours.get_seq_length() == 11


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_steps_in_bf16_are_near(model, image_embeds, masked):
    """One token at a time attends in another way in bf16: to the same tokens, with the same weights."""
    ids, mask = torch.randint(5, 40, (IMAGES * ROWS, 11)), torch.ones(IMAGES * ROWS, 11, dtype=torch.long)
    if masked:
        mask[1, :2] = mask[4, :1] = 0
    states = {}
    for dtype in (torch.float64, torch.bfloat16):
        model.to(dtype)
        cache = ImageCache(model.text_decoder, image_embeds.to(dtype))
        forward = lambda new, seen, cache=cache: decode(model.text_decoder.bert, new, cache, seen)
        states[dtype] = in_steps(forward, ids, mask, (3, *[1] * 8))[mask.bool()].double()
    distance = (states[torch.bfloat16] - states[torch.float64]).norm() / states[torch.float64].norm()
    assert distance < 0.1  # 0.03 and 0.09 with the fused kernel


@torch.no_grad()
def test_no_mask_is_a_mask_of_ones(model, image_embeds):
    ids, bert = torch.randint(5, 40, (IMAGES, 5)), model.text_decoder.bert
    caches = [ImageCache(model.text_decoder, image_embeds) for _ in range(3)]
    ones = decode(bert, ids, caches[0], torch.ones_like(ids))
    torch.testing.assert_close(decode(bert, ids, caches[1]), ones)
    added = torch.zeros(IMAGES, 1, 5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), -1e30)
    torch.testing.assert_close(decode(bert, ids, caches[2], added), ones)


def test_generate_takes_the_lean_way_and_training_does_not(model, pixel_values, monkeypatch):
    calls = []
    monkeypatch.setattr(modeling_blip_rbm, "decode", lambda *args: calls.append(1) or decoder_blip_rbm.decode(*args))
    model.generate(pixel_values, max_new_tokens=5, min_new_tokens=5)
    assert len(calls) == 5
    model(pixel_values, labels=torch.randint(5, 40, (len(pixel_values), 5)))
    recorded = model.generate(
        pixel_values, max_new_tokens=5, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(calls) == 5 and recorded.attentions[0] is not None and recorded.hidden_states[0] is not None


@pytest.mark.parametrize("block", [3, 13, 1000])
def test_attention_by_blocks_is_attention(block):
    query, key, value = (torch.randn(2, 3, 13, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = ((0.25 * query @ key.transpose(2, 3)).softmax(-1) @ value).transpose(1, 2)
    ours = attention_by_blocks(query, key, value, 0.25, block)
    torch.testing.assert_close(ours, expected)
    weight = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, (query, key, value), weight),
        torch.autograd.grad(expected, (query, key, value), weight),
    ):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_the_tower_takes_the_attention_that_pays_in_half_precision(model, pixel_values, monkeypatch, fused):
    calls, pixel_values = [], pixel_values[:3]
    monkeypatch.setattr(
        modeling_blip_rbm, "fused_attention_pays", lambda dtype, threads: fused or dtype == torch.float32
    )
    monkeypatch.setattr(
        modeling_blip_rbm, "attention_by_blocks", lambda *args: calls.append(1) or attention_by_blocks(*args)
    )
    expected = model.encode_image(pixel_values).image_embeds
    assert not calls
    half = model.to(torch.bfloat16).encode_image(pixel_values.to(torch.bfloat16)).image_embeds
    assert len(calls) == (0 if fused else len(model.vision_model.encoder.layers))
    assert (half - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_the_tower_in_half_precision_is_as_near_as_blips(blip, model, pixel_values):
    expected = blip.vision_model(pixel_values)[0]
    ours, theirs = model.bfloat16(), blip.bfloat16()
    errors = [(half.vision_model(pixel_values.bfloat16())[0] - expected).norm() for half in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1]


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_images_that_beam_search_is_done_with_are_left_out(model, masked):
    """Step by step, beams reordered: the rows of the images that are left are those of a cache that keeps all."""
    images, bert = 5, model.double().text_decoder.bert
    image_embeds = torch.randn(images, 7, model.config.text_config.encoder_hidden_size, dtype=torch.float64)
    first = torch.randint(5, 40, (images * ROWS, 3))
    mask = torch.ones(images * ROWS, 3, dtype=torch.long)
    image_mask = torch.ones(images, 7, dtype=torch.long) if masked else None
    if masked:
        mask[1, :2] = mask[13, :1] = 0
        image_mask[1, 3:] = image_mask[4, 5:] = 0
    ours, whole = (ImageCache(model.text_decoder, image_embeds) for _ in range(2))
    decode(bert, first, ours, mask, image_mask=image_mask), decode(bert, first, whole, mask, image_mask=image_mask)
    for going_on in (
        [1, 1, 1, 1, 1],
        [0, 1, 1, 0, 1],
        [0, 1, 1, 0, 1],
        [0, 1, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
    ):
        order = (torch.randint(0, ROWS, (images, ROWS)) + ROWS * torch.arange(images)[:, None]).flatten()
        ours.reorder_cache(order), whole.reorder_cache(order)
        mask, ids = torch.cat([mask[order], mask.new_ones(images * ROWS, 1)], 1), torch.randint(5, 40, (len(order), 1))
        ours.going_on = torch.tensor(going_on, dtype=torch.bool)[:, None]
        states = decode(bert, ids, ours, mask, image_mask=image_mask)
        expected = decode(bert, ids, whole, mask, image_mask=image_mask)
        left = torch.tensor(going_on if any(going_on) else [0, 0, 0, 0, 1], dtype=torch.bool).repeat_interleave(ROWS)
        assert len(states) == left.sum()
        torch.testing.assert_close(ours.all_rows(states), expected * left[:, None, None])


@pytest.mark.parametrize(
    "settings",
    [
        {"rbm": False},
        {"rbm_guidance": 0.4, "rbm_rerank": True},
        {"num_beams": 5},
        {"rbm_diversity": 0.8, "num_return_sequences": 3},  # several searches an image
    ],
)
def test_captions_are_the_same_without_images_that_are_done(model, pixel_values, monkeypatch, settings):
    settings = {"num_beams": 3, "max_new_tokens": 19, "return_dict_in_generate": True} | settings
    with torch.no_grad():  # so that captions end, some sooner than others
        model.text_decoder.cls.predictions.decoder.bias[model.config.text_config.sep_token_id] += 4
    rows = []

    def generate(**more):
        torch.manual_seed(3)  # causes are sampled
        return model.generate(pixel_values, **settings, **more)

    monkeypatch.setattr(modeling_blip_rbm, "decode", lambda *args: rows.append(len(states := decode(*args))) or states)
    ours = generate()
    assert min(rows[1:]) < max(rows[1:])
    with_attentions = generate(output_attentions=True)  # BLIP's own way, of all rows
    monkeypatch.setattr(ImageCache, "leave_out_finished", lambda self: None)
    rows.clear()
    whole = generate()
    assert min(rows[1:]) == max(rows[1:])
    assert torch.equal(ours.sequences, whole.sequences) and torch.equal(with_attentions.sequences, whole.sequences)
    torch.testing.assert_close(ours.sequences_scores, whole.sequences_scores)


def test_a_search_that_fails_leaves_nothing_behind(model, pixel_values):
    def fail(input_ids, scores):
        raise RuntimeError("on purpose")

    expected = model.generate(pixel_values, num_beams=3)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(pixel_values[:2], num_beams=3, logits_processor=[fail])
    assert torch.equal(model.generate(pixel_values, num_beams=3), expected)
    assert modeling_blip_rbm._searching.get() is None


@torch.no_grad()
def test_keys_and_values_of_more_images_than_are_computed_at_once(model):
    """Each in one piece of memory, and the same as of every image alone."""
    image_embeds = torch.randn(IMAGES_AT_ONCE + 3, 7, model.config.text_config.encoder_hidden_size)
    cached = ImageCache(model.text_decoder, image_embeds).cross_attention_cache
    for layer, of_layer in zip(model.text_decoder.bert.encoder.layer, cached.layers, strict=True):
        alone = [layer.crossattention.self.keys_and_values(image) for image in image_embeds.split(1)]
        for states, expected in zip((of_layer.keys, of_layer.values), zip(*alone)):
            assert states.is_contiguous()
            torch.testing.assert_close(states, torch.cat(expected))
