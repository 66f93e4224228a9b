"""LoRAs that are there already, as the experts of a mixture."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.files import patterns_of
from torch_routers.lora.folders import PeftAdapter, read_adapter
from torch_routers.lora.inject import inject, layers_of, scopes_of
from torch_routers.lora.linear import RoutedLoraLinear
from torch_routers.lora.matching import InjectionReport, linear_features
from torch_routers.lora.prototypes import arrow_prototypes
from torch_routers.lora.storage import base_model_name
from torch_routers.registry import check_choice


def from_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    *,
    router: str | None = None,
    router_arguments: dict[str, Any] | None = None,
    init: str = "default",
    general: Sequence[str | Path] = (),
    trainable: str = "router",
    mix: str = "default",
    **options: Any,
) -> InjectionReport:
    """Make a mixture of LoRAs that PEFT saved: each is an expert, and a router chooses among them.

    A layer gets experts if an adapter has it; one that does not has rank 0 there, and adds nothing.

    Args:
        model: the base model of the adapters, changed in place.
        adapters: folders, by the names of the experts: of PEFT, or what `save_adapter` wrote of a
            mixture with one expert.
        router, router_arguments: as in `RoutedLoraConfig`. Default: ``"PrototypeRouter"`` with
            ``init="arrow"`` and ``"gates"``, else ``"TopKRouter"``.
        init: how the router begins. ``"default"``: as its class does. ``"zeros"``: with weights of
            0, so that all experts are alike. ``"arrow"``: with what the experts answer to most, for
            no training at all; see `arrow_prototypes`. ``"gates"``: with the router of each
            adapter's own mixture, trained with that expert alone (PHATGOOSE, arXiv 2402.05859).
            `gates_from_samples` builds a router from samples, afterwards.
        general: folders of adapters of general knowledge: the means of their factors are subtracted
            from those of each expert (GenKnowSub), whose rank they have.
        trainable: ``"router"``: the experts are frozen; ``"all"``: they are trained too.
        mix: the name of the mixture.
        options: more of `RoutedLoraConfig`, such as ``router_scope`` and ``losses``.

    Returns:
        What has experts.

    Raises:
        ValueError: an adapter that `read_peft_adapter` refuses, or that is of another model: a
            layer is missing, or of another size. The text names its folder.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.

    A warning says that the base model has another name, which need not mean that it is another,
    and that an adapter has more than factors, such as a head, which is left out.
    """
    check_choice("from_adapters", "trainable", trainable, ("router", "all"))
    check_choice("from_adapters", "init", init, ("default", "zeros", "arrow", "gates"))
    if not adapters:
        raise ValueError("from_adapters: expected adapters, got none")
    read = {expert: read_adapter(folder) for expert, folder in adapters.items()}
    for adapter in read.values():
        _check_fits(model, adapter)
    _subtract_mean(read, [read_adapter(folder) for folder in general])
    if router is None:
        router = "PrototypeRouter" if init in ("arrow", "gates") else "TopKRouter"
    _check_init(init, router, options.get("router_scope", "module"), read)
    names = [
        name
        for name, _ in model.named_modules()
        if any(name in adapter.layers for adapter in read.values())
    ]
    ranks, scalings = {}, {}
    for name in names:
        factors = [adapter.layers.get(name) for adapter in read.values()]
        ranks[name] = [0 if f is None else f.A.shape[0] for f in factors]
        scalings[name] = [0.0 if f is None else f.scaling for f in factors]
    config = RoutedLoraConfig(
        target_modules=exact_targets(model, names),
        expert_names=list(read),
        router=router,
        router_arguments=router_arguments,
        **patterns_of(ranks, scalings),
        **options,
    )
    report = inject(model, config, mix)
    with torch.no_grad():
        for name, layer in layers_of(model, mix, "from_adapters").items():
            for expert, adapter in read.items():
                parts = layer.routed_A[mix][expert], layer.routed_B[mix][expert]
                for part, factor in zip(parts, adapter.layers.get(name, ())):
                    part.weight.copy_(factor)
                for part in parts:
                    part.requires_grad_(trainable == "all")
            if init == "gates":
                _set_gates(layer, name, mix, read)
    if init == "zeros":
        for scope in scopes_of(model, "from_adapters", mix):
            for parameter in scope.router.parameters():
                nn.init.zeros_(parameter)
    elif init == "arrow":
        arrow_prototypes(model, mix)
    return report


def _subtract_mean(read: dict[str, PeftAdapter], general: list[PeftAdapter]) -> None:
    """Factors of experts without what adapters of general knowledge have in common."""
    if not general:
        return
    for adapter in read.values():
        for name, factors in adapter.layers.items():
            common = [other.layers.get(name) for other in general]
            shapes = {None if f is None else f.A.shape for f in common}
            if shapes != {factors.A.shape}:
                raise ValueError(
                    f"from_adapters: expected general adapters with factors of {name} of rank "
                    f"{factors.A.shape[0]}, as in {adapter.folder}, got "
                    f"{[None if f is None else f.A.shape[0] for f in common]}"
                )
            adapter.layers[name] = factors._replace(
                A=factors.A - torch.stack([f.A for f in common]).mean(0),
                B=factors.B - torch.stack([f.B for f in common]).mean(0),
            )


def _check_init(init: str, router: str, router_scope: str, read: Mapping[str, PeftAdapter]) -> None:
    """What fails comes before the model is changed."""
    if init not in ("arrow", "gates"):
        return
    if router != "PrototypeRouter" or router_scope != "module":
        raise ValueError(
            "from_adapters: expected router='PrototypeRouter' and router_scope='module' with "
            f"init={init!r}, got {router!r} and {router_scope!r}"
        )
    for adapter in read.values() if init == "gates" else ():
        for name, factors in adapter.layers.items():
            gate = adapter.gates.get(_gate_of(name))
            if gate is None or gate.shape != (1, factors.A.shape[1]):
                raise ValueError(
                    f'from_adapters: expected a gate of {name} for init="gates", got '
                    f"{None if gate is None else list(gate.shape)} in {adapter.folder}"
                )


def _set_gates(
    layer: RoutedLoraLinear, name: str, mix: str, read: Mapping[str, PeftAdapter]
) -> None:
    """The prototypes of a layer: the gates that were trained there, each with its expert."""
    for e, adapter in enumerate(read.values()):
        if name in adapter.layers:  # else of rank 0 here
            layer.scope(mix).router.prototypes[e] = adapter.gates[_gate_of(name)][0]


def _gate_of(name: str) -> str:
    return f"{name}.routed_gate.weight"


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """``target_modules`` that mean these modules and no other."""
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, names))
    return names


def _check_fits(model: nn.Module, adapter: PeftAdapter) -> None:
    modules = dict(model.named_modules())
    for name, (a, b, _) in adapter.layers.items():
        features = linear_features(modules[name]) if name in modules else None
        if features != (a.shape[1], b.shape[0]):
            raise ValueError(
                f"from_adapters: expected a linear layer {name} from {a.shape[1]} to {b.shape[0]} "
                f"features, as in {adapter.folder}, got "
                f"{'no such module' if name not in modules else features or type(modules[name])}"
            )
    ours, theirs = base_model_name(model), adapter.config.get("base_model_name_or_path")
    if ours and theirs and ours != theirs:
        warnings.warn(
            f"from_adapters: expected an adapter of {ours!r}, got one of {theirs!r} in "
            f"{adapter.folder}",
            stacklevel=3,
        )
    if adapter.others:
        warnings.warn(
            f"from_adapters: expected factors of a LoRA alone, got {sorted(adapter.others)} too in "
            f"{adapter.folder}, which are left out",
            stacklevel=3,
        )
