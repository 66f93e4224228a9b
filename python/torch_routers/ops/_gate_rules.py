"""Derivatives and batching rules of `topk_gate` and `gate`.

Both have the same: the choice of experts has no derivative. ``csrc/gate/gate_kernel.h`` has the
formula of the gradient, which is an operator; `_plain` is what everything rarer is derived from.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from torch_routers._autograd import batched, differentiable, flat, jvp, unflat, vmap_by_loop
from torch_routers.ops._groups import group_of_tokens

_topk_op = torch.ops.torch_routers.topk_gate.default
_gate_op = torch.ops.torch_routers.gate.default
_backward_op = torch.ops.torch_routers._gate_backward.default

#: What the operators call 0, 1, 2.
SCORES = ("softmax", "sigmoid", "sqrt_softplus")


# ---- the formula, and what is derived from it ----------------------------------------------------


class Weighing(NamedTuple):
    """How scores become weights; `csrc/gate/gate_kernel.h`. In the order of the operators."""

    score: int
    renormalize: bool
    epsilon: float
    scale: float

    def scores(self, logits, probs):
        if self.score == SCORES.index("softmax"):
            return probs
        if self.score == SCORES.index("sigmoid"):
            return logits.sigmoid()
        # The root of ln(1 + e^x), which next to 0 is e^x; 0, not NaN, is its slope at -infinity.
        is_small = logits < -20 if logits.dtype == torch.float32 else logits < -40
        small = (logits.where(is_small, 0) / 2).exp()
        return small.where(is_small, F.softplus(logits.where(~is_small, 0), threshold=50).sqrt())


def _plain(logits, indices, weighing, valid_mask, group_offsets):
    """Weights, lse and score sums in plain PyTorch, for given indices.

    The formula to fall back on where there is no kernel; forward mode and the second derivative,
    off the hot path, are derived from it.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = indices >= 0
    if valid_mask is not None:
        kept = kept & valid_mask[:, None]
        logits = logits.where(valid_mask[:, None], 0)
    probs, lse = _softmax(logits)
    scores = weighing.scores(logits, probs)
    slots = indices.clamp(min=0)
    if weighing.score == 0 and weighing.renormalize and weighing.epsilon == 0:
        weights, _ = _softmax(logits.gather(1, slots).where(kept, -torch.inf))
    else:
        weights = scores.gather(1, slots).where(kept, 0)
        if weighing.renormalize:
            weights = _normalized(weights, weighing.epsilon)
    weights = weighing.scale * weights
    if weighing.score != 0:
        scores = _normalized(scores)
    if valid_mask is not None:
        lse, scores = lse.where(valid_mask, 0), scores.where(valid_mask[:, None], 0)
    if group_offsets is None:
        return weights, lse, scores.sum(0, keepdim=True)
    group = group_of_tokens(group_offsets, logits.shape[0])
    empty = scores.new_zeros(group_offsets.shape[0] - 1, scores.shape[1])
    return weights, lse, empty.index_add(0, group, scores)


def _normalized(x, epsilon=0.0):
    """The rows divided by their sums; a row of zeros stays one."""
    total = x.sum(1, keepdim=True) + epsilon
    return x / total.where(total != 0, 1)


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
    *grads, logits, indices, score, renormalize, epsilon, scale, valid_mask, group_offsets = inputs
    ctx.weighing = Weighing(score, renormalize, epsilon, scale)
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
        return _plain_backward(grads, logits, indices, ctx.weighing, valid_mask, group_offsets)

    return function, [inputs[i] for i in present], present


def _double_backward(ctx, grad):
    function, inputs, present = _of_gradients_and_logits(ctx)
    _, vjp = torch.func.vjp(function, *inputs)
    results = dict(zip(present, vjp(grad)))
    return *(results.get(i) for i in range(4)), *[None] * 7


def _backward_jvp(ctx, *tangents):
    function, inputs, present = _of_gradients_and_logits(ctx)
    return jvp(function, inputs, [tangents[i] for i in present])


# ---- batching: more tokens, of which each sample is one group of the statistics, or several -----


def _batched_offsets(offsets, logits):
    batch, tokens = logits.shape[:2]
    starts = tokens * torch.arange(batch + 1, device=logits.device)
    if offsets is None:
        return starts
    return torch.cat([(starts[:-1, None] + offsets[:, :-1]).flatten(), starts[-1:]])


def _gate_vmap(call, *, selects):
    def vmap(info, in_dims, logits, second, *options):
        *options, valid_mask, offsets, statistics = options
        *dims, mask_dim, offsets_dim, _ = in_dims[2:]
        if selects:  # bias and groups of experts are those of every sample; token_top_k is not
            bias_dim, top_dim = dims[4], dims[8]
            if bias_dim is not None:
                return vmap_by_loop(call)(info, in_dims, logits, second, *options, valid_mask,
                                          offsets, statistics)  # fmt: skip
            (options[8],) = batched(info, [top_dim], [options[8]])
            options[8] = flat(options[8])
        else:
            (second,) = batched(info, [in_dims[1]], [second])
            second = flat(second)
        logits, mask, offsets = batched(
            info, (in_dims[0], mask_dim, offsets_dim), (logits, valid_mask, offsets)
        )
        outputs = call(
            flat(logits), second, *options, flat(mask), _batched_offsets(offsets, logits),
            statistics,
        )  # fmt: skip
        # Every result has tokens or groups as its first dimension, or nothing.
        return tuple(unflat(info, x) for x in outputs), (0,) * len(outputs)

    return vmap


def _backward_vmap(info, in_dims, *inputs):
    *tensors, score, renormalize, epsilon, scale, valid_mask, offsets = inputs
    *tensors, mask, offsets = batched(
        info, (*in_dims[:5], *in_dims[9:]), (*tensors, valid_mask, offsets)
    )
    logits = tensors[3]
    grad = _gate_backward(
        *map(flat, tensors), score, renormalize, epsilon, scale, flat(mask),
        _batched_offsets(offsets, logits),
    )  # fmt: skip
    return grad.unflatten(0, logits.shape[:2]), 0


# ---- the operators -------------------------------------------------------------------------------

_gate_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)


def _save(ctx, logits, indices, weighing, valid_mask, group_offsets, statistics):
    ctx.weighing, ctx.statistics = weighing, statistics
    ctx.save_for_backward(logits, indices, valid_mask, group_offsets)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad_weights, grad_lse, grad_sums):
    if not ctx.statistics:
        grad_lse = grad_sums = None
    logits, indices, valid_mask, group_offsets = ctx.saved_tensors
    return _gate_backward(
        grad_weights, grad_lse, grad_sums, logits, indices, *ctx.weighing, valid_mask,
        group_offsets,
    )  # fmt: skip


def _tangents(ctx, tangent):
    logits, indices, valid_mask, group_offsets = ctx.saved_tensors
    weights, lse, sums = jvp(
        lambda x: _plain(x, indices, ctx.weighing, valid_mask, group_offsets),
        [logits],
        [tangent],
    )
    return weights, lse if ctx.statistics else lse[:0], sums if ctx.statistics else sums[:0]


def _topk_setup(ctx, inputs, output):
    logits, _, *weighing = inputs[:6]
    _, indices, _, _, counts, group_tokens = output
    ctx.mark_non_differentiable(indices, counts, group_tokens)
    _save(ctx, logits, indices, Weighing(*weighing), *inputs[11:])


def _topk_backward(ctx, grad_weights, _, grad_lse, grad_sums, *__):
    return _gradient(ctx, grad_weights, grad_lse, grad_sums), *[None] * 13


def _topk_jvp(ctx, tangent, *_):
    weights, lse, sums = _tangents(ctx, tangent)
    return weights, None, lse, sums, None, None


topk_gate = differentiable(
    _topk_op,
    setup_context=_topk_setup,
    backward=_topk_backward,
    jvp=_topk_jvp,
    vmap=_gate_vmap(lambda *inputs: topk_gate(*inputs), selects=True),
    autocast=torch.float32,
)


def _gate_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    logits, indices, *weighing = inputs[:6]
    _save(ctx, logits, indices, Weighing(*weighing), *inputs[6:])


def _gate_backward_formula(ctx, grad_weights, grad_lse, grad_sums, *_):
    return _gradient(ctx, grad_weights, grad_lse, grad_sums), *[None] * 8


def _gate_jvp(ctx, tangent, *_):
    return *_tangents(ctx, tangent), None, None


gate = differentiable(
    _gate_op,
    setup_context=_gate_setup,
    backward=_gate_backward_formula,
    jvp=_gate_jvp,
    vmap=_gate_vmap(lambda *inputs: gate(*inputs), selects=False),
    autocast=torch.float32,
)


def _select_vmap(info, in_dims, scores, top_k, score, bias, groups, kept, best, top, mask):
    if in_dims[3] is not None:
        call = vmap_by_loop(topk_select)
        return call(info, in_dims, scores, top_k, score, bias, groups, kept, best, top, mask)
    scores, top, mask = batched(info, (in_dims[0], *in_dims[7:]), (scores, top, mask))
    tensors = map(flat, (top, mask))
    indices = topk_select(flat(scores), top_k, score, bias, groups, kept, best, *tensors)
    return indices.unflatten(0, scores.shape[:2]), 0


# Indices have no derivative: a tensor that requires grad is used as it is.
topk_select = torch.ops.torch_routers.topk_select.default
torch.library.register_vmap("torch_routers::topk_select", _select_vmap)
