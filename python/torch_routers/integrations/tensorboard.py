"""Routings as scalars and histograms of TensorBoard.

The writer is that of torch.utils.tensorboard (``pip install tensorboard``) or of tensorboardX.
"""

from collections.abc import Iterable
from typing import Any

import torch

from torch_routers.metrics import by_layer, read, summary
from torch_routers.metrics.meter import Layers


def log_routings(
    writer: Any, routings: Layers, step: int, names: Iterable[str] | None = None
) -> None:
    """Write the `summary`, and for each layer how many slots every expert is given.

    The latter is ``router/<layer>/load``, a histogram whose bucket e is expert e. Waits for the
    device twice, whatever the number of layers.

    Args:
        writer: a ``SummaryWriter``.
        routings, names: as in `by_layer`; ``meter.totals`` of a `RoutingMeter` for a window.
        step: the number of the step.

    Raises:
        ValueError: not as many names as routings.
    """
    layers = by_layer(routings, names)
    for tag, value in read(summary(layers)).items():
        writer.add_scalar(tag, value, step)
    if not layers:
        return
    device = next(iter(layers.values())).counts.device
    counts = torch.cat([sums.counts.to(device) for sums in layers.values()]).cpu()
    sizes = [sums.counts.numel() for sums in layers.values()]
    for name, slots in zip(layers, counts.split(sizes)):
        experts = torch.arange(len(slots))
        writer.add_histogram_raw(
            "/".join(filter(None, ["router", name, "load"])),
            min=0,
            max=len(slots) - 1,
            num=int(slots.sum()),
            sum=int((slots * experts).sum()),
            sum_squares=int((slots * experts.square()).sum()),
            bucket_limits=(experts + 0.5).tolist(),
            bucket_counts=slots.tolist(),
            global_step=step,
        )
