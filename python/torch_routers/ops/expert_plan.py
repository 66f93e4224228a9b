r"""From the experts of each token to the order of the rows that their experts work on.

A stable counting sort of the slots :math:`s` that have an expert :math:`e_s`:

.. math::
    \mathrm{row}_s = \mathrm{offsets}_{e_s} + \#\{s' < s : e_{s'} = e_s\}, \qquad
    \mathrm{offsets}_e = \#\{s : e_s < e\}

The sort is by counting (D. E. Knuth, The Art of Computer Programming, volume 3, 5.2, algorithm D).
The result is made of integers and has no derivative.
"""

import torch
from torch import Tensor

from torch_routers._autograd import vmap_by_loop
from torch_routers.ops._check import check, check_dtype
from torch_routers.ops.plan import Plan

_op = torch.ops.torch_routers.expert_plan.default
_from_weights_op = torch.ops.torch_routers.expert_plan_from_weights.default


def expert_plan(indices: Tensor, num_experts: int, *, max_rows: int | None = None) -> Plan:
    """Sort the slots of all tokens by expert.

    Args:
        indices: ``[..., slots]`` int64 in ``[-1, num_experts)``: the expert of each slot; -1 is
            none, and the slot gets no row.
        num_experts: at least 1.
        max_rows: the length of ``order``. If more slots than that have an expert, the last ones in
            the order get no row and are counted in ``dropped``; ``counts`` and ``offsets`` are
            those of the rows there are. Default: the number of slots, so that none is dropped.

    Returns:
        A `Plan`.

    Raises:
        ValueError: an argument that does not fit. On CUDA an index out of range cannot be reported
            without a synchronisation: there it counts as -1.

    >>> plan = expert_plan(torch.tensor([[2, 0], [-1, 2], [0, 1]]), 3)
    >>> plan.order
    tensor([ 1,  4,  5,  0,  3, -1])
    >>> plan.offsets
    tensor([0, 2, 3, 5])
    >>> plan.inverse
    tensor([[ 3,  0],
            [-1,  4],
            [ 1,  2]])
    """
    if indices.dim() != 2:
        if indices.dim() == 0:
            raise ValueError("expert_plan: expected indices of shape [..., slots], got []")
        indices = indices.flatten(0, -2) if indices.dim() > 2 else indices[None]
    return Plan(*_op(indices, num_experts, max_rows))


def expert_plan_from_weights(weights: Tensor, *, max_rows: int | None = None) -> Plan:
    """The same for routings that are given as a weight per token and expert, most of them 0.

    A token has one slot per expert, numbered like it. The slot has a row if its weight is not 0; a
    NaN is not 0.

    Args:
        weights: ``[..., num_experts]``, float32, float64, bfloat16 or float16.
        max_rows: as in `expert_plan`. The default is the number of tokens times the number of
            experts, of which a sparse routing needs few: give a bound where you know one.

    Returns:
        A `Plan`. It does not depend on the weights differentiably.

    Raises:
        ValueError: an argument that does not fit.

    >>> plan = expert_plan_from_weights(torch.tensor([[0.0, 0.5], [1.0, 2.0]]), max_rows=3)
    >>> plan.order, plan.counts
    (tensor([2, 1, 3]), tensor([1, 2]))
    """
    if weights.dim() != 2 or weights.shape[-1] < 1:
        if weights.dim() == 0 or weights.shape[-1] < 1:
            raise ValueError(
                "expert_plan_from_weights: expected weights of shape [..., num_experts] with "
                f"num_experts >= 1, got {[*weights.shape]}"
            )
        weights = weights.reshape(-1, weights.shape[-1])
    return Plan(*_from_weights_op(weights, max_rows))


# ---- shapes, batching ----------------------------------------------------------------------------


@torch.library.register_fake(_op)
def _fake(indices, num_experts, max_rows):
    check_dtype("expert_plan", "indices", indices, torch.int64)
    check(num_experts >= 1, lambda: f"expert_plan: expected num_experts >= 1, got {num_experts}")
    return _shapes("expert_plan", indices, num_experts, max_rows)


@torch.library.register_fake(_from_weights_op)
def _from_weights_fake(weights, max_rows):
    op = "expert_plan_from_weights"
    check_dtype(op, "weights", weights, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return _shapes(op, weights, weights.shape[1], max_rows)


def _shapes(op, experts_of, num_experts, max_rows):
    tokens, slots = experts_of.shape
    if max_rows is None:
        max_rows = tokens * slots
    check(max_rows >= 0, lambda: f"{op}: expected max_rows >= 0, got {max_rows}")
    sizes = (max_rows,), (tokens, slots), (num_experts,), (num_experts + 1,), ()
    return tuple(experts_of.new_empty(size, dtype=torch.int64) for size in sizes)


# Each sample has its own order of rows: there is nothing to fold.
for _each in _op, _from_weights_op:
    torch.library.register_vmap(_each, vmap_by_loop(_each))
