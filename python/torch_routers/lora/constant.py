"""A router that has decided once and for all."""

from typing import Any

import torch
from torch import Tensor

from torch_routers.routers import Router
from torch_routers.routing import Routing


class ConstantRouter(Router):
    """The same weights for every token: those of the buffer ``constant_weights`` ``[num_experts]``.

    What `lora.bake_router` leaves of a router. It has no logits, and learns nothing.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts that have a weight; 1 / num_experts each, until others are loaded.

    >>> ConstantRouter(hidden_size=16, num_experts=4)(torch.randn(2, 16)).weights
    tensor([[0.2500, 0.2500, 0.2500, 0.2500],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(num_experts)
        self.hidden_size = hidden_size
        self.constant_weights: Tensor
        self.register_buffer("constant_weights", torch.full((num_experts,), 1 / num_experts))

    def route(self, x: Tensor, *, valid_mask: Tensor | None, **context: Any) -> Routing:
        self.check_hidden_size(x)
        weights = self.constant_weights.to(self.full_precision(x[:0]).dtype)
        weights = weights.expand(*x.shape[:-1], self.num_experts)
        if valid_mask is not None:
            weights = torch.where(valid_mask.unsqueeze(-1), weights, 0)
        counts = (weights != 0).reshape(-1, self.num_experts).sum(0)
        return Routing(weights, counts=counts)
