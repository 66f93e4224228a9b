"""Groups of tokens."""

import torch
from torch import Tensor


def group_of_tokens(group_offsets: Tensor, tokens: int) -> Tensor:
    """``[tokens]`` int64: the group of each token, of those that begin at ``group_offsets``."""
    token = torch.arange(tokens, device=group_offsets.device)
    return torch.searchsorted(group_offsets[1:].contiguous(), token, right=True)
