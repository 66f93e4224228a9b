"""Which layers of a model get experts, by PEFT's rules, and a report about it."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from torch_routers.lora.config import RoutedLoraConfig, pattern_for

ALL_LINEAR = "all-linear"

#: What the heads of models that classify sequences are called, which nothing else says.
_CLASSIFIERS = ("classifier", "score")


@dataclass
class InjectionReport:
    """What a configuration matches in a model; print it.

    Attributes:
        matched: names of the layers that get experts, in the order of the model.
        unmatched_patterns: those of ``target_modules`` that match nothing.
        unsupported: names and types of modules that match, but are not linear.
        coverage: fraction of the weights of all linear layers that lie in matched ones.
        bypassed: names of matched layers whose parent reads their weight and does not call them, so
            that experts there do nothing.
    """

    matched: list[str]
    unmatched_patterns: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    coverage: float = 0.0
    bypassed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.matched)} layers matched, {100 * self.coverage:.1f} % of the weights of "
            "linear layers"
        ]
        numbered = Counter(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in self.matched)
        lines += [f"  {name}" + (f" ({n})" if n > 1 else "") for name, n in numbered.items()]
        if self.unmatched_patterns:
            lines.append(f"targets that match nothing: {', '.join(self.unmatched_patterns)}")
        if self.unsupported:
            named = (f"{name} ({kind})" for name, kind in self.unsupported.items())
            lines.append(f"matched, but not linear: {', '.join(named)}")
        if self.bypassed:
            lines.append(f"matched, but not called: {', '.join(self.bypassed)}")
        return "\n".join(lines)


def match_modules(
    model: nn.Module, config: RoutedLoraConfig, *, strict: bool = True
) -> InjectionReport:
    """Find the layers of a model that a configuration means.

    Args:
        model: is not changed.
        config: its ``target_modules``, ``exclude_modules``, ``layers_to_transform``,
            ``layers_pattern`` and ``modules_to_save``.
        strict: a module that matches and is not linear is an error. False: it is left out, and in
            the report.

    Linear are ``nn.Linear``, ``Conv1D`` of Transformers, and whatever has ``in_features`` and
    ``out_features``, such as a quantised layer. A warning says which ``exclude_modules``,
    ``rank_pattern`` and ``alpha_pattern`` match nothing.

    Raises:
        ValueError: nothing matches, or a matched module is not linear.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(match_modules(model, RoutedLoraConfig(target_modules=["0"])))
    1 layers matched, 80.0 % of the weights of linear layers
      *
    """
    if not config.target_modules:
        raise ValueError(
            f"match_modules: expected target_modules, got {config.target_modules!r}. "
            f'Name layers, or use "{ALL_LINEAR}"'
        )
    modules = dict(_outside_of_adapters(model))
    linear = set(_outermost_linear(model, modules))
    targets: str | list[str] = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = sorted(linear - _heads(model, config.task_type))
    named = [name for name in modules if _is_target(name, targets, config)]
    excluded = {name for name in modules if _is_excluded(name, config)}
    chosen = [name for name in named if name not in excluded]
    report = InjectionReport(
        matched=[name for name in chosen if linear_features(modules[name]) is not None],
        unmatched_patterns=_unmatched(config.target_modules, modules),
        unsupported={
            name: type(modules[name]).__name__
            for name in chosen
            if linear_features(modules[name]) is None
        },
    )
    if strict and report.unsupported:
        name, kind = next(iter(report.unsupported.items()))
        raise ValueError(
            f"match_modules: expected linear layers, nn.Linear, Conv1D or with in_features and "
            f"out_features, got {name} of type {kind}. Take it out with exclude_modules"
        )
    if not report.matched:
        raise ValueError(_nothing_matches(config, named))
    sizes = {name: _weights(modules[name]) for name in linear.union(report.matched)}
    report.coverage = sum(map(sizes.get, report.matched)) / max(1, sum(sizes.values()))
    report.bypassed = [name for name in report.matched if _is_bypassed(model, name)]
    _warn_of_unused(config, modules, report)
    return report


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """``in_features`` and ``out_features`` of a layer that is linear; None: it is not."""
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in features):
        return features
    weight = getattr(module, "weight", None)
    is_conv1d = type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)
    if is_conv1d and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


# ---- rules ---------------------------------------------------------------------------------------


def _is_target(name: str, targets: str | list[str], config: RoutedLoraConfig) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends_with(name, targets) and _is_of_layers(name, config)


def _is_of_layers(name: str, config: RoutedLoraConfig) -> bool:
    """By the first number in the name, after a name of ``layers_pattern`` if there are any."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # A list without a name of its own is one only after a dot, as in PEFT.
        start = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
        match = re.match(rf"{start}{pattern}\.(?P<number>\d+)\.", name)
        if match is not None:
            number = int(match["number"])
            return number == layers if isinstance(layers, int) else number in layers
    return False


def _is_excluded(name: str, config: RoutedLoraConfig) -> bool:
    saved = config.modules_to_save or ()
    return _is_meant(name, config.exclude_modules) or any(
        re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved
    )


def _is_meant(name: str, names: str | list[str] | None) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, name) is not None
    return name in (names or ()) or _ends_with(name, names or ())


def _ends_with(name: str, ends: Iterable[str]) -> bool:
    return any(name.endswith(f".{end}") for end in ends)


# ---- the model -----------------------------------------------------------------------------------


def _outside_of_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but the model itself and what is inside of layers that have an adapter."""
    wrappers: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(wrappers)):
            continue
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            wrappers.append(f"{name}.")
        yield name, module


def _outermost_linear(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Linear layers that are not part of one."""
    inside: list[str] = []
    for name, module in modules.items():
        if linear_features(module) is not None and not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            yield name


def _heads(model: nn.Module, task_type: str | None) -> set[str]:
    """Names of the output head, as far as the model says which module that is."""
    find = getattr(model, "get_output_embeddings", None)
    if find is None:
        return set()
    head = find()
    if head is None and task_type == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in reversed(_CLASSIFIERS))
        head = next((module for module in heads if module is not None), None)
    return {name for name, module in model.named_modules() if module is head}


def _is_bypassed(model: nn.Module, name: str) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)


def _weights(module: nn.Module) -> int:
    rows, columns = linear_features(module)
    return rows * columns


# ---- what fits nothing ---------------------------------------------------------------------------


def _unmatched(targets: str | list[str], modules: Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        return []  # nothing matches, then, which is an error
    return [end for end in targets if not any(_is_meant(name, [end]) for name in modules)]


def _nothing_matches(config: RoutedLoraConfig, named: list[str]) -> str:
    message = f"match_modules: expected layers that match {config.target_modules!r}, got none"
    if named:
        message += f": exclude_modules or modules_to_save take out {named}"
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name) is not None:
            message += f". {name} is {getattr(config, name)}"
    return message


def _warn_of_unused(
    config: RoutedLoraConfig, modules: Iterable[str], report: InjectionReport
) -> None:
    excluded = config.exclude_modules or []
    unused = {
        "exclude_modules": [
            end
            for end in ([excluded] if isinstance(excluded, str) else excluded)
            if not any(
                _is_meant(name, excluded if isinstance(excluded, str) else [end])
                for name in modules
            )
        ]
    }
    for field_name in ("rank_pattern", "alpha_pattern"):
        unused[field_name] = [
            pattern
            for pattern in getattr(config, field_name)
            if not any(pattern_for([pattern], name) is not None for name in report.matched)
        ]
    for field_name, patterns in unused.items():
        if patterns:
            warnings.warn(
                f"match_modules: expected {field_name} that match, got {patterns}, which match "
                "nothing",
                stacklevel=3,
            )
    if report.bypassed:
        warnings.warn(
            f"match_modules: expected layers that their model calls, got {report.bypassed}, whose "
            "weights nn.MultiheadAttention reads: experts there do nothing",
            stacklevel=3,
        )
