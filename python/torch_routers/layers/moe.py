"""The layer that joins a router with experts."""

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn

from torch_routers import ops
from torch_routers.delivery import require_destination
from torch_routers.routers import Router
from torch_routers.routing import Routing


class MoE(nn.Module):
    r"""A mixture of experts in place of a feed-forward layer.

    .. math::  y_t = \sum_j w_{tj} \, \mathrm{expert}_{i_{tj}}(x_t)

    Every token reaches all of its experts: nothing is dropped. The sum is taken in slot order, in
    float32 (float64 for float64 rows), and rounded once.

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
        plan = ops.expert_plan(indices, self.router.num_experts)
        rows = self.experts(ops.permute_tokens(x, plan), plan.offsets)
        return ops.combine_tokens(rows, weights, plan).to(x.dtype)
