"""LoRAs of fused experts: one parameter for all of them, and two orders of columns in files.

PEFT adapts the parameter ``[num_experts, …, …]`` of such a module by two stacked factors. Files do
not say in which of two orders the columns of the second one are: under the same keys, and with the
same shapes, they mean other experts. So the caller says it, always.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_routers.lora.folders import LowRank, check_kind, rules_of
from torch_routers.lora.storage import PREFIX, read_config, read_tensors, save_folder
from torch_routers.registry import check_choice

#: Orders of the columns of the second factor.
LAYOUTS = ("rank_major", "expert_major")


def experts_from_target_parameters(
    a: Tensor, b: Tensor, *, num_experts: int, layout: str, scaling: float = 1.0
) -> list[LowRank]:
    r"""The factors of each expert, of a LoRA on the fused parameter of all.

    Expert :math:`e` adds :math:`c B_e A_e`, where :math:`A_e` are the rows :math:`er` to
    :math:`er + r - 1` of the first factor, and the columns of :math:`B_e` are

    ==================  ==========================================================================
    ``"rank_major"``    :math:`e, e + E, e + 2E, …`: what PEFT computes with
    ``"expert_major"``  :math:`er` to :math:`er + r - 1`: Unsloth's, until it took PEFT's order
    ==================  ==========================================================================

    Args:
        a: ``[rank * num_experts, in_features]``, any dtype: the weight of ``lora_A``.
        b: ``[out_features, rank * num_experts]``: that of ``lora_B``.
        num_experts: of the parameter.
        layout: the order of the columns of ``b``. There is no default.
        scaling: what PEFT multiplies the product by.

    Returns:
        ``[rank, in_features]`` and ``[out_features, rank]`` of each expert: copies.

    Raises:
        ValueError: an unknown layout, or shapes that do not fit.

    >>> a, b = torch.randn(2 * 3, 8), torch.randn(5, 2 * 3)
    >>> experts = experts_from_target_parameters(a, b, num_experts=3, layout="rank_major")
    >>> len(experts), experts[0].A.shape, torch.equal(experts[1].B, b[:, [1, 4]])
    (3, torch.Size([2, 8]), True)
    """
    check_choice("experts_from_target_parameters", "layout", layout, LAYOUTS)
    fits = a.dim() == b.dim() == 2 and a.shape[0] == b.shape[1] and num_experts >= 1
    if not fits or a.shape[0] == 0 or a.shape[0] % num_experts:
        raise ValueError(
            "experts_from_target_parameters: expected a [rank * num_experts, in_features] and b "
            f"[out_features, rank * num_experts], got {list(a.shape)} and {list(b.shape)} with "
            f"num_experts={num_experts}"
        )
    of_a = a.reshape(num_experts, -1, a.shape[1])
    if layout == "rank_major":
        of_b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
    else:
        of_b = b.reshape(b.shape[0], num_experts, -1).transpose(0, 1)
    copied = torch.contiguous_format
    return [LowRank(x.clone(), y.clone(memory_format=copied), scaling) for x, y in zip(of_a, of_b)]


def target_parameters_from_experts(experts: Sequence[LowRank], *, layout: str) -> LowRank:
    """The inverse of `experts_from_target_parameters`.

    Args:
        experts: their factors, all of the same rank, sizes and scaling.
        layout: the order of the columns of the second factor. There is no default.

    Returns:
        ``[rank * num_experts, in_features]``, ``[out_features, rank * num_experts]``, and the
        scaling.

    Raises:
        ValueError: an unknown layout, no experts, or experts that differ.

    >>> expert = LowRank(torch.randn(2, 8), torch.randn(5, 2), 0.5)
    >>> target_parameters_from_experts([expert] * 3, layout="expert_major").B.shape
    torch.Size([5, 6])
    """
    caller = "target_parameters_from_experts"
    check_choice(caller, "layout", layout, LAYOUTS)
    kinds = {(tuple(a.shape), tuple(b.shape), scaling) for a, b, scaling in experts}
    if len(kinds) != 1:
        raise ValueError(
            f"{caller}: expected experts of one shape and scaling, got {sorted(kinds) or 'none'}"
        )
    columns = torch.stack([expert.B for expert in experts])  # [experts, out_features, rank]
    order = (1, 2, 0) if layout == "rank_major" else (1, 0, 2)
    return LowRank(
        torch.cat([expert.A for expert in experts]),
        columns.permute(order).flatten(1),
        experts[0].scaling,
    )


def read_target_parameters(
    folder: str | Path, parameters: Sequence[str], *, num_experts: int, layout: str
) -> dict[str, list[LowRank]]:
    """Read the LoRAs of fused experts that PEFT or Unsloth saved.

    Args:
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        parameters: those of ``target_parameters``, in the order in which their module defines
            them, such as ``["gate_up_proj", "down_proj"]``: keys do not name them.
        num_experts: of each of them.
        layout: as in `experts_from_target_parameters`.

    Returns:
        The factors of each expert, with the scaling of the folder, by the name of the parameter,
        such as ``"layers.0.mlp.experts.down_proj"``. What the adapter has of other layers is left
        out.

    Raises:
        ValueError: a file is missing, pickled or damaged; another kind of adapter; other
            parameters, or shapes that do not fit. The text names the folder.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.
    """
    config, _, fused = _read("read_target_parameters", folder)
    rules = rules_of(config, Path(folder))
    targets = {target.rpartition(".")[2] for target in config["target_parameters"]}
    if targets != set(parameters):
        raise ValueError(
            f"read_target_parameters: expected parameters {sorted(targets)}, as in {folder}, got "
            f"{list(parameters)}"
        )
    found = {}
    for module, wrappers in fused.items():
        if len(wrappers) != len(parameters):
            raise ValueError(
                f"read_target_parameters: expected {len(parameters)} parameters of {module}, got "
                f"{len(wrappers)} in {folder}"
            )
        # PEFT wraps the first parameter first, so that the last one is outermost.
        for wrapper, parameter in zip(sorted(wrappers, key=len, reverse=True), parameters):
            a, b = wrappers[wrapper]
            name = f"{module}.{parameter}"
            found[name] = experts_from_target_parameters(
                a, b, num_experts=num_experts, layout=layout, scaling=rules.scaling_of(name, 0)
            )
            _check_rank("read_target_parameters", found[name][0], folder, [rules.rank_of(name, 0)])
    return found


def convert_target_parameters(
    folder: str | Path, into: str | Path, *, num_experts: int, source: str, target: str
) -> None:
    """Write the adapter of a folder with the columns of fused experts in another order.

    All else is as it was. A file does not say that it was converted: converting it twice does harm.

    Args:
        folder: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        into: another folder.
        num_experts: of the fused parameters.
        source, target: layouts, as in `experts_from_target_parameters`.

    Raises:
        ValueError: a file is missing, pickled or damaged; another kind of adapter, the same folder,
            or shapes that do not fit.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.
    """
    caller = "convert_target_parameters"
    for name, value in ("source", source), ("target", target):
        check_choice(caller, name, value, LAYOUTS)
    if Path(folder).resolve() == Path(into).resolve():
        raise ValueError(f"{caller}: expected into to be another folder, got {into}")
    config, tensors, fused = _read(caller, folder)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    for wrappers in fused.values():
        for wrapper, (a, b) in wrappers.items():
            experts = experts_from_target_parameters(a, b, num_experts=num_experts, layout=source)
            _check_rank(caller, experts[0], folder, ranks)
            stacked = target_parameters_from_experts(experts, layout=target)
            tensors[f"{wrapper}.lora_B.weight"] = stacked.B
    save_folder(caller, into, {PREFIX + name: value for name, value in tensors.items()}, config)


# --------------------------------------------------------------------------------------------------


def _check_rank(caller: str, expert: LowRank, folder: str | Path, ranks: list[int]) -> None:
    """Shapes alone would let another number of experts pass."""
    if expert.A.shape[0] not in ranks:
        raise ValueError(
            f"{caller}: expected experts of rank {ranks}, as the configuration in {folder} has "
            f"it, got {expert.A.shape[0]}. Is num_experts right?"
        )


def _read(
    caller: str, folder: str | Path
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, dict[str, tuple[Tensor, Tensor]]]]:
    """Configuration, tensors, and the factors of fused parameters by module and wrapper."""
    config = read_config(caller, folder)
    check_kind(caller, config, Path(folder), allowed=("target_parameters",))
    tensors = read_tensors(caller, folder)
    modules = {target.rpartition(".")[0] for target in config.get("target_parameters") or ()}
    ends = tuple(f".{module}" for module in modules)
    fused: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for key, a in tensors.items():
        match = re.fullmatch(r"((.+?)(?:\.base_layer)*)\.lora_A\.weight", key)
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if match and b is not None and f".{match[2]}".endswith(ends):
            fused.setdefault(match[2], {})[match[1]] = a, b
    if not fused:
        raise ValueError(f"{caller}: expected factors of target_parameters, got none in {folder}")
    return config, tensors, fused
