"""Three ways from a router's losses to the objective: returned, collected, attached.

========== ============================================ ===========================================
returned   ``routing.aux_loss``                         every mode; you carry it to the loss
collected  ``with collect(model) as routings``          eager and compiled; not inside a checkpoint
                                                        that is compiled (an error) or reentrant
                                                        (an error from ``aux_loss()``)
attached   ``attached = attach(model)``, then           every mode; nothing to carry
           ``attached(task_loss).backward()``
========== ============================================ ===========================================

Nothing here is global: a sink, a scale or a source of context belongs to the routers of one model.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_routers.routing import Routing

if TYPE_CHECKING:
    from torch_routers.routers import Router


#: Modules that torch puts around another one: no part of a name that is to stay.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


def routers_of(model: nn.Module, caller: str) -> dict[str, Router]:
    """The routers by the names that they have in the model, compiled or not."""
    from torch_routers.routers import Router

    routers = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
        for name, module in model.named_modules()
        if isinstance(module, Router)
    }
    if not routers:
        raise ValueError(f"{caller}: expected a model with routers, got {type(model).__name__}")
    return routers


def in_backward() -> bool:
    """Whether eager autograd is recomputing a checkpoint right now."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# ---- returned ------------------------------------------------------------------------------------


def require_destination(caller: str, router: Router, routing: Routing) -> None:
    """Raise where a layer is about to discard losses that nothing else delivers."""
    if routing.aux_loss is not None and not router._sinks and not in_backward():
        raise RuntimeError(
            f"{caller}: expected a destination for {len(routing.losses)} losses, got none. "
            "Use return_routing=True, tr.collect or tr.attach"
        )


# ---- collected -----------------------------------------------------------------------------------


class Routings:
    """What the routers of a model decided: router by router, in the order of the model's modules.

    The calls of one router stand together, in the order in which they were made.
    """

    def __init__(self, names: Iterable[str]) -> None:
        # A list for each router: torch.compile guards on the length of what it appends to, and
        # blocks that are compiled once for all layers must find the same length in each of them.
        self._of: dict[str, list[Routing]] = {name: [] for name in names}

    @property
    def names(self) -> list[str]:
        """The name of the router in the model, for each routing."""
        return [name for name, items in self._of.items() for _ in items]

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Routing]:
        return itertools.chain.from_iterable(self._of.values())

    def __getitem__(self, index: int) -> Routing:
        return list(self)[index]

    def aux_loss(self) -> Tensor:
        """The sum of the auxiliary losses, to add to the task loss.

        Raises:
            RuntimeError: a routing has no loss, or one whose gradient is lost.
        """
        losses = [routing.aux_loss for routing in self]
        missing = sum(loss is None for loss in losses)
        if missing or not losses:
            raise RuntimeError(
                f"collect: expected routings with an aux_loss, got {missing} of {len(losses)} "
                "without. They have none in eval mode, without `losses=`, and when `attach` "
                "already delivers them"
            )
        if torch.is_grad_enabled() and not all(loss.requires_grad for loss in losses):
            raise RuntimeError(
                "collect: expected losses with a gradient, got one without. Reentrant "
                "checkpointing detaches them: use use_reentrant=False, or `attach`"
            )
        return torch.stack(losses).sum()


def collect(model: nn.Module) -> AbstractContextManager[Routings]:
    """Gather every `Routing` that the routers of ``model`` produce inside the block.

    Works in training and in eval, eager and compiled, nested, and for several models side by side.

    Raises:
        ValueError: the model has no router.
    """
    return _gather(routers_of(model, "collect"), "_sinks")


def observe(model: nn.Module) -> AbstractContextManager[Routings]:
    """`collect` to look on: the losses still need a destination.

    Raises:
        ValueError: the model has no router.
    """
    return _gather(routers_of(model, "observe"), "_observers")


@contextmanager
def _gather(routers: dict[str, Router], sinks: str) -> Iterator[Routings]:
    routings = Routings(routers)
    for name, router in routers.items():
        setattr(router, sinks, [*getattr(router, sinks), routings._of[name]])
    try:
        yield routings
    finally:
        for name, router in routers.items():
            left = [sink for sink in getattr(router, sinks) if sink is not routings._of[name]]
            setattr(router, sinks, left)


# ---- attached ------------------------------------------------------------------------------------


class Attached:
    """Adds the losses of a model's routers to the gradient instead of the loss.

    Call it on the task loss, where you would have written ``+ aux_loss``. The value does not
    change; backward passes here first and learns what the loss is scaled by after this point
    (GradScaler, accumulation, the trainer's own factor), so that no one has to say it. Until then
    the scale is NaN: a forgotten call cannot train another objective in silence.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = list(routers_of(model, "attach").values())
        if any(router._aux_scale is not None for router in self._routers):
            raise ValueError(
                "attach: expected a model without attached losses, got one that has them. "
                "Call remove() on the first"
            )
        device = next(model.parameters()).device
        # The widest dtype: losses of float64 routers need all the bits of a factor.
        self.scale = torch.full((), torch.nan, dtype=torch.float64, device=device)
        for router in self._routers:
            router._aux_scale = self.scale

    def __call__(self, task_loss: Tensor, *, share: Tensor | float = 1.0) -> Tensor:
        """The task loss, through which backward will learn the scale.

        Args:
            task_loss: the loss of a micro-batch.
            share: multiplies the scale. For a task loss that is divided by the items of a whole
                step already: the part of them that this micro-batch has.
        """
        return _LearnScale.apply(task_loss, self.scale, share)

    def remove(self) -> None:
        """Give the losses back to ``routing.aux_loss``."""
        for router in self._routers:
            router._aux_scale = None


def attach(model: nn.Module) -> Attached:
    """Deliver the losses of the model's routers in backward: ``attached(task_loss).backward()``.

    Raises:
        ValueError: the model has no router, or its losses are attached already.
    """
    return Attached(model)


class _LearnScale(torch.autograd.Function):
    @staticmethod
    def forward(loss, scale, share):
        return loss.clone()  # no view: trainers scale it in place

    @staticmethod
    def setup_context(ctx, inputs, output):
        # Not save_for_backward: the scale is written below, once per micro-batch.
        _, ctx.scale, ctx.share = inputs

    @staticmethod
    def backward(ctx, grad):
        ctx.scale.copy_(grad * ctx.share)
        return grad, None, None


@torch.library.custom_op("torch_routers::_read_after", mutates_args=())
def _read_after(scale: Tensor, grad: Tensor) -> Tensor:
    """A copy of ``scale`` as it is once ``grad`` exists.

    An operator of its own, because a compiler that saw a mere copy would take it where it is
    cheapest: in the forward, where the scale is still that of the last micro-batch.
    """
    return scale.clone()


@_read_after.register_fake
def _(scale, grad):
    return torch.empty_like(scale)


class Deliver(torch.autograd.Function):
    """Identity on ``weights`` whose backward gives ``loss`` the gradient ``scale``.

    Backward runs once per micro-batch, however often checkpointing repeats the forward.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights, loss, scale):
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, loss, ctx.scale = inputs
        ctx.dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad):
        compiling = torch.compiler.is_compiling()
        scale = _read_after(ctx.scale, grad) if compiling else ctx.scale.clone()
        return grad, scale.to(ctx.dtype), None


# ---- counted -------------------------------------------------------------------------------------


@torch.library.custom_op("torch_routers::_add_after", mutates_args=("load",))
def _add_after(load: Tensor, counts: Tensor, grad: Tensor) -> None:
    """Adds ``counts`` to ``load`` once ``grad`` exists; an operator for the reason above."""
    load.add_(counts)


class Count(torch.autograd.Function):
    """Identity on ``weights`` whose backward adds ``counts`` to ``load``.

    In backward, because that runs once per micro-batch however often checkpointing repeats the
    forward, and never in evaluation. A second backward through a retained graph counts nothing,
    save under a compiler, and where a reentrant checkpoint builds the graph anew.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights, counts, load):
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.counts, ctx.load = inputs
        ctx.counted = False

    @staticmethod
    def backward(ctx, grad):
        if torch.compiler.is_compiling():
            _add_after(ctx.load, ctx.counts, grad)
        elif not ctx.counted:
            ctx.load.add_(ctx.counts)
            ctx.counted = True
        return grad, None, None


# ---- context from the model's root ---------------------------------------------------------------


class Inputs:
    """Where routers deep inside a model find what its root was called with."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.context: dict[str, Tensor] = {}
        self._names = tuple(names)  # of what the root takes, in order

    def note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """The hook before a call of the root; a method, so that it is copied with the model."""
        given = {**dict(zip(self._names, args)), **kwargs}
        ids = given.get("input_ids", args[0] if args else None)
        tokens = ids if ids is not None else given.get("inputs_embeds")
        mask = given.get("attention_mask")
        context = {}
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            context["token_ids"] = ids
        if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
            context["valid_mask"] = mask[:, -tokens.shape[1] :].bool()  # the rest is the cache's
        tasks = kwargs.get("routing_task_ids")
        if isinstance(tasks, Tensor):
            per_sample = tasks.dim() == 1 and tokens is not None
            context["task_ids"] = tasks[:, None].expand(tokens.shape[:2]) if per_sample else tasks
        self.context = context
        return args, {name: value for name, value in kwargs.items() if name != "routing_task_ids"}

    def of_tokens(self, shape: torch.Size) -> dict[str, Tensor]:
        """The context for a router whose input has this shape: often the tokens are flattened."""
        return {
            name: value.reshape(shape) if value.numel() == shape.numel() else value
            for name, value in self.context.items()
        }


def inputs_of(model: nn.Module) -> Inputs | None:
    """What `follow_inputs` made for a model, for routers that come later."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Inputs)), None)


class Following:
    """What `follow_inputs` returns."""

    def __init__(self, inputs: Inputs, handle: RemovableHandle) -> None:
        self._inputs, self._handle = inputs, handle

    def remove(self) -> None:
        """Show the routers nothing any more, what they saw last neither."""
        self._handle.remove()
        self._inputs.context = {}


def follow_inputs(model: nn.Module) -> Following:
    """From now on, each call of ``model`` shows its inputs to the routers inside.

    The root's ``attention_mask`` (2-D, 1 = real token) becomes ``valid_mask``, its ``input_ids``
    become ``token_ids``, and ``routing_task_ids``, one per sample or per token, ``task_ids``: the
    last are taken out of the call, for models that do not know them. What a caller passes to a
    router directly takes precedence. Call ``remove()`` of what is returned to stop. A second call
    for the same model reaches routers that came later.

    The inputs stay after the call, for the recomputation of checkpoints in backward. Interleaved
    micro-batches (forward, forward, backward, backward) with eager checkpointing would therefore
    see the last one's; pass the context explicitly there.

    Raises:
        ValueError: the model has no router.
        RuntimeError: the model is compiled: it would ignore the hook. Call this before
            ``torch.compile``.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise RuntimeError(
            "follow_inputs: expected a model that is not compiled, got an OptimizedModule. "
            "Call it before torch.compile"
        )
    # A PeftModel generates by the model inside, which also gets what it is called with itself.
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    routers = routers_of(model, "follow_inputs")
    inputs, handle = _followed(root)
    if inputs is None:
        inputs = Inputs(inspect.signature(root.forward).parameters)
        handle = root.register_forward_pre_hook(inputs.note, with_kwargs=True)
    for router in routers.values():
        router._inputs = inputs
    return Following(inputs, handle)


def _followed(root: nn.Module) -> tuple[Inputs | None, RemovableHandle | None]:
    """What an earlier call made for this very module, and how to take it away."""
    hooks = root._forward_pre_hooks
    for key, hook in hooks.items():
        if isinstance(getattr(hook, "__self__", None), Inputs):
            handle = RemovableHandle(hooks, extra_dict=root._forward_pre_hooks_with_kwargs)
            handle.id = key
            return hook.__self__, handle
    return None, None
