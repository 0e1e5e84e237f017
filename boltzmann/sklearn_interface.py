"""What scikit-learn asks of an estimator: checked rows, dense or sparse, random states, names of the output's columns.

scikit-learn's own helpers do it where it is installed (1.6 or later), stand-ins elsewhere.
"""

import numbers
from typing import Iterator

import numpy as np
import torch


try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data

    class Transformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
        """A scikit-learn transformer that takes sparse rows and returns fp32."""

        def __sklearn_tags__(self):
            tags = super().__sklearn_tags__()
            tags.input_tags.sparse = True
            tags.transformer_tags.preserves_dtype = ["float32"]
            return tags

except ImportError:

    class Transformer:
        """Stands in for scikit-learn's: `fit_transform` alone, neither parameters by name nor names of columns."""

        def fit_transform(self, X, y=None):
            """`fit`, then `transform` of the same rows."""
            return self.fit(X).transform(X)

    class NotFittedError(ValueError, AttributeError):
        """Stands in for scikit-learn's."""

    def validate_data(estimator, X, *, reset, dtype, **_):
        """Stands in for scikit-learn's."""
        X = X.tocsr().astype(dtype) if is_sparse(X) else np.asarray(X, dtype=dtype)
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"X has shape {X.shape}; it must be a matrix with at least one row and one column")
        if reset:
            estimator.n_features_in_ = X.shape[1]
        elif X.shape[1] != estimator.n_features_in_:
            name, width = type(estimator).__name__, estimator.n_features_in_
            raise ValueError(f"X has {X.shape[1]} features, but {name} is expecting {width} features as input")
        return X


PART = 4096  # rows that are dense at a time


def check_fitted(estimator, attribute: str):
    """Raises scikit-learn's `NotFittedError`, a ValueError, if `attribute` does not exist yet."""
    if not hasattr(estimator, attribute):
        name = type(estimator).__name__
        raise NotFittedError(f"this {name} has not been fitted: call {name}.fit first")


def is_sparse(X) -> bool:
    """Whether X is a matrix or an array of scipy.sparse."""
    return hasattr(X, "tocsr")


def check_rows(estimator, X, binary: bool, reset: bool = False):
    """X as an fp32 array (n, V), or as an fp32 CSR matrix if it is sparse.

    Args:
        binary: whether the rows are of binary units.
        reset: store width and column names in the estimator, as `fit` does; else X must have the same.

    Raises:
        ValueError: if X is not a matrix, has no row, another width than the estimator was fitted on, values that are not
            finite, or, for binary units, values other than 0 and 1.
    """
    with np.errstate(over="ignore"):  # what is too large for fp32 becomes infinite, which is said below
        X = validate_data(estimator, X, reset=reset, accept_sparse="csr", dtype=np.float32, ensure_all_finite=False)
    if not is_sparse(X):
        X = np.require(X, requirements=["C", "W"])  # torch warns of arrays that are read-only, as joblib's are
    elif not X.has_canonical_format:
        X = X.copy()  # the caller's stays as it is
        X.sum_duplicates()
    values = X.data if is_sparse(X) else X
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = _first(X, bad)
        raise ValueError(f"X holds {int(bad.sum())} NaN or infinite values, the first in row {row}, column {column}")
    if binary:
        bad = (values != 0) & (values != 1)
        if bad.any():
            row, column = _first(X, bad)
            raise ValueError(
                f"binary units are 0 or 1, but X[{row}, {column}] is {X[row, column]:g}; "
                "binarise the data (X > 0.5), or use visible_type='gaussian'"
            )
    return X


def _first(X, bad: np.ndarray) -> tuple[int, int]:
    """Row and column of the first `bad` value of X; of a CSR matrix, `bad` is over its stored values."""
    if is_sparse(X):
        number = int(np.flatnonzero(bad)[0])
        return int(np.searchsorted(X.indptr, number, side="right")) - 1, int(X.indices[number])
    row, column = np.argwhere(bad)[0]
    return int(row), int(column)


def take(X, rows) -> torch.Tensor:
    """The rows of these numbers, a slice or a tensor (B,), of a tensor or CSR matrix X: dense (B, V)."""
    if not is_sparse(X):
        return X[rows] if isinstance(rows, slice) else X.index_select(0, rows)  # X[rows] is 8 times slower
    return torch.from_numpy(X[rows if isinstance(rows, slice) else rows.cpu().numpy()].toarray())


def dense_parts(X, device="cpu") -> Iterator[torch.Tensor]:
    """The checked rows X, an array or CSR matrix, as fp32 tensors of at most `PART` rows on a device."""
    X = X if is_sparse(X) else torch.from_numpy(X)
    for start in range(0, X.shape[0], PART):
        yield take(X, slice(start, start + PART)).to(device)


def constant_columns(X) -> list[int]:
    """Numbers of the columns of the checked rows X whose values are all the same."""
    least, most = X.min(0), X.max(0)
    if is_sparse(X):
        least, most = least.toarray(), most.toarray()
    return np.flatnonzero(least == most).tolist()


def check_whole(name: str, value, least: int = 1) -> int:
    """value as an int.

    Raises:
        ValueError: if it is no whole number (numpy's are) or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def torch_generator(random_state=None, device="cpu") -> torch.Generator:
    """PyTorch's generator of a device for what scikit-learn calls a random state.

    Args:
        random_state: an int is the seed itself; a numpy RandomState or Generator is drawn from, so that the next use of it
            gives another seed; None draws from `numpy.random`, which `numpy.random.seed` governs.

    Raises:
        ValueError: for anything else.
    """
    if random_state is None:
        seed = np.random.randint(2**31)
    elif isinstance(random_state, np.random.RandomState):
        seed = random_state.randint(2**31)
    elif isinstance(random_state, np.random.Generator):
        seed = random_state.integers(2**31)
    elif isinstance(random_state, numbers.Integral) and -(2**63) <= random_state < 2**64:
        seed = random_state
    else:
        raise ValueError(f"random_state is {random_state!r}; it must be an int, a numpy RandomState or None")
    return torch.Generator(device).manual_seed(int(seed))
