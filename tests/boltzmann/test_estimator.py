"""RBM and DeepBeliefNetwork as a student meets them, on scikit-learn's digits."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neural_network import BernoulliRBM
from sklearn.pipeline import make_pipeline

from boltzmann import RBM, DeepBeliefNetwork, log_partition_function, log_prob
from modeling_blip_rbm import RBMParameters


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return train_test_split((images > 7).astype(np.float32), labels, test_size=0.25, random_state=0)


@pytest.fixture(scope="module")
def fitted(digits):
    rbm = RBM(n_components=128, n_iter=40, batch_size=32, learning_rate=0.3, random_state=0)
    return rbm.fit(digits[0], validation=digits[1])


def independent_log_likelihood(train, rows):
    share = np.clip(train.mean(0), 1 / (len(train) + 2), None).astype(np.float64)
    return (rows * np.log(share) + (1 - rows) * np.log1p(-share)).sum(1).mean()


def test_likelihood_of_held_back_digits(digits, fitted):
    """Far better than independent pixels, by an estimate whose error is known."""
    assert fitted.score(digits[1]) > independent_log_likelihood(digits[0], digits[1]) + 6
    assert fitted.log_partition_.high - fitted.log_partition_.low < 0.5
    assert {"free_energy_gap", "dead", "saturated", "seconds"} <= set(fitted.history_[-1])


def test_likelihood_is_at_least_scikit_learns(digits):
    """Equal units, batches and epochs, scikit-learn's best of three rates; benchmarks/rbm_likelihood.py has more."""
    train, test = digits[:2]
    ours = RBM(n_components=17, n_iter=20, batch_size=10, random_state=0).fit(train).score(test)
    scores = []
    for rate in (0.01, 0.03, 0.1):
        peer = BernoulliRBM(17, n_iter=20, batch_size=10, learning_rate=rate, random_state=0).fit(train)
        tensors = [torch.from_numpy(a) for a in (peer.intercept_hidden_, peer.components_.T, peer.intercept_visible_)]
        p = RBMParameters(*(tensor.float() for tensor in tensors))
        scores.append(log_prob(p, log_partition_function(p), w=torch.from_numpy(test)).mean().item())
    assert ours >= max(scores)


def test_scores_are_exact_for_a_small_machine(digits):
    rbm = RBM(n_components=7, n_iter=3, random_state=0).fit(digits[0])
    p = rbm.model_.parameters_fp32
    expected = -rbm.free_energy(digits[1]) - log_partition_function(p).item()
    np.testing.assert_allclose(rbm.score_samples(digits[1]), expected, atol=1e-4)


def test_features_are_better_than_raw_pixels_for_a_linear_probe(digits):
    train, test, train_labels, test_labels = digits
    probe = lambda encode: (
        LogisticRegression(max_iter=500).fit(encode(train), train_labels).score(encode(test), test_labels)
    )
    sparse = RBM(
        257, n_iter=30, batch_size=32, learning_rate=0.3, sparsity_target=0.1, sparsity_cost=0.5, random_state=0
    )
    assert probe(sparse.fit(train).transform) > probe(lambda pixels: pixels)


def test_dimension_reduction_keeps_most_of_the_picture(digits):
    rbm = RBM(n_components=23, n_iter=30, batch_size=32, learning_rate=0.3, random_state=0).fit(digits[0])
    codes = rbm.transform(digits[1])
    assert codes.shape == (len(digits[1]), 23)
    back = rbm.inverse_transform(codes)
    mean_error = np.abs(digits[1] - digits[0].mean(0)).mean()
    assert np.abs(digits[1] - back).mean() < 0.6 * mean_error


def test_samples_are_likelier_than_independent_pixels(digits, fitted):
    samples = fitted.sample(101, steps=200)
    assert samples.shape == (101, 64) and set(np.unique(samples)) == {0.0, 1.0}
    shuffle = np.random.default_rng(0).permutation
    shuffled = np.stack([shuffle(column) for column in digits[0].T], 1)[:101]
    assert fitted.free_energy(samples).mean() < fitted.free_energy(shuffled).mean() - 5
    mean = fitted.sample(11, steps=3, start=digits[1][:11], mean=True)
    assert mean.shape == (11, 64) and 0 <= mean.min() and mean.max() <= 1 and len(np.unique(mean)) > 2


def test_a_layer_starts_from_the_machine(digits, fitted):
    rows = torch.from_numpy(digits[1][:11])
    np.testing.assert_allclose(fitted.to_layer()(rows).detach().numpy(), fitted.transform(rows), atol=1e-5)
    real = np.random.default_rng(0).normal(3, 5, (101, 7))
    gaussian = RBM(5, visible_type="gaussian", n_iter=2, learning_rate=0.01, random_state=0).fit(real)
    rows = torch.tensor(real[:11], dtype=torch.float32)
    np.testing.assert_allclose(gaussian.to_layer()(rows).detach().numpy(), gaussian.transform(rows), atol=1e-5)


def test_deep_belief_network(digits):
    train, test = digits[:2]
    settings = {"n_iter": 10, "batch_size": 32, "random_state": 0}
    dbn = DeepBeliefNetwork((47, 29), settings).fit(train)
    assert [layer.n_components for layer in dbn.layers_] == [47, 29]
    features = dbn.transform(test)
    assert features.shape == (len(test), 29)
    np.testing.assert_allclose(
        features, dbn.layers_[1].to_layer()(dbn.layers_[0].to_layer()(torch.from_numpy(test))).detach(), atol=1e-5
    )
    assert dbn.sample(13, steps=20).shape == (13, 64)
    network = dbn.to_network(num_outputs=10)
    assert network(torch.from_numpy(test)).shape == (len(test), 10)
    assert DeepBeliefNetwork((11,), settings).fit(train).sample(3, 5).shape == (3, 64)


def test_gaussian_machine_learns_the_density():
    """Two clusters: the machine gives held-back rows a higher density than one Gaussian with a full covariance."""
    rng = np.random.default_rng(0)
    centres = np.array([[4.0, -3.0, 2.0], [-4.0, 3.0, 5.0]])
    draw = lambda n: (centres[rng.integers(0, 2, n)] + rng.normal(0, 0.5, (n, 3))).astype(np.float32)
    train, test = draw(2000), draw(500)
    rbm = RBM(5, visible_type="gaussian", n_iter=100, learning_rate=0.02, batch_size=50, method="cd", random_state=0)
    rbm.fit(train)
    covariance = np.cov(train.T)
    centred = test - train.mean(0)
    gaussian = -0.5 * (
        np.einsum("ni,ij,nj->n", centred, np.linalg.inv(covariance), centred)
        + np.linalg.slogdet(2 * np.pi * covariance)[1]
    )
    assert rbm.score(test) > gaussian.mean() + 0.2
    samples = rbm.sample(500, steps=200)
    np.testing.assert_allclose(samples.mean(0), train.mean(0), atol=1.5)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cd", "steps": 3},
        {"optimizer": "adam", "learning_rate": 0.005},
        {"centred": False, "momentum": 0.0, "learning_rate": 0.2, "weight_decay": 1e-4},
    ],
)
def test_other_ways_to_train(digits, options):
    rbm = RBM(n_components=41, n_iter=20, batch_size=32, random_state=0, **options).fit(digits[0])
    assert rbm.score(digits[1]) > independent_log_likelihood(digits[0], digits[1]) + 2


def test_sparsity_target(digits):
    plain = RBM(n_components=31, n_iter=10, random_state=0).fit(digits[0])
    sparse = RBM(n_components=31, n_iter=10, random_state=0, sparsity_target=0.05, sparsity_cost=3.0).fit(digits[0])
    distance = lambda rbm: abs(rbm.transform(digits[1]).mean() - 0.05)
    assert distance(sparse) < 0.5 * distance(plain)


def test_seed_decides(digits):
    fit = lambda seed, precision: (
        RBM(11, n_iter=2, random_state=seed, precision=precision).fit(digits[0]).transform(digits[1])
    )
    for precision in ("float32", "int8"):
        np.testing.assert_array_equal(fit(5, precision), fit(5, precision))
        assert np.abs(fit(5, precision) - fit(6, precision)).max() > 1e-3


def test_scikit_learn_takes_it(digits):
    train, test, train_labels, test_labels = digits
    rbm = clone(RBM(n_components=37, n_iter=20, batch_size=16, random_state=0))
    assert rbm.get_params()["n_components"] == 37
    model = make_pipeline(rbm, LogisticRegression(max_iter=200)).fit(train, train_labels)
    assert model.score(test, test_labels) > 0.8


def test_partial_fit(digits):
    rbm = RBM(n_components=17, random_state=0)
    for start in list(range(0, 1300, 65)) * 5:
        rbm.partial_fit(digits[0][start : start + 65])
    assert rbm.n_steps_ == 100
    first = RBM(17, n_iter=1, random_state=0, learning_rate=1e-9).fit(digits[0])
    assert rbm.score(digits[1]) > first.score(digits[1])


def test_samples_and_hidden_states_of_impossible_sizes_are_refused(digits, fitted):
    with pytest.raises(ValueError, match="num is 0"):
        fitted.sample(0)
    with pytest.raises(ValueError, match="steps is 0"):
        fitted.sample(3, steps=0)
    with pytest.raises(ValueError, match="start has 5 rows, but num is 3"):
        fitted.sample(3, start=digits[0][:5])
    with pytest.raises(ValueError, match=r"H has shape \(3, 7\); this RBM has 128"):
        fitted.inverse_transform(np.zeros((3, 7)))


def test_bad_rows_are_named(digits):
    train = digits[0].copy()
    rbm = RBM(5, n_iter=1, random_state=0)
    with pytest.raises(ValueError, match=r"shape=?\s?\(0, 64\)"):
        rbm.fit(train[:0])
    with pytest.raises(ValueError, match="Expected 2D array"):
        rbm.fit(train[0])
    broken = train.copy()
    broken[7, 11] = np.nan
    with pytest.raises(ValueError, match="1 NaN .* row 7, column 11"):
        rbm.fit(broken)
    with pytest.raises(ValueError, match="X\\[3, 2\\] is 0.5; binarise"):
        broken = train.copy()
        broken[3, 2] = 0.5
        rbm.fit(broken)
    with pytest.raises(ValueError, match="columns \\[0.*never vary"):
        RBM(5, visible_type="gaussian").fit(load_digits().data)
    rbm.fit(train)
    with pytest.raises(ValueError, match="X has 5 features, but RBM is expecting 64"):
        rbm.transform(train[:, :5])
    with pytest.raises(ValueError, match="not been fitted"):
        RBM(5).transform(train)


@pytest.mark.parametrize("name, value", [("n_components", 0), ("steps", 0), ("batch_size", 0), ("method", "cd2"), ("optimizer", "lbfgs"), ("visible_type", "potts"), ("precision", "int4")])  # fmt: skip
def test_impossible_settings_are_named(digits, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        RBM(**{name: value}).fit(digits[0])
    with pytest.raises(ValueError, match="n_components is empty"):
        DeepBeliefNetwork(()).fit(digits[0])


def test_divergence_and_collapse_are_said(digits):
    real = np.random.default_rng(0).normal(0, 1, (101, 7))
    rbm = RBM(5, visible_type="gaussian", learning_rate=1e38, n_iter=5, momentum=0.0, random_state=0, anneal=False)
    with pytest.raises(FloatingPointError, match="diverged in epoch .*lower learning_rate"):
        rbm.fit(real)
    assert all(torch.isfinite(tensor).all() for tensor in rbm.model_.parameters())
    with pytest.warns(UserWarning, match="collapsed"):
        RBM(31, learning_rate=50.0, n_iter=3, random_state=0, centred=False).fit(digits[0])


def test_pickled_and_back(digits):
    rbm = RBM(11, n_iter=1, random_state=0).fit(digits[0])
    again = pickle.loads(pickle.dumps(rbm))
    np.testing.assert_array_equal(again.transform(digits[1]), rbm.transform(digits[1]))
    np.testing.assert_array_equal(again.sample(3, 5), rbm.sample(3, 5))
    again.partial_fit(digits[0][:17])
