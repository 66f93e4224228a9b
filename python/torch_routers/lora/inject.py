"""Puts mixtures of experts into a model, and takes them out."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from torch_routers.delivery import inputs_of
from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.linear import RoutedLoraLinear, features_of
from torch_routers.lora.matching import InjectionReport, linear_features, match_modules
from torch_routers.lora.scope import RoutingScope
from torch_routers.lora.storage import saved_modules
from torch_routers.registry import create_router, from_config, router_parameters


def inject(
    model: nn.Module,
    config: RoutedLoraConfig,
    mix: str = "default",
    *,
    layer_type: type[RoutedLoraLinear] = RoutedLoraLinear,
) -> InjectionReport:
    """Put a mixture of low-rank experts beside the linear layers of a model, in place.

    The matched layers become `RoutedLoraLinear`, everything else in the model is frozen, the model
    does what it did. A further call with another ``mix`` adds a second mixture, which is then the
    active one; `set_mix` changes that.

    Args:
        model: any module; its parameters stop to require gradients, but those of other mixtures
            and of ``config.modules_to_save``.
        config: which layers, how many experts of which rank, and the router.
        mix: the name of the mixture.
        layer_type: of the layers that are made, for bridges to other packages.

    Returns:
        What was matched, and what was not; print it.

    Raises:
        ValueError: nothing matches, a matched module is not linear, or the mixture exists.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> config = RoutedLoraConfig(r=4, num_experts=3, target_modules=["0"], router="SoftRouter")
    >>> inject(model, config).matched
    ['0']
    >>> model(torch.randn(5, 8)).shape
    torch.Size([5, 2])
    """
    if mix in configs_of(model):
        raise ValueError(f"inject: expected a new name of a mixture, got {mix!r}")
    if not mix or "." in mix or hasattr(nn.ModuleDict(), mix):
        raise ValueError(
            "inject: expected mix without dots, and other than attributes of nn.ModuleDict, "
            f"got {mix!r}"
        )
    report = match_modules(model, config)
    modules, experts = dict(model.named_modules()), config.experts()
    containers = {name: _container_of(model, name, config.router_scope) for name in report.matched}
    owners: dict[str, str] = {}  # the first layer of each scope has its router
    for name, container in containers.items():
        owners.setdefault(container, name)
    # What can fail comes first, so that an error leaves the model as it was.
    scopes = {
        container: _make_scope(model, config, name, container) for container, name in owners.items()
    }
    for name in containers if config.mix == "factors" else ():
        splits = config.router_arguments.get("num_splits", 1)
        features = features_of(modules[name])
        if any(size % splits for size in features):
            raise ValueError(
                f"inject: expected features that num_splits={splits} divides, got "
                f"{list(features)} in {name}"
            )
    _freeze(model, config)
    for scope in scopes.values():
        scope.router._inputs = inputs_of(model)
        if config.router_scope != "module":
            keeps = config.router_scope == "model"
            scope.watch(modules[scope.name], keeps_routing=keeps)
    for name, container in containers.items():
        layer = _wrapped(model, name, modules[name], layer_type)
        own = experts[: config.num_experts_of(name)]
        layer.add_mix(
            mix,
            {expert: config.rank_of(name, e) for e, expert in enumerate(own)},
            {expert: config.scaling_of(name, e) for e, expert in enumerate(own)},
            scopes[container],
            dropout=config.lora_dropout,
            owns_router=owners[container] == name,
            init=config.init_lora_weights,
            kind=config.mix,
        )
        layer.train(layer.base_layer.training)
    for layer in layers_of(model).values():
        layer.active_mix = mix if mix in layer.routed_A else None
    set_config(model, mix, config)
    return report


def configs_of(model: nn.Module) -> dict[str, RoutedLoraConfig]:
    """The configurations of a model's mixtures, by name."""
    return getattr(model, "routed_lora", {})


def set_config(model: nn.Module, mix: str, config: RoutedLoraConfig | None) -> None:
    """Note the configuration of a mixture, or forget it, where those of the model are.

    That is the model itself, or the one inside that a PeftModel shows as its own.
    """
    configs = configs_of(model)
    holders = (module for module in model.modules() if vars(module).get("routed_lora") is configs)
    others = {name: known for name, known in configs.items() if name != mix}
    next(holders, model).routed_lora = others if config is None else {**others, mix: config}


def config_of(model: nn.Module, mix: str, caller: str) -> RoutedLoraConfig:
    """That of one mixture.

    Raises:
        ValueError: the model has none, but perhaps a module in it has.
    """
    if mix not in configs_of(model):
        raise ValueError(
            f"{caller}: expected the model in which {mix!r} was injected, got "
            f"{type(model).__name__}, which may be around it"
        )
    return configs_of(model)[mix]


def layers_of(
    model: nn.Module, mix: str | None = None, caller: str = "lora"
) -> dict[str, RoutedLoraLinear]:
    """The layers with experts, by name; those of one mixture.

    Raises:
        ValueError: there are none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RoutedLoraLinear) and (mix is None or mix in module.routed_A)
    }
    if not layers:
        wanted = "" if mix is None else f" {mix!r}"
        raise ValueError(
            f"{caller}: expected a model with a mixture{wanted}, got {type(model).__name__} with "
            f"{sorted(configs_of(model))}"
        )
    return layers


def experts_of(layers: dict[str, RoutedLoraLinear], mix: str) -> list[str]:
    """The names of a mixture's experts: of the layer that has most of them."""
    return max((layer.experts(mix) for layer in layers.values()), key=len)


def unload(model: nn.Module, mix: str | None = None) -> nn.Module:
    """Take a mixture out of a model, or all; layers without any become what they were."""
    for name, layer in layers_of(model, mix, "unload").items():
        for known in [*layer.routed_A] if mix is None else [mix]:
            layer.scope(known).remove()
            layer.remove_mix(known)
        if not layer.routed_A:
            _replace(model, name, layer.base_layer)
    for known in [*configs_of(model)] if mix is None else [mix]:
        set_config(model, known, None)
    return model


def scopes_of(model: nn.Module, caller: str, mix: str | None = None) -> list[RoutingScope]:
    """The scopes of a model's mixtures, each once."""
    scopes = {
        id(layer.scope(name)): layer.scope(name)
        for layer in layers_of(model, mix, caller).values()
        for name in ([*layer.routed_A] if mix is None else [mix])
    }
    return list(scopes.values())


# ---- into the model ------------------------------------------------------------------------------


def _freeze(model: nn.Module, config: RoutedLoraConfig) -> None:
    kept = {
        parameter
        for module in model.modules()
        if isinstance(module, RoutedLoraLinear)
        for part in (module.routed_A, module.routed_B, module.routed_gate, module.routed_tasks)
        for parameter in part.parameters()
    }
    for module in saved_modules(model, config.modules_to_save).values():
        kept.update(module.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _wrapped(
    model: nn.Module, name: str, module: nn.Module, layer_type: type[RoutedLoraLinear]
) -> RoutedLoraLinear:
    if isinstance(module, RoutedLoraLinear):
        return module
    layer = layer_type(module)
    _replace(model, name, layer)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _ancestors(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _container_of(model: nn.Module, name: str, router_scope: str) -> str:
    """The name of what the routing of a layer is shared in; its own for ``"module"``."""
    if router_scope == "module":
        return name
    if router_scope == "block":
        return name.rpartition(".")[0]
    layer = next((part for part in _ancestors(name) if re.search(r"(^|\.)\d+$", part)), None)
    if layer is None:
        raise ValueError(
            f"inject: expected layers in a list, such as layers.0, for "
            f"router_scope={router_scope!r}, got {name}"
        )
    return layer if router_scope == "layer" else ""


def _make_scope(
    model: nn.Module, config: RoutedLoraConfig, name: str, container: str
) -> RoutingScope:
    watched = container
    if config.router_scope == "model":  # the first layer of the model sees the tokens first
        watched = _container_of(model, name, "layer")
    of_module = config.router_scope == "module"
    inner = model.get_submodule(name) if of_module else _first_linear(model, watched)
    hidden_size, tasks = features_of(inner)[0], None
    device = next((p.device for p in inner.parameters()), None)
    takes = router_parameters(config.router)
    if config.router_input == "task" and "num_tasks" not in takes:
        hidden_size = config.task_embedding_size
        tasks = nn.Embedding(config.num_tasks, hidden_size, device=device)
    elif config.router_input == "last_hidden":
        hidden_size = body_of(model).config.hidden_size
    arguments: dict[str, Any] = {
        **config.router_arguments,
        "num_experts": config.num_experts_of(name),
    }
    if config.losses:
        arguments["losses"] = [from_config(loss) for loss in config.losses]  # each has its own
    if "hidden_size" in takes:
        arguments["hidden_size"] = hidden_size
    if "num_tasks" in takes and config.num_tasks is not None:
        arguments["num_tasks"] = config.num_tasks
    if "num_splits" in takes:
        arguments["num_experts"] *= arguments.get("num_splits", 1)
    router = create_router(config.router, **arguments)
    if not any(parameter.is_meta for parameter in router.parameters()):  # no memory yet
        router.to(device)
    return RoutingScope(
        router, watched, router_input=config.router_input, tasks=tasks, kind=config.mix
    )


def body_of(model: nn.Module) -> nn.Module:
    """What a model of Transformers has below its head.

    Raises:
        ValueError: another kind of model.
    """
    body = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if not isinstance(body, nn.Module) or not hasattr(getattr(body, "config", None), "hidden_size"):
        raise ValueError(
            "lora: expected a model of Transformers with a head, for its last hidden state, got "
            f"{type(model).__name__}"
        )
    return body


def _first_linear(model: nn.Module, container: str) -> nn.Module:
    """The layer that sees what its container sees: the first one that is linear."""
    modules = model.get_submodule(container).modules()
    return next(module for module in modules if linear_features(module) is not None)
