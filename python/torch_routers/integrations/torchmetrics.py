"""The metrics of a model's routers as one metric of TorchMetrics, summed over ranks."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.delivery import routers_of
from torch_routers.metrics import Totals, by_layer, summary
from torch_routers.metrics.meter import Layers

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "torch_routers.integrations.torchmetrics: expected the package torchmetrics, got none. "
        "Run: pip install torchmetrics"
    ) from error


class RoutingMetric(Metric):
    """`summary` of all tokens since the last reset, on all ranks.

    The states are the fields of `Totals`, stacked over the routers and summed over ranks, so that
    a metric of several ranks is that of all their tokens, not a mean of means.

    Args:
        model: whose routers are measured.
        layer: the name of the only router to measure. Default: all.
        options: those of ``torchmetrics.Metric``.

    ``update`` takes the arguments of `by_layer`; ``compute`` returns a flat dict of scalar tensors.

    Raises:
        ValueError: the model has no router, or none of that name.

    >>> model = nn.Sequential(TopKRouter(hidden_size=8, num_experts=4, top_k=2))
    >>> metric = RoutingMetric(model)
    >>> with collect(model) as routings:
    ...     routing = model(torch.randn(3, 8))
    >>> metric.update(routings)
    >>> metric.compute()["router/0/active_mean"]
    tensor(2., dtype=torch.float64)
    """

    full_state_update = False

    def __init__(self, model: nn.Module, *, layer: str | None = None, **options) -> None:
        super().__init__(**options)
        routers = routers_of(model, "RoutingMetric")
        if layer is not None and layer not in routers:
            raise ValueError(f"RoutingMetric: expected layer among {list(routers)}, got {layer!r}")
        names = list(routers) if layer is None else [layer]
        self._num_experts = {name: routers[name].num_experts for name in names}
        self._without_logits: set[str] = set()
        experts = len(names), max(self._num_experts.values())
        for field in Totals._fields:
            shape = experts if field in ("counts", "top1") else experts[:1]
            dtype = torch.float64 if field in ("ess", "entropy", "lse") else torch.int64
            self.add_state(field, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, routings: Layers, names: Iterable[str] | None = None) -> None:
        for name, sums in by_layer(routings, names).items():
            if name not in self._num_experts:
                continue
            if sums.lse is None:
                self._without_logits.add(name)
            layer = list(self._num_experts).index(name)
            for field, value in sums._asdict().items():
                if value is not None:
                    state = getattr(self, field)[layer]
                    missing = state.numel() - value.numel()  # experts of the widest router
                    state += F.pad(value, (0, missing)) if missing else value

    def compute(self) -> dict[str, Tensor]:
        layers = {}
        for layer, (name, num_experts) in enumerate(self._num_experts.items()):
            fields = [getattr(self, field)[layer] for field in Totals._fields]
            sums = Totals(*(value[:num_experts] if value.dim() else value for value in fields))
            if name in self._without_logits:
                sums = sums._replace(entropy=None, lse=None)
            layers[name] = sums
        return summary(layers)
