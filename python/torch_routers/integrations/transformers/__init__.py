"""Models of Transformers and its Trainer, with the routers and kernels of this library."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_routers.integrations.transformers: expected the package transformers, got none. "
        "Run: pip install transformers"
    ) from error

from torch_routers.integrations.transformers.experts import register_experts
from torch_routers.integrations.transformers.swap import SwapReport, swap_routers
from torch_routers.integrations.transformers.trainer import (
    RoutingCallback,
    attach_to_loss,
    attach_to_trainer,
    share_of_step,
)

__all__ = [
    "RoutingCallback",
    "SwapReport",
    "attach_to_loss",
    "attach_to_trainer",
    "register_experts",
    "share_of_step",
    "swap_routers",
]
