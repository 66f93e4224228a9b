"""The base of the auxiliary losses."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

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

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, routing: Routing) -> Tensor:
        raise NotImplementedError

    def bind(self, router: "Router") -> None:
        """A router says that it is going to evaluate this loss. One that has state may refuse."""

    def statistics(self, routing: Routing) -> ops.Statistics:
        """Those of the routing; an error where its router has none."""
        return statistics_of(routing, type(self).__name__)

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


def evaluate(losses: Iterable[RouterLoss], routing: Routing) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each by name, unweighted and without gradient."""
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
            value = loss(routing)
            values[loss.name] = value.detach()
            totals.append(loss.weight * value)
    if terms:
        common = ops.router_losses(statistics, **arguments)
        totals.append(common.total)
        values.update((name, getattr(common, term)) for name, term in terms.items())
    return sum(totals[1:], totals[0]), values
