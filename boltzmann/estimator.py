"""RBMs and deep belief networks for a data matrix, in the manner of scikit-learn.

    rbm = RBM(n_components=128, random_state=0).fit(X)   # X (n, V) of 0 and 1, or any reals with visible_type="gaussian"
    rbm.transform(X)        # P(h = 1 | v): dimension reduction, features
    rbm.score_samples(X)    # log P(v) in nats, exact or by annealed importance sampling
    rbm.sample(16)          # new rows, from Gibbs chains
    rbm.to_layer()          # a feed-forward layer that starts from its weights

`DeepBeliefNetwork` stacks them (Hinton, Osindero & Teh, Neural Computation 2006). The machine is a `JointRBM` with one of its
visible blocks: binary rows are its word block, real ones its image block. With scikit-learn installed both are its
estimators (pipelines, `clone`, grid search). n, V and H are rows, visible and hidden units; rows may be a sparse matrix.
"""

import time
import warnings
from typing import Callable, Optional

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

from .fast import PRECISIONS, FastContrastiveDivergence, processor_precision
from .likelihood import AISResult, annealed_importance_sampling, base_rate_model, log_partition_function, log_prob
from .sklearn_interface import (
    Transformer,
    check_fitted,
    check_rows,
    check_whole,
    constant_columns,
    dense_parts,
    is_sparse,
    take,
    torch_generator,
)


EXACT_UNITS = 18  # log Z is summed exactly up to so many units in the smaller layer: less than a second


def _idle_share(activity: torch.Tensor) -> dict[str, float]:
    """Shares of hidden units that are almost never and almost always on, by their mean activity (H,)."""
    return {"dead": (activity < 0.01).float().mean().item(), "saturated": (activity > 0.99).float().mean().item()}


class RBM(Transformer):
    """A restricted Boltzmann machine for the rows of a matrix.

    Rows are arrays, DataFrames or scipy.sparse matrices (n, V). Sparse ones are made dense a batch at a time.

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
        precision: of the matrix products of binary machines: "float32", "bfloat16", "int8", or "auto" for the fastest on
            this kind of processor, see `fast.processor_precision`. Name one for the same result on every processor.
        device: where it computes, such as "cuda". The rows are kept there while it is fitted, unless they are sparse.
        verbose: a progress bar.
        random_state: an int for the same result every time; a numpy RandomState or Generator, or None, gives another one
            at each `fit`.

    Attributes:
        model_: the `JointRBM`. history_: a dict an epoch. n_steps_: steps taken. precision_: of the products.
        log_partition_: an `AISResult` for log Z once asked for, else None.
        n_features_in_: V. feature_names_in_: names of a DataFrame's columns (with scikit-learn).
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
        device: str = "cpu",
        verbose: int = 0,
        random_state=None,
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
        self.device = device
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
            check_whole(name, getattr(self, name))
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f'device is {self.device!r}, which this PyTorch has not; "cpu" is there always') from error

    def _start(self, X):
        """A fresh machine for the rows X; the rows, checked."""
        self._check_settings()
        self._binary = self.visible_type == "binary"
        X = check_rows(self, X, self._binary, reset=True)
        constant = [] if self._binary or X.shape[0] == 1 else constant_columns(X)
        if constant:
            raise ValueError(f"columns {constant[:10]} of X never vary: drop them, a Gaussian unit needs a variance")
        width, hidden, chains = X.shape[1], int(self.n_components), int(self.batch_size)
        self._generator, self._n_features_out = torch_generator(self.random_state, self.device), hidden
        sizes = (0, width) if self._binary else (width, 0)
        self.model_ = JointRBM(*sizes, hidden, self.visible_type).requires_grad_(False).to(self.device)
        weight = self.model_.word_weight if self._binary else self.model_.image_weight
        weight.normal_(0, 0.01, generator=self._generator)
        self._mean = torch.zeros(width, device=self.device)  # of the visible units as the machine sees them
        if self._binary:
            self._mean = torch.from_numpy(np.asarray(X.mean(0, dtype=np.float64)).ravel()).float().to(self.device)
            share = self._mean.clamp(1 / (X.shape[0] + 2), 1 - 1 / (X.shape[0] + 2))
            self.model_.word_bias.copy_(torch.logit(share))
        else:
            self.model_.set_image_statistics(dense_parts(X, self.device))
        self._mean_h = torch.full((hidden,), 0.5, device=self.device)
        self._chains, self._fast, self.precision_ = None, None, "float32"
        if self.method == "pcd":
            h = bernoulli(torch.full((chains, hidden), 0.5, device=self.device), self._generator)
            self._chains = h if self._binary else GibbsState(h, x=h.new_zeros(chains, width))
        if self._binary:
            chosen = self.precision
            if chosen == "auto":
                chosen = processor_precision(chains, width, hidden) if self._mean.device.type == "cpu" else "float32"
            seed = int(torch.randint(2**62, (), generator=self._generator, device=self.device))
            self._fast, self.precision_ = FastContrastiveDivergence(chosen, seed, self.device), chosen
        self._optimizer = self._make_optimizer(weight)
        self.history_, self.log_partition_, self.n_steps_ = [], None, 0
        return X

    def _make_optimizer(self, weight: torch.Tensor) -> torch.optim.Optimizer:
        """SGD or Adam; only `weight` decays."""
        groups = {}  # as few as possible: a group is a call of the optimizer's kernel
        for name, parameter in self.model_.named_parameters():
            # a variance that moves as fast as the weights explodes (Melchior et al. 2017)
            rate = self.learning_rate * (0.1 if name == "image_log_var" else 1.0)
            decay = self.weight_decay if parameter is weight else 0.0
            settings = {"params": [], "weight_decay": decay, "lr": rate}
            groups.setdefault((rate, decay), settings)["params"].append(parameter)
        groups = list(groups.values())
        if self.optimizer == "adam":
            return torch.optim.Adam(groups, lr=self.learning_rate, fused=True)
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum, fused=True)

    def _gradient(self, p: RBMParameters, rows: torch.Tensor):
        """Gradient per sample for these rows as the machine sees them, and the mean of q over them."""
        if self._binary:
            gradient, chains, mean_q = self._fast.gradient(p, rows, self._chains, self.steps)
        else:
            gradient, chains = contrastive_divergence(
                p, x=rows, steps=self.steps, chains=self._chains, generator=self._generator
            )
            mean_q = prob_h_given_v(p, x=rows).mean(0)
        if self.method == "pcd":
            self._chains = chains
        return gradient, mean_q

    def _update(self, rows: torch.Tensor) -> torch.Tensor:
        """A step on these rows (B, V) as the machine sees them; the mean of q over them (H,)."""
        p = self.model_.parameters_fp32
        gradient, mean_q = self._gradient(p, rows)
        if self.centred:
            self._mean_h.lerp_(mean_q, 0.01 if self.n_steps_ else 1.0)
            means = {"mean_w" if self._binary else "mean_x": self._mean}
            gradient = centred_gradient(p, gradient, self._mean_h, **means)
        if self.sparsity_target is not None:
            push = self.sparsity_cost * (mean_q - self.sparsity_target)
            gradient = gradient._replace(c=gradient.c + push)
        for field, name in PARAMETER_NAMES.items():
            if hasattr(self.model_, name):
                getattr(self.model_, name).grad = getattr(gradient, field)
        if not self._binary:
            nn.utils.clip_grad_norm_(self.model_.parameters(), 10.0)
        self._optimizer.step()
        if not self._binary:
            self.model_.image_log_var.clamp_(*LOG_VARIANCE_RANGE)
        self.n_steps_ += 1
        return mean_q

    def _seen(self, rows: torch.Tensor) -> torch.Tensor:
        """Checked, dense rows (B, V) as the machine sees them: real ones standardised."""
        return rows if self._binary else self.model_.standardise(rows)

    def _block(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Checked, dense rows as the block of the machine that they are."""
        return {"w" if self._binary else "x": self._seen(rows)}

    def _checked(self, X):
        check_fitted(self, "model_")
        return check_rows(self, X, self._binary)

    def _for_rows(self, X, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """function(parameters, w or x = rows) of the checked rows X, a part of them at a time."""
        p = self.model_.parameters_fp32
        return torch.cat([function(p, **self._block(part)) for part in dense_parts(X, self.device)])

    @torch.no_grad()
    def partial_fit(self, X, y=None):
        """One step on these rows, at the full learning rate. Raises as `fit`."""
        X = self._checked(X) if hasattr(self, "model_") else self._start(X)
        self._update(self._seen(take(X if is_sparse(X) else torch.from_numpy(X), slice(None)).to(self.device)))
        self.log_partition_ = None
        return self

    @torch.no_grad()
    def fit(self, X, y=None, validation=None):
        """Fit to rows X (n, V).

        Args:
            validation: rows that are not trained on; their free energy above that of as many training rows is recorded:
                a gap that grows is overfitting (Hinton 2010, section 6), no partition function needed.

        Raises:
            ValueError: for impossible settings or rows: not a matrix, not finite, not 0 and 1 if binary.
            FloatingPointError: if training diverges; the machine is then as after the last good epoch.
        """
        X = self._start(X)
        validation = None if validation is None else self._checked(validation)
        rows = X
        if not is_sparse(X):
            rows = torch.from_numpy(X).to(self.device)
            rows = rows.to(self._fast.products.dtype) if self._binary else self.model_.standardise(rows)
        bar = tqdm(range(self.n_iter), desc="fit RBM", disable=not self.verbose)
        rates = [group["lr"] for group in self._optimizer.param_groups]
        good = {name: tensor.clone() for name, tensor in self.model_.state_dict().items()}
        for epoch in bar:
            start = time.perf_counter()
            activity = self._run_epoch(rows, epoch, rates)
            seconds = time.perf_counter() - start
            if not all(torch.isfinite(tensor).all() for tensor in self.model_.parameters()):
                self.model_.load_state_dict(good)
                raise FloatingPointError(
                    f"training diverged in epoch {epoch + 1}: lower learning_rate ({self.learning_rate}); "
                    "the machine is as it was an epoch before"
                )
            good = {name: tensor.clone() for name, tensor in self.model_.state_dict().items()}
            entry = {"epoch": epoch + 1, "seconds": seconds, **_idle_share(activity)}
            if validation is not None:
                mean = lambda part: self._for_rows(part, free_energy).mean().item()
                entry["free_energy_gap"] = mean(validation) - mean(X[: validation.shape[0]])
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

    def _run_epoch(self, rows, epoch: int, rates: list[float]) -> torch.Tensor:
        """A step for every batch of rows, dense ones as the machine sees them or sparse ones; mean activity (H,)."""
        order = torch.randperm(rows.shape[0], generator=self._generator, device=self.device)
        batches, activity = order.split(int(self.batch_size)), torch.zeros(self._n_features_out, device=self.device)
        for number, batch in enumerate(batches):
            if self.anneal:
                left = 1 - (epoch * len(batches) + number) / (self.n_iter * len(batches))
                for group, rate in zip(self._optimizer.param_groups, rates):
                    group["lr"] = rate * left
            v = take(rows, batch).to(self.device)
            activity.add_(self._update(self._seen(v) if is_sparse(rows) else v), alpha=1 / len(batches))
        return activity

    @torch.no_grad()
    def transform(self, X) -> np.ndarray:
        """(n, H) P(h = 1 | v): the rows in the hidden units."""
        return self._for_rows(self._checked(X), prob_h_given_v).cpu().numpy()

    def _visible_mean(self, h: torch.Tensor) -> torch.Tensor:
        p = self.model_.parameters_fp32
        if self._binary:
            return prob_w_given_h(p, h)
        return mean_x_given_h(p, h) * self.model_.image_std + self.model_.image_mean

    @torch.no_grad()
    def inverse_transform(self, H) -> np.ndarray:
        """(n, V) E[v | h] of hidden states or probabilities (n, H).

        Raises:
            ValueError: for another width than H.
        """
        check_fitted(self, "model_")
        h = torch.as_tensor(np.asarray(H, dtype=np.float32), device=self.device)
        if h.ndim != 2 or h.shape[1] != self._n_features_out:
            raise ValueError(f"H has shape {tuple(h.shape)}; this RBM has {self._n_features_out} hidden units a row")
        return self._visible_mean(h).cpu().numpy()

    @torch.no_grad()
    def sample(self, num: int, steps: int = 1000, start=None, mean: bool = False) -> np.ndarray:
        """(num, V) rows where Gibbs chains stand after `steps` steps.

        Args:
            start: rows (num, V) to start from; default: independent units with the training data's means.
            mean: return E[v | h] of the last step, which is easier on the eye than its sample.

        Raises:
            ValueError: if `num` or `steps` is less than 1, or `start` has another number of rows than `num`.
        """
        check_fitted(self, "model_")
        num, steps = check_whole("num", num), check_whole("steps", steps)
        p, generator = self.model_.parameters_fp32, self._generator
        if start is not None:
            start = self._checked(start)
            if start.shape[0] != num:
                raise ValueError(f"start has {start.shape[0]} rows, but num is {num}: a chain starts from each row")
            block = self._block(torch.cat(list(dense_parts(start, self.device))))
        elif self._binary:
            block = {"w": bernoulli(self._mean.expand(num, -1), generator)}
        else:
            block = {"x": torch.randn(num, self.n_features_in_, generator=generator, device=self.device)}
        state = GibbsState(bernoulli(prob_h_given_v(p, **block), generator), **block)
        before = gibbs(p, state, steps - 1, generator=generator)
        if mean:
            return self._visible_mean(before.h).cpu().numpy()
        state = gibbs(p, before, 1, generator=generator)
        if self._binary:
            return state.w.cpu().numpy()
        return (state.x * self.model_.image_std + self.model_.image_mean).cpu().numpy()

    @torch.no_grad()
    def free_energy(self, X) -> np.ndarray:
        """(n,) F(v) in nats: low where the machine expects rows; comparable within one machine only."""
        return self._for_rows(self._checked(X), free_energy).cpu().numpy()

    def log_partition(self, temperatures: int = 2000, chains: int = 500) -> float:
        """log Z: exact if a layer has at most `EXACT_UNITS` units that can be summed, else annealed importance sampling."""
        check_fitted(self, "model_")
        p = self.model_.parameters_fp32
        units = min(self._n_features_out, self.n_features_in_) if self._binary else self._n_features_out
        if units <= EXACT_UNITS:
            log_z = log_partition_function(p).item()
            self.log_partition_ = AISResult(log_z, log_z, log_z, float("inf"), torch.zeros(0))
        else:
            base = base_rate_model(p, **{"mean_w" if self._binary else "mean_x": self._mean})
            self.log_partition_ = annealed_importance_sampling(
                p, temperatures, chains, base, self._generator, progress=bool(self.verbose)
            )
        return self.log_partition_.log_z

    @torch.no_grad()
    def score_samples(self, X) -> np.ndarray:
        """(n,) log P(v) in nats; of Gaussian units the log density of the rows as given."""
        X = self._checked(X)
        log_z = self.log_partition_.log_z if self.log_partition_ else self.log_partition()
        value = self._for_rows(X, lambda p, **block: log_prob(p, log_z, **block))
        if not self._binary:
            value = value - torch.log(self.model_.image_std).sum()
        return value.cpu().numpy()

    def score(self, X, y=None) -> float:
        """Mean log P(v) of the rows, in nats."""
        return float(self.score_samples(X).mean())

    @torch.no_grad()
    def to_layer(self) -> nn.Sequential:
        """Linear and sigmoid with this machine's weights: (n, V) rows -> P(h | v), to start a feed-forward network from."""
        check_fitted(self, "model_")
        p, linear = self.model_.parameters_fp32, nn.Linear(self.n_features_in_, self._n_features_out)
        if self._binary:
            weight, bias = p.U, p.c
        else:
            weight = p.W * (torch.exp(-p.log_var) / self.model_.image_std)[:, None]
            bias = p.c - self.model_.image_mean @ weight
        linear.weight.copy_(weight.T)
        linear.bias.copy_(bias)
        return nn.Sequential(linear, nn.Sigmoid())


class DeepBeliefNetwork(Transformer):
    """A stack of RBMs, trained greedily: each on samples of the hidden units of the one below (Hinton et al. 2006).

    Args:
        n_components: hidden units of each layer, from below; a number is one layer.
        settings: arguments of every `RBM`; `visible_type` is that of the first, the others are binary.

    Attributes:
        layers_: the fitted `RBM`s, from below.
    """

    def __init__(self, n_components=(256, 128), settings: Optional[dict] = None):
        self.n_components = n_components
        self.settings = settings

    def _checked(self, X, reset: bool = False):
        if not reset:
            check_fitted(self, "layers_")
        return check_rows(self, X, (self.settings or {}).get("visible_type", "binary") == "binary", reset)

    @torch.no_grad()
    def fit(self, X, y=None):
        """Fit the layers one after the other to rows X (n, V). Raises as `RBM.fit`."""
        sizes = np.atleast_1d(np.asarray(self.n_components, dtype=object)).tolist()
        if not sizes:
            raise ValueError("n_components is empty; name the hidden units of at least one layer, e.g. (256, 128)")
        X, settings, layers = self._checked(X, reset=True), dict(self.settings or {}), []
        generator = torch_generator(settings.get("random_state"), settings.get("device", "cpu"))
        for size in sizes:
            layer = RBM(size, **settings).fit(X)
            X = bernoulli(layer._for_rows(X, prob_h_given_v), generator).cpu().numpy()
            settings["visible_type"] = "binary"
            layers.append(layer)
        self.layers_, self._n_features_out = layers, layers[-1]._n_features_out
        return self

    @torch.no_grad()
    def transform(self, X) -> np.ndarray:
        """(n, H of the last layer) activity of the top layer, mean field all the way up."""
        X = self._checked(X)
        network = self.to_network()
        return torch.cat([network(part) for part in dense_parts(X)]).numpy()

    @torch.no_grad()
    def sample(self, num: int, steps: int = 1000) -> np.ndarray:
        """(num, V) E[v | h] after `steps` Gibbs steps in the top RBM and one sampled pass down."""
        check_fitted(self, "layers_")
        *below, top = self.layers_
        if not below:
            return top.sample(num, steps, mean=True)
        h = torch.from_numpy(top.sample(num, steps)).to(top.device)
        for layer in below[:0:-1]:
            h = bernoulli(layer._visible_mean(h), layer._generator)
        return below[0]._visible_mean(h).cpu().numpy()

    def to_network(self, num_outputs: Optional[int] = None) -> nn.Sequential:
        """A feed-forward network that starts from the layers' weights, with a fresh linear head if `num_outputs` is given."""
        check_fitted(self, "layers_")
        parts = [module for layer in self.layers_ for module in layer.to_layer()]
        if num_outputs is not None:
            parts.append(nn.Linear(self._n_features_out, num_outputs))
        return nn.Sequential(*parts)
