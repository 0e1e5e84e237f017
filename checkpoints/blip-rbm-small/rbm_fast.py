"""Contrastive divergence of the binary RBM on a processor, its matrix products in the precision that is fastest there.

A step of CD-1 or PCD-1 is five products of V*H multiply-adds a sample: 10 V H FLOP, which bounds its speed. What helps:

- v and h are 0 or 1, so that they are exact in 8-bit integers; U is rounded to 8 bits with a scale per output unit, q to
  1/127 *at random*, so that its mean is kept. The parameters themselves stay fp32. Sums of the products are exact (int32).
- A unit is sampled as the integer part of P + u with 16-bit u: a sum and a conversion, no comparison, cheap numbers.

`fastest_precision` measures what a processor is good at; `tests/test_rbm_fast.py` holds each against `rbm.py`, the reference.
"""

import time
from functools import lru_cache
from typing import Optional

import numpy as np
import torch

from .rbm import RBMParameters


UNIT = 2.0**-16  # random numbers are 16 bits
BLOCK = 256  # rows that are sampled at a time: their fp32 values stay in the processor's cache


class Workspace(dict):
    """Tensors that are used again in every step: fresh memory of this size costs more than the arithmetic done in it."""

    def get_tensor(self, name: str, shape, dtype=torch.float32) -> torch.Tensor:
        tensor = self.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            tensor = self[name] = torch.empty(shape, dtype=dtype)
        return tensor


class FloatProducts:
    """The products in `dtype`, accumulated in fp32 by the processor's library."""

    one = 1  # how a probability of 1 is encoded
    multiply = staticmethod(torch.mm)

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.memory = dtype, Workspace()  # dtype: of states, and of the products

    def load(self, U: torch.Tensor):
        same = self.dtype == U.dtype
        self.up_weight = U if same else self.memory.get_tensor("U", U.shape, self.dtype).copy_(U)

    def _product(self, bias, a, b, name):
        out = self.memory.get_tensor(name, (len(a), b.shape[1]), self.dtype)
        torch.addmm(bias.to(self.dtype), a, b, out=out)
        return out if self.dtype == torch.float32 else self.memory.get_tensor(name + "_32", out.shape).copy_(out)

    def up(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """c + v U, (n, H) fp32, until the next call."""
        return self._product(c, v, self.up_weight, "up")

    def down(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """b + h U', (n, V) fp32, until the next call."""
        return self._product(b, h, self.up_weight.T, "down")

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """out (n, H), in `dtype`: what `outer` takes for the probabilities q. u: as from `uniform`."""
        out.copy_(q)

    def outer(self, v: torch.Tensor, code: torch.Tensor, out: torch.Tensor, weight: float):
        """out (V, H) += weight * v'q."""
        if self.dtype == torch.float32:
            return out.addmm_(v.T, code, alpha=weight)
        return out.add_(v.T @ code, alpha=weight)

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        """Sum over the samples, fp32, of v, h or q as encoded."""
        return states.sum(0, dtype=torch.float32)


class IntegerProducts:
    """The products in 8-bit integers, accumulated in 32-bit ones: exact but for the rounding of U and q."""

    dtype, one = torch.int8, 127
    multiply = staticmethod(getattr(torch, "_int_mm", None))  # None: this PyTorch has no such product

    def __init__(self):
        self.memory = Workspace()

    def _rounded(self, U, size, dim, name):
        scale = size.amax(dim, keepdim=True).clamp_(min=1e-12).div_(127)
        rounded = torch.mul(U, 1 / scale, out=self.memory.get_tensor("scaled", U.shape)).round_()
        return self.memory.get_tensor(name, U.shape, torch.int8).copy_(rounded), scale.squeeze(dim)

    def load(self, U: torch.Tensor):
        size = torch.abs(U, out=self.memory.get_tensor("size", U.shape))
        self.up_weight, self.up_scale = self._rounded(U, size, 0, "up_weight")
        self.down_weight, self.down_scale = self._rounded(U, size, 1, "down_weight")

    def _product(self, a, b, name):
        shape = (a.shape[0], b.shape[1])
        product = torch._int_mm(a, b, out=self.memory.get_tensor(name, shape, torch.int32))
        return self.memory.get_tensor(name + "_32", shape).copy_(product)

    def up(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a = self._product(v, self.up_weight, "up")
        return torch.addcmul(c, a, self.up_scale, out=a)

    def down(self, h: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = self._product(h, self.down_weight.T, "down")
        return torch.addcmul(b, a, self.down_scale, out=a)

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        out.copy_(q.add_(u, alpha=UNIT / self.one).mul_(self.one))  # cuts the fraction off

    def outer(self, v: torch.Tensor, code: torch.Tensor, out: torch.Tensor, weight: float):
        return out.add_(self._product(v.T, code, "outer"), alpha=weight / self.one)

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(torch.ones(1, len(states), dtype=torch.int8), states)[0].float()


PRECISIONS = {
    "float32": lambda: FloatProducts(torch.float32),
    "bfloat16": lambda: FloatProducts(torch.bfloat16),
    "int8": IntegerProducts,
}


@lru_cache
def matrix_rates(batch: int, visible: int, hidden: int, threads: int, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of the products of these sizes in every precision that this processor and this PyTorch have.

    A precision that the processor emulates can be hundreds of times slower: it is tried on a few rows first, and measured on no more
    if it is slow on those.
    """
    rates = {}
    U = 0.01 * torch.randn(visible, hidden)
    for name, make in PRECISIONS.items():
        products = make()
        products.load(U)
        v = (torch.rand(batch, visible) < 0.5).to(products.dtype)

        def rate(rows: int, repeats: int, v=v, products=products) -> float:
            best = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                products.multiply(v[:rows], products.up_weight)
                best = min(best, time.perf_counter() - start)
            return 2 * rows * visible * hidden / best

        few = min(batch, 32)
        try:
            rates[name] = rate(few, 2)
        except (TypeError, RuntimeError, NotImplementedError):  # no such product in this build
            continue
        if rates[name] > max(rates.values()) / 8:
            rate(batch, 1)
            rates[name] = rate(batch, repeats)
    return rates


def fastest_precision(batch: int, visible: int, hidden: int) -> str:
    """The precision with the highest `matrix_rates`; "float32" for machines so small that rounding costs more than it saves."""
    if not hasattr(torch, "_int_mm") or batch * visible * hidden < 1e7:
        return "float32"
    rates = matrix_rates(batch, visible, hidden, torch.get_num_threads())
    return max(rates, key=rates.get)


class FastContrastiveDivergence:
    """`rbm.contrastive_divergence` for one binary block on a CPU.

    Args:
        precision: "float32", "bfloat16", "int8", or "auto" for the fastest at the sizes of the first batch.
        seed: of the random numbers (NumPy's SFC64, several times faster here than PyTorch's generator).
    """

    def __init__(self, precision: str = "auto", seed: Optional[int] = None):
        if precision != "auto" and precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; allowed are 'auto', {', '.join(map(repr, PRECISIONS))}")
        self.precision = precision
        self.products = None if precision == "auto" else PRECISIONS[precision]()
        self.bits, self.memory = np.random.SFC64(seed), Workspace()

    def choose(self, batch: int, visible: int, hidden: int) -> str:
        """The precision, settled now if it was "auto": data of its dtype (`products.dtype`) need no conversion later."""
        if self.products is None:
            self.precision = fastest_precision(batch, visible, hidden)
            self.products = PRECISIONS[self.precision]()
        return self.precision

    def uniform(self, shape: torch.Size) -> torch.Tensor:
        """Fp32 whole numbers, uniform in [0, 2^16), until the next call."""
        n = shape.numel()
        numbers = torch.from_numpy(self.bits.random_raw((n + 3) // 4).view(np.uint16))[:n].view(shape)
        return self.memory.get_tensor("uniform", shape).copy_(numbers)

    def sample(self, prob: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """out = 1 with these probabilities, else 0: the integer part of prob + u."""
        if out.dtype == torch.float32:
            torch.add(prob, u, alpha=UNIT, out=out).floor_()
            return
        total = torch.add(prob, u, alpha=UNIT, out=self.memory.get_tensor("total", prob.shape))
        out.copy_(total if out.dtype == torch.int8 else total.floor_())  # int8 cuts the fraction off

    def sample_hidden(self, v: torch.Tensor, c: torch.Tensor, h: torch.Tensor, code: torch.Tensor):
        """Writes samples of P(h | v) into `h` (n, H) unless it is None, and the encoded probabilities into `code`."""
        for start in range(0, len(v), BLOCK):
            rows = slice(start, start + BLOCK)
            q = self.products.up(v[rows], c).sigmoid_()
            u = self.uniform(q.shape)
            if h is not None:
                self.sample(q, u, h[rows])
            self.products.encode(q, u, code[rows])

    def sample_visible(self, h: torch.Tensor, b: torch.Tensor, v: torch.Tensor):
        """Writes samples of P(v | h) into `v` (n, V)."""
        for start in range(0, len(h), BLOCK):
            rows = slice(start, start + BLOCK)
            prob = self.products.down(h[rows], b).sigmoid_()
            self.sample(prob, self.uniform(prob.shape), v[rows])

    def gradient(
        self, p: RBMParameters, v: torch.Tensor, chains: Optional[torch.Tensor] = None, steps: int = 1
    ) -> tuple[RBMParameters, torch.Tensor, torch.Tensor]:
        """Gradient of the negative log-likelihood per sample, the hidden states where the chains ended, and mean q.

        All three hold until the next call: they are written anew by it.

        Args:
            p: a machine with the word block (U, b) only.
            v (B, K): 0 or 1, any dtype.
            chains (M, H): hidden states to go on from (PCD); None: the chains start at the data (CD).
        """
        self.choose(len(v), *p.U.shape)
        products, (visible, hidden) = self.products, p.U.shape
        n, m = len(v), len(v if chains is None else chains)
        tensor = lambda name, *shape: self.memory.get_tensor(name, torch.Size(shape), products.dtype)
        products.load(p.U)
        v = v.to(products.dtype)
        h, sampled, code = tensor("h", m, hidden), tensor("v", m, visible), tensor("code", n, hidden)
        self.sample_hidden(v, p.c, h if chains is None else None, code)
        if chains is not None:
            h.copy_(chains)  # nothing is done if it is what the last call returned
        sum_q = products.sum(code)
        dU = products.outer(v, code, self.memory.get_tensor("dU", p.U.shape).zero_(), -1 / n)
        code = tensor("chain_code", m, hidden)
        for _ in range(steps):
            self.sample_visible(h, p.b, sampled)
            self.sample_hidden(sampled, p.c, h, code)
        products.outer(sampled, code, dU, 1 / m)
        mean_q = sum_q / (n * products.one)
        gradient = RBMParameters(
            c=products.sum(code) / (m * products.one) - mean_q,
            U=dU,
            b=products.sum(sampled) / m - products.sum(v) / n,
        )
        return gradient, h, mean_q
