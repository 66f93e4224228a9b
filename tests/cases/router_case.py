"""A router as the generic tests see it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import torch_routers as tr
from cases.op_case import seeded

HIDDEN, EXPERTS = 12, 6


def swiglu(experts: nn.Module, e: int, x: Tensor) -> Tensor:
    gate, value = (experts.gate_up_proj[e] @ x).chunk(2)
    return experts.down_proj[e] @ (nn.functional.silu(gate) * value)


@dataclass(frozen=True)
class RouterCase:
    name: str
    #: Builds the router; same seed, same weights.
    make: Callable[[], tr.Router]
    #: What a call needs besides x, for tokens of this shape.
    context: Callable[[tuple[int, ...]], dict[str, Tensor]] = lambda shape: {}
    #: The routing of one token: (x [hidden], context of the token, router) -> (experts, weights).
    of_token: Callable[[Tensor, dict[str, Tensor], tr.Router], tuple[list[int], Tensor]] = None
    #: Whether the task loss reaches the router through the weights.
    learns_from_task: bool = True
    #: Parameters that no loss reaches: they weigh what the losses have seen before.
    beyond_losses: tuple[str, ...] = ()
    #: Constructor arguments that do not fit, and what the router says.
    errors: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    #: Builds a layer with the router of `make`, if not a `MoE` with `SwiGLUExperts`.
    make_layer: Callable[[], tr.MoE] | None = None
    #: What an expert of that layer does: (bank, number, x [hidden]) -> [hidden].
    expert: Callable[[nn.Module, int, Tensor], Tensor] = swiglu
    #: Call arguments besides x of shape [2, 3, HIDDEN] that do not fit, and what the router says.
    call_errors: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def __str__(self) -> str:
        return self.name

    def router(self, dtype: torch.dtype = torch.float32) -> tr.Router:
        torch.manual_seed(0)
        return self.make().to(dtype)

    def moe(self, dtype: torch.dtype = torch.float32) -> tr.MoE:
        if self.make_layer is not None:
            torch.manual_seed(0)
            return self.make_layer().to(dtype)
        router = self.router()
        return tr.MoE(router, tr.SwiGLUExperts(EXPERTS, HIDDEN, 10)).to(dtype)


def inputs(*leading: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return seeded(*leading, HIDDEN, seed=seed).to(dtype)


def padding(*leading: int) -> Tensor:
    """A mask with both kinds of tokens, wherever there are several."""
    index = torch.arange(torch.Size(leading).numel()).view(leading)
    return index % 3 != 1
