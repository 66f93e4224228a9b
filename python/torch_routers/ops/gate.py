r"""From logits to the experts of each token and their combine weights.

With :math:`p = \mathrm{softmax}(x)` over the experts and :math:`i_j` the expert in slot :math:`j`,

.. math::  w_j = p_{i_j}, \quad\text{or}\quad w_j = p_{i_j} / \sum_l p_{i_l} \text{ if renormalised}

`topk_gate` picks the experts of the largest logits, `gate` takes them as given; weights, statistics
and derivatives are the same code. ``csrc/gate/gate_kernel.h`` has the formulas of the gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, jvp
from torch_routers.ops._check import check, check_dtype

_topk_op = torch.ops.torch_routers.topk_gate.default
_gate_op = torch.ops.torch_routers.gate.default
_backward_op = torch.ops.torch_routers._gate_backward.default


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
    weights, indices, *rest = _topk_gate(x, top_k, renormalize, mask, group_offsets, statistics)
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
    weights, *rest = _gate(
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


@torch.library.register_fake(_topk_op)
def _topk_fake(logits, top_k, renormalize, valid_mask, group_offsets, statistics):
    num_experts = logits.shape[1]
    check(
        1 <= top_k <= num_experts,
        lambda: f"topk_gate: expected top_k in [1, num_experts={num_experts}], got {top_k}",
    )
    indices = logits.new_empty((logits.shape[0], top_k), dtype=torch.int64)
    weights, *rest = _shapes("topk_gate", logits, top_k, valid_mask, group_offsets, statistics)
    return weights, indices, *rest


@torch.library.register_fake(_gate_op)
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


@torch.library.register_fake(_backward_op)
def _backward_fake(
    grad_weights, grad_lse, grad_sums, logits, indices, renormalize, valid_mask, group_offsets
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# ---- derivatives ---------------------------------------------------------------------------------


def _plain(logits, indices, renormalize, valid_mask, group_offsets):
    """Weights, lse and score sums in plain PyTorch, for given indices.

    The formula to fall back on where there is no kernel; forward mode and the second derivative,
    off the hot path, are derived from it.
    """
    kept = indices >= 0
    if valid_mask is not None:
        kept = kept & valid_mask[:, None]
        logits = logits.where(valid_mask[:, None], 0)
    probs, lse = _softmax(logits)
    if renormalize:
        chosen = logits.gather(1, indices.clamp(min=0)).where(kept, -torch.inf)
        weights, _ = _softmax(chosen)
    else:
        weights = probs.gather(1, indices.clamp(min=0)).where(kept, 0)
    if valid_mask is not None:
        lse, probs = lse.where(valid_mask, 0), probs.where(valid_mask[:, None], 0)
    if group_offsets is None:
        return weights, lse, probs.sum(0, keepdim=True)
    token = torch.arange(logits.shape[0], device=logits.device)
    group = torch.searchsorted(group_offsets[1:].contiguous(), token, right=True)
    empty = probs.new_zeros(group_offsets.shape[0] - 1, probs.shape[1])
    return weights, lse, empty.index_add(0, group, probs)


def _softmax(x):
    """Softmax and log-sum-exp of each row; 0 and -inf, without gradient, where all is -inf."""
    empty = (x == -torch.inf).all(1, keepdim=True)
    x = x.where(~empty, 0)
    return x.softmax(1).where(~empty, 0), x.logsumexp(1).where(~empty[:, 0], -torch.inf)


def _plain_backward(grads, logits, *rest):
    """The gradient of the logits; ``grads`` of weights, lse and score sums, or None."""
    outputs, vjp = torch.func.vjp(lambda x: _plain(x, *rest), logits)
    return vjp(_or_zeros(grads, outputs))[0]


def _or_zeros(grads, outputs):
    return tuple(torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs))


def _setup_backward(ctx, inputs, output):
    *grads, logits, indices, ctx.renormalize, valid_mask, group_offsets = inputs
    ctx.save_for_backward(*grads, logits, indices, valid_mask, group_offsets)


def _of_gradients_and_logits(ctx):
    """The backward as a function of its differentiable inputs that are there, and those."""
    *inputs, indices, valid_mask, group_offsets = ctx.saved_tensors
    present = [i for i, x in enumerate(inputs) if x is not None]

    def function(*values):
        full = [None] * 4
        for i, value in zip(present, values):
            full[i] = value
        *grads, logits = full
        return _plain_backward(grads, logits, indices, ctx.renormalize, valid_mask, group_offsets)

    return function, [inputs[i] for i in present], present


def _double_backward(ctx, grad):
    function, inputs, present = _of_gradients_and_logits(ctx)
    _, vjp = torch.func.vjp(function, *inputs)
    results = dict(zip(present, vjp(grad)))
    return *(results.get(i) for i in range(4)), None, None, None, None


def _backward_jvp(ctx, *tangents):
    function, inputs, present = _of_gradients_and_logits(ctx)
    directions = [
        torch.zeros_like(x) if tangents[i] is None else tangents[i] for i, x in zip(present, inputs)
    ]
    return jvp(function, inputs, directions)


# A batch becomes more tokens, and each of its samples a group, or several, of the statistics.


def _batched(info, in_dims, tensors):
    """Each tensor with the batch as its first dimension; None stays."""
    return [
        None
        if x is None
        else x.expand(info.batch_size, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims)
    ]


def _flat(x):
    return None if x is None else x.flatten(0, 1)


def _batched_offsets(offsets, logits):
    batch, tokens = logits.shape[:2]
    starts = tokens * torch.arange(batch + 1, device=logits.device)
    if offsets is None:
        return starts
    return torch.cat([(starts[:-1, None] + offsets[:, :-1]).flatten(), starts[-1:]])


def _gate_vmap(call):
    def vmap(info, in_dims, logits, indices, renormalize, valid_mask, offsets, statistics):
        selects = not isinstance(indices, Tensor)
        logits, given, mask, offsets = _batched(
            info,
            (in_dims[0], None if selects else in_dims[1], *in_dims[3:5]),
            (logits, None if selects else indices, valid_mask, offsets),
        )
        outputs = call(
            _flat(logits),
            indices if selects else _flat(given),
            renormalize,
            _flat(mask),
            _batched_offsets(offsets, logits),
            statistics,
        )
        # Every result has tokens or groups as its first dimension, or nothing.
        return tuple(
            x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size)) for x in outputs
        ), (0,) * len(outputs)

    return vmap


def _backward_vmap(info, in_dims, *inputs):
    *tensors, renormalize, valid_mask, offsets = inputs
    *tensors, mask, offsets = _batched(
        info, (*in_dims[:5], *in_dims[6:]), (*tensors, valid_mask, offsets)
    )
    logits = tensors[3]
    grad = _gate_backward(
        *map(_flat, tensors), renormalize, _flat(mask), _batched_offsets(offsets, logits)
    )
    return grad.unflatten(0, logits.shape[:2]), 0


_gate_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)


def _save(ctx, logits, indices, renormalize, valid_mask, group_offsets, statistics):
    ctx.renormalize, ctx.statistics = renormalize, statistics
    ctx.save_for_backward(logits, indices, valid_mask, group_offsets)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_weights, grad_lse, grad_sums):
    if not ctx.statistics:
        grad_lse = grad_sums = None
    logits, indices, valid_mask, group_offsets = ctx.saved_tensors
    return _gate_backward(
        grad_weights, grad_lse, grad_sums, logits, indices, ctx.renormalize, valid_mask,
        group_offsets,
    )  # fmt: skip


def _tangents(ctx, tangent):
    logits, indices, valid_mask, group_offsets = ctx.saved_tensors
    weights, lse, sums = jvp(
        lambda x: _plain(x, indices, ctx.renormalize, valid_mask, group_offsets),
        [logits],
        [tangent],
    )
    return weights, lse if ctx.statistics else lse[:0], sums if ctx.statistics else sums[:0]


def _topk_setup(ctx, inputs, output):
    logits, _, *options = inputs
    _, indices, _, _, counts, group_tokens = output
    ctx.mark_non_differentiable(indices, counts, group_tokens)
    _save(ctx, logits, indices, *options)


def _topk_backward(ctx, grad_weights, _, grad_lse, grad_sums, *__):
    return _gradient(ctx, grad_weights, grad_lse, grad_sums), None, None, None, None, None


def _topk_jvp(ctx, tangent, *_):
    weights, lse, sums = _tangents(ctx, tangent)
    return weights, None, lse, sums, None, None


_topk_gate = differentiable(
    _topk_op,
    setup_context=_topk_setup,
    backward=_topk_backward,
    jvp=_topk_jvp,
    vmap=_gate_vmap(lambda *inputs: _topk_gate(*inputs)),
    autocast=torch.float32,
)


def _gate_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, *inputs)


def _gate_backward_formula(ctx, grad_weights, grad_lse, grad_sums, *_):
    return _gradient(ctx, grad_weights, grad_lse, grad_sums), None, None, None, None, None


def _gate_jvp(ctx, tangent, *_):
    return *_tangents(ctx, tangent), None, None


_gate = differentiable(
    _gate_op,
    setup_context=_gate_setup,
    backward=_gate_backward_formula,
    jvp=_gate_jvp,
    vmap=_gate_vmap(lambda *inputs: _gate(*inputs)),
    autocast=torch.float32,
)
