"""Derivatives and batching rules of `router_losses`; `_plain` is what all but the first derivative
are derived from. ``csrc/router_losses/router_losses_kernel.h`` has the formulas.
"""

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, jvp

_op = torch.ops.torch_routers.router_losses.default
_backward_op = torch.ops.torch_routers._router_losses_backward.default


# ---- the formula, and what is derived from it ----------------------------------------------------


def _plain(
    lse, score_sums, counts, group_tokens, balance, z, importance, switch, per_group, unbiased
):
    """The weighted sum of the losses, and each of them without gradient, in plain PyTorch."""
    like = lse if z is not None else score_sums
    tokens = group_tokens.sum()
    values = [like.new_zeros(())] * 3
    if balance is not None:
        values[0] = _balance(score_sums, counts, group_tokens, switch, per_group)
    if z is not None:
        values[1] = lse.where(lse != -torch.inf, 0).square().sum() / tokens.clamp(min=1)
    if importance is not None:
        values[2] = _importance(score_sums.sum(0), unbiased)
    weights = balance, z, importance
    total = sum(weight * value for weight, value in zip(weights, values) if weight is not None)
    return total, torch.stack(values).detach()


def _balance(score_sums, counts, group_tokens, switch, per_group):
    if not per_group:
        score_sums, counts = score_sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
        group_tokens = group_tokens.sum(0, keepdim=True)
    tokens = group_tokens.clamp(min=1)
    slots = tokens if switch else counts.sum(1).clamp(min=1)
    shares = counts.to(score_sums.dtype) / slots.unsqueeze(1)
    losses = counts.shape[1] * (shares * score_sums).sum(1) / tokens
    return losses.sum() / (group_tokens > 0).sum().clamp(min=1)


def _importance(sums, unbiased):
    num_experts = sums.shape[0]
    mean = sums.mean()
    variance = (sums - mean).square().sum() / max(1, num_experts - unbiased)
    return (variance / mean.where(mean != 0, 1).square()).where(mean != 0, 0)


def _plain_backward(grad, lse, score_sums, *rest):
    """The gradients of lse and score sums, empty for what no loss needs."""
    _, vjp = torch.func.vjp(lambda *inputs: _plain(*inputs, *rest)[0], lse, score_sums)
    return vjp(grad)


def _saved(ctx):
    """The differentiable inputs, empty where no loss needs them, and the other inputs."""
    *inputs, lse, score_sums, counts, group_tokens = ctx.saved_tensors
    balance, z, importance, *_ = ctx.options
    like = lse if z is not None else score_sums
    if z is None:
        lse = like.new_empty(0)
    if balance is None and importance is None:
        score_sums = like.new_empty(0, 0)
    return [*inputs, lse, score_sums], (counts, group_tokens, *ctx.options)


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.options = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _double_backward(ctx, *grads):
    inputs, rest = _saved(ctx)
    _, vjp = torch.func.vjp(lambda *inputs: _plain_backward(*inputs, *rest), *inputs)
    gradients = vjp(grads)
    return *_of_needed(ctx, *gradients), *[None] * 8


def _backward_jvp(ctx, *tangents):
    inputs, rest = _saved(ctx)
    return jvp(
        lambda *inputs: _plain_backward(*inputs, *rest),
        inputs,
        tangents,
    )


def _of_needed(ctx, *gradients):
    """The gradients, the last two of which are of lse and score sums, None if these are unused."""
    *first, grad_lse, grad_sums = gradients
    balance, z, importance, *_ = ctx.options
    needs_sums = balance is not None or importance is not None
    return *first, grad_lse if z is not None else None, grad_sums if needs_sums else None


# ---- batching: the plain formula maps over a batch -----------------------------------------------


def _vmap(function):
    def vmap(info, in_dims, *inputs):
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]

        def of_tensors(*values):
            full = list(inputs)
            for i, value in zip(tensors, values):
                full[i] = value
            return function(*full)

        dims = tuple(in_dims[i] for i in tensors)
        return torch.func.vmap(of_tensors, dims)(*(inputs[i] for i in tensors)), (0, 0)

    return vmap


# ---- the operators -------------------------------------------------------------------------------

_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_vmap(_plain_backward),
)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, _):
    if grad is None:
        return (None,) * 10
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return *_of_needed(ctx, *gradients), *[None] * 8


def _tangents(ctx, *tangents):
    inputs, rest = _saved(ctx)
    tangent = jvp(
        lambda *inputs: _plain(*inputs, *rest)[0],
        inputs,
        tangents,
    )
    return tangent, None


router_losses = differentiable(
    _op, setup_context=_setup, backward=_gradient, jvp=_tangents, vmap=_vmap(_plain)
)
