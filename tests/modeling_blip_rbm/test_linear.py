"""Linear layers with packed weights: the same numbers, only inside `generate`, never of weights that have changed since."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from modeling_blip_rbm import linear_blip_rbm
from modeling_blip_rbm.decoder_blip_rbm import ImageCache
from modeling_blip_rbm.linear_blip_rbm import (
    Int8Weight,
    PackableLinear,
    join,
    make_packable,
    packed_linears,
    prepared,
)


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """Pack whatever this processor is good at."""
    monkeypatch.setattr(linear_blip_rbm, "packing_pays", lambda *args: linear_blip_rbm.Packing(1, True))


def new_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 29), nn.GELU(), nn.Linear(29, 7, bias=False)).eval()
    make_packable(model)
    return model


def reference(model, x):
    first, _, second = model
    return F.linear(F.gelu(F.linear(x, first.weight, first.bias)), second.weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2), (2, 3, 5)])
def test_same_numbers(dtype, tolerance, shape):
    model, x = new_model().to(dtype), torch.randn(*shape, 13, dtype=dtype)
    plain = model(x)
    with packed_linears(model):
        assert model[0].packed is not None
        torch.testing.assert_close(model(x), plain, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(model(x.transpose(0, -2)), model(x).transpose(0, -2), atol=tolerance, rtol=tolerance)
    assert model[0].packed is None and torch.equal(model(x), plain)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), ACT2FN["gelu"], nn.ReLU()])
def test_an_activation_goes_with_the_product(activation, int8):
    layer, x = new_model()[0], torch.randn(5, 13)
    plain = activation(layer(x))
    assert torch.equal(prepared(layer, activation=activation)(x), plain)
    with packed_linears(layer, int8):
        torch.testing.assert_close(
            prepared(layer, activation=activation)(x), activation(layer(x)), atol=1e-6, rtol=1e-5
        )
        torch.testing.assert_close(
            prepared(layer, activation=activation)(x), plain, atol=0.05 if int8 else 1e-5, rtol=1e-2
        )


@torch.no_grad()
@pytest.mark.parametrize("packed", [None, False, True])  # not at all, as it is, in 8 bits
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("together", [False, True])
def test_prepared_is_what_the_layers_make(packed, activation, together):
    model, x, residual = nn.ModuleList([nn.Linear(13, 7), nn.Linear(13, 11)]), torch.randn(5, 13), torch.randn(5, 18)
    make_packable(model)
    layers = tuple(model) if together else tuple(model[:1])
    if together:
        join(*layers)
    residual = residual[:, : sum(layer.out_features for layer in layers)].contiguous()
    kept = residual.clone()
    plain = torch.cat([layer(x) for layer in layers], 1)
    plain = plain if activation is None else activation(plain)
    with packed_linears(model, int8=bool(packed)) if packed is not None else nullcontext():
        product = prepared(*layers, activation=activation)
    tolerance = {"atol": 0.05 if packed else 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(product(x), plain, **tolerance)
    torch.testing.assert_close(product(x, residual), plain + residual, **tolerance)
    assert torch.equal(residual, kept)


@torch.no_grad()
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.ReLU()])
@pytest.mark.parametrize("together", [False, True])
def test_packed_weights_are_for_as_many_rows_as_pay(monkeypatch, activation, together):
    monkeypatch.setattr(linear_blip_rbm, "packing_pays", lambda *args: linear_blip_rbm.Packing(3, False))
    model, x = nn.ModuleList([nn.Linear(13, 7), nn.Linear(13, 11)]), torch.randn(5, 13)
    make_packable(model)
    for layer in model:
        layer.few_rows = True  # else never packed here
    layers = tuple(model) if together else tuple(model[:1])
    if together:
        join(*layers)
    plain = torch.cat([layer(x) for layer in layers], 1)
    plain, residual = plain if activation is None else activation(plain), torch.randn_like(plain)
    packed_rows = []

    def spied(product, x, *args):
        packed_rows.append(len(x))
        return product(x, *args)

    for name in ("_product", "_sum_with_product"):
        monkeypatch.setattr(linear_blip_rbm, name, partial(spied, getattr(linear_blip_rbm, name)))
    with packed_linears(model):
        product = prepared(*layers, activation=activation)
        of_one_alone = (layers[0](x[:rows]) for rows in (2, 4))
        for rows in (1, 2, 3, 5):
            torch.testing.assert_close(product(x[:rows]), plain[:rows], atol=1e-5, rtol=1e-4)
            expected = plain[:rows] + residual[:rows]
            torch.testing.assert_close(product(x[:rows], residual[:rows]), expected, atol=1e-5, rtol=1e-4)
        assert packed_rows == [3, 3, 5, 5]
        for rows, of_one in zip((2, 4), of_one_alone):
            torch.testing.assert_close(of_one, F.linear(x[:rows], layers[0].weight, layers[0].bias))
    assert packed_rows == [3, 3, 5, 5] + [4] * (not together)


@torch.no_grad()
@pytest.mark.parametrize("many_rows", [False, True])
def test_layers_of_many_rows_are_packed_only_where_that_pays(monkeypatch, model, many_rows):
    monkeypatch.setattr(linear_blip_rbm, "packing_pays", lambda *args: linear_blip_rbm.Packing(1, many_rows))
    with packed_linears(model):
        assert (model.vision_model.encoder.layers[0].mlp.fc1.packed is not None) == many_rows
        assert model.text_decoder.bert.encoder.layer[0].output.dense.packed is not None


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
    ],
)
def test_an_adapter_is_neither_left_out_nor_put_behind_an_activation(model, pixel_values, place):
    """Wherever layers go together, one of them may have been wrapped."""
    ids = torch.randint(5, 40, (len(pixel_values), 5))

    def logits(lean):
        embeds = model.encode_image(pixel_values).image_embeds
        cache = ImageCache(model.text_decoder, embeds) if lean else None
        return model(input_ids=ids, image_embeds=embeds, past_key_values=cache, use_cache=lean).logits

    plain = logits(lean=True)
    owner, _, name = place.rpartition(".")
    setattr(model.get_submodule(owner), name, Adapter(model.get_submodule(place)))
    expected = logits(lean=False)
    assert (expected - plain).abs().max() > 1e-2
    with packed_linears(model):
        torch.testing.assert_close(logits(lean=True), expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_joined_layers_are_one_product(int8, changed):
    model = nn.ModuleList([nn.Linear(13, 7), nn.Linear(13, 5), nn.Linear(13, 3)])
    make_packable(model)
    join(*model)
    x, tolerance = torch.randn(2, 5, 13), {"atol": 0.05 if int8 else 1e-5, "rtol": 1e-3}
    for _ in range(2):
        expected = [F.linear(x, layer.weight, layer.bias) for layer in model]
        with packed_linears(model, int8):
            assert [layer.packed is not None for layer in model] == [True, False, False]
            for ours, their in zip(prepared(*model)(x).split([7, 5, 3], -1), expected):
                torch.testing.assert_close(ours, their, **tolerance)
            for layer, their in zip(model, expected):  # each alone, as BLIP's own forward asks for it
                torch.testing.assert_close(layer(x), their)
        for ours, their in zip(prepared(*model)(x).split([7, 5, 3], -1), expected):
            torch.testing.assert_close(ours, their)
        model[changed].weight.mul_(-2)
        model[changed].bias.add_(1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3, 5)])
def test_8_bits(dtype, shape):
    """Against the rounding written out: to 127 steps of the greatest number of an output's weights, and of an input."""
    model, x = new_model().to(dtype), torch.randn(*shape, 13, dtype=dtype)
    layer = model[0]
    steps = [t.float().abs().amax(-1, keepdim=True) / 127 for t in (x, layer.weight)]
    inputs, weight = ((t.float() / step).round() * step for t, step in zip((x, layer.weight), steps))
    expected = F.linear(inputs, weight, layer.bias.float()).to(dtype)
    with packed_linears(model, int8=True):
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
        torch.testing.assert_close(model(x), reference(model, x), atol=0.05, rtol=0.05)
        if len(shape) > 1:  # what else is in the batch does not matter
            assert torch.equal(model(x)[1:], model(x[1:]))
    assert layer.packed is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_in_bf16_are_not_rounded_to_8_bits(model, dtype):
    model.to(dtype)
    layer = model.text_decoder.bert.encoder.layer[1]
    with torch.no_grad(), packed_linears(model, int8=True):
        many = [model.vision_model.encoder.layers[0].mlp.fc1, layer.crossattention.self.key]
        few = [layer.attention.self.query, layer.output.dense, model.text_decoder.cls.predictions.decoder]
        in_8_bits = [isinstance(module.packed[0], Int8Weight) for module in (*many, *few)]
    assert in_8_bits == [True] * 2 + [dtype == torch.float32] * 3


@torch.no_grad()
def test_one_inside_another():
    model, x = new_model(), torch.randn(5, 13)
    with packed_linears(model, int8=True):
        outer = model(x)
        with packed_linears(model):
            assert torch.equal(model(x), outer)
        assert torch.equal(model(x), outer)
    assert model[0].packed is None


@torch.no_grad()
def test_8_bits_and_more_take_turns():
    model, x = new_model(), torch.randn(5, 13)
    outputs = []
    for int8 in (False, True, False, True):
        with packed_linears(model, int8):
            outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


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
def test_changed_weights_are_packed_anew(change):
    model, x = new_model(), torch.randn(5, 13)
    with packed_linears(model):
        before = model(x)
    change(model[0].weight)
    with packed_linears(model):
        torch.testing.assert_close(model(x), reference(model, x))
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("shape", [(397, 401), (5, 397), (397, 2)])
def test_a_change_of_one_row_or_column_is_seen(shape):
    weight = torch.nn.Parameter(torch.randn(shape).bfloat16())
    before = linear_blip_rbm._state([weight])
    for part in (*weight.data, *weight.data.T):
        kept = part.clone()
        part += 0.25
        assert linear_blip_rbm._state([weight]) != before
        part.copy_(kept)
    assert linear_blip_rbm._state([weight]) == before


@torch.no_grad()
def test_packed_once(monkeypatch):
    model, packed = new_model(), []
    pack = linear_blip_rbm._pack
    monkeypatch.setattr(linear_blip_rbm, "_pack", lambda weight: packed.append(1) or pack(weight))
    for _ in range(3):
        with packed_linears(model):
            model(torch.randn(2, 13))
    assert len(packed) == 2  # layers


def test_training_and_half_precision_are_left_alone():
    model, x = new_model(), torch.randn(5, 13)
    with packed_linears(model):  # gradients are wanted
        model(x).sum().backward()
        assert model[0].packed is None and model[0].weight.grad is not None
    with torch.no_grad(), packed_linears(model.half()):
        assert model[0].packed is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_linears(model.float()):
        assert model[0].packed is None


@torch.no_grad()
def test_an_error_inside_leaves_the_model_as_it_was():
    model = new_model()
    with pytest.raises(KeyError), packed_linears(model):
        raise KeyError
    assert model[0].packed is None


@torch.no_grad()
def test_copied_saved_and_forgotten():
    model, x = new_model(), torch.randn(5, 13)
    with packed_linears(model):
        model(x)
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight"}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with packed_linears(other):
            torch.testing.assert_close(other(x), model(x))
    layer = model[0]
    assert layer in linear_blip_rbm._kept
    count = len(linear_blip_rbm._kept)
    del model, layer, other
    assert len(linear_blip_rbm._kept) < count


def products_seen(monkeypatch, name) -> list:
    """To which each product of this kind will add an entry."""
    seen, product = [], getattr(linear_blip_rbm, name)
    monkeypatch.setattr(linear_blip_rbm, name, lambda *args: seen.append(1) or product(*args))
    return seen


@torch.no_grad()
def test_generate_is_packed_and_forward_is_not(model, pixel_values, monkeypatch):
    seen = products_seen(monkeypatch, "_product")
    model.generate(pixel_values, max_new_tokens=3)
    assert seen and all(m.packed is None for m in model.modules() if isinstance(m, PackableLinear))
    seen.clear()
    monkeypatch.setattr(model, "pack_linears", False)
    model.generate(pixel_values, max_new_tokens=3)
    model(pixel_values=pixel_values, input_ids=torch.tensor([[1, 5]] * len(pixel_values)))
    assert not seen


@torch.no_grad()
def test_generate_in_8_bits(model, pixel_values, monkeypatch):
    seen = products_seen(monkeypatch, "_int8_product")
    model.generate(pixel_values, max_new_tokens=3)
    assert not seen
    monkeypatch.setattr(model, "pack_linears", "int8")
    model.generate(pixel_values, max_new_tokens=3)
    assert seen
    monkeypatch.setattr(model, "pack_linears", "int4")
    with pytest.raises(ValueError, match="pack_linears is 'int4'; allowed are True, False and 'int8'"):
        model.generate(pixel_values, max_new_tokens=3)


def test_measuring_leaves_random_numbers_alone(monkeypatch):
    monkeypatch.undo()
    linear_blip_rbm.packing_pays.cache_clear()
    state = torch.get_rng_state()
    pays = linear_blip_rbm.packing_pays(torch.float32, torch.get_num_threads())
    assert pays is None or pays.least_rows in (1, 4, 12)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_the_operators_nothing_is_packed(monkeypatch):
    def missing(*args):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.undo()
    monkeypatch.setattr(linear_blip_rbm, "_pack", missing)
    linear_blip_rbm.packing_pays.cache_clear()
    model = new_model()
    with torch.no_grad(), packed_linears(model):
        assert model[0].packed is None
    linear_blip_rbm.packing_pays.cache_clear()
