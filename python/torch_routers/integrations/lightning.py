"""A callback of Lightning that logs what the routers do, and balances them."""

from typing import Any

from torch_routers.integrations.window import Window

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ImportError(
        "torch_routers.integrations.lightning: expected the package lightning, got none. "
        "Run: pip install lightning"
    ) from error


class RoutingCallback(Callback):
    """Log the `summary` of every n-th optimiser step to the trainer's loggers.

    What is logged is of all tokens of the step: of all its micro-batches, on all ranks. Other steps
    are not looked at. Looking is no destination for losses; inside a compiled checkpoint it fails
    as `collect` does.

    Args:
        every_n_steps: optimiser steps from one summary to the next.
        controller: of loss-free balancing. Its ``step()`` is called before each step of the first
            optimiser, when the backward passes of all micro-batches are done.

    Raises:
        ValueError: ``every_n_steps`` is less than 1; at the start, a model without routers.
    """

    def __init__(self, *, every_n_steps: int = 50, controller: Any = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"RoutingCallback: expected every_n_steps >= 1, got {every_n_steps}")
        self.every_n_steps, self.controller = every_n_steps, controller
        self._window: Window | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        self._window = Window(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._window.stop()  # a batch that was skipped has no end
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            self._window.begin()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self._window.looks:
            return
        self._window.end()
        if trainer.global_step == self._step:
            return  # more micro-batches belong to this step
        values = self._window.read()
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self._step)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self._window is not None:
            self._window.stop()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.controller is not None and optimizer is trainer.optimizers[0]:
            self.controller.step()
