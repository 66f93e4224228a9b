"""Layers: banks of experts, and drop-in replacements of a feed-forward layer."""

from torch_routers.layers.blockffn import BlockFFN
from torch_routers.layers.experts import (
    ClampedSwiGLUExperts,
    ExpertList,
    MLPExperts,
    SwiGLU,
    SwiGLUExperts,
)
from torch_routers.layers.lora_experts import LoraExperts
from torch_routers.layers.moe import MoE
from torch_routers.layers.soft_merged import SoftMergedExperts

__all__ = [
    "BlockFFN",
    "ClampedSwiGLUExperts",
    "ExpertList",
    "LoraExperts",
    "MLPExperts",
    "MoE",
    "SoftMergedExperts",
    "SwiGLU",
    "SwiGLUExperts",
]
