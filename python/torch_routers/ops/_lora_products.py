"""What a mixture of low-rank experts is made of, with every derivative.

Tokens meet the experts of a plan; expert ``e`` has the rows ``ranks[e]:ranks[e + 1]`` of a weight.
For row ``r`` of the plan, of token ``t`` and expert ``e``:

shrink   ``z[r, j] = <weight[ranks[e] + j], x[t]>``, 0 behind the rank of ``e``
expand   ``y[t] = sum over the rows r of t, and j, of z[r, j] weight[ranks[e] + j]``
outer    ``result[ranks[e] + j] = sum over the rows r of e of z[r, j] x[t]``

All are bilinear, and with two of their three arguments given, each is the derivative of
``sum z[r, j] <weight[ranks[e] + j], x[t]>`` with respect to the third: their gradients are each
other.
"""

import torch

from torch_routers._autograd import differentiable, vmap_by_loop

_shrink_op = torch.ops.torch_routers._lora_shrink.default
_expand_op = torch.ops.torch_routers._lora_expand.default
_outer_op = torch.ops.torch_routers._lora_outer.default


@torch.library.register_fake(_shrink_op)
def _shrink_fake(x, weight, order, inverse, offsets, ranks, max_rank):
    return x.new_empty(order.shape[0], max_rank)


@torch.library.register_fake(_expand_op)
def _expand_fake(z, weight, order, inverse, offsets, ranks):
    return z.new_empty(inverse.shape[0], weight.shape[1])


@torch.library.register_fake(_outer_op)
def _outer_fake(z, x, order, inverse, offsets, ranks, size):
    return x.new_empty(size, x.shape[1])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.size = inputs[6:]


def _shrink_backward(ctx, grad):
    x, weight, *plan = ctx.saved_tensors
    need_x, need_weight, *_ = ctx.needs_input_grad
    grad_x = expand(grad, weight, *plan) if need_x else None
    grad_weight = outer(grad, x, *plan, weight.shape[0]) if need_weight else None
    return grad_x, grad_weight, None, None, None, None, None


def _expand_backward(ctx, grad):
    z, weight, *plan = ctx.saved_tensors
    need_z, need_weight, *_ = ctx.needs_input_grad
    grad_z = shrink(grad, weight, *plan, z.shape[1]) if need_z else None
    grad_weight = outer(z, grad, *plan, weight.shape[0]) if need_weight else None
    return grad_z, grad_weight, None, None, None, None


def _outer_backward(ctx, grad):
    z, x, *plan = ctx.saved_tensors
    need_z, need_x, *_ = ctx.needs_input_grad
    grad_z = shrink(x, grad, *plan, z.shape[1]) if need_z else None
    grad_x = expand(z, grad, *plan) if need_x else None
    return grad_z, grad_x, None, None, None, None, None


def _bilinear(op, backward):
    def jvp(ctx, first_tangent, second_tangent, *_):
        first, second, *plan = ctx.saved_tensors
        terms = []
        if first_tangent is not None:
            terms.append(call(first_tangent, second, *plan, *ctx.size))
        if second_tangent is not None:
            terms.append(call(first, second_tangent, *plan, *ctx.size))
        return sum(terms[1:], terms[0])

    call = differentiable(
        op,
        setup_context=_setup,
        backward=backward,
        jvp=jvp,
        vmap=vmap_by_loop(lambda *inputs: call(*inputs)),
    )
    return call


shrink = _bilinear(_shrink_op, _shrink_backward)
expand = _bilinear(_expand_op, _expand_backward)
outer = _bilinear(_outer_op, _outer_backward)
