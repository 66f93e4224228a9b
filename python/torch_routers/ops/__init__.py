"""Operators: functions of tensors, each with every derivative and transform."""

from torch_routers.ops.entmax import entmax
from torch_routers.ops.entropy_gate import EntropyGate, entropy_gate
from torch_routers.ops.expert_plan import expert_plan, expert_plan_from_weights
from torch_routers.ops.gate import Statistics, gate, topk_gate, topk_select
from torch_routers.ops.grouped_linear import grouped_linear
from torch_routers.ops.gru_cell import gru_cell
from torch_routers.ops.limit_capacity import expert_capacity, limit_capacity
from torch_routers.ops.lora_mix import lora_mix
from torch_routers.ops.merged_linear import merged_linear
from torch_routers.ops.plan import Plan
from torch_routers.ops.quantile_dual import quantile_dual
from torch_routers.ops.ragged_select import ragged_select
from torch_routers.ops.relu_rms_gate import ReLUGate, relu_rms_gate
from torch_routers.ops.router_losses import RouterLosses, router_losses
from torch_routers.ops.soft_merge import soft_merge
from torch_routers.ops.token_dispatch import combine_tokens, permute_tokens

__all__ = [
    "EntropyGate",
    "Plan",
    "ReLUGate",
    "RouterLosses",
    "Statistics",
    "combine_tokens",
    "entmax",
    "entropy_gate",
    "expert_capacity",
    "expert_plan",
    "expert_plan_from_weights",
    "gate",
    "grouped_linear",
    "gru_cell",
    "limit_capacity",
    "lora_mix",
    "merged_linear",
    "permute_tokens",
    "quantile_dual",
    "ragged_select",
    "relu_rms_gate",
    "router_losses",
    "soft_merge",
    "topk_gate",
    "topk_select",
]
