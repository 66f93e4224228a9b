"""Mixtures and experts as plain LoRAs, which PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_routers.lora.adapters import exact_targets
from torch_routers.lora.files import exact_patterns
from torch_routers.lora.folders import LowRank
from torch_routers.lora.inject import config_of, experts_of, layers_of
from torch_routers.lora.linear import RoutedLoraLinear
from torch_routers.lora.means import Batches, mean_weights
from torch_routers.lora.storage import (
    PREFIX,
    base_model_name,
    name_on_disk,
    save_folder,
    saved_modules,
)
from torch_routers.registry import check_choice


@dataclass
class CollapsedLora:
    """One LoRA in the place of a mixture.

    Attributes:
        layers: its factors, by the names of layers.
        error: norm of what is lost over norm of the whole, Frobenius, all layers together.
        errors: the same for each layer.
        config: of PEFT.
        others: tensors of modules that are saved as a whole.
    """

    layers: dict[str, LowRank]
    error: float
    errors: dict[str, float]
    config: dict[str, Any] = field(repr=False)
    others: dict[str, Tensor] = field(repr=False, default_factory=dict)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that PEFT loads, both files whole or not at all.

        Raises:
            ImportError: safetensors is not installed; it comes with the extra ``lora``.
        """
        tensors = {f"{PREFIX}{name}": value for name, value in self.others.items()}
        for name, factors in self.layers.items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A
            tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B
        save_folder("save_pretrained", folder, tensors, self.config)


def collapse_to_lora(
    model: nn.Module,
    weights: Mapping[str, float] | Sequence[float] | Tensor | Literal["mean"],
    *,
    data: Batches = (),
    rank: int | None = None,
    method: Literal["cat", "svd"] = "cat",
    mix: str = "default",
) -> CollapsedLora:
    r"""One LoRA that does what a mixture does when its weights are constant.

    .. math::  \Delta W = \sum_e w_e c_e B_e A_e = [w_1 c_1 B_1, \dots] \, [A_1; \dots]

    ``"cat"`` is this product, exact, of rank :math:`\sum_e r_e`, without experts of weight 0.
    ``"svd"`` is the best one of a given rank in the Frobenius norm: a QR decomposition of both
    factors and a singular value decomposition of what is between; no
    ``[out_features, in_features]`` is made. PEFT's ``add_weighted_adapter`` has the same names for
    both.

    Args:
        model: is not changed.
        weights: of the experts, by name, where those without have 0, or all in order; ``"mean"``:
            in each layer, those that its router gives on the mean over ``data``.
        data: for ``"mean"``: what the model is called with, without gradients: dicts of keywords,
            or sequences of arguments. Masked tokens are not part of the mean.
        rank: for ``"svd"``; layers whose product has less keep that. Default: the largest rank of
            an expert.
        method: as above.
        mix: the name of the mixture.

    Returns:
        The LoRA, with ``save_pretrained`` and what it loses.

    Raises:
        ValueError: an unknown expert, another number of weights, all of them 0, or a ``rank`` with
            ``"cat"``.

    >>> from torch_routers.lora import RoutedLoraConfig, inject
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> config = RoutedLoraConfig(r=3, expert_names=["sql", "med"], target_modules=["0"])
    >>> report = inject(model, config)
    >>> lora = collapse_to_lora(model, {"sql": 0.5, "med": 0.5})
    >>> lora.layers["0"].A.shape, lora.error
    (torch.Size([6, 8]), 0.0)
    """
    check_choice("collapse_to_lora", "method", method, ("cat", "svd"))
    layers = layers_of(model, mix, "collapse_to_lora")
    if isinstance(weights, str):
        check_choice("collapse_to_lora", "weights", weights, ("mean",))
        means = mean_weights(model, data, mix, "collapse_to_lora")
        of_layers = {
            name: dict(zip(layer.experts(mix), means[layer.scope(mix)].tolist()))
            for name, layer in layers.items()
        }
    else:
        of_layers = dict.fromkeys(layers, _weights_of(layers, weights, mix))
    if method == "cat" and rank is not None:
        raise ValueError(f'collapse_to_lora: expected no rank with method="cat", got {rank}')
    if rank is not None and rank < 1:
        raise ValueError(f"collapse_to_lora: expected rank >= 1, got {rank}")
    collapsed, lost, total = {}, {}, {}
    for name, layer in layers.items():
        a, b = stacked_factors(layer, of_layers[name], mix)
        if a.shape[0] == 0:
            continue
        if method == "svd":
            most = max(layer.factors(mix, e)[0].shape[0] for e in layer.experts(mix))
            a, b, lost[name], total[name] = _truncated(a, b, most if rank is None else rank)
        collapsed[name] = LowRank(a, b, 1.0)
    if not collapsed:
        raise ValueError(f"collapse_to_lora: expected an expert with a weight, got {weights}")
    whole = sum(total.values())
    return _plain_lora(
        model,
        mix,
        collapsed,
        error=(sum(lost.values()) / whole) ** 0.5 if whole else 0.0,
        errors={
            name: (lost[name] / total[name]) ** 0.5 if total.get(name) else 0.0
            for name in collapsed
        },
    )


def export_expert(
    model: nn.Module, expert: str, folder: str | Path, mix: str = "default"
) -> CollapsedLora:
    """Write one expert as a LoRA that PEFT loads; it does there what it does here with weight 1.

    Args:
        expert: its name.
        folder: is made if it is not there.
        mix: the name of the mixture.

    Returns:
        What was written.

    Raises:
        ValueError: there is no such expert, or its rank is 0 everywhere.
        ImportError: safetensors is not installed; it comes with the extra ``lora``.

    >>> from tempfile import TemporaryDirectory
    >>> from torch_routers.lora import RoutedLoraConfig, inject
    >>> from torch_routers.lora.adapters import from_adapters
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> config = RoutedLoraConfig(r=3, expert_names=["sql", "med"], target_modules=["0"])
    >>> report = inject(model, config)
    >>> with TemporaryDirectory() as folder:
    ...     exported = export_expert(model, "sql", folder)
    ...     report = from_adapters(model, {"sql": folder}, router="SoftRouter", mix="other")
    >>> model[0].experts("other")
    ['sql']
    """
    layers = layers_of(model, mix, "export_expert")
    known = experts_of(layers, mix)
    if expert not in known:
        raise ValueError(f"export_expert: expected an expert among {known}, got {expert!r}")
    factors = {}
    for name, layer in layers.items():
        if expert in layer.experts(mix):
            a, b = (factor.detach() for factor in layer.factors(mix, expert))
            if a.shape[0] > 0:
                factors[name] = LowRank(a, b, layer.scaling[mix][expert])
    if not factors:
        raise ValueError(f"export_expert: expected a rank above 0 in some layer, got {expert!r}")
    exported = _plain_lora(model, mix, factors, error=0.0, errors=dict.fromkeys(factors, 0.0))
    exported.save_pretrained(folder)
    return exported


# ---- factors -------------------------------------------------------------------------------------


def _weights_of(layers: Mapping[str, RoutedLoraLinear], weights: Any, mix: str) -> dict[str, float]:
    known = experts_of(layers, mix)
    if isinstance(weights, Mapping):
        unknown = sorted(set(weights) - set(known))
        if unknown:
            raise ValueError(f"collapse_to_lora: expected experts among {known}, got {unknown}")
        return {expert: float(weights.get(expert, 0)) for expert in known}
    values = [float(weight) for weight in weights]
    if len(values) != len(known):
        raise ValueError(
            f"collapse_to_lora: expected weights for {len(known)} experts, got {len(values)}"
        )
    return dict(zip(known, values))


def stacked_factors(
    layer: RoutedLoraLinear, weights: Mapping[str, float], mix: str
) -> tuple[Tensor, Tensor]:
    """Both factors of what a mixture adds with these weights.

    Raises:
        ValueError: it is no low-rank map: several networks, weighed.
    """
    kind = layer.kind[mix]
    if kind == "block" and sorted(w for w in weights.values() if w != 0) != [1]:
        raise ValueError(
            'lora: expected one expert of weight 1 with mix="block", whose experts are networks, '
            f"got {dict(weights)}. Use export_expert"
        )
    experts = layer.experts(mix)
    used = {e: weight for e, weight in weights.items() if weight != 0 and e in experts}
    factors_a = [layer.factors(mix, e)[0].detach() for e in used]
    factors_b = [
        (weight * layer.scaling[mix][e]) * layer.factors(mix, e)[1].detach()
        for e, weight in used.items()
    ]
    if kind == "factors" and used:
        mixed_a = sum(weight * a for a, weight in zip(factors_a, used.values()))
        return mixed_a, sum(factors_b)
    some = layer.factors(mix, experts[0])[0]
    empty_a, empty_b = some.new_empty(0, layer.in_features), some.new_empty(layer.out_features, 0)
    return torch.cat([empty_a, *factors_a]), torch.cat([empty_b, *factors_b], 1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best product of a rank, and the squares of the norms of what is lost and of the whole."""
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    rank = min(rank, s.shape[0])
    root = s[:rank].sqrt()
    new_b, new_a = q_b @ (u[:, :rank] * root), (root.unsqueeze(1) * v[:rank]) @ q_a.T
    lost, total = s[rank:].square().sum().item(), s.square().sum().item()
    return new_a.to(a.dtype), new_b.to(b.dtype), lost, total


def _plain_lora(
    model: nn.Module,
    mix: str,
    layers: dict[str, LowRank],
    *,
    error: float,
    errors: dict[str, float],
) -> CollapsedLora:
    """As PEFT has it: ranks and alphas by patterns where layers differ."""
    ours = config_of(model, mix, "lora")
    named = {name_on_disk(name): factors for name, factors in layers.items()}
    ranks = exact_patterns({name: f.A.shape[0] for name, f in named.items()})
    alphas = exact_patterns({name: f.scaling * f.A.shape[0] for name, f in named.items()})
    modules = dict(model.named_modules())
    config = {
        "peft_type": "LORA",
        "r": ranks.pop(".*"),
        "lora_alpha": alphas.pop(".*"),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": ours.lora_dropout,
        "target_modules": exact_targets(model, list(named)),
        "modules_to_save": ours.modules_to_save,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": ours.fan_in_fan_out
        or any(type(modules[name].base_layer).__name__ == "Conv1D" for name in layers),
        "task_type": ours.task_type,
        "inference_mode": True,
        "base_model_name_or_path": base_model_name(model),
    }
    others = {
        f"{name}.{key}": value
        for name, module in saved_modules(model, ours.modules_to_save, mix).items()
        for key, value in module.state_dict().items()
    }
    of_layers = {name_on_disk(name): value for name, value in errors.items()}
    return CollapsedLora(named, error, of_layers, config, others)
