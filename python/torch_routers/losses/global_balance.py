"""Load balance over the global batch: the counts of all ranks and micro-batches of a step."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_routers.delivery import in_backward
from torch_routers.losses.balance import load_balance
from torch_routers.losses.base import RouterLoss
from torch_routers.routing import Routing


class GlobalBalanceLoss(RouterLoss):
    r"""The balance loss with the counts of the global batch (arXiv 2501.11873).

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = C_e \Big/ \sum_i C_i, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    :math:`C` is the sum of the counts of all ranks of ``group`` and of all micro-batches since
    `reset`, this one included; :math:`P` and :math:`T` are those of this call. Experts may
    specialise within a micro-batch as long as the global batch is balanced. :math:`f` is the share
    in the mean of the counts over the micro-batches just as in their sum.

    Call `reset` once per optimiser step; a hook does it:
    ``optimizer.register_step_post_hook(lambda *_: loss.reset())``. Give each router a loss of its
    own: it holds the counts of one.

    Gradients that are averaged over W ranks (DDP, FSDP2) are those of the global batch where all
    ranks have the same number of tokens. Otherwise multiply the loss of each rank by
    :math:`T_\mathrm{rank} W / T_\mathrm{global}`.

    A forward that recomputes a checkpoint counts nothing and communicates nothing in eager mode; it
    sees the counts as they are then. In a checkpoint inside a compiled model the first call has to
    be an eager one, which makes room for the counts; torch.compile raises otherwise.

    Args:
        weight: the factor in the objective.

    ``group``, an attribute, is the process group whose counts are summed: ``None``, the default, is
    torch's default group. Set it after construction; it is in no configuration, a copy shares it,
    and a loss that has one cannot be pickled. Without initialised ``torch.distributed`` there is
    nothing to sum. The counts are plain data: in a copy and in a pickle, not in the ``state_dict``.
    """

    name = "global_balance"

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self.group: dist.ProcessGroup | None = None
        self._counts: Tensor | None = None

    def reset(self) -> None:
        """Forget the counts so far."""
        if self._counts is not None:
            self._counts.zero_()

    def forward(self, routing: Routing) -> Tensor:
        _, score_sums, counts, tokens = self.statistics(routing)
        counts = counts.sum(0)
        if dist.is_available() and dist.is_initialized() and not in_backward():
            dist.all_reduce(counts, group=self.group)
        if self._counts is None or self._counts.device != counts.device:
            self._counts = torch.zeros_like(counts)
        return load_balance(score_sums.sum(0), _count(self._counts, counts), tokens.sum())

    def __deepcopy__(self, memo: dict[int, Any]) -> "GlobalBalanceLoss":
        memo[id(self)] = copied = type(self).__new__(type(self))
        memo[id(self.group)] = self.group  # shared, as it cannot be copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied


@torch.library.custom_op("torch_routers::_count", mutates_args=("total",))
def _count(total: Tensor, counts: Tensor) -> Tensor:
    """A copy of ``total`` after ``counts`` are added to it, once.

    An operator of its own, because the question of recomputation must be asked when it runs: a
    compiled block inside an eager checkpoint has been traced long before.
    """
    if not in_backward():
        total.add_(counts)
    return total.clone()


@_count.register_fake
def _(total, counts):
    return torch.empty_like(total)
