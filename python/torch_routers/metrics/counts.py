"""How evenly experts are used: pure functions of int64 counts, in float64, NaN without slots.

``counts`` is a `Routing`, its `Totals`, or a tensor ``[..., experts]``: layers, ranks or windows
may be in front of the experts.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from torch_routers.metrics.tokens import Totals
from torch_routers.routing import Routing

Counts: TypeAlias = Tensor | Routing | Totals

ACTIVE_SHARE = 0.1
"""An expert is active if it gets at least this part of its fair share of the slots."""


def load(counts: Counts) -> Tensor:
    """``[..., experts]``: the share of the slots that each expert is given, before dropping.

    >>> load(torch.tensor([3, 1]))
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    slots = _slots(counts)
    return slots / slots.sum(-1, keepdim=True)


def load_cv(counts: Counts) -> Tensor:
    """``[...]``: standard deviation of the experts' slots over their mean.

    0 where all experts get the same; ``sqrt(experts - 1)`` where one gets everything.
    """
    slots = _slots(counts)
    return slots.std(-1, correction=0) / slots.mean(-1)


def max_share(counts: Counts) -> Tensor:
    """``[...]``: the share of the slots that the fullest expert is given."""
    return load(counts).amax(-1)


def max_vio(counts: Counts) -> Tensor:
    """``[...]``: the fullest expert's slots over the mean, minus 1 (MaxVio of arXiv 2408.15664)."""
    slots = _slots(counts)
    return slots.amax(-1) / slots.mean(-1) - 1


def dead(counts: Counts) -> Tensor:
    """``[...]`` int64: the number of experts without a slot."""
    return (_slots(counts) == 0).sum(-1)


def active_experts(counts: Counts) -> Tensor:
    """``[...]`` int64: the number of experts with at least a tenth of the fair share."""
    slots = _slots(counts)
    return (slots >= ACTIVE_SHARE * slots.mean(-1, keepdim=True)).sum(-1)


def mutual_information(counts: Tensor) -> Tensor:
    """``[...]``: bits that the expert of a slot tells about its domain.

    The plug-in estimate from counts. It is never negative, and too high by about
    ``(domains - 1) * (experts - 1) / (2 * slots * ln 2)`` if slots were independent.

    Args:
        counts: ``[..., domains, experts]``, slots.

    Returns:
        0 where they are independent, at most the entropy of the domains.
    """
    joint = counts.double() / counts.double().sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent, 1)
    return (joint * ratio.log2()).sum((-2, -1))


def load_divergence(a: Counts, b: Counts) -> Tensor:
    r"""``[...]``: how differently two data sets use the experts, from 0 to 1.

    .. math::  \frac{\mathrm{JS}(a, b)}{H(m)} = 1 - \frac{H(a) + H(b)}{2 H(m)}, \qquad
               m = \frac{a + b}{2}

    of the loads: their Jensen-Shannon divergence, by the entropy of their mean, so that layers
    whose loads are more or less even compare. It is the part of what there is to know about the
    expert of a slot that its data set tells, if both are equally likely. 0 where the loads are the
    same; 1 where each set has one expert, not the same one. Divergences by layer of languages are
    in arXiv 2510.04694.

    >>> load_divergence(torch.tensor([5, 5, 0, 0]), torch.tensor([0, 0, 5, 5]))  # one bit of two
    tensor(0.5000, dtype=torch.float64)
    """
    a, b = load(a), load(b)
    of_mean = _entropy((a + b) / 2)
    divergence = of_mean - (_entropy(a) + _entropy(b)) / 2
    return torch.where(of_mean > 0, divergence.clamp(min=0) / of_mean, divergence)


def _entropy(load: Tensor) -> Tensor:
    return torch.special.entr(load).sum(-1)


def _slots(counts: Counts) -> Tensor:
    return (counts if isinstance(counts, Tensor) else counts.counts).double()
