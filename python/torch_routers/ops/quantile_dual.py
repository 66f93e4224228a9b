"""Prices of experts at which each of them is wanted by equally many tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantile_dual(
    scores: Tensor,
    dual: Tensor,
    top_k: int,
    *,
    token_top_k: Tensor | None = None,
    valid_mask: Tensor | None = None,
    nonnegative: bool = False,
) -> Tensor:
    r"""One step towards the prices :math:`\beta` at which a top-k of ``scores - dual`` is balanced.

    .. math::  \alpha_t = (k_t + 1)\text{-th largest over } e \text{ of } z_{te} - \beta_e, \qquad
               \beta'_e = \Big(\Big\lfloor \tfrac1E \sum_t k_t \Big\rfloor + 1\Big)
               \text{-th largest over } t \text{ of } z_{te} - \alpha_t

    Both are prices of the linear program that assigns :math:`k_t` experts to each token and equally
    many tokens to each expert such that the sum of the scores is largest; each minimises its dual
    while the other stays (J. Su, spaces.ac.cn/archives/11619; Megatron-LM ``qb_dual_update``). With
    ``nonnegative`` both are at least 0: an expert may get less than its share (arXiv 2502.15451).

    In no quantile are tokens without a slot, tokens that get every expert, whom no price moves,
    and tokens whose scores have a NaN. An expert whose quantile is not finite keeps its price, and
    so do all without tokens. No derivative; nothing waits for the device.

    Args:
        scores: ``[..., num_experts]``, any floating dtype. The arithmetic is in float32, or float64
            for float64.
        dual: ``[num_experts]``, the prices :math:`\beta`.
        top_k: experts per token, in ``[1, num_experts]``.
        token_top_k: ``[...]`` int64 in ``[0, top_k]``, experts of each token :math:`k_t`. Default:
            ``top_k``.
        valid_mask: ``[...]`` bool, True = real token. Default: all are real.
        nonnegative: whether prices are at least 0.

    Returns:
        ``[num_experts]``: :math:`\beta'`, in the dtype of the arithmetic.

    Raises:
        ValueError: an argument that does not fit.

    >>> scores = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])  # all to expert 0
    >>> quantile_dual(scores, torch.zeros(2), 1)  # at more than 2 half of them prefer expert 1
    tensor([2., 0.])
    """
    experts = scores.shape[-1] if scores.dim() else 0
    if not scores.is_floating_point() or dual.shape != (experts,):
        raise ValueError(
            "quantile_dual: expected scores [..., num_experts] in a floating dtype and a dual "
            f"[num_experts], got {scores.dtype} of shape {list(scores.shape)} and "
            f"{list(dual.shape)}"
        )
    if not 1 <= top_k <= experts:
        raise ValueError(
            f"quantile_dual: expected top_k in [1, num_experts={experts}], got {top_k}"
        )
    for name, values in ("token_top_k", token_top_k), ("valid_mask", valid_mask):
        if values is not None and values.shape != scores.shape[:-1]:
            raise ValueError(
                f"quantile_dual: expected {name} of shape {list(scores.shape[:-1])}, one value "
                f"per token, got {list(values.shape)}"
            )
    z = scores.detach().reshape(-1, experts)
    z = z if z.dtype == torch.float64 else z.float()
    dual = dual.detach().to(z.dtype)
    tokens = z.shape[0]
    if token_top_k is None:
        slots = torch.full((tokens,), top_k, dtype=torch.int64, device=z.device)
    else:
        slots = token_top_k.reshape(-1)
    if valid_mask is not None:
        slots = torch.where(valid_mask.reshape(-1), slots, 0)

    best = (z - dual).topk(min(top_k + 1, experts)).values
    alpha = best.gather(-1, slots.clamp(max=best.shape[-1] - 1).unsqueeze(-1))
    if nonnegative:
        alpha = alpha.clamp(min=0)
    above = z - alpha
    counted = (slots > 0) & (slots < experts) & ~above.isnan().any(-1)
    above = torch.where(counted.unsqueeze(-1), above, -torch.inf)
    above = F.pad(above, (0, 0, 0, 1), value=-torch.inf)  # there is always a largest
    share = torch.where(counted, slots, 0).sum() // experts
    # Its largest value is known without the device; a partial sort is several times faster.
    most = above.topk(tokens * top_k // experts + 1, dim=0).values
    quantile = most.index_select(0, share.view(1)).squeeze(0)
    least = 0 if nonnegative else -torch.inf
    return torch.where(quantile.isfinite(), quantile.clamp(min=least), dual)
