"""`ops.expert_plan`: the slots in order of their experts, where each went, and how many there are.

The baselines sort stably in the narrowest integer that holds the experts, for which torch has a
radix sort; sorting the int64 indices as they come is the plain form of the same.
"""

from collections.abc import Iterator
from functools import partial

import torch

from torch_routers import ops

from .harness import Options, Row, name_of


def sort(indices, num_experts, dtype):
    experts = indices.flatten()
    order = experts.to(dtype).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    counts = torch.bincount(experts, minlength=num_experts)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return order, inverse.view(indices.shape), counts, offsets


def ours(indices, num_experts):
    plan = ops.expert_plan(indices, num_experts)
    return plan.order, plan.inverse, plan.counts, plan.offsets


def random_indices(tokens, experts, slots):
    """Distinct experts for each token."""
    return torch.rand(tokens, experts).topk(slots).indices


def rows(options: Options) -> Iterator[Row]:
    dtypes = {"uint8": torch.uint8, "int16": torch.int16, "int64": torch.int64}
    for experts, k, tokens in options.cases():
        yield Row(
            name=name_of("expert_plan", False, experts, k, tokens),
            inputs=lambda e=experts, k=k, t=tokens: (random_indices(t, e, k), e),
            ours=ours,
            baselines={f"{name} argsort": partial(sort, dtype=d) for name, d in dtypes.items()},
            traffic=tokens * k * 24,  # indices in, order and inverse out
        )
