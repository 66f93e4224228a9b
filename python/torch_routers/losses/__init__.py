"""Auxiliary losses: pure functions of tensors, and the small modules that carry a weight."""

from torch_routers.losses.balance import (
    LoadBalanceLoss,
    SequenceBalanceLoss,
    SoftBalanceLoss,
    load_balance,
    transformers_load_balance,
)
from torch_routers.losses.base import RouterLoss, StatisticsLoss
from torch_routers.losses.entropy import EntropyLoss, RoutingEntropyLoss, entropy
from torch_routers.losses.global_balance import GlobalBalanceLoss
from torch_routers.losses.importance import ImportanceLoss, importance
from torch_routers.losses.load import LoadLoss, expected_load
from torch_routers.losses.z import ZLoss, z_loss

__all__ = [
    "EntropyLoss",
    "GlobalBalanceLoss",
    "ImportanceLoss",
    "LoadBalanceLoss",
    "LoadLoss",
    "RouterLoss",
    "RoutingEntropyLoss",
    "SequenceBalanceLoss",
    "SoftBalanceLoss",
    "StatisticsLoss",
    "ZLoss",
    "entropy",
    "expected_load",
    "importance",
    "load_balance",
    "transformers_load_balance",
    "z_loss",
]
