"""The loss of chunks: that the tokens of one activate few experts together."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers.losses.activation import SequenceLoss, activation_probs
from torch_routers.losses.base import full_precision, valid_tokens
from torch_routers.routing import Routing


def chunk_sparsification(
    probs: Tensor,
    *,
    chunk_size: int = 64,
    valid_mask: Tensor | None = None,
    group_ids: Tensor | None = None,
    tail: str = "pad",
    reference: bool = False,
) -> Tensor:
    r"""The share of experts that a chunk of tokens activates, softly (arXiv 2507.08771).

    .. math::
        L = 1 - \frac{1}{C E} \sum_{c, e} \prod_{t \in c} (1 - p_{te} + 10^{-5})

    Chunks are consecutive tokens of a sequence, or with ``group_ids`` of a document: each document
    is cut from its own first token on. Products are made of products, so that the gradient is the
    product of the other factors, without a division that would be 0/0 where :math:`p = 1`. Written
    in plain PyTorch; with ``group_ids`` it takes about four times as long, and keeps 6 times
    ``probs`` for backward instead of twice.

    Args:
        probs: ``[..., tokens, num_experts]``, such as those of `activation_probs`; each row of the
            leading dimensions is a sequence. Half types are converted.
        chunk_size: tokens of a chunk, 64 in the paper's recipes.
        valid_mask: ``[..., tokens]`` bool, True = real token; the others leave the product as it
            is, and a chunk of them alone is left out.
        group_ids: ``[..., tokens]`` integers, the document of each token: consecutive ones with the
            same number.
        tail: what becomes of a last chunk with fewer tokens: ``"pad"``, it counts as it is;
            ``"drop"``, it is left out; ``"error"``, not possible with ``group_ids``, because
            lengths of documents would have to be waited for.
        reference: count chunks without real tokens too, as the reference code does.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without chunks.

    Raises:
        ValueError: ``chunk_size`` or ``tail`` does not fit, or tokens are not whole chunks where
            ``tail="error"``.

    >>> p = torch.tensor([[0.7, 0.3, 0], [0.5, 0, 0.5], [0, 1, 0], [0.2, 0.8, 0]])
    >>> chunk_sparsification(p, chunk_size=2)
    tensor(0.4750)
    >>> chunk_sparsification(p, chunk_size=2, group_ids=torch.tensor([0, 1, 1, 1]))
    tensor(0.4444)
    """
    _check_chunks("chunk_sparsification", chunk_size, tail)
    valid = valid_tokens(probs, valid_mask)
    factors = 1 - torch.where(valid.unsqueeze(-1), full_precision(probs), 0) + 1e-5
    if group_ids is None:
        product, has_tokens = _of_sequences(factors, valid, chunk_size, tail)
        is_chunk = torch.ones_like(has_tokens)
    else:
        product, has_tokens, is_chunk = _of_documents(factors, valid, group_ids, chunk_size, tail)
    counted = is_chunk if reference else is_chunk & has_tokens
    return torch.where(counted, 1 - product.mean(-1), 0).sum() / counted.sum().clamp(min=1)


def _of_sequences(
    factors: Tensor, valid: Tensor, chunk_size: int, tail: str
) -> tuple[Tensor, Tensor]:
    """``[chunks, experts]`` the products of chunks; ``[chunks]`` whether they have real tokens."""
    tokens, experts = factors.shape[-2:]
    rest = -tokens % chunk_size
    if tail == "error" and rest:
        raise ValueError(
            f"chunk_sparsification: expected tokens in whole chunks of {chunk_size}, got {tokens}"
        )
    if tail == "drop":
        whole = tokens - tokens % chunk_size
        factors, valid = factors[..., :whole, :], valid[..., :whole]
    else:  # even by nothing: a branch would recompile
        factors, valid = F.pad(factors, (0, 0, 0, rest), value=1 + 1e-5), F.pad(valid, (0, rest))
    factors = factors.reshape(-1, chunk_size, experts).transpose(0, 1)
    while factors.shape[0] > 1:  # a tree
        half = factors.shape[0] // 2
        product = factors[:half] * factors[half : 2 * half]
        factors = torch.cat([product, factors[2 * half :]])
    return factors[0], valid.reshape(-1, chunk_size).any(-1)


def _of_documents(
    factors: Tensor, valid: Tensor, group_ids: Tensor, chunk_size: int, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For each token ``[..., tokens, experts]`` the product of its chunk as far as the token.

    And ``[..., tokens]`` whether its chunk has had a real token, and whether the chunk ends there.
    """
    if tail == "error":
        raise ValueError(
            "chunk_sparsification: expected tail among ['pad', 'drop'] with group_ids, got 'error'"
        )
    token = torch.arange(factors.shape[-2], device=factors.device)
    is_first = F.pad(group_ids[..., 1:] != group_ids[..., :-1], (1, 0), value=True)
    first = torch.where(is_first, token, 0).cummax(-1).values
    position = (token - first) % chunk_size  # of the token in its chunk
    reach = 1  # of the products, in tokens
    while reach < chunk_size:
        joined = factors[..., reach:, :] * factors[..., :-reach, :]
        inside = (position[..., reach:] >= reach).unsqueeze(-1)
        joined = torch.where(inside, joined, factors[..., reach:, :])
        factors = torch.cat([factors[..., :reach, :], joined], -2)
        reach *= 2
    last_valid = torch.where(valid, token, -1).cummax(-1).values
    ends = F.pad((position == 0)[..., 1:], (0, 1), value=True)
    if tail == "drop":
        ends = ends & (position == chunk_size - 1)
    missing = (chunk_size - 1 - position).to(factors.dtype)  # tokens that would be padding
    factors = factors * ((1 + 1e-5) ** missing).unsqueeze(-1)
    return factors, last_valid >= token - position, ends


def _check_chunks(caller: str, chunk_size: int, tail: str) -> None:
    if chunk_size < 1:
        raise ValueError(f"{caller}: expected chunk_size >= 1, got {chunk_size}")
    if tail not in ("pad", "drop", "error"):
        raise ValueError(f"{caller}: expected tail among ['pad', 'drop', 'error'], got {tail!r}")


class ChunkSparsificationLoss(SequenceLoss):
    """`chunk_sparsification` of one router; ``weight`` may be moved by `AdaptiveFactor`.

    Chunks are cut from each sequence, or from each document where the router is told
    ``group_offsets``.

    Args:
        weight: the factor in the objective; at first 5e-2 in the paper, 0.1 for its 2.8B model.
        chunk_size, tail: as in `chunk_sparsification`.
        eps: of the normalisation, as in the router.

    Raises:
        ValueError: an argument that does not fit, or the routing is not dense.
    """

    name = "chunk_sparsification"

    def __init__(
        self, weight: float, chunk_size: int = 64, tail: str = "pad", eps: float = 1e-5
    ) -> None:
        super().__init__(weight)
        _check_chunks(type(self).__name__, chunk_size, tail)
        self.chunk_size, self.tail, self.eps = chunk_size, tail, eps

    def forward(self, routing: Routing) -> Tensor:
        logits, valid, group_ids = self.sequences_of(routing)
        return chunk_sparsification(
            activation_probs(logits, valid, eps=self.eps),
            chunk_size=self.chunk_size,
            valid_mask=valid,
            group_ids=group_ids,
            tail=self.tail,
        )
