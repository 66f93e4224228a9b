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
from typing import Any, Literal, NoReturn

from torch import nn

from torch_routers.losses import RouterLoss
from torch_routers.presets import list_presets
from torch_routers.registry import Configurable, check_choice, from_config, list_routers
from torch_routers.routers import Router

PEFT_TYPE = "ROUTED_LORA"

#: Of a configuration in a file; a later one may mean what this code does not know.
SCHEMA_VERSION = 1

_CHOICES: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "normal"),
    "router_scope": ("module", "block", "layer", "model"),
    "router_input": ("token", "sequence", "task", "first_pass"),
    "mode": (None, "hard", "soft", "soft_topk", "st_topk"),
    "mix": ("product", "factors", "shared_a", "ranks"),
    "layout": ("expert_major",),
}


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
            or 4.
        expert_names: their names, distinct and without dots. Default: ``"0"``, ``"1"``, …
        ranks: a rank for each expert, in the place of ``r``. 0: it adds nothing.
        router: a class of routers, its name, or that of a known model; see `create_router`.
        router_arguments: of its constructor, without sizes and losses. Default: ``top_k`` of 2 for
            ``"TopKRouter"``, or 1 where there is one expert.
        router_scope: what shares a routing: each layer has its own, all that have the same parent,
            all in one layer of the model, or all of the model.
        router_input: what it is computed from: each token, the mean of a sequence, the task, or
            each token in a first pass without experts.
        num_tasks: for ``router_input="task"``.
        task_embedding_size: features of the embedding of a task.
        mode: of a router that has modes; the same as ``mode`` among the ``router_arguments``, and
            it takes precedence.
        mix: what is weighed: the product of A and B, each factor, B with one A for all, or ranks.
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
    expert_names: list[str] | None = None
    ranks: list[int] | None = None
    router: str | type[Router] = "TopKRouter"
    router_arguments: dict[str, Any] | None = None
    router_scope: Literal["module", "block", "layer", "model"] = "module"
    router_input: Literal["token", "sequence", "task", "first_pass"] = "token"
    num_tasks: int | None = None
    task_embedding_size: int = 64
    mode: Literal["hard", "soft", "soft_topk", "st_topk"] | None = None
    mix: Literal["product", "factors", "shared_a", "ranks"] = "product"
    losses: Sequence[RouterLoss | dict[str, Any]] = ()
    layout: Literal["expert_major"] = "expert_major"
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        self._normalize()
        self._check_numbers()
        self._check_experts()
        self._check_targets()
        self._check_router()

    def experts(self) -> list[str]:
        """The names of the experts, in the order of the router."""
        return list(self.expert_names or map(str, range(self.num_experts)))

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
        unknown = sorted(set(values) - {known.name for known in fields(cls)})
        if unknown:
            warnings.warn(
                f"RoutedLoraConfig: expected known fields, got {unknown} too, which are ignored",
                stacklevel=2,
            )
        return cls(**{name: value for name, value in values.items() if name not in unknown})

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON, and a file of it where there is a path."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
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

    # ---- checks ----------------------------------------------------------------------------------

    def _normalize(self) -> None:
        """The same values as plain data, for JSON and for ==."""
        router = self.router
        if isinstance(router, type) and issubclass(router, Router):
            router = router.__name__
        arguments = self.router_arguments
        if arguments is None:
            arguments = {"top_k": 1 if self._expert_count() == 1 else 2}
            arguments = arguments if router == "TopKRouter" else {}
        if not isinstance(arguments, Mapping):
            _fail("router_arguments", "a dict", arguments)
        mode = arguments.get("mode") if self.mode is None else self.mode
        losses = [_loss_config(loss) for loss in _listed("losses", self.losses)]
        self._set(
            router=router,
            router_arguments=_plain("router_arguments", dict(arguments))
            | ({} if mode is None else {"mode": mode}),
            mode=mode,
            losses=_plain("losses", losses),
            num_experts=self._expert_count(),
            rank_pattern=_plain("rank_pattern", dict(self.rank_pattern or {})),
            alpha_pattern=_plain("alpha_pattern", dict(self.alpha_pattern or {})),
        )
        if isinstance(self.task_type, Enum):
            self._set(task_type=self.task_type.value)
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                in_order = sorted(value) if isinstance(value, (set, frozenset)) else value
                self._set(**{name: _strings(name, in_order)})
        for name in ("expert_names", "ranks", "layers_to_transform"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                self._set(**{name: _listed(name, value)})

    def _expert_count(self) -> int:
        if self.num_experts is not None:
            return self.num_experts
        names = self.ranks if self.expert_names is None else self.expert_names
        return 4 if names is None else len(names)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        for name in ("r", "num_experts", "task_embedding_size"):
            _check_integer(name, getattr(self, name), 1)
        if not _is_number(self.lora_alpha):
            _fail("lora_alpha", "a number", self.lora_alpha)
        if not (_is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1):
            _fail("lora_dropout", "in [0, 1)", self.lora_dropout)
        for name in ("use_rslora", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                _fail(name, "True or False", getattr(self, name))
        for name, choices in _CHOICES.items():
            check_choice("RoutedLoraConfig", name, getattr(self, name), choices)
        if self.bias != "none":
            _fail("bias", "'none'", self.bias, "Biases of base layers are not trained")
        if self.schema_version != SCHEMA_VERSION:
            _fail(
                "schema_version",
                str(SCHEMA_VERSION),
                self.schema_version,
                "It is of another version of torch-routers",
            )

    def _check_experts(self) -> None:
        count = self.num_experts
        for name, of_experts in ("expert_names", self.expert_names), ("ranks", self.ranks):
            if of_experts is not None and len(of_experts) != count:
                _fail(name, f"for num_experts={count} experts", of_experts)
        for rank in self.ranks or ():
            _check_integer("ranks", rank, 0)
        for name in self.expert_names or ():
            if not (isinstance(name, str) and name and "." not in name):
                _fail("expert_names", "names without dots", self.expert_names)
            if hasattr(nn.ModuleDict(), name):
                _fail("expert_names", "other than attributes of nn.ModuleDict", name)
        if len(set(self.expert_names or ())) < len(self.expert_names or ()):
            _fail("expert_names", "distinct", self.expert_names)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, name).items():
                _check_regex(name, pattern)
                if isinstance(value, list) and len(value) != count:
                    _fail(name, f"with num_experts={count} values in a list", value)
                for number in value if isinstance(value, list) else [value]:
                    if name == "rank_pattern":
                        _check_integer(name, number, 0)
                    elif not _is_number(number):
                        _fail(name, "with numbers", number)

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                _check_regex(name, getattr(self, name))
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, list) else [] if layers is None else [layers]:
            _check_integer("layers_to_transform", layer, 0)
        patterns = self.layers_pattern
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            _check_regex("layers_pattern", pattern)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    _fail(name, "with a list of target_modules alone", getattr(self, name))
        if patterns and layers is None:
            _fail("layers_pattern", "with layers_to_transform alone", patterns)

    def _check_router(self) -> None:
        check_choice("RoutedLoraConfig", "router", self.router, [*list_routers(), *list_presets()])
        taken = {"hidden_size", "num_experts", "losses"} & set(self.router_arguments)
        if taken:
            _fail("router_arguments", "without sizes and losses", sorted(taken))
        if self.router_input == "task":
            _check_integer("num_tasks", self.num_tasks, 1)


# ---- values --------------------------------------------------------------------------------------


def pattern_for(patterns: Iterable[str], module_name: str) -> str | None:
    """The first regular expression that is the end of a name, or all of it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module_name)), None)


def _of_expert(patterns: Mapping[str, Any], module_name: str, expert: int, default: Any) -> Any:
    pattern = pattern_for(patterns, module_name)
    value = default if pattern is None else patterns[pattern]
    return value[expert] if isinstance(value, list) else value


def _fail(name: str, condition: str, value: Any, remedy: str = "") -> NoReturn:
    end = f". {remedy}" if remedy else ""
    raise ValueError(f"RoutedLoraConfig: expected {name} {condition}, got {value!r}{end}")


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _fail(name, f">= {least}", value)


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        _fail(name, "a regular expression", pattern, str(error))


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        _fail(name, "a list", value)
    return list(value)


def _strings(name: str, value: Any) -> list[str]:
    if not all(isinstance(item, str) for item in _listed(name, value)):
        _fail(name, "a list of names", value)
    return list(value)


def _loss_config(loss: Any) -> dict[str, Any]:
    """Plain data from which the loss can be built; it is, to see that."""
    if isinstance(loss, RouterLoss):
        return loss.config()
    if not isinstance(from_config(loss), RouterLoss):
        _fail("losses", "with losses or their configurations", loss)
    return loss


def _plain(name: str, value: Any) -> Any:
    """As JSON would give it back."""

    def configuration(item: Any) -> dict[str, Any]:
        if isinstance(item, Configurable):
            return item.config()
        _fail(name, "with numbers, strings, lists and configurations", item)

    return json.loads(json.dumps(value, default=configuration))
