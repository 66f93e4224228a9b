"""How few experts are active: per token, per chunk of tokens, and from one token to the next."""

import torch
from torch import Tensor


def token_sparsity(active: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """The share of the pairs of token and expert that are not active (BlockFFN, arXiv 2507.08771).

    Args:
        active: ``[..., num_experts]`` bool, such as ``routing.active``.
        valid_mask: ``[...]`` bool, True = real token.

    Returns:
        A float64 scalar, NaN without tokens.

    >>> token_sparsity(torch.tensor([[True, False], [False, False]]))
    tensor(0.7500, dtype=torch.float64)
    """
    valid = torch.ones_like(active[..., 0]) if valid_mask is None else valid_mask
    pairs = valid.sum() * active.shape[-1]
    return 1 - (active & valid.unsqueeze(-1)).sum() / pairs.double()


def chunk_sparsity(
    active: Tensor,
    window: int = 8,
    *,
    valid_mask: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """The share of experts that ``window`` consecutive tokens leave alone, the mean over windows.

    Windows slide by one token and stay within a sequence, and a document. That of one token is
    `token_sparsity`. The reference code of BlockFFN cuts the tokens of a batch into windows that do
    not overlap and may lie in two documents.

    Args:
        active: ``[..., tokens, num_experts]`` bool, such as ``routing.active``.
        window: tokens of a window; the paper names 8, its code takes 1, 2, 4, …, 64.
        valid_mask: ``[..., tokens]`` bool, True = real token. The others are in no window: tokens
            before and behind them are neighbours.
        group_ids: ``[..., tokens]`` integers, the document of each token, such as
            ``routing.group_ids()``: consecutive ones with the same number.

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
    active, document = _documents(active, valid_mask, group_ids)
    idle = 1 - active.unfold(-2, window, 1).any(-1).double().mean(-1)
    first, last = document[..., : document.shape[-1] - window + 1], document[..., window - 1 :]
    whole = (first == last) & (last >= 0)
    return torch.where(whole, idle, 0).sum() / whole.sum().double()


def reuse_ratio(
    active: Tensor, *, valid_mask: Tensor | None = None, group_ids: Tensor | None = None
) -> Tensor:
    """The share of a token's experts that the next token activates too, the mean over tokens.

    Tokens without experts, and the last of a sequence or a document, are left out.

    Args:
        active, valid_mask, group_ids: as in `chunk_sparsity`.

    Returns:
        A float64 scalar, NaN where no token counts.

    >>> reuse_ratio(torch.tensor([[True, True, False], [False, True, True]]))
    tensor(0.5000, dtype=torch.float64)
    """
    active, document = _documents(active, valid_mask, group_ids)
    now, following = active[..., :-1, :], active[..., 1:, :]
    size = now.sum(-1)
    counted = (size > 0) & (document[..., 1:] == document[..., :-1]) & (document[..., 1:] >= 0)
    share = (now & following).sum(-1) / size.clamp(min=1).double()
    return torch.where(counted, share, 0).sum() / counted.sum().double()


def _documents(
    active: Tensor, valid_mask: Tensor | None, group_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Real tokens first, and ``[..., tokens]`` the number of each one's document; -1 for others."""
    if group_ids is None:
        group_ids = torch.zeros_like(active[..., 0], dtype=torch.int64)
    if valid_mask is not None:
        order = torch.argsort(~valid_mask, dim=-1, stable=True)
        active = active.take_along_dim(order.unsqueeze(-1), -2)
        group_ids, valid_mask = group_ids.gather(-1, order), valid_mask.gather(-1, order)
    is_new = group_ids[..., 1:] != group_ids[..., :-1]
    document = torch.cat([torch.zeros_like(group_ids[..., :1]), is_new.cumsum(-1)], -1)
    return active, document if valid_mask is None else torch.where(valid_mask, document, -1)
