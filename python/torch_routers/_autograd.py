"""One declaration of an operator's derivatives, and three routes to the operator that use it.

registered   ``torch.library.register_autograd``: what ``torch.compile``, ``torch.export``, tracers,
             modes and tensor subclasses see. Under ``torch.func`` it fails: ``grad`` raises and,
             worse, ``jvp`` returns zeros.
transformed  a ``Function`` with ``setup_context``, ``jvp`` and ``vmap``: for ``torch.func`` and
             forward mode, which ``torch.compile`` in turn cannot trace.
short        a ``Function`` without ``setup_context`` that calls the operator below autograd: plain
             eager mode. For a small batch the Python layers of the other two cost more than the
             kernel.

Gradients that nobody asked for arrive as None on every route where torch lets them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_map

# Looked up once: this is asked at every call, which takes a few microseconds in all.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_is_grad_enabled = torch.is_grad_enabled
_any_requires_grad = torch._C._any_requires_grad
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_get_tracing_state = torch._C._get_tracing_state

_PLAIN = frozenset({
    torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype, torch.device,
})  # fmt: skip


def differentiable(
    op: Any,
    *,
    setup_context: Callable,
    backward: Callable,
    vmap: Callable,
    jvp: Callable,
    autocast: torch.dtype | None = None,
) -> Callable:
    """Registers the derivatives of ``op`` and returns it as a function of positional arguments.

    ``setup_context(ctx, inputs, output)``, ``backward(ctx, *grads)``, ``jvp(ctx, *tangents)`` and
    ``vmap(info, in_dims, *inputs)`` are those of ``torch.autograd.Function``; what is saved for
    backward is there in ``jvp`` too. ``autocast`` is the dtype the operator runs in under autocast.
    """
    name = op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context)
    torch.library.register_vmap(name, vmap)
    if autocast:
        for device in "cpu", "cuda":
            torch.library.register_autocast(name, device, autocast)

    def short_forward(ctx, *inputs):
        with _below_autograd():
            output = op(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def setup_transformed(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*ctx.to_save)

    def function(**methods):
        return type(name, (Function,), {key: staticmethod(f) for key, f in methods.items()})

    short = function(forward=short_forward, backward=backward)
    transformed = function(
        forward=lambda *inputs: op(*inputs),
        setup_context=setup_transformed,
        backward=backward,
        jvp=jvp,
        vmap=vmap,
    )

    # The compiler cannot trace a forward-mode derivative. (torch.compiler.disable would say so too,
    # but import the compiler, a second's work, together with this library.)
    @torch._disable_dynamo
    def apply_transformed(*inputs):
        if _forward_levels() > 1:
            raise NotImplementedError(
                f"{name}: expected at most one level of forward mode, got {_forward_levels()}: "
                "torch would drop the mixed second derivative. Use torch.func.hessian, or forward "
                "over reverse mode"
            )
        return transformed.apply(*inputs)

    def call(*inputs):
        forward_mode = forward_ad._current_level >= 0
        if torch.compiler.is_compiling() and not forward_mode:
            return op(*inputs)
        if not forward_mode and _is_plain_eager(inputs):
            if _is_grad_enabled() and _any_requires_grad(*inputs):
                return short.apply(*inputs)
            with _below_autograd():
                return op(*inputs)
        if autocast and torch._C._is_any_autocast_enabled():  # before the derivatives, not below
            inputs = [_autocast(x, autocast) for x in inputs]
            with torch._C._DisableAutocast():
                return call(*inputs)
        if forward_mode or torch._C._are_functorch_transforms_active():
            return apply_transformed(*inputs)
        return op(*inputs)

    return call


def jvp(plain: Callable, inputs, tangents):
    """``torch.func.jvp(plain, inputs, tangents)[1]`` for use in a ``jvp`` formula.

    A tangent that is None is zero. Two reverse passes, because forward mode does not nest in
    ``forward_ad.dual_level()``.
    """
    outputs, pull_back = torch.func.vjp(plain, *inputs)
    _, push_forward = torch.func.vjp(pull_back, tree_map(torch.zeros_like, outputs))
    given = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents)]
    return push_forward(tuple(given))[0]


def batched(info, in_dims, tensors) -> list[torch.Tensor | None]:
    """Each tensor with the batch of a ``vmap`` rule as its first dimension; None stays."""
    return [
        None
        if x is None
        else x.expand(info.batch_size, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims)
    ]


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """A batch of rows as rows."""
    return None if x is None else x.flatten(0, 1)


def unflat(info, x: torch.Tensor) -> torch.Tensor:
    """Rows as a batch of rows; there may be none."""
    return x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size))


def vmap_by_rows(call: Callable, tensors: int) -> Callable:
    """The batching rule of an operator whose rows do not depend on each other: more rows.

    The first ``tensors`` inputs have rows as their first dimension, as all results have; the others
    are no tensors.
    """

    def vmap(info, in_dims, *inputs):
        rows = map(flat, batched(info, in_dims, inputs[:tensors]))
        outputs = call(*rows, *inputs[tensors:])
        if isinstance(outputs, tuple):
            return tuple(unflat(info, x) for x in outputs), (0,) * len(outputs)
        return unflat(info, outputs), 0

    return vmap


def vmap_by_loop(call: Callable) -> Callable:
    """A batching rule that calls the operator once per sample of the batch.

    For operators whose work is launched per sample anyway, and which have no cheaper way to fold a
    batch into one call.
    """

    def vmap(info, in_dims, *inputs):
        samples = [
            call(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], tuple):
            return tuple(map(torch.stack, zip(*samples))), (0,) * len(samples[0])
        return torch.stack(samples), 0

    return vmap


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where ``x`` is; None outside autocast."""
    if not (torch.compiler.is_compiling() or _is_any_autocast_enabled()):
        return None  # the questions below take longer than a small kernel
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def shapes_may_depend_on(x: torch.Tensor) -> bool:
    """Whether the values of ``x`` can be read, for free, to choose a shape.

    Not while a program is traced or mapped, nor on a device that would have to be waited for.
    """
    return x.device.type == "cpu" and not (
        torch.compiler.is_compiling()
        or _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _get_tracing_state() is not None
    )


def _forward_levels() -> int:
    """Of ``torch.func``; those of ``forward_ad`` do not nest."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def is_unobserved(inputs) -> bool:
    """No transform, mode or tracer that wants to see what is called; no unusual inputs.

    Unusual are subclasses, symbolic sizes and lists of tensors.
    """
    return not (
        _are_functorch_transforms_active()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state() is not None
    ) and _PLAIN.issuperset(map(type, inputs))


def _is_plain_eager(inputs) -> bool:
    """Nor autocast, which wants to see the op too."""
    return not _is_any_autocast_enabled() and is_unobserved(inputs)


def _autocast(x, dtype):
    """What ``register_autocast`` does to an argument."""
    cast = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(dtype) if cast and autocast_dtype(x) else x
