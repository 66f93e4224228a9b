"""What callbacks of trainers share: looking at routers in some of the steps of a training."""

from contextlib import ExitStack

from torch import nn

from torch_routers.delivery import Routings, observe
from torch_routers.metrics import RoutingMeter, read


class Window:
    """The `summary` of a step, micro-batch by micro-batch.

    Args:
        model: whose routers are looked at.

    Looking is no destination for losses; inside a compiled checkpoint it fails as `collect` does.

    Raises:
        ValueError: the model has no router.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._meter = model, RoutingMeter(model)
        self._block = ExitStack()
        self._routings: Routings | None = None

    @property
    def looks(self) -> bool:
        """Whether a micro-batch is being looked at."""
        return self._routings is not None

    def begin(self) -> None:
        """Look at a micro-batch from now on."""
        self.stop()
        self._routings = self._block.enter_context(observe(self._model))

    def end(self) -> None:
        """The micro-batch is over: count what was seen."""
        self._meter.update(self._routings)
        self.stop()

    def stop(self) -> None:
        """Forget what was seen of a micro-batch."""
        self._block.close()
        self._routings = None

    def read(self) -> dict[str, float]:
        """The summary of what was counted, of all ranks; the next one begins. Every rank calls it.

        Waits for the device.
        """
        self._meter.all_reduce()
        values = read(self._meter.compute())
        self._meter.reset()
        return values
