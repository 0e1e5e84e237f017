"""The fast products against the reference in rbm.py."""

import shutil

import pytest
import torch

from boltzmann.fast import (
    PRECISIONS,
    FastContrastiveDivergence,
    compiled_kernels,
    fastest_precision,
    matrix_rates,
    step_in_one_call,
)
from modeling_blip_rbm.rbm import GibbsState, RBMParameters, centred_gradient, contrastive_divergence


K, H, B = 37, 23, 41
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
COMPILED = [False, pytest.param(True, marks=needs_compiler, id="compiled")]


def machine(std, seed=3, visible=K, hidden=H):
    g = torch.Generator().manual_seed(seed)
    r = lambda *size: std * torch.randn(*size, generator=g)
    return RBMParameters(c=r(hidden), U=r(visible, hidden), b=r(visible))


@pytest.fixture
def one_call(monkeypatch):
    """The compiled kernels, where they have a whole step; taken here also where matrix units would be faster."""
    if shutil.which("c++") is None or not hasattr(compiled_kernels(), "gradient"):
        pytest.skip("no C++ compiler, or no AVX512_BF16")
    monkeypatch.setattr("boltzmann.fast.processor_capabilities", lambda: {"amx_bf16": False})
    return compiled_kernels()


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("visible, hidden", [(K, H), (2 * K, 2 * H)])  # a step in one call takes even sizes
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


@pytest.mark.parametrize("n, m, visible, hidden", [(1, 1, 2, 2), (14, 29, 62, 34), (41, 17, 74, 46), (29, 29, 106, 64)])
@pytest.mark.parametrize("from_data", [False, True])
def test_step_in_one_call(one_call, n, m, visible, hidden, from_data):
    """Whole tiles and what is left over; of states that are certain or that come out, and of the probabilities of rounded weights."""
    p, v = machine(0.4, visible=visible, hidden=hidden), (torch.rand(n, visible) < 0.3).float()
    p = p._replace(b=40.0 * (torch.rand(visible) < 0.5) - 20.0)  # certain: what comes down does not matter
    chains = None if from_data else torch.randint(2, (m, hidden)).float()
    fast = FastContrastiveDivergence("bfloat16", 0, compiled=True)
    gradient, h, mean_q = fast.gradient(p, v, chains)
    assert "states" not in fast.memory and ((h == 0) | (h == 1)).all()
    U, down = p.U.bfloat16().float(), (p.b > 0).float()
    q, q_model = torch.sigmoid(p.c + v @ U), torch.sigmoid(p.c + down @ U)
    torch.testing.assert_close(mean_q, q.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient.b, down - v.mean(0))
    torch.testing.assert_close(gradient.c, q_model - q.mean(0), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(gradient.U, down[:, None] * q_model - v.T @ q / n, atol=2e-3, rtol=1e-2)


def test_samples_of_a_step_in_one_call_are_independent_and_have_their_probabilities(one_call):
    """Of units side by side and in the two halves of a tile, of rows, and of calls one after another."""
    rows, units = 20011, 46  # a whole tile and a part of one
    prob = torch.linspace(0.05, 0.95, units)
    p = RBMParameters(c=torch.logit(prob), U=torch.zeros(units, units), b=torch.logit(prob))
    fast, chains = FastContrastiveDivergence("bfloat16", 0, compiled=True), torch.zeros(rows, units)
    calls = []
    for _ in range(2):
        gradient, h, _ = fast.gradient(p, torch.zeros(1, units), chains)
        calls.append(h.float())
        # of visible units, whose states stay inside: their mean, and the means of their products with the hidden units' probabilities
        standard_error = (prob * (1 - prob) / rows).sqrt()
        assert ((gradient.b - prob).abs() < 4.5 * standard_error).all()
        torch.testing.assert_close(gradient.U, gradient.b[:, None] * prob, atol=2e-3, rtol=1e-2)
    assert ((calls[0].mean(0) - prob).abs() < 4.5 * standard_error).all()
    centred = [(state - prob) / (prob * (1 - prob)).sqrt() for state in calls]
    for a, b in ((centred[0], centred[0]), (centred[0], centred[1]), (centred[0][:-1], centred[0][1:])):
        correlation = a.T @ b / len(a)
        if a is b:
            correlation -= torch.diag(correlation.diagonal())
        assert correlation.abs().max() < 5 / rows**0.5


def test_layers_of_a_step_in_one_call_have_random_numbers_of_their_own(one_call):
    """With every probability a half, the two layers' states would be the same if their random numbers were."""
    free = RBMParameters(c=torch.zeros(62), U=torch.zeros(62, 62), b=torch.zeros(62))
    telling = free._replace(U=100.0 * torch.eye(62), c=free.c - 50)  # hidden units say what the visible ones were
    found = []
    for p, steps in ((free, 1), (free, 2), (telling, 1)):
        fast = FastContrastiveDivergence("bfloat16", 0, compiled=True)
        found.append(fast.gradient(p, torch.zeros(1, 62), torch.zeros(1009, 62), steps)[1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (found[a] == found[b]).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_step_in_one_call_does_not_depend_on_who_computed_it(one_call):
    """Pieces of work go to whichever thread is free; sums in fp32 depend on their order."""
    p, v = machine(0.4, visible=106, hidden=62), (torch.rand(1009, 106) < 0.3).bfloat16()
    found = [
        FastContrastiveDivergence("bfloat16", 0, compiled=True).gradient(p, v, torch.zeros(499, 62)) for _ in range(20)
    ]
    for gradient, h, mean_q in found:
        assert torch.equal(h, found[0][1]) and torch.equal(mean_q, found[0][2])
        for name in ("c", "U", "b"):
            assert torch.equal(getattr(gradient, name), getattr(found[0][0], name))


def test_a_step_in_one_call_refuses_wrong_sizes(one_call, monkeypatch):
    def gradient(visible=6, hidden=4, width=6, rows=None, memory=0, h=3):
        U, b, c = torch.zeros(visible, hidden), torch.zeros(visible), torch.zeros(hidden)
        memory = torch.zeros(one_call.memory_size(3, h, visible, hidden) + memory, dtype=torch.int32)
        v, h = torch.zeros(3, width).bfloat16(), torch.zeros(h, hidden).bfloat16()
        one_call.gradient(U, b, c, v, rows, h, True, 1, 0, memory, U.clone(), b.clone(), c.clone(), c.clone())

    gradient()
    with pytest.raises(RuntimeError, match="5 and 4 units; even sizes"):
        gradient(visible=5, width=5)
    with pytest.raises(RuntimeError, match=r"v \(n, V\)"):
        gradient(width=4)
    with pytest.raises(RuntimeError, match="memory of another size"):
        gradient(memory=1)
    with pytest.raises(RuntimeError, match="a row each"):
        gradient(h=2)
    with pytest.raises(IndexError, match="row 3 of 3"):
        gradient(rows=torch.tensor([0, 3, 1]))
    assert step_in_one_call(one_call, torch.zeros(6, 4)) and not step_in_one_call(one_call, torch.zeros(5, 4))
    monkeypatch.setattr("boltzmann.fast.processor_capabilities", lambda: {"amx_bf16": True})
    assert not step_in_one_call(one_call, torch.zeros(6, 4))


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
@pytest.mark.parametrize("visible, hidden", [(K, H), (2 * K, 2 * H)])
def test_rows_of_more_data(precision, compiled, visible, hidden):
    """A batch is named by its rows; more of them than an 8-bit counter can count."""
    p = machine(0.4, visible=visible, hidden=hidden)
    data = (torch.rand(1009, visible) < 0.9).to(PRECISIONS[precision]().dtype)
    rows, chains = torch.randint(len(data), (701,)), torch.zeros(B, hidden)
    gradient, _, mean_q = FastContrastiveDivergence(precision, 0, compiled).gradient(p, data, chains, rows=rows)
    batch = data[rows]
    expected, _, expected_q = FastContrastiveDivergence(precision, 0, compiled).gradient(p, batch, chains)
    torch.testing.assert_close(gradient.U, expected.U)
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
