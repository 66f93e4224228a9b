"""Importance: experts that are equally likely."""

from typing import Any

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import StatisticsLoss


def importance(score_sums: Tensor, *, unbiased: bool = False) -> Tensor:
    r"""The squared coefficient of variation of the experts' scores (arXiv 1701.06538).

    .. math::  L = \frac{\mathrm{Var}_e(I_e)}{\mathrm{mean}_e(I_e)^2}, \qquad I_e = \sum_t p_{te}

    It is 0 when all experts are equally likely, for a single expert, and without tokens. Unlike
    `load_balance` it looks at the scores alone, not at the choices. (The paper's scores are the
    weights of the chosen experts; here they are the softmax over all.)

    Args:
        score_sums: ``[num_experts]``, the sum of :math:`p_t` over the tokens.
        unbiased: divide the variance by ``num_experts - 1`` instead of ``num_experts``.

    Returns:
        A scalar in the dtype of ``score_sums``.

    >>> import torch
    >>> importance(torch.tensor([3.0, 1.0]))
    tensor(0.2500)
    """
    no_tokens = score_sums.new_zeros(1, dtype=torch.int64)
    statistics = ops.Statistics(None, score_sums[None], None, no_tokens)
    return ops.router_losses(statistics, importance=1.0, unbiased=unbiased).total


class ImportanceLoss(StatisticsLoss):
    """`importance` of one router, over all tokens of the call.

    Args:
        weight: the factor in the objective; 0.1 in the paper.
        unbiased: as in `importance`.
    """

    name = term = "importance"

    def __init__(self, weight: float, unbiased: bool = False) -> None:
        super().__init__(weight)
        self.unbiased = unbiased

    def options(self) -> dict[str, Any]:
        return {"unbiased": self.unbiased}
