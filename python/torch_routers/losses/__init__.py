"""Auxiliary losses: pure functions of tensors, and the small modules that carry a weight."""

from torch_routers.losses.activation import (
    ActivationLocalityLoss,
    ChunkSparsificationLoss,
    ReLUSparsityLoss,
    activation_locality,
    activation_probs,
    chunk_sparsification,
    relu_sparsity,
)
from torch_routers.losses.adaptive import AdaptiveFactor, AdaptiveSparsity
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
    "ActivationLocalityLoss",
    "AdaptiveFactor",
    "AdaptiveSparsity",
    "ChunkSparsificationLoss",
    "EntropyLoss",
    "GlobalBalanceLoss",
    "ImportanceLoss",
    "LoadBalanceLoss",
    "LoadLoss",
    "ReLUSparsityLoss",
    "RouterLoss",
    "RoutingEntropyLoss",
    "SequenceBalanceLoss",
    "SoftBalanceLoss",
    "StatisticsLoss",
    "ZLoss",
    "activation_locality",
    "activation_probs",
    "chunk_sparsification",
    "entropy",
    "expected_load",
    "importance",
    "load_balance",
    "relu_sparsity",
    "transformers_load_balance",
    "z_loss",
]
