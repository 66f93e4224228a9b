"""Entropy: tokens that know their expert, or keep an open mind."""

import torch
from torch import Tensor

from torch_routers.losses.base import RouterLoss, log_probs
from torch_routers.routing import Routing


def entropy(logits: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    r"""The mean entropy of the experts' probabilities of a token, in nats.

    .. math::  L = \frac{1}{T} \sum_t H_t, \qquad H_t = -\sum_e p_{te} \ln p_{te}, \qquad
               p_t = \mathrm{softmax}(z_t)

    with :math:`0 \ln 0 = 0`. A token whose logits are all -inf has no probabilities: it adds 0, has
    no gradient, and counts among the tokens. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    >>> entropy(torch.zeros(3, 4))  # ln 4
    tensor(1.3863)
    """
    log_p, live, tokens = log_probs(logits, valid_mask)
    of_tokens = -(log_p.exp() * log_p.where(log_p != -torch.inf, 0)).sum(-1)
    return torch.where(live, of_tokens, 0).sum() / tokens


class EntropyLoss(RouterLoss):
    """`entropy` of one router, over the tokens that chose an expert.

    Minimised, it makes each token certain of its experts; with a negative weight, the opposite. It
    does not see whether all tokens choose the same ones: add a balance loss.

    Args:
        weight: the factor in the objective; 1e-4 for top-p routing in arXiv 2403.07652.

    Raises:
        ValueError: the routing has no logits.
    """

    name = "entropy"

    def forward(self, routing: Routing) -> Tensor:
        return entropy(*self.logits_of(routing))


class RoutingEntropyLoss(RouterLoss):
    r"""The mean of ``routing.entropy`` over the tokens that are not masked (DynMoLE).

    .. math::  L = \frac{1}{T} \sum_t H_t

    of whatever entropy the router computes, normalised to 1. Minimised, so that fewer tokens need
    all experts.

    Args:
        weight: the factor in the objective; 1e-2 in arXiv 2504.00661.

    Raises:
        ValueError: a routing without entropy, as of routers that compute none.
    """

    name = "routing_entropy"

    def forward(self, routing: Routing) -> Tensor:
        if routing.entropy is None:
            raise ValueError(
                "RoutingEntropyLoss: expected a routing with entropy, got none. Use EntropyLoss"
            )
        tokens = self.statistics(routing).group_tokens.sum()
        return routing.entropy.sum() / tokens.clamp(min=1)
