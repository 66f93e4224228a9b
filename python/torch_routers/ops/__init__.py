"""Operators: functions of tensors, each with every derivative and transform."""

from torch_routers.ops.expert_plan import expert_plan, expert_plan_from_weights
from torch_routers.ops.gate import Statistics, gate, topk_gate
from torch_routers.ops.grouped_linear import grouped_linear
from torch_routers.ops.plan import Plan

__all__ = [
    "Plan",
    "Statistics",
    "expert_plan",
    "expert_plan_from_weights",
    "gate",
    "grouped_linear",
    "topk_gate",
]
