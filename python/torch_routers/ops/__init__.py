"""Operators: functions of tensors, each with every derivative and transform."""

from torch_routers.ops.gate import Statistics, gate, topk_gate
from torch_routers.ops.grouped_linear import grouped_linear
from torch_routers.ops.token_dispatch import combine_tokens, permute_tokens

__all__ = [
    "Statistics",
    "combine_tokens",
    "gate",
    "grouped_linear",
    "permute_tokens",
    "topk_gate",
]
