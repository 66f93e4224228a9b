"""From the routings of a model to what a logger takes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from torch_routers.delivery import Routings, observe, routers_of
from torch_routers.metrics.counts import dead, load_cv, max_share, max_vio
from torch_routers.metrics.tokens import (
    Totals,
    active_mean,
    drop_rate,
    entropy,
    ess,
    totals,
    z_mean,
)
from torch_routers.routing import Routing

Layers: TypeAlias = Iterable[Routing] | Mapping[str, Totals]

OF_LOGITS = (entropy, z_mean)
SCALARS = (load_cv, max_share, max_vio, dead, drop_rate, active_mean, ess, *OF_LOGITS)


def by_layer(routings: Layers, names: Iterable[str] | None = None) -> dict[str, Totals]:
    """The `Totals` of each router by its name, over all of its routings.

    Args:
        routings: of `collect`, or any others; or totals by name, which are returned.
        names: of the routers, one for each routing; equal names are one router. Default: those that
            `collect` knows, otherwise ``"0"``, ``"1"``, …

    Raises:
        ValueError: not as many names as routings.
    """
    if isinstance(routings, Mapping):
        return dict(routings)
    items = list(routings)
    if names is None:
        names = routings.names if isinstance(routings, Routings) else map(str, range(len(items)))
    names = list(names)
    if len(names) != len(items):
        raise ValueError(
            f"by_layer: expected one name for each of {len(items)} routings, got {len(names)}"
        )
    layers: dict[str, Totals] = {}
    for name, routing in zip(names, items):
        _add(layers, name, totals(routing))
    return layers


def _add(layers: dict[str, Totals], name: str, sums: Totals) -> None:
    layers[name] = layers[name].plus(sums) if name in layers else sums


def summary(routings: Layers, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """``router/<layer>/<metric>``: every scalar metric of every router, as scalar tensors.

    The metrics are ``load_cv``, ``max_share``, ``max_vio``, ``dead``, ``drop_rate``,
    ``active_mean``, ``ess`` and, where there are logits, ``entropy`` and ``z_mean``.

    Args:
        routings, names: as in `by_layer`. Several routings of one router are one window: the
            metrics are those of all their tokens.

    Raises:
        ValueError: not as many names as routings.

    >>> router = TopKRouter(hidden_size=8, num_experts=4, top_k=2)
    >>> values = tr.metrics.summary([router(torch.randn(3, 8))], names=["mlp"])
    >>> values["router/mlp/active_mean"]
    tensor(2., dtype=torch.float64)
    """
    return {
        "/".join(filter(None, ["router", name, metric.__name__])): metric(sums)
        for name, sums in by_layer(routings, names).items()
        for metric in SCALARS
        if metric not in OF_LOGITS or sums.lse is not None
    }


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """The values as numbers. Waits for the device once, not once for each.

    >>> read({"router/mlp/ess": torch.tensor(1.5)})
    {'router/mlp/ess': 1.5}
    """
    if not values:
        return {}
    device = next(iter(values.values())).device
    numbers = torch.stack([value.to(device, torch.float64) for value in values.values()])
    return dict(zip(values, numbers.tolist()))


class RoutingMeter:
    """Sums over the batches of a window, from which the metrics of the whole window come.

    Args:
        model: whose routers are observed.

    Nothing waits for the device before a value is read.

    Raises:
        ValueError: the model has no router.

    >>> router = TopKRouter(hidden_size=8, num_experts=4, top_k=2)
    >>> meter = tr.metrics.RoutingMeter(nn.Sequential(router))
    >>> for batch in torch.randn(5, 3, 8):
    ...     with meter.observe():
    ...         routing = router(batch)
    >>> meter.totals["0"].tokens
    tensor(15)
    """

    def __init__(self, model: nn.Module) -> None:
        routers_of(model, "RoutingMeter")
        self._model = model
        self.totals: dict[str, Totals] = {}
        """The sums of the window, by router."""

    @contextmanager
    def observe(self) -> Iterator[Routings]:
        """Count what the routers decide inside the block, once it ends without an error.

        This only looks on: the losses of the routers still need a destination.
        """
        with observe(self._model) as routings:
            yield routings
        self.update(routings)

    def update(self, routings: Layers, names: Iterable[str] | None = None) -> None:
        """Count what was gathered elsewhere; the arguments are those of `by_layer`."""
        for name, sums in by_layer(routings, names).items():
            _add(self.totals, name, sums)

    def compute(self) -> dict[str, Tensor]:
        """The `summary` of the window."""
        return summary(self.totals)

    def reset(self) -> None:
        """Begin the next window."""
        self.totals = {}
