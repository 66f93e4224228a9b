"""The gate operators as torch.compile and torch.export see them: shapes and what is wrong."""

import torch

from torch_routers.ops._check import check, check_dtype

_FLOATING = torch.float32, torch.float64, torch.bfloat16, torch.float16


@torch.library.register_fake("torch_routers::topk_gate")
def _topk_fake(
    logits, top_k, score, renormalize, epsilon, scale, bias, num_groups, topk_group, group_best,
    token_top_k, valid_mask, group_offsets, statistics,
):  # fmt: skip
    op = "topk_gate"
    _check_weighing(op, epsilon)
    _check_selection(op, logits, top_k, bias, num_groups, topk_group, group_best, token_top_k)
    weights, *rest = _results(op, logits, top_k, valid_mask, group_offsets, statistics)
    return weights, logits.new_empty((logits.shape[0], top_k), dtype=torch.int64), *rest


@torch.library.register_fake("torch_routers::gate")
def _gate_fake(
    logits, indices, score, renormalize, epsilon, scale, valid_mask, group_offsets, statistics
):
    check_dtype("gate", "indices", indices, torch.int64)
    _check_weighing("gate", epsilon)
    return _results("gate", logits, indices.shape[1], valid_mask, group_offsets, statistics)


@torch.library.register_fake("torch_routers::topk_select")
def _select_fake(
    scores, top_k, score, bias, num_groups, topk_group, group_best, token_top_k, valid_mask
):
    op = "topk_select"
    check_dtype(op, "scores", scores, *_FLOATING)
    if valid_mask is not None:
        check_dtype(op, "valid_mask", valid_mask, torch.bool)
    _check_selection(op, scores, top_k, bias, num_groups, topk_group, group_best, token_top_k)
    return scores.new_empty((scores.shape[0], top_k), dtype=torch.int64)


@torch.library.register_fake("torch_routers::_gate_backward")
def _backward_fake(
    grad_weights, grad_lse, grad_sums, logits, indices, score, renormalize, epsilon, scale,
    valid_mask, group_offsets,
):  # fmt: skip
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _compute_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_weighing(op, epsilon):
    check(epsilon >= 0, lambda: f"{op}: expected epsilon >= 0, got {epsilon:g}")


def _check_selection(op, logits, top_k, bias, num_groups, topk_group, group_best, token_top_k):
    num_experts = logits.shape[1]
    check(
        1 <= top_k <= num_experts,
        lambda: f"{op}: expected top_k in [1, num_experts={num_experts}], got {top_k}",
    )
    if bias is not None:
        dtype = _compute_dtype(logits)
        check(
            tuple(bias.shape) == (num_experts,),
            lambda: (
                f"{op}: expected bias of shape [num_experts={num_experts}], got {list(bias.shape)}"
            ),
        )
        check_dtype(op, "bias", bias, dtype)
    check(
        num_groups >= 1 and num_experts % num_groups == 0,
        lambda: f"{op}: expected num_groups to divide num_experts={num_experts}, got {num_groups}",
    )
    if num_groups > 1:
        size = num_experts // num_groups
        check(
            1 <= topk_group <= num_groups,
            lambda: f"{op}: expected topk_group in [1, num_groups={num_groups}], got {topk_group}",
        )
        check(
            1 <= group_best <= size,
            lambda: (
                f"{op}: expected group_score to add up at most the {size} experts of a group, "
                f"got {group_best}"
            ),
        )
        check(
            top_k <= topk_group * size,
            lambda: (
                f"{op}: expected top_k at most the {topk_group * size} experts of topk_group "
                f"groups, got {top_k}"
            ),
        )
    if token_top_k is not None:
        check_dtype(op, "token_top_k", token_top_k, torch.int64)


def _results(op, logits, slots, valid_mask, group_offsets, statistics):
    check_dtype(op, "logits", logits, *_FLOATING)
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
    dtype = _compute_dtype(logits)
    return (
        logits.new_empty((tokens, slots), dtype=dtype),
        logits.new_empty(tokens if statistics else 0, dtype=dtype),
        logits.new_empty((groups if statistics else 0, num_experts), dtype=dtype),
        logits.new_empty((groups, num_experts), dtype=torch.int64),
        logits.new_empty(groups, dtype=torch.int64),
    )
