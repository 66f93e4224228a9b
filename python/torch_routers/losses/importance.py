"""Importance: experts that are equally likely."""

from typing import Any, Literal

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import StatisticsLoss
from torch_routers.routing import Routing

SUMMANDS = ("scores", "weights")


def importance(score_sums: Tensor, *, unbiased: bool = False) -> Tensor:
    r"""The squared coefficient of variation of the experts' scores (arXiv 1701.06538).

    .. math::  L = \frac{\mathrm{Var}_e(I_e)}{\mathrm{mean}_e(I_e)^2}, \qquad I_e = \sum_t p_{te}

    It is 0 when all experts are equally likely, for a single expert, and without tokens. Unlike
    `load_balance` it looks at the scores alone, not at the choices. (The paper's scores are the
    weights of the chosen experts: see `ImportanceLoss`.)

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
    r"""`importance` of one router, over all tokens of the call.

    Args:
        weight: the factor in the objective; 0.1 in the paper.
        unbiased: as in `importance`.
        of: what :math:`I_e` is the sum of: ``"scores"``, the softmax over all experts (V-MoE, arXiv
            2106.05974, and Tutel); or ``"weights"``, the combine weights of the chosen experts,
            0 for all others (the paper, and davidmrau/mixture-of-experts, with ``unbiased=True``).
            The gradient of the latter goes to the chosen experts alone. The weights are those of
            the routing: what was dropped adds nothing. Written in plain PyTorch.

    Raises:
        ValueError: an argument that does not fit.

    >>> loss = ImportanceLoss(0.1, of="weights")
    >>> weights, indices = torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([[0, 1], [0, -1]])
    >>> loss(Routing(weights, indices, counts=torch.tensor([2, 1])))  # of 1.75 and 0.25
    tensor(0.5625)
    """

    name = term = "importance"

    def __init__(
        self,
        weight: float,
        unbiased: bool = False,
        of: Literal["scores", "weights"] = "scores",
    ) -> None:
        super().__init__(weight)
        if of not in SUMMANDS:
            raise ValueError(f"ImportanceLoss: expected of in {list(SUMMANDS)}, got {of!r}")
        self.unbiased, self.of = unbiased, of

    def options(self) -> dict[str, Any]:
        return {"unbiased": self.unbiased}

    @property
    def is_term(self) -> bool:
        return type(self).forward is ImportanceLoss.forward and self.of == "scores"

    def forward(self, routing: Routing) -> Tensor:
        if self.of == "scores":
            return super().forward(routing)
        return importance(weight_sums(routing), unbiased=self.unbiased)


def weight_sums(routing: Routing) -> Tensor:
    """``[num_experts]``: the sum of the combine weights of each expert. In plain PyTorch."""
    weights, num_experts = routing.weights, routing.num_experts
    if routing.indices is not None:  # an empty slot goes to column 0, which is left out
        dense = weights.new_zeros(*weights.shape[:-1], num_experts + 1)
        weights = dense.scatter(-1, routing.indices + 1, weights)[..., 1:]
    return weights.reshape(-1, num_experts).sum(0)
