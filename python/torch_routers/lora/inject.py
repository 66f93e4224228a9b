"""Puts mixtures of experts into a model, and takes them out."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.linear import RoutedLoraLinear, features_of
from torch_routers.lora.matching import InjectionReport, linear_features, match_modules
from torch_routers.lora.scope import RoutingScope
from torch_routers.registry import create_router, from_config
from torch_routers.routers import Router


def inject(model: nn.Module, config: RoutedLoraConfig, mix: str = "default") -> InjectionReport:
    """Put a mixture of low-rank experts beside the linear layers of a model, in place.

    The matched layers become `RoutedLoraLinear`, everything else in the model is frozen, the model
    does what it did. A further call with another ``mix`` adds a second mixture, which is then the
    active one; `set_mix` changes that.

    Args:
        model: any module; its parameters stop to require gradients, but those of other mixtures
            and of ``config.modules_to_save``.
        config: which layers, how many experts of which rank, and the router.
        mix: the name of the mixture.

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
    report = match_modules(model, config)
    _freeze(model, config)
    names = dict(model.named_modules())
    first_of_scope: dict[str, RoutingScope] = {}
    for name in report.matched:
        layer = _wrapped(model, name, names[name])
        container = _container_of(model, name, config.router_scope)
        scope = first_of_scope.get(container)
        is_first = scope is None
        if is_first:
            scope = _make_scope(model, config, name, container)
            first_of_scope[container] = scope
        experts = config.experts()
        layer.add_mix(
            mix,
            {expert: config.rank_of(name, e) for e, expert in enumerate(experts)},
            {expert: config.scaling_of(name, e) for e, expert in enumerate(experts)},
            scope,
            dropout=config.lora_dropout,
            owns_router=is_first,
        )
        for expert in experts:
            layer.reset_expert(mix, expert, config.init_lora_weights)
    model.routed_lora = {**configs_of(model), mix: config}
    return report


def configs_of(model: nn.Module) -> dict[str, RoutedLoraConfig]:
    """The configurations of a model's mixtures, by name."""
    return getattr(model, "routed_lora", {})


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


def unload(model: nn.Module, mix: str | None = None) -> nn.Module:
    """Take a mixture out of a model, or all; layers without any become what they were."""
    for name, layer in layers_of(model, mix, "unload").items():
        for known in [*layer.routed_A] if mix is None else [mix]:
            layer.scope(known).remove()
            layer.remove_mix(known)
        if not layer.routed_A:
            _replace(model, name, layer.base_layer)
    model.routed_lora = (
        {}
        if mix is None
        else {name: config for name, config in configs_of(model).items() if name != mix}
    )
    return model


def check_reach(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call the model once and see that every layer with experts is called.

    Some modules read the weight of a layer instead of calling it, as fused kernels of state space
    models do: experts there would be trained by nothing, and change nothing.

    Args:
        args, kwargs: a small batch, for one call without gradients.

    Raises:
        ValueError: a layer was not called.
    """
    reached: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: reached.add(name)

    layers = layers_of(model, caller="check_reach")
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in layers if name not in reached]
    if missed:
        raise ValueError(
            f"check_reach: expected every layer with experts to be called, got none of {missed}: "
            "what stands above reads the weight, or leaves the layer out. Take it from "
            "target_modules"
        )


def two_passes(model: nn.Module) -> RemovableHandle:
    """From now on, each call of ``model`` is preceded by one without experts, for routers to see.

    For mixtures with ``router_input="first_pass"``, whose routers look at what their layers would
    get from the base model alone (X-LoRA, arXiv 2402.07148, takes the last hidden state of such a
    pass for all layers). The first pass has no gradient; it takes the time of a forward. A cache of
    keys and values is copied for it. Remove the returned handle to stop.

    Raises:
        ValueError: the model has no mixture with that input.
    """
    scopes = [
        scope for scope in scopes_of(model, "two_passes") if scope.router_input == "first_pass"
    ]
    if not scopes:
        raise ValueError('two_passes: expected a mixture with router_input="first_pass", got none')

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = dict(kwargs)
        if first.get("past_key_values") is not None:
            first["past_key_values"] = copy.deepcopy(first["past_key_values"])
        for scope in scopes:
            scope.begin_first_pass()
        try:
            with torch.no_grad():
                module.forward(*args, **first)
        finally:
            for scope in scopes:
                scope.end_first_pass()

    return model.register_forward_pre_hook(hook, with_kwargs=True)


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
    for name, module in model.named_modules():
        saved = config.modules_to_save or ()
        if any(name == suffix or name.endswith(f".{suffix}") for suffix in saved):
            kept.update(module.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)


def _wrapped(model: nn.Module, name: str, module: nn.Module) -> RoutedLoraLinear:
    if isinstance(module, RoutedLoraLinear):
        return module
    layer = RoutedLoraLinear(module)
    layer.train(module.training)
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
    if config.router_input == "task":
        hidden_size = config.task_embedding_size
        tasks = nn.Embedding(config.num_tasks, hidden_size, device=device)
    router = _make_router(config, hidden_size).to(device)
    scope = RoutingScope(router, watched, router_input=config.router_input, tasks=tasks)
    if not of_module:
        keeps = config.router_scope == "model"
        scope.watch(model.get_submodule(watched), keeps_routing=keeps)
    return scope


def _make_router(config: RoutedLoraConfig, hidden_size: int) -> Router:
    losses = [from_config(loss) for loss in config.losses]  # each router has its own
    arguments = dict(config.router_arguments)
    if losses:
        arguments["losses"] = losses
    return create_router(
        config.router, hidden_size=hidden_size, num_experts=config.num_experts, **arguments
    )


def _first_linear(model: nn.Module, container: str) -> nn.Module:
    """The layer that sees what its container sees: the first one that is linear."""
    modules = model.get_submodule(container).modules()
    return next(module for module in modules if linear_features(module) is not None)
