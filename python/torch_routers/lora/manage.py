"""What is on, what is trained, and which experts there are."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from torch_routers.lora.config import RoutedLoraConfig
from torch_routers.lora.inject import config_of, experts_of, layers_of, scopes_of, set_config
from torch_routers.registry import from_config, router_parameters
from torch_routers.routers import Router


def set_mix(model: nn.Module, mix: str | Sequence[str] | None) -> None:
    """Make one mixture of a model the active one; None: the base model alone.

    Of several names, each layer takes the first that it has: mixtures of other layers are active
    together.

    Raises:
        ValueError: the model has no such mixture.
    """
    names = [mix] if isinstance(mix, str) else list(mix or ())
    for name in names:
        layers_of(model, name, "set_mix")
    for layer in layers_of(model, caller="set_mix").values():
        layer.active_mix = next((name for name in names if name in layer.routed_A), None)


@contextmanager
def disable(model: nn.Module) -> Iterator[nn.Module]:
    """The base model, to the bit, inside the block: as the reference of DPO needs it."""
    with _set(layers_of(model, caller="disable").values(), "active_mix", None):
        yield model


def force(model: nn.Module, expert: str, mix: str = "default") -> AbstractContextManager[None]:
    """One expert alone, with weight 1, inside the block; no router is asked.

    Raises:
        ValueError: the mixture has no such expert.
    """
    number = _number_of(model, expert, mix, "force")
    config = config_of(model, mix, "force")
    if config.mix == "ranks" or number >= min(config.experts_per_layer or [config.num_experts]):
        raise ValueError(
            f"force: expected an expert with factors of its own in every layer, got {expert!r} of "
            f"a mixture with mix={config.mix!r} and experts_per_layer={config.experts_per_layer}"
        )
    return _set(scopes_of(model, "force", mix), "forced", number)


@contextmanager
def _set(objects: Collection[Any], attribute: str, value: Any) -> Iterator[None]:
    """An attribute of all of them, inside the block."""
    before = [getattr(x, attribute) for x in objects]
    try:
        for x in objects:
            setattr(x, attribute, value)
        yield
    finally:
        for x, old in zip(objects, before):
            setattr(x, attribute, old)


# ---- what is trained -----------------------------------------------------------------------------


def set_trainable(
    model: nn.Module,
    *,
    experts: Sequence[str] | bool = True,
    router: bool = True,
    mix: str = "default",
) -> None:
    """Say which parts of a mixture are trained; the others are frozen, until the next call.

    Args:
        experts: their names; True: all, False: none.
        router: whether routers are trained.

    Raises:
        ValueError: an expert that the mixture does not have.
    """
    layers = layers_of(model, mix, "set_trainable")
    known = experts_of(layers, mix)
    chosen = known if experts is True else _chosen(model, experts or (), mix, "set_trainable")
    for layer in layers.values():
        layer.set_trainable(mix, chosen, router)


def expert_parameters(
    model: nn.Module, experts: Sequence[str] | None = None, mix: str = "default"
) -> list[nn.Parameter]:
    """The factors of some experts, or of all, such as for `losses.expert_preservation`.

    Raises:
        ValueError: an expert that the mixture does not have.
    """
    layers = layers_of(model, mix, "expert_parameters")
    if experts is not None:
        experts = _chosen(model, experts, mix, "expert_parameters")
    return [
        factor.weight
        for layer in layers.values()
        for part in (layer.routed_A, layer.routed_B)
        for name, factor in part[mix].items()
        if experts is None or name in experts
    ]


def trainable_parameters(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: ``trainable``, ``all``, and of those trained ``routers``, ``experts``.

    ``frozen_experts`` are those of experts that are not trained.
    """
    counts = dict.fromkeys(("trainable", "all", "routers", "experts", "frozen_experts"), 0)
    for parameter in model.parameters():
        counts["all"] += parameter.numel()
        counts["trainable"] += parameter.numel() * parameter.requires_grad
    for layer in layers_of(model, caller="trainable_parameters").values():
        of_experts = [*layer.routed_A.parameters(), *layer.routed_B.parameters()]
        of_routers = [*layer.routed_gate.parameters(), *layer.routed_tasks.parameters()]
        for parameter in of_experts:
            name = "experts" if parameter.requires_grad else "frozen_experts"
            counts[name] += parameter.numel()
        for parameter in of_routers:
            counts["routers"] += parameter.numel() * parameter.requires_grad
    return counts


def print_trainable_parameters(model: nn.Module) -> None:
    """Print them in PEFT's format, and what is trained of routers and experts below."""
    counts = trainable_parameters(model)
    share = 100 * counts["trainable"] / max(1, counts["all"])
    print(
        f"trainable params: {counts['trainable']:,d} || all params: {counts['all']:,d} || "
        f"trainable%: {share:.4f}"
    )
    print(
        f"routers: {counts['routers']:,d} || experts: {counts['experts']:,d} || "
        f"frozen experts: {counts['frozen_experts']:,d}"
    )


# ---- which experts there are ---------------------------------------------------------------------


def add_expert(
    model: nn.Module, expert: str, mix: str = "default", *, rank: int | None = None
) -> None:
    """Add an expert that does nothing yet, behind the others; routers get a row for it.

    The row is a fresh one, so that the new expert is chosen now and then; what the router knew of
    the others stays.

    Args:
        rank: of its factors. Default: that of the configuration.

    Raises:
        ValueError: a name that is in use, or a router that cannot grow.
    """
    layers = layers_of(model, mix, "add_expert")
    known, config = experts_of(layers, mix), config_of(model, mix, "add_expert")
    _check_may_change(config, "add_expert")
    if expert in known:
        raise ValueError(f"add_expert: expected a new name of an expert, got {expert!r}")
    every = [*range(len(known))]
    config = _with_experts(config, every, {expert: config.r if rank is None else rank})
    _resize_routers(model, mix, every, added=1)
    for name, layer in layers.items():
        number = len(known)
        rank, scaling = config.rank_of(name, number), config.scaling_of(name, number)
        layer.add_expert(mix, expert, rank, scaling, config.init_lora_weights)
    set_config(model, mix, config)


def remove_expert(model: nn.Module, expert: str, mix: str = "default") -> None:
    """Take an expert out of a mixture, and its row out of the routers.

    Raises:
        ValueError: there is no such expert, it is the last one, or a router cannot shrink.
    """
    number = _number_of(model, expert, mix, "remove_expert")
    layers = layers_of(model, mix, "remove_expert")
    known = experts_of(layers, mix)
    _check_may_change(config_of(model, mix, "remove_expert"), "remove_expert")
    if len(known) == 1:
        raise ValueError(f"remove_expert: expected another expert besides {expert!r}, got none")
    kept = [e for e in range(len(known)) if e != number]
    config = _with_experts(config_of(model, mix, "remove_expert"), kept, {})
    _resize_routers(model, mix, kept, added=0)
    for layer in layers.values():
        for part in layer.routed_A[mix], layer.routed_B[mix], layer.scaling[mix]:
            if expert in part:  # a shared factor stays
                del part[expert]
    set_config(model, mix, config)


def _with_experts(
    config: RoutedLoraConfig, kept: list[int], added: dict[str, int]
) -> RoutedLoraConfig:
    """The configuration of some of its experts, and of more with their ranks."""
    names, ranks = config.experts(), config.ranks or [config.r] * config.num_experts
    ranks = [*(ranks[e] for e in kept), *added.values()]

    def of_experts(patterns: dict[str, Any], new: list[float]) -> dict[str, Any]:
        return {
            pattern: [*(value[e] for e in kept), *new] if isinstance(value, list) else value
            for pattern, value in patterns.items()
        }

    return dataclasses.replace(
        config,
        num_experts=len(ranks),
        expert_names=[*(names[e] for e in kept), *added],
        ranks=None if set(ranks) == {config.r} else ranks,
        rank_pattern=of_experts(config.rank_pattern, [*added.values()]),
        alpha_pattern=of_experts(config.alpha_pattern, [config.lora_alpha] * len(added)),
    )


def _resize_routers(model: nn.Module, mix: str, kept: list[int], added: int) -> None:
    """Builds every router anew for other experts, and hands on what it knew of those that stay."""
    scopes = scopes_of(model, "lora", mix)
    resized = [_resized(scope.router, kept, added) for scope in scopes]
    for scope, router in zip(scopes, resized):
        scope.replace_router(router, layers_of(model, mix).values(), mix)


def _resized(router: Router, kept: list[int], added: int) -> Router:
    config = router.config() | {"num_experts": len(kept) + added}
    result = from_config(config).train(router.training)
    old, new = router.state_dict(), result.state_dict()
    merged = {}
    for name, value in old.items():
        fresh, of_experts = new[name], value.shape[:1] == (router.num_experts,)
        if not of_experts and fresh.shape != value.shape:
            raise ValueError(
                f"lora: expected a router whose state has experts in the first dimension, got "
                f"{name} {list(value.shape)} of {type(router).__name__}"
            )
        if not of_experts:
            merged[name] = value
            continue
        rows = fresh[len(kept) :].to(value)
        merged[name] = torch.cat([value[kept], rows])
    result.load_state_dict(merged, assign=True)
    for parameter, before in zip(result.parameters(), router.parameters()):
        parameter.requires_grad_(before.requires_grad)
    return result


def _chosen(model: nn.Module, experts: Sequence[str], mix: str, caller: str) -> list[str]:
    if isinstance(experts, str):
        raise ValueError(f"{caller}: expected a list of experts, got {experts!r}")
    for expert in experts:
        _number_of(model, expert, mix, caller)
    return list(experts)


def _number_of(model: nn.Module, expert: str, mix: str, caller: str) -> int:
    known = experts_of(layers_of(model, mix, caller), mix)
    if expert not in known:
        raise ValueError(f"{caller}: expected an expert among {known}, got {expert!r}")
    return known.index(expert)


def _check_may_change(config: RoutedLoraConfig, caller: str) -> None:
    of_tasks = "num_tasks" in router_parameters(config.router)  # experts are not in rows
    if config.mix == "ranks" or config.experts_per_layer is not None or of_tasks:
        raise ValueError(
            f"{caller}: expected a mixture whose layers have the same experts, of factors of their "
            f"own, got mix={config.mix!r}, experts_per_layer={config.experts_per_layer} and "
            f"router={config.router!r}"
        )
