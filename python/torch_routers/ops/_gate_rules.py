"""Derivatives and batching rules of `topk_gate` and `gate`.

Both have the same: the choice of experts has no derivative. ``csrc/gate/gate_kernel.h`` has the
formula of the gradient, which is an operator; `_plain` is what everything rarer is derived from.
"""

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, jvp

_topk_op = torch.ops.torch_routers.topk_gate.default
_gate_op = torch.ops.torch_routers.gate.default
_backward_op = torch.ops.torch_routers._gate_backward.default


# ---- the formula, and what is derived from it ----------------------------------------------------


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


# ---- batching: more tokens, of which each sample is one group of the statistics, or several -----


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


# ---- the operators -------------------------------------------------------------------------------

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


topk_gate = differentiable(
    _topk_op,
    setup_context=_topk_setup,
    backward=_topk_backward,
    jvp=_topk_jvp,
    vmap=_gate_vmap(lambda *inputs: topk_gate(*inputs)),
    autocast=torch.float32,
)


def _gate_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, *inputs)


def _gate_backward_formula(ctx, grad_weights, grad_lse, grad_sums, *_):
    return _gradient(ctx, grad_weights, grad_lse, grad_sums), None, None, None, None, None


def _gate_jvp(ctx, tangent, *_):
    return *_tangents(ctx, tangent), None, None


gate = differentiable(
    _gate_op,
    setup_context=_gate_setup,
    backward=_gate_backward_formula,
    jvp=_gate_jvp,
    vmap=_gate_vmap(lambda *inputs: gate(*inputs)),
    autocast=torch.float32,
)
