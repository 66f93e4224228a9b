r"""From tokens to the rows of their experts, and from the experts' results back to tokens.

A plan pairs slots with rows: slot :math:`j` of token :math:`t` with row :math:`r`. With

.. math::  L(x, w, y) = \sum_{\text{pairs}} w_{tj} \, \langle x_t, y_r \rangle

`permute_tokens` is :math:`\partial L / \partial y` and `combine_tokens` is
:math:`\partial L / \partial x`. As :math:`L` is linear in each argument, every derivative of these
operators, of any order, is a call of them or of the third one, :math:`\partial L / \partial w`.
"""

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name
from torch_routers.ops.plan import Plan

_permute_op = torch.ops.torch_routers.permute_tokens.default
_combine_op = torch.ops.torch_routers.combine_tokens.default
_backward_op = torch.ops.torch_routers._combine_backward.default


def permute_tokens(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token into the rows of its slots: the input of the experts.

    Args:
        x: ``[..., hidden]``, float32, float64, bfloat16 or float16; as many tokens as in the plan,
            counted over the flattened leading dimensions.
        plan: where each slot goes.

    Returns:
        ``[max_rows, hidden]`` in the dtype of ``x``: row ``r`` is the token of slot
        ``plan.order[r]``, zero where that is -1.

    Raises:
        ValueError: a shape or dtype that does not fit, or a plan whose ``order`` and ``inverse``
            are not each other's inverse. On CUDA the latter cannot be reported without a
            synchronisation: a slot and a row that do not name each other count as -1.

    >>> order, inverse = torch.tensor([0, 2, 1, -1]), torch.tensor([[0, 2], [1, -1]])
    >>> counts, offsets = torch.tensor([2, 1]), torch.tensor([0, 2, 3])
    >>> plan = Plan(order, inverse, counts, offsets, torch.tensor(0))
    >>> permute_tokens(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), plan)
    tensor([[1., 2.],
            [3., 4.],
            [1., 2.],
            [0., 0.]])
    """
    if x.dim() == 0:
        raise ValueError("permute_tokens: expected x of shape [..., hidden], got []")
    tokens = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    return _permute(tokens, None, plan.order, plan.inverse)


def combine_tokens(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Add up the rows of each token, weighted: from the results of the experts back to tokens.

    Args:
        rows: ``[max_rows, hidden]``, float32, float64, bfloat16 or float16.
        weights: ``[..., slots]`` in float32, with rows in float64 in float64; as many tokens as in
            the plan, counted over the flattened leading dimensions. None: all are 1.
        plan: where each slot went.

    Returns:
        ``[..., hidden]`` with the leading dimensions of ``weights``, ``[tokens, hidden]`` without
        weights; in the dtype of ``rows``. The sum is taken in the order of the slots, in float32 or
        float64, and rounded once. A slot without a row adds nothing, whatever its weight; a token
        without rows is zero.

    Raises:
        ValueError: as `permute_tokens`.

    >>> order, inverse = torch.tensor([0, 2, 1, -1]), torch.tensor([[0, 2], [1, -1]])
    >>> counts, offsets = torch.tensor([2, 1]), torch.tensor([0, 2, 3])
    >>> plan = Plan(order, inverse, counts, offsets, torch.tensor(0))
    >>> rows, weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.full((2, 2), 0.5)
    >>> combine_tokens(rows, weights, plan)
    tensor([[2.],
            [1.]])
    """
    if weights is None or weights.dim() == 2:
        return _combine(rows, weights, plan.order, plan.inverse)
    if weights.dim() == 0:
        raise ValueError("combine_tokens: expected weights of shape [..., slots], got []")
    flat = weights[None] if weights.dim() == 1 else weights.flatten(0, -2)
    y = _combine(rows, flat, plan.order, plan.inverse)
    return y.view(*weights.shape[:-1], rows.shape[-1])


# ---- shapes --------------------------------------------------------------------------------------


_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _check_plan(op, order, inverse):
    check_dtype(op, "plan.order", order, torch.int64)
    check_dtype(op, "plan.inverse", inverse, torch.int64)
    expected = f"{op}: expected plan."
    check(order.dim() == 1, lambda: f"{expected}order of shape [max_rows], got {list(order.shape)}")
    check(
        inverse.dim() == 2,
        lambda: f"{expected}inverse of shape [tokens, slots], got {list(inverse.shape)}",
    )


def _check_rows(op, rows, order):
    check(
        rows.dim() == 2 and rows.shape[0] == order.shape[0],
        lambda: (
            f"{op}: expected rows of shape [max_rows={order.shape[0]}, hidden], "
            f"got {list(rows.shape)}"
        ),
    )
    check_dtype(op, "rows", rows, *_DTYPES)


def _check_tokens(op, name, tokens, inverse):
    check(
        tokens.dim() == 2,
        lambda: f"{op}: expected {name} of shape [tokens, hidden], got {list(tokens.shape)}",
    )
    check(
        tokens.shape[0] == inverse.shape[0],
        lambda: (
            f"{op}: expected {name} with {inverse.shape[0]} tokens, those of the plan, "
            f"got {tokens.shape[0]}"
        ),
    )
    check_dtype(op, name, tokens, *_DTYPES)


def _weights_dtype(of):
    return torch.float64 if of.dtype == torch.float64 else torch.float32


def _check_weights(op, weights, of, inverse):
    if weights is None:
        return
    name = str(_weights_dtype(of)).removeprefix("torch.")
    check(
        weights.dtype == _weights_dtype(of),
        lambda: (
            f"{op}: expected weights in {name} with {dtype_name(of)}, got {dtype_name(weights)}"
        ),
    )
    check(
        weights.shape == inverse.shape,
        lambda: (
            f"{op}: expected weights of shape "
            f"[tokens={inverse.shape[0]}, slots={inverse.shape[1]}], got {list(weights.shape)}"
        ),
    )


@torch.library.register_fake(_permute_op)
def _permute_fake(x, weights, order, inverse):
    op = "permute_tokens"
    _check_plan(op, order, inverse)
    _check_tokens(op, "x", x, inverse)
    _check_weights(op, weights, x, inverse)
    return x.new_empty(order.shape[0], x.shape[1])


@torch.library.register_fake(_combine_op)
def _combine_fake(rows, weights, order, inverse):
    op = "combine_tokens"
    _check_plan(op, order, inverse)
    _check_rows(op, rows, order)
    _check_weights(op, weights, rows, inverse)
    return rows.new_empty(inverse.shape[0], rows.shape[1])


@torch.library.register_fake(_backward_op)
def _backward_fake(grad, rows, weights, order, inverse):
    grad_rows = grad.new_empty(0 if weights is None else order.shape[0], grad.shape[1])
    return grad_rows, grad.new_empty(inverse.shape, dtype=_weights_dtype(grad))


# ---- derivatives ---------------------------------------------------------------------------------
# With the three derivatives of L, R(x, w) = permute, X(y, w) = combine and W(x, y) of the weights:
# the gradients of each are the other two, with the incoming gradient in the place of the result.


def _of_rows_and_weights(grad, rows, weights, order, inverse, need_rows, need_weights):
    """R(grad, weights) and W(grad, rows), each where it is needed; in one pass if both are."""
    if need_weights:
        weights = weights if need_rows else None
        grad_rows, grad_weights = _combine_backward(grad, rows, weights, order, inverse)
        return grad_rows if need_rows else None, grad_weights
    return _permute(grad, weights, order, inverse) if need_rows else None, None


def _sum(*terms):
    terms = [x for x in terms if x is not None]
    return sum(terms[1:], terms[0]) if terms else None


def _setup(ctx, inputs, output):
    values, weights, order, inverse = inputs
    # Without weights the operators are linear: their derivatives need the plan alone.
    ctx.save_for_backward(None if weights is None else values, weights, order, inverse)


def _permute_gradient(ctx, grad):
    x, weights, order, inverse = ctx.saved_tensors
    need_x, need_weights, *_ = ctx.needs_input_grad
    grad_x = _combine(grad, weights, order, inverse) if need_x else None
    grad_weights = _combine_backward(x, grad, None, order, inverse)[1] if need_weights else None
    return grad_x, grad_weights, None, None


def _combine_gradient(ctx, grad):
    need_rows, need_weights, *_ = ctx.needs_input_grad
    return *_of_rows_and_weights(grad, *ctx.saved_tensors, need_rows, need_weights), None, None


def _bilinear_jvp(call):
    def jvp(ctx, tangent, tangent_weights, *_):
        values, weights, order, inverse = ctx.saved_tensors
        return _sum(
            None if tangent is None else call(tangent, weights, order, inverse),
            None if tangent_weights is None else call(values, tangent_weights, order, inverse),
        )

    return jvp


def _backward_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_gradient(ctx, of_rows, of_weights):
    grad, rows, weights, order, inverse = ctx.saved_tensors
    need_grad, need_rows, need_weights, *_ = ctx.needs_input_grad
    if weights is None:
        of_rows = None  # that of nothing
    of_grad = None
    if need_grad:
        of_grad = _sum(
            None if of_rows is None else _combine(of_rows, weights, order, inverse),
            None if of_weights is None else _combine(rows, of_weights, order, inverse),
        )
    rest = _of_rows_and_weights(
        grad, of_rows, of_weights, order, inverse,
        need_rows and of_weights is not None, need_weights and of_rows is not None,
    )  # fmt: skip
    return of_grad, *rest, None, None


def _backward_jvp(ctx, grad_t, rows_t, weights_t, *_):
    grad, rows, weights, order, inverse = ctx.saved_tensors
    of_rows = of_weights = None
    if grad_t is not None:
        of_rows, of_weights = _combine_backward(grad_t, rows, weights, order, inverse)
    if rows_t is not None:
        more = _combine_backward(grad, rows_t, None, order, inverse)[1]
        of_weights = _sum(of_weights, more)
    if weights_t is not None:
        of_rows = _sum(of_rows, _permute(grad, weights_t, order, inverse))
    return of_rows, of_weights


_permute = differentiable(
    _permute_op,
    setup_context=_setup,
    backward=_permute_gradient,
    jvp=_bilinear_jvp(lambda *inputs: _permute(*inputs)),
    vmap=vmap_by_loop(lambda *inputs: _permute(*inputs)),
)
_combine = differentiable(
    _combine_op,
    setup_context=_setup,
    backward=_combine_gradient,
    jvp=_bilinear_jvp(lambda *inputs: _combine(*inputs)),
    vmap=vmap_by_loop(lambda *inputs: _combine(*inputs)),
)
_combine_backward = differentiable(
    _backward_op,
    setup_context=_backward_setup,
    backward=_backward_gradient,
    jvp=_backward_jvp,
    vmap=vmap_by_loop(lambda *inputs: _combine_backward(*inputs)),
)
