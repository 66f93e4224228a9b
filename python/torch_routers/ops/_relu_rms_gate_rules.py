"""Derivatives of `relu_rms_gate`; `_plain` is what all but the first derivative are derived from.

``csrc/relu_rms_gate/relu_rms_gate_kernel.h`` has the formulas.
"""

import torch

from torch_routers._autograd import differentiable, jvp, vmap_by_loop

_op = torch.ops.torch_routers.relu_rms_gate.default
_backward_op = torch.ops.torch_routers._relu_rms_gate_backward.default

#: What the operators call 0, 1, 2.
NORMS = ("rms", "centered", "simple")


def _plain(logits, gain, eps, norm, valid_mask):
    """The weights in plain PyTorch."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if valid_mask is not None:
        logits = logits.where(valid_mask[:, None], 0)
    a = logits.relu()
    mean = (
        a.mean(1, keepdim=True) if norm == NORMS.index("centered") else torch.zeros_like(a[:, :1])
    )
    if norm != NORMS.index("simple"):
        inverse = ((a - mean).square().mean(1, keepdim=True) + eps).rsqrt()
        a = (a - mean.where(a > 0, 0)) * inverse
    weights = a * gain
    return weights if valid_mask is None else weights.where(valid_mask[:, None], 0)


def _plain_backward(grad, logits, gain, *rest):
    """The gradients of logits and gain."""
    _, vjp = torch.func.vjp(lambda *inputs: _plain(*inputs, *rest), logits, gain)
    return vjp(grad)


def _setup_backward(ctx, inputs, output):
    grad, logits, gain, *ctx.options, valid_mask = inputs
    ctx.save_for_backward(grad, logits, gain, valid_mask)


def _double_backward(ctx, *grads):
    *inputs, valid_mask = ctx.saved_tensors
    _, vjp = torch.func.vjp(
        lambda *inputs: _plain_backward(*inputs, *ctx.options, valid_mask), *inputs
    )
    return *vjp(grads), None, None, None


def _backward_jvp(ctx, *tangents):
    *inputs, valid_mask = ctx.saved_tensors
    return jvp(
        lambda *inputs: _plain_backward(*inputs, *ctx.options, valid_mask),
        inputs,
        tangents,
    )


_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=vmap_by_loop(lambda *inputs: _backward(*inputs)),
)


def _setup(ctx, inputs, output):
    logits, gain, *ctx.options, valid_mask = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, gain, valid_mask)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    logits, gain, valid_mask = ctx.saved_tensors
    return *_backward(grad, logits, gain, *ctx.options, valid_mask), None, None, None


def _tangents(ctx, *tangents):
    logits, gain, valid_mask = ctx.saved_tensors
    tangent = jvp(
        lambda *inputs: _plain(*inputs, *ctx.options, valid_mask),
        [logits, gain],
        tangents,
    )
    return tangent, None, None


relu_rms_gate = differentiable(
    _op,
    setup_context=_setup,
    backward=_gradient,
    jvp=_tangents,
    vmap=vmap_by_loop(lambda *inputs: relu_rms_gate(*inputs)),
    autocast=torch.float32,
)
