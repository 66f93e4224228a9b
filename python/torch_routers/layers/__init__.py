"""Layers: banks of experts, and drop-in replacements of a feed-forward layer."""

from torch_routers.layers.experts import (
    ClampedSwiGLUExperts,
    ExpertList,
    MLPExperts,
    SwiGLU,
    SwiGLUExperts,
)
from torch_routers.layers.moe import MoE

__all__ = ["ClampedSwiGLUExperts", "ExpertList", "MLPExperts", "MoE", "SwiGLU", "SwiGLUExperts"]
