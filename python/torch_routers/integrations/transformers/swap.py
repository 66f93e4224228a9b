"""Other routers for the mixture-of-experts models of Transformers."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

from torch_routers.delivery import inputs_of
from torch_routers.integrations.transformers.families import FAMILIES, VERSION
from torch_routers.integrations.transformers.gates import (
    Gate,
    block_class,
    gate_class,
    logits_weights_indices,
)
from torch_routers.registry import (
    Configurable,
    check_choice,
    create_router,
    list_routers,
    lookup,
    router_parameters,
)
from torch_routers.routers import RecurrentRouter, Router, SMEARRouter, TopKRouter

#: What a module keeps hooks in: those of a gate go on to see what is in its place.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

#: What classes of routers have in common.
_COMMON = ("hidden_size", "num_experts", "top_k", "gate_bias")


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
        RuntimeError: DeepSeek-V3 in the first releases of Transformers 5. Later, in training: the
            router has losses and nothing delivers them.
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
    swaps = [
        _Swap(name, block, cls, top_k, init, router_arguments) for name, block in blocks.items()
    ]
    report, inputs = SwapReport(router), inputs_of(model)
    for swap in swaps:
        swap.router._inputs = inputs
        swap.put(report)
    if not all(swap.as_the_model_counts for swap in swaps):
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


class _Swap:
    """A router for the gate of one block, and how it gets there."""

    def __init__(
        self,
        name: str,
        block: nn.Module,
        cls: type[Router],
        top_k: int | str,
        init: str,
        arguments: dict[str, Any],
    ) -> None:
        self.block, self.family = block, FAMILIES[type(block).__name__]
        self.name = f"{name}.{self.family.gate}"
        self.gate = getattr(block, self.family.gate)
        if isinstance(self.gate, Gate):
            raise ValueError(
                f"swap_routers: expected a model with its own gates, got {type(self.gate).__name__}"
                f" at {self.name}. Call restore() on the report of the first swap"
            )
        if hasattr(block, "route_tokens_to_experts"):
            raise RuntimeError(
                f"swap_routers: expected {type(block).__name__} to leave the choice of experts to "
                f"its gate, got one of transformers {transformers.__version__} that does not. Run: "
                "pip install -U transformers"
            )
        rule = self.family.rule_of(block)
        self.router = self._build(cls, rule, top_k, arguments)
        choice = ("top_k", "score", "selection_bias", "num_groups", "topk_group")
        #: Whether the model's own loss, which chooses experts anew, counts those of the router.
        self.as_the_model_counts = isinstance(self.router, TopKRouter) and all(
            getattr(self.router, option) == rule[option] for option in choice if option in rule
        )
        self.unused = self._take_over(init)

    def _build(
        self,
        cls: type[Router],
        rule: dict[str, Any],
        top_k: int | str,
        arguments: dict[str, Any],
    ) -> Router:
        gate, takes = self.gate, router_parameters(cls.__name__)
        num_experts, hidden_size = gate.weight.shape
        slots = num_experts
        if top_k != "keep" and "top_k" not in takes:
            if hasattr(cls, "top_k") or top_k > num_experts:
                raise ValueError(
                    f"swap_routers: expected top_k='keep', or at most {num_experts} where a router "
                    f"has a weight for every expert, got {top_k} for {cls.__name__}"
                )
            slots = top_k
        wanted = {**rule, "hidden_size": hidden_size, "num_experts": num_experts}
        if top_k != "keep":
            wanted["top_k"] = top_k
        if not issubclass(cls, TopKRouter):  # other classes mean other things by these
            wanted = {option: wanted[option] for option in _COMMON if option in wanted}
        given = {option: value for option, value in wanted.items() if option in takes}
        router = create_router(cls.__name__, **{**given, **arguments})
        router.to(gate.weight.device, gate.weight.dtype).train(gate.training)
        bias = "e_score_correction_bias"
        renamed = bias in gate._buffers and bool(getattr(router, "selection_bias", False))
        router.__class__ = gate_class(
            cls,
            None if isinstance(gate, nn.Linear) else type(gate),
            logits_weights_indices if VERSION >= 5 else self.family.answer,
            bias if renamed else None,
        )
        if renamed:
            router._buffers[bias] = router._buffers.pop("expert_bias")
        router.slots = slots
        router.factor = 1.0 if "scale" in takes else rule.get("scale", 1.0)
        return router

    def _take_over(self, init: str) -> list[str]:
        """Copies what both have; what only the gate has is kept, for its key, which is returned."""
        unused = []
        parameters, router = dict(self.gate.named_parameters()), self.router
        ours = {**dict(router.named_parameters()), **dict(router.named_buffers())}
        for key, value in {**parameters, **dict(self.gate.named_buffers())}.items():
            if key in ours:
                if ours[key].shape != value.shape:
                    raise ValueError(
                        f"swap_routers: expected a router with a {key} of shape "
                        f"{list(value.shape)}, as that of the gate, got {list(ours[key].shape)} of "
                        f"{type(router).__name__}"
                    )
                if init == "copy":
                    with torch.no_grad():
                        ours[key].copy_(value)
                    ours[key].requires_grad_(value.requires_grad)
                continue
            if hasattr(router, key):  # a bias that is None
                raise ValueError(
                    f"swap_routers: expected a router with a {key}, as the gate has one, got "
                    f"{type(router).__name__} without. Use gate_bias=True, or another router"
                )
            kept = value.detach().clone()
            if key in parameters:
                router.register_parameter(key, nn.Parameter(kept, requires_grad=False))
            else:
                router.register_buffer(key, kept)
            unused.append(key)
        return unused

    def put(self, report: SwapReport) -> None:
        block, router, gate, undo = self.block, self.router, self.gate, report._undo
        before = gate.state_dict()
        report.names.append(self.name)
        report.added_keys += [f"{self.name}.{k}" for k in router.state_dict() if k not in before]
        report.unused_keys += [f"{self.name}.{key}" for key in self.unused]
        for hooks in _HOOKS:
            setattr(router, hooks, getattr(gate, hooks))
        setattr(block, self.family.gate, router)
        undo.append(functools.partial(setattr, block, self.family.gate, gate))
        undo.append(block.register_forward_pre_hook(router.see_block).remove)
        if VERSION < 5 and self.family.chooses:
            undo.append(functools.partial(_change_class, block, type(block)))
            _change_class(block, block_class(type(block)))


def _change_class(block: nn.Module, cls: type[nn.Module]) -> None:
    """Also where Transformers 4 left the forward of the class with the object, having recorded."""
    left = block.__dict__.get("forward")
    if getattr(left, "__func__", None) is type(block).forward:
        del block.forward
    block.__class__ = cls


# ---- the model's own loss ------------------------------------------------------------------------


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
