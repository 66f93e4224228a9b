"""What is compared: how the encoder is adapted, and how the adapters are trained."""

from collections.abc import Callable
from dataclasses import dataclass

from minilm.settings import Settings
from torch_routers.lora import RoutedLoraConfig, lora_preset

EXPERTS = 4
"""One for each task: the two methods that go by label need as many."""
BASELINE = "lora"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        describes: half a line.
        config: of the mixture, from the settings; None: heads only.
        phases: of equal length, the mode of the routers in each. Experts are trained in the first.
        inference: the mode of the routers afterwards.
    """

    describes: str
    config: Callable[[Settings], RoutedLoraConfig | None]
    phases: tuple[str, ...] = ("soft",)
    inference: str = "soft"


def _shared(settings: Settings) -> dict:
    return {
        "r": settings.rank,
        "lora_alpha": settings.lora_alpha,
        "num_experts": EXPERTS,
        "target_modules": ["query", "value"],
        "router_scope": "block",
        "init_lora_weights": True,
    }


def _lora(settings: Settings) -> RoutedLoraConfig:
    # The last rank is as large as the router that two layers share.
    rank = EXPERTS * settings.rank + EXPERTS // 4
    one = {"r": rank, "num_experts": 1, "router": "SoftRouter"}
    return RoutedLoraConfig(**_shared(settings) | one)


def _molora(settings: Settings) -> RoutedLoraConfig:
    return lora_preset("molora", **_shared(settings))


METHODS = {
    "heads": Method("no adapter", lambda settings: None),
    "lora": Method("one LoRA with as many parameters", _lora),
    "molora": Method("MoLoRA: all experts by a softmax, one router for each block", _molora),
    "molora-own": Method(
        "MoLoRA with a router for each layer",
        lambda settings: lora_preset("molora", **_shared(settings) | {"router_scope": "module"}),
    ),
    "lora-mixer": Method(
        "LoRA-Mixer: experts by label, then routers; the best three at inference",
        lambda settings: lora_preset("lora_mixer", **_shared(settings)),
        phases=("hard", "soft"),
        inference="soft_topk",
    ),
    "oracle": Method(
        "the task's own expert by label, at inference too",
        _molora,
        phases=("hard",),
        inference="hard",
    ),
}
