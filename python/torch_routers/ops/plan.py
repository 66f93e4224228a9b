"""A dispatch plan: which row of the experts' input holds which slot of which token."""

from typing import NamedTuple

from torch import Tensor


class Plan(NamedTuple):
    """The live slots of a routing, sorted by expert; made by `expert_plan`.

    A slot is numbered ``token * slots + slot`` over the flattened tokens. It is live unless its
    expert is -1. Rows ``offsets[e]:offsets[e + 1]`` belong to expert ``e``, in ascending order of
    their slots. Plans are padded: what lies behind ``offsets[-1]`` belongs to no expert, so that
    shapes do not depend on the routing.
    """

    order: Tensor
    """``[max_rows]`` int64: the slot of each row; -1 in the rows behind the last expert's."""
    inverse: Tensor
    """``[tokens, slots]`` int64: the row of each slot; -1 where it has none."""
    counts: Tensor
    """``[num_experts]`` int64: rows of each expert."""
    offsets: Tensor
    """``[num_experts + 1]`` int64: where the rows of each expert begin, from 0."""
    dropped: Tensor
    """Scalar int64: live slots that found no row, because of ``max_rows`` or a capacity."""

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def slots(self) -> int:
        """Slots per token; the token of a row is ``order // slots``."""
        return self.inverse.shape[1]
