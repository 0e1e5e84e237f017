"""Partition functions: exact by enumeration in two ways, annealing against exact."""

import itertools

import pytest
import torch

from boltzmann.likelihood import (
    annealed_importance_sampling,
    base_rate_model,
    exact_samples,
    interpolate,
    log_marginal_h,
    log_partition_function,
    log_prob,
    model_samples,
    reverse_annealed_importance_sampling,
)
from modeling_blip_rbm.rbm import RBMParameters, contrastive_divergence, energy, free_energy


V, K, H = 3, 5, 4


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


def machine(V=V, K=K, H=H, image="gaussian", std=1.0, seed=3):
    g = torch.Generator().manual_seed(seed)
    r = lambda *size: std * torch.randn(*size, generator=g)
    words = {"U": r(K, H), "b": r(K)} if K else {}
    pictures = {"W": r(V, H), "mu": r(V)} if V else {}
    if V and image == "gaussian":
        pictures["log_var"] = 0.3 * r(V)
    return RBMParameters(c=r(H), **words, **pictures)


def test_log_partition_of_the_textbook_machine():
    p = machine(V=0)
    v, h = states(K), states(H)
    joint = torch.stack([-energy(p, h, w=row.expand(len(h), -1)) for row in v])
    expected = torch.logsumexp(joint.flatten(), 0).item()
    assert log_partition_function(p).item() == pytest.approx(expected, rel=1e-5)
    assert log_partition_function(p, chunk=3).item() == pytest.approx(expected, rel=1e-5)
    wide = machine(V=0, K=3, H=7)  # more hidden than visible units: the visible ones are summed
    expected = torch.logsumexp(-free_energy(wide, w=states(3)), 0).item()
    assert log_partition_function(wide).item() == pytest.approx(expected, rel=1e-5)


def test_log_partition_with_a_binary_image_block():
    p = machine(image="binary")
    both = torch.tensor(list(itertools.product([0.0, 1.0], repeat=V + K)))
    expected = torch.logsumexp(-free_energy(p, both[:, :V], both[:, V:]), 0).item()
    assert log_partition_function(p).item() == pytest.approx(expected, rel=1e-5)


def test_density_of_a_gaussian_machine_integrates_to_one():
    p = machine(V=1, K=3, H=4, std=0.7)
    log_z = log_partition_function(p)
    grid = torch.linspace(-30, 30, 20_001)[:, None]
    mass = 0.0
    for w in states(3):
        mass += torch.trapezoid(log_prob(p, log_z, grid, w.expand(len(grid), -1)).exp(), grid[:, 0]).item()
    assert mass == pytest.approx(1.0, abs=1e-4)


def test_probabilities_sum_to_one():
    p = machine(V=0)
    log_z = log_partition_function(p)
    v, h = states(K), states(H)
    assert log_prob(p, log_z, w=v).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    joint = torch.stack([log_prob(p, log_z, w=row.expand(len(h), -1), h=h) for row in v])
    assert joint.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(torch.logsumexp(joint, 1), log_prob(p, log_z, w=v).to(joint.dtype))


def test_hidden_marginal():
    p = machine(image="binary")
    both = torch.tensor(list(itertools.product([0.0, 1.0], repeat=V + K)))
    for h in states(H)[3:6]:
        values = -energy(p, h.expand(len(both), -1), both[:, :V], both[:, V:])
        torch.testing.assert_close(log_marginal_h(p, h), torch.logsumexp(values, 0))


def test_interpolation_has_the_right_ends():
    p = machine()
    base = base_rate_model(p, mean_x=torch.full((V,), 0.5), mean_w=torch.full((K,), 0.25))
    for a, b in zip(interpolate(base, p, 1.0), p):
        torch.testing.assert_close(a, b)
    for a, b in zip(interpolate(base, p, 0.0), base):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.sigmoid(base.b), torch.full((K,), 0.25))


@pytest.mark.parametrize("kind", ["binary", "gaussian", "joint"])
def test_annealing_finds_the_partition_function(kind):
    p = {
        "binary": machine(V=0, K=10, H=5, std=0.8),
        "gaussian": machine(V=7, K=0, H=5, std=0.5),
        "joint": machine(V=5, K=7, H=3, std=0.5),
    }[kind]
    exact = log_partition_function(p).item()
    g = torch.Generator().manual_seed(0)
    estimate = annealed_importance_sampling(p, temperatures=500, chains=1000, generator=g)
    assert estimate.log_z == pytest.approx(exact, abs=0.05)
    assert estimate.low <= exact <= estimate.high
    assert estimate.effective_sample_size > 100
    samples = exact_samples(p, 1000, g)
    reverse = reverse_annealed_importance_sampling(p, samples, temperatures=500, generator=g)
    assert reverse.log_z == pytest.approx(exact, abs=0.05)


def test_few_temperatures_err_to_opposite_sides():
    """The sandwich: too low from the base, too high from the model (Burda et al. 2015)."""
    p, g = machine(V=0, K=13, H=11, std=1.5), torch.Generator().manual_seed(1)
    exact = log_partition_function(p).item()
    forward, backward = [], []
    for _ in range(20):
        forward.append(annealed_importance_sampling(p, 3, 20, generator=g).log_z)
        backward.append(reverse_annealed_importance_sampling(p, exact_samples(p, 20, g), 3, generator=g).log_z)
    assert sum(forward) / 20 < exact < sum(backward) / 20


def test_chains_reach_the_model():
    p, g = machine(V=0, K=5, H=3, std=0.7), torch.Generator().manual_seed(0)
    expected = log_prob(p, log_partition_function(p), w=states(5)).exp() @ states(5)
    for samples in (exact_samples(p, 20_000, g), model_samples(p, 20_000, 30, generator=g)):
        torch.testing.assert_close(samples.w.mean(0), expected, atol=0.015, rtol=0)


def test_exact_gradient_of_the_likelihood_is_the_limit_of_contrastive_divergence():
    """With chains that are exact samples, the expected gradient is that of autograd on the exact log-likelihood."""
    p, g = machine(V=0, K=6, H=4, std=0.6), torch.Generator().manual_seed(2)
    data = states(6)[[5, 11, 11, 47, 60]]
    leaves = RBMParameters(*(None if t is None else t.double().requires_grad_() for t in p))
    loss = (free_energy(leaves, w=data.double()) + log_partition_function(leaves)).mean()
    expected = torch.autograd.grad(loss, [leaves.c, leaves.U, leaves.b])
    chains = exact_samples(p, 100_000, g)
    gradient, _ = contrastive_divergence(p, w=data, chains=chains, generator=g)
    for actual, exact in zip((gradient.c, gradient.U, gradient.b), expected):
        torch.testing.assert_close(actual.double(), exact, atol=0.01, rtol=0)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="2\\^29 states are too many"):
        log_partition_function(machine(V=0, K=31, H=29))
    with pytest.raises(ValueError, match="at most 25 hidden units"):
        log_partition_function(machine(V=3, K=0, H=29))
    with pytest.raises(ValueError, match="29 hidden units"):
        exact_samples(machine(V=0, K=31, H=29), 7)
    with pytest.raises(ValueError, match="temperatures is 1"):
        annealed_importance_sampling(machine(), temperatures=1)
    with pytest.raises(ValueError, match="parameter U .* NaN"):
        p = machine()
        annealed_importance_sampling(p._replace(U=p.U * float("nan")))
