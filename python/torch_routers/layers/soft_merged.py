"""Experts that are merged into one before they are run."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.layers.experts import ExpertBank
from torch_routers.ops.soft_merge import soft_merge
from torch_routers.routing import Merge


class SoftMergedExperts(nn.Module):
    r"""A bank of experts of which each segment of tokens gets one, merged from all.

    .. math::  y_t = \mathrm{expert}(x_t; \bar W_{s(t)}), \qquad \bar W_s = \sum_e p_{se} W_e

    For a router that weighs the experts of a sequence, such as `SMEARRouter`; `MoE` calls it. To
    merge parameters is not to average results: between the layers of an expert there is an
    activation. With weights that are one-hot it is the chosen expert; with equal experts, any
    weights give that expert.

    Args:
        experts: a bank whose parameters are all ``[num_experts, ...]``: `MLPExperts`,
            `SwiGLUExperts`, `LoraExperts`, or one of your own.

    Costs, for P parameters of an expert and B segments, B · E · P multiplications beyond those of
    one expert per token, and as many again in the backward, which merges anew: nothing of B merged
    experts is kept for it. A bank of your own is called with parameters that are merged already,
    and those are kept.

    Raises:
        ValueError: a bank that is made otherwise.

    >>> from torch_routers import MLPExperts, MoE, SMEARRouter
    >>> moe = MoE(SMEARRouter(16, 4), SoftMergedExperts(MLPExperts(4, 16, 8)))
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts = getattr(experts, "num_experts", None)
        self.hidden_size = getattr(experts, "hidden_size", None)
        for name, parameter in experts.named_parameters():
            if parameter.dim() < 1 or parameter.shape[0] != self.num_experts:
                raise ValueError(
                    "SoftMergedExperts: expected experts with parameters [num_experts, ...], got "
                    f"{name} {list(parameter.shape)} and num_experts={self.num_experts}"
                )
        self.experts = experts

    def forward(self, x: Tensor, merge: Merge) -> Tensor:
        """``[tokens, hidden_size]``, sorted by segment, to one result per token."""
        weights, offsets = merge
        if weights.shape[0] == 0:  # a bank has at least one expert: one that nobody sees
            weights, offsets = F.pad(weights, (0, 0, 0, 1)), F.pad(offsets, (0, 1))
        if isinstance(self.experts, ExpertBank):
            return self.experts(x, Merge(weights, offsets))
        merged = {
            name: soft_merge(weights, parameter)
            for name, parameter in self.experts.named_parameters()
        }
        return torch.func.functional_call(self.experts, merged, (x, offsets))
