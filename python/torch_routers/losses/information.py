"""Mutual information: experts that know their tasks."""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from torch_routers.losses.base import (
    full_precision,
    ids_of_tokens,
    matmul,
    probabilities,
    valid_tokens,
)
from torch_routers.losses.ranks import GroupLoss
from torch_routers.routing import Routing

BLOCK = 256  #: tokens that are summed one after the other, in float32


def task_scores(
    probs: Tensor, task_ids: Tensor, num_tasks: int, *, valid_mask: Tensor | None = None
) -> Tensor:
    """How much of each expert the tokens of each task use, softly. Written in plain PyTorch.

    Args:
        probs: ``[..., num_experts]``.
        task_ids: integers, one per token, ``[...]``; or one for what is behind the leading
            dimensions that it has, such as ``[samples]``. An id outside ``[0, num_tasks)`` is no
            task, and its tokens are left out.
        num_tasks: tasks there are.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        ``[num_tasks, num_experts]``, the sum of ``probs`` over the tokens of each task, float32
        (float64 for float64 input).

    Raises:
        ValueError: an argument that does not fit.

    >>> p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
    >>> task_scores(p, torch.tensor([1, 0, 1]), num_tasks=2)
    tensor([[1.0000, 0.0000],
            [0.7000, 1.3000]])
    """
    shape = probs.shape[:-1]
    if num_tasks < 1:
        raise ValueError(f"task_scores: expected num_tasks >= 1, got {num_tasks}")
    ids = ids_of_tokens("task_scores", task_ids, shape)
    probs, valid = full_precision(probs), valid_tokens(probs, valid_mask)
    valid = valid & (ids >= 0) & (ids < num_tasks)
    tasks = torch.arange(num_tasks, device=ids.device)
    members = (ids.unsqueeze(-1) == tasks) & valid.unsqueeze(-1)
    members, probs = (
        F.pad(x.reshape(-1, x.shape[-1]), (0, 0, 0, -shape.numel() % BLOCK))
        for x in (members.to(probs.dtype), torch.where(valid.unsqueeze(-1), probs, 0))
    )
    members, probs = (x.view(-1, BLOCK, x.shape[-1]) for x in (members, probs))
    return matmul(members.mT, probs).sum(0)


def mutual_information_loss(task_scores: Tensor, *, eps: float = 1e-4) -> Tensor:
    r"""Minus the nats that the expert of a token tells of its task (Mod-Squad, arXiv 2212.08066).

    .. math::
        L = -\sum_{m, e} J_{me} \ln\Big(\frac{J_{me}}{P_m P_e} + \epsilon\Big), \qquad
        J_{me} = \frac{\sum_{t \in m} p_{te}}{T + \epsilon}, \quad
        P_m = \sum_e J_{me} + \epsilon, \quad P_e = \sum_m J_{me} + \epsilon

    :math:`T`, the sum of all scores, is a constant; the gradient goes to :math:`p`, through
    :math:`J` and both of its marginals. Minimised, it gives tasks experts of their own and uses all
    experts; it takes the place of a balance loss. A task without tokens adds nothing. Written in
    plain PyTorch.

    Args:
        task_scores: ``[num_tasks, num_experts]``, as `task_scores` computes it: of a batch, or the
            sum of those of several.
        eps: :math:`\epsilon`, in all four places, as in the authors' code. With 0 it is exactly
            minus the mutual information, 0 for a single task or a single expert.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without tokens.

    In their code every task has a gate of its own and a batch is of one task; the sums of the tasks
    of a step are added up.

    >>> mutual_information_loss(torch.tensor([[30.0, 15, 5], [5, 10, 35]]))
    tensor(-0.2302)
    """
    scores = task_scores.double()  # the terms of the sum all but cancel
    total = scores.detach().sum() + eps
    joint = scores / total.clamp(min=torch.finfo(scores.dtype).tiny)
    independent = (joint.sum(1, keepdim=True) + eps) * (joint.sum(0, keepdim=True) + eps)
    ratio = joint / torch.where(independent > 0, independent, 1) + eps
    loss = -(joint * torch.where(ratio > 0, ratio, 1).log()).sum()
    return loss.to(full_precision(task_scores).dtype)


class MutualInformationLoss(GroupLoss):
    r"""`mutual_information_loss` of one router, over the tokens that chose an expert.

    The router has to be called with ``task_ids``, as `task_scores` takes them:
    ``router(x, task_ids=ids)``, or the same by keyword to the `MoE` around it.

    Tasks must meet: of a call whose tokens are all of one task, there is nothing to know. Where a
    call has one task and other ranks have others, use ``scope="group"``. The scores are then summed
    over the ranks of ``group``, an attribute as that of `GlobalBalanceLoss`: the value is that of
    all their tokens together, and each rank has the gradient of its own. These gradients make up
    that of one process with all the tokens, if it is said how they are put together:

    - ``grad_reduction="mean"``, for DDP and FSDP2;
    - ``grad_reduction="sum"``, for tensor and sequence parallelism;
    - ``None``, the default: averaged, where the whole objective of a rank is multiplied by
      :math:`T_\mathrm{rank} W / T_\mathrm{group}`, as for the other losses.

    A forward that recomputes a checkpoint sums over the ranks again.

    Args:
        weight: the factor in the objective; 5e-4 to 5e-3 in the paper's configurations.
        num_tasks: tasks there are.
        eps: as in `mutual_information_loss`.
        scope: whose tokens there are: ``"rank"``, of this call; or ``"group"``, of this call on all
            ranks of the group.
        grad_reduction: how gradients of ranks are put together, for ``scope="group"``.

    Raises:
        ValueError: an argument that does not fit, a call without task ids, or a routing without
            logits.
    """

    name, scopes = "mutual_information", ("rank", "group")
    needs = ("task_ids",)

    def __init__(
        self,
        weight: float,
        num_tasks: int,
        *,
        eps: float = 1e-4,
        scope: Literal["rank", "group"] = "rank",
        grad_reduction: Literal["mean", "sum"] | None = None,
    ) -> None:
        super().__init__(weight, scope, grad_reduction)
        if num_tasks < 1:
            raise ValueError(f"MutualInformationLoss: expected num_tasks >= 1, got {num_tasks}")
        self.num_tasks, self.eps = num_tasks, eps

    def forward(self, routing: Routing, task_ids: Tensor | None = None) -> Tensor:
        logits, chosen = self.logits_of(routing)
        ids = ids_of_tokens("MutualInformationLoss", task_ids, chosen.shape)
        probs = probabilities(logits, chosen)
        scores = task_scores(probs, ids, self.num_tasks, valid_mask=chosen)
        if self.scope == "group" and self.is_distributed:
            scores = self._of_group(scores)
        return mutual_information_loss(scores, eps=self.eps)

    def _of_group(self, scores: Tensor) -> Tensor:
        """The sum over the ranks, with the gradient of this one."""
        here = scores.detach()
        everywhere = here.clone()
        dist.all_reduce(everywhere, group=self.group)
        if self.grad_reduction is None:
            tokens = here.sum()
            factor = torch.where(tokens > 0, everywhere.sum() / tokens, 0)
        else:
            mean = self.grad_reduction == "mean"
            factor = dist.get_world_size(self.group) if mean else 1
        return everywhere + factor * (scores - here)
