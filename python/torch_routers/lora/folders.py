"""Folders of one LoRA, which become experts."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from torch_routers.lora.config import PEFT_TYPE, RoutedLoraConfig
from torch_routers.lora.storage import WEIGHTS, read_config, read_tensors

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
    "target_parameters": "LoRA of parameters, for lora.read_target_parameters",
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
        gates: of a mixture with one expert: the weights of its routers, by their keys.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, LowRank]
    others: dict[str, Tensor] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)


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
    check_kind("read_peft_adapter", config, folder)
    tensors = read_tensors("read_peft_adapter", folder)
    rules = rules_of(config, folder)
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


def read_adapter(folder: str | Path) -> PeftAdapter:
    """An adapter of PEFT, or the only expert of a mixture, as one."""
    if read_config("from_adapters", folder).get("peft_type") != PEFT_TYPE:
        return read_peft_adapter(folder)
    values = read_config("from_adapters", folder)
    config = RoutedLoraConfig.from_dict(values)
    if config.num_experts != 1 or config.mix != "product":
        raise ValueError(
            "from_adapters: expected a mixture with one expert, got "
            f"{config.num_experts} with mix={config.mix!r} in {folder}. Use export_expert"
        )
    tensors = read_tensors("from_adapters", folder)
    (expert,) = config.experts()
    layers, others = {}, dict(tensors)
    for key in tensors:
        layer, is_a, _ = key.partition(f".routed_A.{expert}.weight")
        if is_a:
            a, b = others.pop(key), others.pop(key.replace(".routed_A.", ".routed_B."))
            layers[layer] = LowRank(a, b, config.scaling_of(layer, 0))
    gates = {key: others.pop(key) for key in tensors if key.endswith(".routed_gate.weight")}
    return PeftAdapter(Path(folder), values, layers, others, gates)


# ---- what is refused -----------------------------------------------------------------------------


def check_kind(
    caller: str, config: dict[str, Any], folder: Path, allowed: Collection[str] = ()
) -> None:
    """An error for an adapter that is more than the products of two factors.

    Args:
        allowed: fields of its configuration that may ask for more.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        _refuse(folder, f"an adapter of type LORA, got {kind}", caller)
    for name, meaning in _MORE_THAN_LORA.items():
        if config.get(name) and name not in allowed:
            _refuse(folder, f"a plain LoRA, got {meaning} ({name})", caller)
    if config.get("bias", "none") != "none":
        _refuse(folder, f"a LoRA without biases, got bias={config['bias']!r}", caller)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OF_ANOTHER_BASE):
        _refuse(
            folder,
            f"a LoRA of a base model that is not changed, got init_lora_weights={init!r}, which "
            "does. Save it with path_initial_model_for_weight_conversion",
            caller,
        )
    for name in ("r", "lora_alpha"):
        if name not in config:
            _refuse(folder, f"a configuration with {name}, got {sorted(config)}", caller)


def rules_of(config: dict[str, Any], folder: Path) -> RoutedLoraConfig:
    """What the configuration says about ranks and scalings."""
    try:
        return RoutedLoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            rank_pattern=config.get("rank_pattern"),
            alpha_pattern=config.get("alpha_pattern"),
            use_rslora=config.get("use_rslora", False),
            num_experts=1,
        )
    except ValueError as error:
        _refuse(folder, f"ranks and scalings of a LoRA, got others ({error})")


def _split(key: str) -> tuple[str, str]:
    """The name of a layer, and which of its factors it is; nothing for other tensors."""
    match = re.fullmatch(r"(.+?)\.(lora_.+)", key)
    return (key, "") if match is None else (match[1], match[2])


def _refuse(folder: Path, what: str, caller: str = "read_peft_adapter") -> NoReturn:
    raise ValueError(f"{caller}: expected {what}, in {folder}")
