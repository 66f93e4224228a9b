"""Mixtures of LoRAs: routed low-rank experts beside the linear layers of any model."""

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.inject import check_reach, inject, two_passes, unload
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
from torch_routers.lora.presets import list_lora_presets, lora_preset
from torch_routers.lora.scope import RoutingScope

__all__ = [
    "InjectionReport",
    "LowRankFactor",
    "RoutedLoraConfig",
    "RoutedLoraLinear",
    "RoutingScope",
    "add_expert",
    "check_reach",
    "disable",
    "expert_parameters",
    "force",
    "inject",
    "list_lora_presets",
    "lora_preset",
    "match_modules",
    "print_trainable_parameters",
    "remove_expert",
    "set_mix",
    "set_trainable",
    "trainable_parameters",
    "two_passes",
    "unload",
]
