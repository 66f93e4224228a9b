"""The layer that joins a router with experts."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from torch_routers import ops
from torch_routers._autograd import shapes_may_depend_on
from torch_routers.delivery import require_destination
from torch_routers.layers.experts import ExpertList
from torch_routers.layers.soft_merged import SoftMergedExperts
from torch_routers.routers import Router
from torch_routers.routing import Routing


class MoE(nn.Module):
    r"""A mixture of experts in place of a feed-forward layer.

    .. math::  y_t = \sum_j w_{tj} \, \mathrm{expert}_{i_{tj}}(x_t) + g(x_t)\, \mathrm{shared}(x_t)

    The sum over :math:`j` is taken in slot order, in float32 (float64 for float64 rows), and
    rounded once. A router with a weight for every expert, such as one whose number of experts
    varies from token to token, works alike: :math:`j` then runs over the experts whose weight is
    not 0, or that the routing calls ``active``, in ascending order, and no other pair of token and
    expert is computed.

    Args:
        router: decides which expert sees which token.
        experts: a bank of experts, such as `SwiGLUExperts`; or several modules, of which an
            `ExpertList` is made. `SoftMergedExperts` are for a router that merges them.
        shared: a module that all tokens pass, such as `SwiGLU`. Default: none.
        shared_gate: multiply what it returns by :math:`g(x) = \sigma(w^\top x)`, with the trained
            linear layer ``shared_gate`` (Qwen2-MoE); else :math:`g = 1` (DeepSeek).
        scale_input: multiply the input of the experts by the weight instead of their output, as
            Llama 4 does.
        max_active: room for that many experts per token, on the average of a call, where a router
            has a weight for every expert and shapes may not depend on values: in compiled and
            exported models, under ``torch.func.vmap``, and on CUDA. If a call needs more, the last
            experts lose rows, which then add nothing. Default: room for all. In eager mode on the
            CPU there is exactly as much room as is needed.

    ``moe(x)`` is a tensor of the shape and dtype of ``x``, save that experts with ``out_features``
    have those as the last dimension; ``moe(x, return_routing=True)`` is that and the `Routing`.
    Everything else goes to the router by keyword: ``valid_mask``, ``token_ids``, ``indices`` …
    Masked tokens come out as zero.

    Raises:
        ValueError: router and experts do not fit each other, or an argument does not fit.
        RuntimeError: in training, when the router has losses and nothing would deliver them.

    >>> router = TopKRouter(hidden_size=16, num_experts=4, top_k=2)
    >>> moe = MoE(router, SwiGLUExperts(num_experts=4, hidden_size=16, intermediate_size=32))
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        router: Router,
        experts: nn.Module | Iterable[nn.Module],
        *,
        shared: nn.Module | None = None,
        shared_gate: bool = False,
        scale_input: bool = False,
        max_active: float | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(experts, nn.Module) or isinstance(experts, nn.ModuleList):
            experts = ExpertList(experts)
        available = getattr(experts, "num_experts", router.num_experts)
        if available != router.num_experts:
            raise ValueError(
                f"{name}: expected experts with num_experts={router.num_experts}, that of the "
                f"router, got {available}"
            )
        if scale_input and isinstance(experts, SoftMergedExperts):
            raise ValueError(f"{name}: expected scale_input=False with SoftMergedExperts, got True")
        if shared_gate and shared is None:
            raise ValueError(f"{name}: expected shared experts with shared_gate=True, got none")
        if max_active is not None and not max_active > 0:
            raise ValueError(f"{name}: expected max_active > 0, got {max_active}")
        self.router, self.experts, self.shared = router, experts, shared
        hidden_size = getattr(router, "hidden_size", None) or getattr(experts, "hidden_size", None)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if shared_gate else None
        self.scale_input, self.max_active = scale_input, max_active

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
        context = self.router.with_followed(x, context)
        routing = self.router(x, **context)
        if not return_routing:
            require_destination(type(self).__name__, self.router, routing)
        if isinstance(self.experts, SoftMergedExperts):
            y = self._merged(x, routing, context.get("valid_mask"))
        else:
            y = self._mix(x, routing.weights, self._plan(routing))
        if self.shared is not None:
            y = y + self._shared(x, context.get("valid_mask"))
        return (y, routing) if return_routing else y

    def _plan(self, routing: Routing) -> ops.Plan:
        if routing.indices is not None:
            return ops.expert_plan(routing.indices, self.router.num_experts)
        weights, rows = routing.weights.detach(), None
        if routing.active is not None:
            weights = routing.active.to(weights.dtype)  # an active expert may weigh 0
        if shapes_may_depend_on(weights):
            rows = int(weights.count_nonzero())
        elif self.max_active is not None:
            rows = math.ceil(weights[..., 0].numel() * min(self.max_active, weights.shape[-1]))
        return ops.expert_plan_from_weights(weights, max_rows=rows)

    def _mix(self, x: Tensor, weights: Tensor | None, plan: ops.Plan) -> Tensor:
        rows = ops.permute_tokens(x, plan)
        if self.scale_input:
            rows, weights = rows * of_rows(weights, plan).to(rows.dtype), None
        y = ops.combine_tokens(self.experts(rows, plan.offsets), weights, plan)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    def _merged(self, x: Tensor, routing: Routing, valid_mask: Tensor | None) -> Tensor:
        if routing.merge is None:
            raise ValueError(
                "MoE: expected a router that merges experts for SoftMergedExperts, got "
                f"{type(self.router).__name__}"
            )

        def merged(x: Tensor) -> Tensor:
            y = self.experts(x.reshape(-1, x.shape[-1]), routing.merge)
            return y.view(*x.shape[:-1], y.shape[-1])

        return self._without_padding(merged, x, valid_mask).to(x.dtype)

    def _shared(self, x: Tensor, valid_mask: Tensor | None) -> Tensor:
        def gated(x: Tensor) -> Tensor:
            y = self.shared(x)
            return y if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * y

        return self._without_padding(gated, x, valid_mask)

    @staticmethod
    def _without_padding(
        layer: Callable[[Tensor], Tensor], x: Tensor, valid_mask: Tensor | None
    ) -> Tensor:
        """``layer(x)``, 0 for masked tokens; whatever they hold, it reaches no parameter."""
        if valid_mask is None:
            return layer(x)
        valid = valid_mask.unsqueeze(-1)
        return torch.where(valid, layer(torch.where(valid, x, 0)), 0)


def of_rows(weights: Tensor, plan: ops.Plan) -> Tensor:
    """``[rows, 1]``: the weight of each row's slot; 0 behind the last expert's rows."""
    taken = weights.reshape(-1)[plan.order.clamp(min=0)]
    return torch.where(plan.order >= 0, taken, 0).unsqueeze(-1)
