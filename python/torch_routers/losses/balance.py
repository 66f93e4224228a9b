"""Load balance: experts that see more tokens become less likely."""

from typing import Any, Literal

from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import StatisticsLoss

CONVENTIONS = ("megatron", "switch")


def load_balance(
    score_sums: Tensor,
    counts: Tensor,
    num_tokens: Tensor,
    *,
    convention: Literal["megatron", "switch"] = "megatron",
) -> Tensor:
    r"""How far the experts are from seeing equally many tokens; 1 when all do.

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = c_e \Big/ \sum_i c_i, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    The gradient goes through :math:`P` alone; :math:`f` is a count, thus constant. This is the form
    of Switch (arXiv 2101.03961) with :math:`f` over all slots, as in Megatron-LM: per layer,
    divided by k. With ``convention="switch"``, :math:`f_e = c_e / T`, so that the value at balance
    is the number of slots per token. The Transformers function does not divide by k either, and
    concatenates the layers before the product, by which opposite imbalances of two layers cancel.

    Args:
        score_sums: ``[num_experts]``, the sum of :math:`p_t` over the tokens.
        counts: ``[num_experts]`` int64, slots given to each expert.
        num_tokens: scalar int64, the number of tokens; 0 gives the loss 0.
        convention: ``"megatron"`` or ``"switch"``.

    Returns:
        A scalar in the dtype of ``score_sums``.

    >>> import torch
    >>> load_balance(torch.tensor([1.5, 0.5]), torch.tensor([2, 0]), torch.tensor(2))
    tensor(1.5000)
    """
    statistics = ops.Statistics(None, score_sums[None], counts[None], num_tokens[None])
    return ops.router_losses(statistics, balance=1.0, convention=convention).total


class LoadBalanceLoss(StatisticsLoss):
    """`load_balance` of one router, over all tokens of the call.

    Args:
        weight: the factor in the objective; papers use 1e-2 (Switch, OLMoE) to 1e-3.
        convention: ``"megatron"``, 1 at balance, or ``"switch"``, k at balance.
    """

    name, term = "load_balance", "balance"

    def __init__(
        self, weight: float, convention: Literal["megatron", "switch"] = "megatron"
    ) -> None:
        super().__init__(weight)
        if convention not in CONVENTIONS:
            raise ValueError(
                f"LoadBalanceLoss: expected convention in {list(CONVENTIONS)}, got {convention!r}"
            )
        self.convention = convention

    def options(self) -> dict[str, Any]:
        return {"convention": self.convention}
