"""What losses of the tokens of several ranks share."""

import copy
from typing import Any, ClassVar, Literal

import torch.distributed as dist

from torch_routers.losses.base import RouterLoss
from torch_routers.registry import check_choice

GRAD_REDUCTIONS = (None, "mean", "sum")


class GroupLoss(RouterLoss):
    """A loss that may see the tokens of all ranks of ``group``.

    A subclass sets ``scopes``, the values that ``scope`` may have.

    ``group``, an attribute, is the process group: ``None``, the default, is torch's default group.
    Set it after construction; it is in no configuration, a copy shares it, and a loss that has one
    cannot be pickled.

    Raises:
        ValueError: an argument that does not fit.
    """

    scopes: ClassVar[tuple[str, ...]]

    def __init__(
        self, weight: float, scope: str, grad_reduction: Literal["mean", "sum"] | None
    ) -> None:
        super().__init__(weight)
        caller = type(self).__name__
        check_choice(caller, "scope", scope, self.scopes)
        check_choice(caller, "grad_reduction", grad_reduction, GRAD_REDUCTIONS)
        self.scope, self.grad_reduction = scope, grad_reduction
        self.group: dist.ProcessGroup | None = None

    @property
    def is_distributed(self) -> bool:
        return dist.is_available() and dist.is_initialized()

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupLoss":
        memo[id(self)] = copied = type(self).__new__(type(self))
        memo[id(self.group)] = self.group  # shared, as it cannot be copied
        copied.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()
