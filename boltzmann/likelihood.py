"""The partition function of an RBM and what follows from it: exact where it can be, annealed importance sampling elsewhere.

Z is the sum over binary units, and the integral over Gaussian ones, of exp(-E); log P(v) = -F(v) - log Z, in nats. Pure
functions of `RBMParameters`, as in `modeling_blip_rbm/rbm.py`, with the same axes: B samples, V image units x, K words w
(the visible units of a machine with one binary block), H hidden units h.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from modeling_blip_rbm.rbm import (
    GibbsState,
    RBMParameters,
    bernoulli,
    energy,
    free_energy,
    gibbs,
    hidden_input,
    prob_w_given_h,
    sample_x_given_h,
    visible_energy,
)


MOST_ENUMERATED = 25  # binary units whose states are summed one by one: 34 million


def binary_states(n: int, start: int, stop: int, device=None) -> torch.Tensor:
    """(stop - start, n) states of n binary units, fp32: the binary digits of `start` to `stop` - 1, lowest first."""
    number = torch.arange(start, stop, device=device)
    return (number[:, None] >> torch.arange(n, device=device) & 1).float()


def log_marginal_h(p: RBMParameters, h: torch.Tensor) -> torch.Tensor:
    """(B,) log sum_w integral_x exp(-E(x, w, h)): the visible units summed out, Gaussian ones in closed form."""
    total = h @ p.c
    if p.U is not None:
        total = total + F.softplus(p.b + h @ p.U.T).sum(-1)
    if p.W is not None:
        field = p.mu + h @ p.W.T
        if p.log_var is None:
            total = total + F.softplus(field).sum(-1)
        else:
            log_norm = 0.5 * (torch.log(torch.tensor(2 * torch.pi)) + p.log_var)
            total = total + (log_norm + 0.5 * (field**2 - p.mu**2) * torch.exp(-p.log_var)).sum(-1)
    return total


def log_partition_function(p: RBMParameters, chunk: int = 1 << 16) -> torch.Tensor:
    """Exact log Z, (), by summing over the states of the smaller layer in double precision.

    Args:
        chunk: states that are in memory at a time.

    Raises:
        ValueError: if both layers have more than `MOST_ENUMERATED` units; Gaussian units can only be integrated out, so
            then the hidden layer has to be small.
    """
    p = RBMParameters(*(None if t is None else t.double() for t in p))
    gaussian = p.W is not None and p.log_var is not None
    sizes = {"w": 0 if p.U is None else len(p.U), "x": 0 if p.W is None else len(p.W)}
    visible, hidden = sum(sizes.values()), len(p.c)
    over_hidden = gaussian or hidden <= visible
    n = hidden if over_hidden else visible
    if n > MOST_ENUMERATED:
        raise ValueError(
            f"2^{n} states are too many to sum; exact log Z needs at most {MOST_ENUMERATED} "
            f"{'hidden' if gaussian else 'visible or hidden'} units: use annealed_importance_sampling"
        )
    parts = []
    for start in range(0, 1 << n, chunk):
        states = binary_states(n, start, min(start + chunk, 1 << n), p.c.device).double()
        if over_hidden:
            parts.append(torch.logsumexp(log_marginal_h(p, states), 0))
        else:
            w, x = states.split([sizes["w"], sizes["x"]], dim=-1)
            value = -free_energy(p, x if sizes["x"] else None, w if sizes["w"] else None)
            parts.append(torch.logsumexp(value, 0))
    return torch.logsumexp(torch.stack(parts), 0)


def log_prob(p: RBMParameters, log_z, x=None, w=None, h=None) -> torch.Tensor:
    """(B,) log P(x, w), or log P(x, w, h) if `h` (B, H) is given; a density in Gaussian units.

    Args:
        log_z: log Z of `p`, exact or estimated.
        x (B, V), w (B, K): visible states; None for a block that the machine does not have.
    """
    return -(free_energy(p, x, w) if h is None else energy(p, h, x, w)) - log_z


def sample_visible(p: RBMParameters, h: torch.Tensor, generator: Optional[torch.Generator] = None):
    """x (B, V) and w (B, K) given h; None for a block that the machine does not have."""
    x = None if p.W is None else sample_x_given_h(p, h, generator)
    w = None if p.U is None else bernoulli(prob_w_given_h(p, h), generator)
    return x, w


class AISResult(NamedTuple):
    """An estimate of log Z: `log_z`, with the interval of 3 standard errors from `low` to `high`."""

    log_z: float
    low: float
    high: float
    effective_sample_size: float  # out of `chains`; near 1, the estimate is worthless: use more temperatures
    log_weights: torch.Tensor  # (chains,)


def base_rate_model(p: RBMParameters, mean_x=None, mean_w=None, least: float = 0.01) -> RBMParameters:
    """The RBM without weights whose visible units have these means: where annealing starts.

    Means of the training data make a far better start than fair coins (Salakhutdinov & Murray, ICML 2008, section 4.2.1).

    Args:
        mean_x (V,), mean_w (K,): the means; without them a binary unit is a fair coin and a Gaussian one has mean mu.
        least: means of binary units are kept in [least, 1 - least], so that no state is impossible.
    """

    def logit(mean, like):
        return torch.zeros_like(like) if mean is None else torch.logit(mean.to(like).clamp(least, 1 - least))

    zeros = lambda t: None if t is None else torch.zeros_like(t)
    mu = p.mu
    if p.W is not None and p.log_var is None:
        mu = logit(mean_x, p.mu)
    elif p.W is not None and mean_x is not None:
        mu = mean_x.to(p.mu)
    b = None if p.U is None else logit(mean_w, p.b)
    return RBMParameters(c=zeros(p.c), U=zeros(p.U), b=b, W=zeros(p.W), mu=mu, log_var=p.log_var)


def interpolate(base: RBMParameters, p: RBMParameters, beta: float) -> RBMParameters:
    """The RBM on the way from `base` (beta 0) to `p` (beta 1): every parameter but the variances in a straight line."""
    mix = lambda start, end: None if end is None else torch.lerp(start, end, beta)
    return RBMParameters(*map(mix, base[:-1], p[:-1]), log_var=p.log_var)


def _free_energy_at(base, p, beta, x, w, a) -> torch.Tensor:
    """(B,) free energy under `interpolate(base, p, beta)`. Its hidden input is beta * a: no matrix product."""
    between = interpolate(base._replace(U=None, W=None), p._replace(U=None, W=None), beta)
    # `visible_energy` looks at the weights for their width only
    return visible_energy(between._replace(U=p.U, W=p.W), x, w) - F.softplus(beta * a).sum(-1)


def _transition(base, p, beta, a, generator):
    """One Gibbs step that leaves `interpolate(base, p, beta)` invariant, and the hidden input under `p` after it."""
    h = bernoulli(torch.sigmoid(beta * a), generator)
    x, w = sample_visible(interpolate(base, p, beta), h, generator)
    return x, w, hidden_input(p, x, w)


def _summarise(log_base, log_weights, sign: float) -> AISResult:
    """log Z = log Z_base + sign * log mean exp(log_weights), with the delta method's standard error."""
    n = len(log_weights)
    log_mean = torch.logsumexp(log_weights, 0) - torch.log(torch.tensor(float(n)))
    relative = torch.exp(log_weights - log_mean)
    error = 3 * (relative.std() / n**0.5).item()
    log_z = (log_base + sign * log_mean).item()
    spread = (torch.log1p(torch.tensor(error)).item(), -torch.log(torch.tensor(max(1 - error, 1e-6))).item())
    up, down = spread if sign > 0 else spread[::-1]
    ess = (relative.sum() ** 2 / (relative**2).sum()).item()
    return AISResult(log_z, log_z - down, log_z + up, ess, log_weights)


@torch.no_grad()
def annealed_importance_sampling(
    p: RBMParameters,
    temperatures: int = 1000,
    chains: int = 500,
    base: Optional[RBMParameters] = None,
    generator: Optional[torch.Generator] = None,
    progress: bool = False,
) -> AISResult:
    """Annealed importance sampling of log Z (Neal 2001; for RBMs Salakhutdinov & Murray, ICML 2008).

    Unbiased for Z, so that log Z comes out too low rather than too high, and likelihoods too high. Sandwich it with
    `reverse_annealed_importance_sampling`.

    Args:
        p: the RBM.
        temperatures: steps from `base` to `p`, evenly spaced.
        chains: Gibbs chains; each gives one importance weight.
        base: from `base_rate_model`, default one without the data's means.
        generator: of the random numbers; default PyTorch's global one.
        progress: show a progress bar.

    Raises:
        ValueError: for fewer than 2 temperatures or chains, or parameters that are not finite.
    """
    base = _checked_base(p, base, temperatures, chains)
    betas = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64).tolist()
    x, w = sample_visible(base, torch.zeros(chains, len(p.c), dtype=p.c.dtype, device=p.c.device), generator)
    a = hidden_input(p, x, w)
    log_weights = torch.zeros(chains, dtype=torch.float64, device=p.c.device)
    for before, beta in zip(betas, tqdm(betas[1:], desc="AIS", disable=not progress)):
        log_weights += _free_energy_at(base, p, before, x, w, a) - _free_energy_at(base, p, beta, x, w, a)
        if beta < 1:
            x, w, a = _transition(base, p, beta, a, generator)
    return _summarise(log_base_partition(base), log_weights, sign=1.0)


@torch.no_grad()
def reverse_annealed_importance_sampling(
    p: RBMParameters,
    samples: GibbsState,
    temperatures: int = 1000,
    base: Optional[RBMParameters] = None,
    generator: Optional[torch.Generator] = None,
    progress: bool = False,
) -> AISResult:
    """`annealed_importance_sampling` from the RBM down to `base` (Burda, Grosse & Salakhutdinov, AISTATS 2015).

    log Z comes out too high rather than too low, so that the two bracket it.

    Args:
        samples: of `p`, one for each chain: from `exact_samples` of a small RBM, else from many steps of `gibbs`.

    Raises:
        ValueError: as `annealed_importance_sampling`.
    """
    _, x, w = samples
    base = _checked_base(p, base, temperatures, len(x if x is not None else w))
    betas = torch.linspace(1, 0, temperatures + 1, dtype=torch.float64).tolist()
    a = hidden_input(p, x, w)
    log_weights = torch.zeros(a.shape[0], dtype=torch.float64, device=a.device)
    for before, beta in zip(betas, tqdm(betas[1:], desc="reverse AIS", disable=not progress)):
        log_weights += _free_energy_at(base, p, before, x, w, a) - _free_energy_at(base, p, beta, x, w, a)
        if beta > 0:
            x, w, a = _transition(base, p, beta, a, generator)
    return _summarise(log_base_partition(base), log_weights, sign=-1.0)


def log_base_partition(base: RBMParameters) -> torch.Tensor:
    """log Z, (), of an RBM without weights: its layers are independent."""
    none = torch.zeros_like(base.c)
    return (log_marginal_h(base, none[None])[0] + F.softplus(base.c).sum()).double()


def exact_samples(p: RBMParameters, num: int, generator: Optional[torch.Generator] = None) -> GibbsState:
    """`num` independent samples of an RBM whose hidden states can be enumerated.

    Raises:
        ValueError: if there are more than `MOST_ENUMERATED` hidden units.
    """
    n = len(p.c)
    if n > MOST_ENUMERATED:
        raise ValueError(f"{n} hidden units; exact samples need at most {MOST_ENUMERATED}: use gibbs")
    weight = log_marginal_h(p, binary_states(n, 0, 1 << n, p.c.device)).softmax(0)
    number = torch.multinomial(weight, num, replacement=True, generator=generator)
    h = (number[:, None] >> torch.arange(n, device=p.c.device) & 1).to(p.c.dtype)
    return GibbsState(h, *sample_visible(p, h, generator))


def model_samples(p: RBMParameters, num: int, steps: int, mean_x=None, mean_w=None, generator=None) -> GibbsState:
    """Where `num` Gibbs chains stand after `steps` steps from independent units with means mean_x (V,) and mean_w (K,)."""
    base = base_rate_model(p, mean_x, mean_w)
    x, w = sample_visible(base, torch.zeros(num, len(p.c), dtype=p.c.dtype, device=p.c.device), generator)
    h = bernoulli(torch.sigmoid(hidden_input(p, x, w)), generator)
    return gibbs(p, GibbsState(h, x, w), steps, generator=generator)


def _checked_base(p, base, temperatures, chains) -> RBMParameters:
    """`base`, or the default one, once the arguments of annealing are checked."""
    if temperatures < 2 or chains < 2:
        raise ValueError(f"temperatures is {temperatures} and chains {chains}; both must be at least 2")
    for name, tensor in p._asdict().items():
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"parameter {name} of the RBM has NaN or infinite values: its training diverged")
    return base_rate_model(p) if base is None else base
