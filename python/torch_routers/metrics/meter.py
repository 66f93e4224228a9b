"""From the routings of a model to what a logger takes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.distributed as dist
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
        routers = routers_of(model, "RoutingMeter")
        self._num_experts = {name: router.num_experts for name, router in routers.items()}
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

    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Add the windows of all ranks up, on each; every rank calls it, also one that saw nothing.

        Waits for the device. Without initialised ``torch.distributed`` there is nothing to add.

        Args:
            group: the ranks. Default: all processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        device = next((p.device for p in self._model.parameters()), None)
        device = next((sums.counts.device for sums in self.totals.values()), device)
        rows = [_flat(self.totals.get(name), count) for name, count in self._num_experts.items()]
        both = torch.cat([row.to(device) for row in rows])
        dist.all_reduce(both, group=group)
        parts = both.split([len(row) for row in rows])
        found = (_unflat(row, count) for row, count in zip(parts, self._num_experts.values()))
        self.totals = {name: sums for name, sums in zip(self._num_experts, found) if sums}

    def compute(self) -> dict[str, Tensor]:
        """The `summary` of the window."""
        return summary(self.totals)

    def reset(self) -> None:
        """Begin the next window."""
        self.totals = {}


def _flat(sums: Totals | None, num_experts: int) -> Tensor:
    """Totals as numbers that add up: whether there are any, and with logits, come first."""
    if sums is None:
        return torch.zeros(2 * num_experts + 8, dtype=torch.float64)
    found = torch.stack([sums.ess.new_tensor(x) for x in (1.0, float(sums.lse is not None))])
    fields = [torch.zeros_like(sums.ess) if field is None else field for field in sums]
    return torch.cat([found, *(field.double().flatten() for field in fields)])


def _unflat(row: Tensor, num_experts: int) -> Totals | None:
    """What `_flat` was given, of all ranks; counts below 2^53 are exact."""
    ranks, with_logits = row[:2].tolist()
    if not ranks:
        return None
    sizes = [2, num_experts, num_experts, *[1] * 6]
    counts, top1, *scalars = row.split(sizes)[1:]
    tokens, routed, kept, ess, entropy, lse = (value[0] for value in scalars)
    return Totals(
        *(value.long() for value in (counts, top1, tokens, routed, kept)),
        ess,
        entropy if with_logits == ranks else None,
        lse if with_logits == ranks else None,
    )
