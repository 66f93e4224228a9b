"""The base of the auxiliary losses."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.registry import Configurable
from torch_routers.routing import Routing

if TYPE_CHECKING:
    from torch_routers.routers import Router


class RouterLoss(Configurable, nn.Module):
    """A loss of one routing. It returns the unweighted value; the router multiplies by ``weight``.

    A subclass sets ``name``, under which the value is logged, and writes ``forward``.
    """

    name: ClassVar[str]
    per_sequence: ClassVar[bool] = False
    """Whether it needs statistics with a group per sequence."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What its router gives to ``forward`` by keyword, besides the routing: context of the call,
    such as ``task_ids`` or ``valid_mask``, None where the call brings none; or ``router``, the
    router itself."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, routing: Routing, **needs: Any) -> Tensor:
        raise NotImplementedError

    def bind(self, router: "Router") -> None:
        """A router says that it is going to evaluate this loss. One that has state may refuse."""

    def statistics(self, routing: Routing) -> ops.Statistics:
        """Those of the routing; an error where its router has none."""
        return statistics_of(routing, type(self).__name__)

    def logits_of(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The logits, and which tokens chose an expert; an error where its router has none."""
        if routing.logits is None:
            raise ValueError(f"{type(self).__name__}: expected a routing with logits, got none")
        choice = routing.choice()
        chosen = routing.used() if choice is None else choice >= 0
        return routing.logits, chosen.any(-1)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}" for name, value in self.config().items() if name != "class"
        )


def statistics_of(routing: Routing, caller: str) -> ops.Statistics:
    if routing.statistics is None or routing.statistics.lse is None:
        raise ValueError(
            f"{caller}: expected a routing with statistics, got none. "
            "Routers compute them in training, when they have losses"
        )
    return routing.statistics


class StatisticsLoss(RouterLoss):
    """A loss that is a term of `ops.router_losses`. Those of one router are evaluated in one call.

    A subclass sets ``term``, the argument of `ops.router_losses` that takes its weight, and
    overrides ``options`` where there are others. One that writes a ``forward`` of its own is
    evaluated by that.
    """

    term: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """Further arguments of `ops.router_losses`."""
        return {}

    @property
    def is_term(self) -> bool:
        """Whether the common call computes it: not where a subclass computes something else."""
        return type(self).forward is StatisticsLoss.forward

    def forward(self, routing: Routing) -> Tensor:
        arguments = {self.term: 1.0} | self.options()
        return ops.router_losses(self.statistics(routing), **arguments).total


def evaluate(
    losses: Iterable[RouterLoss], routing: Routing, context: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each by name, unweighted and without gradient.

    ``context`` is where they find what they need.
    """
    arguments: dict[str, Any] = {}  # of one call of router_losses
    terms: dict[str, str] = {}  # the losses in it
    values: dict[str, Tensor] = {}
    totals: list[Tensor] = []
    for loss in losses:
        if isinstance(loss, StatisticsLoss) and loss.is_term and loss.term not in arguments:
            statistics = loss.statistics(routing)
            arguments[loss.term] = loss.weight
            arguments.update(loss.options())
            terms[loss.name] = loss.term
        else:
            value = loss(routing, **{name: context.get(name) for name in loss.needs})
            values[loss.name] = value.detach()
            totals.append(loss.weight * value)
    if terms:
        common = ops.router_losses(statistics, **arguments)
        totals.append(common.total)
        values.update((name, getattr(common, term)) for name, term in terms.items())
    return sum(totals[1:], totals[0]), values


# ---- what functions of tokens share --------------------------------------------------------------


def full_precision(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def valid_tokens(scores: Tensor, valid_mask: Tensor | None) -> Tensor:
    """``[...]`` bool for scores ``[..., num_experts]``: the mask, or all without one."""
    if valid_mask is None:
        return torch.ones_like(scores[..., 0], dtype=torch.bool)
    return valid_mask


def log_probs(logits: Tensor, valid_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the softmax, which tokens have one, and the number of all that are not masked.

    A token whose logits are all -inf has none. Rows without are finite, and have no gradient.
    """
    logits = full_precision(logits)
    valid = valid_tokens(logits, valid_mask)
    live = valid & (logits != -torch.inf).any(-1)
    log_p = torch.where(live.unsqueeze(-1), logits, 0).log_softmax(-1)
    return log_p, live, valid.sum().clamp(min=1)


def probabilities(logits: Tensor, valid_mask: Tensor | None = None) -> Tensor:
    """The softmax, and rows of 0 for tokens without one."""
    log_p, live, _ = log_probs(logits, valid_mask)
    return torch.where(live.unsqueeze(-1), log_p.exp(), 0)


def ids_of_tokens(caller: str, task_ids: Tensor | None, shape: torch.Size) -> Tensor:
    """A task per token of ``shape``, of ids that have it or leading dimensions of it."""
    if task_ids is None:
        raise ValueError(
            f"{caller}: expected task_ids, got none. Pass them by keyword to the router"
        )
    if (
        task_ids.is_floating_point()
        or task_ids.dtype == torch.bool
        or task_ids.shape != shape[: task_ids.dim()]
    ):
        raise ValueError(
            f"{caller}: expected task_ids in integers of shape {list(shape)}, or leading "
            f"dimensions of it, got {task_ids.dtype} of shape {list(task_ids.shape)}"
        )
    return task_ids[(..., *[None] * (len(shape) - task_ids.dim()))].expand(shape)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """In the dtype of both, whatever autocast would make of it."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b
