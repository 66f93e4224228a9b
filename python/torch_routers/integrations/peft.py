"""Mixtures of LoRAs as a method of PEFT. Importing this module is what makes PEFT know it."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from torch_routers import lora
from torch_routers.lora.adapters import exact_targets
from torch_routers.lora.config import PEFT_TYPE
from torch_routers.lora.files import current_config, freeze_parts, frozen_parts
from torch_routers.lora.inject import configs_of, layers_of, set_config
from torch_routers.lora.storage import name_on_disk

try:
    import peft
except ImportError as error:
    raise ImportError(
        "torch_routers.integrations.peft: expected the package peft, got none. "
        'Run: pip install "peft>=0.21"'
    ) from error
try:
    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    from peft.tuners.tuners_utils import BaseTuner, _delete_auxiliary_adapter
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.integrations import init_empty_weights
    from peft.utils.other import set_additional_trainable_modules

    from torch_routers.integrations.peft_layer import RoutedLoraPeftLinear
except ImportError as error:
    raise ImportError(
        f"torch_routers.integrations.peft: expected what peft 0.21 has, got {error} in peft "
        f'{peft.__version__}. Run: pip install "peft>=0.21,<0.22"'
    ) from error

#: Methods that PEFT calls, and that stand here in the place of its own.
_REPLACED = (
    "inject_adapter",
    "delete_adapter",
    "_unload_and_optionally_merge",
    "_get_adapter_state_dict",
    "_remove_adapter_name_from_key",
    "_remap_adapter_state_dict_for_load",
)
if missing := [name for name in _REPLACED if not hasattr(BaseTuner, name)]:
    raise ImportError(
        f"torch_routers.integrations.peft: expected BaseTuner with {missing}, as peft 0.21 has, "
        f'got peft {peft.__version__}. Run: pip install "peft>=0.21,<0.22"'
    )

#: What stands before the name of an adapter in a key.
_PART = re.compile(r"\.routed_(?:A|B|gate|tasks)\.")


class _PeftType(str):
    """The name of the method: equal to the plain string, and printed as PEFT prints its own."""

    @property
    def value(self) -> str:
        return "".join(self)

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


ROUTED_LORA = _PeftType(PEFT_TYPE)

_OURS = [
    field
    for field in dataclasses.fields(lora.RoutedLoraConfig)
    if field.name not in peft.PeftConfig.__dataclass_fields__
]

_Fields = dataclasses.make_dataclass(
    "_Fields",
    [
        (
            field.name,
            field.type,
            dataclasses.field(default=field.default, default_factory=field.default_factory),
        )
        for field in _OURS
    ]
    + [("frozen", "dict[str, Any] | None", dataclasses.field(default=None))],
    bases=(peft.PeftConfig,),
)


class RoutedLoraPeftConfig(_Fields):
    """A mixture of LoRAs for ``peft.get_peft_model``.

    Args:
        options: the fields of `lora.RoutedLoraConfig`, by keyword, and those that every
            configuration of PEFT has. Without ``target_modules``, models of Transformers get the
            targets that PEFT knows for LoRA.
        frozen: the ``experts``, a list of names, that are not trained, and whether the
            ``router`` is not. Written when saving; `lora.set_trainable` is the way to change it.

    Raises:
        ValueError: a value that does not fit.

    >>> import peft
    >>> from torch_routers.integrations.peft import RoutedLoraPeftConfig
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> config = RoutedLoraPeftConfig(num_experts=3, target_modules=["0"])
    >>> model = peft.get_peft_model(model, config)
    >>> model.get_model_status().peft_types
    {'default': 'ROUTED_LORA'}
    """

    @classmethod
    def from_routed(cls, config: lora.RoutedLoraConfig, **options: Any) -> RoutedLoraPeftConfig:
        """The same as a configuration of `tr.lora`, such as a preset, with other ``options``."""
        return cls(**{**dataclasses.asdict(config), **options})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ROUTED_LORA
        self.take(self.routed())

    def routed(self) -> lora.RoutedLoraConfig:
        """The same, as `lora.inject` takes it."""
        fields = dataclasses.fields(lora.RoutedLoraConfig)
        return lora.RoutedLoraConfig(**{field.name: getattr(self, field.name) for field in fields})

    def take(self, config: lora.RoutedLoraConfig) -> None:
        """Have the values of another one, except those that are PEFT's."""
        for field in _OURS:
            setattr(self, field.name, getattr(config, field.name))


class RoutedLoraModel(BaseTuner):
    """What ``peft.get_peft_model`` puts around a model for a `RoutedLoraPeftConfig`.

    The mixtures are those of `lora.inject`, one for each adapter and of its name; functions of
    `lora` take the PeftModel as they take the model inside. One adapter is active at a time.
    """

    prefix = "routed_"
    tuner_layer_cls = RoutedLoraPeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        config = self._prepare_adapter_config(
            self.peft_config[adapter_name], self.get_model_config(model)
        )
        _check_names(self.peft_config)
        if any(type(module) is lora.RoutedLoraLinear for module in model.modules()):
            raise ValueError(
                "RoutedLoraPeftConfig: expected a model without mixtures of lora.inject, got "
                f"{sorted(configs_of(model))}. Save them with lora.save_adapter, take them out "
                "with lora.unload, and load them with PeftModel.from_pretrained"
            )
        if not any(adapter_name in layer.routed_A for layer in _tuner_layers(model)):
            set_config(model, adapter_name, None)  # deleted by functions of PEFT, layer by layer
        # What other adapters train besides their experts; inject would freeze it.
        before = [(p, p.requires_grad) for p in model.parameters()] if configs_of(model) else []
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            report = lora.inject(
                model,
                config.routed() if state_dict is None else _limited(config, model, state_dict),
                adapter_name,
                layer_type=RoutedLoraPeftLinear,
            )
        freeze_parts(model, adapter_name, config.frozen or {})
        is_active = adapter_name in self.active_adapters
        for layer in layers_of(model).values():
            layer.activate(self.active_adapters)
            if config.inference_mode or not is_active:
                layer.set_requires_grad(adapter_name, False)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(model),
            adapter_name=adapter_name,
            activate_adapter=is_active,
        )
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        known = self.targeted_module_names
        known += [name for name in report.matched if name not in known]

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RoutedLoraModel: expected inject_adapter, got a single layer")

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"delete_adapter: expected an adapter among {list(self.peft_config)}, got "
                f"{adapter_name!r}"
            )
        del self.peft_config[adapter_name]
        lora.unload(self.model, adapter_name)
        active = [name for name in self.active_adapters if name != adapter_name]
        if not active and self.peft_config:
            active = list(self.peft_config)[:1]
            warnings.warn(
                f"delete_adapter: expected an adapter that is not active, got {adapter_name!r}; "
                f"{active[0]!r} is active now",
                stacklevel=3,
            )
        _delete_auxiliary_adapter(self.model, adapter_name, new_active_adapters=active)
        if not active:
            self.active_adapter = []
        elif active != self.active_adapters:
            self.set_adapter(active)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            names = self.active_adapters if adapter_names is None else adapter_names
            if len(names) != 1:
                raise ValueError(f"merge_and_unload: expected one adapter, got {names}")
            lora.merge(self.model, names[0])
        if configs_of(self.model):
            lora.unload(self.model)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Any | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is not None:
            raise ValueError(
                f"RoutedLoraModel: expected no adapter_names, got {adapter_names}. A batch has one "
                "mixture; its routers choose experts, for tasks by routing_task_ids"
            )
        yield

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: RoutedLoraPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What is saved; the configuration, which is saved next, becomes that of the model now."""
        config.take(current_config(model, adapter_name))
        config.frozen = frozen_parts(model, adapter_name)
        _check_names(model.peft_config)
        keys = _keys(model, adapter_name).values()
        return {key: state_dict[key] for key in keys if key in state_dict}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return re.sub(rf"({_PART.pattern}){re.escape(adapter_name)}\.", r"\1", key, count=1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: RoutedLoraPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The keys of the model for those of a file, which has all of them, and no other."""
        keys = _keys(model, adapter_name)
        given = {name_on_disk(key): key for key in state_dict}
        for difference, names in (
            ("missing", [key for key in keys if key not in given]),
            ("unknown", [key for key in given if _PART.search(key) and key not in keys]),
        ):
            if names:
                raise ValueError(
                    f"load_adapter: expected the keys of the adapter {adapter_name!r}, got "
                    f"{len(names)} {difference} ones, such as {names[0]}"
                )
        return {keys.get(name, key): state_dict[key] for name, key in given.items()}


def _tuner_layers(model: nn.Module) -> Iterator[RoutedLoraPeftLinear]:
    return (module for module in model.modules() if isinstance(module, RoutedLoraPeftLinear))


def _keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """The keys of an adapter in the state of a model, by those on disk without PEFT's prefix."""
    return {
        f"{name_on_disk(name)}.{kind}.{key}": f"{name}.{kind}.{adapter_name}.{key}"
        for name, layer in layers_of(model, adapter_name, "peft").items()
        for kind in layer.adapter_layer_names
        if adapter_name in getattr(layer, kind)
        for key in getattr(layer, kind)[adapter_name].state_dict()
    }


def _limited(
    config: RoutedLoraPeftConfig, model: nn.Module, state_dict: dict[str, Tensor]
) -> lora.RoutedLoraConfig:
    """The configuration for the layers that have keys alone, whatever else it means."""
    names = {_PART.split(name_on_disk(key))[0] for key in state_dict if _PART.search(key)}
    return dataclasses.replace(
        config.routed(),
        target_modules=exact_targets(model, sorted(names)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def _check_names(configs: dict[str, RoutedLoraPeftConfig]) -> None:
    """PEFT leaves out of a file what has the name of another adapter in its key."""
    experts = {expert for config in configs.values() for expert in config.routed().experts()}
    if shared := sorted(experts.intersection(configs)):
        raise ValueError(
            f"RoutedLoraPeftConfig: expected adapters and experts of different names, got {shared} "
            "for both"
        )


PEFT_TYPE_TO_CONFIG_MAPPING[ROUTED_LORA] = RoutedLoraPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[ROUTED_LORA] = RoutedLoraModel
PEFT_TYPE_TO_PREFIX_MAPPING[ROUTED_LORA] = RoutedLoraModel.prefix
