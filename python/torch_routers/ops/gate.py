r"""From logits to the experts of each token and their combine weights.

With :math:`p = \mathrm{softmax}(x)` over the experts and :math:`i_j` the expert in slot :math:`j`,

.. math::  w_j = p_{i_j}, \quad\text{or}\quad w_j = p_{i_j} / \sum_l p_{i_l} \text{ if renormalised}

`topk_gate` picks the experts of the largest logits, `gate` takes them as given; weights, statistics
and derivatives are the same code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_routers.ops import _gate_rules
from torch_routers.ops._check import check, check_dtype


class Statistics(NamedTuple):
    """By-products of the pass over the logits, for losses and metrics. Masked tokens are in none.

    Tokens form ``groups`` (one, unless ``group_offsets`` says otherwise). The first two are
    differentiable, and None where they were not asked for.
    """

    lse: Tensor | None
    """``[...]``: log-sum-exp of the logits of each token; 0 where it is masked."""
    score_sums: Tensor | None
    """``[groups, num_experts]``: sum of the softmax of each token."""
    group_counts: Tensor
    """``[groups, num_experts]`` int64: slots given to each expert."""
    group_tokens: Tensor
    """``[groups]`` int64: tokens that are not masked."""


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    valid_mask: Tensor | None = None,
    group_offsets: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Statistics]:
    """Give each token the ``top_k`` experts of its largest logits.

    Equal logits: the lower index first; -0 equals 0; NaN comes before everything, so that a row
    with a NaN has NaN weights. The indices of a token are always distinct.

    Args:
        logits: ``[..., num_experts]``, float32 or float64.
        top_k: slots per token, at most ``num_experts``.
        renormalize: make the weights of each token sum to one: softmax over the chosen experts
            (Mixtral, arXiv 2401.04088). Otherwise they are the softmax over all experts at the
            chosen ones (OLMoE, arXiv 2409.02060). With ``top_k=1`` a renormalised weight is the
            constant 1, and the router learns from the losses alone.
        valid_mask: ``[...]`` bool, True = real token. A masked token has indices -1 and weights 0,
            is in no statistic, and its logits are never looked at. Default: all are real.
        group_offsets: ``[groups + 1]`` int64, ascending from 0 to the number of tokens (counted
            over the flattened leading dimensions). Default: one group.
        statistics: also return ``lse`` and ``score_sums``.

    Returns:
        ``weights`` ``[..., top_k]`` in the dtype of ``logits``, ``indices`` ``[..., top_k]`` int64
        in descending order of their logits, and `Statistics`.

    Raises:
        ValueError: an argument that does not fit.

    >>> weights, indices, _ = topk_gate(torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 2.0]]), 2)
    >>> indices
    tensor([[0, 1],
            [1, 2]])
    >>> weights
    tensor([[0.7311, 0.2689],
            [0.5000, 0.5000]])
    """
    x = _rows("topk_gate", logits)
    mask = _flat_mask("topk_gate", valid_mask, logits)
    weights, indices, *rest = _gate_rules.topk_gate(
        x, top_k, renormalize, mask, group_offsets, statistics
    )
    shape = (*logits.shape[:-1], top_k)
    return weights.view(shape), indices.view(shape), _statistics(logits, statistics, *rest)


def gate(
    logits: Tensor,
    indices: Tensor,
    *,
    renormalize: bool = True,
    valid_mask: Tensor | None = None,
    group_offsets: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Statistics]:
    """The weights and statistics of `topk_gate` for experts chosen by another rule, or earlier.

    Args:
        logits: ``[..., num_experts]``, float32 or float64.
        indices: ``[..., slots]`` int64 in ``[-1, num_experts)``; -1 is an empty slot, of weight 0,
            counted nowhere. A masked token's indices are ignored.
        renormalize, valid_mask, group_offsets, statistics: as in `topk_gate`.

    Returns:
        ``weights`` ``[..., slots]`` in the dtype of ``logits``, and `Statistics`.

    Raises:
        ValueError: an argument that does not fit. On CUDA an index out of range cannot be reported
            without a synchronisation: its weight is NaN.

    >>> weights, statistics = gate(torch.zeros(1, 4), torch.tensor([[3, -1]]), renormalize=False)
    >>> weights, statistics.group_counts
    (tensor([[0.2500, 0.0000]]), tensor([[0, 0, 0, 1]]))
    """
    x = _rows("gate", logits)
    if indices.dim() != logits.dim() or indices.shape[:-1] != logits.shape[:-1]:
        leading = "".join(f"{size}, " for size in logits.shape[:-1])
        raise ValueError(
            f"gate: expected indices of shape [{leading}slots], got {list(indices.shape)}"
        )
    mask = _flat_mask("gate", valid_mask, logits)
    slots = indices.shape[-1]
    weights, *rest = _gate_rules.gate(
        x, indices.reshape(x.shape[0], slots), renormalize, mask, group_offsets, statistics
    )
    return weights.view(indices.shape), _statistics(logits, statistics, *rest)


def _rows(op: str, logits: Tensor) -> Tensor:
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected logits of shape [..., num_experts] with num_experts >= 1, "
            f"got {list(logits.shape)}"
        )
    return logits.reshape(-1, logits.shape[-1])


def _flat_mask(op: str, valid_mask: Tensor | None, logits: Tensor) -> Tensor | None:
    if valid_mask is None:
        return None
    if valid_mask.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: expected valid_mask of shape {list(logits.shape[:-1])}, one value per token, "
            f"got {list(valid_mask.shape)}"
        )
    return valid_mask.reshape(-1)


def _statistics(logits, asked, lse, score_sums, counts, group_tokens) -> Statistics:
    if not asked:
        return Statistics(None, None, counts, group_tokens)
    return Statistics(lse.view(logits.shape[:-1]), score_sums, counts, group_tokens)


# ---- what torch.compile and torch.export see: shapes ---------------------------------------------


@torch.library.register_fake("torch_routers::topk_gate")
def _topk_fake(logits, top_k, renormalize, valid_mask, group_offsets, statistics):
    num_experts = logits.shape[1]
    check(
        1 <= top_k <= num_experts,
        lambda: f"topk_gate: expected top_k in [1, num_experts={num_experts}], got {top_k}",
    )
    indices = logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)
    weights, *rest = _shapes("topk_gate", logits, top_k, valid_mask, group_offsets, statistics)
    return weights, indices, *rest


@torch.library.register_fake("torch_routers::gate")
def _gate_fake(logits, indices, renormalize, valid_mask, group_offsets, statistics):
    check_dtype("gate", "indices", indices, torch.int64)
    return _shapes("gate", logits, indices.shape[1], valid_mask, group_offsets, statistics)


def _shapes(op, logits, slots, valid_mask, group_offsets, statistics):
    check_dtype(op, "logits", logits, torch.float32, torch.float64,
                remedy=". Convert it with .float()")  # fmt: skip
    if valid_mask is not None:
        check_dtype(op, "valid_mask", valid_mask, torch.bool)
    groups = 1
    if group_offsets is not None:
        check_dtype(op, "group_offsets", group_offsets, torch.int64)
        check(
            group_offsets.dim() == 1 and group_offsets.shape[0] >= 2,
            lambda: (
                f"{op}: expected group_offsets of shape [groups + 1], "
                f"got {list(group_offsets.shape)}"
            ),
        )
        groups = group_offsets.shape[0] - 1
    tokens, num_experts = logits.shape
    return (
        logits.new_empty(tokens, slots),
        logits.new_empty(tokens if statistics else 0),
        logits.new_empty(groups if statistics else 0, num_experts),
        logits.new_empty((groups, num_experts), dtype=torch.int64),
        logits.new_empty(groups, dtype=torch.int64),
    )


@torch.library.register_fake("torch_routers::_gate_backward")
def _backward_fake(
    grad_weights, grad_lse, grad_sums, logits, indices, renormalize, valid_mask, group_offsets
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
