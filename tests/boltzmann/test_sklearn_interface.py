"""What scikit-learn's users expect: sparse rows, random states, names of columns, and its own checks of an estimator."""

import importlib
import sys
import warnings

import numpy as np
import pytest
import scipy.sparse
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from boltzmann import RBM, DeepBeliefNetwork
from boltzmann.sklearn_interface import torch_generator


BINARY = (np.random.default_rng(0).random((151, 23)) < 0.2).astype(np.float64)
REAL = BINARY * np.random.default_rng(1).normal(2, 1, BINARY.shape)
ROWS = {"binary": BINARY, "gaussian": REAL}
SETTINGS = {"n_iter": 2, "batch_size": 17, "learning_rate": 0.02, "random_state": 0}

# The random reals of these checks are no rows of binary units, so a machine with Gaussian ones takes them.
GAUSSIAN = RBM(7, visible_type="gaussian", n_iter=2, learning_rate=0.01, random_state=0)
BELIEF = DeepBeliefNetwork((7, 5), {"visible_type": "gaussian", "n_iter": 2, "learning_rate": 0.01, "random_state": 0})


@parametrize_with_checks([GAUSSIAN, BELIEF])
def test_checks_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two passes over a few rows may leave units idle
        check(estimator)


@pytest.mark.parametrize("visible_type", ROWS)
@pytest.mark.parametrize("form", ["csr_matrix", "csc_array", "coo_matrix", "lil_matrix"])
def test_sparse_rows_are_as_dense_ones(visible_type, form, monkeypatch):
    monkeypatch.setattr("boltzmann.sklearn_interface.PART", 31)  # several parts
    X = ROWS[visible_type]
    sparse = getattr(scipy.sparse, form)(X)
    fits = [
        RBM(5, visible_type=visible_type, **SETTINGS).fit(rows, validation=rows[:3]) for rows in (X, sparse.tocsr())
    ]
    again = RBM(5, visible_type=visible_type, **SETTINGS).fit(sparse)
    for name in ("transform", "free_energy", "score_samples"):
        dense = getattr(fits[0], name)(X)
        for rbm in (*fits, again):
            np.testing.assert_allclose(getattr(rbm, name)(sparse), dense, rtol=1e-4, atol=1e-4)
    assert fits[0].history_[-1]["free_energy_gap"] == pytest.approx(fits[1].history_[-1]["free_energy_gap"], abs=1e-4)
    assert fits[1].partial_fit(sparse).n_steps_ == 2 * 9 + 1
    assert fits[1].sample(151, 1, start=sparse).shape == X.shape


def test_sparse_rows_stay_sparse(monkeypatch):
    """No more rows are dense at a time than a batch in training, and than a part elsewhere."""
    monkeypatch.setattr("boltzmann.sklearn_interface.PART", 101)
    X = scipy.sparse.random(10_007, 11, density=0.01, format="csr", random_state=0)
    X.data[:] = 1
    asked = []
    dense = type(X).toarray
    monkeypatch.setattr(type(X), "toarray", lambda self: asked.append(self.shape[0]) or dense(self))
    RBM(3, n_iter=1, batch_size=211, random_state=0).fit(X).transform(X)
    assert max(asked) == 211 and sum(asked) == 2 * 10_007


def test_bad_values_of_sparse_rows_are_named():
    X = scipy.sparse.csr_matrix(BINARY)
    X.data[5] = 0.5
    row, column = np.argwhere(X.toarray() == 0.5)[0]
    with pytest.raises(ValueError, match=rf"X\[{row}, {column}\] is 0.5; binarise"):
        RBM(5).fit(X)
    X.data[5] = np.inf
    with pytest.raises(ValueError, match=f"1 NaN or infinite values, the first in row {row}, column {column}"):
        RBM(5).fit(X)
    twice = scipy.sparse.csr_matrix((np.ones(3), np.array([1, 1, 0]), np.array([0, 2, 3, 3])), shape=(3, 2))
    with pytest.raises(ValueError, match=r"X\[0, 1\] is 2"):  # one place named twice is the sum
        RBM(5).fit(twice)
    assert twice.nnz == 3
    constant = scipy.sparse.csr_matrix(np.c_[REAL, np.zeros(len(REAL)), np.ones(len(REAL))])
    with pytest.raises(ValueError, match=r"columns \[23, 24\] of X never vary"):
        RBM(5, visible_type="gaussian").fit(constant)


def test_random_state():
    fit = lambda state: RBM(5, **SETTINGS | {"random_state": state}).fit(BINARY).transform(BINARY)
    for make in (lambda: 3, lambda: np.int64(3), lambda: np.random.RandomState(3), lambda: np.random.default_rng(3)):
        np.testing.assert_array_equal(fit(make()), fit(make()))
    np.testing.assert_array_equal(fit(3), fit(np.int64(3)))
    state = np.random.RandomState(3)
    assert np.abs(fit(state) - fit(state)).max() > 1e-4  # it was drawn from
    before = np.random.get_state()
    np.random.seed(3)
    first = fit(None)
    np.random.seed(3)
    np.testing.assert_array_equal(fit(None), first)
    np.random.set_state(before)
    for bad in ("3", 0.5, 2**64):
        with pytest.raises(ValueError, match=f"random_state is {bad!r}"):
            torch_generator(bad)
    dbn = lambda: DeepBeliefNetwork((5, 3), {"n_iter": 1, "random_state": np.random.RandomState(3)})
    np.testing.assert_array_equal(dbn().fit_transform(BINARY), dbn().fit_transform(BINARY))


def test_numbers_of_numpy_and_numbers_that_are_not_whole():
    numbers = {"n_components": np.int64(5), "batch_size": np.int32(17), "n_iter": np.uint8(2), "steps": np.int16(1)}
    mine = RBM(**SETTINGS | numbers).fit(BINARY)
    np.testing.assert_array_equal(mine.transform(BINARY), RBM(5, **SETTINGS).fit(BINARY).transform(BINARY))
    for name in numbers:
        for bad in (5.0, "5", True, 0):
            with pytest.raises(ValueError, match=f"{name} is {bad!r}; it must be a whole number"):
                RBM(**{name: bad}).fit(BINARY)


@pytest.mark.parametrize("make", [lambda: RBM(5, **SETTINGS), lambda: DeepBeliefNetwork((7, 5), dict(SETTINGS))])
def test_names_of_columns(make):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(BINARY.astype(bool), columns=[f"word {number}" for number in range(23)])
    estimator = make()
    with pytest.raises(NotFittedError):
        estimator.transform(X)
    estimator.set_output(transform="pandas").fit(X)
    assert estimator.n_features_in_ == 23 and list(estimator.feature_names_in_) == list(X.columns)
    name = type(estimator).__name__.lower()
    assert list(estimator.get_feature_names_out()) == [f"{name}{number}" for number in range(5)]
    assert list(estimator.transform(X).columns) == list(estimator.get_feature_names_out())
    with pytest.raises(ValueError, match="feature names"):
        estimator.transform(X[X.columns[::-1]])


def test_a_belief_network_where_pandas_is_the_default_output():
    from sklearn import config_context

    with config_context(transform_output="pandas"):
        dbn = DeepBeliefNetwork((7, 5), dict(SETTINGS)).fit(BINARY)
    assert dbn.transform(BINARY).shape == (151, 5) and dbn.sample(3, 2).shape == (3, 23)


@pytest.fixture
def alone(monkeypatch):
    """The package `boltzmann` imported anew as where scikit-learn is not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "boltzmann"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("sklearn", "sklearn.base"):
        monkeypatch.setitem(sys.modules, name, None)
    yield importlib.import_module("boltzmann")
    for name in [name for name in sys.modules if name.partition(".")[0] == "boltzmann"]:
        del sys.modules[name]  # monkeypatch puts the usual ones back


def test_without_scikit_learn(alone):
    X = BINARY.astype(int)
    rbm = alone.RBM(3, n_iter=1, random_state=0)
    assert not hasattr(rbm, "get_params")
    with pytest.raises(ValueError, match="this RBM has not been fitted: call RBM.fit first"):
        rbm.transform(X)
    H = rbm.fit_transform(X)
    assert H.shape == (151, 3) and rbm.n_features_in_ == 23
    np.testing.assert_allclose(rbm.transform(scipy.sparse.csc_matrix(X)), H, rtol=1e-5)
    for bad, message in (
        (X[:, :5], "X has 5 features, but RBM is expecting 23 features as input"),
        (X[0], r"shape \(23,\)"),
        (X[:0], r"shape \(0, 23\)"),
        (X * 3, "is 3; binarise"),
    ):
        with pytest.raises(ValueError, match=message):
            rbm.transform(bad)
    assert alone.DeepBeliefNetwork((3, 2), {"n_iter": 1}).fit(X).transform(X).shape == (151, 2)
