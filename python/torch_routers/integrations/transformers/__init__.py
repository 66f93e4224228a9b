"""Mixture-of-experts models of Transformers with the routers and kernels of this library."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "torch_routers.integrations.transformers: expected the package transformers, got none. "
        "Run: pip install transformers"
    ) from error

from torch_routers.integrations.transformers.experts import register_experts
from torch_routers.integrations.transformers.swap import SwapReport, swap_routers

__all__ = ["SwapReport", "register_experts", "swap_routers"]
