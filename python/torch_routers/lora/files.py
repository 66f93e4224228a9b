"""Mixtures on disk: save them, and load them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.inject import (
    config_of,
    configs_of,
    experts_of,
    inject,
    layers_of,
    scopes_of,
    unload,
)
from torch_routers.lora.linear import SHARED, RoutedLoraLinear
from torch_routers.lora.scope import RoutingScope
from torch_routers.lora.storage import (
    CONFIG,
    WEIGHTS,
    base_model_name,
    name_on_disk,
    read_config,
    read_tensors,
    save_folder,
    saved_modules,
)


def save_adapter(model: nn.Module, folder: str | Path, mix: str = "default") -> None:
    """Write a mixture of a model: its experts, routers and configuration, not the base model.

    The folder has ``adapter_model.safetensors`` and ``adapter_config.json``, as those of PEFT. Keys
    are ``base_model.model.<layer>.routed_A.<expert>.weight`` ``[r_e, in_features]``, ``routed_B``
    ``[out_features, r_e]`` and ``routed_gate.<name>``: the whole state of a router, with biases,
    counters and averages, once where layers share it. Modules of ``modules_to_save`` are in it
    under their own names. The configuration has the experts, ranks and scalings that the model has
    now, the mode of its routers, and ``schema_version`` and ``layout`` of the files.

    Both files are complete or not there: they are written elsewhere and renamed. Other files of the
    folder stay.

    Args:
        folder: is made if it is not there.
        mix: the name of the mixture, which is not in the files.

    Raises:
        ValueError: there is no such mixture, or its routers are in several modes.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.

    >>> from tempfile import TemporaryDirectory
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> report = inject(model, RoutedLoraConfig(num_experts=3, target_modules=["0"]))
    >>> with TemporaryDirectory() as folder:
    ...     save_adapter(model, folder)
    ...     config = load_adapter(model, folder, "a copy")
    >>> sorted(model.routed_lora), config.experts()
    (['a copy', 'default'], ['0', '1', '2'])
    """
    config = current_config(model, mix).to_dict()
    config["frozen"] = frozen_parts(model, mix)
    name = base_model_name(model)
    save_folder(
        "save_adapter",
        folder,
        {f"base_model.model.{key}": value for key, value in _state(_parts(model, mix)).items()},
        config if name is None else config | {"base_model_name_or_path": name},
    )


def load_adapter(model: nn.Module, folder: str | Path, mix: str = "default") -> RoutedLoraConfig:
    """Load what `save_adapter` wrote, into a model that has the mixture or gets it now.

    A model without a mixture of this name is injected with the configuration of the folder, and
    what was frozen there is frozen. One that has it must have the same layers, experts and routers;
    what is frozen stays frozen, and what is trained stays trained. Scalings are those of the
    folder.

    All or nothing: after an error the model is as before.

    Args:
        mix: the name that the mixture has, or gets, in the model.

    Returns:
        The configuration of the folder.

    Raises:
        ValueError: a file is missing, pickled or of something else; a key is missing or unknown, or
            a tensor has another shape. The text names the file and the key.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.
    """
    path = Path(folder) / WEIGHTS
    values = read_config("load_adapter", folder)
    config = RoutedLoraConfig.from_dict(values)
    tensors = read_tensors("load_adapter", folder)
    if mix in configs_of(model):
        _check_same(config, configs_of(model)[mix], Path(folder) / CONFIG)
        _load(model, mix, config, tensors, path)
        return config
    with _undone_after_errors(model, mix):
        inject(model, config, mix)
        _load(model, mix, config, tensors, path)
    freeze_parts(model, mix, values.get("frozen") or {})
    return config


def current_config(model: nn.Module, mix: str = "default") -> RoutedLoraConfig:
    """The configuration of a mixture with the experts, ranks and scalings that the model has now.

    Raises:
        ValueError: there is no such mixture.
    """
    layers = layers_of(model, mix, "save_adapter")
    config = _of_mode(config_of(model, mix, "save_adapter"), scopes_of(model, "lora", mix))
    named = saved_modules(model, config.modules_to_save)
    if more := [name for name in saved_modules(model, None, mix) if name not in named]:
        config = dataclasses.replace(
            config, modules_to_save=[*(config.modules_to_save or ()), *more]
        )
    experts = experts_of(layers, mix)
    ranks, scalings = {}, {}
    for name, layer in layers.items():
        absent = [0] * (len(experts) - len(layer.experts(mix)))
        of_layer = [layer.factors(mix, e)[0].shape[0] for e in layer.experts(mix)]
        ranks[name_on_disk(name)] = of_layer + absent
        scalings[name_on_disk(name)] = [*layer.scaling[mix].values(), *absent]
    told = config.experts() == experts and all(
        config.rank_of(name, e) == rank and config.scaling_of(name, e) == scalings[name][e]
        for name, of_experts in ranks.items()
        for e, rank in enumerate(of_experts)
        if rank
    )
    if told:
        return config
    return dataclasses.replace(
        config,
        num_experts=len(experts),
        expert_names=experts,
        **patterns_of(ranks, scalings),
    )


def _of_mode(config: RoutedLoraConfig, scopes: Sequence[RoutingScope]) -> RoutedLoraConfig:
    """The configuration with the mode in which routers are now, if they have any."""
    modes = {scope.router.mode for scope in scopes if hasattr(scope.router, "mode")}
    if len(modes) > 1:
        raise ValueError(
            f"save_adapter: expected one mode for all routers, got {sorted(modes)}. Set it for each"
        )
    if not modes or modes == {config.router_arguments.get("mode", "soft")}:
        return config
    return dataclasses.replace(config, mode=modes.pop())


def patterns_of(
    ranks: Mapping[str, Sequence[int]], scalings: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Fields of a configuration that say the ranks and scalings of experts, by layer."""
    alphas = {
        name: [scaling * rank for scaling, rank in zip(scalings[name], of_experts)]
        for name, of_experts in ranks.items()
    }
    return {
        "ranks": None,
        "use_rslora": False,
        "rank_pattern": exact_patterns(ranks),
        "alpha_pattern": exact_patterns(alphas),
    }


def exact_patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, as patterns: one for all but the exceptions, which come first."""
    shown = [json.dumps(value) for value in values.values()]
    common = json.loads(max(shown, key=shown.count))
    exceptions = {f"^{re.escape(name)}": value for name, value in values.items() if value != common}
    return exceptions | {".*": common}


# ---- what is in a file ---------------------------------------------------------------------------


def _parts(model: nn.Module, mix: str) -> dict[str, nn.Module]:
    """The modules of a mixture by their names on disk, each once."""
    parts: dict[str, nn.Module] = {}
    for name, layer in layers_of(model, mix, "lora").items():
        for kind in ("routed_A", "routed_B", "routed_gate", "routed_tasks"):
            of_mixes = getattr(layer, kind)
            if mix in of_mixes and of_mixes[mix] not in parts.values():
                parts[f"{name_on_disk(name)}.{kind}"] = of_mixes[mix]
    return parts | saved_modules(model, config_of(model, mix, "lora").modules_to_save, mix)


def _state(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, module in parts.items()
        for key, value in module.state_dict().items()
    }


def _load(
    model: nn.Module, mix: str, config: RoutedLoraConfig, tensors: dict[str, Tensor], path: Path
) -> None:
    parts = _parts(model, mix)
    state = _state(parts)
    for difference, keys in (
        ("missing", [key for key in state if key not in tensors]),
        ("unknown", [key for key in tensors if key not in state]),
    ):
        if keys:
            raise ValueError(
                f"load_adapter: expected the keys of the mixture {mix!r} in {path}, got "
                f"{len(keys)} {difference} ones, such as {keys[0]}"
            )
    for key, value in state.items():
        if tensors[key].shape != value.shape:
            raise ValueError(
                f"load_adapter: expected {key} of shape {list(value.shape)}, "
                f"got {list(tensors[key].shape)} in {path}"
            )
        if value.is_meta:
            raise ValueError(f"load_adapter: expected a model with memory, got {key} on meta")
    for name, module in parts.items():
        keys = module.state_dict()
        module.load_state_dict({key: tensors[f"{name}.{key}"] for key in keys})
    for name, layer in layers_of(model, mix, "load_adapter").items():
        for e, expert in enumerate(layer.experts(mix)):
            layer.scaling[mix][expert] = config.scaling_of(name_on_disk(name), e)


@contextmanager
def _undone_after_errors(model: nn.Module, mix: str) -> Iterator[None]:
    """A mixture that is injected inside the block is taken out again, should there be an error."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    layers = [layer for layer in model.modules() if isinstance(layer, RoutedLoraLinear)]
    active = [layer.active_mix for layer in layers]
    try:
        yield
    except Exception:
        if mix in configs_of(model):
            unload(model, mix)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        for layer, active_mix in zip(layers, active):
            layer.active_mix = active_mix
        raise


def _check_same(config: RoutedLoraConfig, present: RoutedLoraConfig, path: Path) -> None:
    of_file, of_model = (_identity(x) for x in (config, present))
    for name, value in of_model.items():
        if of_file[name] != value:
            raise ValueError(
                f"load_adapter: expected {name} {value!r}, as in the model, "
                f"got {of_file[name]!r} in {path}"
            )


def _identity(config: RoutedLoraConfig) -> dict[str, Any]:
    """What files and a mixture they are loaded into have in common."""
    fields = ("router", "router_scope", "router_input", "mix", "experts_per_layer")
    arguments = {name: value for name, value in config.router_arguments.items() if name != "mode"}
    same = {"experts": config.experts(), **{name: getattr(config, name) for name in fields}}
    return same | {"router_arguments": arguments}


def frozen_parts(model: nn.Module, mix: str) -> dict[str, Any]:
    """What of a mixture is not trained: the names of ``experts``, and whether the ``router`` is.

    An expert without factors of its own is frozen where those that all share are.
    """
    layers = layers_of(model, mix, "lora")
    parts: dict[str, bool] = {}
    for layer in layers.values():
        for name, is_trained in layer.trained(mix).items():
            part = ".".join(name.split(".")[:2])
            parts[part] = parts.get(part, False) or is_trained

    def is_frozen(expert: str) -> bool:
        factors = [f"{kind}.{expert}" for kind in ("routed_A", "routed_B")]
        shared = [f"{kind}.{SHARED}" for kind in ("routed_A", "routed_B")]
        own = [factor for factor in factors if factor in parts]
        return not any(parts.get(factor, False) for factor in own or shared)

    routers = (part.startswith(("routed_gate", "routed_tasks")) for part in parts if parts[part])
    return {
        "experts": [expert for expert in experts_of(layers, mix) if is_frozen(expert)],
        "router": not any(routers),
    }


def freeze_parts(model: nn.Module, mix: str, frozen: Mapping[str, Any]) -> None:
    """Train all of a mixture but these parts, as `frozen_parts` names them."""
    for layer in layers_of(model, mix, "lora").values():
        trained = set(layer.experts(mix)) - set(frozen.get("experts", ()))
        layer.set_trainable(mix, trained, not frozen.get("router", False))
