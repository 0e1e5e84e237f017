"""The RBM's mathematics against exact enumeration and autograd."""

import itertools

import numpy as np
import pytest
import torch

from modeling_blip_rbm.rbm import (
    PARAMETER_NAMES,
    WORD_GAIN_ORDERS,
    GibbsState,
    JointRBM,
    RBMParameters,
    contrastive_divergence,
    energy,
    free_energy,
    free_energy_gradient,
    gibbs,
    hidden_input,
    mean_x_given_h,
    pointwise_mutual_information,
    pooled_input,
    prob_h_given_v,
    prob_w_given_h,
    relative_free_energy,
    sample_places,
    token_gibbs,
    token_input,
    token_word_map,
    word_gains,
)


V, K, H, B = 3, 5, 4, 7


def states(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)))


@pytest.fixture
def params():
    g = torch.Generator().manual_seed(3)
    r = lambda *size: torch.randn(*size, generator=g)
    return RBMParameters(c=r(H), U=r(K, H), b=r(K), W=r(V, H), mu=r(V), log_var=0.3 * r(V))


@pytest.fixture
def binary(params):
    """The textbook machine over K visible units: no image block."""
    return RBMParameters(c=params.c, U=params.U, b=params.b)


def test_textbook_energy(binary):
    v, h = torch.rand(B, K), torch.rand(B, H)
    for i in range(B):
        expected = -(v[i] @ binary.U @ h[i]) - binary.b @ v[i] - binary.c @ h[i]
        assert energy(binary, h, w=v)[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_joint_energy_is_the_equation(params):
    x, w, h = torch.randn(B, V), states(K)[:B], states(H)[:B]
    var = params.log_var.exp()
    for i in range(B):
        expected = (
            0.5 * ((x[i] - params.mu) ** 2 / var).sum()
            - (x[i] / var) @ params.W @ h[i]
            - w[i] @ params.U @ h[i]
            - params.b @ w[i]
            - params.c @ h[i]
        )
        assert energy(params, h, x, w)[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("blocks", ["x", "w", "xw", "binary image"])
def test_free_energy_sums_out_the_hidden_units(params, blocks):
    if blocks == "binary image":
        params, blocks = params._replace(log_var=None), "xw"
    x = torch.randn(B, V) if "x" in blocks else None
    w = torch.rand(B, K).round() if "w" in blocks else None
    h = states(H)[:, None].expand(-1, B, -1)
    expected = -torch.logsumexp(-energy(params, h, x, w), 0)
    torch.testing.assert_close(free_energy(params, x, w), expected)


def test_conditionals(params):
    x, w, h = torch.randn(B, V), states(K)[-B:], states(H)
    joint = -energy(params, h[:, None].expand(-1, B, -1), x, w)  # (2^H, B)
    posterior = joint.softmax(0).T @ h
    torch.testing.assert_close(prob_h_given_v(params, x, w), posterior)
    every_w = states(K)
    for state in h[:B]:
        prob = (-energy(params, state.expand(len(every_w), -1), w=every_w)).softmax(0) @ every_w
        torch.testing.assert_close(prob_w_given_h(params, state), prob)


def test_image_conditional_is_the_gaussian_of_the_energy(params):
    """E is quadratic in x with minimum at E[x|h] and curvature 1/s^2."""
    h = states(H)[5]
    mean = mean_x_given_h(params, h).requires_grad_()
    (gradient,) = torch.autograd.grad(energy(params, h, mean), mean)
    torch.testing.assert_close(gradient, torch.zeros(V), atol=1e-5, rtol=0)
    hessian = torch.autograd.functional.hessian(lambda x: energy(params, h, x), mean.detach())
    torch.testing.assert_close(hessian, torch.diag(torch.exp(-params.log_var)))


def test_closed_form_gradient_is_autograd(params):
    x, w = torch.randn(B, V), torch.rand(B, K).round()
    for p in (params, params._replace(log_var=None)):
        leaves = RBMParameters(*(None if t is None else t.clone().requires_grad_() for t in p))
        expected = torch.autograd.grad(free_energy(leaves, x, w).sum(), [t for t in leaves if t is not None])
        actual = [t for t in free_energy_gradient(p, x, w) if t is not None]
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


def test_contrastive_divergence_tends_to_the_likelihood_gradient(binary):
    """E[CD-k] -> gradient of the exact negative log-likelihood as k grows, and CD-1 is further away than CD-30."""
    binary = RBMParameters(c=binary.c * 0.5, U=binary.U * 0.5, b=binary.b * 0.5)
    data = states(K)[[1, 6, 11, 28]]
    leaves = RBMParameters(c=binary.c.clone().requires_grad_(), U=binary.U.clone().requires_grad_(), b=binary.b.clone())
    log_z = torch.logsumexp(-free_energy(leaves, w=states(K)), 0)
    loss = (free_energy(leaves, w=data) + log_z).mean()
    expected = torch.autograd.grad(loss, [leaves.U, leaves.c])

    def error(steps):
        g, _ = contrastive_divergence(binary, w=data.repeat(20_000, 1), steps=steps)
        return max((g.U - expected[0]).abs().max().item(), (g.c - expected[1]).abs().max().item())

    assert error(30) < 0.01 < error(1)


def test_gibbs_reaches_the_exact_distribution(binary):
    chains = GibbsState(torch.zeros(40_000, H), w=torch.zeros(40_000, K))
    w = gibbs(binary, chains, steps=40).w
    every_w = states(K)
    prob = (-free_energy(binary, w=every_w)).softmax(0)
    index = (w @ (2 ** torch.arange(K - 1, -1, -1.0))).long()
    share = torch.bincount(index, minlength=2**K) / len(w)
    assert (share - prob).abs().sum() / 2 < 0.02  # total variation


def test_clamped_blocks_do_not_move(params):
    x, w = torch.randn(B, V), torch.rand(B, K).round()
    after = gibbs(params, GibbsState(torch.zeros(B, H), x, w), 3, clamp=("x",))
    assert torch.equal(after.x, x)
    assert not torch.equal(after.w, w)


@pytest.mark.parametrize("batch", [1, 10, 100])
def test_variance_of_gaussian_samples_does_not_depend_on_the_batch(batch):
    """The temperature is 1 whatever the batch size (in a published GRBM it was the batch size)."""
    p = RBMParameters(c=torch.zeros(H), W=torch.zeros(V, H), mu=torch.full((V,), 2.0), log_var=torch.zeros(V))
    state, samples = GibbsState(torch.zeros(batch, H), torch.zeros(batch, V)), []
    for _ in range(40_000 // batch):
        state = gibbs(p, state, 1)
        samples.append(state.x)
    samples = torch.cat(samples)
    assert samples.mean().item() == pytest.approx(2.0, abs=0.02)
    assert samples.var().item() == pytest.approx(1.0, abs=0.03)


def test_energies_are_per_sample(params):
    x, w = torch.randn(B, V), torch.rand(B, K).round()
    torch.testing.assert_close(free_energy(params, x.repeat(2, 1), w.repeat(2, 1))[:B], free_energy(params, x, w))


def test_exact_word_gains_are_free_energy_differences(params):
    x, w = torch.randn(B, V), torch.zeros(B, K)
    w[:, 2] = 1.0
    gains = word_gains(params, hidden_input(params, x, w))
    for k in (0, 1, 3, 4):
        more = w.clone()
        more[:, k] = 1.0
        expected = free_energy(params, x, w) - free_energy(params, x, more)
        torch.testing.assert_close(params.b[k] + gains[:, k], expected, atol=1e-5, rtol=1e-4)


def test_expansions_of_word_gains_converge(params):
    a = hidden_input(params, torch.randn(B, V))
    for std, first, second in ((0.3, 0.15, 0.03), (0.03, 1.5e-3, 3e-5)):
        p = params._replace(U=params.U * std)
        exact = word_gains(p, a)
        assert (word_gains(p, a, "first") - exact).abs().max() < first
        assert (word_gains(p, a, "second") - exact).abs().max() < second
        for order in WORD_GAIN_ORDERS:
            difference = word_gains(p, a, order) - word_gains(p, a.flip(0), order)
            torch.testing.assert_close(word_gains(p, a, order, than=a.flip(0)), difference)
    with pytest.raises(ValueError, match="'third'.*exact, second, first"):
        word_gains(params, a, "third")


def test_pointwise_mutual_information(params):
    """A double difference of free energies: words against none, this image against the average one."""
    x, w = torch.randn(B, V), torch.rand(B, K).round()
    none, average = torch.zeros_like(w), torch.zeros_like(x)
    expected = (free_energy(params, x, none) - free_energy(params, x, w)) - (
        free_energy(params, average, none) - free_energy(params, average, w)
    )
    actual = pointwise_mutual_information(params, hidden_input(params, x), w)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_wrong_width_and_missing_block_are_named(params, binary):
    with pytest.raises(ValueError, match="w has 6 units, but the RBM has 5"):
        free_energy(params, w=torch.zeros(B, 6))
    with pytest.raises(ValueError, match="x was given, but this RBM has no such block"):
        free_energy(binary, x=torch.zeros(B, V))


def test_joint_rbm_owns_what_the_functions_need():
    rbm = JointRBM(V, K, H)
    assert {n: tuple(p.shape) for n, p in rbm.named_parameters()} == {
        "hidden_bias": (H,),
        "word_weight": (K, H),
        "word_bias": (K,),
        "image_weight": (V, H),
        "image_bias": (V,),
        "image_log_var": (V,),
    }
    x, w = torch.randn(B, V), torch.rand(B, K).round()
    torch.testing.assert_close(rbm.free_energy(x, w), free_energy(rbm.parameters_fp32, x, w))
    rbm.image_log_var.data.fill_(-50.0)
    assert torch.isfinite(rbm.free_energy(x, w)).all()  # the variance is bounded


def test_standardised_images():
    pooled = torch.randn(101, V) * 5 + 3
    pooled[:, 1] = 4.0  # never varies
    rbm = JointRBM(V, K, H)
    rbm.set_image_statistics(pooled)
    x = rbm.standardise(pooled)
    torch.testing.assert_close(x.mean(0), torch.zeros(V), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0, 0.0, 1.0]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="NaN"):
        rbm.set_image_statistics(pooled * float("nan"))
    binary = JointRBM(V, K, H, "binary")
    x = binary.standardise(pooled)
    assert 0 <= x.min() and x.max() <= 1 and torch.isfinite(binary.free_energy(x)).all()


@pytest.mark.parametrize("sizes", [(0, 0, 3), (3, 5, 0), (-1, 5, 3)])
def test_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="at least one visible and one hidden unit"):
        JointRBM(*sizes)
    with pytest.raises(ValueError, match="'ternary'.*'gaussian' and 'binary'"):
        JointRBM(3, 5, 7, "ternary")


def ratio_to_independent(p, x, joint):
    """log P(x)/P_0(x) (B,), less that of x = 0, the last row: P by all states of the hidden units, -E `joint` (states, B + 1); P_0 by
    PyTorch's distributions."""
    if p.log_var is None:
        background = torch.distributions.ContinuousBernoulli(logits=p.mu)  # density exp(mu x) / Z on [0, 1]
    else:
        background = torch.distributions.Normal(p.mu, torch.exp(0.5 * p.log_var))
    ratio = torch.logsumexp(joint, 0) - background.log_prob(x).flatten(1).sum(1)
    return ratio[:-1] - ratio[-1]


@pytest.mark.parametrize("kind", ["gaussian", "binary"])
def test_relative_free_energy_is_a_likelihood_ratio(params, kind):
    p = params if kind == "gaussian" else params._replace(log_var=None)
    x = torch.cat([torch.rand(B, V), torch.zeros(1, V)])
    joint = -energy(p, states(H)[:, None], x)  # (2^H, B + 1)
    expected = ratio_to_independent(p, x, joint)
    actual = -relative_free_energy(p, hidden_input(p, x[:-1]))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
    none = joint.log_softmax(0)[0]  # log P(h = 0 | x)
    torch.testing.assert_close(actual, none[-1] - none[:-1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- an image block of tokens

N = 2  # tokens: 3^4 states of z


def token_states():
    """All z in {0, ..., N}^H, and as h (states, N, H)."""
    z = torch.tensor(list(itertools.product(range(N + 1), repeat=H)))
    return z, torch.stack([(z == n).float() for n in range(1, N + 1)], 1)


def token_energies(p, x, w):
    """E (states,) of every z with tokens x (N, V) and words w (K,): the equation, term by term."""
    var = torch.ones(V) if p.log_var is None else p.log_var.exp()
    visible = -(x @ p.mu).sum() if p.log_var is None else 0.5 * ((x - p.mu) ** 2 / var).sum()
    when_on = p.c + (x / var) @ p.W + p.U.T @ w - np.log(N)  # (N, H): -E of cause j being on at token n
    return visible - w @ p.b - (token_states()[1] * when_on).sum((1, 2))


@pytest.fixture(params=["gaussian", "binary"])
def token_params(params, request):
    return params if request.param == "gaussian" else params._replace(log_var=None)


@pytest.fixture
def token_rbm(token_params):
    kind = "binary" if token_params.log_var is None else "gaussian"
    rbm = JointRBM(V, K, H, kind, tokens=True)
    with torch.no_grad():
        for field, name in PARAMETER_NAMES.items():
            if hasattr(rbm, name):
                getattr(rbm, name).copy_(getattr(token_params, field))
    return rbm


def test_free_energy_of_tokens_sums_over_all_places(token_rbm):
    p = token_rbm.parameters_fp32
    x, w = torch.rand(B, N, V), states(K)[5 : 5 + B]
    expected = torch.stack([-torch.logsumexp(-token_energies(p, x[i], w[i]), 0) for i in range(B)])
    torch.testing.assert_close(token_rbm.free_energy(x, w), expected)
    without = torch.stack([-torch.logsumexp(-token_energies(p, x[i], torch.zeros(K)), 0) for i in range(B)])
    torch.testing.assert_close(token_rbm.free_energy(x), without)


def test_relative_free_energy_of_tokens_is_a_likelihood_ratio(token_rbm):
    p = token_rbm.parameters_fp32
    x = torch.cat([torch.rand(B, N, V), torch.zeros(1, N, V)])
    joint = torch.stack([-token_energies(p, row, torch.zeros(K)) for row in x], 1)
    actual = -relative_free_energy(p, token_rbm.hidden_input(x[:-1]))
    torch.testing.assert_close(actual, ratio_to_independent(p, x, joint), rtol=1e-4, atol=1e-4)


def test_causes_and_words_of_tokens(token_rbm):
    p = token_rbm.parameters_fp32
    x, z = torch.rand(B, N, V), token_states()[0]
    for w in (torch.zeros(K), states(K)[13]):
        prob = torch.stack([torch.softmax(-token_energies(p, row, w), 0) for row in x])
        on = prob @ (z > 0).float()
        torch.testing.assert_close(torch.sigmoid(token_rbm.hidden_input(x, w)), on)
    a = token_rbm.hidden_input(x)
    one_word = torch.eye(K)
    free = lambda row, w: -torch.logsumexp(-token_energies(p, row, w), 0)
    log_odds = torch.stack([torch.stack([free(row, 0 * w) - free(row, w) for w in one_word]) for row in x])
    torch.testing.assert_close(p.b + word_gains(p, a), log_odds, rtol=1e-4, atol=1e-5)
    blank = torch.zeros(1, N, V)
    pmi = [
        free(row, 0 * w) - free(row, w) - free(blank[0], 0 * w) + free(blank[0], w) for row, w in zip(x, states(K)[9:])
    ]
    got = pointwise_mutual_information(p, a, states(K)[9 : 9 + B])
    torch.testing.assert_close(got, torch.stack(pmi)[: len(got)], rtol=1e-4, atol=1e-5)


def test_equal_tokens_are_one_pooled_image(token_rbm):
    x = torch.rand(B, V)
    p = token_rbm.parameters_fp32
    torch.testing.assert_close(token_rbm.hidden_input(x[:, None].expand(B, 5, V)), hidden_input(p, x))


def test_sampled_places_have_their_probabilities(params):
    x, w = torch.randn(N, V), states(K)[11]
    h, n = token_states()[1], 20000
    prob = torch.softmax(-token_energies(params, x, w), 0)
    A = token_input(params, x.expand(n, N, V))
    samples = sample_places(A, w @ params.U, torch.Generator().manual_seed(5))
    assert samples.sum(-2).max() == 1  # at one token at most
    joint = torch.einsum("snj,smi->njmi", h * prob[:, None, None], h)  # of two causes at once: they are independent
    got = torch.einsum("snj,smi->njmi", samples, samples) / n
    torch.testing.assert_close(got, joint, rtol=0, atol=0.015)


def test_gibbs_on_tokens_has_the_conditional_means(params):
    """Word chains with clamped tokens reach P(w | x); tokens given z have the mean and variance of the equation."""
    x, n = torch.randn(N, V), 5000
    p = params._replace(W=0.5 * params.W)
    free = torch.stack([-torch.logsumexp(-token_energies(p, x, w), 0) for w in states(K)])
    expected = torch.softmax(-free, 0) @ states(K)
    g = torch.Generator().manual_seed(7)
    start = torch.randint(2, (n, K), generator=g).float()
    same, w = token_gibbs(p, x.expand(n, N, V), start, 30, clamp=("x",), generator=g)
    assert torch.equal(same, x.expand(n, N, V))
    torch.testing.assert_close(w.mean(0), expected, rtol=0, atol=0.03)
    one = p._replace(c=torch.full((H,), 50.0))  # every cause is on, by its input at one of the tokens
    moved, kept = token_gibbs(one, x.expand(n, N, V), start, 1, clamp=("w",), generator=g)
    place = token_input(one, x).softmax(-2)  # (N, H)
    torch.testing.assert_close(moved.mean(0), p.mu + place @ p.W.T, rtol=0, atol=0.08)
    assert torch.equal(kept, start)


def test_word_map_is_the_gradient_of_the_log_odds(token_params):
    A, step = torch.randn(3, 5, H), 1e-2  # of 3 images with 5 tokens
    rows = [4, 1]
    p = RBMParameters(*(None if t is None else t.double() for t in token_params))
    A = A.double()
    found = token_word_map(p, A, p.U[rows])
    assert found.shape == (3, 2, 5) and (found < 0).any() and (found > 0).any()
    log_odds = lambda A: word_gains(p, pooled_input(A))[:, rows]
    for n in range(5):
        moved = [log_odds(A + sign * step * torch.eye(5)[n][:, None]) for sign in (1, -1)]
        torch.testing.assert_close(found[:, :, n], (moved[0] - moved[1]) / (2 * step), rtol=1e-3, atol=1e-6)


def test_statistics_of_tokens_are_of_channels():
    rbm, tokens = JointRBM(V, K, H, tokens=True), 3 * torch.randn(B, N, V) + 2
    rbm.set_image_statistics(tokens.split(3))
    x = rbm.standardise(tokens)
    torch.testing.assert_close(x.mean((0, 1)), torch.zeros(V), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 1), correction=0), torch.ones(V))
