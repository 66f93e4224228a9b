"""What every router returns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_routers.ops import Statistics
from torch_routers.ops._groups import group_of_tokens


class Merge(NamedTuple):
    """By which weights the parameters of experts are merged, for each segment of the tokens."""

    weights: Tensor
    """``[segments, num_experts]``, differentiable."""
    offsets: Tensor
    """``[segments + 1]`` int64: where segments begin in the flattened tokens."""


class Routing(NamedTuple):
    """The decision of one router for one batch.

    A tuple of tensors: ``torch.compile``, export, DDP, FSDP2 and activation checkpointing see
    through it. Leading dimensions ``[...]`` are those of the router's input. A reentrant checkpoint
    returns a plain tuple; ``Routing(*result)`` restores the names.
    """

    weights: Tensor
    """``[..., k]`` combine weights, float32 (float64 for float64 input), differentiable, in the
    order of ``indices``; 0 in a slot that is empty. Without indices ``[..., num_experts]``: 0 where
    an expert does not see the token."""
    indices: Tensor | None = None
    """``[..., k]`` int64 expert of each slot; -1 = empty, because the token is masked or was
    dropped. The indices of a token are distinct. None where there is a weight for every expert."""
    logits: Tensor | None = None
    """``[..., num_experts]`` what was scored, before any normalisation."""
    counts: Tensor | None = None
    """``[num_experts]`` int64: slots given to each expert."""
    statistics: Statistics | None = None
    """By-products of the pass over the logits, for losses and metrics. None when the router has no
    logits; ``lse`` and ``score_sums`` in it are None unless the router computes losses."""
    aux_loss: Tensor | None = None
    """Weighted sum of the router's losses: the only path by which they can be trained. None when
    the router has none, in eval mode, and when `attach` delivers them."""
    losses: dict[str, Tensor] = {}  # noqa: RUF012  (a NamedTuple default; never written to)
    """Each loss by name, unweighted and detached: to log, not to train."""
    state: Any = None
    """What a recurrent router hands to the next layer."""
    merge: Merge | None = None
    """Of routers that merge experts instead of choosing some."""
    load: Tensor | None = None
    """``[num_experts]`` tokens that each expert should get under the noise; differentiable."""
    entropy: Tensor | None = None
    """``[...]``: how undecided the router is, of routers that ask this; differentiable, 0 where
    masked."""
    chosen: Tensor | None = None
    """``[..., k]`` int64: ``indices`` before anything was dropped, which losses look at. None where
    nothing could be."""
    active: Tensor | None = None
    """``[..., num_experts]`` bool: the experts that see the token, of routers with a weight for
    every expert of which an active one may be 0. None elsewhere: then a weight of 0 says it."""
    group_offsets: Tensor | None = None
    """``[groups + 1]`` int64, as the router was told: where documents begin in the flattened
    tokens, for losses and metrics that look at neighbours."""

    def choice(self) -> Tensor | None:
        """``[..., k]``: the experts that were chosen, whether they had room or not."""
        return self.indices if self.chosen is None else self.chosen

    def used(self) -> Tensor:
        """``[..., slots]`` bool: the slots in use; without indices, the experts that are active."""
        if self.indices is not None:
            return self.indices >= 0
        return self.weights.detach() != 0 if self.active is None else self.active

    def of_experts(self, num_experts: int) -> Tensor:
        """``[..., num_experts]``: the weight of each expert, 0 where it does not see the token."""
        if self.indices is None:
            return self.weights
        empty = self.weights.new_zeros(*self.weights.shape[:-1], num_experts + 1)
        slots = torch.where(self.indices < 0, num_experts, self.indices)
        return empty.scatter_add(-1, slots, self.weights)[..., :-1]

    def group_ids(self) -> Tensor | None:
        """``[...]`` int64: the group of each token, by ``group_offsets``; None without them."""
        if self.group_offsets is None:
            return None
        tokens = self.weights[..., 0]
        return group_of_tokens(self.group_offsets, tokens.numel()).view(tokens.shape)

    @property
    def num_experts(self) -> int:
        return self.counts.shape[-1]

    def probs(self) -> Tensor:
        """``[..., num_experts]``: softmax of the logits, computed anew."""
        return self.logits.softmax(-1)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name: what ``torch.vmap`` accepts (it refuses None)."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
