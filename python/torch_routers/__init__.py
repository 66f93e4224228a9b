"""Routing layers for mixtures of experts."""

# isort: off
from torch_routers import _library  # noqa: F401  (first: everything needs its operators)

# isort: on
from torch_routers import lora, losses, metrics, ops
from torch_routers.balancing import BalanceController, QuantileController, parameter_groups
from torch_routers.delivery import attach, collect, follow_inputs
from torch_routers.layers import (
    BlockFFN,
    ClampedSwiGLUExperts,
    ExpertList,
    LoraExperts,
    MLPExperts,
    MoE,
    SoftMergedExperts,
    SwiGLU,
    SwiGLUExperts,
)
from torch_routers.presets import create_moe, list_presets
from torch_routers.registry import create_router, from_config, list_routers
from torch_routers.replication import assert_replicated
from torch_routers.routers import (
    AdaptiveKRouter,
    EntmaxRouter,
    EntropyRouter,
    HashRouter,
    NoisyTopKRouter,
    PolyRouter,
    PrototypeRouter,
    RankRouter,
    RecurrentCell,
    RecurrentRouter,
    RecurrentStack,
    ReLURouter,
    Router,
    RouterTraits,
    SMEARRouter,
    SoftRouter,
    TopKRouter,
    TopPRouter,
    calibrate_thresholds,
    share_cell,
)
from torch_routers.routers.base import CrossBatchRoutingWarning
from torch_routers.routers.topk import ZeroRouterGradientWarning
from torch_routers.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "AdaptiveKRouter",
    "BalanceController",
    "BlockFFN",
    "ClampedSwiGLUExperts",
    "CrossBatchRoutingWarning",
    "EntmaxRouter",
    "EntropyRouter",
    "ExpertList",
    "HashRouter",
    "LoraExperts",
    "MLPExperts",
    "MoE",
    "NoisyTopKRouter",
    "PolyRouter",
    "PrototypeRouter",
    "QuantileController",
    "RankRouter",
    "ReLURouter",
    "RecurrentCell",
    "RecurrentRouter",
    "RecurrentStack",
    "Router",
    "RouterTraits",
    "Routing",
    "SMEARRouter",
    "SoftMergedExperts",
    "SoftRouter",
    "SwiGLU",
    "SwiGLUExperts",
    "TopKRouter",
    "TopPRouter",
    "ZeroRouterGradientWarning",
    "assert_replicated",
    "attach",
    "calibrate_thresholds",
    "collect",
    "create_moe",
    "create_router",
    "follow_inputs",
    "from_config",
    "list_presets",
    "list_routers",
    "lora",
    "losses",
    "metrics",
    "ops",
    "parameter_groups",
    "share_cell",
]
