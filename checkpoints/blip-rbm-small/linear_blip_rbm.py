"""Linear layers whose weights are packed for the processor while captions are generated.

Decoding multiplies a few rows, as many as there are beams, with large matrices. The library that PyTorch asks for products of fp32
matrices reads those several times slower than memory gives them; oneDNN, with weights in the order in which it reads them, does not
(`benchmarks/generate.py`, docs/experiments.md). PyTorch's compiler uses the same operators on frozen weights. Results differ from those
of `nn.Linear` by rounding alone.
"""

import functools
import time
import weakref
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn


_packed = weakref.WeakKeyDictionary()  # module -> what its weight was, and the weight packed


class PackableLinear(nn.Linear):
    """`nn.Linear`, and as that saved, loaded and trained."""

    packed_weight = None  # not None only inside `packed_linears`

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.packed_weight is None:
            return super().forward(input)
        return _product(input, self.packed_weight, self.bias)


def _product(x, packed_weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")


def _pack(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def make_packable(model: nn.Module):
    """Every `nn.Linear` of the model becomes a `PackableLinear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackableLinear


@functools.lru_cache
def packing_pays(dtype: torch.dtype, threads: int, rows: int = 12, size: int = 768) -> bool:
    """Whether packed weights are faster here for a few rows: measured once, 30 ms. False where PyTorch has no such operators.

    Args:
        threads: of PyTorch, on which the answer depends.
    """
    g = torch.Generator().manual_seed(0)  # of its own: a seeded run must not depend on whether this was measured before
    x, *weights = torch.randn(8 * size + rows, size, generator=g).to(dtype).split([rows, *[size] * 8])
    try:
        packed = [_pack(weight) for weight in weights]
        close = torch.allclose(_product(x, packed[0]).float(), F.linear(x, weights[0]).float(), rtol=0.02, atol=0.5)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    seconds = []
    for product, operands in ((F.linear, weights), (_product, packed)):
        best = float("inf")
        for _ in range(5):  # more weights than the caches hold, as in a decoder; other work on the machine only adds
            start = time.perf_counter()
            for operand in operands:
                product(x, operand)
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    return close and seconds[1] < 0.9 * seconds[0]


def _packed_weight(module: PackableLinear) -> torch.Tensor:
    """Packed anew only if the weight has changed. Its sum is asked for because `weight.data` can change behind PyTorch's back."""
    weight = module.weight
    version = 0 if weight.is_inference() else weight._version
    state = (weight.data_ptr(), version, weight.dtype, weight.sum().item())
    kept = _packed.get(module)
    if kept is None or kept[0] != state:
        kept = _packed[module] = state, _pack(weight)
    return kept[1]


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
    if traced or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return packing_pays(weight.dtype, torch.get_num_threads())


@contextmanager
def packed_linears(model: nn.Module):
    """While inside, the model's linear layers use packed weights, if it is on a CPU where that pays and no gradient is wanted. The packed
    weights, as large as the others, are kept for the next time."""
    modules = [module for module in model.modules() if isinstance(module, PackableLinear)]
    modules = [module for module in modules if _can_pack(module.weight)]
    for module in modules:
        module.packed_weight = _packed_weight(module)
    try:
        yield
    finally:
        for module in modules:
            module.packed_weight = None


def with_packed_linears(method):
    """A method of a model that runs inside `packed_linears`, unless the model's `pack_linears` is False."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with packed_linears(self) if self.pack_linears else nullcontext():
            return method(self, *args, **kwargs)

    return wrapped
