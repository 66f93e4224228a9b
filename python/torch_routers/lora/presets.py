"""Mixtures of LoRAs from the literature, as configurations."""

import copy
from typing import Any

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.losses import (
    LoadBalanceLoss,
    LocalizedBalanceLoss,
    RoutingEntropyLoss,
    SoftBalanceLoss,
    SpecializationLoss,
)
from torch_routers.registry import check_choice

_ATTENTION = [
    "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "attention.output.dense",
]  # fmt: skip

_FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]

_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", *_FEED_FORWARD]

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2309.05444; for-ai/parameter-efficient-moe, configs/molora.gin
    "molora": {
        "r": 4,
        "lora_alpha": 16,
        "num_experts": 10,
        "init_lora_weights": "normal",
        "target_modules": "all-linear",
        "router": "SoftRouter",
    },
    # arXiv 2507.00029
    "lora_mixer": {
        "num_experts": 4,
        "target_modules": _ATTENTION,
        "router": "SoftRouter",
        "router_arguments": {"top_k": 3},
        "mode": "soft",
        "router_scope": "block",
        "losses": [SpecializationLoss(1e-2)],
    },
    # arXiv 2404.15159; TUDB-Labs/MixLoRA, README and mixlora/config.py
    "mixlora": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "num_experts": 8,
        "target_modules": _FEED_FORWARD,
        "router": "TopKRouter",
        "router_arguments": {"top_k": 2},
        "router_scope": "block",
        "mix": "block",
        "losses": [LoadBalanceLoss(1e-3)],
    },
    # arXiv 2310.18339; liuqidong07/MOELoRA-peft, src/MLoRA/arguments.py: the rank 8 is of all
    # experts together, and so is alpha = 32
    "moelora": {
        "r": 2,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "num_experts": 4,
        "target_modules": ["q_proj", "v_proj"],
        "router": "SoftRouter",
        "router_input": "task",
        "num_tasks": 16,
    },
    # arXiv 2404.19245; Clin0212/HydraLoRA, fine-tuning.sh
    "hydralora": {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 4,
        "target_modules": _FEED_FORWARD,
        "router": "SoftRouter",
        "mix": "shared_a",
    },
    # arXiv 2312.09979; Ablustrund/LoRAMoE, run_loramoe.sh, whose loss has the weight 0
    "loramoe": {
        "r": 4,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "num_experts": 8,
        "target_modules": _FEED_FORWARD,
        "router": "SoftRouter",
        "losses": [LocalizedBalanceLoss(1e-2)],
    },
    # arXiv 2402.08562; GCYZSL/MoLA, README
    "mola": {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": _LLAMA,
        "router": "TopKRouter",
        "router_arguments": {"top_k": 2},
    },
    # arXiv 2504.00661; mikecovlee/DynMoLE
    "dynmole": {
        "r": 24,
        "lora_alpha": 48,
        "lora_dropout": 0.05,
        "num_experts": 6,
        "target_modules": _FEED_FORWARD,
        "router": "EntropyRouter",
        "losses": [RoutingEntropyLoss(1e-2), SoftBalanceLoss(1e-3)],
    },
    # arXiv 2202.13914; PEFT's PolyConfig: r = 8, four skills, and a factor of 1 / r
    "poly": {
        "r": 8,
        "lora_alpha": 1,
        "num_experts": 4,
        "target_modules": ["q_proj", "v_proj"],
        "router": "PolyRouter",
        "router_input": "task",
        "num_tasks": 1,
        "mix": "factors",
    },
    # arXiv 2510.08396; gfyddha/FlyLoRA, flylora.py: r = 32, alpha = 2 r
    "flylora": {
        "r": 1,
        "lora_alpha": 2,
        "num_experts": 32,
        "target_modules": _LLAMA,
        "router": "RankRouter",
        "router_arguments": {"top_k": 8},
        "mix": "ranks",
    },
}

#: Of mixtures whose experts are LoRAs that exist: what `from_adapters` is given.
ADAPTER_PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2405.11157
    "arrow": {
        "router": "PrototypeRouter",
        "init": "arrow",
    },
    # arXiv 2402.05859
    "phatgoose": {
        "router": "PrototypeRouter",
        "router_arguments": {"score": "normalized"},
        "init": "gates",
    },
    # arXiv 2402.07148; PEFT's XLoraConfig: depth 1, one scaling for all layers
    "xlora": {
        "router": "SoftRouter",
        "router_input": "last_hidden",
        "router_scope": "model",
    },
}


def lora_preset(name: str, **options: Any) -> RoutedLoraConfig:
    """The configuration of a known mixture of LoRAs; each has a page in the documentation.

    ============== ================= ==============================================================
    ``molora``     arXiv 2309.05444  a softmax over all experts, at every linear layer
    ``lora_mixer`` arXiv 2507.00029  experts at the attention, by label, then by a router
    ``mixlora``    arXiv 2404.15159  each expert is the feed-forward network with its own LoRAs
    ``moelora``    arXiv 2310.18339  weights by an embedding of the task
    ``hydralora``  arXiv 2404.19245  one A for all experts
    ``loramoe``    arXiv 2312.09979  a softmax, and balance inside groups of experts by task
    ``mola``       arXiv 2402.08562  more experts in higher layers, by ``experts_per_layer``
    ``dynmole``    arXiv 2504.00661  as many experts as the entropy of the router asks for
    ``poly``       arXiv 2202.13914  factors mixed by a table of tasks; MHR with ``num_splits``
    ``flylora``    arXiv 2510.08396  experts are ranks, chosen by the projection itself
    ============== ================= ==============================================================

    `adapter_preset` has those whose experts are LoRAs that exist.

    Args:
        name: one of `list_lora_presets`.
        options: of `RoutedLoraConfig`, in the place of the preset's.

    Raises:
        ValueError: an unknown name, or an option that does not fit.

    >>> lora_preset("molora", num_experts=4).r
    4
    """
    check_choice("lora_preset", "name", name, sorted(PRESETS))
    if name == "mola" and options.get("experts_per_layer") is None:
        raise ValueError(
            "lora_preset: expected experts_per_layer for 'mola', got none. A fourth of the layers "
            "each has 2, 4, 6 and 8 in the paper"
        )
    return RoutedLoraConfig(**{**PRESETS[name], **options})


def list_lora_presets() -> list[str]:
    """Names for `lora_preset`.

    >>> list_lora_presets()[:4]
    ['dynmole', 'flylora', 'hydralora', 'lora_mixer']
    """
    return sorted(PRESETS)


def adapter_preset(name: str) -> dict[str, Any]:
    """Options of `from_adapters` for a known rule of routing among LoRAs that exist.

    ``"arrow"`` (arXiv 2405.11157): the three experts whose first singular direction the token is
    most along, without training. ``"phatgoose"`` (arXiv 2402.05859): the two whose own gates fit
    best. ``"xlora"`` (arXiv 2402.07148): a softmax of the last hidden state of a first pass, for
    all layers; call `two_passes`, and train the router.

    Raises:
        ValueError: an unknown name.

    >>> adapter_preset("arrow")["init"]
    'arrow'
    """
    check_choice("adapter_preset", "name", name, sorted(ADAPTER_PRESETS))
    return copy.deepcopy(ADAPTER_PRESETS[name])
