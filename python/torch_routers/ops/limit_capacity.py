r"""A limit to the rows of each expert, as an operator on plans.

.. math::  C_g = \lceil T_g \, k \, f / E \rceil

rows of each expert are kept in each group :math:`g` of :math:`T_g` tokens, with :math:`k` slots per
token, :math:`E` experts and the capacity factor :math:`f` (`expert_capacity`); `limit_capacity`
drops the others.
"""

import torch
from torch import Tensor

from torch_routers._autograd import vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name
from torch_routers.ops.plan import Plan

_op = torch.ops.torch_routers.limit_capacity.default
_NEEDS = {"position": None, "weight": "weights", "priority": "priority", "random": "seed"}


def limit_capacity(
    plan: Plan,
    capacity: int | Tensor,
    *,
    policy: str = "position",
    weights: Tensor | None = None,
    priority: Tensor | None = None,
    seed: int | Tensor | None = None,
    row_ids: Tensor | None = None,
    group_offsets: Tensor | None = None,
) -> Plan:
    """Keep at most ``capacity`` rows of each expert in each group of tokens.

    Which rows are kept is a total order, so that the result is the same on every device:

    - ``"position"``: slot 0 of all tokens first, in the order of tokens, then slot 1, and so on
      (GShard, arXiv 2006.16668).
    - ``"weight"``: the largest of ``weights`` first; ties: the earlier token, then the lower slot.
    - ``"priority"``: the tokens of the largest ``priority`` first, for instance of the largest
      probability; ties as above. With one slot this is V-MoE's batch prioritized routing (arXiv
      2106.05974), which places all first choices before it looks at second ones.
    - ``"random"``: the smallest random number first. The number is a function of ``seed``, the row
      id of the token and the expert alone, whatever else is in the batch.

    -0 equals 0, and NaN is larger than every number. The kept rows stay sorted by expert and slot;
    slots without a row are -1 in ``inverse``. There is no derivative; which slots were dropped is
    ``new.inverse < 0``, and their weights can be masked with it.

    Args:
        plan: made by `expert_plan`. Slots that have no row in it do not compete.
        capacity: rows per expert and group, >= 0; an int, or ``[groups]`` int64.
        policy: one of the above.
        weights: ``[tokens, slots]``, float32, float64, bfloat16 or float16; read by ``"weight"``.
        priority: ``[tokens]``, in the same dtypes; read by ``"priority"``.
        seed: an int, or a scalar int64 tensor; read by ``"random"``.
        row_ids: ``[tokens]`` int64, numbers of the tokens that stay when batches are reordered or
            split; read by ``"random"``. Default: 0, 1, ...
        group_offsets: ``[groups + 1]`` int64, ascending from 0 to the number of tokens. Default:
            one group.

    Returns:
        A plan of the same shapes; ``dropped`` has grown by the number of rows that were lost.

    Raises:
        ValueError: an argument that does not fit. On CUDA values in tensors cannot be looked at
            without a synchronisation: there a negative capacity counts as 0.

    >>> from torch_routers.ops.plan import Plan
    >>> plan = Plan(  # three tokens that all chose expert 0
    ...     order=torch.tensor([0, 1, 2]), inverse=torch.tensor([[0], [1], [2]]),
    ...     counts=torch.tensor([3, 0]), offsets=torch.tensor([0, 3, 3]), dropped=torch.tensor(0)
    ... )
    >>> limit_capacity(plan, 2).order
    tensor([ 0,  1, -1])
    >>> kept = limit_capacity(plan, 2, policy="priority", priority=torch.tensor([0.5, 0.4, 0.9]))
    >>> kept.inverse.flatten(), kept.dropped
    (tensor([ 0, -1,  1]), tensor(1))
    """
    if policy not in _NEEDS:
        names = "position, weight, priority or random"
        raise ValueError(f"limit_capacity: expected policy in {names}, got {policy}")
    given = {"weights": weights, "priority": priority, "seed": seed, None: ()}
    if given[_NEEDS[policy]] is None:
        raise ValueError(
            f"limit_capacity: expected {_NEEDS[policy]} with policy {policy}, got None"
        )
    device = plan.order.device
    if not isinstance(capacity, Tensor):
        if not isinstance(capacity, (int, torch.SymInt)):
            said = f"limit_capacity: expected capacity as an int or a tensor, got {capacity}"
            raise ValueError(said)
        if capacity < 0:
            raise ValueError(f"limit_capacity: expected capacity >= 0, got {capacity}")
        groups = 1 if group_offsets is None else max(0, group_offsets.numel() - 1)
        capacity = torch.full((groups,), capacity, dtype=torch.int64, device=device)
    scores = {"weight": weights, "priority": priority}.get(policy)
    random = policy == "random"
    if random and not isinstance(seed, Tensor):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"limit_capacity: expected seed in [-2^63, 2^63), got {seed}")
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    new = _op(
        plan.order,
        plan.inverse,
        plan.offsets,
        plan.dropped,
        capacity,
        policy,
        scores,
        seed if random else None,
        row_ids if random else None,
        group_offsets,
    )
    return Plan(*new)


def expert_capacity(
    num_tokens: Tensor,
    top_k: int,
    num_experts: int,
    factor: float,
    *,
    min_capacity: int = 0,
) -> Tensor:
    """The capacity ``ceil(num_tokens * top_k * factor / num_experts)`` of each expert in a group.

    Computed in float64. Where rounding alone lifts the quotient above an integer, by up to one part
    in 2^50, it is that integer: 100 tokens, 10 experts and a factor of 1.1 are 11, whereas
    ``math.ceil(100 / 10 * 1.1)`` is 12.

    Args:
        num_tokens: ``[groups]`` int64: tokens that are not masked, as ``group_tokens`` of
            `Statistics`. Nothing waits for the device.
        top_k: slots per token.
        num_experts: number of experts.
        factor: 1 leaves room for a perfectly balanced routing.
        min_capacity: the least that is returned; 8 is DeepSpeed's.

    Returns:
        ``[groups]`` int64, for `limit_capacity`.

    Raises:
        ValueError: an argument that does not fit.

    >>> expert_capacity(torch.tensor([100, 7]), top_k=1, num_experts=10, factor=1.1)
    tensor([11,  1])
    """
    op = "expert_capacity: expected"
    if num_tokens.dtype != torch.int64:
        raise ValueError(f"{op} num_tokens in int64, got {dtype_name(num_tokens)}")
    for name, value in ("top_k", top_k), ("num_experts", num_experts):
        if value < 1:
            raise ValueError(f"{op} {name} >= 1, got {value}")
    if not 0 <= factor < float("inf"):
        raise ValueError(f"{op} a finite factor >= 0, got {factor}")
    if min_capacity < 0:
        raise ValueError(f"{op} min_capacity >= 0, got {min_capacity}")
    quotient = num_tokens.double() * top_k * factor / num_experts
    return (quotient * (1 - 2.0**-50)).ceil().long().clamp(min=min_capacity)


# ---- what torch.compile and torch.export see: shapes ---------------------------------------------


_FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _check(name, tensor, fits, expected, *dtypes):
    check_dtype("limit_capacity", name, tensor, *dtypes or (torch.int64,))
    check(
        fits,
        lambda: f"limit_capacity: expected {name} of shape {expected}, got {list(tensor.shape)}",
    )


@torch.library.register_fake(_op)
def _fake(order, inverse, offsets, dropped, capacity, policy, scores, seed, row_ids, group_offsets):
    _check("plan.order", order, order.dim() == 1, "[max_rows]")
    _check("plan.inverse", inverse, inverse.dim() == 2, "[tokens, slots]")
    is_offsets = offsets.dim() == 1 and offsets.shape[0] >= 2
    _check("plan.offsets", offsets, is_offsets, "[num_experts + 1]")
    _check("plan.dropped", dropped, dropped.dim() == 0, "[]")
    groups = 1
    if group_offsets is not None:
        is_offsets = group_offsets.dim() == 1 and group_offsets.shape[0] >= 2
        _check("group_offsets", group_offsets, is_offsets, "[groups + 1]")
        groups = group_offsets.shape[0] - 1
    fits = capacity.dim() == 1 and capacity.shape[0] == groups
    _check("capacity", capacity, fits, f"[groups={groups}]")
    tokens, slots = inverse.shape
    per_token = f"[tokens={tokens}]"
    if policy == "weight":
        fits = scores.dim() == 2 and scores.shape[0] == tokens and scores.shape[1] == slots
        _check("weights", scores, fits, f"[tokens={tokens}, slots={slots}]", *_FLOATS)
    if policy == "priority":
        fits = scores.dim() == 1 and scores.shape[0] == tokens
        _check("priority", scores, fits, per_token, *_FLOATS)
    if seed is not None:
        _check("seed", seed, seed.dim() == 0, "[]")
    if row_ids is not None:
        fits = row_ids.dim() == 1 and row_ids.shape[0] == tokens
        _check("row_ids", row_ids, fits, per_token)
    num_experts = offsets.shape[0] - 1
    return (
        order.new_empty(order.shape[0]),
        order.new_empty(tokens, slots),
        order.new_empty(num_experts),
        order.new_empty(num_experts + 1),
        order.new_empty(()),
    )


torch.library.register_vmap(_op, vmap_by_loop(lambda *inputs: _op(*inputs)))
