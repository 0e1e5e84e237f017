"""Likelihood of held-back digits after equal epochs: ours, scikit-learn's BernoulliRBM and `rbms`, by the same AIS.

    python -m benchmarks.rbm_likelihood --output benchmarks/results/rbm_likelihood.json

scikit-learn's digits, binarised; 60 % to train, 20 % on which each library's learning rate is chosen, 20 % to report. Equal
hidden units, batch size and epochs; the machines differ in nothing but who trained them. Log-likelihoods in nats a digit.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import BernoulliRBM
from tqdm.auto import tqdm

from boltzmann import RBM, annealed_importance_sampling, log_prob
from boltzmann.likelihood import base_rate_model
from modeling_blip_rbm import RBMParameters


def ours(precision):
    def fit(X, hidden, batch, epochs, rate, seed):
        settings = {"learning_rate": rate, "batch_size": batch, "n_iter": epochs, "random_state": seed}
        return RBM(hidden, precision=precision, **settings).fit(X).model_.parameters_fp32

    return fit


def sklearn(X, hidden, batch, epochs, rate, seed):
    rbm = BernoulliRBM(hidden, learning_rate=rate, batch_size=batch, n_iter=epochs, random_state=seed).fit(X)
    tensor = lambda array: torch.tensor(array, dtype=torch.float32)
    return RBMParameters(tensor(rbm.intercept_hidden_), tensor(rbm.components_.T), tensor(rbm.intercept_visible_))


def rbms(X, hidden, batch, epochs, rate, seed):
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.bernoulli_bernoulli.implement import _init_parameters
    from rbms.training.pcd import fit_batch_pcd

    torch.manual_seed(seed)
    X = torch.from_numpy(X)
    b, c, W = _init_parameters(hidden, X, X.device, X.dtype, 1e-4)
    params = BBRBM(W, b, c)
    for p in params.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(params.parameters(), lr=rate, maximize=True)
    chains, weights = params.init_chains(batch), torch.ones(batch)
    for _ in range(epochs):
        for rows in torch.randperm(len(X)).split(batch):
            optimizer.zero_grad(set_to_none=False)
            chains, _ = fit_batch_pcd((X[rows], weights[: len(rows)]), chains, params, gibbs_steps=1, beta=1.0)
            optimizer.step()
    return RBMParameters(params.hbias, params.weight_matrix, params.vbias)


LIBRARIES = {
    "blip-rbm, float32": ours("float32"),
    "blip-rbm, int8 products": ours("int8"),
    "blip-rbm, bfloat16 products": ours("bfloat16"),
    "scikit-learn BernoulliRBM": sklearn,
    "rbms 0.5.0": rbms,
}


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Binarised digits (n, 64) to train, to choose the learning rate on, and to report."""
    images, labels = load_digits(return_X_y=True)
    images = (images > 7).astype(np.float32)
    train, rest, _, rest_labels = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    return train, *train_test_split(rest, test_size=0.5, random_state=0, stratify=rest_labels)


def measure(fit, args, scores, train, bar) -> dict:
    """Scores of a library: its learning rate chosen on the validation part, then a run a seed."""
    tried = {}
    for rate in args.rates:
        try:
            p = fit(train, args.hidden, args.batch, args.epochs, rate, 100)
            tried[rate] = scores(p, args.temperatures // 4)["validation"]
        except (FloatingPointError, ValueError):  # diverged
            tried[rate] = float("-inf")
        bar.update()
    best = max(tried, key=lambda rate: tried[rate] if np.isfinite(tried[rate]) else float("-inf"))
    runs = []
    for seed in args.seeds:
        runs.append(scores(fit(train, args.hidden, args.batch, args.epochs, best, seed), args.temperatures))
        bar.update()
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    spread = max(run["test"] for run in runs) - min(run["test"] for run in runs)
    return {"learning_rate": best, "validation_by_rate": tried, "runs": runs, **mean, "spread": spread}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--temperatures", type=int, default=2000)
    parser.add_argument("--chains", type=int, default=500)
    parser.add_argument("--output", help="results file")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=UserWarning)
    train, validation, test = digits()

    def scores(p, temperatures):
        base = base_rate_model(p, mean_w=torch.from_numpy(train.mean(0)))
        ais = annealed_importance_sampling(p, temperatures, args.chains, base, torch.Generator().manual_seed(0))
        mean = lambda rows: log_prob(p, ais.log_z, w=torch.from_numpy(rows)).mean().item()
        return {"train": mean(train), "validation": mean(validation), "test": mean(test), "width": ais.high - ais.low}

    result = {"settings": vars(args), "libraries": {}}
    bar = tqdm(total=len(LIBRARIES) * (len(args.rates) + len(args.seeds)))
    print("| | learning rate | train | test | spread over seeds | AIS interval |\n|---|---|---|---|---|---|")
    for name, fit in LIBRARIES.items():
        result["libraries"][name] = found = measure(fit, args, scores, train, bar)
        print(
            f"| {name} | {found['learning_rate']:g} | {found['train']:.2f} | {found['test']:.2f} | {found['spread']:.2f} | "
            f"{found['width']:.2f} |",
            flush=True,
        )
    if args.output:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
