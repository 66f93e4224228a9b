"""What routers with a weight for every expert share."""

from collections.abc import Callable

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.ops._groups import group_of_tokens


def dense_statistics(
    logits: Tensor,
    scores: Tensor | None,
    counts: Tensor,
    active: Callable[[], Tensor],
    *,
    valid_mask: Tensor | None,
    group_offsets: Tensor | None,
    per_sample: bool,
) -> ops.Statistics:
    """Those that `ops.gate` takes from its pass, by a few sums of PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        scores: ``[..., num_experts]``, the probabilities of losses, 0 where masked. None: neither
            they nor the log-sum-exp are wanted.
        counts: ``[num_experts]``, of all tokens together.
        active: returns the pairs of token and expert that count, ``[..., num_experts]`` bool.
            Called where there are several groups.
        valid_mask: ``[...]`` bool.
        group_offsets: ``[groups + 1]``, where groups begin in the flattened tokens.
        per_sample: without offsets, make a group of each sample.
    """
    num_experts = logits.shape[-1]
    tokens = logits[..., 0].numel()
    valid = torch.ones_like(logits[..., 0], dtype=torch.bool) if valid_mask is None else valid_mask
    lse = None
    if scores is not None:
        live = valid & (logits != -torch.inf).any(-1)  # of others the slope would be NaN
        lse = torch.where(live.unsqueeze(-1), logits, 0).logsumexp(-1)
        lse = torch.where(live, lse, torch.where(valid, -torch.inf, 0))
    one_group = group_offsets is None and not (per_sample and logits.dim() > 2)
    if group_offsets is not None:
        group = group_of_tokens(group_offsets, tokens)

        def of_groups(values: Tensor) -> Tensor:
            empty = values.new_zeros(group_offsets.shape[0] - 1, *values.shape[1:])
            return empty.index_add(0, group, values)

    else:
        groups = 1 if one_group else logits.shape[0]

        def of_groups(values: Tensor) -> Tensor:
            return values.unflatten(0, (groups, tokens // max(1, groups))).sum(1)

    return ops.Statistics(
        lse,
        None if scores is None else of_groups(scores.reshape(tokens, num_experts)),
        counts[None] if one_group else of_groups(active().reshape(tokens, num_experts).long()),
        of_groups(valid.reshape(tokens).long()),
    )
