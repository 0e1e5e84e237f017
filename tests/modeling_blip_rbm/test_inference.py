"""The fast path behind its door: BLIP's own numbers, whatever is masked, shared, packed or cached, and a model that stays as it was."""

import copy
import gc
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, EfficientNetConfig, EncoderDecoderCache
from transformers.activations import ACT2FN

from modeling_blip_rbm import BlipRBMForConditionalGeneration, inference_blip_rbm
from modeling_blip_rbm.inference_blip_rbm import (
    IMAGES_AT_ONCE,
    FastDecoder,
    FastInference,
    ImageCache,
    Int8Weight,
    attention_by_blocks,
    behind_the_door,
    fast_tower,
    image_tokens,
    packed_product,
    product,
)
from modeling_blip_rbm.rbm import gain_weights
from modeling_blip_rbm.vision_blip_rbm import vision_tokens
from tests.conftest import REPO, randomise, tiny_config


IMAGES, ROWS = 2, 3  # rows of text an image


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """Pack on every processor that has the operators, whatever the table says of it."""
    monkeypatch.setattr(inference_blip_rbm, "packing", lambda dtype: inference_blip_rbm.Packing(1, True))


# ---------------------------------------------------------------- linear layers


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2), (2, 3, 5)])
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.GELU("tanh"), ACT2FN["gelu"], nn.ReLU()])
@pytest.mark.parametrize("together", [False, True])
def test_a_product_is_what_the_layers_make(dtype, tolerance, shape, activation, together):
    layers = [nn.Linear(13, 7).to(dtype), nn.Linear(13, 11).to(dtype)][: 1 + together]
    x = torch.randn(*shape, 13, dtype=dtype)
    plain = torch.cat([layer(x) for layer in layers], -1)
    plain = plain if activation is None else activation(plain)
    residual = torch.randn_like(plain)
    kept, fast = residual.clone(), product(*layers, activation=activation)
    torch.testing.assert_close(fast(x), plain, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(fast(x, residual), plain + residual, atol=2 * tolerance, rtol=2 * tolerance)
    assert torch.equal(residual, kept)


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.ReLU()])
def test_packed_weights_are_for_as_many_rows_as_the_table_says(monkeypatch, activation):
    monkeypatch.setattr(inference_blip_rbm, "packing", lambda dtype: inference_blip_rbm.Packing(3, False))
    rows = []
    for name in ("_linear", "_linear_and_sum"):
        own = getattr(inference_blip_rbm, name)
        monkeypatch.setattr(
            inference_blip_rbm, name, lambda x, *args, own=own: rows.append(x.shape[0]) or own(x, *args)
        )
    layer = nn.Linear(13, 7)
    x, fast = torch.randn(5, 13), product(layer, activation=activation)
    for n in (1, 2, 3, 5):
        plain = layer(x[:n]) if activation is None else activation(layer(x[:n]))
        torch.testing.assert_close(fast(x[:n]), plain, atol=1e-5, rtol=1e-4)
    assert rows == [3, 5]
    product(layer, few_rows=False)(x)  # as in a vision tower, where the table says that it does not pay
    assert rows == [3, 5]


def test_what_is_packed_is_written_down_and_not_measured():
    """Two processes of one machine read the same table: no clock is in the file, and a fresh process decides the same."""
    source = (REPO / "modeling_blip_rbm" / "inference_blip_rbm.py").read_text()
    assert "import time" not in source and "perf_counter" not in source
    code = "import torch; from modeling_blip_rbm.inference_blip_rbm import packing; print(packing(torch.float32), packing(torch.bfloat16))"
    said = {
        subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(said) == 1 and said.pop().strip()


class Adapter(nn.Module):
    """A layer as PEFT wraps it: what it was given goes on to the layer, and something is added to what that returns."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs) + 3


IN_TEXT = "text_decoder.bert.encoder.layer.0."


@torch.no_grad()
@pytest.mark.parametrize(
    "place",
    [
        "vision_model.encoder.layers.0.mlp.fc1",
        IN_TEXT + "intermediate.dense",
        IN_TEXT + "attention.self.query",
        IN_TEXT + "attention.self.value",
        IN_TEXT + "crossattention.self.value",
        "text_decoder.cls.predictions.transform.dense",
    ],
)
def test_an_adapter_is_neither_left_out_nor_put_behind_an_activation(model, pixel_values, place):
    """Wherever layers go together, one of them may have been wrapped, also after the door was opened."""
    ids = torch.randint(5, 40, (len(pixel_values), 5))

    def logits():
        fast = behind_the_door(model)
        tokens = fast.vision_hidden_states(pixel_values)
        cache = fast.new_cache(model.encode_image(vision_hidden_states=tokens).image_embeds)
        return model(input_ids=ids, past_key_values=cache).logits

    plain = model.optimize_for_inference() and logits()
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, Adapter(model.get_submodule(place)))
    expected = model(pixel_values, ids).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 5)])
def test_8_bits(dtype, shape):
    """Against the rounding written out: to 127 steps of the greatest number of an output's weights, and of an input."""
    layer, x = nn.Linear(13, 29).to(dtype), torch.randn(*shape, 13, dtype=dtype)
    steps = [t.float().abs().amax(-1, keepdim=True) / 127 for t in (x, layer.weight)]
    inputs, weight = ((t.float() / step).round() * step for t, step in zip((x, layer.weight), steps))
    expected = F.linear(inputs, weight, layer.bias.float()).to(dtype)
    fast = product(layer, int8=True, few_rows=False)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(fast(x), expected, atol=tolerance, rtol=tolerance)
    if len(shape) > 1:  # what else is in the batch does not matter
        assert torch.equal(fast(x)[1:], fast(x[1:]))


@torch.no_grad()
def test_a_few_rows_in_bf16_are_not_rounded_to_8_bits(monkeypatch):
    rounded, of = [], Int8Weight.of
    monkeypatch.setattr(Int8Weight, "of", lambda weight: rounded.append(weight.dtype) or of(weight))
    for dtype in (torch.float32, torch.bfloat16):
        for few_rows in (True, False):
            product(nn.Linear(13, 7).to(dtype), int8=True, few_rows=few_rows)
    assert rounded == [torch.float32, torch.float32, torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize("order", ["first", "second"])
def test_the_product_of_word_gains(order):
    U, moments = torch.randn(11, 7), torch.randn(5, 7 if order == "first" else 14)
    weight = gain_weights(U, order)
    torch.testing.assert_close(packed_product(weight)(moments), moments @ weight.T, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- the vision tower


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_blips_tower(model, pixel_values, int8):
    expected = model.vision_model(pixel_values)[0]
    ours = image_tokens(fast_tower(model.vision_model, int8), pixel_values)
    assert (ours - expected).norm() < (0.05 if int8 else 1e-5) * expected.norm()
    assert all(type(m) is not inference_blip_rbm.FastLinear for m in model.modules())


@torch.no_grad()
def test_a_convolutional_tower_is_folded_in_a_copy():
    pixel_values = torch.randn(5, 3, 65, 65)
    config = EfficientNetConfig(
        image_size=65, width_coefficient=0.3, depth_coefficient=0.2, hidden_dim=384, depthwise_padding=[]
    )
    model = randomise(BlipRBMForConditionalGeneration(tiny_config(vision_config=config)), std=0.05)
    for module in model.vision_model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    folded = fast_tower(model.vision_model)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.vision_model.modules())
    assert len([m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]) == 0
    expected = vision_tokens(model.vision_model(pixel_values))
    torch.testing.assert_close(image_tokens(folded, pixel_values), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("block", [3, 13, 1000])
def test_attention_by_blocks_is_attention(block):
    query, key, value = (torch.randn(2, 3, 13, 5, dtype=torch.float64) for _ in range(3))
    expected = ((0.25 * query @ key.transpose(2, 3)).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(attention_by_blocks(query, key, value, 0.25, block), expected)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_the_tower_takes_the_attention_of_the_table_in_half_precision(model, pixel_values, monkeypatch, fused):
    calls, pixel_values = [], pixel_values[:3]
    monkeypatch.setattr(inference_blip_rbm, "fused_attention", lambda dtype: fused or dtype == torch.float32)
    monkeypatch.setattr(
        inference_blip_rbm,
        "attention_by_blocks",
        lambda *args, **kw: calls.append(1) or attention_by_blocks(*args, **kw),
    )
    expected = image_tokens(fast_tower(model.vision_model), pixel_values)
    assert not calls
    half = image_tokens(fast_tower(model.bfloat16().vision_model), pixel_values.bfloat16())
    assert len(calls) == (0 if fused else len(model.vision_model.encoder.layers))
    assert (half - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_images_go_through_the_tower_a_few_at_a_time(model):
    seen, images = [], torch.randn(2 * IMAGES_AT_ONCE + 3, 3, 24, 24)
    expected = vision_tokens(model.vision_model(images))
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    torch.testing.assert_close(image_tokens(model.vision_model, images), expected, atol=1e-5, rtol=1e-4)
    assert seen == [IMAGES_AT_ONCE, IMAGES_AT_ONCE, 3]


# ---------------------------------------------------------------- the text decoder


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
    bert, decoder = model.text_decoder.bert, FastDecoder(model.text_decoder, int8=False)
    ids, mask = torch.randint(5, 40, (IMAGES * ROWS, 11)), torch.ones(IMAGES * ROWS, 11, dtype=torch.long)
    image_mask = None
    if masked:
        mask[1, :2] = mask[4, :1] = 0
        image_mask = torch.ones(IMAGES, 7, dtype=torch.long)
        image_mask[1, 3:] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = ImageCache(decoder, image_embeds), EncoderDecoderCache(DynamicCache(), DynamicCache())

    def positions(seen, new):
        return position_ids[:, seen.shape[1] - new.shape[1] : seen.shape[1]]

    def lean(new, seen):
        return decoder.states(new, ours, seen, positions(seen, new), image_mask)

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

    counted = mask.bool()  # what a pad itself becomes nobody reads
    expected = in_steps(blip, ids, mask, steps)
    if masked:  # the image's mask is read: without it there is a difference
        unmasked = decoder.states(ids, ImageCache(decoder, image_embeds), mask, position_ids)
        assert not torch.allclose(unmasked[counted], expected[counted], atol=1e-3)
    states = in_steps(lean, ids, mask, steps)
    torch.testing.assert_close(states[counted], expected[counted])
    torch.testing.assert_close(decoder.logits(states)[counted], model.text_decoder.cls(expected)[counted])
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
        decoder = FastDecoder(model.to(dtype).text_decoder, int8=False)
        cache = ImageCache(decoder, image_embeds.to(dtype))
        forward = lambda new, seen, cache=cache: cache.decoder.states(new, cache, seen)
        states[dtype] = in_steps(forward, ids, mask, (3, *[1] * 8))[mask.bool()].double()
    distance = (states[torch.bfloat16] - states[torch.float64]).norm() / states[torch.float64].norm()
    assert distance < 0.2  # weights are large here, so that rounding is too


@torch.no_grad()
def test_no_mask_is_a_mask_of_ones(model, image_embeds):
    ids, decoder = torch.randint(5, 40, (IMAGES, 5)), FastDecoder(model.text_decoder, int8=False)
    states = lambda mask: decoder.states(ids, ImageCache(decoder, image_embeds), mask)
    ones = states(torch.ones_like(ids))
    torch.testing.assert_close(states(None), ones)
    added = torch.zeros(IMAGES, 1, 5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), -1e30)
    torch.testing.assert_close(states(added), ones)


@torch.no_grad()
def test_keys_and_values_of_more_images_than_are_computed_at_once(model):
    """Each in one piece of memory, and the same as of every image alone."""
    image_embeds = torch.randn(IMAGES_AT_ONCE + 3, 7, model.config.text_config.encoder_hidden_size)
    decoder = FastDecoder(model.text_decoder, int8=False)
    for layer, cached in zip(decoder.layers, ImageCache(decoder, image_embeds).cross_attention_cache.layers):
        alone = [layer.keys_and_values(image) for image in image_embeds.split(1)]
        for states, expected in zip((cached.keys, cached.values), zip(*alone)):
            assert states.is_contiguous()
            torch.testing.assert_close(states, torch.cat(expected))


# ---------------------------------------------------------------- the door


def used(monkeypatch) -> list:
    """Has an entry for every step that the fast decoder makes."""
    steps, own = [], FastDecoder.states
    monkeypatch.setattr(FastDecoder, "states", lambda self, *args: steps.append(1) or own(self, *args))
    return steps


def test_generate_opens_the_door_and_training_does_not(model, pixel_values, monkeypatch):
    steps = used(monkeypatch)
    model(pixel_values, labels=torch.randint(5, 40, (len(pixel_values), 5)))
    assert behind_the_door(model) is None and not steps
    model.generate(pixel_values, max_new_tokens=5, min_new_tokens=5)
    assert len(steps) == 5
    recorded = model.generate(
        pixel_values, max_new_tokens=5, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True
    )
    assert len(steps) == 5 and recorded.attentions[0] is not None and recorded.hidden_states[0] is not None


SLOW = {
    "switched off as in 0.1.0": lambda model: setattr(model, "pack_linears", False),
    "training mode": lambda model: model.train(),
    "a user's hook": lambda model: model.text_decoder.register_forward_hook(lambda *args: None),
    "switched off": lambda model: setattr(model, "auto_optimize", False),
}


@pytest.mark.parametrize("why", SLOW)
def test_where_the_models_own_modules_are_asked_for(model, pixel_values, monkeypatch, why):
    expected, steps = model.generate(pixel_values, num_beams=3), used(monkeypatch)
    other = copy.deepcopy(model)  # of which nothing is prepared
    for module in other.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    SLOW[why](other)
    assert torch.equal(other.generate(pixel_values, num_beams=3), expected) and not steps


@torch.no_grad()
def test_the_model_stays_as_it_was(model, pixel_values):
    kinds = {name: type(module) for name, module in model.named_modules()}
    names, pickled = set(model.state_dict()), len(pickle.dumps(model))
    expected = model.generate(pixel_values, num_beams=3)
    model.optimize_for_inference(int8=True).generate(pixel_values)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert set(model.state_dict()) == names and abs(len(pickle.dumps(model)) - pickled) < 500
    assert all(type(layer) is nn.Linear for layer in model.modules() if isinstance(layer, nn.Linear))
    model.generate(pixel_values, output_attentions=True, return_dict_in_generate=True, rbm=False)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert behind_the_door(again) is None
        assert torch.equal(again.generate(pixel_values, num_beams=3), expected)
        asked = again.vision_model(pixel_values, output_attentions=True)
        assert all(weights is not None for weights in asked.attentions)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),  # which PyTorch does not count
        lambda weight: setattr(weight, "data", 2 * weight.data),
        lambda weight: weight.copy_(torch.randn_like(weight)),
    ],
)
@pytest.mark.parametrize("place", [IN_TEXT + "intermediate.dense.weight", "vision_model.encoder.layers.0.mlp.fc1.bias"])
def test_changed_weights_are_prepared_anew(model, pixel_values, change, place):
    model.optimize_for_inference()
    before = behind_the_door(model)
    assert behind_the_door(model) is before
    change(model.get_parameter(place))
    assert behind_the_door(model) is not before
    slow = model.generate(pixel_values, num_beams=3, output_attentions=True, return_dict_in_generate=True).sequences
    assert torch.equal(model.generate(pixel_values, num_beams=3), slow)


@pytest.mark.parametrize("shape", [(397, 401), (101, 131), (97, 194), (29, 31), (5, 397), (397, 2)])
def test_a_change_of_one_row_or_column_is_seen(shape):
    weight = torch.nn.Parameter(torch.randn(shape).bfloat16())
    before = inference_blip_rbm.state_of([weight])
    for part in (*weight.data, *weight.data.T):
        kept = part.clone()
        part += 0.25
        assert inference_blip_rbm.state_of([weight]) != before
        part.copy_(kept)
    assert inference_blip_rbm.state_of([weight]) == before


@torch.no_grad()
def test_prepared_once_and_forgotten_with_the_model(model, pixel_values, monkeypatch):
    made, own = [], FastInference.__init__
    monkeypatch.setattr(FastInference, "__init__", lambda self, *args: made.append(1) or own(self, *args))
    for _ in range(3):
        model.generate(pixel_values, max_new_tokens=3)
    assert len(made) == 1
    other = copy.deepcopy(model).optimize_for_inference()
    gc.collect()
    count = len(inference_blip_rbm._opened)
    del other
    gc.collect()
    assert len(inference_blip_rbm._opened) == count - 1


@torch.no_grad()
def test_8_bits_stay_8_bits(model, pixel_values, monkeypatch):
    calls, own = [], inference_blip_rbm.int8_product
    monkeypatch.setattr(inference_blip_rbm, "int8_product", lambda *args: calls.append(1) or own(*args))
    model.generate(pixel_values, max_new_tokens=3)
    assert not calls
    model.optimize_for_inference(int8=True).generate(pixel_values, max_new_tokens=3)
    assert calls
    model.get_parameter(IN_TEXT + "intermediate.dense.weight").mul_(2)
    calls.clear()
    model.generate(pixel_values, max_new_tokens=3)
    assert calls
    calls.clear()
    model.optimize_for_inference().generate(pixel_values, max_new_tokens=3)
    assert not calls


def test_training_after_the_door_was_opened(model, pixel_values):
    ids = torch.randint(5, 40, (len(pixel_values), 5))
    model.generate(pixel_values)
    model(pixel_values, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.text_decoder.parameters())
