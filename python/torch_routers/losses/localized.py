"""Balance inside groups of experts, each of which is for one kind of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_routers.losses.base import RouterLoss, full_precision, ids_of_tokens, log_probs
from torch_routers.routing import Routing

_EPSILON = 1e-10


def localized_balance(
    logits: Tensor,
    task_ids: Tensor,
    groups: Sequence[Sequence[int]],
    *,
    delta: float = 0.1,
    valid_mask: Tensor | None = None,
) -> Tensor:
    r"""The spread of what experts get, apart for those of the sample's task and others (LoRAMoE).

    .. math::
        L = \frac{\mathrm{Var}(Z)}{\mathrm{mean}(Z)^2 + 10^{-10}}, \qquad
        Z_{be} = I_{be} \sum_s p_{bse}, \quad
        I_{be} = 1 \pm \delta, \quad p = \mathrm{softmax}(z)

    with plus for the experts of the group of sample :math:`b`. The variance is the unbiased one
    over samples and experts, and the mean is squared, as in the authors' code (Ablustrund/LoRAMoE,
    arXiv 2312.09979); there padding is in the sums. Written in plain PyTorch.

    Where all :math:`Z` are equal, an expert of the sample's group is used
    :math:`(1 - \delta) / (1 + \delta)` times as much as another: less, while the paper wants it
    used more. A negative ``delta`` turns that round.

    Args:
        logits: ``[samples, ..., num_experts]``.
        task_ids: ``[samples, ...]`` integers, the group of each token; other numbers are of none.
        groups: for each task, the numbers of its experts.
        delta: :math:`\delta`, in (-1, 1).
        valid_mask: ``[samples, ...]`` bool, True = real token; samples without any are left out.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 with fewer than two numbers.

    >>> q = torch.tensor([[[0.75, 0.25]], [[0.3, 0.7]]])
    >>> tasks = torch.tensor([[1], [0]])
    >>> localized_balance(q.log(), tasks, [[1], [0]], delta=0.1)
    tensor(0.3724)
    """
    log_p, live, _ = log_probs(logits, valid_mask)
    num_experts = logits.shape[-1]
    table = full_precision(logits[:0]).new_ones(len(groups) + 1, num_experts)
    for task, experts in enumerate(groups):
        table[task] = 1 - delta
        table[task, list(experts)] = 1 + delta
    known = (task_ids >= 0) & (task_ids < len(groups))
    tasks = torch.where(known, task_ids.long(), len(groups))
    p = torch.where(live.unsqueeze(-1), log_p.exp(), 0) * table[tasks]
    z = p.flatten(1, -2).sum(1) if p.dim() > 2 else p
    counted = (live.flatten(1).any(1) if live.dim() > 1 else live).unsqueeze(-1).expand_as(z)
    number = counted.sum()
    mean = z.sum() / number.clamp(min=1)
    variance = torch.where(counted, (z - mean).square(), 0).sum() / (number - 1).clamp(min=1)
    return torch.where(number > 1, variance / (mean.square() + _EPSILON), 0)


class LocalizedBalanceLoss(RouterLoss):
    r"""`localized_balance` of one router, with ``task_ids`` of the call.

    Args:
        weight: the factor in the objective.
        groups: for each task the numbers of its experts. Default: two tasks, the first half of the
            experts for task 1 and the second half for task 0, as in the authors' code.
        delta: as in `localized_balance`.

    Raises:
        ValueError: an argument that does not fit, a router with another number of experts, or a
            call without ``task_ids``.
    """

    name = "localized_balance"
    needs = ("task_ids", "valid_mask")

    def __init__(
        self, weight: float, *, groups: Sequence[Sequence[int]] | None = None, delta: float = 0.1
    ) -> None:
        super().__init__(weight)
        if not -1 < delta < 1:
            raise ValueError(f"LocalizedBalanceLoss: expected delta in (-1, 1), got {delta}")
        self.groups = None if groups is None else [list(group) for group in groups]
        self.delta = delta

    def bind(self, router) -> None:
        self._groups_of(router.num_experts)

    def forward(
        self, routing: Routing, *, task_ids: Tensor | None, valid_mask: Tensor | None
    ) -> Tensor:
        logits, _ = self.logits_of(routing)
        tasks = ids_of_tokens(type(self).__name__, task_ids, logits.shape[:-1])
        groups = self._groups_of(logits.shape[-1])
        return localized_balance(logits, tasks, groups, delta=self.delta, valid_mask=valid_mask)

    def _groups_of(self, num_experts: int) -> list[list[int]]:
        if self.groups is None:
            if num_experts % 2:
                raise ValueError(
                    "LocalizedBalanceLoss: expected groups for an odd number of experts, "
                    f"{num_experts}, got none"
                )
            half = num_experts // 2
            return [[*range(half, num_experts)], [*range(half)]]
        wrong = [e for group in self.groups for e in group if not 0 <= e < num_experts]
        if wrong:
            raise ValueError(
                f"LocalizedBalanceLoss: expected groups of experts in [0, {num_experts}), "
                f"got {wrong}"
            )
        return self.groups
