"""The fast products against the reference in rbm.py."""

import pytest
import torch

from boltzmann.fast import PRECISIONS, FastContrastiveDivergence, processor_precision
from modeling_blip_rbm.rbm import GibbsState, RBMParameters, contrastive_divergence


K, H, B = 37, 23, 41
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}


def machine(std, seed=3, visible=K, hidden=H):
    g = torch.Generator().manual_seed(seed)
    r = lambda *size: std * torch.randn(*size, generator=g)
    return RBMParameters(c=r(hidden), U=r(visible, hidden), b=r(visible))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_is_the_reference_where_nothing_is_left_to_chance(precision, steps):
    """With huge weights every unit is certain given the other layer, so both sample the same states."""
    g = torch.Generator().manual_seed(3)
    U = 100.0 * torch.randint(-1, 2, (K, H), generator=g)  # exact in every precision
    p = RBMParameters(c=torch.full((H,), -50.0), U=U, b=torch.full((K,), -50.0))  # no input is 0
    v = (torch.rand(B, K) < 0.3).float()
    chains = (torch.rand(43, H) < 0.5).float()
    for start in (None, chains, chains[:B]):
        state = None if start is None else GibbsState(start, w=torch.zeros(len(start), K))
        expected, after = contrastive_divergence(p, w=v, steps=steps, chains=state)
        gradient, h, _ = FastContrastiveDivergence(precision, 0).gradient(p, v, start, steps)
        assert torch.equal(h.float(), after.h)
        for name in ("c", "U", "b"):
            torch.testing.assert_close(
                getattr(gradient, name), getattr(expected, name), atol=TOLERANCE[precision], rtol=0
            )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mean_gradient_is_the_reference(precision):
    p, v = machine(0.4), (torch.rand(B, K) < 0.3).float()
    chains = (torch.rand(5000, H) < 0.5).float()
    g = torch.Generator().manual_seed(0)
    state = GibbsState(chains, w=torch.zeros(5000, K))
    expected = [contrastive_divergence(p, w=v, chains=state, generator=g)[0] for _ in range(10)]
    fast = FastContrastiveDivergence(precision, 0)
    actual = []
    for _ in range(10):
        gradient, _, mean_q = fast.gradient(p, v, chains)
        actual.append(RBMParameters(*(None if t is None else t.clone() for t in gradient)))
    torch.testing.assert_close(mean_q, torch.sigmoid(p.c + v @ p.U).mean(0), atol=TOLERANCE[precision], rtol=0)
    for name in ("c", "U", "b"):
        means = [torch.stack([getattr(g, name) for g in gradients]).mean(0) for gradients in (actual, expected)]
        torch.testing.assert_close(*means, atol=0.02, rtol=0)


def test_small_probabilities_keep_their_mean():
    """q is rounded at random: a unit that is on once in a thousand samples still gets its gradient."""
    p = RBMParameters(c=torch.full((H,), -6.9), U=torch.zeros(K, H), b=torch.zeros(K))
    fast, v = FastContrastiveDivergence("int8", 0), torch.ones(2003, K)
    _, _, mean_q = fast.gradient(p, v)
    assert mean_q.mean().item() == pytest.approx(0.001, rel=0.3)


def test_uniform_numbers_are_uniform():
    u = FastContrastiveDivergence("float32", seed=0).uniform(torch.Size((1009, 101)))
    assert 0 <= u.min() and u.max() < 2**16 and torch.equal(u, u.floor())
    assert (u.mean() / 2**16).item() == pytest.approx(0.5, abs=0.005)
    assert (u.var() / 2**32).item() == pytest.approx(1 / 12, abs=0.002)


def test_inputs_are_left_alone():
    p, v, chains = machine(0.4), (torch.rand(B, K) < 0.3).float(), (torch.rand(B, H) < 0.5).float()
    before = [t.clone() for t in (p.c, p.U, p.b, v, chains)]
    for precision in PRECISIONS:
        FastContrastiveDivergence(precision, seed=0).gradient(p, v, chains)
    for a, e in zip((p.c, p.U, p.b, v, chains), before):
        assert torch.equal(a, e)


@pytest.mark.parametrize("vnni, mkldnn, expected", [(True, True, "int8"), (True, False, "float32"), (False, True, "float32")])  # fmt: skip
def test_the_processor_decides_the_precision(monkeypatch, vnni, mkldnn, expected):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: vnni, raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: mkldnn)
    assert processor_precision(256, 512, 512) == expected
    assert processor_precision(3, 5, 7) == "float32"  # too small for rounding to pay


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'float8'; allowed on cpu are 'float32', 'bfloat16', 'int8'"):
        FastContrastiveDivergence("float8")
