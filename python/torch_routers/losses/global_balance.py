"""Load balance over the global batch: the counts of all ranks and micro-batches of a step."""

import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from torch_routers.delivery import in_backward
from torch_routers.losses.balance import load_balance
from torch_routers.losses.ranks import GroupLoss
from torch_routers.routing import Routing

if TYPE_CHECKING:
    from torch_routers.routers import Router


class GlobalBalanceLoss(GroupLoss):
    r"""The balance loss with the counts of the global batch (arXiv 2501.11873).

    .. math::  L = E \sum_e f_e P_e, \qquad f_e = C_e \Big/ \sum_i C_i, \qquad
               P_e = \frac{1}{T} \sum_t p_{te}

    :math:`C` is the sum of the counts of all ranks of ``group`` and of all micro-batches since
    `reset`, this one included; :math:`P` and :math:`T` are those of this call. Experts may
    specialise within a micro-batch as long as the global batch is balanced. :math:`f` is the share
    in the mean of the counts over the micro-batches just as in their sum.

    Call `reset` once per optimiser step; a hook does it:
    ``optimizer.register_step_post_hook(lambda *_: loss.reset())``. Each router needs a loss of its
    own: it holds the counts of one.

    The gradients of :math:`W` ranks make up that of one process with all their tokens, if it is
    said how they are put together, also where ranks have different numbers of tokens, or none:

    - ``grad_reduction="mean"``, for DDP and FSDP2: :math:`P_e = W / T_\mathrm{group} \sum_t p_{te}`
      with the tokens of all ranks of the group;
    - ``grad_reduction="sum"``, for tensor and sequence parallelism:
      :math:`P_e = 1 / T_\mathrm{group} \sum_t p_{te}`;
    - ``None``, the default: the loss of a rank is a mean over its own tokens, as the other losses
      are. Multiply the whole objective by :math:`T_\mathrm{rank} W / T_\mathrm{group}`.

    A forward that recomputes a checkpoint counts nothing and communicates nothing in eager mode; it
    sees the counts as they are then. In a checkpoint inside a compiled model the first call has to
    be an eager one, which makes room for the counts; torch.compile raises otherwise.

    Args:
        weight: the factor in the objective.
        scope: whose counts :math:`C` has: ``"global_batch"``, of all micro-batches since `reset`;
            or ``"group"``, of this micro-batch on all ranks of the group.
        grad_reduction: how gradients of ranks are put together, as above.

    Raises:
        ValueError: an argument that does not fit; when a router is built, a loss that another has.

    ``group``, an attribute, is the process group whose counts are summed: ``None``, the default, is
    torch's default group. Set it after construction; it is in no configuration, a copy shares it,
    and a loss that has one cannot be pickled. Without initialised ``torch.distributed`` there is
    nothing to sum. The counts are plain data: in a copy and in a pickle, not in the ``state_dict``.
    """

    name, scopes = "global_balance", ("global_batch", "group")

    def __init__(
        self,
        weight: float,
        scope: Literal["global_batch", "group"] = "global_batch",
        grad_reduction: Literal["mean", "sum"] | None = None,
    ) -> None:
        super().__init__(weight, scope, grad_reduction)
        self._seen: Tensor | None = None  # the counts, and the tokens of the last call
        self._owner: weakref.ref[Router] | None = None

    def bind(self, router: "Router") -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None and owner is not router:
            raise ValueError(
                f"{type(router).__name__}: expected a GlobalBalanceLoss of its own, got one of "
                f"another {type(owner).__name__}, whose counts would be mixed with its own. "
                "Build one for each router"
            )
        self._owner = weakref.ref(router)

    def reset(self) -> None:
        """Forget the counts so far."""
        if self._seen is not None:
            self._seen.zero_()

    def forward(self, routing: Routing) -> Tensor:
        _, score_sums, counts, tokens = self.statistics(routing)
        score_sums, tokens, num_experts = score_sums.sum(0), tokens.sum(), counts.shape[-1]
        here, ranks = torch.cat([counts.sum(0), tokens[None]]), 1
        if self.is_distributed:
            ranks = dist.get_world_size(self.group)
            if not in_backward():
                dist.all_reduce(here, group=self.group)
        if self._seen is None or self._seen.device != here.device:
            self._seen = torch.zeros_like(here)
        seen = _count(self._seen, here, num_experts if self.scope == "global_batch" else 0)
        if self.grad_reduction is None:
            return load_balance(score_sums, seen[:-1], tokens)
        loss = load_balance(score_sums, seen[:-1], seen[-1])
        return loss * ranks if self.grad_reduction == "mean" else loss

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_owner": None}


@torch.library.custom_op("torch_routers::_count", mutates_args=("seen",))
def _count(seen: Tensor, new: Tensor, added: int) -> Tensor:
    """A copy of ``seen`` after ``new`` got in, once: ``added`` entries by addition, others instead.

    An operator of its own, because the question of recomputation must be asked when it runs: a
    compiled block inside an eager checkpoint has been traced long before.
    """
    if not in_backward():
        seen[:added] += new[:added]
        seen[added:] = new[added:]
    return seen.clone()


@_count.register_fake
def _(seen, new, added):
    return torch.empty_like(seen)
