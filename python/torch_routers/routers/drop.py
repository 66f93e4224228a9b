"""Who is dropped where an expert has no room for all."""

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.noise import Noise
from torch_routers.routing import Routing

DROP_POLICIES = ("position", "weight", "priority", "batch_priority", "random")


def within_capacity(
    routing: Routing,
    capacity: int | Tensor,
    policy: str,
    score: str,
    group_offsets: Tensor | None,
    noise: Noise | None,
) -> Tensor:
    """``[..., k]`` bool: slots that are not over the capacity of their expert.

    Without ``noise``, a random policy is that of the position.
    """
    weights, indices, logits = routing.weights, routing.indices, routing.logits.detach()
    options = {}
    if policy == "random" and noise is None:
        policy = "position"
    if policy == "weight":
        options["weights"] = weights.detach().reshape(-1, weights.shape[-1])
    elif policy in ("priority", "batch_priority"):
        priority = logits.amax(-1)
        if score == "softmax":  # the largest probability, without rounding it to 1
            priority = priority - logits.logsumexp(-1)
        priority = priority.reshape(-1)
        if policy == "priority":
            options["priority"] = priority
        else:
            policy, options["weights"] = "weight", _slot_by_slot(priority, weights.shape[-1])
    elif policy == "random":
        options |= {"seed": noise.seed, "row_ids": noise.row_ids}
    plan = ops.expert_plan(indices, routing.num_experts)
    plan = ops.limit_capacity(plan, capacity, policy=policy, group_offsets=group_offsets, **options)
    return (plan.inverse >= 0).view(indices.shape)


def _slot_by_slot(priority: Tensor, slots: int) -> Tensor:
    """``[tokens, slots]`` float64, exact: larger in a lower slot, then for a larger priority."""
    best_first = priority.argsort(descending=True, stable=True)
    tokens = torch.arange(len(priority), device=priority.device)
    place = torch.empty_like(best_first).scatter(0, best_first, tokens)
    slot = torch.arange(slots, device=priority.device)
    return -(place.unsqueeze(-1) + slot * len(priority)).double()
