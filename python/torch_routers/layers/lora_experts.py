"""Experts of low rank, and what it means to merge them."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers.layers.experts import ExpertBank
from torch_routers.ops._groups import group_of_tokens
from torch_routers.registry import check_choice
from torch_routers.routing import Merge


class LoraExperts(ExpertBank):
    r"""Experts of low rank, to be added to a frozen linear layer (LoRA, arXiv 2106.09685).

    .. math::  y = \frac{\alpha}{r} B_e A_e x

    `SoftMergedExperts` of them, with weights :math:`p` of a segment, are one of two layers:

    .. math::  y_{factors} = \frac{\alpha}{r} \Big(\sum_e p_e B_e\Big) \Big(\sum_e p_e A_e\Big) x,
               \qquad  y_{product} = \frac{\alpha}{r} \sum_e p_e B_e A_e x

    Factors are what SMEAR (arXiv 2306.03745) does with the parameters of any expert: the merged one
    has rank :math:`r`, and :math:`p_e p_f B_e A_f` of any two experts in it. The product is linear
    in :math:`p`, as :math:`B_e A_e` is what an expert does: its rank is up to :math:`E r`, and it
    equals the mean of the results of the experts. With one-hot weights, with experts that are
    equal, and with a router that chooses experts, the two agree.

    Args:
        num_experts: :math:`E`.
        hidden_size: features of the input.
        rank: :math:`r`.
        out_features: features of the result. Default: ``hidden_size``.
        alpha: :math:`\alpha`. Default: ``rank``, a factor of 1.
        mix: ``"factors"`` or ``"product"``; by which sum experts are merged.

    ``A`` is ``[num_experts, rank, hidden_size]``, normal of standard deviation
    1 / sqrt(hidden_size); ``B`` is ``[num_experts, out_features, rank]`` and 0, so that at first
    nothing is added.

    For B segments and T rows, factors cost B · E · r · (hidden_size + out_features)
    multiplications to merge and T · r · (hidden_size + out_features) to apply; the product costs
    E times the latter, as two matrix products with ``[rows, num_experts * rank]`` between them.
    No ``[out_features, hidden_size]`` is ever made.

    Raises:
        ValueError: an argument that does not fit.

    >>> experts = LoraExperts(num_experts=4, hidden_size=16, rank=2, alpha=4, mix="product")
    >>> moe = MoE(SMEARRouter(16, 4), SoftMergedExperts(experts))
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        rank: int,
        *,
        out_features: int | None = None,
        alpha: float | None = None,
        mix: Literal["factors", "product"] = "factors",
    ) -> None:
        out_features = hidden_size if out_features is None else out_features
        super().__init__(
            num_experts=num_experts, hidden_size=hidden_size, rank=rank, out_features=out_features
        )
        check_choice("LoraExperts", "mix", mix, ("factors", "product"))
        self.mix, self.alpha = mix, rank if alpha is None else alpha
        self._add("A", rank, hidden_size, bias=False)
        self._add("B", out_features, rank, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        torch.nn.init.zeros_(self.B)

    def forward(self, rows: Tensor, offsets: Tensor | Merge) -> Tensor:
        scale = self.alpha / self.rank
        if isinstance(offsets, Merge) and self.mix == "product":
            return self._stacked(rows, scale * offsets.weights, offsets.offsets)
        return self._linear("B", scale * self._linear("A", rows, offsets), offsets)

    def _stacked(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """All experts as one, of the sum of their ranks, each with its weight between A and B."""
        segment = group_of_tokens(offsets, rows.shape[0])
        of_rows = weights[segment.clamp(max=weights.shape[0] - 1)]
        hidden = F.linear(rows, self.A.flatten(0, 1)).unflatten(1, self.A.shape[:2])
        weighted = (of_rows.unsqueeze(2) * hidden).to(hidden.dtype).flatten(1)
        return F.linear(weighted, self.B.transpose(0, 1).flatten(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, mix={self.mix!r}"
