"""Mixtures of LoRAs from the literature, as configurations."""

from typing import Any

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.losses import SpecializationLoss
from torch_routers.registry import check_choice

_ATTENTION = [
    "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "attention.output.dense",
]  # fmt: skip

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
}


def lora_preset(name: str, **options: Any) -> RoutedLoraConfig:
    """The configuration of a known mixture of LoRAs.

    ``"molora"`` (arXiv 2309.05444): ten experts of rank 4 with a factor of 4 at every linear layer,
    each layer with a router of its own, a softmax over all experts and no loss. With
    ``router_scope="block"`` layers share one. Its experiments are with T5 and Adafactor at 3e-4.

    ``"lora_mixer"`` (arXiv 2507.00029): experts at the projections of attention, in three phases:
    experts by label (``SoftRouter.mode = "hard"``), then routers softly, with the specialisation
    loss, experts frozen or held by `losses.expert_preservation`; for inference ``"soft_topk"`` with
    the best three. **A reproduction from the paper**, which has no code, and gives neither the
    rank, nor the weights of the losses, nor what the router looks at: rank 8, 1e-2 and the input of
    the attention are ours.

    Args:
        name: one of `list_lora_presets`.
        options: of `RoutedLoraConfig`, in the place of the preset's.

    Raises:
        ValueError: an unknown name, or an option that does not fit.

    >>> lora_preset("molora", num_experts=4).r
    4
    """
    check_choice("lora_preset", "name", name, sorted(PRESETS))
    return RoutedLoraConfig(**{**PRESETS[name], **options})


def list_lora_presets() -> list[str]:
    """Names for `lora_preset`.

    >>> list_lora_presets()
    ['lora_mixer', 'molora']
    """
    return sorted(PRESETS)
