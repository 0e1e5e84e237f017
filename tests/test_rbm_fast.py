"""The fast products against the reference in rbm.py."""

import shutil
from unittest import mock

import pytest
import torch

from modeling_blip_rbm.rbm import GibbsState, RBMParameters, centred_gradient, contrastive_divergence
from modeling_blip_rbm.rbm_fast import (
    PRECISIONS,
    FastContrastiveDivergence,
    compiled_kernels,
    fastest_precision,
    matrix_rates,
)


K, H, B = 37, 23, 41
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
COMPILED = [False, pytest.param(True, marks=needs_compiler, id="compiled")]


def machine(std, seed=3, visible=K, hidden=H):
    g = torch.Generator().manual_seed(seed)
    r = lambda *size: std * torch.randn(*size, generator=g)
    return RBMParameters(c=r(hidden), U=r(visible, hidden), b=r(visible))


@pytest.fixture
def fused():
    """The compiled kernels, where they have products of their own."""
    if shutil.which("c++") is None or not hasattr(compiled_kernels(), "sample_product"):
        pytest.skip("no C++ compiler, or no AVX512_BF16")
    return compiled_kernels()


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("visible, hidden", [(K, H), (2 * K, 2 * H)])  # fused products take even sizes
def test_gradient_is_the_reference_where_nothing_is_left_to_chance(precision, steps, compiled, visible, hidden):
    """With huge weights every unit is certain given the other layer, so both sample the same states."""
    g = torch.Generator().manual_seed(3)
    U = 100.0 * torch.randint(-1, 2, (visible, hidden), generator=g)  # exact in every precision
    p = RBMParameters(c=torch.full((hidden,), -50.0), U=U, b=torch.full((visible,), -50.0))  # no input is 0
    v = (torch.rand(B, visible) < 0.3).float()
    chains = (torch.rand(43, hidden) < 0.5).float()
    for start in (None, chains, chains[:B]):
        state = None if start is None else GibbsState(start, w=torch.zeros(len(start), visible))
        expected, after = contrastive_divergence(p, w=v, steps=steps, chains=state)
        gradient, h, _ = FastContrastiveDivergence(precision, 0, compiled).gradient(p, v, start, steps)
        assert torch.equal(h.float(), after.h)
        for name in ("c", "U", "b"):
            torch.testing.assert_close(
                getattr(gradient, name), getattr(expected, name), atol=TOLERANCE[precision], rtol=0
            )


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_mean_gradient_is_the_reference(precision, compiled):
    p, v = machine(0.4), (torch.rand(B, K) < 0.3).float()
    chains = (torch.rand(5000, H) < 0.5).float()
    g = torch.Generator().manual_seed(0)
    state = GibbsState(chains, w=torch.zeros(5000, K))
    expected = [contrastive_divergence(p, w=v, chains=state, generator=g)[0] for _ in range(10)]
    fast = FastContrastiveDivergence(precision, 0, compiled)
    actual = []
    for _ in range(10):
        gradient, _, mean_q = fast.gradient(p, v, chains)
        actual.append(RBMParameters(*(None if t is None else t.clone() for t in gradient)))
    torch.testing.assert_close(mean_q, torch.sigmoid(p.c + v @ p.U).mean(0), atol=TOLERANCE[precision], rtol=0)
    for name in ("c", "U", "b"):
        means = [torch.stack([getattr(g, name) for g in gradients]).mean(0) for gradients in (actual, expected)]
        torch.testing.assert_close(*means, atol=0.02, rtol=0)


@pytest.mark.parametrize("compiled", COMPILED)
def test_small_probabilities_keep_their_mean(compiled):
    """q is rounded at random: a unit that is on once in a thousand samples still gets its gradient."""
    p = RBMParameters(c=torch.full((H,), -6.9), U=torch.zeros(K, H), b=torch.zeros(K))
    fast, v = FastContrastiveDivergence("int8", 0, compiled), torch.ones(2003, K)
    _, _, mean_q = fast.gradient(p, v)
    assert mean_q.mean().item() == pytest.approx(0.001, rel=0.3)


def test_uniform_numbers_are_uniform():
    u = FastContrastiveDivergence("float32", seed=0).uniform(torch.Size((1009, 101)))
    assert 0 <= u.min() and u.max() < 2**16 and torch.equal(u, u.floor())
    assert (u.mean() / 2**16).item() == pytest.approx(0.5, abs=0.005)
    assert (u.var() / 2**32).item() == pytest.approx(1 / 12, abs=0.002)


@needs_compiler
def test_compiled_samples_are_independent_and_have_their_probabilities():
    """Of neighbouring units, of the two halves of a row, which share their random bits, of rows, and of calls one after another."""
    rows, units = 20011, 11  # an odd width: its last unit has bits of its own
    prob = torch.linspace(0.05, 0.95, units)
    fast = FastContrastiveDivergence("float32", 0, compiled=True)
    fast.choose(rows, units, units)
    calls = []
    for _ in range(2):
        state = torch.empty(rows, units)
        total = fast.sample_units(torch.zeros(rows, units), torch.logit(prob), torch.ones(units), state, None)
        assert torch.equal(total, state.sum(0))
        calls.append(state)
    standard_error = (prob * (1 - prob) / rows).sqrt()
    assert ((calls[0].mean(0) - prob).abs() < 4.5 * standard_error).all()
    centred = [(state - prob) / (prob * (1 - prob)).sqrt() for state in calls]
    pairs = [(centred[0], centred[0]), (centred[0], centred[1]), (centred[0][:-1], centred[0][1:])]
    for number, (a, b) in enumerate(pairs):
        correlation = a.T @ b / len(a)
        if number == 0:
            correlation -= torch.diag(correlation.diagonal())
        assert correlation.abs().max() < 4.5 / rows**0.5


@pytest.mark.parametrize("n, visible, hidden", [(1, 2, 2), (14, 62, 34), (41, 74, 46), (29, 106, 64)])
def test_fused_products(fused, n, visible, hidden):
    """Whole tiles and what is left over; against products of the same rounded weights."""
    p, products = machine(0.4, visible=visible, hidden=hidden), PRECISIONS["bfloat16"]()
    products.load(p.U, fused)
    assert products.fused
    v, h = ((torch.rand(n, units) < 0.3).bfloat16() for units in (visible, hidden))
    state, code, total = torch.empty(n, hidden).bfloat16(), torch.empty(n, hidden).bfloat16(), torch.empty(hidden)
    fused.sample_product(v, products.up_packed, p.c, 2**40 + 7, state, code, total)
    U = p.U.bfloat16().float()
    q = torch.sigmoid(p.c + v.float() @ U)
    torch.testing.assert_close(code.float(), q, atol=2e-3, rtol=0)
    torch.testing.assert_close(total, q.sum(0), atol=1e-4, rtol=1e-4)
    assert ((state == 0) | (state == 1)).all()

    certain = 40.0 * (torch.rand(visible) < 0.5) - 20.0  # what comes down decides for the few that are near it
    products.load(1e-3 * p.U, fused)
    down, total = torch.empty(n, visible).bfloat16(), torch.empty(visible)
    fused.sample_product(h, products.down_packed, certain, 3, down, None, total)
    assert torch.equal(down.float(), (certain > 0).float().expand(n, -1)) and torch.equal(total, down.float().sum(0))

    out = torch.full((visible, hidden), float("nan"))
    products.outer(v, code, out, 0.5, add=False)
    torch.testing.assert_close(out, 0.5 * v.float().T @ code.float())


def test_fused_samples_are_independent_and_have_their_probabilities(fused):
    """Of units side by side and in the two halves of a tile, of rows, and of calls one after another; inputs come down the weights."""
    rows, units = 20011, 46  # a whole tile and a part of one
    prob = torch.linspace(0.05, 0.95, units)
    products = PRECISIONS["bfloat16"]()
    products.load(torch.zeros(units, 2), fused)
    calls = [torch.empty(rows, units).bfloat16() for _ in range(2)]
    for seed, state in zip(torch.randint(2**62, (2,)).tolist(), calls):  # as wide as what the numbers are made of
        total = torch.empty(units)
        fused.sample_product(
            torch.ones(rows, 2).bfloat16(), products.down_packed, torch.logit(prob), seed, state, None, total
        )
        assert torch.equal(total, state.float().sum(0))
    standard_error = (prob * (1 - prob) / rows).sqrt()
    assert ((calls[0].float().mean(0) - prob).abs() < 4.5 * standard_error).all()
    centred = [(state.float() - prob) / (prob * (1 - prob)).sqrt() for state in calls]
    for a, b in ((centred[0], centred[0]), (centred[0], centred[1]), (centred[0][:-1], centred[0][1:])):
        correlation = a.T @ b / len(a)
        if a is b:
            correlation -= torch.diag(correlation.diagonal())
        assert correlation.abs().max() < 5 / rows**0.5


def test_fused_products_do_not_depend_on_who_computed_them(fused):
    """Pieces of work go to whichever thread is free; sums in fp32 depend on their order."""
    p, v = machine(0.4, visible=106, hidden=62), (torch.rand(1009, 106) < 0.3).bfloat16()
    products = PRECISIONS["bfloat16"]()
    products.load(p.U, fused)
    code, found = torch.empty(1009, 62).bfloat16(), []
    for _ in range(20):
        total = torch.empty(62)
        fused.sample_product(v, products.up_packed, p.c, 2**40, None, code, total)
        found.append(total)
    assert all(torch.equal(total, found[0]) for total in found)


def test_fused_products_refuse_wrong_shapes(fused):
    products = PRECISIONS["bfloat16"]()
    products.load(torch.zeros(6, 4), fused)
    x, bias, code = torch.zeros(3, 6).bfloat16(), torch.zeros(4), torch.zeros(3, 4).bfloat16()
    with pytest.raises(RuntimeError, match="must be asked for"):
        fused.sample_product(x, products.up_packed, bias, 0, None, None, bias)
    with pytest.raises(RuntimeError, match="packed for another size"):
        fused.sample_product(x, products.up_packed, torch.zeros(40), 0, code, None, bias)
    with pytest.raises(RuntimeError, match="a row for each of x"):
        fused.sample_product(x, products.up_packed, bias, 0, code[:2], None, bias)
    with pytest.raises(RuntimeError, match="even sizes"):
        fused.pack_weights(torch.zeros(5, 4), *3 * [torch.zeros(5, 4)])
    with pytest.raises(RuntimeError, match=r"out \(V, H\)"):
        fused.outer_product(x, code, 1.0, x, code, torch.zeros(4, 6))
    odd = PRECISIONS["bfloat16"]()
    odd.load(torch.zeros(5, 4), fused)
    assert not odd.fused
    with mock.patch("torch.cpu.get_capabilities", lambda: {"amx_bf16": True}, create=True):
        odd.load(torch.zeros(6, 4), fused)
    assert not odd.fused


@needs_compiler
@pytest.mark.parametrize("std", [0.01, 3.0])
def test_compiled_rounding_is_that_of_torch(std):
    U = machine(std).U.contiguous()
    U[:, 5] = 0  # a unit without weights
    plain, compiled = PRECISIONS["int8"](), PRECISIONS["int8"]()
    plain.load(U)
    compiled.load(U, compiled_kernels())
    for name in ("up_scale", "down_scale"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name))
    for name in ("up_weight", "down_weight"):
        assert (getattr(compiled, name).int() - getattr(plain, name).int()).abs().max() <= 1


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_more_data(precision, compiled):
    """A batch is named by its rows; more of them than an 8-bit counter can count."""
    p, fast = machine(0.4), FastContrastiveDivergence(precision, 0, compiled)
    data = (torch.rand(1009, K) < 0.9).to(PRECISIONS[precision]().dtype)
    rows, chains = torch.randint(len(data), (701,)), torch.zeros(B, H)
    gradient, _, mean_q = fast.gradient(p, data, chains, rows=rows)
    batch = data[rows]
    torch.testing.assert_close(fast.memory["states"][: len(rows)], batch)
    expected, _, expected_q = FastContrastiveDivergence(precision, 0, compiled).gradient(p, batch, chains)
    torch.testing.assert_close(gradient.b, expected.b)
    torch.testing.assert_close(mean_q, expected_q)


@needs_compiler
def test_compiled_centring_is_the_reference():
    p, gradient = machine(0.4), machine(1.0, seed=5)
    mean_v, mean_h = torch.rand(K), torch.rand(H)
    expected = centred_gradient(p, gradient, mean_h, mean_w=mean_v)
    result = FastContrastiveDivergence("float32", 0, compiled=True).centred(p, gradient, mean_v, mean_h)
    for name in ("c", "U", "b"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


@needs_compiler
def test_compiled_kernels_refuse_wrong_shapes():
    sample = compiled_kernels().sample
    a, row = torch.zeros(3, 5), torch.ones(5)
    with pytest.raises(RuntimeError, match="must be asked for"):
        sample(a, row, row, 0, None, None, row)
    with pytest.raises(RuntimeError, match="of the shape of a"):
        sample(a, row, row, 0, torch.zeros(3, 7), None, row)
    with pytest.raises(RuntimeError, match="no kernel for"):
        sample(a.double(), row, row, 0, a.clone(), None, row)
    with pytest.raises(IndexError, match="row 3 of 3"):
        compiled_kernels().take_rows(a, torch.tensor([0, 3]), torch.empty(2, 5), row)
    with pytest.raises(RuntimeError, match="as many rows as"):
        compiled_kernels().take_rows(a, torch.tensor([0, 2]), torch.empty(3, 5), row)
    with pytest.raises(RuntimeError, match="of dU's sizes"):
        compiled_kernels().centre(a, torch.zeros(3), row, row, row)


def test_no_compiler_is_said(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fails)
    compiled_kernels.cache_clear()
    with pytest.raises(RuntimeError, match="compiled=True, but rbm_kernels.cpp could not.*use compiled=False.*Ninja"):
        FastContrastiveDivergence("float32", 0, compiled=True)
    compiled_kernels.cache_clear()


def test_inputs_are_left_alone():
    p, v, chains = machine(0.4), (torch.rand(B, K) < 0.3).float(), (torch.rand(B, H) < 0.5).float()
    before = [t.clone() for t in (p.c, p.U, p.b, v, chains)]
    for precision in PRECISIONS:
        FastContrastiveDivergence(precision, seed=0).gradient(p, v, chains)
    for a, e in zip((p.c, p.U, p.b, v, chains), before):
        assert torch.equal(a, e)


def test_the_fastest_precision_is_measured():
    matrix_rates.cache_clear()
    state = torch.get_rng_state()
    rates = matrix_rates(256, 128, 128, torch.get_num_threads())
    assert rates["float32"] > 0 and torch.equal(torch.get_rng_state(), state)
    assert fastest_precision(256, 512, 512) in PRECISIONS
    assert fastest_precision(3, 5, 7) == "float32"
    with pytest.raises(ValueError, match="'float8'; allowed are 'auto', 'float32'"):
        FastContrastiveDivergence("float8")
