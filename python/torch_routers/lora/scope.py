"""Which layers share a routing, and from what it is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torch_routers._autograd import shapes_may_depend_on
from torch_routers.delivery import require_destination
from torch_routers.routers import Router
from torch_routers.routing import Routing

if TYPE_CHECKING:
    from torch_routers.lora.linear import RoutedLoraLinear


class RoutingScope:
    """One router, and the layers that follow its decision.

    Without a `container` the router looks at what each layer gets; with one, at what the container
    gets, once per call, and all layers inside share the routing, whatever their own inputs are.

    No module: the router is among the modules of one of the layers, and the others only know it.

    Args:
        router: decides.
        name: of the container in the model, for errors.
        router_input: ``"token"``: each token for itself. ``"sequence"``: the mean of the tokens of
            a sequence that are not masked, for all of them. ``"task"``: the embedding of the task
            of each token. ``"first_pass"``: each token as it was here in a pass without experts
            (see `two_passes`). ``"last_hidden"``: each token as the model had it last in that pass.
        tasks: the embedding for ``router_input="task"``.
        kind: ``mix`` of `RoutedLoraConfig`. For ``"factors"`` there is one decision per sequence,
            ``[..., num_experts]`` without a dimension of tokens. For ``"block"`` each expert is the
            whole container with its own LoRAs: the container is called with
            ``[..., slots, features]``, and its results are weighed.
    """

    def __init__(
        self,
        router: Router,
        name: str,
        *,
        router_input: Literal["token", "sequence", "task", "first_pass", "last_hidden"] = "token",
        tasks: nn.Embedding | None = None,
        kind: str = "product",
    ) -> None:
        self.router, self.name, self.router_input = router, name, router_input
        self.tasks, self.kind = tasks, kind
        self.layers: list[RoutedLoraLinear] = []
        self.forced: int | None = None
        self.watches = self.keeps_routing = False
        self._routing: Routing | None = None
        self._input: Tensor | None = None  # of the container: routed once a layer asks
        self._handles: tuple[RemovableHandle, ...] = ()
        self._slot_weights: Tensor | None = None  # of a block that is called with slots
        self._first: Tensor | None = None
        self._is_first_pass = False

    @property
    def dense_gradient(self) -> bool:
        """Whether the weights of experts that are left out have a gradient."""
        return self.forced is None and getattr(self.router, "dense_gradient", False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is left of the last call: it has a graph, which cannot be copied."""
        return self.__dict__ | dict.fromkeys(("_routing", "_input", "_first", "_slot_weights"))

    def watch(self, container: nn.Module, *, keeps_routing: bool = False) -> None:
        """Route what ``container`` is called with, for all layers in it.

        Args:
            keeps_routing: until the next call, for layers outside the container.
        """
        self.watches, self.keeps_routing = True, keeps_routing
        self._handles = (
            container.register_forward_pre_hook(self._enter, with_kwargs=True),
            container.register_forward_hook(self._leave, always_call=True),
        )

    def replace_router(self, router: Router, layers: Iterable[RoutedLoraLinear], mix: str) -> None:
        """Another router, also among the modules of the layer that has the present one."""
        for layer in layers:
            if mix in layer.routed_gate and layer.routed_gate[mix] is self.router:
                layer.routed_gate[mix] = router
        router._inputs = self.router._inputs
        self.router = router

    def begin_first_pass(self) -> None:
        """Note what is to be routed, instead of routing it."""
        self._is_first_pass = True

    def end_first_pass(self) -> None:
        """Route what was noted."""
        self._is_first_pass = False

    def note_last_hidden(self, hidden: Tensor) -> None:
        """What the router sees in the pass that follows, for ``router_input="last_hidden"``."""
        self._first = hidden.detach()

    def repeats(self, x: Tensor) -> bool:
        """Whether a layer is called with the same tokens for each slot."""
        return self._slot_weights is not None and x.shape[-2] > 1 and x.stride(-2) == 0

    def remove(self) -> None:
        """Watch no container any more."""
        for handle in self._handles:
            handle.remove()
        self.watches, self._handles = False, ()

    def routing_for(self, x: Tensor) -> Routing | None:
        """The routing for a layer that is called with ``x``; None: it has no experts now."""
        if not self.watches:
            return self._route(x)
        if self._is_first_pass:
            return None
        if self._routing is None and self._input is not None:
            self._routing = self._route(self._input)
        if self._routing is None:
            raise RuntimeError(
                f"lora: expected a call of {self.name}, whose input is routed, before that of a "
                "layer inside, got none. Call the module, not its forward"
            )
        tokens = x.shape[:-2] if self.kind == "factors" else x.shape[:-1]
        if self._routing.weights.shape[:-1] != tokens:
            routing = self._routing
            if routing.weights.shape[:-1].numel() != tokens.numel():
                raise ValueError(
                    f"lora: expected layers in {self.name} to see its tokens, "
                    f"{list(routing.weights.shape[:-1])}, got {list(tokens)}"
                )
            return _reshaped(routing, tokens)
        return self._routing

    def _enter(self, container: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        # Routed later: where no layer asks, as in a mixture that is not active, there is no loss.
        self._routing, self._input = None, _hidden_states(args, kwargs, self.name)
        if self._is_first_pass:
            self._route(self._input)
        elif self.kind == "block" and self._is_active():
            x = self._with_slots(self._input)
            return _with_hidden_states(args, kwargs, x)
        return None

    def _leave(self, container: nn.Module, args: tuple, result: Any) -> Tensor | None:
        weights, self._slot_weights = self._slot_weights, None
        if not self.keeps_routing:
            self._routing = self._input = None
        if weights is None or result is None:  # an error is on its way
            return None
        if not isinstance(result, Tensor) or result.shape[:-1] != weights.shape:
            got = getattr(result, "shape", type(result).__name__)
            raise ValueError(
                f"lora: expected a Tensor of {list(weights.shape)} tokens and slots from "
                f'{self.name} for mix="block", got {got}'
            )
        return (result * weights.unsqueeze(-1)).sum(-2).to(result.dtype)

    def _is_active(self) -> bool:
        return any(
            layer.active_mix is not None and layer.scope(layer.active_mix) is self
            for layer in self.layers
        )

    def _with_slots(self, x: Tensor) -> Tensor:
        """The tokens once for each slot, and a routing of one expert for each of these."""
        routing = self._route(x)
        weights, indices = routing.weights, routing.indices
        if indices is None:
            experts = torch.arange(weights.shape[-1], device=x.device).expand(weights.shape)
            indices = experts if self.dense_gradient else torch.where(routing.used(), experts, -1)
        ones = torch.ones_like(weights, requires_grad=False).unsqueeze(-1)
        self._routing = Routing(ones, indices.unsqueeze(-1))
        # A token without experts gets what the block gives without them.
        none = (indices < 0).all(-1, keepdim=True)
        first = torch.arange(weights.shape[-1], device=x.device) == 0
        self._slot_weights = torch.where(none & first, 1, weights)
        return x.unsqueeze(-2).expand(*x.shape[:-1], weights.shape[-1], x.shape[-1])

    def _route(self, x: Tensor) -> Routing | None:
        if self._is_first_pass:
            if self.router_input == "first_pass":
                self._first = x.detach()
            return None
        if self.router_input in ("first_pass", "last_hidden"):
            x = self._of_first_pass(x)
        if self.forced is not None:
            return self._one_hot(x)
        self._check_mask(x)
        if self.kind == "factors":
            routing = self._of_sequences(x)[0]
        elif self.router_input == "sequence":
            routing = _spread(*self._of_sequences(x))
        else:
            routing = self.router(self._of_tasks(x) if self.router_input == "task" else x)
        require_destination("lora", self.router, routing)
        return routing

    def _check_mask(self, x: Tensor) -> None:
        valid = self.router.with_followed(x, {}).get("valid_mask")
        if valid is not None and valid.shape != x.shape[:-1]:
            raise ValueError(
                f"lora: expected {self.name or 'the model'} to see the tokens of attention_mask, "
                f"{list(valid.shape)}, got {list(x.shape[:-1])}. Leave it out by exclude_modules, "
                "or do not use tr.follow_inputs"
            )

    def _one_hot(self, x: Tensor) -> Routing:
        ones = x.new_ones(*x.shape[:-1], 1, dtype=torch.float32)
        if self.kind != "factors":
            return Routing(ones, torch.full_like(ones, self.forced, dtype=torch.int64))
        weights = ones.new_zeros(*x.shape[:-2], self.router.num_experts)
        weights.unflatten(-1, (getattr(self.router, "num_splits", 1), -1))[..., self.forced] = 1
        return Routing(weights)

    def _of_tasks(self, x: Tensor) -> Tensor:
        """What the router looks at; those with a table of tasks look them up themselves."""
        if self.tasks is None:
            return x
        tasks = self.router.with_followed(x, {}).get("task_ids")
        if tasks is None or tasks.shape != x.shape[:-1]:
            raise ValueError(
                f'lora: expected task_ids of shape {list(x.shape[:-1])} for router_input="task", '
                f"got {None if tasks is None else list(tasks.shape)}. Use tr.follow_inputs, and "
                "call the model with routing_task_ids"
            )
        count = self.tasks.num_embeddings
        if shapes_may_depend_on(tasks) and bool(((tasks < 0) | (tasks >= count)).any()):
            raise ValueError(
                f"lora: expected task_ids in [0, num_tasks={count}), got {tasks.min()} to "
                f"{tasks.max()}"
            )
        return self.tasks(tasks)

    def _of_first_pass(self, x: Tensor) -> Tensor:
        if self._first is None or self._first.shape[:-1] != x.shape[:-1]:
            raise RuntimeError(
                f"lora: expected a first pass of the tokens of {self.name} with "
                f'router_input="{self.router_input}", got none. Use lora.two_passes'
            )
        return self._first

    def _of_sequences(self, x: Tensor) -> tuple[Routing, Tensor]:
        """One decision for the tokens of a sequence, and which of these are real."""
        if x.dim() < 3:
            raise ValueError(
                "lora: expected [..., sequence, features] for one routing per sequence, "
                f"got {list(x.shape)}"
            )
        context = self.router.with_followed(x, {})
        valid = context.get("valid_mask")
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
        of_sequence = {"valid_mask": valid.any(-1)}
        if "task_ids" in context:
            of_sequence["task_ids"] = context["task_ids"][..., 0]
        if self.router_input == "task":
            seen = self._of_tasks(x)[..., 0, :]
        else:
            tokens = torch.where(valid.unsqueeze(-1), x, 0)
            total = tokens.sum(-2, dtype=Router.full_precision(x[:0]).dtype)
            seen = total / valid.sum(-1, keepdim=True).clamp(min=1)
        return self.router(seen, **of_sequence), valid


def _spread(routing: Routing, valid: Tensor) -> Routing:
    """The routing of sequences for each of their tokens."""
    shape = valid.shape
    weights = routing.weights.unsqueeze(-2).expand(*shape, -1)
    weights = torch.where(valid.unsqueeze(-1), weights, 0)
    indices = routing.indices
    if indices is not None:
        indices = indices.unsqueeze(-2).expand(*shape, -1)
        indices = torch.where(valid.unsqueeze(-1), indices, -1)
    return routing._replace(weights=weights, indices=indices)


def _hidden_states(args: tuple, kwargs: dict[str, Any], name: str) -> Tensor:
    """What a container is called with: its first tensor of floating numbers."""
    for value in (*args, *kwargs.values()):
        if _is_hidden(value):
            return value
    raise ValueError(
        f"lora: expected hidden states in the call of {name or 'the model'}, whose input is "
        "routed, got none"
    )


def _with_hidden_states(
    args: tuple, kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple, dict[str, Any]]:
    """The same call with other hidden states."""
    for i, value in enumerate(args):
        if _is_hidden(value):
            return (*args[:i], x, *args[i + 1 :]), kwargs
    name = next(name for name, value in kwargs.items() if _is_hidden(value))
    return args, {**kwargs, name: x}


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _reshaped(routing: Routing, shape: torch.Size) -> Routing:
    """The same tokens in other dimensions."""
    weights, indices = routing.weights, routing.indices
    return routing._replace(
        weights=weights.reshape(*shape, weights.shape[-1]),
        indices=None if indices is None else indices.reshape(*shape, indices.shape[-1]),
    )
