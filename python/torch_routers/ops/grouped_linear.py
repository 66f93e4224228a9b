r"""One linear map per expert, for rows that are sorted by expert.

.. math::  y_n = W_e x_n + b_e \qquad n \in [\mathrm{offsets}_e, \mathrm{offsets}_{e+1})

The gradient of the weight is the other operator of this file, the grouped outer product; the
gradients of either are calls of the two again, so derivatives of any order exist.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers._autograd import autocast_dtype, differentiable, vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name

_linear_op = torch.ops.torch_routers.grouped_linear.default
_outer_op = torch.ops.torch_routers._grouped_outer.default


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    engine: str | None = None,
) -> Tensor:
    """Multiply the rows of each expert by the expert's weight, and add the expert's bias.

    Args:
        x: ``[rows, in_features]``, float32, float64, bfloat16 or float16; rows sorted by expert.
        weight: ``[num_experts, out_features, in_features]``, in the dtype of ``x``.
        offsets: ``[num_experts + 1]`` int64, ascending from 0: rows ``offsets[e]:offsets[e + 1]``
            belong to expert ``e``. Rows behind ``offsets[-1]`` belong to none and are never read.
        bias: ``[num_experts, out_features]``, in the dtype of ``x``. Default: none.
        engine: what multiplies, forward and backward. None (default) is the one that was measured
            to be the fastest for the device, the dtype and the number of rows of an expert.
            ``"native"``: the library's own kernel for few rows per expert; CPU only.
            ``"mm"``: torch's matrix product, once per expert.
            ``"grouped_mm"``: `torch.nn.functional.grouped_mm`; features must fill 16 bytes, and
            float64 is not possible.

    Returns:
        ``[rows, out_features]`` in the dtype of ``x``; zero in rows that belong to no expert.

    Raises:
        ValueError: a shape, dtype, offset or engine that does not fit.

    Under autocast the operands are converted as those of ``torch.nn.functional.linear`` are. On
    CUDA ``"mm"`` copies the offsets to the host, which waits for the device; ``"grouped_mm"``, the
    default for bfloat16, does not, and does not check their values. Not run on a GPU yet.

    >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
    >>> grouped_linear(x, weight, torch.tensor([0, 1, 2]))
    tensor([[1., 1.],
            [2., 2.],
            [0., 0.]])
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _grouped_linear(x, weight, offsets, bias, engine)


# ---- shapes --------------------------------------------------------------------------------------


DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _check_engine(op, engine, x, in_features, out_features):
    if engine is None:
        return
    sizes = [n * x.element_size() for n in (in_features, out_features)]
    names = ["mm"]
    if x.dtype != torch.float64 and all(size > 0 and size % 16 == 0 for size in sizes):
        names.append("grouped_mm")
    if x.device.type != "cuda":
        names.append("native")
    check(
        engine in names,
        lambda: (
            f"{op}: expected engine among {', '.join(names)} for in_features={in_features} and "
            f"out_features={out_features} in {dtype_name(x)}, got {engine}"
        ),
    )


def _check_offsets(op, offsets):
    check_dtype(op, "offsets", offsets, torch.int64)
    check(
        offsets.dim() == 1,
        lambda: f"{op}: expected offsets of shape [num_experts + 1], got {list(offsets.shape)}",
    )


@torch.library.register_fake(_linear_op)
def _linear_fake(x, weight, offsets, bias=None, engine=None):
    op = "grouped_linear: expected"
    check(x.dim() == 2, lambda: f"{op} x of shape [rows, in_features], got {list(x.shape)}")
    check_dtype("grouped_linear", "x", x, *DTYPES)
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
    num_experts, out_features, in_features = weight.shape
    check(
        offsets.dim() != 1 or offsets.shape[0] == num_experts + 1,
        lambda: (
            f"{op} offsets of shape [num_experts + 1], here [{num_experts + 1}], "
            f"got {list(offsets.shape)}"
        ),
    )
    _check_offsets("grouped_linear", offsets)
    if bias is not None:
        check(
            bias.shape == weight.shape[:2],
            lambda: (
                f"{op} bias of shape [num_experts={num_experts}, out_features={out_features}], "
                f"got {list(bias.shape)}"
            ),
        )
        check(
            bias.dtype == x.dtype,
            lambda: f"{op} bias in the dtype of x, {dtype_name(x)}, got {dtype_name(bias)}",
        )
    _check_engine("grouped_linear", engine, x, in_features, out_features)
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake(_outer_op)
def _outer_fake(y, x, offsets, engine=None):
    return x.new_empty(offsets.shape[0] - 1, y.shape[1], x.shape[1])


# ---- derivatives ---------------------------------------------------------------------------------
# Both operators are bilinear: with y = linear(x, w), dy = linear(dx, w) + linear(x, dw), and
# transposed, dx = linear(dy, w') and dw = outer(dy, x). A bias is a weight for an input that is 1.


def _setup(ctx, inputs, output):
    *tensors, ctx.engine = inputs
    ctx.save_for_backward(*tensors)


def _ones(rows):
    """An input that is 1, and the engine for it: on the CPU with sums in one fixed order.

    On CUDA eight of them, so that grouped_mm takes them.
    """
    cuda = rows.device.type == "cuda"
    return rows.new_ones(rows.shape[0], 8 if cuda else 1), None if cuda else "native"


def bias_gradient(grad, offsets):
    """``[num_experts, out_features]``: the sums over each expert's rows of ``grad``."""
    ones, engine = _ones(grad)
    return _grouped_outer(ones, grad, offsets, engine).select(1, 0)


def _linear_backward(ctx, grad):
    x, weight, offsets, bias = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_linear(grad, weight.transpose(1, 2), offsets, None, ctx.engine)
    if ctx.needs_input_grad[1]:
        grad_weight = _grouped_outer(grad, x, offsets, ctx.engine)
    if bias is not None and ctx.needs_input_grad[3]:
        grad_bias = bias_gradient(grad, offsets)
    return grad_x, grad_weight, None, grad_bias, None


def _outer_backward(ctx, grad):
    y, x, offsets = ctx.saved_tensors
    grad_y = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_y = _grouped_linear(x, grad, offsets, None, ctx.engine)
    if ctx.needs_input_grad[1]:
        grad_x = _grouped_linear(y, grad.transpose(1, 2), offsets, None, ctx.engine)
    return grad_y, grad_x, None, None


def _linear_jvp(ctx, tangent_x, tangent_weight, _, tangent_bias, __):
    x, weight, offsets, _ = ctx.saved_tensors
    terms = []
    if tangent_x is not None:
        terms.append(_grouped_linear(tangent_x, weight, offsets, None, ctx.engine))
    if tangent_weight is not None:
        terms.append(_grouped_linear(x, tangent_weight, offsets, None, ctx.engine))
    if tangent_bias is not None:
        ones, engine = _ones(x)
        column = F.pad(tangent_bias.unsqueeze(2), (0, ones.shape[1] - 1))
        terms.append(_grouped_linear(ones, column, offsets, None, engine))
    return sum(terms[1:], terms[0])


def _outer_jvp(ctx, tangent_y, tangent_x, *_):
    y, x, offsets = ctx.saved_tensors
    terms = []
    if tangent_y is not None:
        terms.append(_grouped_outer(tangent_y, x, offsets, ctx.engine))
    if tangent_x is not None:
        terms.append(_grouped_outer(y, tangent_x, offsets, ctx.engine))
    return sum(terms[1:], terms[0])


_grouped_linear = differentiable(
    _linear_op,
    setup_context=_setup,
    backward=_linear_backward,
    jvp=_linear_jvp,
    vmap=vmap_by_loop(lambda *inputs: _grouped_linear(*inputs)),
)
_grouped_outer = differentiable(
    _outer_op,
    setup_context=_setup,
    backward=_outer_backward,
    jvp=_outer_jvp,
    vmap=vmap_by_loop(lambda *inputs: _grouped_outer(*inputs)),
)
