"""The restricted Boltzmann machine over an image, the words of its caption, and hidden causes.

Everything above `JointRBM` is a pure function, tensors in and tensors out, *per sample*: no energy is ever averaged or
divided by the batch size here; a loss does that once. `JointRBM` only owns the parameters.

Axes: B samples (any leading shape), V image units, K words, H hidden units, N tokens of an image.

One machine with two visible blocks, each of which may be absent (`None`):

    image block  x (B, V)   Gaussian units with variance s^2, or binary units
    word block   w (B, K)   binary units: which words a caption holds
    hidden       h (B, H)   binary units

    E(x, w, h) = 1/2 sum_i (x_i - mu_i)^2 / s_i^2  -  (x/s^2)'W h  -  w'U h  -  b'w  -  c'h        (Gaussian image)
    E(x, w, h) = -mu'x  -  x'W h  -  w'U h  -  b'w  -  c'h                                        (binary image)

Without the image block this is the textbook machine E(v, h) = -v'W h - b'v - c'h (Smolensky 1986; Hinton 2002). The
Gaussian block follows Cho, Ilin & Raiko, ICANN 2011 (per-unit log-variance); two blocks under one hidden layer follow
Srivastava & Salakhutdinov, NIPS 2012. Energies are dimensionless (nats). The functions named `token_...` are of a machine whose image
block is all the tokens of an image.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn


LOG_VARIANCE_RANGE = (-4.6, 0.18)  # s^2 in [0.01, 1.2] for standardised x: an unbounded variance collapses or explodes


class RBMParameters(NamedTuple):
    """The parameters of `energy`. An absent block has `None` throughout."""

    c: torch.Tensor  # (H,) hidden bias
    U: Optional[torch.Tensor] = None  # (K, H) words - hidden
    b: Optional[torch.Tensor] = None  # (K,) word bias
    W: Optional[torch.Tensor] = None  # (V, H) image - hidden
    mu: Optional[torch.Tensor] = None  # (V,) image mean (Gaussian) or image bias (binary)
    log_var: Optional[torch.Tensor] = None  # (V,) log s^2; None: the image units are binary


def own_precision(like: torch.Tensor):
    """While inside, products have their tensors' own precision, whatever autocast is asked for on the device of this one: energies are
    differences of large sums."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a kind of device, of which some have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _matches(name: str, value: torch.Tensor, weight: Optional[torch.Tensor]) -> torch.Tensor:
    if weight is None:
        raise ValueError(f"{name} was given, but this RBM has no such block: its weights are None")
    if value.shape[-1] != weight.shape[0]:
        raise ValueError(f"{name} has {value.shape[-1]} units, but the RBM has {weight.shape[0]}")
    return value.to(weight.dtype)


def hidden_input(p: RBMParameters, x=None, w=None) -> torch.Tensor:
    """a (B, H) = c + W'(x/s^2) + U'w, the total input of the hidden units. Absent or `None` blocks add nothing.

    Raises:
        ValueError: if the width of `x` or `w` is not the RBM's, or that block does not exist.
    """
    a = p.c
    if x is not None:
        x = _matches("x", x, p.W)
        a = a + (x if p.log_var is None else x * torch.exp(-p.log_var)) @ p.W
    if w is not None:
        a = a + _matches("w", w, p.U) @ p.U
    return a


def visible_energy(p: RBMParameters, x=None, w=None) -> torch.Tensor:
    """(B,) the terms of E in which no hidden unit takes part."""
    total = p.c.new_zeros(())
    if x is not None:
        x = _matches("x", x, p.W)
        if p.log_var is None:
            total = total - x @ p.mu
        else:
            total = total + 0.5 * ((x - p.mu) ** 2 * torch.exp(-p.log_var)).sum(-1)
    if w is not None:
        total = total - _matches("w", w, p.U) @ p.b
    return total


def energy(p: RBMParameters, h: torch.Tensor, x=None, w=None) -> torch.Tensor:
    """E (B,) of complete states, as in the head of this file."""
    return visible_energy(p, x, w) - (hidden_input(p, x, w) * h).sum(-1)


def free_energy(p: RBMParameters, x=None, w=None) -> torch.Tensor:
    """F (B,) = -log sum_h exp(-E): `visible_energy` - sum_j softplus(a_j)."""
    return visible_energy(p, x, w) - F.softplus(hidden_input(p, x, w)).sum(-1)


def prob_h_given_v(p: RBMParameters, x=None, w=None) -> torch.Tensor:
    """q (B, H) = P(h = 1 | x, w) = sigmoid(a)."""
    return torch.sigmoid(hidden_input(p, x, w))


def prob_w_given_h(p: RBMParameters, h: torch.Tensor) -> torch.Tensor:
    """(B, K) = P(w = 1 | h) = sigmoid(b + U h)."""
    return torch.sigmoid(p.b + h @ p.U.T)


def mean_x_given_h(p: RBMParameters, h: torch.Tensor) -> torch.Tensor:
    """E[x | h] (B, V): mu + W h for Gaussian units (then x | h ~ N(., s^2)), sigmoid(mu + W h) for binary ones."""
    field = p.mu + h @ p.W.T
    return torch.sigmoid(field) if p.log_var is None else field


def bernoulli(prob: torch.Tensor, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Samples in {0, 1} of the same dtype. Uniform-and-compare is several times faster than `torch.bernoulli` on CPUs."""
    return (torch.rand(prob.shape, generator=generator, device=prob.device) < prob).to(prob.dtype)


def sample_x_given_h(p: RBMParameters, h: torch.Tensor, generator=None) -> torch.Tensor:
    mean = mean_x_given_h(p, h)
    if p.log_var is None:
        return bernoulli(mean, generator)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return mean + noise * torch.exp(0.5 * p.log_var)


# An image block of tokens x (B, N, V), with the same parameters: probabilistic max pooling (Lee et al., ICML 2009) over all N tokens. A
# hidden unit is off, z_j = 0, or on at exactly one token, z_j = n; prior odds of 1/N a token make N equal tokens count as one.
#
#     E(x, w, z) = 1/2 sum_n sum_i (x_ni - mu_i)^2 / s_i^2 - b'w - sum_{j: z_j = n > 0} (A_nj + U_j'w - log N),   A = c + (x/s^2) W
#
# So with a_j = log mean_n exp A_nj all that the file says of a = c + W'(x/s^2) holds: q, word gains, mutual information, free energy.


def token_input(p: RBMParameters, x: torch.Tensor) -> torch.Tensor:
    """A (B, N, H) = c + W'(x_n/s^2), the input of the hidden units at each token of x (B, N, V).

    Not the tokens are divided by s^2 but the weights, of which there are fewer in a batch: x then needs no gradient.
    """
    x = _matches("x", x, p.W)
    return p.c + x @ (p.W if p.log_var is None else p.W * torch.exp(-p.log_var)[:, None])


def pooled_input(A: torch.Tensor) -> torch.Tensor:
    """a (B, H) = log mean_n exp A_nj of A (B, N, H): sigmoid(a) = P(z_j > 0), the unit is on at some token."""
    return A.logsumexp(-2) - math.log(A.shape[-2])


def token_free_energy(p: RBMParameters, x: torch.Tensor, w=None) -> torch.Tensor:
    """F (B,) = -log sum_z exp(-E) of x (B, N, V): visible terms - sum_j softplus(a_j + U_j'w)."""
    a = pooled_input(token_input(p, x))
    if w is not None:
        a = a + _matches("w", w, p.U) @ p.U
    if p.log_var is None:
        visible = -(x.sum(-2) * p.mu).sum(-1)
    else:  # by the moments of x, so that x needs no gradient
        square = (x * x).sum(-2) - 2 * p.mu * x.sum(-2) + x.shape[-2] * p.mu**2
        visible = 0.5 * (square * torch.exp(-p.log_var)).sum(-1)
    return visible + visible_energy(p, w=w) - F.softplus(a).sum(-1)


def token_word_map(p: RBMParameters, A: torch.Tensor, U: torch.Tensor) -> torch.Tensor:
    """Where in an image the causes of words are: (B, M, N) for A (B, N, H) and M rows U (M, H) of the word weights.

    sum_j [sigmoid(a_j + U_kj) - sigmoid(a_j)] softmax_n(A_nj): how many more causes are expected on at token n once word k is said. It is
    the derivative of the word's log-odds with respect to a constant added to the input of every cause at token n, exact and signed.
    """
    a = pooled_input(A)[..., None, :]
    return (torch.sigmoid(a + U) - torch.sigmoid(a)) @ A.softmax(-2).mT


def sample_places(A: torch.Tensor, said=0.0, generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """Samples of P(z | x, w) as h (B, N, H) in {0, 1}: h_nj = 1 where z_j = n.

    Args:
        A (B, N, H): `token_input`. said (B, H): U'w.
    """
    on = bernoulli(torch.sigmoid(pooled_input(A) + said), generator)
    below = A.softmax(-2).cumsum(-2)
    u = torch.rand(on.shape, generator=generator, device=A.device)
    place = (below <= u[..., None, :]).sum(-2).clamp_(max=A.shape[-2] - 1)  # a sum of shares may round to less than 1
    return torch.zeros_like(A).scatter_(-2, place[..., None, :], on[..., None, :])


def token_gibbs(p: RBMParameters, x: torch.Tensor, w: torch.Tensor, steps: int, clamp=(), generator=None):
    """Block Gibbs sampling from x (B, N, V), w (B, K): `steps` times z given them, then the blocks given z. Gives x and w.

    Args:
        clamp: names among "x" and "w" of the blocks that keep their value.
    """
    for _ in range(steps):
        h = sample_places(token_input(p, x), w @ p.U, generator)
        if "x" not in clamp:
            x = sample_x_given_h(p, h, generator)
        if "w" not in clamp:
            w = bernoulli(prob_w_given_h(p, h.sum(-2)), generator)
    return x, w


class GibbsState(NamedTuple):
    h: torch.Tensor  # (B, H)
    x: Optional[torch.Tensor] = None  # (B, V)
    w: Optional[torch.Tensor] = None  # (B, K)


def gibbs(p: RBMParameters, state: GibbsState, steps: int, clamp=(), generator=None) -> GibbsState:
    """Block Gibbs sampling: `steps` times the visible blocks given h, then h given them.

    Args:
        state: where the chains stand; a block that is `None` is left out of the machine altogether.
        clamp: names among "x" and "w" of the blocks that keep their value. Clamping "x" samples P(w, h | x).
    """
    h, x, w = state
    for _ in range(steps):
        if x is not None and "x" not in clamp:
            x = sample_x_given_h(p, h, generator)
        if w is not None and "w" not in clamp:
            w = bernoulli(prob_w_given_h(p, h), generator)
        h = bernoulli(prob_h_given_v(p, x, w), generator)
    return GibbsState(h, x, w)


def free_energy_gradient(p: RBMParameters, x=None, w=None) -> RBMParameters:
    """dF/dtheta summed over the batch, in closed form: the sufficient statistics of contrastive divergence.

    dF/dW = -(x/s^2) q',  dF/dU = -w q',  dF/dc = -q,  dF/dmu = -(x - mu)/s^2 (binary: -x),  dF/db = -w,
    dF/dlog_var = -1/2 (x - mu)^2/s^2 + (x/s^2) (W q).
    """
    q = prob_h_given_v(p, x, w)
    grads = {"c": -q.sum(0)}
    if w is not None:
        grads |= {"U": -(w.T @ q), "b": -w.sum(0)}
    if x is not None and p.log_var is None:
        grads |= {"W": -(x.T @ q), "mu": -x.sum(0)}
    elif x is not None:
        precision = torch.exp(-p.log_var)
        scaled = x * precision
        grads |= {
            "W": -(scaled.T @ q),
            "mu": -((x - p.mu) * precision).sum(0),
            "log_var": (-0.5 * (x - p.mu) ** 2 * precision + scaled * (q @ p.W.T)).sum(0),
        }
    return RBMParameters(**grads)


def contrastive_divergence(
    p: RBMParameters, x=None, w=None, steps: int = 1, clamp=(), chains: Optional[GibbsState] = None, generator=None
) -> tuple[RBMParameters, GibbsState]:
    """CD-k (Hinton 2002), or PCD-k (Tieleman 2008) when `chains` are handed back in.

    Returns:
        the gradient of the negative log-likelihood per sample, <dF>_data - <dF>_model (log P(w|x) with "x" clamped),
        and where the chains ended.
    """
    if chains is None:
        chains = GibbsState(bernoulli(prob_h_given_v(p, x, w), generator), x, w)
    chains = gibbs(p, chains, steps, clamp, generator)
    positive, negative = free_energy_gradient(p, x, w), free_energy_gradient(p, chains.x, chains.w)
    num_data, num_chains = (x if x is not None else w).shape[0], chains.h.shape[0]
    gradient = [None if d is None else d / num_data - m / num_chains for d, m in zip(positive, negative)]
    return RBMParameters(*gradient), chains


def centred_gradient(p: RBMParameters, gradient: RBMParameters, mean_h, mean_x=None, mean_w=None) -> RBMParameters:
    """The gradient of an RBM whose units have these means subtracted, in terms of the usual parameters.

    The data's means, or a moving average of them, make the gradient independent of a unit's being coded as 0/1 or 1/0:
    dU = gU - m_w gc' - gb m_h',  db = gb - dU m_h,  dc = gc - dU' m_w  (and W with x/s^2 in the place of w). Melchior, Fischer
    & Wiskott, JMLR 17(99) 2016, algorithm 1. The variance's gradient stays as it is.

    Args:
        gradient: of the negative log-likelihood, as from `contrastive_divergence`.
        mean_h (H,), mean_x (V,), mean_w (K,): means of q, of x and of w over the data.
    """
    grads = gradient._asdict()
    grads["c"] = gradient.c
    blocks = []
    if gradient.U is not None:
        blocks.append(("U", "b", mean_w))
    if gradient.W is not None:
        blocks.append(("W", "mu", mean_x if p.log_var is None else mean_x * torch.exp(-p.log_var)))
    for weight, bias, mean in blocks:
        centred = torch.addr(grads[weight], mean, gradient.c, alpha=-1).addr_(grads[bias], mean_h, alpha=-1)
        grads |= {weight: centred, bias: grads[bias] - centred @ mean_h, "c": grads["c"] - mean @ centred}
    return RBMParameters(**grads)


WORD_GAIN_ORDERS = ("exact", "second", "first")


def word_gains(
    p: RBMParameters, a: torch.Tensor, order: str = "exact", than: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """How far adding word k lowers the free energy, through the hidden units: (..., K) nats.

    F(x, w) - F(x, w + k) = b_k + sum_j log(1 + q_j (e^{U_kj} - 1)),  q = sigmoid(a),  a = `hidden_input`(x, w)

    without b_k, which cancels wherever two images are compared. From softplus(t + u) - softplus(t) = log(1 - q + q e^u).

    Args:
        order: "exact" costs K*H logarithms a row. "second" and "first" are its expansions in U, each a matrix product:
            U q + 1/2 U^2 q(1 - q), and U q, which is biased low (Jensen).
        than: another hidden input; the gains for it are taken off, which for the expansions costs no further product.
    """
    if order not in WORD_GAIN_ORDERS:
        raise ValueError(f"order is {order!r}; allowed: {', '.join(WORD_GAIN_ORDERS)}")
    if order == "exact":
        q = torch.sigmoid(a)
        expm1 = torch.expm1(p.U)
        at_once = max(
            1, (2**18 if q.device.type == "cpu" else 2**26) // expm1.numel()
        )  # a few rows' logarithms in memory
        rows = q.reshape(-1, 1, q.shape[-1]).split(at_once)
        gains = torch.cat([torch.log1p(some * expm1).sum(-1) for some in rows]).reshape(*q.shape[:-1], -1)
        return gains if than is None else gains - word_gains(p, than)
    return gain_moments(a, order, than) @ gain_weights(p.U, order).T


def gain_weights(U: torch.Tensor, order: str) -> torch.Tensor:
    """What the expansions of `word_gains` multiply `gain_moments` with: (K, H) U, for "second" (K, 2H) [U ; 1/2 U^2]."""
    return U if order == "first" else torch.cat([U, 0.5 * U**2], -1)


def gain_moments(a: torch.Tensor, order: str, than: Optional[torch.Tensor] = None) -> torch.Tensor:
    """Mean (..., H) of the hidden units with input a, for "second" (..., 2H) with their variance; less those with input `than`."""
    q = torch.sigmoid(a if than is None else torch.stack([a, than]))
    moments = q if order == "first" else torch.cat([q, q - q * q], -1)
    return moments if than is None else moments[0] - moments[1]


def pointwise_mutual_information(p: RBMParameters, a_image: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """log P(w | x) - log P(w | average image), up to a term of x alone: (...).

    sum_j [sp(a_j + U'w) - sp(a_j) - sp(abar_j + U'w) + sp(abar_j)] with a = `hidden_input`(x) and abar that of the
    average image, x = 0 of standardised data, where the input is c. Word biases and lengths cancel.
    """
    with own_precision(w):
        said = w @ p.U
    sp = F.softplus
    return (sp(a_image + said) - sp(a_image) - sp(p.c + said) + sp(p.c)).sum(-1)


def relative_free_energy(p: RBMParameters, a: torch.Tensor) -> torch.Tensor:
    """F(x) - F_0(x) (...) nats, less that of the average image: F_0 is of the machine without hidden units, N(mu, s^2) if Gaussian.

    -sum_j [softplus(a_j) - softplus(c_j)], with a (..., H) the hidden input of an image, or `pooled_input` of its tokens. It is minus the
    likelihood ratio log P(x)/P_0(x) against that background model, up to a constant (Ren et al., NeurIPS 2019, arXiv 1906.02845): how
    far x is from the mean, which is most of F(x) where V or N is large, counts in both and cancels. It is also
    log P(h = 0 | x) - log P(h = 0 | average image): high where the image has few causes.
    """
    return (F.softplus(p.c) - F.softplus(a)).sum(-1)


SAFE_INPUT = 20.0  # exp of up to four such inputs, multiplied, is a finite fp32 number


class PairwiseSoftplus(torch.autograd.Function):
    """sum_j softplus(a_ij + u_kj) (n, m) of a (n, H) and u (m, H), a few rows at a time: the (n, m, H) terms are never held all at once.

    softplus(a + u) = log(1 + e^a e^u), and the log of four such factors is one logarithm: a quarter of the logarithms, and no exponential
    but those of a and u themselves. Inputs too large for that are computed term by term.
    """

    @staticmethod
    def forward(ctx, a, u):
        n, m, hidden = len(a), len(u), a.shape[1]
        ctx.safe = not (n and m) or bool((a.amax(0) + u.amax(0)).max() <= SAFE_INPUT)
        out = a.new_empty(n, m)
        rows = PairwiseSoftplus.rows_at_a_time(m, hidden)
        if not ctx.safe:
            ctx.save_for_backward(a, u)
            for start in range(0, n, rows):
                out[start : start + rows] = F.softplus(a[start : start + rows, None] + u).sum(-1)
            return out
        exp_a, exp_u = a.exp(), u.exp()
        ctx.save_for_backward(exp_a, exp_u)
        pad = (0, -hidden % 4)  # factors of 1
        exp_a, exp_u = F.pad(exp_a, pad), F.pad(exp_u, pad)
        quarter = exp_a.shape[1] // 4
        for start in range(0, n, rows):
            factors = (exp_a[start : start + rows, None] * exp_u).add_(1)
            first, second, third, fourth = factors.split(quarter, dim=-1)
            out[start : start + rows] = (first * second).mul_(third).mul_(fourth).log_().sum(-1)
        return out

    @staticmethod
    def backward(ctx, grad):
        a, u = ctx.saved_tensors  # of the safe computation, their exponentials
        grad_a, grad_u = torch.empty_like(a), torch.zeros_like(u)
        rows = PairwiseSoftplus.rows_at_a_time(len(u), a.shape[1])
        for start in range(0, len(a), rows):
            part = slice(start, start + rows)
            if ctx.safe:  # q = sigmoid(a + u) (rows, m, H)
                odds = a[part, None] * u
                q = odds.div_(odds + 1)
            else:
                q = torch.sigmoid(a[part, None] + u)
            grad_a[part] = torch.bmm(grad[part, None], q)[:, 0]
            grad_u += q.mul_(grad[part, :, None]).sum(0)
        return grad_a, grad_u

    @staticmethod
    def rows_at_a_time(m: int, hidden: int) -> int:
        return max(1, 2**18 // max(1, m * hidden))  # of 1 MB in fp32: they stay in a processor's cache


def pairwise_information(c: torch.Tensor, a_image: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Pointwise mutual information (n, m) of every image with every text, by what each adds to the hidden units, without (n, m, H) numbers
    in memory.

    Args:
        c (H,): hidden bias. a_image (n, H): `hidden_input` of the images. said (m, H): what the texts add to it, such as w U.
    """
    sp = F.softplus
    return (
        PairwiseSoftplus.apply(a_image, said) - sp(a_image).sum(-1, keepdim=True) - sp(c + said).sum(-1) + sp(c).sum()
    )


def pairwise_mutual_information(p: RBMParameters, a_image: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`pointwise_mutual_information` of every image with every caption, (n, m) of a_image (n, H) and w (m, K)."""
    with own_precision(w):
        return pairwise_information(p.c, a_image, w @ p.U)


PARAMETER_NAMES = {  # of `JointRBM`, for the fields of `RBMParameters`
    "c": "hidden_bias",
    "U": "word_weight",
    "b": "word_bias",
    "W": "image_weight",
    "mu": "image_bias",
    "log_var": "image_log_var",
}


class JointRBM(nn.Module):
    """Owner of the parameters of one RBM, and of the statistics that standardise its image block.

    Args:
        visible_size: V, units of the image block; 0 for none.
        word_size: K, units of the word block; 0 for none.
        hidden_size: H.
        visible_type: "gaussian" (any real x) or "binary" (x in [0, 1]).
        tokens: the image block is the tokens (B, N, V) of an image, any number, and not one vector (B, V).

    Raises:
        ValueError: if there is no visible unit at all, no hidden unit, or the type is unknown.
    """

    def __init__(
        self, visible_size: int, word_size: int, hidden_size: int, visible_type: str = "gaussian", tokens: bool = False
    ):
        super().__init__()
        if hidden_size < 1 or visible_size < 0 or word_size < 0 or visible_size + word_size < 1:
            raise ValueError(
                f"an RBM needs at least one visible and one hidden unit, but visible_size is {visible_size}, "
                f"word_size is {word_size} and hidden_size is {hidden_size}"
            )
        if visible_type not in ("gaussian", "binary"):
            raise ValueError(f"visible_type is {visible_type!r}; allowed are 'gaussian' and 'binary'")
        self.visible_size, self.word_size, self.hidden_size = visible_size, word_size, hidden_size
        self.visible_type, self.tokens = visible_type, tokens
        self.hidden_bias = nn.Parameter(torch.empty(hidden_size))
        if word_size:
            self.word_weight = nn.Parameter(torch.empty(word_size, hidden_size))
            self.word_bias = nn.Parameter(torch.empty(word_size))
        if visible_size:
            self.image_weight = nn.Parameter(torch.empty(visible_size, hidden_size))
            self.image_bias = nn.Parameter(torch.empty(visible_size))
            if visible_type == "gaussian":
                self.image_log_var = nn.Parameter(torch.empty(visible_size))
            self.register_buffer("image_mean", torch.empty(visible_size))
            self.register_buffer("image_std", torch.empty(visible_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, init=nn.init, std: float = 0.01):
        """W, U ~ N(0, std^2), all else neutral (Hinton 2010, section 8). `init`: where normal_ and the like come from."""
        for name, tensor in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            if name.endswith("_weight"):
                init.normal_(tensor, mean=0.0, std=std)
            elif name == "image_std":
                init.ones_(tensor)
            else:
                init.zeros_(tensor)

    @property
    def parameters_fp32(self) -> RBMParameters:
        """The parameters for the functions of this file: fp32 (energies are differences of large sums), s^2 bounded."""
        fields = {f: getattr(self, name).float() for f, name in PARAMETER_NAMES.items() if hasattr(self, name)}
        if "log_var" in fields:
            fields["log_var"] = fields["log_var"].clamp(*LOG_VARIANCE_RANGE)
        return RBMParameters(**fields)

    @torch.no_grad()
    def set_image_statistics(self, pooled):
        """Standardise by these pooled images from now on. A unit that never varies is left at its mean.

        Args:
            pooled: a tensor (n, V), or of tokens (n, N, V), or an iterable of such, so that they need not all be in memory.

        Raises:
            ValueError: if there is none, or a value is not finite.
        """
        count, mean, square = 0, 0.0, 0.0  # Chan, Golub & LeVeque 1983: mean and sum of squared deviations of parts
        for part in [pooled] if isinstance(pooled, torch.Tensor) else pooled:
            if not torch.isfinite(part).all():
                raise ValueError("the pooled images hold NaN or infinite values")
            part = part.flatten(0, -2).double()
            total, step = count + len(part), part.mean(0) - mean
            square = square + (part - part.mean(0)).square().sum(0) + step.square() * (count * len(part) / total)
            count, mean = total, mean + step * (len(part) / total)
        if not count:
            raise ValueError("there are no pooled images to standardise by")
        std = (square / count).sqrt()
        self.image_mean.copy_(mean)
        self.image_std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def standardise(self, pooled: torch.Tensor) -> torch.Tensor:
        """x of pooled images (B, V) or tokens (B, N, V): mean 0, variance 1 on the training images; binary units: its sigmoid."""
        x = (pooled.float() - self.image_mean.float()) / self.image_std.float()
        return torch.sigmoid(x) if self.visible_type == "binary" else x

    def forward(self, pooled: torch.Tensor, places: bool = False):
        """a (B, H), the hidden input of pooled images (B, V) or tokens (B, N, V); with `places` also A (B, N, H), `token_input` of tokens. Hooks of
        Accelerate and FSDP bring the parameters here for this call."""
        x = self.standardise(pooled)
        if not places:
            return self.hidden_input(x)
        with own_precision(self.hidden_bias):
            A = token_input(self.parameters_fp32, x)
            return pooled_input(A), A

    def free_energy(self, x=None, w=None) -> torch.Tensor:
        """F (B,), see `free_energy`, and of tokens x (B, N, V) `token_free_energy`."""
        of_image = token_free_energy if self.tokens and x is not None else free_energy
        with own_precision(self.hidden_bias):
            return of_image(self.parameters_fp32, x, w)

    def hidden_input(self, x=None, w=None) -> torch.Tensor:
        """a (B, H), see `hidden_input`, and of tokens x (B, N, V) `pooled_input`."""
        p = self.parameters_fp32
        with own_precision(self.hidden_bias):
            if not self.tokens or x is None:
                return hidden_input(p, x, w)
            a = pooled_input(token_input(p, x))
            return a if w is None else a + _matches("w", w, p.U) @ p.U
