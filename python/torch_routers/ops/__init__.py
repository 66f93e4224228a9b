"""Operators: functions of tensors, each with every derivative and transform."""

from torch_routers.ops.gate import Statistics, gate, topk_gate
from torch_routers.ops.grouped_linear import grouped_linear

__all__ = ["Statistics", "gate", "grouped_linear", "topk_gate"]
