"""Routers in the place of the gates of Transformers' models: called and answering as those do.

A router that took a gate's place keeps its own class as a base, and has the gate's as another: by
that Transformers knows whose logits it records. Its parameters stand directly in it, under the
names that they had. Each kind of class is made once, so that a compiler sees one for all layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_routers.delivery import require_destination
from torch_routers.integrations.transformers.experts import mix
from torch_routers.layers.experts import apply_each
from torch_routers.routers import Router
from torch_routers.routing import Routing

#: From the logits ``[tokens, num_experts]``, weights and indices ``[tokens, slots]``, with -1 in
#: empty slots, and the number of experts: what a gate returns.
Answer = Callable[[Tensor | None, Tensor, Tensor, int], tuple[Tensor | None, ...]]


def logits_weights_indices(logits, weights, indices, num_experts):
    """Of all models in Transformers 5, and of the `Block` below."""
    return logits, weights, repeat_first(indices)


def indices_weights(logits, weights, indices, num_experts):
    """Of DeepSeek-V3 in Transformers 4."""
    return repeat_first(indices), weights


def scores_indices(logits, weights, indices, num_experts):
    """Of GPT-OSS in Transformers 4: its experts take dense weights, and pass over expert E."""
    scores = weights.new_zeros(weights.shape[0], num_experts)
    scores = scores.scatter_add(-1, indices.clamp(min=0), weights)
    return scores, torch.where(indices < 0, num_experts, indices)


def repeat_first(indices: Tensor) -> Tensor:
    """In empty slots an expert that exists, the first slot's or expert 0: models index with it."""
    return torch.where(indices < 0, indices[:, :1].clamp(min=0), indices)


class Gate:
    """What precedes the class of a router that took the place of a gate."""

    answer: Answer
    slots: int  #: of a router with a weight for every expert
    factor: float  #: of all weights, where the router has no such argument
    _samples: torch.Size | None = None

    def see_block(self, block: nn.Module, args: tuple) -> None:
        """The hook before a call of the block, which may flatten the samples for its gate."""
        self._samples = args[0].shape[:-1]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor | None, ...]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self._samples is not None and self._samples.numel() == x.shape[0]:
            x = x.view(*self._samples, x.shape[-1])
        routing: Routing = super().forward(x)
        require_destination("swap_routers", self, routing)
        weights, indices = self._slots_of(routing)
        weights = (self.factor * weights).to(hidden_states.dtype).flatten(0, -2)
        logits = None if routing.logits is None else routing.logits.flatten(0, -2)
        return type(self).answer(logits, weights, indices.flatten(0, -2), self.num_experts)

    def _slots_of(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Weights and indices ``[..., slots]``, with the empty slots last."""
        weights, indices, used = routing.weights, routing.indices, routing.used()
        if indices is None:
            ranks = torch.where(used, weights.detach(), -torch.inf)
            chosen = ranks.topk(self.slots).indices
            used = used.gather(-1, chosen)
            weights = torch.where(used, weights.gather(-1, chosen), 0)
            return weights, torch.where(used, chosen, -1)
        if self.traits.drops_tokens:  # from any slot
            order = (~used).to(torch.uint8).argsort(dim=-1, stable=True)
            return weights.gather(-1, order), indices.gather(-1, order)
        return weights, indices

    def __reduce__(self) -> tuple:
        return _new, (gate_class, type(self).made_of), self.__dict__


class Block:
    """What precedes the class of a block that chose experts itself, in Transformers 4."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        jitter = getattr(self, "jitter_noise", 0.0)
        if self.training and jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - jitter, 1 + jitter)
            hidden_states = hidden_states * noise
        logits, weights, indices = self.gate(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        apply = functools.partial(apply_each, self.experts)
        y = mix(apply, x, indices, weights, len(self.experts))
        if hasattr(self, "shared_expert"):
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y.view_as(hidden_states), logits

    def __reduce__(self) -> tuple:
        return _new, (block_class, type(self).made_of), self.__dict__


@functools.cache
def gate_class(
    router: type[Router], gate: type[nn.Module] | None, answer: Answer, bias: str | None
) -> type[Router]:
    """The class of a router in the place of a gate.

    Args:
        router: of the library.
        gate: of Transformers, where it has one for gates.
        answer: what the gate returns.
        bias: the name by which the gate knows ``expert_bias``. Default: none of its own.
    """
    made_of = (router, gate, answer, bias)
    namespace: dict[str, Any] = {"answer": answer, "made_of": made_of}
    if bias is not None:
        namespace["expert_bias"] = property(
            lambda self: self._buffers[bias], lambda self, value: setattr(self, bias, value)
        )
    bases = (Gate, router) if gate is None else (Gate, router, gate)
    return type(router.__name__, bases, namespace, register=False)


@functools.cache
def block_class(block: type[nn.Module]) -> type[nn.Module]:
    """The class of a block whose gate is a router, in Transformers 4."""
    return type(block.__name__, (Block, block), {"made_of": (block,)})


def _new(factory: Callable[..., type], made_of: tuple) -> nn.Module:
    cls = factory(*made_of)
    return cls.__new__(cls)
