"""More calls of a model: to see which layers are reached, and for routers that look ahead."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_routers.delivery import collect
from torch_routers.lora.inject import body_of, layers_of, scopes_of
from torch_routers.lora.scope import RoutingScope


def check_reach(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Call the model once and see that every layer with experts is called.

    Some modules read the weight of a layer instead of calling it, as fused kernels of state space
    models do: experts there would be trained by nothing, and change nothing.

    Args:
        args, kwargs: a small batch, for one call without gradients.

    Raises:
        ValueError: a layer was not called.
    """
    reached: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: reached.add(name)

    layers = layers_of(model, caller="check_reach")
    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), collect(model):  # losses are of no use here
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name in layers if name not in reached]
    if missed:
        raise ValueError(
            f"check_reach: expected every layer with experts to be called, got none of {missed}: "
            "what stands above reads the weight, or leaves the layer out. Take it from "
            "target_modules"
        )


def two_passes(model: nn.Module) -> RemovableHandle:
    """From now on, each call of ``model`` is preceded by one without experts, for routers to see.

    For mixtures with ``router_input="first_pass"``, whose routers look at what their layers would
    get from the base model alone, and ``"last_hidden"``, whose routers look at the last hidden
    state of that pass (X-LoRA, arXiv 2402.07148): what the body of a model of Transformers returns.
    The first pass has no gradient; it takes the time of a forward. A cache of keys and values is
    copied for it. Remove the returned handle to stop.

    Raises:
        ValueError: the model has no mixture with such an input.
    """
    scopes = [
        scope
        for scope in scopes_of(model, "two_passes")
        if scope.router_input in ("first_pass", "last_hidden")
    ]
    if not scopes:
        raise ValueError(
            'two_passes: expected a mixture with router_input="first_pass" or "last_hidden", '
            "got none"
        )
    return model.register_forward_pre_hook(_FirstPass(scopes).run, with_kwargs=True)


class _FirstPass:
    """The hook before a call; a method, so that it is copied with the model."""

    def __init__(self, scopes: list[RoutingScope]) -> None:
        self.scopes = scopes

    def run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = dict(kwargs)
        for cache in "past_key_values", "cache_params":
            if first.get(cache) is not None:
                first[cache] = copy.deepcopy(first[cache])
        for scope in self.scopes:
            scope.begin_first_pass()
        of_body = [scope for scope in self.scopes if scope.router_input == "last_hidden"]

        def note(body: nn.Module, args: tuple, result: Any) -> None:
            hidden = result[0] if isinstance(result, tuple) else result.last_hidden_state
            for scope in of_body:
                scope.note_last_hidden(hidden)

        handle = body_of(module).register_forward_hook(note) if of_body else None
        try:
            with torch.no_grad():
                module.forward(*args, **first)
        finally:
            for scope in self.scopes:
                scope.end_first_pass()
            if handle is not None:
                handle.remove()
