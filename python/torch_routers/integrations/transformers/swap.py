"""Other routers for the mixture-of-experts models of Transformers."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torch_routers.delivery import inputs_of
from torch_routers.integrations.transformers.families import FAMILIES, VERSION, Family
from torch_routers.integrations.transformers.gates import (
    Block,
    Gate,
    block_class,
    gate_class,
    logits_weights_indices,
)
from torch_routers.registry import Configurable, check_choice, create_router, list_routers, lookup
from torch_routers.routers import RecurrentRouter, Router, SMEARRouter, TopKRouter

#: What a module keeps hooks in: those of a gate go on to see what is in its place.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass
class SwapReport:
    """What `swap_routers` did."""

    router: str
    """The class of the routers."""
    names: list[str] = field(default_factory=list)
    """Where they are in the model."""
    added_keys: list[str] = field(default_factory=list)
    """Keys of the ``state_dict`` that the model did not have: a plain one cannot load them."""
    unused_keys: list[str] = field(default_factory=list)
    """Keys that the model had and the routers do not look at: kept as they were, frozen."""
    _undo: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Give the model its own gates back, as they were before the swap."""
        while self._undo:
            self._undo.pop()()


def swap_routers(
    model: nn.Module,
    router: str = "TopKRouter",
    *,
    top_k: int | str = "keep",
    init: str = "copy",
    **router_arguments: Any,
) -> SwapReport:
    """Replace, in place, the router of every mixture-of-experts layer of a Transformers model.

    The layers are those of Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, DeepSeek-V3 and GPT-OSS, in
    Transformers 5 and 4.57. A `TopKRouter` without further arguments routes as the model does,
    computing in float32; experts and all else stay what they are. `tr.collect`, `tr.attach`,
    `tr.follow_inputs`, controllers and metrics find the routers as those of any other model.

    Keys of the ``state_dict`` stay what they were, so that checkpoints load both ways. What
    ``save_pretrained`` writes a plain model reads too, and then routes by its own rule. A router
    with parameters that the gate did not have adds their keys; the report names them.

    Experts get the same number of slots for every token. A router with a weight for every expert
    fills them from its largest weights; the rest, and the slots of masked and dropped tokens, name
    an expert once more, with weight 0.

    Args:
        model: with at least one such layer.
        router: the class of the new routers, one of `tr.list_routers`.
        top_k: experts per token. ``"keep"``: as many as the model has; with a router whose number
            of experts varies, as many as it may choose.
        init: ``"copy"`` the gate's weight, bias and selection bias, as far as the router has such,
            and their ``requires_grad``; or ``"reset"``, as a new router begins.
        router_arguments: of the class. What it is not given it takes from the model's own rule,
            where it has such an argument. A scale of weights is kept even where it has none.

    Raises:
        ValueError: no layer to swap, or one that is swapped; a router that merges experts or hands
            a state to the next; an argument that does not fit. Later, a call with
            ``output_router_logits`` where the model's own loss would measure another routing.
        RuntimeError: later, in training, the router has losses and nothing delivers them.
    """
    cls = _class_of(router)
    check_choice("swap_routers", "init", init, ("copy", "reset"))
    if top_k != "keep" and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"swap_routers: expected top_k >= 1 or 'keep', got {top_k!r}")
    taken = {"hidden_size", "num_experts"} & set(router_arguments)
    if taken:
        raise ValueError(
            f"swap_routers: expected router_arguments without sizes, got {sorted(taken)}"
        )
    if "losses" in router_arguments:  # each router has its own
        losses = router_arguments["losses"]
        losses = [loss.config() if isinstance(loss, Configurable) else loss for loss in losses]
        router_arguments = {**router_arguments, "losses": losses}
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ in FAMILIES}
    if not blocks:
        raise ValueError(
            f"swap_routers: expected a model with layers among {sorted(FAMILIES)}, "
            f"got {type(model).__name__} without"
        )
    # All are built before anything is changed.
    built = [_router_for(block, cls, top_k, router_arguments) for block in blocks.values()]
    counted = all(
        _counts_as(made, FAMILIES[type(block).__name__].rule_of(block))
        for made, block in zip(built, blocks.values())
    )
    report, inputs = SwapReport(router), inputs_of(model)
    for (name, block), made in zip(blocks.items(), built):
        made._inputs = inputs
        _put(made, name, block, init, report)
    if not counted:
        check = functools.partial(_refuse_recorded_logits, router)
        handle = model.register_forward_pre_hook(check, with_kwargs=True)
        report._undo.append(handle.remove)
    return report


def _class_of(router: str) -> type[Router]:
    check_choice("swap_routers", "router", router, list_routers())
    cls = lookup("swap_routers", router)
    for refused, reason in ((SMEARRouter, "merges them"), (RecurrentRouter, "needs a state")):
        if issubclass(cls, refused):
            raise ValueError(
                "swap_routers: expected a router that chooses experts from the tokens, "
                f"got {router}, which {reason}"
            )
    return cls


def _router_for(
    block: nn.Module, cls: type[Router], top_k: int | str, arguments: dict[str, Any]
) -> Router:
    """A router for the gate of one block, already of the class that answers as the gate does."""
    family = FAMILIES[type(block).__name__]
    gate = getattr(block, family.gate)
    if isinstance(gate, Gate):
        raise ValueError(
            f"swap_routers: expected a model with its own gates, got {type(gate).__name__}. "
            "Call restore() on the report of the first swap"
        )
    num_experts, hidden_size = gate.weight.shape
    rule = {"hidden_size": hidden_size, "num_experts": num_experts, **family.rule_of(block)}
    takes = inspect.signature(cls).parameters
    if top_k != "keep":
        rule["top_k"] = top_k
        if "top_k" not in takes and (hasattr(cls, "top_k") or top_k > num_experts):
            raise ValueError(
                f"swap_routers: expected top_k='keep' with {cls.__name__}, or at most {num_experts} "
                f"where it has a weight for every expert, got {top_k}"
            )
    given = {name: value for name, value in rule.items() if name in takes}
    made = create_router(cls.__name__, **{**given, **arguments})
    made.to(gate.weight.device, gate.weight.dtype).train(gate.training)

    bias = "e_score_correction_bias"
    renamed = bias in gate._buffers and made.expert_bias is not None
    made.__class__ = gate_class(
        cls,
        None if isinstance(gate, nn.Linear) else type(gate),
        logits_weights_indices if VERSION >= 5 else family.answer,
        bias if renamed else None,
    )
    if renamed:
        made._buffers[bias] = made._buffers.pop("expert_bias")
    made.slots = num_experts if top_k == "keep" or "top_k" in takes else top_k
    made.factor = 1.0 if "scale" in takes else rule.get("scale", 1.0)
    return made


def _put(made: Router, name: str, block: nn.Module, init: str, report: SwapReport) -> None:
    """The router into the block, with what the gate has."""
    family = FAMILIES[type(block).__name__]
    gate = getattr(block, family.gate)
    name = f"{name}.{family.gate}"
    added = [key for key in made.state_dict() if key not in gate.state_dict()]
    report.names.append(name)
    report.added_keys += [f"{name}.{key}" for key in added]
    report.unused_keys += [f"{name}.{key}" for key in _take_over(made, gate, init)]
    for hooks in _HOOKS:
        setattr(made, hooks, getattr(gate, hooks))
    setattr(block, family.gate, made)
    report._undo.append(functools.partial(setattr, block, family.gate, gate))
    report._undo.append(block.register_forward_pre_hook(made.see_block).remove)
    if VERSION < 5 and family.chooses:
        _change_class(block, block_class(type(block)))
        report._undo.append(functools.partial(_change_class, block, type(block).made_of[0]))


def _take_over(made: Router, gate: nn.Module, init: str) -> list[str]:
    """Copies what both have; what only the gate has is kept, and its names are returned."""
    theirs = dict(gate.named_parameters())
    ours = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    unused = []
    for key, value in {**theirs, **dict(gate.named_buffers())}.items():
        kept = value.detach().clone()
        if key in ours:
            if init == "copy":
                with torch.no_grad():
                    ours[key].copy_(kept)
                ours[key].requires_grad_(value.requires_grad)
            continue
        if hasattr(made, key):  # bias is None
            raise ValueError(
                f"swap_routers: expected gate_bias=True for a gate with a {key}, got False"
            )
        if key in theirs:
            made.register_parameter(key, nn.Parameter(kept, requires_grad=False))
        else:
            made.register_buffer(key, kept)
        unused.append(key)
    return unused


def _change_class(block: nn.Module, cls: type[nn.Module]) -> None:
    """Also where Transformers 4 left the forward of the class with the object, having recorded."""
    left = block.__dict__.get("forward")
    if getattr(left, "__func__", None) is type(block).forward:
        del block.forward
    block.__class__ = cls


# ---- the model's own loss ------------------------------------------------------------------------


def _counts_as(made: Router, rule: dict[str, Any]) -> bool:
    """Whether the model's own loss, which chooses experts anew, counts those of the router."""
    choice = ("top_k", "score", "selection_bias", "num_groups", "topk_group")
    return isinstance(made, TopKRouter) and all(
        getattr(made, name) == rule[name] for name in choice if name in rule
    )


def _refuse_recorded_logits(router: str, model: nn.Module, args: tuple, kwargs: dict) -> None:
    given = {**dict(zip(inspect.signature(model.forward).parameters, args)), **kwargs}
    wanted = given.get("output_router_logits")
    if wanted is None:
        wanted = getattr(getattr(model, "config", None), "output_router_logits", False)
    if wanted:
        raise ValueError(
            f"swap_routers: expected output_router_logits=False with {router}, which does not "
            "route as the model's own loss assumes, got True. Give the router losses="
        )
