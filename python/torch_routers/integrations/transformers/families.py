"""The mixture-of-experts layers of Transformers whose routers can be swapped, as data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from torch import nn

from torch_routers.integrations.transformers.gates import (
    Answer,
    indices_weights,
    logits_weights_indices,
    scores_indices,
)

#: The major version: layers differ between 4 and 5.
VERSION = int(transformers.__version__.split(".")[0])


def _softmax(find: Callable[..., Any]) -> dict[str, Any]:
    renormalize = bool(find("norm_topk_prob", default=True))  # Mixtral always does
    return {"score": "softmax", "selection_bias": False, "renormalize": renormalize}


def _deepseek(find: Callable[..., Any]) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "selection_bias": True,
        "renormalize": bool(find("norm_topk_prob")),
        "scale": float(find("routed_scaling_factor")),
        "num_groups": find("num_group", "n_group"),
        "topk_group": find("topk_group"),
    }


def _gpt_oss(find: Callable[..., Any]) -> dict[str, Any]:
    return {"score": "softmax", "selection_bias": False, "gate_bias": True}


@dataclass(frozen=True)
class Family:
    """One kind of layer."""

    rule: Callable[[Callable[..., Any]], dict[str, Any]]
    """Arguments of a `TopKRouter` that chooses and weighs as the layer does."""
    gate: str = "gate"
    """The name of the layer's gate."""
    answer: Answer = logits_weights_indices
    """What the gate returns in Transformers 4; in 5 it is the same for all."""
    chooses: bool = True
    """Whether the layer chooses experts itself in Transformers 4, where its gate is linear."""

    def rule_of(self, block: nn.Module) -> dict[str, Any]:
        """The rule of one layer, and its number of experts per token."""

        def find(*names: str, **default: Any) -> Any:
            for module in (getattr(block, self.gate), block):
                for name in names:
                    if hasattr(module, name):
                        return getattr(module, name)
            return default["default"]

        return {"top_k": find("top_k"), **self.rule(find)}


#: By the name of the layer's class.
FAMILIES = {
    "MixtralSparseMoeBlock": Family(_softmax),
    "Qwen2MoeSparseMoeBlock": Family(_softmax),
    "Qwen3MoeSparseMoeBlock": Family(_softmax),
    "OlmoeSparseMoeBlock": Family(_softmax),
    "DeepseekV3MoE": Family(_deepseek, answer=indices_weights, chooses=False),
    "GptOssMLP": Family(_gpt_oss, "router", scores_indices, chooses=False),
}
