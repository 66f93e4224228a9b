"""What the fields of a `RoutedLoraConfig` may be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from torch_routers.losses import RouterLoss
from torch_routers.presets import list_presets
from torch_routers.registry import Configurable, check_choice, from_config, list_routers

if TYPE_CHECKING:
    from torch_routers.lora.config import RoutedLoraConfig

#: Of a configuration in a file; a later one may mean what this code does not know.
SCHEMA_VERSION = 1

CHOICES: dict[str, tuple[Any, ...]] = {
    "router_scope": ("module", "block", "layer", "model"),
    "router_input": ("token", "sequence", "task", "first_pass", "last_hidden"),
    "mode": (None, "hard", "soft", "soft_topk", "st_topk"),
    "mix": ("product", "shared_a", "factors", "ranks", "block"),
    "layout": ("expert_major",),
}


def check_config(config: RoutedLoraConfig) -> None:
    """An error for a field that does not fit."""
    _check_numbers(config)
    _check_experts(config)
    _check_patterns(config)
    _check_targets(config)
    _check_router(config)
    _check_mix(config)


def _check_numbers(config: RoutedLoraConfig) -> None:
    for name in ("r", "num_experts", "task_embedding_size"):
        _check_integer(name, getattr(config, name), 1)
    if not _is_number(config.lora_alpha):
        fail("lora_alpha", "a number", config.lora_alpha)
    if not (_is_number(config.lora_dropout) and 0 <= config.lora_dropout < 1):
        fail("lora_dropout", "in [0, 1)", config.lora_dropout)
    for name in ("use_rslora", "fan_in_fan_out", "inference_mode"):
        if not isinstance(getattr(config, name), bool):
            fail(name, "True or False", getattr(config, name))
    for name, choices in CHOICES.items():
        check_choice("RoutedLoraConfig", name, getattr(config, name), choices)
    if config.init_lora_weights != "normal" and not isinstance(config.init_lora_weights, bool):
        fail("init_lora_weights", "True, False or 'normal'", config.init_lora_weights)
    if config.bias != "none":
        fail("bias", "'none'", config.bias, "Biases of base layers are not trained")
    if config.schema_version != SCHEMA_VERSION:
        remedy = "It is of another version of torch-routers"
        fail("schema_version", str(SCHEMA_VERSION), config.schema_version, remedy)


def _check_experts(config: RoutedLoraConfig) -> None:
    names = config.expert_names or []
    for field, of_experts in ("expert_names", config.expert_names), ("ranks", config.ranks):
        if of_experts is not None and len(of_experts) != config.num_experts:
            fail(field, f"for num_experts={config.num_experts} experts", of_experts)
    for rank in config.ranks or ():
        _check_integer("ranks", rank, 0)
    for count in config.experts_per_layer or ():
        _check_integer("experts_per_layer", count, 1)
    if config.experts_per_layer is not None:
        if max(config.experts_per_layer, default=0) != config.num_experts:
            condition = f"of which num_experts={config.num_experts} is the largest"
            fail("experts_per_layer", condition, config.experts_per_layer)
        if config.router_scope == "model":
            fail("router_scope", "other than 'model' with experts_per_layer", config.router_scope)
    for name in names:
        if not (isinstance(name, str) and name and "." not in name):
            fail("expert_names", "names without dots", names)
        if hasattr(nn.ModuleDict(), name):
            fail("expert_names", "other than attributes of nn.ModuleDict", name)
    if len(set(names)) < len(names):
        fail("expert_names", "distinct", names)


def _check_patterns(config: RoutedLoraConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(config, field).items():
            _check_regex(field, pattern)
            if isinstance(value, list) and len(value) != config.num_experts:
                fail(field, f"with num_experts={config.num_experts} values in a list", value)
            for number in value if isinstance(value, list) else [value]:
                if field == "rank_pattern":
                    _check_integer(field, number, 0)
                elif not _is_number(number):
                    fail(field, "with numbers", number)


def _check_targets(config: RoutedLoraConfig) -> None:
    for field in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, field), str):
            _check_regex(field, getattr(config, field))
    layers = config.layers_to_transform
    for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        _check_integer("layers_to_transform", layer, 0)
    patterns = config.layers_pattern
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        _check_regex("layers_pattern", pattern)
    if isinstance(config.target_modules, str):
        for field in ("layers_to_transform", "layers_pattern"):
            if getattr(config, field) is not None:
                fail(field, "None with a string of target_modules", getattr(config, field))
    if patterns and layers is None:
        fail("layers_pattern", "None without layers_to_transform", patterns)


def _check_router(config: RoutedLoraConfig) -> None:
    known = [*list_routers(), *list_presets()]
    check_choice("RoutedLoraConfig", "router", config.router, known)
    taken = {"hidden_size", "num_experts", "losses"} & set(config.router_arguments)
    if taken:
        fail("router_arguments", "without sizes and losses", sorted(taken))
    if config.router_input == "task":
        _check_integer("num_tasks", config.num_tasks, 1)


def _check_mix(config: RoutedLoraConfig) -> None:
    mix = f"with mix={config.mix!r}"
    needs = {
        "factors": {"router_input": ("sequence", "task")},
        "ranks": {
            "router_scope": ("module",),
            "router": ("RankRouter",),
            "router_input": ("token",),
            "r": (1,),
            "lora_dropout": (0,),
        },
        "block": {"router_scope": ("block",)},
    }.get(config.mix, {})
    for field, choices in needs.items():
        if getattr(config, field) not in choices:
            fail(field, f"among {list(choices)} {mix}", getattr(config, field))
    if config.router == "RankRouter" and config.mix != "ranks":
        fail("mix", "'ranks' with router='RankRouter'", config.mix)
    if config.mix in ("shared_a", "factors", "ranks"):  # experts are of one shape
        patterns = [*config.rank_pattern.values()]
        if config.mix != "shared_a":
            patterns += config.alpha_pattern.values()
        if config.ranks is not None or any(isinstance(value, list) for value in patterns):
            fail("ranks and patterns", f"that are the same for all experts {mix}", config.ranks)


# ---- values --------------------------------------------------------------------------------------


def fail(field: str, condition: str, value: Any, remedy: str = "") -> NoReturn:
    """The error for a field."""
    end = f". {remedy}" if remedy else ""
    raise ValueError(f"RoutedLoraConfig: expected {field} {condition}, got {value!r}{end}")


def as_list(field: str, value: Any) -> list[Any]:
    """What has an order as it is, and sets sorted."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        fail(field, "a list", value)
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)


def as_names(field: str, value: Any) -> list[str]:
    """A list of strings."""
    if not all(isinstance(item, str) for item in as_list(field, value)):
        fail(field, "a list of names", value)
    return as_list(field, value)


def as_dict(field: str, value: Any) -> dict[str, Any]:
    """As JSON would give it back."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        fail(field, "a dict with names", value)

    def configuration(item: Any) -> dict[str, Any]:
        if isinstance(item, Configurable):
            return item.config()
        fail(field, "with numbers, strings, lists and configurations", item)

    return json.loads(json.dumps(dict(value), default=configuration))


def as_loss_config(loss: Any) -> dict[str, Any]:
    """Plain data from which the loss can be built; it is, to see that."""
    config = loss.config() if isinstance(loss, RouterLoss) else loss
    if not isinstance(from_config(config), RouterLoss):
        fail("losses", "with losses or their configurations", loss)
    return as_dict("losses", config)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _check_integer(field: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        fail(field, f"an integer >= {least}", value)


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        fail(field, "a regular expression", pattern, str(error))
