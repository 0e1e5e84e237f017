"""RBMs and deep belief networks for a data matrix, in the manner of scikit-learn.

    rbm = RBM(n_components=128, random_state=0).fit(X)   # X (n, V) of 0 and 1, or any reals with visible_type="gaussian"
    rbm.transform(X)        # P(h = 1 | v): dimension reduction, features
    rbm.score_samples(X)    # log P(v) in nats, exact or by annealed importance sampling
    rbm.sample(16)          # new rows, from Gibbs chains
    rbm.to_layer()          # a feed-forward layer that starts from its weights

`DeepBeliefNetwork` stacks them (Hinton, Osindero & Teh, Neural Computation 2006). The machine is `JointRBM` with one of its
visible blocks: binary rows are its word block, real ones its image block. With scikit-learn installed both are its
estimators (pipelines, `clone`, grid search).
"""

import time
import warnings
from typing import Optional

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from modeling_blip_rbm.rbm import (
    LOG_VARIANCE_RANGE,
    PARAMETER_NAMES,
    GibbsState,
    JointRBM,
    RBMParameters,
    bernoulli,
    centred_gradient,
    contrastive_divergence,
    free_energy,
    gibbs,
    mean_x_given_h,
    prob_h_given_v,
    prob_w_given_h,
)

from .fast import PRECISIONS, FastContrastiveDivergence
from .likelihood import AISResult, annealed_importance_sampling, base_rate_model, log_partition_function, log_prob


try:
    from sklearn.base import BaseEstimator, TransformerMixin
except ImportError:

    class BaseEstimator:
        """Stands in for scikit-learn's where that is not installed."""

    class TransformerMixin:
        """Stands in for scikit-learn's where that is not installed."""

        def fit_transform(self, X, y=None):
            return self.fit(X).transform(X)


EXACT_UNITS = 18  # log Z is summed exactly up to so many units in the smaller layer: less than a second


def check_rows(X, visible_type: str, width: Optional[int] = None) -> torch.Tensor:
    """X as an fp32 tensor (n, V).

    Raises:
        ValueError: if X is not a matrix, has no row, another width than `width`, values that are not finite, or, for binary
            units, values other than 0 and 1.
    """
    X = torch.as_tensor(np.asarray(X, dtype=np.float32))
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X has shape {tuple(X.shape)}; it must be a matrix with at least one row and one column")
    if width is not None and X.shape[1] != width:
        raise ValueError(f"X has {X.shape[1]} columns, but this RBM was fitted on {width}")
    bad = ~torch.isfinite(X)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"X holds {int(bad.sum())} NaN or infinite values, the first in row {row}, column {column}")
    if visible_type == "binary":
        bad = (X != 0) & (X != 1)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                f"binary units are 0 or 1, but X[{row}, {column}] is {X[row, column].item():g}; "
                "binarise the data (X > 0.5), or use visible_type='gaussian'"
            )
    return X


class RBM(TransformerMixin, BaseEstimator):
    """A restricted Boltzmann machine for the rows of a matrix.

    Args:
        n_components: H, hidden units.
        visible_type: "binary" (rows of 0 and 1) or "gaussian" (any reals; standardised inside, variances learned).
        learning_rate: of SGD or Adam; falls linearly to 0 over `fit` if `anneal`.
        batch_size: rows a step, and Gibbs chains of "pcd".
        n_iter: passes over the data.
        method: "pcd" (chains persist, Tieleman 2008) or "cd" (they start at the data, Hinton 2002).
        steps: Gibbs steps k.
        centred: use the centred gradient (Melchior et al. 2016), which does not depend on how a unit is coded.
        optimizer: "sgd" (with `momentum`) or "adam".
        weight_decay: L2, on the weights only.
        sparsity_target: mean activity that hidden units are drawn to with `sparsity_cost` (Hinton 2010, section 11).
        precision: of the products of binary machines on a CPU: "float32", "bfloat16", "int8", or "auto" for the fastest.
        compiled: sample binary machines with a kernel compiled for this processor (needs a C++ compiler; seconds, the first time).
        verbose: a progress bar.
        random_state: seed.

    Attributes:
        model_: the `JointRBM`. history_: a dict an epoch. log_partition_: `AISResult` or exact log Z, once asked for.
    """

    def __init__(
        self,
        n_components: int = 256,
        *,
        visible_type: str = "binary",
        learning_rate: float = 0.1,
        batch_size: int = 64,
        n_iter: int = 20,
        method: str = "pcd",
        steps: int = 1,
        centred: bool = True,
        optimizer: str = "sgd",
        momentum: float = 0.5,
        weight_decay: float = 0.0,
        sparsity_target: Optional[float] = None,
        sparsity_cost: float = 0.1,
        anneal: bool = True,
        precision: str = "auto",
        compiled: bool = False,
        verbose: int = 0,
        random_state: Optional[int] = None,
    ):
        self.n_components = n_components
        self.visible_type = visible_type
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.n_iter = n_iter
        self.method = method
        self.steps = steps
        self.centred = centred
        self.optimizer = optimizer
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.sparsity_target = sparsity_target
        self.sparsity_cost = sparsity_cost
        self.anneal = anneal
        self.precision = precision
        self.compiled = compiled
        self.verbose = verbose
        self.random_state = random_state

    def _check_settings(self):
        for name, allowed in (
            ("visible_type", ("binary", "gaussian")),
            ("method", ("pcd", "cd")),
            ("optimizer", ("sgd", "adam")),
            ("precision", ("auto", *PRECISIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}")
        for name in ("n_components", "batch_size", "n_iter", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def _start(self, X: torch.Tensor):
        """A fresh machine for these checked rows."""
        binary, width, seed = self.visible_type == "binary", X.shape[1], self.random_state
        self._generator = torch.Generator()
        self._generator.manual_seed(seed) if seed is not None else self._generator.seed()
        sizes = (0, width) if binary else (width, 0)
        self.model_ = JointRBM(*sizes, self.n_components, "binary" if binary else "gaussian").requires_grad_(False)
        weight = self.model_.word_weight if binary else self.model_.image_weight
        weight.normal_(0, 0.01, generator=self._generator)
        if binary:
            share = X.mean(0).clamp(1 / (len(X) + 2), 1 - 1 / (len(X) + 2))
            self.model_.word_bias.copy_(torch.logit(share))
        else:
            constant = (X == X[0]).all(0).nonzero().flatten().tolist()
            if constant and len(X) > 1:
                raise ValueError(
                    f"columns {constant[:10]} of X never vary: drop them, a Gaussian unit needs a variance"
                )
            self.model_.set_image_statistics(X)
        self.n_features_in_ = width
        self._mean = X.mean(0) if binary else torch.zeros(width)
        self._mean_h = torch.full((self.n_components,), 0.5)
        self._chains, self._fast = None, None
        if self.method == "pcd":
            h = bernoulli(torch.full((self.batch_size, self.n_components), 0.5), self._generator)
            self._chains = h if binary else GibbsState(h, x=torch.zeros(self.batch_size, width))
        if binary:
            seed = int(torch.randint(2**62, (), generator=self._generator))
            self._fast = FastContrastiveDivergence(self.precision, seed, self.compiled)
        groups = {}  # as few as possible: a group is a call of the optimizer's kernel
        for name, parameter in self.model_.named_parameters():
            # a variance that moves as fast as the weights explodes (Melchior et al. 2017)
            rate = self.learning_rate * (0.1 if name == "image_log_var" else 1.0)
            decay = self.weight_decay if parameter is weight else 0.0
            settings = {"params": [], "weight_decay": decay, "lr": rate}
            groups.setdefault((rate, decay), settings)["params"].append(parameter)
        groups = list(groups.values())
        if self.optimizer == "adam":
            self._optimizer = torch.optim.Adam(groups, lr=self.learning_rate, fused=True)
        else:
            self._optimizer = torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)
        self.history_, self.log_partition_, self.n_steps_ = [], None, 0

    def _gradient(self, p: RBMParameters, X: torch.Tensor, batch: Optional[torch.Tensor]):
        """Gradient per sample for these of the checked (Gaussian: standardised) rows, or all, and the mean of q over them."""
        if self._fast is not None:
            gradient, chains, mean_q = self._fast.gradient(p, X, self._chains, self.steps, batch)
        else:
            rows = X if batch is None else X.index_select(0, batch)
            gradient, chains = contrastive_divergence(
                p, x=rows, steps=self.steps, chains=self._chains, generator=self._generator
            )
            mean_q = prob_h_given_v(p, x=rows).mean(0)
        if self.method == "pcd":
            self._chains = chains
        return gradient, mean_q

    def _descend(self):
        """The optimizer's step. Of plain SGD without its Python, which takes 0.2 ms where products have emptied the caches: a fiftieth of a
        fast step; its arithmetic takes 0.08."""
        if self.optimizer == "sgd" and not self.momentum and not self.weight_decay:
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
        else:
            self._optimizer.step()

    def _update(self, X: torch.Tensor, batch: Optional[torch.Tensor] = None):
        """A step on the rows number `batch` of X, or on all; the mean of q over them."""
        binary = self._fast is not None
        p = self.model_.parameters_fp32
        gradient, mean_q = self._gradient(p, X, batch)
        if self.centred:
            self._mean_h.lerp_(mean_q, 0.01 if self.n_steps_ else 1.0)
            if binary:
                gradient = self._fast.centred(p, gradient, self._mean, self._mean_h)
            else:
                gradient = centred_gradient(p, gradient, self._mean_h, mean_x=self._mean)
        if self.sparsity_target is not None:
            push = self.sparsity_cost * (mean_q - self.sparsity_target)
            gradient = gradient._replace(c=gradient.c + push)
        for field, name in PARAMETER_NAMES.items():
            if hasattr(self.model_, name):
                getattr(self.model_, name).grad = getattr(gradient, field)
        if not binary:
            nn.utils.clip_grad_norm_(self.model_.parameters(), 10.0)
        self._descend()
        if not binary:
            self.model_.image_log_var.clamp_(*LOG_VARIANCE_RANGE)
        self.n_steps_ += 1
        return mean_q

    def _inside(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Checked rows as the block of the machine that they are."""
        return {"w": X} if self.visible_type == "binary" else {"x": self.model_.standardise(X)}

    def _checked(self, X) -> torch.Tensor:
        if not hasattr(self, "model_"):
            raise ValueError("this RBM has not been fitted: call fit first")
        return check_rows(X, self.visible_type, self.n_features_in_)

    @torch.no_grad()
    def partial_fit(self, X, y=None):
        """One step on these rows, at the full learning rate."""
        if not hasattr(self, "model_"):
            self._check_settings()
            self._start(check_rows(X, self.visible_type))
        self._update(next(iter(self._inside(self._checked(X)).values())))
        self.log_partition_ = None
        return self

    @torch.no_grad()
    def fit(self, X, y=None, validation=None):
        """Fit to rows X (n, V).

        Args:
            validation: rows that are not trained on; their free energy above that of as many training rows is recorded:
                a gap that grows is overfitting (Hinton 2010, section 6), no partition function needed.

        Raises:
            ValueError: for impossible settings or rows, see `check_rows`.
            FloatingPointError: if training diverges; the machine is then as after the last good epoch.
        """
        self._check_settings()
        X = check_rows(X, self.visible_type)
        self._start(X)
        validation = None if validation is None else self._inside(self._checked(validation))
        rows = next(iter(self._inside(X).values()))
        if self._fast is not None:
            self._fast.choose(self.batch_size, *self.model_.word_weight.shape)
            rows = rows.to(self._fast.products.dtype)
        batches = -(-len(rows) // self.batch_size)
        bar = tqdm(range(self.n_iter), desc="fit RBM", disable=not self.verbose)
        rates = [group["lr"] for group in self._optimizer.param_groups]
        good = {name: tensor.clone() for name, tensor in self.model_.state_dict().items()}
        for epoch in bar:
            start = time.perf_counter()
            order = torch.randperm(len(rows), generator=self._generator)
            activity = torch.zeros(self.n_components)
            for number, batch in enumerate(order.split(self.batch_size)):
                if self.anneal:
                    left = 1 - (epoch * batches + number) / (self.n_iter * batches)
                    for group, rate in zip(self._optimizer.param_groups, rates):
                        group["lr"] = rate * left
                activity.add_(self._update(rows, batch), alpha=1 / batches)
            seconds = time.perf_counter() - start
            if not all(torch.isfinite(tensor).all() for tensor in self.model_.parameters()):
                self.model_.load_state_dict(good)
                raise FloatingPointError(
                    f"training diverged in epoch {epoch + 1}: lower learning_rate ({self.learning_rate}); "
                    "the machine is as it was an epoch before"
                )
            good = {name: tensor.clone() for name, tensor in self.model_.state_dict().items()}
            entry = {
                "epoch": epoch + 1,
                "seconds": seconds,
                "dead": (activity < 0.01).float().mean().item(),
                "saturated": (activity > 0.99).float().mean().item(),
            }
            if validation is not None:
                p, block = self.model_.parameters_fp32, next(iter(validation))
                held = free_energy(p, **validation).mean()
                seen = free_energy(p, **{block: rows[: len(validation[block])].float()}).mean()
                entry["free_energy_gap"] = (held - seen).item()
            self.history_.append(entry)
            bar.set_postfix({name: f"{value:.3g}" for name, value in entry.items()})
        idle = self.history_[-1]["dead"] + self.history_[-1]["saturated"]
        if idle > 0.5:
            warnings.warn(
                f"{idle:.0%} of the hidden units are always off or always on: the machine has collapsed; lower "
                "learning_rate, set sparsity_target, or use fewer n_components",
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def transform(self, X) -> np.ndarray:
        """(n, H) P(h = 1 | v): the rows in the hidden units."""
        block = self._inside(self._checked(X))
        return prob_h_given_v(self.model_.parameters_fp32, **block).numpy()

    def _visible_mean(self, h: torch.Tensor) -> torch.Tensor:
        p = self.model_.parameters_fp32
        if self.visible_type == "binary":
            return prob_w_given_h(p, h)
        return mean_x_given_h(p, h) * self.model_.image_std + self.model_.image_mean

    @torch.no_grad()
    def inverse_transform(self, H) -> np.ndarray:
        """(n, V) E[v | h] of hidden states or probabilities (n, H)."""
        return self._visible_mean(torch.as_tensor(np.asarray(H, dtype=np.float32))).numpy()

    @torch.no_grad()
    def sample(self, num: int, steps: int = 1000, start=None, mean: bool = False) -> np.ndarray:
        """(num, V) rows where Gibbs chains stand after `steps` steps.

        Args:
            start: rows (num, V) to start from; default: independent units with the training data's means.
            mean: return E[v | h] of the last step, which is easier on the eye than its sample.
        """
        p, generator = self.model_.parameters_fp32, self._generator
        if start is not None:
            block = self._inside(self._checked(start))
        elif self.visible_type == "binary":
            block = {"w": bernoulli(self._mean.expand(num, -1), generator)}
        else:
            block = {"x": torch.randn(num, self.n_features_in_, generator=generator)}
        state = GibbsState(bernoulli(prob_h_given_v(p, **block), generator), **block)
        before = gibbs(p, state, steps - 1, generator=generator)
        if mean:
            return self._visible_mean(before.h).numpy()
        state = gibbs(p, before, 1, generator=generator)
        if self.visible_type == "binary":
            return state.w.numpy()
        return (state.x * self.model_.image_std + self.model_.image_mean).numpy()

    @torch.no_grad()
    def free_energy(self, X) -> np.ndarray:
        """(n,) F(v) in nats: low where the machine expects rows; comparable within one machine only."""
        block = self._inside(self._checked(X))
        return free_energy(self.model_.parameters_fp32, **block).numpy()

    def log_partition(self, temperatures: int = 2000, chains: int = 500) -> float:
        """log Z: exact if a layer has at most `EXACT_UNITS` units that can be summed, else annealed importance sampling."""
        p, binary = self.model_.parameters_fp32, self.visible_type == "binary"
        units = min(self.n_components, self.n_features_in_) if binary else self.n_components
        if units <= EXACT_UNITS:
            log_z = log_partition_function(p).item()
            self.log_partition_ = AISResult(log_z, log_z, log_z, float("inf"), torch.zeros(0))
        else:
            base = base_rate_model(p, **{"mean_w" if binary else "mean_x": self._mean})
            self.log_partition_ = annealed_importance_sampling(
                p, temperatures, chains, base, self._generator, progress=bool(self.verbose)
            )
        return self.log_partition_.log_z

    @torch.no_grad()
    def score_samples(self, X) -> np.ndarray:
        """(n,) log P(v) in nats; of Gaussian units the log density of the rows as given."""
        block = self._inside(self._checked(X))
        log_z = self.log_partition_.log_z if self.log_partition_ else self.log_partition()
        value = log_prob(self.model_.parameters_fp32, log_z, **block)
        if self.visible_type == "gaussian":
            value = value - torch.log(self.model_.image_std).sum()
        return value.numpy()

    def score(self, X, y=None) -> float:
        """Mean log P(v) of the rows, in nats."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def to_layer(self) -> nn.Sequential:
        """Linear and sigmoid with this machine's weights: (n, V) rows -> P(h | v), to start a feed-forward network from."""
        p, linear = self.model_.parameters_fp32, nn.Linear(self.n_features_in_, self.n_components)
        if self.visible_type == "binary":
            weight, bias = p.U, p.c
        else:
            weight = p.W * (torch.exp(-p.log_var) / self.model_.image_std)[:, None]
            bias = p.c - self.model_.image_mean @ weight
        linear.weight.copy_(weight.T)
        linear.bias.copy_(bias)
        return nn.Sequential(linear, nn.Sigmoid())


class DeepBeliefNetwork(TransformerMixin, BaseEstimator):
    """A stack of RBMs, trained greedily: each on samples of the hidden units of the one below (Hinton et al. 2006).

    Args:
        n_components: hidden units of each layer, from below.
        settings: arguments of every `RBM`; `visible_type` is that of the first, the others are binary.
    """

    def __init__(self, n_components=(256, 128), settings: Optional[dict] = None):
        self.n_components = n_components
        self.settings = settings

    def fit(self, X, y=None):
        """Fit the layers one after the other to rows X (n, V). Raises as `RBM.fit`."""
        if not len(self.n_components):
            raise ValueError("n_components is empty; name the hidden units of at least one layer, e.g. (256, 128)")
        settings, self.layers_ = dict(self.settings or {}), []
        generator = torch.Generator()
        generator.manual_seed(settings.get("random_state") or 0)
        for size in self.n_components:
            self.layers_.append(RBM(size, **settings).fit(X))
            X = bernoulli(torch.from_numpy(self.layers_[-1].transform(X)), generator).numpy()
            settings["visible_type"] = "binary"
        return self

    def transform(self, X) -> np.ndarray:
        """(n, H of the last layer) activity of the top layer, mean field all the way up."""
        with torch.no_grad():
            return self.to_network()(check_rows(X, self.layers_[0].visible_type)).numpy()

    def sample(self, num: int, steps: int = 1000) -> np.ndarray:
        """(num, V) E[v | h] after `steps` Gibbs steps in the top RBM and one sampled pass down."""
        h = self.layers_[-1].sample(num, steps)
        for layer in self.layers_[-2:0:-1]:
            h = bernoulli(torch.from_numpy(layer.inverse_transform(h)), layer._generator).numpy()
        return self.layers_[0].inverse_transform(h) if len(self.layers_) > 1 else h

    def to_network(self, num_outputs: Optional[int] = None) -> nn.Sequential:
        """A feed-forward network that starts from the layers' weights, with a fresh linear head if `num_outputs` is given."""
        parts = [module for layer in self.layers_ for module in layer.to_layer()]
        if num_outputs is not None:
            parts.append(nn.Linear(self.n_components[-1], num_outputs))
        return nn.Sequential(*parts)
