"""Auxiliary losses: pure functions of tensors, and the small modules that carry a weight."""

from torch_routers.losses.activation import (
    ActivationEntropyLoss,
    ReLUSparsityLoss,
    WeightL1Loss,
    activation_entropy,
    activation_probs,
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
from torch_routers.losses.chunks import ChunkSparsificationLoss, chunk_sparsification
from torch_routers.losses.entropy import EntropyLoss, RoutingEntropyLoss, entropy
from torch_routers.losses.global_balance import GlobalBalanceLoss
from torch_routers.losses.importance import ImportanceLoss, importance
from torch_routers.losses.load import LoadLoss, expected_load
from torch_routers.losses.neighbours import (
    ActivationLocalityLoss,
    TokenBalanceLoss,
    activation_locality,
    token_balance,
)
from torch_routers.losses.z import ZLoss, z_loss

__all__ = [
    "ActivationEntropyLoss",
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
    "TokenBalanceLoss",
    "WeightL1Loss",
    "ZLoss",
    "activation_entropy",
    "activation_locality",
    "activation_probs",
    "chunk_sparsification",
    "entropy",
    "expected_load",
    "importance",
    "load_balance",
    "relu_sparsity",
    "token_balance",
    "transformers_load_balance",
    "z_loss",
]
