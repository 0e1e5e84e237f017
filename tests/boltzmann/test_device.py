"""RBMs on a device that is no CPU (tests/other_device.py)."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from boltzmann import RBM, DeepBeliefNetwork
from boltzmann.fast import FastContrastiveDivergence
from modeling_blip_rbm.rbm import RBMParameters
from tests.boltzmann.test_fast import H, K, machine
from tests.other_device import DEVICE, OtherTensor, other_device


ROWS = 307  # more than a block of a CPU's


def rows(n, width=13, seed=0):
    """0 and 1, the second half of the columns a copy of the first."""
    half = np.random.default_rng(seed).random((n, width // 2 + 1)) < 0.4
    return np.concatenate([half, half], 1)[:, :width].astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_step_is_the_one_of_a_cpu(precision, persistent, monkeypatch):
    """With the same random numbers, which on a device come from its own generator."""
    p, v = machine(0.4), (torch.rand(ROWS, K) < 0.3).float()
    chains = (torch.rand(ROWS, H) < 0.5).float() if persistent else None

    def gradient(device):
        numbers, there = np.random.default_rng(7), lambda t: None if t is None else t.to(device)
        uniform = lambda fast, shape: torch.from_numpy(numbers.integers(0, 2**16, tuple(shape))).float().to(device)
        monkeypatch.setattr(FastContrastiveDivergence, "uniform", uniform)
        fast = FastContrastiveDivergence(precision, 0, device)
        parameters = RBMParameters(*map(there, p))
        found = fast.gradient(parameters, there(v), there(chains), steps=2)
        return [tensor.cpu().float() for tensor in (found[0].c, found[0].U, found[0].b, *found[1:])]

    expected = gradient("cpu")
    with other_device():
        found = gradient(DEVICE)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_random_numbers_of_a_device():
    with other_device() as there:
        first, again, other = (FastContrastiveDivergence("float32", seed, DEVICE) for seed in (3, 3, 5))
        numbers = first.uniform(torch.Size([101, 103])).clone()
        assert torch.equal(numbers.cpu(), again.uniform(torch.Size([101, 103])).cpu())
        assert not torch.equal(numbers.cpu(), other.uniform(torch.Size([101, 103])).cpu())
        assert not torch.equal(numbers.cpu(), first.uniform(torch.Size([101, 103])).cpu())
        numbers = numbers.cpu()
    assert there.operations and torch.equal(numbers, numbers.floor()) and 0 <= numbers.min() < numbers.max() < 2**16
    assert numbers.mean().item() == pytest.approx(2**15, rel=0.02)


def test_a_gaussian_machine_is_the_one_of_a_cpu():
    X = np.random.default_rng(3).normal(2, 3, (ROWS, 11)).astype(np.float32)
    settings = {"visible_type": "gaussian", "n_iter": 3, "batch_size": 31, "learning_rate": 0.02, "random_state": 5}
    results = []
    for device in ("cpu", DEVICE):
        with other_device():
            rbm = RBM(7, device=str(device), **settings).fit(X, validation=X[:17])
            assert isinstance(rbm.model_.image_weight, OtherTensor) == (device != "cpu")
            features = rbm.transform(X[:29])
            results.append(
                [features, rbm.inverse_transform(features), rbm.free_energy(X), rbm.score_samples(X[:5])]
                + [
                    rbm.sample(3, 5, start=X[:3]),
                    rbm.sample(3, 5),
                    rbm.to_layer()(torch.from_numpy(X)).detach().numpy(),
                ]
                + [np.array([entry["free_energy_gap"] for entry in rbm.history_])]
            )
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_binary_machine_learns():
    X = rows(ROWS)
    with other_device() as there:
        rbm = RBM(11, device="other", n_iter=1, learning_rate=0.3, batch_size=31, random_state=0).fit(X)
        before = rbm.score(X)
        rbm.set_params(n_iter=40).fit(X)
        assert there.operations > 1000 and rbm.precision_ == "float32"
        assert rbm.score(X) > before + 1 and set(np.unique(rbm.sample(19, 7))) == {0.0, 1.0}
        sparse = RBM(11, device="other", n_iter=2, random_state=0).fit(csr_matrix(X))
        np.testing.assert_allclose(
            sparse.transform(X), RBM(11, device="other", n_iter=2, random_state=0).fit_transform(X), atol=1e-5
        )
        network = DeepBeliefNetwork((7, 5), {"device": "other", "n_iter": 2, "random_state": 0}).fit(X)
        assert network.transform(X).shape == (ROWS, 5) and network.sample(3, 5).shape == (3, 13)
        rbm.partial_fit(X)


@pytest.mark.parametrize("method", ["cd", "pcd"])
@pytest.mark.parametrize("visible_type", ["binary", "gaussian"])
def test_no_step_waits_for_the_device(method, visible_type):
    """The host reads as many numbers of the device whether an epoch has 5 steps or 17."""
    X, reads = rows(17 * 7), []
    for steps in (5, 17):
        with other_device() as there:
            RBM(
                5, device="other", visible_type=visible_type, method=method, batch_size=7, n_iter=2, sparsity_target=0.1
            ).fit(X[: 7 * steps])
        reads.append(there.reads)
    assert reads[0] == reads[1] > 0


def test_what_a_device_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"device is 'cuda:99', which this PyTorch has not; \"cpu\" is there always"):
        RBM(5, device="cuda:99").fit(rows(17))
    with pytest.raises(ValueError, match="device is 'gpu'"):
        RBM(5, device="gpu").fit(rows(17))
    with other_device(), pytest.raises(ValueError, match="'int8'; allowed on other are 'float32', 'bfloat16'"):
        RBM(5, device="other", precision="int8").fit(rows(17))
