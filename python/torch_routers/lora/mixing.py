"""What experts add to a layer, for each of the ways in which they are mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers import ops
from torch_routers.routing import Routing

#: Of `ops.lora_mix`, for ways of mixing that come to it.
Options = dict[str, Any]


class Factors(NamedTuple):
    """What the experts of a layer are made of."""

    A: Sequence[Tensor]
    """``[r_e, in_features]`` for each expert, or one that all share; none for ``"ranks"``."""
    B: Sequence[Tensor]
    """``[out_features, r_e]`` for each expert, or one that all share."""
    scaling: tuple[float, ...]
    """Of each expert."""


def add_products(x: Tensor, factors: Factors, routing: Routing, options: Options) -> Tensor:
    r""":math:`\sum_e w_e c_e B_e A_e x`."""
    weights, indices = routing.weights, routing.indices
    a, b, scaling = factors
    return ops.lora_mix(x, a, b, weights, indices, scaling=scaling, **options)


def add_of_one_expert(x: Tensor, factors: Factors, routing: Routing, options: Options) -> Tensor:
    """The same for pairs of a token and a slot, whose weights the scope multiplies by itself."""
    return add_products(x, factors, routing, {**options, "router_grad": "selected"})


def add_of_shared_a(x: Tensor, factors: Factors, routing: Routing, options: Options) -> Tensor:
    r""":math:`\sum_e w_e c_e B_e (A x)`, where :math:`A x`, of few numbers, is computed once."""
    (a,) = factors.A
    same = [torch.eye(len(a), dtype=a.dtype, device=a.device)] * len(factors.B)
    u = F.linear(x, a.to(x.dtype))
    return add_products(u, factors._replace(A=same), routing, options)


def add_of_mixed_factors(x: Tensor, factors: Factors, routing: Routing, _: Options) -> Tensor:
    r""":math:`c (\sum_e w_e B_e) (\sum_e w_e A_e) x`, with weights of each sequence.

    With :math:`n` times as many weights as experts, features are split in :math:`n` parts, which
    are mixed by weights of their own.
    """
    a, b = torch.stack([*factors.A]), torch.stack([*factors.B])
    experts, rank, leading = len(a), a.shape[1], routing.weights.shape[:-1]
    weights = routing.weights.reshape(leading.numel(), -1, experts).transpose(0, 1).to(a.dtype)
    splits = len(weights)
    # [splits, experts, numbers]: views, where there is one split.
    a = a.unflatten(2, (splits, -1)).permute(2, 0, 1, 3).reshape(splits, experts, -1)
    b = b.unflatten(1, (splits, -1)).permute(1, 0, 2, 3).reshape(splits, experts, -1)
    a = (weights @ a).unflatten(-1, (rank, -1)).permute(1, 2, 0, 3).reshape(*leading, rank, -1)
    b = (weights @ b).unflatten(-1, (-1, rank)).permute(1, 0, 2, 3).reshape(*leading, -1, rank)
    return (x @ a.mT.to(x.dtype)) @ b.mT.to(x.dtype) * factors.scaling[0]


def add_ranks(x: Tensor, factors: Factors, routing: Routing, _: Options) -> Tensor:
    r""":math:`c \sum_{j \in \mathrm{top}} b_j (A x)_j`; the router has :math:`A x` already."""
    (b,) = factors.B
    u = torch.where(routing.of_experts(b.shape[1]) != 0, routing.logits, 0) * factors.scaling[0]
    return F.linear(u.to(x.dtype), b.to(x.dtype))


MIXES: dict[str, Callable[[Tensor, Factors, Routing, Options], Tensor]] = {
    "product": add_products,
    "shared_a": add_of_shared_a,
    "factors": add_of_mixed_factors,
    "ranks": add_ranks,
    "block": add_of_one_expert,
}
