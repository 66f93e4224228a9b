"""What a mixture of LoRAs is made of, with PEFT's names where PEFT has them."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from torch_routers.lora.checks import (
    SCHEMA_VERSION,
    as_dict,
    as_list,
    as_loss_config,
    as_names,
    check_config,
)
from torch_routers.losses import RouterLoss
from torch_routers.routers import Router

PEFT_TYPE = "ROUTED_LORA"

#: What the configuration in a file has beside the fields: what is frozen, and what PEFT adds.
_BESIDES = ("auto_mapping", "base_model_name_or_path", "frozen", "peft_version", "revision")


@dataclass(frozen=True)
class RoutedLoraConfig:
    r"""Which layers get experts, how many of which rank, and who decides among them.

    Expert :math:`e` of a layer adds :math:`c_e B_e A_e x`, with :math:`c_e = \alpha_e / r_e`, or
    :math:`\alpha_e / \sqrt{r_e}` with ``use_rslora`` (arXiv 2312.03732).

    Fields that PEFT's ``LoraConfig`` has mean what they mean there. Two are wider: a value of
    ``rank_pattern`` or ``alpha_pattern`` may be a list, with a number for each expert.

    Args:
        r: rank of each expert.
        lora_alpha: :math:`\alpha`.
        lora_dropout: probability that a number of the input is 0 for the experts, in training; one
            mask for all of them.
        target_modules: layers that get experts. A string is a regular expression for the whole
            name; a list are names, or their ends after a dot; ``"all-linear"`` are all layers that
            are linear but the output head.
        exclude_modules: layers that get none, by the same rules.
        layers_to_transform: number or numbers of the layers of the model, with a list of targets.
        layers_pattern: name or names of the list of those layers. Default: any.
        rank_pattern: ranks of layers by the end of their names, a regular expression.
        alpha_pattern: :math:`\alpha` in the same way.
        modules_to_save: modules that are trained as a whole and saved with the experts.
        bias: ``"none"``.
        use_rslora: divide by the square root of the rank.
        init_lora_weights: True: A as ``nn.Linear`` is initialised, B 0; ``"normal"``: A from a
            normal distribution of standard deviation 0.02, B 0 (MoLoRA, arXiv 2309.05444); False:
            B like A, so that the experts do something.
        fan_in_fan_out: that the weights of the base layers are ``[in_features, out_features]``;
            for adapters that are written for PEFT.
        task_type, inference_mode: kept for PEFT.
        num_experts: experts of each layer. Default: the number of ``expert_names`` or of ``ranks``,
            the largest of ``experts_per_layer``, or 4.
        experts_per_layer: for each layer of the model, how many of the experts it has: the first
            ones. For ``router_scope`` other than ``"model"`` (MoLA, arXiv 2402.08562).
        expert_names: their names, distinct and without dots. Default: ``"0"``, ``"1"``, …
        ranks: a rank for each expert, in the place of ``r``. 0: it adds nothing.
        router: a class of routers, its name, or that of a known model; see `create_router`.
        router_arguments: of its constructor, without sizes and losses. Default: ``top_k`` of 2 for
            ``"TopKRouter"``, or 1 where there is one expert. A ``"PrototypeRouter"`` has the
            ``top_k`` of its paper, or as many as there are experts, where they do not say it.
        router_scope: what shares a routing: each layer has its own, all that have the same parent,
            all in one layer of the model, or all of the model.
        router_input: what it is computed from: each token, the mean of a sequence, the task, each
            token as it was here in a first pass without experts, or as the model had it last in
            that pass. See `two_passes`.
        num_tasks: for ``router_input="task"``.
        task_embedding_size: features of the embedding of a task.
        mode: of a router that has modes; the same as ``mode`` among the ``router_arguments``, and
            it takes precedence.
        mix: what is weighed.
            ``"product"``: :math:`\sum_e w_e c_e B_e A_e x`.
            ``"shared_a"``: :math:`\sum_e w_e c_e B_e A x`, with one A for all experts (HydraLoRA,
            arXiv 2404.19245).
            ``"factors"``: :math:`c (\sum_e w_e B_e)(\sum_e w_e A_e) x`, with a routing per
            sequence, thus ``router_input`` of ``"sequence"`` or ``"task"`` (Poly,
            arXiv 2202.13914).
            ``"ranks"``: each expert is a rank of one LoRA, chosen by a `RankRouter`, which has the
            factor A; ``r`` is 1 (FlyLoRA, arXiv 2510.08396).
            ``"block"``: each expert is the parent of the layers with its own LoRAs in them, thus
            ``router_scope="block"``: a feed-forward network, nonlinearity and all (MixLoRA,
            arXiv 2404.15159). The parent takes hidden states and returns some; tokens are given to
            it once for each expert they have.
        losses: auxiliary losses, or their configurations, which the field keeps. Each router gets
            losses of its own.
        layout: of the factors in a file, ``"expert_major"``.
        schema_version: of the configuration in a file, 1.

    A configuration does not change; ``dataclasses.replace`` makes another.

    Raises:
        ValueError: a value that does not fit.

    >>> config = RoutedLoraConfig(r=4, expert_names=["sql", "med"], target_modules=["q_proj"])
    >>> config.num_experts, config.router_arguments, config.scaling_of("layers.0.q_proj", 1)
    (2, {'top_k': 2}, 2.0)
    >>> RoutedLoraConfig.from_json(config.to_json()) == config
    True
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int | list[int]] = field(default_factory=dict)
    alpha_pattern: dict[str, float | list[float]] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    bias: Literal["none"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | Literal["normal"] = True
    fan_in_fan_out: bool = False
    task_type: str | None = None
    inference_mode: bool = False
    num_experts: int | None = None
    experts_per_layer: list[int] | None = None
    expert_names: list[str] | None = None
    ranks: list[int] | None = None
    router: str | type[Router] = "TopKRouter"
    router_arguments: dict[str, Any] | None = None
    router_scope: Literal["module", "block", "layer", "model"] = "module"
    router_input: Literal["token", "sequence", "task", "first_pass", "last_hidden"] = "token"
    num_tasks: int | None = None
    task_embedding_size: int = 64
    mode: Literal["hard", "soft", "soft_topk", "st_topk"] | None = None
    mix: Literal["product", "shared_a", "factors", "ranks", "block"] = "product"
    losses: Sequence[RouterLoss | dict[str, Any]] = ()
    layout: Literal["expert_major"] = "expert_major"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self._set(self._as_plain_data())
        self._set(self._defaults())
        check_config(self)

    def experts(self) -> list[str]:
        """The names of the experts, in the order of the router."""
        return list(self.expert_names or map(str, range(self.num_experts)))

    def num_experts_of(self, module_name: str) -> int:
        """How many experts a layer has, by its name.

        Raises:
            ValueError: ``experts_per_layer`` says nothing about it.
        """
        if self.experts_per_layer is None:
            return self.num_experts
        number = re.search(r"(?:^|\.)(\d+)\.", module_name)
        if number is None or int(number[1]) >= len(self.experts_per_layer):
            raise ValueError(
                "RoutedLoraConfig: expected experts_per_layer for each layer of the model, got "
                f"{len(self.experts_per_layer)} numbers, and none for {module_name}"
            )
        return self.experts_per_layer[int(number[1])]

    def rank_of(self, module_name: str, expert: int) -> int:
        """The rank of an expert, by its number, in a layer, by its name."""
        default = self.r if self.ranks is None else self.ranks[expert]
        return _of_expert(self.rank_pattern, module_name, expert, default)

    def scaling_of(self, module_name: str, expert: int) -> float:
        """What the product of an expert's factors is multiplied by; 0 where its rank is."""
        rank = self.rank_of(module_name, expert)
        alpha = _of_expert(self.alpha_pattern, module_name, expert, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank) if rank else 0.0

    # ---- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, with PEFT's ``peft_type``."""
        return {"peft_type": PEFT_TYPE} | asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutedLoraConfig:
        """What `to_dict` gave. A warning says which fields are not known, and thus ignored.

        Raises:
            ValueError: a value that does not fit, or the configuration of something else.
        """
        values = dict(values)
        kind = values.pop("peft_type", PEFT_TYPE)
        if kind != PEFT_TYPE:
            raise ValueError(
                f"RoutedLoraConfig: expected peft_type {PEFT_TYPE!r}, got {kind!r}. "
                "Use lora.from_adapters for adapters of PEFT"
            )
        known = {known.name for known in fields(cls)}
        unknown = sorted(set(values) - known.union(_BESIDES))
        if unknown:
            warnings.warn(
                f"RoutedLoraConfig: expected known fields, got {unknown} too, which are ignored",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON, and a file of it where there is a path."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> RoutedLoraConfig:
        """From JSON, or from the file of a path; a string that begins with ``{`` is JSON.

        Raises:
            ValueError: no JSON object, or what `from_dict` does not take.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = source if is_text else Path(source).read_text(encoding="utf-8")
        where = "text" if is_text else str(source)
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"RoutedLoraConfig: expected JSON, got {where} ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"RoutedLoraConfig: expected a JSON object, got {where}")
        return cls.from_dict(values)

    # ----------------------------------------------------------------------------------------------

    def _as_plain_data(self) -> dict[str, Any]:
        """Fields that may be given as more than what JSON gives back, as that."""
        plain: dict[str, Any] = {
            "losses": [as_loss_config(loss) for loss in as_list("losses", self.losses)]
        }
        for name in ("expert_names", "experts_per_layer", "ranks", "layers_to_transform"):
            value = getattr(self, name)
            may_be_one = name == "layers_to_transform" and isinstance(value, int)
            if value is not None and not may_be_one:
                plain[name] = as_list(name, value)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            may_be_one = name != "modules_to_save" and isinstance(value, str)
            if value is not None and not may_be_one:
                plain[name] = as_names(name, value)
        for name in ("rank_pattern", "alpha_pattern"):
            plain[name] = as_dict(name, getattr(self, name) or {})
        if isinstance(self.task_type, Enum):
            plain["task_type"] = self.task_type.value
        if isinstance(self.router, type) and issubclass(self.router, Router):
            plain["router"] = self.router.__name__
        return plain

    def _defaults(self) -> dict[str, Any]:
        """Fields whose defaults follow from others."""
        count, arguments = self.num_experts, self.router_arguments
        if count is None:
            of_experts = self.ranks if self.expert_names is None else self.expert_names
            default = max(self.experts_per_layer or [4])
            count = default if of_experts is None else len(of_experts)
        if arguments is None:
            arguments = {"top_k": min(2, count)} if self.router == "TopKRouter" else {}
        arguments = as_dict("router_arguments", arguments)
        if self.router == "PrototypeRouter" and "top_k" not in arguments:
            most = 2 if arguments.get("score") == "normalized" else 3
            arguments["top_k"] = min(most, count)
        mode = arguments.get("mode") if self.mode is None else self.mode
        if mode is not None:
            arguments["mode"] = mode
        return {"num_experts": count, "router_arguments": arguments, "mode": mode}

    def _set(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


def pattern_for(patterns: Iterable[str], module_name: str) -> str | None:
    """The first regular expression that is the end of a name, or all of it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module_name)), None)


def _of_expert(patterns: Mapping[str, Any], module_name: str, expert: int, default: Any) -> Any:
    pattern = pattern_for(patterns, module_name)
    value = default if pattern is None else patterns[pattern]
    return value[expert] if isinstance(value, list) else value
