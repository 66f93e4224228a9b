"""Mixtures of LoRAs: routed low-rank experts beside the linear layers of any model."""

from torch_routers.lora.adapters import from_adapters
from torch_routers.lora.collapse import CollapsedLora, collapse_to_lora, export_expert
from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.files import load_adapter, save_adapter
from torch_routers.lora.folders import LowRank, PeftAdapter, read_peft_adapter
from torch_routers.lora.inject import inject, unload
from torch_routers.lora.layouts import (
    convert_target_parameters,
    experts_from_target_parameters,
    read_target_parameters,
    target_parameters_from_experts,
)
from torch_routers.lora.linear import LowRankFactor, RoutedLoraLinear
from torch_routers.lora.manage import (
    add_expert,
    disable,
    expert_parameters,
    force,
    print_trainable_parameters,
    remove_expert,
    set_mix,
    set_trainable,
    trainable_parameters,
)
from torch_routers.lora.matching import InjectionReport, match_modules
from torch_routers.lora.merging import MergeError, bake_router, merge
from torch_routers.lora.passes import check_reach, two_passes
from torch_routers.lora.presets import adapter_preset, list_lora_presets, lora_preset
from torch_routers.lora.prototypes import arrow_prototypes, gates_from_samples
from torch_routers.lora.scope import RoutingScope

__all__ = [
    "CollapsedLora",
    "InjectionReport",
    "LowRank",
    "LowRankFactor",
    "MergeError",
    "PeftAdapter",
    "RoutedLoraConfig",
    "RoutedLoraLinear",
    "RoutingScope",
    "adapter_preset",
    "add_expert",
    "arrow_prototypes",
    "bake_router",
    "check_reach",
    "collapse_to_lora",
    "convert_target_parameters",
    "disable",
    "expert_parameters",
    "experts_from_target_parameters",
    "export_expert",
    "force",
    "from_adapters",
    "gates_from_samples",
    "inject",
    "list_lora_presets",
    "load_adapter",
    "lora_preset",
    "match_modules",
    "merge",
    "print_trainable_parameters",
    "read_peft_adapter",
    "read_target_parameters",
    "remove_expert",
    "save_adapter",
    "set_mix",
    "set_trainable",
    "target_parameters_from_experts",
    "trainable_parameters",
    "two_passes",
    "unload",
]
