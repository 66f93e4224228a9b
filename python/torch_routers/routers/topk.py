"""The top-k router: softmax over the experts, the best k of each token."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.routers.base import Router
from torch_routers.routing import Routing


class ZeroRouterGradientWarning(UserWarning):
    """A renormalised weight of a single expert is the constant 1, which trains no router."""


class TopKRouter(Router):
    r"""Give each token the ``top_k`` experts of its largest logits.

    .. math::  z = W x, \qquad w_j = p_{i_j} \Big/ \sum_l p_{i_l}, \qquad p = \mathrm{softmax}(z)

    with :math:`i_1, \dots, i_k` the experts of the largest :math:`z`, largest first; without
    ``renormalize``, :math:`w_j = p_{i_j}`. Equal logits: the lower index first.

    The renormalised form is Mixtral's (arXiv 2401.04088), the plain one that of Switch (top-1,
    arXiv 2101.03961) and OLMoE (arXiv 2409.02060). Their code multiplies in the dtype of the model
    and takes the softmax in float32; here the logits are float32 already, because rounding them to
    bfloat16 first moves tokens to other experts. Indices follow from ``torch.topk`` there, whose
    order of ties is not specified.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``.
        renormalize: make the weights of each token sum to one.
        losses: auxiliary losses, such as ``LoadBalanceLoss(1e-2)``.

    ``weight`` is ``[num_experts, hidden_size]``, initialised from a normal distribution of standard
    deviation 0.02. It may have any dtype; the router computes in float32 (float64 for float64).

    Call it with ``indices`` ``[..., slots]`` to replay earlier decisions: the weights are computed
    anew from the current logits, -1 stays an empty slot.

    Raises:
        ValueError: an argument that does not fit, at construction where it can be known.

    >>> router = TopKRouter(hidden_size=16, num_experts=8, top_k=2)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.indices.shape, int(routing.counts.sum())
    (torch.Size([3, 5, 2]), torch.Size([3, 5, 2]), 30)
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = True,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKRouter: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        if top_k == 1 and renormalize:
            warnings.warn(
                "TopKRouter: expected renormalize=False with top_k=1, got True: every weight is 1, "
                "and only the auxiliary losses train the router",
                ZeroRouterGradientWarning,
                stacklevel=2,
            )
        self.hidden_size, self.top_k, self.renormalize = hidden_size, top_k, renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        indices: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"TopKRouter: expected x of shape [..., hidden_size={self.hidden_size}], "
                f"got {list(x.shape)}"
            )
        x = self.full_precision(x)
        logits = F.linear(x, self.weight.to(x.dtype))
        options = {
            "renormalize": self.renormalize,
            "valid_mask": valid_mask,
            "statistics": self.wants_statistics,
        }
        if indices is None:
            weights, indices, statistics = ops.topk_gate(logits, self.top_k, **options)
        else:
            if valid_mask is not None:
                indices = torch.where(valid_mask.unsqueeze(-1), indices, -1)
            weights, statistics = ops.gate(logits, indices, **options)
        return Routing(weights, indices, logits, statistics.group_counts[0], statistics)
