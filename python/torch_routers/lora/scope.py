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
            (see `two_passes`).
        tasks: the embedding for ``router_input="task"``.
    """

    def __init__(
        self,
        router: Router,
        name: str,
        *,
        router_input: Literal["token", "sequence", "task", "first_pass"] = "token",
        tasks: nn.Embedding | None = None,
    ) -> None:
        self.router, self.name, self.router_input = router, name, router_input
        self.tasks = tasks
        self.forced: int | None = None
        self.watches = self.keeps_routing = False
        self._routing: Routing | None = None
        self._handles: tuple[RemovableHandle, ...] = ()
        self._first: Tensor | None = None
        self._is_first_pass = False

    @property
    def dense_gradient(self) -> bool:
        """Whether the weights of experts that are left out have a gradient."""
        return self.forced is None and getattr(self.router, "dense_gradient", False)

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
        if self._routing is None:
            raise RuntimeError(
                f"lora: expected a call of {self.name}, whose input is routed, before that of a "
                "layer inside, got none. Call the module, not its forward"
            )
        if self._routing.weights.shape[:-1] != x.shape[:-1]:
            routing = self._routing
            if routing.weights.shape[:-1].numel() != x.shape[:-1].numel():
                raise ValueError(
                    f"lora: expected layers in {self.name} to see its tokens, "
                    f"{list(routing.weights.shape[:-1])}, got {list(x.shape[:-1])}"
                )
            return _reshaped(routing, x.shape[:-1])
        return self._routing

    def _enter(self, container: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = _hidden_states(args, kwargs, self.name)
        self._routing = self._route(x)

    def _leave(self, *_: Any) -> None:
        if not self.keeps_routing:
            self._routing = None

    def _route(self, x: Tensor) -> Routing | None:
        if self._is_first_pass:
            self._first = x.detach()
            return None
        if self.router_input == "first_pass":
            x = self._of_first_pass(x)
        if self.forced is not None:
            return self._one_hot(x)
        if self.router_input == "sequence":
            routing = self._of_sequences(x)
        else:
            routing = self.router(self._of_tasks(x) if self.router_input == "task" else x)
        require_destination("lora", self.router, routing)
        return routing

    def _one_hot(self, x: Tensor) -> Routing:
        weights = x.new_zeros(*x.shape[:-1], self.router.num_experts, dtype=torch.float32)
        weights[..., self.forced] = 1
        return Routing(weights)

    def _of_tasks(self, x: Tensor) -> Tensor:
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
        if self._first is None or self._first.shape != x.shape:
            raise RuntimeError(
                f"lora: expected a first pass of the tokens of {self.name} with "
                'router_input="first_pass", got none. Use lora.two_passes'
            )
        return self._first

    def _of_sequences(self, x: Tensor) -> Routing:
        """One decision for the tokens of a sequence."""
        if x.dim() < 3:
            raise ValueError(
                'lora: expected [..., sequence, features] for router_input="sequence", '
                f"got {list(x.shape)}"
            )
        context = self.router.with_followed(x, {})
        valid = context.get("valid_mask")
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if valid is None else valid
        tokens = torch.where(valid.unsqueeze(-1), x, 0)
        mean = tokens.sum(-2, dtype=Router.full_precision(x[:0]).dtype)
        mean = mean / valid.sum(-1, keepdim=True).clamp(min=1)
        of_sequence = {"valid_mask": valid.any(-1)}
        if "task_ids" in context:
            of_sequence["task_ids"] = context["task_ids"][..., 0]
        routing = self.router(mean, **of_sequence)
        shape = x.shape[:-1]
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
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise ValueError(
        f"lora: expected hidden states in the call of {name}, whose input is routed, got none"
    )


def _reshaped(routing: Routing, shape: torch.Size) -> Routing:
    """The same tokens in other dimensions."""
    weights, indices = routing.weights, routing.indices
    return routing._replace(
        weights=weights.reshape(*shape, weights.shape[-1]),
        indices=None if indices is None else indices.reshape(*shape, indices.shape[-1]),
    )
