r"""One linear map per segment of rows, each merged from the maps of several experts.

.. math::  y_n = \Big(\sum_e p_{se} W_e\Big) x_n + \sum_e p_{se} b_e \qquad
           n \in [\mathrm{offsets}_s, \mathrm{offsets}_{s+1})

`soft_merge` and `grouped_linear` in one operator, because of what it does not keep: the merged
weights, as many as there are segments, which the backward merges again. An operator, and not a
``Function`` alone, so that a compiler does not find the second merge to be the first, and keep it.
"""

import torch
from torch import Tensor

from torch_routers._autograd import autocast_dtype, differentiable, vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name
from torch_routers.ops.grouped_linear import (
    DTYPES,
    _grouped_linear,
    _grouped_outer,
    bias_gradient,
)
from torch_routers.ops.soft_merge import product, soft_merge

_NAME = "torch_routers::merged_linear"


def merged_linear(
    x: Tensor, weight: Tensor, mix: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Multiply the rows of each segment by a weight that is merged from those of all experts.

    .. math::  \partial W_e = \sum_s p_{se} G_s, \qquad
               \partial p_{se} = \langle G_s, W_e \rangle, \qquad
               \partial x_n = \bar W_s^\top \partial y_n, \qquad
               G_s = \sum_{n \in s} \partial y_n x_n^\top

    The first two are one matrix product each. For the third, the weight :math:`\bar W_s` of each
    segment is merged once more: ``[segments, out_features, in_features]`` lives during the forward
    and during the backward, not in between.

    Args:
        x: ``[rows, in_features]``, float32, float64, bfloat16 or float16; rows sorted by segment.
        weight: ``[num_experts, out_features, in_features]``, in the dtype of ``x``.
        mix: ``[segments, num_experts]``, float32 or float64: :math:`p`.
        offsets: ``[segments + 1]`` int64, ascending from 0: rows ``offsets[s]:offsets[s + 1]``
            belong to segment ``s``. Rows behind ``offsets[-1]`` belong to none and are never read.
        bias: ``[num_experts, out_features]``, in the dtype of ``x``. Default: none.

    Returns:
        ``[rows, out_features]`` in the dtype of ``x``; zero in rows that belong to no segment.

    Raises:
        ValueError: a shape, dtype or offset that does not fit.

    Weights are merged in float32 (float64 for float64) and rounded once to the dtype of ``x``:
    under autocast to that of autocast.

    >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 3 * torch.eye(2)])
    >>> merged_linear(x, weight, torch.tensor([[0.5, 0.5], [0.0, 1.0]]), torch.tensor([0, 1, 3]))
    tensor([[2., 2.],
            [3., 3.],
            [3., 3.]])
    """
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    elif dtype is None:
        for name, parameter in ("weight", weight), ("bias", bias):
            if parameter is not None and parameter.dtype != x.dtype:
                raise ValueError(
                    f"merged_linear: expected {name} in the dtype of x, {dtype_name(x)}, "
                    f"got {dtype_name(parameter)}"
                )
    return _merged_linear(x, weight, mix, offsets, bias)


torch.library.define(
    _NAME, "(Tensor x, Tensor weight, Tensor mix, Tensor offsets, Tensor? bias) -> Tensor"
)


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _forward(x, weight, mix, offsets, bias):
    _check(x, weight, mix, offsets, bias)
    merged = soft_merge(mix, weight).to(x.dtype)
    merged_bias = None if bias is None else soft_merge(mix, bias).to(x.dtype)
    try:
        return torch.ops.torch_routers.grouped_linear(x, merged, offsets, merged_bias)
    except ValueError as error:  # of what offsets hold
        raise ValueError(str(error).replace("grouped_linear", "merged_linear", 1)) from None


@torch.library.register_fake(_NAME)
def _fake(x, weight, mix, offsets, bias):
    _check(x, weight, mix, offsets, bias)
    return x.new_empty(x.shape[0], weight.shape[1])


def _check(x, weight, mix, offsets, bias):
    op = "merged_linear: expected"
    check(x.dim() == 2, lambda: f"{op} x of shape [rows, in_features], got {list(x.shape)}")
    for name, tensor in ("x", x), ("weight", weight), ("bias", bias):
        if tensor is not None:
            check_dtype("merged_linear", name, tensor, *DTYPES)
    check(
        weight.dim() == 3 and weight.shape[2] == x.shape[1],
        lambda: (
            f"{op} weight of shape [num_experts, out_features, in_features={x.shape[1]}], "
            f"got {list(weight.shape)}"
        ),
    )
    check_dtype("merged_linear", "mix", mix, torch.float32, torch.float64)
    num_experts, out_features, _ = weight.shape
    check(
        mix.dim() == 2 and mix.shape[0] > 0 and mix.shape[1] == num_experts,
        lambda: (
            f"{op} mix of shape [segments, num_experts={num_experts}], segments >= 1, "
            f"got {list(mix.shape)}"
        ),
    )
    check_dtype("merged_linear", "offsets", offsets, torch.int64)
    check(
        offsets.dim() == 1 and offsets.shape[0] == mix.shape[0] + 1,
        lambda: (
            f"{op} offsets of shape [segments + 1], here [{mix.shape[0] + 1}], "
            f"got {list(offsets.shape)}"
        ),
    )
    check(
        bias is None or bias.shape == weight.shape[:2],
        lambda: (
            f"{op} bias of shape [num_experts={num_experts}, out_features={out_features}], "
            f"got {list(bias.shape)}"
        ),
    )


# ---- derivatives ---------------------------------------------------------------------------------
# The operator is linear in x, in mix, and in weight and bias together.


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, mix, offsets, bias = ctx.saved_tensors
    needs_x, needs_weight, needs_mix, _, needs_bias = ctx.needs_input_grad
    grad_x = grad_weight = grad_mix = grad_bias = None
    if needs_x:
        merged = soft_merge(mix, weight).to(grad.dtype)
        grad_x = _grouped_linear(grad, merged.transpose(1, 2), offsets, None, None)
        del merged  # before the next tensor of this size
    if needs_weight or needs_mix:
        of_merged = _grouped_outer(grad, x, offsets, None)
        if needs_weight:
            grad_weight = _of_experts(mix, of_merged, weight)
        if needs_mix:
            grad_mix = _of_mix(mix, of_merged, weight)
    if bias is not None and (needs_bias or needs_mix):
        of_merged = bias_gradient(grad, offsets)
        if needs_bias:
            grad_bias = _of_experts(mix, of_merged, bias)
        if needs_mix:
            grad_mix = grad_mix + _of_mix(mix, of_merged, bias)
    return grad_x, grad_weight, grad_mix, None, grad_bias


def _of_experts(mix, of_merged, parameter):
    return soft_merge(mix.T, of_merged.to(parameter.dtype))


def _of_mix(mix, of_merged, parameter):
    of_merged, parameter = (v.reshape(v.shape[0], -1).to(mix.dtype) for v in (of_merged, parameter))
    return product(of_merged, parameter.T)


def _jvp(ctx, tangent_x, tangent_weight, tangent_mix, _, tangent_bias):
    x, weight, mix, offsets, bias = ctx.saved_tensors
    terms = []
    if tangent_x is not None:
        terms.append(_merged_linear(tangent_x, weight, mix, offsets, None))
    if tangent_mix is not None:
        terms.append(_merged_linear(x, weight, tangent_mix, offsets, bias))
    if tangent_weight is not None or tangent_bias is not None:
        if tangent_weight is None:
            tangent_weight = torch.zeros_like(weight)
        terms.append(_merged_linear(x, tangent_weight, mix, offsets, tangent_bias))
    return sum(terms[1:], terms[0])


_merged_linear = differentiable(
    torch.ops.torch_routers.merged_linear.default,
    setup_context=_setup,
    backward=_backward,
    jvp=_jvp,
    vmap=vmap_by_loop(lambda *inputs: _merged_linear(*inputs)),
)
