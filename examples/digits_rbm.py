"""What RBMs are known for, each in a few lines, on scikit-learn's digits (8 x 8 pixels, binarised).

    python examples/digits_rbm.py --output runs/digits-rbm      # pip install scikit-learn matplotlib

Writes the numbers to `.json` and a picture to `.png`. The fifth use, one representation of images and words, is shown on
Flickr8k by `python -m training.evaluate_rbm`.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from boltzmann import RBM, DeepBeliefNetwork


def dimension_reduction(train, train_labels, test, test_labels, units=16):
    """How much of a digit is left in a few numbers: nearest neighbours on the codes."""
    rbm = RBM(units, n_iter=100, batch_size=32, learning_rate=0.3, random_state=0).fit(train)
    pca = PCA(units, random_state=0).fit(train)
    accuracy = lambda encode: KNeighborsClassifier(5).fit(encode(train), train_labels).score(encode(test), test_labels)
    return {
        "units": units,
        "pixels": accuracy(lambda x: x),
        "pca": accuracy(pca.transform),
        "rbm": accuracy(rbm.transform),
    }


def features(rbm, train, train_labels, test, test_labels):
    """A linear probe on the hidden units against one on the pixels: same split, same classifier."""

    def probe(encode):
        return LogisticRegression(max_iter=2000).fit(encode(train), train_labels).score(encode(test), test_labels)

    return {"pixels": probe(lambda x: x), "hidden_units": probe(rbm.transform), "units": rbm.n_components}


def initialisation(train, train_labels, test, test_labels, labelled=100, steps=300, seeds=(0, 1, 2, 3, 4)):
    """A network that starts from a deep belief net, or from chance, and sees the labels of a few digits only."""
    sizes = (256, 128)
    dbn = DeepBeliefNetwork(sizes, {"n_iter": 50, "batch_size": 32, "learning_rate": 0.3, "random_state": 0}).fit(train)
    x, y = torch.from_numpy(test), torch.from_numpy(test_labels)
    result = {"labelled": labelled, "from_dbn": [], "from_chance": []}
    for seed in seeds:
        few = np.random.default_rng(seed).permutation(len(train))[:labelled]
        rows, labels = torch.from_numpy(train[few]), torch.from_numpy(train_labels[few])
        for name in ("from_dbn", "from_chance"):
            torch.manual_seed(seed)
            network = dbn.to_network(num_outputs=10)
            if name == "from_chance":
                for module in network[:-1]:
                    if isinstance(module, nn.Linear):
                        module.reset_parameters()
            optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
            for _ in range(steps):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(rows), labels).backward()
                optimizer.step()
            with torch.no_grad():
                result[name].append((network(x).argmax(1) == y).float().mean().item())
    return result


def picture(path, rbm, dbn, sparse, train):
    """Digits, samples of the RBM and of the deep belief net, and some of the RBM's weights."""
    across = 12
    panels = {
        "training digits": train[: 3 * across],
        "samples of the RBM after 2,000 Gibbs steps": rbm.sample(3 * across, 2000, mean=True),
        "samples of a deep belief net": dbn.sample(3 * across, 2000),
        "weights of 36 hidden units of the sparse RBM": sparse.model_.word_weight.T.numpy()[: 3 * across],
    }
    figure = plt.figure(figsize=(across * 0.7, 3 * 4 * 0.78), layout="constrained")
    for part, (title, rows) in zip(figure.subfigures(len(panels), 1), panels.items()):
        part.suptitle(title)
        signed = rows.min() < 0
        for axis, row in zip(part.subplots(3, across).flat, rows):
            limits = {"cmap": "RdBu", "vmin": -1.5, "vmax": 1.5} if signed else {"cmap": "gray_r", "vmin": 0, "vmax": 1}
            axis.imshow(row.reshape(8, 8), **limits)
            axis.axis("off")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/digits-rbm", help="path without ending")
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    split = train_test_split((images > 7).astype(np.float32), labels, test_size=0.25, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = split

    rbm = RBM(256, n_iter=100, batch_size=32, learning_rate=0.3, random_state=0).fit(train, validation=test)
    # few units on at a time make better features; 512 and 0.1 were chosen within the training digits
    settings = {"n_iter": 60, "batch_size": 32, "learning_rate": 0.3, "random_state": 0}
    sparse = RBM(512, sparsity_target=0.1, sparsity_cost=0.5, **settings).fit(train)
    dbn = DeepBeliefNetwork((256, 128), {"n_iter": 100, "batch_size": 32, "learning_rate": 0.3, "random_state": 0}).fit(
        train
    )
    share = np.clip(train.mean(0), 1 / (len(train) + 2), 1).astype(np.float64)
    result = {
        "log_likelihood_test": rbm.score(test),
        "log_likelihood_independent_pixels": float(
            (test * np.log(share) + (1 - test) * np.log1p(-share)).sum(1).mean()
        ),
        "features": features(sparse, train, train_labels, test, test_labels),
        "dimension_reduction": dimension_reduction(train, train_labels, test, test_labels),
        "initialisation": initialisation(train, train_labels, test, test_labels),
    }
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture(output.with_suffix(".png"), rbm, dbn, sparse, train)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"wrote {output.with_suffix('.json')} and {output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
