"""What routers decide on the mean over some data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_routers.delivery import collect
from torch_routers.lora.inject import scopes_of
from torch_routers.lora.scope import RoutingScope
from torch_routers.routers import Router
from torch_routers.routing import Routing

#: What a model is called with, time after time: dicts of keywords, or sequences of arguments.
Batches = Iterable[Mapping[str, Any] | Sequence[Any]]


def look_at(model: nn.Module, batches: Batches, handles: list[RemovableHandle]) -> None:
    """Call a model with each batch, for hooks to see, which are then removed."""
    try:
        for batch in batches:
            with collect(model):  # losses are of no use here
                model(**batch) if isinstance(batch, Mapping) else model(*batch)
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_weights(
    model: nn.Module, batches: Batches, mix: str, caller: str
) -> dict[RoutingScope, Tensor]:
    """``[num_experts]`` float64 for each scope: the mean weights of tokens that have any.

    Raises:
        ValueError: no batches, or none with a token.
    """
    scopes = scopes_of(model, caller, mix)
    sums = {scope.router: torch.zeros(scope.router.num_experts).double() for scope in scopes}
    tokens = dict.fromkeys(sums, 0)

    def add(router: Router, _: Any, routing: Routing) -> None:
        weights = routing.of_experts(router.num_experts).detach()
        rows = weights.reshape(-1, router.num_experts).double().cpu()
        sums[router] += rows.sum(0)
        tokens[router] += int((rows != 0).any(1).sum())

    handles = [router.register_forward_hook(add) for router in sums]
    look_at(model, batches, handles)
    if not all(tokens.values()):
        raise ValueError(f"{caller}: expected batches with tokens for every router, got none")
    return {scope: sums[scope.router] / tokens[scope.router] for scope in scopes}
