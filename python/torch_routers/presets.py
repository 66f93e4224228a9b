"""Known models, as data: the arguments of their routers, and how their layers are put together.

Names are those of the models in Transformers. A preset says how a model routes; its sizes are those
of the released model and can be overridden. Auxiliary losses are not part of it, so that none can
be lost: pass ``losses=``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_routers.layers import MoE


@dataclass(frozen=True)
class Preset:
    """One model. ``router`` are the arguments of a `TopKRouter` besides ``hidden_size``."""

    source: str
    router: dict[str, Any]
    experts: str = "SwiGLUExperts"
    experts_options: dict[str, Any] = field(default_factory=dict)
    shared: bool = False
    """Whether the layer has a shared expert."""
    layer: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `MoE`."""


_PLAIN = {"renormalize": False}
_SIGMOID = {"score": "sigmoid", "selection_bias": True}

PRESETS = {
    "mixtral": Preset("arXiv 2401.04088", {"num_experts": 8, "top_k": 2}),
    "olmoe": Preset("arXiv 2409.02060", {"num_experts": 64, "top_k": 8, **_PLAIN}),
    "qwen2_moe": Preset(
        "arXiv 2407.10671",
        {"num_experts": 60, "top_k": 4, **_PLAIN},
        shared=True,
        layer={"shared_gate": True},
    ),
    "qwen3_moe": Preset("arXiv 2505.09388", {"num_experts": 128, "top_k": 8}),
    "granitemoe": Preset("Granite 3.0 language models, 2024", {"num_experts": 8, "top_k": 2}),
    "gpt_oss": Preset(
        "arXiv 2508.10925",
        {"num_experts": 128, "top_k": 4, "gate_bias": True},
        experts="ClampedSwiGLUExperts",
    ),
    "llama4": Preset(
        "Llama 4, Transformers",
        {"num_experts": 16, "top_k": 1, "score": "sigmoid", **_PLAIN},
        shared=True,
        layer={"scale_input": True},
    ),
    "glm4_moe": Preset(
        "arXiv 2508.06471", {"num_experts": 128, "top_k": 8, **_SIGMOID}, shared=True
    ),
    "deepseek_v2": Preset(
        "arXiv 2405.04434",
        {"num_experts": 64, "top_k": 6, "group_score": "max", **_PLAIN},
        shared=True,
    ),
    "deepseek_v3": Preset(
        "arXiv 2412.19437",
        {
            "num_experts": 256,
            "top_k": 8,
            "num_groups": 8,
            "topk_group": 4,
            "scale": 2.5,
            **_SIGMOID,
        },
        shared=True,
    ),
    "switch": Preset(
        "arXiv 2101.03961",
        {"num_experts": 8, "top_k": 1, "capacity": 64, "jitter": 0.01, **_PLAIN},
        experts="MLPExperts",
        experts_options={"activation": "relu"},
    ),
    "deepspeed_topk": Preset(
        "DeepSpeed, deepspeed/moe/sharded_moe.py",
        {
            "num_experts": 8,
            "top_k": 2,
            "jitter": 0.01,
            "capacity_factor": 1.0,
            "min_capacity": 8,
            "capacity_group": "batch",
            "drop_policy": "weight",
            "renormalize_after_drop": True,
            **_PLAIN,
        },
        experts="MLPExperts",
    ),
    "vmoe": Preset(
        "arXiv 2106.05974",
        {"num_experts": 8, "top_k": 2, "noise": "normal", **_PLAIN},
        experts="MLPExperts",
    ),
}


def preset(caller: str, name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"{caller}: expected one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]


def create_moe(
    name: str,
    hidden_size: int,
    intermediate_size: int,
    *,
    shared_size: int | None = None,
    **router: Any,
) -> MoE:
    """Build the MoE layer of a known model.

    Args:
        name: one of `list_presets`.
        hidden_size: of the tokens.
        intermediate_size: of each expert.
        shared_size: intermediate size of the shared expert, for models that have one. Default:
            ``intermediate_size``.
        router: arguments of the router that differ from the released model's, and ``losses``.

    Raises:
        ValueError: an unknown name, or an argument that does not fit.

    >>> moe = create_moe("deepseek_v3", 16, 8, num_experts=16, num_groups=4, topk_group=2)
    >>> moe(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """
    from torch_routers import layers
    from torch_routers.registry import create_router

    model = preset("create_moe", name)
    if shared_size is not None and not model.shared:
        raise ValueError(
            f"create_moe: expected shared_size for a model with a shared expert, got {shared_size} "
            f"for {name!r}"
        )
    gate = create_router(name, hidden_size=hidden_size, **router)
    bank = getattr(layers, model.experts)
    experts = bank(gate.num_experts, hidden_size, intermediate_size, **model.experts_options)
    shared = layers.SwiGLU(hidden_size, shared_size or intermediate_size) if model.shared else None
    return layers.MoE(gate, experts, shared=shared, **model.layer)


def list_presets() -> list[str]:
    """Names for `create_moe` and `create_router`.

    >>> list_presets()[:3]
    ['deepseek_v2', 'deepseek_v3', 'deepspeed_topk']
    """
    return sorted(PRESETS)
