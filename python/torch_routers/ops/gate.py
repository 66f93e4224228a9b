r"""From logits to the experts of each token and their combine weights.

With :math:`s = \mathrm{score}(x)` and :math:`i_j` the expert in slot :math:`j`,

.. math::  w_j = c\, s_{i_j}, \quad\text{or}\quad
           w_j = c\, s_{i_j} \Big/ \Big(\sum_l s_{i_l} + \varepsilon\Big) \text{ if renormalised}

`topk_select` picks experts, `gate` weighs given ones, `topk_gate` does both in one pass; weights,
statistics and derivatives are the same code.
"""

from typing import NamedTuple

from torch import Tensor

from torch_routers.ops import _gate_rules, _gate_shapes  # noqa: F401  (registers the shapes)


class Statistics(NamedTuple):
    """By-products of the pass over the logits, for losses and metrics. Masked tokens are in none.

    Tokens form ``groups`` (one, unless ``group_offsets`` says otherwise). The first two are
    differentiable, and None where they were not asked for.
    """

    lse: Tensor | None
    """``[...]``: log-sum-exp of the logits of each token; 0 where it is masked."""
    score_sums: Tensor | None
    """``[groups, num_experts]``: sum of the scores of each token, which are made to sum to one."""
    group_counts: Tensor
    """``[groups, num_experts]`` int64: slots given to each expert."""
    group_tokens: Tensor
    """``[groups]`` int64: tokens that are not masked."""


def topk_gate(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    epsilon: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    token_top_k: Tensor | None = None,
    valid_mask: Tensor | None = None,
    group_offsets: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Statistics]:
    """Give each token the ``top_k`` experts of its largest logits, and weigh them.

    Equal logits: the lower index first; -0 equals 0; NaN comes before everything, so that a row
    with a NaN has NaN weights. The indices of a token are always distinct. They have the same bits
    on every device and instruction set.

    Args:
        logits: ``[..., num_experts]``, float32, float64, bfloat16 or float16. The arithmetic is in
            float32, or float64 for float64.
        top_k: slots per token, at most ``num_experts``.
        score: ``"softmax"``, ``"sigmoid"`` (DeepSeek-V3, arXiv 2412.19437) or ``"sqrt_softplus"``,
            the square root of :math:`\\ln(1 + e^x)`.
        renormalize: make the weights of each token sum to ``scale`` (Mixtral, arXiv 2401.04088).
            Otherwise they are the scores of the chosen experts times ``scale`` (OLMoE, arXiv
            2409.02060). With ``top_k=1`` a renormalised weight is constant, and the router learns
            from the losses alone.
        epsilon: added to the sum that renormalised weights are divided by. Default: 0 for softmax,
            which needs none, else 1e-20 (DeepSeek-V3). DeepSeek-V1 and V2 have 1e-20 with softmax.
        scale: factor of all weights (``routed_scaling_factor`` of DeepSeek; 2.5 in V3).
        bias, num_groups, topk_group, group_score, token_top_k: as in `topk_select`. They choose
            experts; weights come from the scores without bias.
        valid_mask: ``[...]`` bool, True = real token. A masked token has indices -1 and weights 0,
            is in no statistic, and its logits are never looked at. Default: all are real.
        group_offsets: ``[groups + 1]`` int64, ascending from 0 to the number of tokens (counted
            over the flattened leading dimensions). Default: one group.
        statistics: also return ``lse`` and ``score_sums``.

    Returns:
        ``weights`` ``[..., top_k]`` float32 (float64 for float64 logits), ``indices``
        ``[..., top_k]`` int64, best first, and `Statistics`.

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
    x = _rows("topk_gate", "logits", logits)
    weights, indices, *rest = _gate_rules.topk_gate(
        x,
        top_k,
        _score("topk_gate", score),
        renormalize,
        _EPSILON[score] if epsilon is None else epsilon,
        scale,
        bias,
        num_groups,
        topk_group,
        _group_best("topk_gate", group_score, top_k, topk_group),
        _per_token("topk_gate", "token_top_k", token_top_k, logits),
        _per_token("topk_gate", "valid_mask", valid_mask, logits),
        group_offsets,
        statistics,
    )
    if logits.dim() != 2:
        shape = (*logits.shape[:-1], top_k)
        weights, indices = weights.view(shape), indices.view(shape)
    return weights, indices, _statistics(logits, statistics, *rest)


def gate(
    logits: Tensor,
    indices: Tensor,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    epsilon: float | None = None,
    scale: float = 1.0,
    valid_mask: Tensor | None = None,
    group_offsets: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Statistics]:
    """The weights and statistics of `topk_gate` for experts chosen by another rule, or earlier.

    Args:
        logits: ``[..., num_experts]``, as in `topk_gate`.
        indices: ``[..., slots]`` int64 in ``[-1, num_experts)``; -1 is an empty slot, of weight 0,
            counted nowhere. A masked token's indices are ignored.
        score, renormalize, epsilon, scale, valid_mask, group_offsets, statistics: as in
            `topk_gate`.

    Returns:
        ``weights`` ``[..., slots]`` float32 (float64 for float64 logits), and `Statistics`.

    Raises:
        ValueError: an argument that does not fit. On CUDA an index out of range cannot be reported
            without a synchronisation: its weight is NaN.

    >>> weights, statistics = gate(torch.zeros(1, 4), torch.tensor([[3, -1]]), renormalize=False)
    >>> weights, statistics.group_counts
    (tensor([[0.2500, 0.0000]]), tensor([[0, 0, 0, 1]]))
    """
    x = _rows("gate", "logits", logits)
    if indices.dim() != logits.dim() or indices.shape[:-1] != logits.shape[:-1]:
        leading = "".join(f"{size}, " for size in logits.shape[:-1])
        raise ValueError(
            f"gate: expected indices of shape [{leading}slots], got {list(indices.shape)}"
        )
    slots = indices.shape[-1]
    weights, *rest = _gate_rules.gate(
        x,
        indices.reshape(x.shape[0], slots),
        _score("gate", score),
        renormalize,
        _EPSILON[score] if epsilon is None else epsilon,
        scale,
        _per_token("gate", "valid_mask", valid_mask, logits),
        group_offsets,
        statistics,
    )
    return weights.view(indices.shape), _statistics(logits, statistics, *rest)


def topk_select(
    scores: Tensor,
    top_k: int,
    *,
    score: str | None = None,
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    token_top_k: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """The ``top_k`` experts of each token, best first; the choice has no derivative.

    Experts are compared by ``scores``, in the order that `topk_gate` states. With a ``bias`` it is
    ``score(scores) + bias`` that is compared. With groups (DeepSeek-V2, arXiv 2405.04434, and V3)
    the experts of the ``topk_group`` best groups alone are compared, whatever their values are.

    Args:
        scores: ``[..., num_experts]``, float32, float64, bfloat16 or float16.
        top_k: experts per token, at most ``num_experts``, or those of ``topk_group`` groups.
        score: name of a score of `topk_gate` that is applied first, ``scores`` being logits.
            Default: none.
        bias: ``[num_experts]`` float32 (float64 for float64 scores), such as that of loss-free
            balancing (arXiv 2408.15664).
        num_groups: groups of equal size, of neighbouring experts. Default: no groups.
        topk_group: groups that are kept for each token.
        group_score: the value of a group: ``"top2_sum"``, the sum of its two best (DeepSeek-V3),
            ``"topk_sum"``, of its ``top_k // topk_group`` best (Megatron-LM), or ``"max"``
            (DeepSeek-V2).
        token_top_k: ``[...]`` int64 in ``[0, top_k]``, slots that a token uses; the others get -1.
            Default: ``top_k``.
        valid_mask: ``[...]`` bool, True = real token; a masked token gets -1 in all slots.

    Returns:
        ``[..., top_k]`` int64.

    Raises:
        ValueError: an argument that does not fit.

    >>> topk_select(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), 2, bias=torch.tensor([0.0, 0, 0, 9]))
    tensor([[3, 1]])
    """
    indices = _gate_rules.topk_select(
        _rows("topk_select", "scores", scores),
        top_k,
        len(_SCORES) if score is None else _score("topk_select", score),
        bias,
        num_groups,
        topk_group,
        _group_best("topk_select", group_score, top_k, topk_group),
        _per_token("topk_select", "token_top_k", token_top_k, scores),
        _per_token("topk_select", "valid_mask", valid_mask, scores),
    )
    return indices.view(*scores.shape[:-1], top_k)


_SCORES = {name: number for number, name in enumerate(_gate_rules.SCORES)}
_EPSILON = {"softmax": 0.0, "sigmoid": 1e-20, "sqrt_softplus": 1e-20}
_GROUP_SCORES = {"max": 1, "top2_sum": 2, "topk_sum": None}


def _score(op: str, score: str) -> int:
    if score not in _SCORES:
        raise ValueError(f"{op}: expected score among {list(_SCORES)}, got {score!r}")
    return _SCORES[score]


def _group_best(op: str, group_score: str, top_k: int, topk_group: int) -> int:
    """How many scores of a group are added up."""
    if group_score not in _GROUP_SCORES:
        raise ValueError(
            f"{op}: expected group_score among {list(_GROUP_SCORES)}, got {group_score!r}"
        )
    return _GROUP_SCORES[group_score] or max(1, top_k // max(1, topk_group))


def _rows(op: str, name: str, logits: Tensor) -> Tensor:
    if logits.dim() == 2 and logits.shape[1] >= 1:
        return logits
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected {name} of shape [..., num_experts] with num_experts >= 1, "
            f"got {list(logits.shape)}"
        )
    return logits.reshape(-1, logits.shape[-1])


def _per_token(op: str, name: str, values: Tensor | None, logits: Tensor) -> Tensor | None:
    if values is None:
        return None
    if values.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: expected {name} of shape {list(logits.shape[:-1])}, one value per token, "
            f"got {list(values.shape)}"
        )
    return values.reshape(-1)


def _statistics(logits, asked, lse, score_sums, counts, group_tokens) -> Statistics:
    if not asked:
        return Statistics(None, None, counts, group_tokens)
    lse = lse if logits.dim() == 2 else lse.view(logits.shape[:-1])
    return Statistics(lse, score_sums, counts, group_tokens)
