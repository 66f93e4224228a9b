r"""The common losses of a router from the statistics of its pass, in one call.

With :math:`c_e` the slots of expert :math:`e` and :math:`s_e` its sum of scores over :math:`T`
tokens, :math:`E` experts,

.. math::
    L_\mathrm{balance} = E \sum_e f_e \frac{s_e}{T}, \qquad
    L_\mathrm{z} = \frac{1}{T} \sum_t \mathrm{lse}_t^2, \qquad
    L_\mathrm{importance} = \frac{\mathrm{Var}_e(s_e)}{\mathrm{mean}_e(s_e)^2}
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_routers.ops import _router_losses_rules
from torch_routers.ops._check import check, check_dtype, dtype_name
from torch_routers.ops.gate import Statistics

CONVENTIONS = ("megatron", "switch")


class RouterLosses(NamedTuple):
    """Scalars in the dtype of the statistics. A loss that was not asked for is None."""

    total: Tensor
    """The weighted sum, the only one with a gradient."""
    balance: Tensor | None
    """Unweighted and without gradient, as the next two: to log, not to train."""
    z: Tensor | None
    importance: Tensor | None


def router_losses(
    statistics: Statistics,
    *,
    balance: float | None = None,
    z: float | None = None,
    importance: float | None = None,
    convention: Literal["megatron", "switch"] = "megatron",
    per_group: bool = False,
    unbiased: bool = False,
) -> RouterLosses:
    r"""Load balance, z-loss and importance of a routing, as their weighted sum and one by one.

    The gradient goes to ``lse`` and ``score_sums``; counts are constants. Every loss is 0, with a
    zero gradient, where there are no tokens.

    Args:
        statistics: of `topk_gate` or `gate` with ``statistics=True``, in float32 or float64.
            Losses are taken over all groups together.
        balance: weight of the balance loss, :math:`E \sum_e f_e s_e / T`.
        z: weight of the z-loss, the mean of :math:`\mathrm{lse}^2` over the tokens (ST-MoE, arXiv
            2202.08906). A token whose logits are all -inf adds 0.
        importance: weight of the importance loss, the squared coefficient of variation of the score
            sums (arXiv 1701.06538, with the softmax over all experts as scores).
        convention: what :math:`f_e` of the balance loss is. ``"megatron"``:
            :math:`c_e / \sum_i c_i`, the share of all slots; the loss is 1 where experts share
            alike. (Megatron-LM writes :math:`c_e / (T k)`, the same where every token fills its k
            slots; empty slots do not count here.) ``"switch"``: :math:`c_e / T`, slots per token;
            the loss is k where experts share alike (Switch, arXiv 2101.03961, has k = 1).
        per_group: take the balance loss of each group alone, and the mean of them over the groups
            with tokens: the sequence-wise form, where a group is a sequence (DeepSeek-V2, arXiv
            2405.04434).
        unbiased: divide the variance of the importance loss by ``num_experts - 1`` instead of
            ``num_experts``.

    Returns:
        `RouterLosses`.

    Raises:
        ValueError: an argument that does not fit, or statistics without what a loss needs.

    >>> from torch_routers.ops import topk_gate
    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    >>> *_, statistics = topk_gate(logits, 1, renormalize=False, statistics=True)
    >>> losses = router_losses(statistics, balance=0.01, z=0.001)
    >>> losses.balance, losses.z
    (tensor(1.2489), tensor(5.7966))
    >>> losses.total
    tensor(0.0183)
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"router_losses: expected convention in {list(CONVENTIONS)}, got {convention!r}"
        )
    lse, score_sums, counts, group_tokens = statistics
    if lse is not None and lse.dim() != 1:
        lse = lse.reshape(-1)
    total, values = _router_losses_rules.router_losses(
        lse, score_sums, counts, group_tokens, balance, z, importance,
        convention == "switch", per_group, unbiased,
    )  # fmt: skip
    of_balance, of_z, of_importance = values.unbind()
    return RouterLosses(
        total,
        None if balance is None else of_balance,
        None if z is None else of_z,
        None if importance is None else of_importance,
    )


# ---- shapes --------------------------------------------------------------------------------------


@torch.library.register_fake("torch_routers::router_losses")
def _fake(lse, score_sums, counts, group_tokens, balance, z, importance, *options):
    op = "router_losses"
    has_scores = balance is not None or importance is not None
    check(z is not None or has_scores, lambda: f"{op}: expected the weight of a loss, got none")
    check(
        group_tokens.dim() == 1,
        lambda: f"{op}: expected group_tokens of shape [groups], got {list(group_tokens.shape)}",
    )
    check_dtype(op, "group_tokens", group_tokens, torch.int64)
    groups = group_tokens.shape[0]
    if z is not None:
        _check_given("lse", lse)
        check(
            lse.dim() == 1,
            lambda: f"{op}: expected lse of shape [tokens], got {list(lse.shape)}",
        )
    if has_scores:
        _check_matrix("score_sums", score_sums, groups)
    if balance is not None:
        _check_matrix("group_counts", counts, groups)
        check(
            counts.shape[1] == score_sums.shape[1],
            lambda: (
                f"{op}: expected group_counts of shape {list(score_sums.shape)}, that of "
                f"score_sums, got {list(counts.shape)}"
            ),
        )
        check_dtype(op, "group_counts", counts, torch.int64)
    first, name = (score_sums, "score_sums") if z is None else (lse, "lse")
    check(
        not has_scores or score_sums.dtype == first.dtype,
        lambda: (
            f"{op}: expected score_sums in the dtype of lse, {dtype_name(first)}, "
            f"got {dtype_name(score_sums)}"
        ),
    )
    check_dtype(op, name, first, torch.float32, torch.float64,
                remedy=". Convert it with .float()")  # fmt: skip
    return first.new_empty(()), first.new_empty(3)


def _check_given(name, tensor):
    check(
        tensor is not None,
        lambda: f"router_losses: expected {name} for the losses asked for, got none",
    )


def _check_matrix(name, matrix, groups):
    _check_given(name, matrix)
    check(
        matrix.dim() == 2 and matrix.shape[0] == groups and matrix.shape[1] >= 1,
        lambda: (
            f"router_losses: expected {name} of shape [groups={groups}, num_experts], "
            f"got {list(matrix.shape)}"
        ),
    )


@torch.library.register_fake("torch_routers::_router_losses_backward")
def _backward_fake(grad, lse, score_sums, counts, group_tokens, balance, z, importance, *options):
    first = score_sums if z is None else lse
    has_scores = balance is not None or importance is not None
    return (
        first.new_empty(0 if z is None else lse.shape[0]),
        first.new_empty(score_sums.shape if has_scores else (0, 0)),
    )
