"""Balance against quality as a single number: how much tokens avoid experts that others use."""

import torch
from torch import Tensor

from torch_routers.metrics.counts import Counts, load

_GOLDEN = (5**0.5 - 1) / 2


def equilibrium_load(quality: Tensor, gamma: Tensor) -> Tensor:
    r"""The loads at which no token gains by another expert, when load is a cost (arXiv 2604.04230).

    .. math::  \rho_e = \frac{e^{q_e - \gamma \rho_e}}{\sum_f e^{q_f - \gamma \rho_f}}

    There is one solution for each :math:`\gamma \ge 0`: the softmax of the quality at 0, ever more
    even above. With :math:`\lambda` the logarithm of the denominator, :math:`\rho_e` is
    :math:`W(\gamma e^{q_e - \lambda}) / \gamma` by Lambert's function; Newton's method finds
    :math:`\lambda`.

    Args:
        quality: ``[..., experts]``: :math:`q`; a constant that is added to it changes nothing.
        gamma: ``[...]``: :math:`\gamma \ge 0`. Both broadcast.

    Returns:
        ``[..., experts]`` float64.

    >>> equilibrium_load(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0, 100.0]))
    tensor([[0.8808, 0.1192],
            [0.7394, 0.2606],
            [0.5098, 0.4902]], dtype=torch.float64)
    """
    q, gamma = quality.double(), gamma.double().unsqueeze(-1).clamp(min=1e-9)
    denominator = q.amax(-1, keepdim=True) - gamma  # one load would be 1: too small
    for _ in range(20):  # sums of loads are convex in it, so that it grows to the solution
        rho = _load_of(q - denominator, gamma)
        slope = (rho / (1 + gamma * rho)).sum(-1, keepdim=True)
        denominator = denominator + (rho.sum(-1, keepdim=True) - 1) / slope
    return _load_of(q - denominator, gamma)


def gamma_eff(counts: Counts, quality: Tensor, *, largest: float = 100.0) -> Tensor:
    r"""``[...]``: the :math:`\gamma` whose `equilibrium_load` is nearest to the measured load.

    .. math::  \gamma_\mathrm{eff} = \arg\min_{0 \le \gamma \le 100}
               \sum_e |\rho_e(\gamma) - \rho_e|

    Near 0 experts get what their quality draws; the larger, the more a router balances against it.
    In the training of OLMoE it grows from 14 to 36 or more, and falls to 9 (Three Phases of Expert
    Routing, arXiv 2604.04230). ``largest`` where loads are evener than that. It says nothing where
    all experts are equally good. Found by golden section, as the authors do, which supposes a
    single minimum.

    Args:
        counts: ``[..., experts]``, or a routing, or totals.
        quality: ``[..., experts]``: what draws tokens to an expert, such as its logit in the mean
            over tokens, before any bias of the selection.
        largest: end of the range.

    >>> quality = torch.tensor([1.0, 0.5, 0.0, -0.5])
    >>> counts = 1e6 * equilibrium_load(quality, torch.tensor(8.0))
    >>> round(gamma_eff(counts, quality).item(), 4)
    8.0
    """
    rho = load(counts)

    def distance(gamma: Tensor) -> Tensor:
        return (equilibrium_load(quality, gamma) - rho).abs().sum(-1)

    shape = torch.broadcast_shapes(rho.shape, quality.shape)[:-1]
    low = rho.new_zeros(shape)
    high = rho.new_full(shape, largest)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    of_left, of_right = distance(left), distance(right)
    for _ in range(40):  # to 4e-9 of the range
        lower = of_left <= of_right
        low, high = torch.where(lower, low, left), torch.where(lower, right, high)
        new = torch.where(lower, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        of_new = distance(new)
        left, right = torch.where(lower, new, right), torch.where(lower, left, new)
        of_left, of_right = (
            torch.where(lower, of_new, of_right),
            torch.where(lower, of_left, of_new),
        )
    return torch.where(rho.isnan().any(-1), torch.nan, (low + high) / 2)


def _load_of(log: Tensor, gamma: Tensor) -> Tensor:
    """:math:`W(gamma e^log) / gamma`, by the iteration of Iacono and Boyd."""
    start = torch.log1p(gamma * log.exp())
    w = start * (1 - torch.log1p(start) / (2 + start))
    for _ in range(4):
        w = w / (1 + w) * (1 + log + gamma.log() - w.log())
    return w / gamma
