"""Contrastive divergence of the binary RBM on a processor, its matrix products in the precision that is fastest there.

A step of CD-1 or PCD-1 is five products of V*H multiply-adds a sample: 10 V H FLOP, which bounds its speed. What helps:

- v and h are 0 or 1, so that they are exact in 8-bit integers; U is rounded to 8 bits with a scale per output unit, q to
  1/127 *at random*, so that its mean is kept. The parameters themselves stay fp32. Sums of the products are exact (int32).
- A unit is sampled as the integer part of P + u with 16-bit u: a sum and a conversion, no comparison, cheap numbers.

`fastest_precision` measures what a processor is good at; `tests/boltzmann/test_fast.py` holds each against `rbm.py`, the reference.

With fast products, sampling is half of the time: each of its half a dozen operations goes over memory once. `rbm_kernels.cpp` does them
in one pass; it is compiled (seconds, kept by PyTorch for the next time) if asked for, as it takes a C++ compiler. `rbm_products.cpp`, compiled
with it, does the whole step in bfloat16 on processors with AVX512_BF16, and samples while the sums are still in registers.
"""

import hashlib
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from modeling_blip_rbm.rbm import RBMParameters, centred_gradient


UNIT = 2.0**-16  # random numbers are 16 bits
BLOCK = 256  # rows that are sampled at a time: their fp32 values stay in the processor's cache


class Workspace(dict):
    """Tensors that are used again in every step: fresh memory of this size costs more than the arithmetic done in it."""

    def get_tensor(self, name: str, shape, dtype=torch.float32) -> torch.Tensor:
        tensor = self.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            tensor = self[name] = torch.empty(shape, dtype=dtype)
        return tensor


class Products:
    """The products of a step. A precision says its `dtype` (of states and weights), `product_dtype`, `multiply`, and `one`, how a
    probability of 1 is encoded.
    """

    one = 1

    def __init__(self):
        self.memory = Workspace()

    def _product(self, a, b, name):
        out = self.memory.get_tensor(name, (len(a), b.shape[1]), self.product_dtype)
        return self.multiply(a, b, out=out)

    def up(self, v: torch.Tensor) -> torch.Tensor:
        """v U, (n, H), until the next call; to be multiplied by `up_scale` (H,)."""
        return self._product(v, self.up_weight, "up")

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """h U', (n, V), until the next call; to be multiplied by `down_scale` (V,)."""
        return self._product(h, self.down_weight.T, "down")

    def outer(self, v: torch.Tensor, code: torch.Tensor, out: torch.Tensor, weight: float, add: bool):
        """out (V, H) = weight * v'q, added to what it holds if `add`."""
        product, weight = self._product(v.T, code, "outer"), weight / self.one
        if add:
            out.add_(product.to(out.dtype), alpha=weight)
        else:
            out.copy_(product).mul_(weight)  # torch.mul(product, weight, out=out) would make a copy first


@lru_cache
def memory_size(n: int, m: int, visible: int, hidden: int) -> int:
    """Numbers of 32 bits that a step in one call works in, with n rows and m chains."""
    return compiled_kernels().memory_size(n, m, visible, hidden)


@lru_cache
def processor_capabilities() -> dict:
    """Instructions of this processor by name; {} if this PyTorch does not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def step_in_one_call(kernels, U: torch.Tensor) -> bool:
    """Whether `rbm_products.cpp` is compiled, has code for this processor, and for these sizes: it takes units in pairs. PyTorch's own
    products are several times faster where there are matrix units (AMX)."""
    compiled = kernels is not None and hasattr(kernels, "gradient")
    return compiled and not processor_capabilities().get("amx_bf16") and U.shape[0] % 2 == U.shape[1] % 2 == 0


class FloatProducts(Products):
    """The products in `dtype`, accumulated in fp32 by the processor's library."""

    multiply = staticmethod(torch.mm)

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = self.product_dtype = dtype

    def load(self, U: torch.Tensor, kernels=None):
        same = self.dtype == U.dtype
        self.up_weight = self.down_weight = U if same else self.memory.get_tensor("U", U.shape, self.dtype).copy_(U)
        self.down_scale, self.up_scale = (self.memory.get_tensor(name, (n,)).fill_(1) for name, n in zip("VH", U.shape))

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """out (n, H), in `dtype`: what `outer` takes for the probabilities q. u: as from `uniform`."""
        out.copy_(q)

    def outer(self, v, code, out, weight, add):
        if self.dtype == torch.float32:
            torch.addmm(out, v.T, code, beta=float(add), alpha=weight, out=out)
        else:
            super().outer(v, code, out, weight, add)

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        """Sum over the samples, fp32, of v, h or q as encoded."""
        return states.sum(0, dtype=torch.float32)


class IntegerProducts(Products):
    """The products in 8-bit integers, accumulated in 32-bit ones: exact but for the rounding of U and q."""

    dtype, product_dtype, one = torch.int8, torch.int32, 127
    multiply = staticmethod(getattr(torch, "_int_mm", None))  # None: this PyTorch has no such product

    def load(self, U: torch.Tensor, kernels=None):
        weights = [self.memory.get_tensor(name, U.shape, torch.int8) for name in ("up_weight", "down_weight")]
        sizes = (("up_scale", U.shape[1]), ("down_scale", U.shape[0]))
        scales = [self.memory.get_tensor(name, (n,)) for name, n in sizes]
        if kernels is not None:
            kernels.round_weights(U, *weights, *scales)
        else:
            size = torch.abs(U, out=self.memory.get_tensor("size", U.shape))
            for dim, weight, scale in zip((0, 1), weights, scales):
                torch.amax(size, dim, out=scale).clamp_(min=1e-10).div_(127)
                scaled = torch.div(U, scale.unsqueeze(dim), out=self.memory.get_tensor("scaled", U.shape))
                weight.copy_(scaled.round_())
        self.up_weight, self.down_weight = weights
        self.up_scale, self.down_scale = scales

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        out.copy_(q.add_(u, alpha=UNIT / self.one).mul_(self.one))  # cuts the fraction off

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
    g = torch.Generator().manual_seed(0)  # of its own: a seeded run must not depend on whether this was measured before
    U = 0.01 * torch.randn(visible, hidden, generator=g)
    for name, make in PRECISIONS.items():
        products = make()
        products.load(U)
        v = (torch.rand(batch, visible, generator=g) < 0.5).to(products.dtype)

        def rate(rows: int, repeats: int, v=v, products=products) -> float:
            best = float("inf")
            for _ in range(repeats):
                start = time.perf_counter()
                products.multiply(v[:rows], products.up_weight)
                best = min(best, time.perf_counter() - start)
            return 2 * rows * visible * hidden / best

        few = min(batch, 32)
        try:
            rate(few, 1)  # the first call also makes the product's code
            rates[name] = rate(few, 3)
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


@lru_cache
def compiled_kernels():
    """The functions of `rbm_kernels.cpp` and `rbm_products.cpp`, compiled for this processor at the first call on a machine.

    Raises:
        RuntimeError: where they cannot be compiled.
    """
    from torch.utils.cpp_extension import load

    if shutil.which("ninja") is None:
        try:  # pip's is beside Python, which is on no path unless the environment is activated
            import ninja
        except ImportError:  # said below; not suppress(): transformers takes an import that is in no `try` for one that remote code needs
            pass
        else:
            os.environ["PATH"] += os.pathsep + ninja.BIN_DIR
    sources = [Path(__file__).with_name(name) for name in ("rbm_kernels.cpp", "rbm_products.cpp")]
    # -ffast-math lets the compiler make vectors of rounding; nothing here is NaN or infinite on purpose
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp"]
    # compiled code is kept in the home directory, which processors of several kinds may share
    instructions = " ".join(sorted(name for name, value in processor_capabilities().items() if value is True))
    kind = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    name = f"blip_rbm_kernels_{torch.backends.cpu.get_cpu_capability().lower()}_{kind}"
    try:
        load(name, [str(source) for source in sources], extra_cflags=flags, is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise RuntimeError(
            f"compiled=True, but rbm_kernels.cpp could not be compiled (it takes a C++ compiler, and ninja: pip install ninja); "
            f"use compiled=False. The compiler said: {error}"
        ) from error
    return torch.ops.blip_rbm


class FastContrastiveDivergence:
    """`rbm.contrastive_divergence` for one binary block on a CPU.

    Args:
        precision: "float32", "bfloat16", "int8", or "auto" for the fastest at the sizes of the first batch.
        seed: of the random numbers (NumPy's SFC64, several times faster here than PyTorch's generator).
        compiled: sample with `rbm_kernels.cpp`, see `compiled_kernels`.
    """

    def __init__(self, precision: str = "auto", seed: Optional[int] = None, compiled: bool = False):
        if precision != "auto" and precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}; allowed are 'auto', {', '.join(map(repr, PRECISIONS))}")
        self.precision = precision
        self.products = None if precision == "auto" else PRECISIONS[precision]()
        self.bits, self.memory = np.random.SFC64(seed), Workspace()
        self.compiled = compiled
        if compiled:
            compiled_kernels()

    @property
    def kernels(self):
        """The compiled functions or None; asked for anew, as they cannot be pickled."""
        return compiled_kernels() if self.compiled else None

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

    def _kernel_seed(self) -> int:
        return int(self.bits.random_raw()) >> 1  # as many bits as a signed number has

    def sample(self, prob: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """out = 1 with these probabilities, else 0: the integer part of prob + u."""
        if out.dtype == torch.float32:
            torch.add(prob, u, alpha=UNIT, out=out).floor_()
            return
        total = torch.add(prob, u, alpha=UNIT, out=self.memory.get_tensor("total", prob.shape))
        out.copy_(total if out.dtype == torch.int8 else total.floor_())  # int8 cuts the fraction off

    def sample_units(self, a: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, state, code) -> torch.Tensor:
        """Units with the inputs bias + scale * a (n, K): writes their states, and their encoded probabilities, where not None.

        Returns:
            (K,) the sum over the rows of the probabilities as encoded, or else of the states, fp32.
        """
        if self.kernels is not None:
            total = torch.empty_like(bias)
            self.kernels.sample(a, bias, scale, self._kernel_seed(), state, code, total)
            return total
        prob = a if a.dtype == torch.float32 else self.memory.get_tensor("inputs", a.shape).copy_(a)
        torch.addcmul(bias, prob, scale, out=prob).sigmoid_()
        u = self.uniform(prob.shape)
        if state is not None:
            self.sample(prob, u, state)
        if code is not None:
            self.products.encode(prob, u, code)
        return self.products.sum(state if code is None else code)

    def _blocks(self, rows: int) -> list[slice]:
        step = rows if self.kernels is not None else BLOCK  # what is done in one pass over memory needs no blocks
        return [slice(start, start + step) for start in range(0, rows, step)]

    def sample_hidden(self, v: torch.Tensor, c: torch.Tensor, h: Optional[torch.Tensor], code: torch.Tensor):
        """Writes samples of P(h | v) into `h` (n, H) unless it is None, and the encoded probabilities into `code`.

        Returns:
            (H,) the sum of the probabilities over the samples.
        """
        total = 0
        for rows in self._blocks(len(v)):
            a = self.products.up(v[rows])
            total += self.sample_units(a, c, self.products.up_scale, None if h is None else h[rows], code[rows])
        return total / self.products.one

    def sample_visible(self, h: torch.Tensor, b: torch.Tensor, v: torch.Tensor):
        """Writes samples of P(v | h) into `v` (n, V).

        Returns:
            (V,) their sum.
        """
        total = 0
        for rows in self._blocks(len(h)):
            total += self.sample_units(self.products.down(h[rows]), b, self.products.down_scale, v[rows], None)
        return total

    def _take(self, v: torch.Tensor, rows: Optional[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """out (B, V) = these rows of v, or all of them. Returns their sum (V,)."""
        if rows is not None and self.kernels is not None and v.dtype == out.dtype:
            total = torch.empty(v.shape[1])
            self.kernels.take_rows(v, rows, out, total)
            return total
        out.copy_(v if rows is None else v.index_select(0, rows))  # not v[rows], which is 8 times slower
        return self.products.sum(out)

    def gradient(
        self,
        p: RBMParameters,
        v: torch.Tensor,
        chains: Optional[torch.Tensor] = None,
        steps: int = 1,
        rows: Optional[torch.Tensor] = None,
    ) -> tuple[RBMParameters, torch.Tensor, torch.Tensor]:
        """Gradient of the negative log-likelihood per sample, the hidden states where the chains ended, and mean q.

        All three hold until the next call: they are written anew by it.

        Args:
            p: a machine with the word block (U, b) only.
            v (B, K): 0 or 1, any dtype.
            chains (M, H): hidden states to go on from (PCD); None: the chains start at the data (CD).
            rows (B,): v is more than the batch (of the dtype of the `products`), of which these rows are meant.
        """
        n = len(v) if rows is None else len(rows)
        self.choose(n, *p.U.shape)
        products, (visible, hidden) = self.products, p.U.shape
        m = n if chains is None else len(chains)
        tensor = lambda name, *shape: self.memory.get_tensor(name, torch.Size(shape), products.dtype)
        h = tensor("h", m, hidden)
        if chains is not None and chains is not h:
            h.copy_(chains)
        dU = self.memory.get_tensor("dU", p.U.shape)
        if self.precision == "bfloat16" and step_in_one_call(self.kernels, p.U):
            return self._gradient_in_one_call(p, v, h, chains is None, steps, rows, dU)
        products.load(p.U, self.kernels)
        # the data's rows above the chains', so that one product makes both halves of the gradient
        states, codes = tensor("states", n + m, visible), tensor("codes", n + m, hidden)
        # a product with a float: division by a whole number makes a tensor of it first
        mean_v = self._take(v, rows, states[:n]).mul_(1 / n)
        sum_q = self.sample_hidden(states[:n], p.c, h if chains is None else None, codes[:n])
        codes[:n].neg_()
        for _ in range(steps):
            sum_v = self.sample_visible(h, p.b, states[n:])
            sum_q_model = self.sample_hidden(states[n:], p.c, h, codes[n:])
        if n == m:
            products.outer(states, codes, dU, 1 / n, add=False)
        else:
            products.outer(states[:n], codes[:n], dU, 1 / n, add=False)
            products.outer(states[n:], codes[n:], dU, 1 / m, add=True)
        mean_q = sum_q.mul_(1 / n)
        return RBMParameters(c=sum_q_model.mul_(1 / m).sub_(mean_q), U=dU, b=sum_v.mul_(1 / m).sub_(mean_v)), h, mean_q

    def _gradient_in_one_call(self, p, v, h, from_data: bool, steps: int, rows, dU):
        """`gradient` by `rbm_products.cpp`; h (M, H) are the chains' states, written anew, and dU the gradient's memory."""
        n, m, (visible, hidden) = len(v) if rows is None else len(rows), len(h), p.U.shape
        packed = self.memory.get_tensor("packed", torch.Size([memory_size(n, m, visible, hidden)]), torch.int32)
        shapes = {"db": p.b.shape, "dc": p.c.shape, "mean_q": p.c.shape}
        db, dc, mean_q = (self.memory.get_tensor(name, shape) for name, shape in shapes.items())
        v, seed = v.to(h.dtype).contiguous(), self._kernel_seed()
        self.kernels.gradient(p.U, p.b, p.c, v, rows, h, from_data, steps, seed, packed, dU, db, dc, mean_q)
        return RBMParameters(c=dc, U=dU, b=db), h, mean_q

    def centred(self, p: RBMParameters, gradient: RBMParameters, mean_v: torch.Tensor, mean_h: torch.Tensor):
        """`rbm.centred_gradient` of what `gradient` gave, in its place."""
        if self.kernels is None:
            return centred_gradient(p, gradient, mean_h, mean_w=mean_v)
        self.kernels.centre(gradient.U, gradient.b, gradient.c, mean_v, mean_h)
        return gradient
