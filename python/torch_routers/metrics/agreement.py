"""Whether two routings of the same tokens choose the same experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_routers.metrics.tokens import top_expert
from torch_routers.routing import Routing


class Agreement(NamedTuple):
    """Means over tokens, scalar float64."""

    jaccard: Tensor
    """Experts that both chose over those that either chose: 1 = the same, 0 = none in common."""
    top1: Tensor
    """The share of tokens whose largest weight is the same expert's."""


def routing_agreement(a: Routing, b: Routing) -> Agreement:
    r"""How far two routings of the same tokens agree.

    .. math::  \frac{1}{T} \sum_t \frac{|A_t \cap B_t|}{|A_t \cup B_t|}

    The mean is over tokens that are routed in ``a`` or in ``b``: one that is dropped in one of them
    does not agree.

    Args:
        a, b: routings of the same tokens over the same experts, of two routers, two moments of
            training or two numeric precisions.

    Raises:
        ValueError: tokens or experts differ in number.

    >>> def chose(*indices):
    ...     return Routing(torch.ones(1, 2), torch.tensor([indices]), counts=torch.zeros(4))
    >>> routing_agreement(chose(0, 1), chose(0, 2))
    Agreement(jaccard=tensor(0.3333, dtype=torch.float64), top1=tensor(1., dtype=torch.float64))
    """
    chosen = _chosen(a), _chosen(b)
    if chosen[0].shape != chosen[1].shape:
        raise ValueError(
            "routing_agreement: expected routings of the same shape [..., num_experts], "
            f"got {list(chosen[0].shape)} and {list(chosen[1].shape)}"
        )
    either = (chosen[0] | chosen[1]).sum(-1)
    both = (chosen[0] & chosen[1]).sum(-1)
    tokens = (either > 0).sum().double()
    same_top = (top_expert(a) == top_expert(b)) & (either > 0)
    return Agreement((both / either.double().clamp(min=1)).sum() / tokens, same_top.sum() / tokens)


def router_drift(before: Routing, after: Routing) -> Tensor:
    """1 - the Jaccard agreement: how much of the choice changed between two moments of training.

    Args:
        before, after: routings of the same tokens, as in `routing_agreement`.
    """
    return 1 - routing_agreement(before, after).jaccard


def _chosen(routing: Routing) -> Tensor:
    """``[..., num_experts]`` bool."""
    used = routing.used()
    if routing.indices is None:
        return used
    rubbish = routing.num_experts  # where empty slots go
    chosen = used.new_zeros(*used.shape[:-1], rubbish + 1)
    return chosen.scatter(-1, torch.where(used, routing.indices, rubbish), True)[..., :rubbish]
