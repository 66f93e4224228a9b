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
from torch_routers.losses.alignment import router_alignment
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
from torch_routers.losses.information import (
    MutualInformationLoss,
    mutual_information_loss,
    task_scores,
)
from torch_routers.losses.load import LoadLoss, expected_load
from torch_routers.losses.localized import LocalizedBalanceLoss, localized_balance
from torch_routers.losses.neighbours import (
    ActivationLocalityLoss,
    TokenBalanceLoss,
    activation_locality,
    token_balance,
)
from torch_routers.losses.orthogonality import (
    RouterOrthogonalityLoss,
    expert_orthogonality,
    router_orthogonality,
)
from torch_routers.losses.specialization import (
    RouteLabelLoss,
    SpecializationLoss,
    expert_preservation,
    route_label,
    specialization_loss,
)
from torch_routers.losses.variance import VarianceLoss, variance_loss
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
    "LocalizedBalanceLoss",
    "MutualInformationLoss",
    "ReLUSparsityLoss",
    "RouteLabelLoss",
    "RouterLoss",
    "RouterOrthogonalityLoss",
    "RoutingEntropyLoss",
    "SequenceBalanceLoss",
    "SoftBalanceLoss",
    "SpecializationLoss",
    "StatisticsLoss",
    "TokenBalanceLoss",
    "VarianceLoss",
    "WeightL1Loss",
    "ZLoss",
    "activation_entropy",
    "activation_locality",
    "activation_probs",
    "chunk_sparsification",
    "entropy",
    "expected_load",
    "expert_orthogonality",
    "expert_preservation",
    "importance",
    "load_balance",
    "localized_balance",
    "mutual_information_loss",
    "relu_sparsity",
    "route_label",
    "router_alignment",
    "router_orthogonality",
    "specialization_loss",
    "task_scores",
    "token_balance",
    "transformers_load_balance",
    "variance_loss",
    "z_loss",
]
