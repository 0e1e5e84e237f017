"""Contrastive divergence of a binary RBM, with matrix products in fp32, bfloat16 or, on a CPU, 8-bit integers.

A step of CD-1 or PCD-1 is five products of V*H multiply-adds a sample, 10 V H FLOP, which bound its speed. Two things make
it fast on a CPU:

- v and h are 0 or 1 and so exact in 8 bits. U is rounded to 8 bits with a scale per output unit, and q to multiples of
  1/127 *at random*, so that its mean is kept. The products are summed exactly, in 32-bit integers. The parameters stay fp32.
- A unit is sampled as the integer part of P + u with a 16-bit uniform u: a sum and a conversion, no comparison.

On another device it is the same arithmetic in fp32 or bfloat16, on all rows at once, and the device is never waited for.

The reference is `modeling_blip_rbm.rbm.contrastive_divergence`. V, H, B and M are visible and hidden units, rows of a batch
and Gibbs chains.
"""

from typing import Optional

import numpy as np
import torch

from modeling_blip_rbm.rbm import RBMParameters


UNIT = 2.0**-16  # random numbers are 16 bits
BLOCK = 256  # rows that a CPU samples at a time: their fp32 values stay in its cache
SMALLEST_ROUNDED = 4e7  # multiply-adds of a product; below it, rounding costs about the time that it saves


def processor_precision(batch: int, visible: int, hidden: int) -> str:
    """The fastest precision for products of these sizes on this kind of processor, a key of `PRECISIONS`.

    It follows from the sizes and the processor's instructions alone, so that all processes on a machine agree. GFLOP/s of
    large products on one thread (`benchmarks/rbm.py` measures them):

    | instructions | float32 | bfloat16 | int8 |
    |---|---|---|---|
    | AVX-512 VNNI, AVX512_BF16 and AMX | 150 | 1,000 | 1,900 |
    | AVX-512 VNNI and AVX512_BF16 | 100 | 220 | 443 |
    | AVX-512 VNNI | 130 | 72 | 540 |

    Other processors get float32: they emulate the other two, up to hundreds of times slower.
    """
    # a private function of PyTorch: float32 is right wherever a version lacks it
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    if has_vnni and torch.backends.mkldnn.is_available() and batch * visible * hidden >= SMALLEST_ROUNDED:
        return "int8"
    return "float32"


class Workspace(dict):
    """Tensors by name, used again in every step: fresh memory of their size costs more than the arithmetic done in it."""

    def __init__(self, device=None):
        super().__init__()
        self.device = torch.device(device or "cpu")

    def get_tensor(self, name: str, shape, dtype=torch.float32) -> torch.Tensor:
        """The tensor of this name, with whatever it holds; a new one if the shape or the dtype is another."""
        tensor = self.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            tensor = self[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return tensor

    def __reduce__(self):
        return Workspace, (self.device,)  # pickled empty: nothing in it outlives a step


class Products:
    """The matrix products of a step. A subclass gives a precision:

    - `dtype` of states and weights, `product_dtype` and the function `multiply` (a, b, out) of the product;
    - `one`: what a probability of 1 is encoded as.
    """

    one = 1

    def __init__(self, device=None):
        self.memory = Workspace(device)

    def _product(self, a, b, name):
        out = self.memory.get_tensor(name, (len(a), b.shape[1]), self.product_dtype)
        return self.multiply(a, b, out=out)

    def up(self, v: torch.Tensor) -> torch.Tensor:
        """v U (n, H), valid until the next call; the true value is this times `up_scale` (H,)."""
        return self._product(v, self.up_weight, "up")

    def down(self, h: torch.Tensor) -> torch.Tensor:
        """h U' (n, V), valid until the next call; the true value is this times `down_scale` (V,)."""
        return self._product(h, self.down_weight.T, "down")

    def outer(self, v: torch.Tensor, code: torch.Tensor, out: torch.Tensor, weight: float, add: bool):
        """out (V, H) = weight * v'q, plus what it holds if `add`. code (n, H): q as from `encode`."""
        product, weight = self._product(v.T, code, "outer"), weight / self.one
        if add:
            out.add_(product.to(out.dtype), alpha=weight)
        else:
            out.copy_(product).mul_(weight)  # torch.mul(product, weight, out=out) would make a copy first


class FloatProducts(Products):
    """The products in a floating-point `dtype`, accumulated in fp32."""

    multiply = staticmethod(torch.mm)

    def __init__(self, dtype: torch.dtype, device=None):
        super().__init__(device)
        self.dtype = self.product_dtype = dtype

    def load(self, U: torch.Tensor):
        """Take these weights (V, H) for `up` and `down`."""
        same = self.dtype == U.dtype
        self.up_weight = self.down_weight = U if same else self.memory.get_tensor("U", U.shape, self.dtype).copy_(U)
        self.down_scale, self.up_scale = (self.memory.get_tensor(name, (n,)).fill_(1) for name, n in zip("VH", U.shape))

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """out (n, H), in `dtype` = the probabilities q as `outer` takes them. u (n, H): whole numbers in [0, 2^16)."""
        out.copy_(q)

    def outer(self, v, code, out, weight, add):
        if self.dtype == torch.float32:
            torch.addmm(out, v.T, code, beta=float(add), alpha=weight, out=out)
        else:
            super().outer(v, code, out, weight, add)

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        """Sum over the rows, fp32, of v, h or q as encoded."""
        return states.sum(0, dtype=torch.float32)


class IntegerProducts(Products):
    """The products in 8-bit integers, accumulated in 32-bit ones: exact but for the rounding of U and q."""

    dtype, product_dtype, one = torch.int8, torch.int32, 127
    multiply = staticmethod(torch._int_mm)

    def load(self, U: torch.Tensor):
        """As `FloatProducts.load`; rounds U twice, with a scale per hidden unit for `up` and one per visible unit for `down`."""
        size = torch.abs(U, out=self.memory.get_tensor("size", U.shape))
        rounded = []
        for dim, name in enumerate(("up", "down")):
            scale = self.memory.get_tensor(f"{name}_scale", (U.shape[1 - dim],))
            torch.amax(size, dim, out=scale).clamp_(min=1e-10).div_(127)
            scaled = torch.div(U, scale.unsqueeze(dim), out=self.memory.get_tensor("scaled", U.shape))
            weight = self.memory.get_tensor(f"{name}_weight", U.shape, torch.int8).copy_(scaled.round_())
            rounded.append((weight, scale))
        (self.up_weight, self.up_scale), (self.down_weight, self.down_scale) = rounded

    def encode(self, q: torch.Tensor, u: torch.Tensor, out: torch.Tensor):
        """As `FloatProducts.encode`; overwrites q. The conversion cuts the fraction off, u decides which way q is rounded."""
        out.copy_(q.add_(u, alpha=UNIT / self.one).mul_(self.one))

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        """As `FloatProducts.sum`."""
        return torch._int_mm(torch.ones(1, len(states), dtype=torch.int8), states)[0].float()


PRECISIONS = {
    "float32": lambda device=None: FloatProducts(torch.float32, device),
    "bfloat16": lambda device=None: FloatProducts(torch.bfloat16, device),
    "int8": IntegerProducts,
}


class FastContrastiveDivergence:
    """`modeling_blip_rbm.rbm.contrastive_divergence` for one binary block.

    Args:
        precision: of the products, "float32", "bfloat16" or, on a CPU, "int8".
        seed: of the random numbers (on a CPU NumPy's SFC64, several times faster there than PyTorch's generator).
        device: where it computes; default: a CPU. What it is given must be there.

    Raises:
        ValueError: for another precision.
    """

    def __init__(self, precision: str = "float32", seed: Optional[int] = None, device=None):
        self.memory = Workspace(device)
        self.on_cpu = self.memory.device.type == "cpu"
        allowed = [name for name in PRECISIONS if self.on_cpu or name != "int8"]
        if precision not in allowed:
            raise ValueError(
                f"precision is {precision!r}; allowed on {self.memory.device} are {', '.join(map(repr, allowed))}"
            )
        self.products = PRECISIONS[precision](device)
        self.bits = np.random.SFC64(seed) if self.on_cpu else torch.Generator(self.memory.device)
        if not self.on_cpu and seed is not None:
            self.bits.manual_seed(seed)

    def uniform(self, shape: torch.Size) -> torch.Tensor:
        """Fp32 whole numbers, uniform in [0, 2^16), until the next call."""
        if not self.on_cpu:
            return self.memory.get_tensor("uniform", shape).random_(0, 2**16, generator=self.bits)
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

    def sample_units(self, a: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, state, code) -> torch.Tensor:
        """Sample units with the inputs bias + scale * a (n, K).

        Writes their states into `state` and their encoded probabilities into `code`, (n, K) each, where not None.

        Returns:
            (K,) the sum over the rows of the probabilities as encoded, or else of the states, fp32.
        """
        prob = a if a.dtype == torch.float32 else self.memory.get_tensor("inputs", a.shape).copy_(a)
        torch.addcmul(bias, prob, scale, out=prob).sigmoid_()
        u = self.uniform(prob.shape)
        if state is not None:
            self.sample(prob, u, state)
        if code is not None:
            self.products.encode(prob, u, code)
        return self.products.sum(state if code is None else code)

    def blocks(self, rows: int) -> list[slice]:
        """The rows that are sampled at a time."""
        block = BLOCK if self.on_cpu else rows
        return [slice(start, start + block) for start in range(0, rows, block)]

    def sample_hidden(self, v: torch.Tensor, c: torch.Tensor, h: Optional[torch.Tensor], code: torch.Tensor):
        """Write samples of P(h | v) into `h` (n, H) unless it is None, and the encoded probabilities into `code` (n, H).

        Returns:
            (H,) the sum of the probabilities over the rows.
        """
        total = 0
        for rows in self.blocks(len(v)):
            a = self.products.up(v[rows])
            total += self.sample_units(a, c, self.products.up_scale, None if h is None else h[rows], code[rows])
        return total / self.products.one

    def sample_visible(self, h: torch.Tensor, b: torch.Tensor, v: torch.Tensor):
        """Write samples of P(v | h) into `v` (n, V).

        Returns:
            (V,) their sum over the rows.
        """
        total = 0
        for rows in self.blocks(len(h)):
            total += self.sample_units(self.products.down(h[rows]), b, self.products.down_scale, v[rows], None)
        return total

    def gradient(
        self, p: RBMParameters, v: torch.Tensor, chains: Optional[torch.Tensor] = None, steps: int = 1
    ) -> tuple[RBMParameters, torch.Tensor, torch.Tensor]:
        """Gradient of the negative log-likelihood per sample, the hidden states where the chains ended, and mean q.

        All three are valid until the next call, which overwrites them.

        Args:
            p: a machine with the word block (U, b) only.
            v (B, V): 0 or 1, any dtype.
            chains (M, H): hidden states to go on from (PCD-k); None: the chains start at the data (CD-k).
            steps: k Gibbs steps.
        """
        products, (visible, hidden) = self.products, p.U.shape
        n = len(v)
        m = n if chains is None else len(chains)
        tensor = lambda name, *shape: self.memory.get_tensor(name, torch.Size(shape), products.dtype)
        h = tensor("h", m, hidden)
        if chains is not None and chains is not h:
            h.copy_(chains)
        products.load(p.U)
        # the data's rows above the chains', so that one product makes both halves of the gradient
        states, codes = tensor("states", n + m, visible), tensor("codes", n + m, hidden)
        # a product with a float: division by a whole number makes a tensor of it first
        mean_v = products.sum(states[:n].copy_(v)).mul_(1 / n)
        sum_q = self.sample_hidden(states[:n], p.c, h if chains is None else None, codes[:n])
        codes[:n].neg_()
        for _ in range(steps):
            sum_v = self.sample_visible(h, p.b, states[n:])
            sum_q_model = self.sample_hidden(states[n:], p.c, h, codes[n:])
        dU = self.memory.get_tensor("dU", p.U.shape)
        if n == m:
            products.outer(states, codes, dU, 1 / n, add=False)
        else:
            products.outer(states[:n], codes[:n], dU, 1 / n, add=False)
            products.outer(states[n:], codes[n:], dU, 1 / m, add=True)
        mean_q = sum_q.mul_(1 / n)
        return RBMParameters(c=sum_q_model.mul_(1 / m).sub_(mean_q), U=dU, b=sum_v.mul_(1 / m).sub_(mean_v)), h, mean_q
