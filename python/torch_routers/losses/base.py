"""The base of the auxiliary losses."""

from typing import ClassVar

from torch import Tensor, nn

from torch_routers.ops import Statistics
from torch_routers.registry import Configurable
from torch_routers.routing import Routing


class RouterLoss(Configurable, nn.Module):
    """A loss of one routing. It returns the unweighted value; the router multiplies by ``weight``.

    A subclass sets ``name``, under which the value is logged, and writes ``forward``.
    """

    name: ClassVar[str]

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, routing: Routing) -> Tensor:
        raise NotImplementedError

    def statistics(self, routing: Routing) -> Statistics:
        """Those of the routing; an error where its router has none."""
        if routing.statistics is None or routing.statistics.lse is None:
            raise ValueError(
                f"{type(self).__name__}: expected a routing with statistics, got none. "
                "Routers compute them in training, when they have losses"
            )
        return routing.statistics

    def extra_repr(self) -> str:
        return f"weight={self.weight}"
