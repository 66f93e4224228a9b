r"""One step of a gated recurrent unit, from the sums that its gates are made of.

.. math::
    r = \sigma(a_r + b_r), \qquad c = \sigma(a_c + b_c), \qquad n = \tanh(a_n + r \odot b_n), \qquad
    h' = (1 - c) \odot n + c \odot h

with :math:`a = W_i u + \beta_i` of the input and :math:`b = W_h h + \beta_h` of the state. The two
matrix products are left to PyTorch. ``csrc/gru_cell/gru_cell_kernel.h`` has the derivatives.
"""

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, jvp, vmap_by_rows
from torch_routers.ops._check import check, check_dtype, dtype_name

_op = torch.ops.torch_routers.gru_cell.default
_backward_op = torch.ops.torch_routers._gru_cell_backward.default


def gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    state: Tensor,
    *,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """The next state of each token; what `torch.nn.GRUCell` computes between its products.

    Args:
        input_gates: ``[..., 3 * size]`` in the dtype of ``state``: weights times the input, plus
            bias; reset, update and candidate one after the other, as in `torch.nn.GRUCell`.
        hidden_gates: the same of the state.
        state: ``[..., size]`` in float32 or float64: a state that passes through many layers is
            kept in full precision.
        valid_mask: ``[...]`` bool. A masked token keeps its state, and its gates get no gradient.

    Returns:
        ``[..., size]`` in the dtype of ``state``.

    Raises:
        ValueError: an argument that does not fit.

    >>> state = torch.tensor([[0.3]])
    >>> input_gates, hidden_gates = torch.tensor([[0.5, 0.1, 0.56]]), torch.tensor([[-0.1, 0.2, 0]])
    >>> gru_cell(input_gates, hidden_gates, state)
    tensor([[0.3885]])
    """
    leading = state.shape[:-1]
    if state.dim() != 2:
        if state.dim() == 0:
            raise ValueError("gru_cell: expected state of shape [..., size], got []")
        state, input_gates, hidden_gates = map(_flat, (state, input_gates, hidden_gates))
        valid_mask = None if valid_mask is None else valid_mask.reshape(-1)
    next_state = _gru_cell(input_gates, hidden_gates, state, valid_mask)
    return next_state if len(leading) == 1 else next_state.view(*leading, state.shape[-1])


def _flat(x: Tensor) -> Tensor:
    """``[tokens, columns]``; what has too few dimensions for it is left for the error."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2) if x.dim() > 1 else x


# ---- shapes --------------------------------------------------------------------------------------


def _check(op, input_gates, hidden_gates, state, valid_mask):
    check(
        state.dim() == 2,
        lambda: f"{op}: expected state of shape [tokens, size], got {list(state.shape)}",
    )
    check_dtype(op, "state", state, torch.float32, torch.float64, remedy=_REMEDY)
    tokens, size = state.shape
    for name, gates in ("input_gates", input_gates), ("hidden_gates", hidden_gates):
        check(
            gates.dim() == 2 and gates.shape[0] == tokens and gates.shape[1] == 3 * size,
            lambda name=name, gates=gates: (
                f"{op}: expected {name} of shape [tokens={tokens}, 3 * size], size={size}, "
                f"got {list(gates.shape)}"
            ),
        )
        check(
            gates.dtype == state.dtype,
            lambda name=name, gates=gates: (
                f"{op}: expected {name} in the dtype of state, {dtype_name(state)}, "
                f"got {dtype_name(gates)}"
            ),
        )
    if valid_mask is not None:
        check_dtype(op, "valid_mask", valid_mask, torch.bool)
        check(
            valid_mask.dim() == 1 and valid_mask.shape[0] == tokens,
            lambda: (
                f"{op}: expected valid_mask of shape [tokens={tokens}], "
                f"got {list(valid_mask.shape)}"
            ),
        )


_REMEDY = ". Convert it with .float()"


@torch.library.register_fake(_op)
def _fake(input_gates, hidden_gates, state, valid_mask):
    _check("gru_cell", input_gates, hidden_gates, state, valid_mask)
    return state.new_empty(state.shape)


@torch.library.register_fake(_backward_op)
def _backward_fake(grad_next, input_gates, hidden_gates, state, valid_mask):
    _check("_gru_cell_backward", input_gates, hidden_gates, state, valid_mask)
    tensors = input_gates, hidden_gates, state
    return tuple(x.new_empty(x.shape) for x in tensors)


# ---- the formula, and what is derived from it ----------------------------------------------------


def _plain(input_gates, hidden_gates, state, valid_mask):
    """The step in plain PyTorch."""
    a, b = input_gates.unflatten(-1, (3, -1)), hidden_gates.unflatten(-1, (3, -1))
    reset, update = (a[..., :2, :] + b[..., :2, :]).sigmoid().unbind(-2)
    candidate = (a[..., 2, :] + reset * b[..., 2, :]).tanh()
    next_state = (1 - update) * candidate + update * state
    if valid_mask is None:
        return next_state
    return torch.where(valid_mask.unsqueeze(-1), next_state, state)


def _plain_backward(grad_next, input_gates, hidden_gates, state, valid_mask):
    if valid_mask is not None:  # what is behind the mask may be NaN, which the chain rule spreads
        valid = valid_mask.unsqueeze(-1)
        input_gates = torch.where(valid, input_gates, 0)
        hidden_gates = torch.where(valid, hidden_gates, 0)
    _, vjp = torch.func.vjp(
        lambda *inputs: _plain(*inputs, valid_mask), input_gates, hidden_gates, state
    )
    return vjp(grad_next)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad_next):
    return *_gru_cell_backward(grad_next, *ctx.saved_tensors), None


def _tangent(ctx, *tangents):
    *inputs, valid_mask = ctx.saved_tensors
    return jvp(lambda *inputs: _plain(*inputs, valid_mask), inputs, tangents[:3])


def _double_gradient(ctx, *grads):
    *inputs, valid_mask = ctx.saved_tensors
    _, vjp = torch.func.vjp(lambda *inputs: _plain_backward(*inputs, valid_mask), *inputs)
    return *vjp(grads), None


def _backward_tangent(ctx, *tangents):
    *inputs, valid_mask = ctx.saved_tensors
    return jvp(lambda *inputs: _plain_backward(*inputs, valid_mask), inputs, tangents[:4])


# ---- the operators: tokens do not depend on each other -------------------------------------------


_gru_cell_backward = differentiable(
    _backward_op,
    setup_context=_setup,
    backward=_double_gradient,
    jvp=_backward_tangent,
    vmap=vmap_by_rows(lambda *inputs: _gru_cell_backward(*inputs), 5),
)
_gru_cell = differentiable(
    _op,
    setup_context=_setup,
    backward=_gradient,
    jvp=_tangent,
    vmap=vmap_by_rows(lambda *inputs: _gru_cell(*inputs), 4),
)
