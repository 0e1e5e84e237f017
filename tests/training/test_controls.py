"""The controls: what stands in the place of the RBM."""

import numpy as np
import pytest
import torch

from experiments.controls.stand_ins import STAND_INS, Images
from modeling_blip_rbm.rbm import JointRBM
from training.lib.data import CaptionWords


def drawn_images(rng, n: int, words: int = 7, units: int = 11) -> Images:
    """Images whose unit k is high where word k is said."""
    said = rng.random((n, words)) < 0.3
    pooled = torch.from_numpy(np.pad(3.0 * said, ((0, 0), (0, units - words))) + rng.normal(0, 0.5, (n, units))).float()
    ids = [[[int(k) for k in np.flatnonzero(row)]] for row in said]
    tokens = Tokens(pooled[:, None].expand(-1, 3, -1))
    captions = [[" ".join(f"w{k}" for k in of_image[0]) or "none"] for of_image in ids]
    return Images(
        captions,
        CaptionWords(ids, list(range(words)), words),
        [pooled],
        [pooled @ torch.ones(units, 5)],
        tokens,
        np.arange(n),
    )


class Tokens:
    def __init__(self, tokens):
        self.tokens = tokens

    def batch(self, rows, view=0):
        return self.tokens[rows]


@pytest.mark.parametrize("name", ["untrained RBM", "linear", "PCA", "MLP", "neighbours"])
def test_a_stand_in_knows_which_words_go_with_an_image(name):
    rng = np.random.default_rng(11)
    train, held = drawn_images(rng, 613), drawn_images(rng, 101)
    rbm = JointRBM(11, 7, 5, tokens=True)
    rbm.reset_parameters(std=1.0)
    stand_in = STAND_INS[name](rbm, train, held, train.words.share(np.arange(613)))
    own = torch.stack([held.words[i].float() for i in range(101)])  # (n, 1, K)
    other = own.roll(13, 0)
    right = stand_in.information(held, own)[:, 0] - stand_in.information(held, other)[:, 0]
    different = (own != other).any(-1)[:, 0]
    assert (right[different] > 0).float().mean() > (0.6 if name == "untrained RBM" else 0.7)
