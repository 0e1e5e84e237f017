"""Linear layers whose weights are packed for the processor while captions are generated.

Decoding multiplies a few rows, as many as there are beams, with large matrices. The library that PyTorch asks for products of fp32
matrices reads those several times slower than memory gives them; oneDNN, with weights in the order in which it reads them, does not
(`benchmarks/generate.py`, docs/experiments.md). PyTorch's compiler uses the same operators on frozen weights. Results differ from those
of `nn.Linear` by rounding alone. From how many rows on that pays is measured: on some processors from one, on others not for a row or
two; and whether it does for hundreds, as in a vision tower.

With `int8=True` weights and inputs are rounded to 8 bits, weights with a scale for each output and inputs with one for each row, so that
a caption does not depend on what else is in its batch (torchao's "int8 dynamic activation, int8 weight", in PyTorch's own product).
"""

import functools
import math
import time
import weakref
from contextlib import contextmanager, nullcontext
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blip.modeling_blip import BlipMLP


SAMPLED = 389  # one number of so many, a prime, so that every column has its turn
BLOCK = 512  # rows at a time of a product in 8 bits, so that its 32-bit sums stay in the cache
# module -> {in 8 bits or not, or what was made of it: (what its weight was, the weight packed)}
_kept = weakref.WeakKeyDictionary()


class PackableLinear(nn.Linear):
    """`nn.Linear`, and as that saved, loaded and trained."""

    packed: Optional[tuple] = None  # weight and bias, only inside `packed_linears`
    least_rows = 1  # for which the packed weight is taken there
    few_rows = False  # at a time, so that reading the weights and rounding the inputs are all that takes time
    joined: tuple["PackableLinear", ...] = ()  # this and others of the same input, all packed with this one

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.packed is None or self.joined or _rows(input) < self.least_rows:
            return super().forward(input)
        return prepared(self)(input)


def join(*layers: PackableLinear):
    """These layers have the same input: `prepared` computes them as one where they are packed. All have a bias, or none."""
    layers[0].joined = layers


def prepared(*layers: nn.Module, activation: Optional[nn.Module] = None) -> Callable:
    """What the layers make of an input x (..., I), all outputs in one tensor, as a function f(x, residual=None) that is called many times:
    what is the same in every call is looked up now, which takes longer than a small product itself. The weights are those of now; where
    packed, activation and residual, which is added last, go with the product."""
    first = layers[0]
    unpacked = first if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], -1)
    packed = getattr(first, "packed", None)
    if packed is None or (first.joined or layers) != layers:  # such as on a GPU, or wrapped by PEFT
        return _in_turn(unpacked, activation)
    weight, bias = packed
    if isinstance(weight, Int8Weight):
        return _in_turn(lambda x: _int8_product(x, weight, bias, activation))
    if activation is not None and _is_gelu(activation):
        with_packed = _in_turn(lambda x: _product(x, weight, bias, "gelu"))
    elif activation is not None:
        with_packed = _in_turn(lambda x: _product(x, weight, bias), activation)
    else:
        with_packed = lambda x, residual=None: (
            _product(x, weight, bias) if residual is None else _sum_with_product(x, residual, weight, bias)
        )
    if first.least_rows == 1:
        return with_packed
    least, without = first.least_rows, _in_turn(unpacked, activation)
    return lambda x, residual=None: (without if _rows(x) < least else with_packed)(x, residual)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _in_turn(product: Callable, activation: Optional[Callable] = None) -> Callable:
    """The product, the activation, the sum with the residual as operations of their own."""

    def function(x, residual=None):
        y = product(x) if activation is None else activation(product(x))
        return y if residual is None else y + residual

    return function


class ImageMLP(BlipMLP):
    def forward(self, hidden_states):
        return self.fc2(prepared(self.fc1, activation=self.activation_fn)(hidden_states))


def _is_gelu(activation) -> bool:
    """The exact one, of which there are several classes."""
    return getattr(activation, "act", activation) is F.gelu or (
        type(activation) is nn.GELU and activation.approximate == "none"
    )


def _product(x, packed_weight, bias=None, activation="none"):
    return torch.ops.mkldnn._linear_pointwise.default(x, packed_weight, bias, activation, [], "none")


def _sum_with_product(x, residual, packed_weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed_weight, bias, "add")


class Int8Weight(NamedTuple):
    rounded: torch.Tensor  # (O, I)
    scale: torch.Tensor  # (O,), fp32


def _rounded(x: torch.Tensor, room: Optional[torch.Tensor] = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in steps of 1/127 of its greatest number: int8 (n, I), and the steps (n, 1), fp32. `room` (n, I), fp32, to compute in."""
    y = (torch.empty(x.shape, dtype=torch.float32) if room is None else room).copy_(x.detach())
    step = torch.maximum(y.amax(1, keepdim=True), y.amin(1, keepdim=True).neg_()).clamp_(min=1e-10).div_(127)
    return y.mul_(1 / step).round_().to(torch.int8), step


def _int8_product(x, weight: Int8Weight, bias=None, activation=None):
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), len(weight.rounded))
    # for every block in turn: fresh memory would cost more than these passes
    widths = x.shape[-1], len(weight.rounded)
    inputs, sums = (torch.empty(min(BLOCK, len(rows)), width, dtype=torch.float32) for width in widths)
    for some, into in zip(rows.split(BLOCK), out.split(BLOCK)):
        rounded, step = _rounded(some, inputs[: len(some)])
        y = sums[: len(some)].copy_(torch._int_mm(rounded, weight.rounded.T)).mul_(weight.scale).mul_(step)
        y = y if bias is None else y.add_(bias)
        into.copy_(y if activation is None else activation(y))
    return out.view(*x.shape[:-1], -1)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def _pack_int8(weight: torch.Tensor) -> Int8Weight:
    rounded, step = _rounded(weight)
    return Int8Weight(rounded, step.flatten())


def make_packable(model: nn.Module):
    """Every `nn.Linear` of the model becomes a `PackableLinear`, and what the tower computes between two of them goes with the first."""
    ours = {nn.Linear: PackableLinear, BlipMLP: ImageMLP}
    for module in model.modules():
        module.__class__ = ours.get(type(module), type(module))


def is_traced() -> bool:
    """Whether the model is being compiled or exported, so that nothing may be measured or prepared."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()


def time_ratio(function: Callable, other: Callable, times: int = 5) -> float:
    """The shortest time of one function by that of the other, each called so many times, in turn: other work on the machine only adds."""
    shortest = [math.inf, math.inf]
    for _ in range(times):
        for i, called in enumerate((function, other)):
            start = time.perf_counter()
            called()
            shortest[i] = min(shortest[i], time.perf_counter() - start)
    return shortest[0] / shortest[1]


class Packing(NamedTuple):
    least_rows: int  # for which packed weights are faster than others
    many_rows: bool  # whether they still are for hundreds


@functools.lru_cache
def packing_pays(dtype: torch.dtype, threads: int) -> Optional[Packing]:
    """For how many rows packed weights are faster here: measured once, some 150 ms. None if not for 12, or where PyTorch has no such operators.

    Args:
        threads: of PyTorch, on which the answer depends.
    """
    outputs, inputs = 3072, 768  # of three weights, of which the caches hold no more than of a decoder's
    g = torch.Generator().manual_seed(0)  # of its own: a seeded run must not depend on whether this was measured before
    *weights, x = torch.rand(3 * outputs + 256, inputs, generator=g).sub_(0.5).to(dtype).split([*[outputs] * 3, 256])
    try:
        packed = [_pack(weight) for weight in weights]
        if not torch.allclose(_product(x, packed[0]).float(), F.linear(x, weights[0]).float(), rtol=0.02, atol=0.1):
            return None
    except (AttributeError, RuntimeError, NotImplementedError):
        return None

    def pays(rows: int) -> bool:
        some, times = (3, 9) if rows < 64 else (1, 5)  # reading the weights, or arithmetic, is what takes time
        products = lambda product, operands: lambda: [product(x[:rows], operand) for operand in operands[:some]]
        ratio = time_ratio(products(_product, packed), products(F.linear, weights), times)
        return ratio < 0.9  # else not worth its memory

    if not pays(12):
        return None
    return Packing(12 if not pays(4) else 1 if pays(1) else 4, pays(256))


def _state(weights) -> list[tuple]:
    """Differs if one of the weights (O, I) has changed. PyTorch counts changes, but not those through `weight.data`: so numbers are looked at."""
    return [(w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, _sum_of_some(w)) for w in weights]


def _sum_of_some(weight: torch.Tensor) -> float:
    """Of a large weight some numbers in every row and every column, as all of them would take a twentieth of the time of a caption. So single
    numbers that are changed through `weight.data` may go unseen."""
    step = SAMPLED if min(weight.shape) > SAMPLED else 1
    return weight.detach().flatten()[::step].sum(dtype=torch.float64).item()


def product_with(module: nn.Module, source: torch.Tensor, weight_of: Callable):
    """x -> x @ weight_of(source).T, its weight packed where that pays. Kept with the module until the source, one of its weights, changes."""
    if not _can_pack(source, False):
        weight = weight_of(source)
        return lambda x: F.linear(x, weight)
    state, kept = _state([source]), _kept.setdefault(module, {})
    if weight_of not in kept or kept[weight_of][0] != state:
        weight = weight_of(source)
        kept[weight_of] = state, weight, _pack(weight)
    _, weight, packed = kept[weight_of]
    least = packing_pays(source.dtype, torch.get_num_threads()).least_rows
    return lambda x: F.linear(x, weight) if _rows(x) < least else _product(x, packed)


def _packed(module: PackableLinear, int8: bool):
    """Weight, packed, and bias of a layer and of those joined to it. Packed anew only if one has changed."""
    layers = module.joined or (module,)
    weights = [layer.weight for layer in layers]
    state, kept = _state(weights), _kept.setdefault(module, {})
    if int8 not in kept or kept[int8][0] != state:
        kept[int8] = state, (_pack_int8 if int8 else _pack)(torch.cat(weights) if module.joined else weights[0])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).detach() if biases else None
    if int8 and bias is not None:
        bias = bias.float()  # as the sums that it is added to
    return kept[int8][1], bias


def _8_bits_pay(module: PackableLinear) -> bool:
    """Not where a few rows are multiplied with 16 bits: rounding them takes longer than reading half of the weight less."""
    return not (module.few_rows and module.weight.dtype == torch.bfloat16)


def _can_pack(weight: torch.Tensor, int8: bool, few_rows: bool = True) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if is_traced() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if int8:
        return hasattr(torch, "_int_mm")
    pays = packing_pays(weight.dtype, torch.get_num_threads())
    return pays is not None and (few_rows or pays.many_rows)


@contextmanager
def packed_linears(model: nn.Module, int8: bool = False):
    """While inside, the model's linear layers use packed weights, if it is on a CPU where that pays and no gradient is wanted. The packed
    weights, as large as the others (with `int8` a quarter of fp32), are kept for the next time. Inside another, nothing changes."""
    modules = [module for module in model.modules() if isinstance(module, PackableLinear)]
    with_others = {layer for module in modules for layer in module.joined[1:]}
    ways = {m: int8 and _8_bits_pay(m) for m in modules if m.packed is None and m not in with_others}
    ways = {
        module: in_8_bits for module, in_8_bits in ways.items() if _can_pack(module.weight, in_8_bits, module.few_rows)
    }
    for module, in_8_bits in ways.items():
        module.packed = _packed(module, in_8_bits)
        if not in_8_bits:
            module.least_rows = packing_pays(module.weight.dtype, torch.get_num_threads()).least_rows
    try:
        yield
    finally:
        for module in ways:
            module.packed, module.least_rows = None, PackableLinear.least_rows


def with_packed_linears(method):
    """A method of a model that runs inside `packed_linears`, as the model's `pack_linears` says: True, "int8" or False."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        if self.pack_linears not in (True, False, "int8"):
            raise ValueError(f"pack_linears is {self.pack_linears!r}; allowed are True, False and 'int8'")
        with packed_linears(self, self.pack_linears == "int8") if self.pack_linears else nullcontext():
            return method(self, *args, **kwargs)

    return wrapped
