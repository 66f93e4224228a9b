"""The layer that joins a router with experts."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from torch_routers.delivery import require_destination
from torch_routers.routers import Router
from torch_routers.routing import Routing


class MoE(nn.Module):
    r"""A mixture of experts in place of a feed-forward layer.

    .. math::  y_t = \sum_j w_{tj} \, \mathrm{expert}_{i_{tj}}(x_t)

    Every token reaches all of its experts: nothing is dropped. The sum is taken in slot order, in
    the dtype of the weights (float32), and rounded once.

    Args:
        router: decides which expert sees which token.
        experts: a bank of experts, such as `SwiGLUExperts`.

    ``moe(x)`` is a tensor of the shape and dtype of ``x``; ``moe(x, return_routing=True)`` is that
    and the `Routing`. Everything else goes to the router by keyword: ``valid_mask``,
    ``token_ids``, ``indices`` … Masked tokens come out as zero.

    Raises:
        ValueError: router and experts do not fit each other, or an argument does not fit.
        RuntimeError: in training, when the router has losses and nothing would deliver them.

    >>> router = TopKRouter(hidden_size=16, num_experts=4, top_k=2)
    >>> moe = MoE(router, SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=32))
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, router: Router, experts: nn.Module) -> None:
        super().__init__()
        available = getattr(experts, "num_experts", router.num_experts)
        if available != router.num_experts:
            raise ValueError(
                f"MoE: expected experts with num_experts={router.num_experts}, that of the "
                f"router, got {available}"
            )
        self.router, self.experts = router, experts

    if TYPE_CHECKING:  # nn.Module types its calls as Any

        @overload
        def __call__(
            self, x: Tensor, *, return_routing: Literal[False] = ..., **context: Any
        ) -> Tensor: ...
        @overload
        def __call__(
            self, x: Tensor, *, return_routing: Literal[True], **context: Any
        ) -> tuple[Tensor, Routing]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(
        self, x: Tensor, *, return_routing: bool = False, **context: Any
    ) -> Tensor | tuple[Tensor, Routing]:
        routing = self.router(x, **context)
        if not return_routing:
            require_destination("MoE", self.router, routing)
        if routing.indices is None:
            raise ValueError("MoE: expected a routing with indices, got a dense one")
        y = self._mix(x, routing.indices, routing.weights)
        return (y, routing) if return_routing else y

    def _mix(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        hidden_size, slots = x.shape[-1], indices.shape[-1]
        order, place, offsets = _sort_by_expert(indices.flatten(), self.router.num_experts)
        rows = x.reshape(-1, hidden_size).index_select(0, order // slots)
        rows = self.experts(rows, offsets).index_select(0, place)
        rows = rows.view(*indices.shape, rows.shape[-1])
        return (rows * weights.unsqueeze(-1)).sum(-2).to(x.dtype)


def _sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots in stable order of their experts, the place of each, and where each expert begins.

    Empty slots (-1) come last, behind the last offset.
    """
    groups = torch.where(experts < 0, num_experts, experts)
    order = groups.argsort(stable=True)
    slots = torch.arange(order.shape[0], device=order.device)  # len() would fix the size in export
    place = torch.empty_like(order).scatter(0, order, slots)
    sizes = groups.new_zeros(num_experts + 2).scatter_add(0, groups + 1, torch.ones_like(groups))
    return order, place, sizes.cumsum(0)[: num_experts + 1]
