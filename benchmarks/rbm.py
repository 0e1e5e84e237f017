"""Speed of training a binary RBM: ours, `rbms`, scikit-learn's BernoulliRBM and a plain torch loop, side by side.

    python -m benchmarks.rbm --output benchmarks/results/rbm.json        # pip install rbms scikit-learn

One run, the contenders in turn in every round, on 1 and on 2 threads; samples a second are medians over the rounds. PCD-1,
as many chains as rows in a batch. The arithmetic bound is 10 V H FLOP a sample at the matrix rate measured between the rounds,
for each precision; "bound of its own" is that of the precision a contender computes in. The matrix rates are the source of
the table in `boltzmann.fast.processor_precision`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def ours(precision, centred=True):
    from boltzmann import RBM

    def epoch(X, hidden, batch):
        rbm = RBM(
            hidden,
            precision=precision,
            centred=centred,
            batch_size=batch,
            n_iter=1,
            momentum=0.0,
            anneal=False,
            random_state=0,
        )
        rbm.fit(X)
        return rbm.history_[0]["seconds"]

    return epoch


def rbms_epoch(centred):
    """Its training step and torch's SGD, without the HDF5 file that its script rewrites at every step."""
    import torch
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.training.pcd import fit_batch_pcd

    def epoch(X, hidden, batch):
        X = torch.from_numpy(X)
        params = BBRBM(0.01 * torch.randn(X.shape[1], hidden), torch.zeros(X.shape[1]), torch.zeros(hidden))
        for p in params.parameters():
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.SGD(params.parameters(), lr=0.05, maximize=True)
        chains, weights = params.init_chains(batch), torch.ones(batch)
        start = time.perf_counter()
        for rows in torch.randperm(len(X)).split(batch):
            optimizer.zero_grad(set_to_none=False)
            data = (X[rows], weights[: len(rows)])
            chains, _ = fit_batch_pcd(data, chains, params, gibbs_steps=1, beta=1.0, centered=centred)
            optimizer.step()
        return time.perf_counter() - start

    return epoch


def sklearn_epoch(X, hidden, batch):
    from sklearn.neural_network import BernoulliRBM

    rbm = BernoulliRBM(hidden, learning_rate=0.05, batch_size=batch, n_iter=1, random_state=0)
    start = time.perf_counter()
    rbm.fit(X)
    return time.perf_counter() - start


def plain_epoch(X, hidden, batch):
    """What one writes first."""
    import torch

    X = torch.from_numpy(X)
    W, b, c = 0.01 * torch.randn(X.shape[1], hidden), torch.zeros(X.shape[1]), torch.zeros(hidden)
    h = torch.bernoulli(torch.full((batch, hidden), 0.5))
    start = time.perf_counter()
    for rows in torch.randperm(len(X)).split(batch):
        v = X[rows]
        q = torch.sigmoid(c + v @ W)
        sampled = torch.bernoulli(torch.sigmoid(b + h @ W.T))
        q_model = torch.sigmoid(c + sampled @ W)
        h = torch.bernoulli(q_model)
        W += 0.05 / len(v) * (v.T @ q - sampled.T @ q_model)
        b += 0.05 * (v.mean(0) - sampled.mean(0))
        c += 0.05 * (q.mean(0) - q_model.mean(0))
    return time.perf_counter() - start


def matrix_rates(batch: int, visible: int, hidden: int, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of the product v U (`batch` x `visible` with `visible` x `hidden`) in every precision."""
    import torch

    from boltzmann.fast import PRECISIONS

    U = 0.01 * torch.randn(visible, hidden)
    rates = {}
    for name, make in PRECISIONS.items():
        products = make()
        products.load(U)
        v = (torch.rand(batch, visible) < 0.5).to(products.dtype)
        best = float("inf")
        for _ in range(repeats + 1):  # the first call also prepares the product's code
            start = time.perf_counter()
            products.multiply(v, products.up_weight)
            best = min(best, time.perf_counter() - start)
        rates[name] = 2 * batch * visible * hidden / best
    return rates


CONTENDERS = {  # name: (epoch, precision of its bound)
    "blip-rbm, auto": (lambda: ours("auto"), None),
    "blip-rbm, auto, not centred": (lambda: ours("auto", centred=False), None),
    "blip-rbm, bfloat16": (lambda: ours("bfloat16"), "bfloat16"),
    "blip-rbm, float32": (lambda: ours("float32"), "float32"),
    "rbms 0.5.0": (lambda: rbms_epoch(True), "float32"),
    "rbms 0.5.0, not centred": (lambda: rbms_epoch(False), "float32"),
    "scikit-learn BernoulliRBM": (lambda: sklearn_epoch, "float32"),
    "plain torch loop": (lambda: plain_epoch, "float32"),
}
PEERS = [name for name in CONTENDERS if not name.startswith("blip-rbm")]


def measure(args) -> dict:
    """All contenders on the threads of this process."""
    import numpy as np
    import torch
    from threadpoolctl import threadpool_limits
    from tqdm.auto import tqdm

    from boltzmann.fast import processor_precision

    torch.set_num_threads(args.threads[0])
    torch.set_grad_enabled(False)
    X = (np.random.default_rng(0).random((args.batches * args.batch, args.visible)) < 0.2).astype(np.float32)
    epochs = {name: make() for name, (make, _) in CONTENDERS.items()}
    seconds, rates = {name: [] for name in epochs}, []
    with threadpool_limits(args.threads[0]):
        chosen = processor_precision(args.batch, args.visible, args.hidden)
        for round_number in tqdm(range(args.rounds + 1), desc=f"{args.threads[0]} threads"):
            rates.append(matrix_rates(args.batch, args.visible, args.hidden))
            for name, epoch in epochs.items():
                elapsed = epoch(X, args.hidden, args.batch)
                if round_number:  # the first round warms up
                    seconds[name].append(elapsed)
    rate = {name: statistics.median(r[name] for r in rates[1:]) for name in rates[0]}
    bound = {name: value / (10 * args.visible * args.hidden) for name, value in rate.items()}
    speed = {name: len(X) / statistics.median(times) for name, times in seconds.items()}
    own = {name: precision or chosen for name, (_, precision) in CONTENDERS.items()}
    return {
        "threads": args.threads[0],
        "chosen_precision": chosen,
        "gflops": {name: value / 1e9 for name, value in rate.items()},
        "bound_samples_per_second": bound,
        "samples_per_second": speed,
        "share_of_own_bound": {name: speed[name] / bound[own[name]] for name in speed},
        "times_best_peer": {name: speed[name] / max(speed[peer] for peer in PEERS) for name in speed},
    }


def table(results: list[dict]) -> str:
    lines = []
    for result in results:
        lines += [
            "",
            f"{result['threads']} thread(s), chosen: {result['chosen_precision']}; matrix rates "
            + ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in result["gflops"].items()),
            "",
            "| | samples/s | of its precision's bound | of the fp32 bound | times the best peer |",
            "|---|---|---|---|---|",
        ]
        for name, speed in result["samples_per_second"].items():
            lines.append(
                f"| {name} | {speed:,.0f} | {result['share_of_own_bound'][name]:.0%} | "
                f"{speed / result['bound_samples_per_second']['float32']:.0%} | {result['times_best_peer'][name]:.2f} |"
            )
    return "\n".join(lines[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visible", type=int, default=784)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--batches", type=int, default=10, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", help="results file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    results = []
    for threads in args.threads:  # a process each: thread pools are sized when a library is loaded
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", "benchmarks.rbm", "--child", "--threads", str(threads)]
        for name in ("visible", "hidden", "batch", "batches", "rounds"):
            command += [f"--{name}", str(getattr(args, name))]
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(child.stdout.splitlines()[-1]))
    print(
        f"V {args.visible}, H {args.hidden}, batch {args.batch}, PCD-1, {args.rounds} rounds of {args.batches} batches"
    )
    print(table(results))
    if args.output:
        Path(args.output).write_text(json.dumps({"settings": vars(args), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
