"""LoRAs of PEFT as experts: read their folders, and make a mixture of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.files import patterns_of
from torch_routers.lora.inject import inject, layers_of
from torch_routers.lora.matching import InjectionReport, linear_features
from torch_routers.lora.storage import WEIGHTS, base_model_name, read_config, read_tensors
from torch_routers.registry import check_choice

#: What a configuration of PEFT may ask for that is more than B A x.
_MORE_THAN_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "lora_bias": "biases of LoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA of parameters",
}

#: Initial values that change the base model, to which an adapter then adds.
_OF_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LowRank(NamedTuple):
    """What a LoRA adds to a layer: scaling · B A x."""

    A: Tensor
    """``[r, in_features]``"""
    B: Tensor
    """``[out_features, r]``"""
    scaling: float


@dataclass
class PeftAdapter:
    """A LoRA of PEFT.

    Attributes:
        folder: where it was.
        config: the values of its ``adapter_config.json``.
        layers: its factors, by the names of layers of the base model.
        others: its other tensors, such as heads that were trained with it, by their keys.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, LowRank]
    others: dict[str, Tensor] = field(default_factory=dict)


def read_peft_adapter(folder: str | Path) -> PeftAdapter:
    r"""Read a LoRA that PEFT saved. PEFT is not needed.

    Ranks are those of the tensors. The scaling is :math:`\alpha / r`, or :math:`\alpha / \sqrt r`
    with ``use_rslora``, with ``rank_pattern`` and ``alpha_pattern`` as PEFT reads them.

    Args:
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.

    Raises:
        ValueError: a file is missing, pickled or damaged, the adapter is of another type, such as
            DoRA, or changed its base model. The text names the folder.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.
    """
    folder = Path(folder)
    config = read_config("read_peft_adapter", folder)
    _check_kind(config, folder)
    tensors, _ = read_tensors("read_peft_adapter", folder)
    rules = RoutedLoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        rank_pattern=config.get("rank_pattern"),
        alpha_pattern=config.get("alpha_pattern"),
        use_rslora=config.get("use_rslora", False),
        num_experts=1,
    )
    layers, others = {}, {}
    for key, a in tensors.items():
        name, kind = _split(key)
        if kind == "":
            others[key] = a
            continue
        b = tensors.get(f"{name}.lora_B.weight")
        if kind not in ("lora_A.weight", "lora_B.weight") or a.dim() != 2:
            _refuse(folder, f"factors of linear layers, got {key} of shape {list(a.shape)}")
        if f"{name}.lora_A.weight" not in tensors or b is None:
            _refuse(folder, f"two factors of {name}, got {key} alone")
        if kind == "lora_B.weight":
            continue
        rank = rules.rank_of(name, 0)
        if a.shape[0] != rank or b.shape[1:] != (rank,):
            _refuse(
                folder,
                f"factors of rank {rank} of {name}, got {list(a.shape)} and {list(b.shape)}",
            )
        layers[name] = LowRank(a, b, rules.scaling_of(name, 0))
    if not layers:
        _refuse(folder, f"factors of a LoRA in {WEIGHTS}, got none")
    return PeftAdapter(folder, config, layers, others)


def from_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    *,
    router: str = "TopKRouter",
    router_arguments: dict[str, Any] | None = None,
    trainable: str = "router",
    mix: str = "default",
    **options: Any,
) -> InjectionReport:
    """Make a mixture of LoRAs that PEFT saved: each is an expert, and a router is to be trained.

    A layer gets experts if an adapter has it; one that does not has rank 0 there, and adds nothing.

    Args:
        model: the base model of the adapters, changed in place.
        adapters: folders, by the names of the experts.
        router, router_arguments: as in `RoutedLoraConfig`.
        trainable: ``"router"``: the experts are frozen; ``"all"``: they are trained too.
        mix: the name of the mixture.
        options: more of `RoutedLoraConfig`, such as ``router_scope`` and ``losses``.

    Returns:
        What has experts.

    Raises:
        ValueError: an adapter that `read_peft_adapter` refuses, or that is of another model: a
            layer is missing, or of another size. The text names its folder.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.
    """
    check_choice("from_adapters", "trainable", trainable, ("router", "all"))
    if not adapters:
        raise ValueError("from_adapters: expected adapters, got none")
    read = {expert: read_peft_adapter(folder) for expert, folder in adapters.items()}
    for adapter in read.values():
        _check_fits(model, adapter)
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
    return report


def exact_targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """``target_modules`` that mean these modules and no other."""
    ends = tuple(f".{name}" for name in names)
    if any(name.endswith(ends) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, names))
    return names


# ---- what is refused -----------------------------------------------------------------------------


def _check_kind(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(folder, f"an adapter of type LORA, got {kind}")
    for name, meaning in _MORE_THAN_LORA.items():
        if config.get(name):
            _refuse(folder, f"a plain LoRA, got {meaning} ({name})")
    if config.get("bias", "none") != "none":
        _refuse(folder, f"a LoRA without biases, got bias={config['bias']!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OF_ANOTHER_BASE):
        _refuse(
            folder,
            f"a LoRA of a base model that is not changed, got init_lora_weights={init!r}, which "
            "does. Save it with path_initial_model_for_weight_conversion",
        )
    for name in ("r", "lora_alpha"):
        if name not in config:
            _refuse(folder, f"a configuration with {name}, got {sorted(config)}")


def _split(key: str) -> tuple[str, str]:
    """The name of a layer, and which of its factors it is; nothing for other tensors."""
    match = re.fullmatch(r"(.+?)\.(lora_.+)", key)
    return (key, "") if match is None else (match[1], match[2])


def _refuse(folder: Path, what: str) -> NoReturn:
    raise ValueError(f"read_peft_adapter: expected {what}, in {folder}")


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
