"""How few experts are active: per token, per chunk of tokens, and from one token to the next."""

import torch
from torch import Tensor


def token_sparsity(active: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """The share of the pairs of token and expert that are not active (BlockFFN, arXiv 2507.08771).

    Args:
        active: ``[..., num_experts]`` bool, such as ``routing.weights != 0``.
        valid_mask: ``[...]`` bool, True = real token.

    Returns:
        A float64 scalar, NaN without tokens.

    >>> token_sparsity(torch.tensor([[True, False], [False, False]]))
    tensor(0.7500, dtype=torch.float64)
    """
    valid = torch.ones_like(active[..., 0]) if valid_mask is None else valid_mask
    pairs = valid.sum() * active.shape[-1]
    return 1 - (active & valid.unsqueeze(-1)).sum() / pairs.double()


def chunk_sparsity(active: Tensor, window: int = 8, group_ids: Tensor | None = None) -> Tensor:
    """The share of experts that ``window`` consecutive tokens leave alone, the mean over windows.

    Windows slide by one token and stay within a sequence, and a document.

    Args:
        active: ``[..., tokens, num_experts]`` bool.
        window: tokens of a window, 8 in the paper.
        group_ids: ``[..., tokens]`` integers, the document of each token, ascending.

    Returns:
        A float64 scalar, NaN without windows.

    Raises:
        ValueError: ``window`` is less than 1.

    >>> chunk_sparsity(torch.tensor([[True, False, False], [False, True, False]]), 2)
    tensor(0.3333, dtype=torch.float64)
    """
    if window < 1:
        raise ValueError(f"chunk_sparsity: expected window >= 1, got {window}")
    if active.shape[-2] < window:
        return torch.full((), torch.nan, dtype=torch.float64, device=active.device)
    idle = 1 - active.unfold(-2, window, 1).any(-1).double().mean(-1)
    if group_ids is None:
        return idle.mean()
    whole = group_ids[..., window - 1 :] == group_ids[..., : group_ids.shape[-1] - window + 1]
    return torch.where(whole, idle, 0).sum() / whole.sum().double()


def reuse_ratio(active: Tensor, group_ids: Tensor | None = None) -> Tensor:
    """The share of a token's experts that the next token activates too, the mean over tokens.

    Tokens without experts, and the last of a sequence or a document, are left out.

    Args:
        active, group_ids: as in `chunk_sparsity`.

    Returns:
        A float64 scalar, NaN where no token counts.

    >>> reuse_ratio(torch.tensor([[True, True, False], [False, True, True]]))
    tensor(0.5000, dtype=torch.float64)
    """
    now, following = active[..., :-1, :], active[..., 1:, :]
    size = now.sum(-1)
    counted = size > 0
    if group_ids is not None:
        counted = counted & (group_ids[..., 1:] == group_ids[..., :-1])
    share = (now & following).sum(-1) / size.clamp(min=1).double()
    return torch.where(counted, share, 0).sum() / counted.sum().double()
