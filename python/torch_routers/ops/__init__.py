"""Operators: functions of tensors, each with every derivative and transform."""

from torch_routers.ops.gate import Statistics, gate, topk_gate
from torch_routers.ops.grouped_linear import grouped_linear
from torch_routers.ops.router_losses import RouterLosses, router_losses

__all__ = ["RouterLosses", "Statistics", "gate", "grouped_linear", "router_losses", "topk_gate"]
