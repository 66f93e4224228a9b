r"""One linear map per expert, for rows that are sorted by expert.

.. math::  y_n = W_e x_n \qquad n \in [\mathrm{offsets}_e, \mathrm{offsets}_{e+1})

The gradient of the weight is the other operator of this file, the grouped outer product; the
gradients of either are calls of the two again, so derivatives of any order exist.
"""

import torch
from torch import Tensor

from torch_routers._autograd import autocast_dtype, differentiable, vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name

_linear_op = torch.ops.torch_routers.grouped_linear.default
_outer_op = torch.ops.torch_routers._grouped_outer.default


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert by the expert's weight.

    Args:
        x: ``[rows, in_features]``, float32, float64, bfloat16 or float16; rows sorted by expert.
        weight: ``[num_experts, out_features, in_features]``, in the dtype of ``x``.
        offsets: ``[num_experts + 1]`` int64, ascending from 0: rows ``offsets[e]:offsets[e + 1]``
            belong to expert ``e``. Rows behind ``offsets[-1]`` belong to none and are never read.

    Returns:
        ``[rows, out_features]`` in the dtype of ``x``; zero in rows that belong to no expert.

    Raises:
        ValueError: a shape, dtype or offset that does not fit.

    Under autocast the operands are converted as those of ``torch.nn.functional.linear`` are. On
    CUDA the offsets are copied to the host, which waits for the device.

    >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_linear(x, weight, torch.tensor([0, 1, 2]))
    tensor([[1., 1.],
            [2., 2.],
            [0., 0.]])
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
    return _grouped_linear(x, weight, offsets)


# ---- shapes --------------------------------------------------------------------------------------


_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


@torch.library.register_fake(_linear_op)
def _linear_fake(x, weight, offsets):
    op = "grouped_linear: expected"
    check(x.dim() == 2, lambda: f"{op} x of shape [rows, in_features], got {list(x.shape)}")
    check_dtype("grouped_linear", "x", x, *_DTYPES)
    check(
        weight.dim() == 3 and weight.shape[2] == x.shape[1],
        lambda: (
            f"{op} weight of shape [num_experts, out_features, in_features={x.shape[1]}], "
            f"got {list(weight.shape)}"
        ),
    )
    check(
        weight.dtype == x.dtype,
        lambda: f"{op} weight in the dtype of x, {dtype_name(x)}, got {dtype_name(weight)}",
    )
    num_offsets = weight.shape[0] + 1
    check(
        offsets.dim() != 1 or offsets.shape[0] == num_offsets,
        lambda: (
            f"{op} offsets of shape [num_experts + 1], here [{num_offsets}], "
            f"got {list(offsets.shape)}"
        ),
    )
    check_dtype("grouped_linear", "offsets", offsets, torch.int64)
    check(
        offsets.dim() == 1,
        lambda: f"{op} offsets of shape [num_experts + 1], got {list(offsets.shape)}",
    )
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake(_outer_op)
def _outer_fake(y, x, offsets):
    return x.new_empty(offsets.shape[0] - 1, y.shape[1], x.shape[1])


# ---- derivatives ---------------------------------------------------------------------------------
# Both operators are bilinear: with y = linear(x, w), dy = linear(dx, w) + linear(x, dw), and
# transposed, dx = linear(dy, w') and dw = outer(dy, x).


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, grad):
    x, weight, offsets = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_linear(grad, weight.transpose(1, 2), offsets)
    if ctx.needs_input_grad[1]:
        grad_weight = _grouped_outer(grad, x, offsets)
    return grad_x, grad_weight, None


def _outer_backward(ctx, grad):
    y, x, offsets = ctx.saved_tensors
    grad_y = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_y = _grouped_linear(x, grad, offsets)
    if ctx.needs_input_grad[1]:
        grad_x = _grouped_linear(y, grad.transpose(1, 2), offsets)
    return grad_y, grad_x, None


def _bilinear_jvp(call):
    def jvp(ctx, tangent_a, tangent_b, _):
        a, b, offsets = ctx.saved_tensors
        terms = []
        if tangent_a is not None:
            terms.append(call(tangent_a, b, offsets))
        if tangent_b is not None:
            terms.append(call(a, tangent_b, offsets))
        return sum(terms[1:], terms[0])

    return jvp


_grouped_linear = differentiable(
    _linear_op,
    setup_context=_setup,
    backward=_linear_backward,
    jvp=_bilinear_jvp(lambda *inputs: _grouped_linear(*inputs)),
    vmap=vmap_by_loop(lambda *inputs: _grouped_linear(*inputs)),
)
_grouped_outer = differentiable(
    _outer_op,
    setup_context=_setup,
    backward=_outer_backward,
    jvp=_bilinear_jvp(lambda *inputs: _grouped_outer(*inputs)),
    vmap=vmap_by_loop(lambda *inputs: _grouped_outer(*inputs)),
)
