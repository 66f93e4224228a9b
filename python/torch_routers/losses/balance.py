"""Load balance: experts that see more tokens become less likely."""

from torch import Tensor

from torch_routers.losses.base import RouterLoss
from torch_routers.routing import Routing


def load_balance(score_sums: Tensor, counts: Tensor, num_tokens: Tensor) -> Tensor:
    r"""How far the experts are from seeing equally many tokens; 1 when all do.

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = c_e \Big/ \sum_i c_i, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    The gradient goes through :math:`P` alone; :math:`f` is a count, thus constant. This is the form
    of Switch (arXiv 2101.03961) with :math:`f` over all slots, as in Megatron-LM: per layer,
    divided by k. The Transformers function does not divide by k and concatenates the layers before
    the product, by which opposite imbalances of two layers cancel.

    Args:
        score_sums: ``[num_experts]``, the sum of :math:`p_t` over the tokens.
        counts: ``[num_experts]`` int64, slots given to each expert.
        num_tokens: scalar, the number of tokens; 0 gives the loss 0.

    Returns:
        A scalar in the dtype of ``score_sums``.

    >>> import torch
    >>> load_balance(torch.tensor([1.5, 0.5]), torch.tensor([2, 0]), torch.tensor(2))
    tensor(1.5000)
    """
    share = counts / counts.sum().clamp(min=1)
    mean_score = score_sums / num_tokens.clamp(min=1)
    return counts.shape[-1] * (share.to(score_sums.dtype) * mean_score).sum()


class LoadBalanceLoss(RouterLoss):
    """`load_balance` of one router, over all tokens of the call.

    Args:
        weight: the factor in the objective; papers use 1e-2 (Switch, OLMoE) to 1e-3.
    """

    name = "load_balance"

    def forward(self, routing: Routing) -> Tensor:
        _, score_sums, counts, tokens = self.statistics(routing)
        return load_balance(score_sums.sum(0), counts.sum(0), tokens.sum())
