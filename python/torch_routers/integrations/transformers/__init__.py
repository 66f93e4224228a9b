"""Transformers: losses of routers, balancing and metrics under its Trainer."""

from torch_routers.integrations.transformers.trainer import (
    RoutingCallback,
    attach_to_loss,
    attach_to_trainer,
    share_of_step,
)

__all__ = ["RoutingCallback", "attach_to_loss", "attach_to_trainer", "share_of_step"]
