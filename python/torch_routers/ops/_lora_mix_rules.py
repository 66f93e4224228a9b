"""How `lora_mix` is computed."""

import torch

from torch_routers._autograd import shapes_may_depend_on

STRATEGIES = "stacked", "segmented"


def mixture(x, factors_a, factors_b, weights, indices, scaling, strategy, router_grad):
    """``lora_mix`` of ``[tokens, in_features]``, after its checks."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_experts = len(factors_a)
    dense, selected = _dense(weights.to(compute), indices, num_experts)
    if scaling is not None:
        dense = dense * torch.tensor(scaling, dtype=compute, device=x.device)
    return stacked(x, factors_a, factors_b, dense, selected, router_grad == "dense")


def _dense(weights, indices, num_experts):
    """``[tokens, num_experts]``: the weight of each expert, and whether it is selected."""
    if indices is None:
        return weights, weights != 0
    empty = weights.new_zeros(weights.shape[0], num_experts + 1)
    if shapes_may_depend_on(indices) and indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < -1 or high >= num_experts:
            raise ValueError(
                f"lora_mix: expected indices in [-1, num_experts={num_experts}), "
                f"got {low if low < -1 else high}"
            )
    places = indices.where((indices >= 0) & (indices < num_experts), num_experts)
    dense = empty.scatter_add(1, places, weights)
    selected = empty.scatter(1, places, 1) != 0
    return dense[:, :-1], selected[:, :-1]


def stacked(x, factors_a, factors_b, dense, selected, all_learn):
    """Two matrix products for all experts."""
    ranks = torch.tensor([a.shape[0] for a in factors_a], device=x.device)
    expert = torch.repeat_interleave(ranks, output_size=sum(a.shape[0] for a in factors_a))
    a = torch.cat([a.to(x.dtype) for a in factors_a])
    b = torch.cat([b.to(x.dtype) for b in factors_b], 1)
    u = (x @ a.T).to(dense.dtype)
    chosen = selected[:, expert]
    if all_learn:
        gated = u.where(chosen, u.nan_to_num(0, 0, 0)) * dense[:, expert]
    else:
        gated = torch.where(chosen, u * dense[:, expert], 0)
    return gated.to(x.dtype) @ b.T
