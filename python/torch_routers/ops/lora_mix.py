"""A placeholder until the operator is here: plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_mix(
    x,
    factors_a,
    factors_b,
    weights,
    indices=None,
    *,
    scaling=None,
    strategy=None,
    router_grad="selected",
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    x = x.to(dtype)
    E = len(factors_a)
    if indices is not None:
        dense = weights.new_zeros(*weights.shape[:-1], E + 1)
        weights = dense.scatter(-1, torch.where(indices < 0, E, indices), weights)[..., :E]
    if scaling is not None:
        weights = weights * torch.tensor(scaling, device=x.device, dtype=weights.dtype)
    ranks = torch.tensor([a.shape[0] for a in factors_a], device=x.device)
    w = weights.repeat_interleave(ranks, -1, output_size=sum(a.shape[0] for a in factors_a))
    u = F.linear(x, torch.cat(list(factors_a)).to(dtype))
    g = u * w.to(dtype)
    if router_grad == "selected":
        g = torch.where(w != 0, g, 0)
    return F.linear(g, torch.cat(list(factors_b), 1).to(dtype))
