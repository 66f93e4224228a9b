"""Metrics of routings. Tensors in, tensors out: nothing waits for the device until you read one.

`segment_cache_hit_rate` is the exception: it goes over the tokens on the CPU.

Only sums and histograms over tokens are ever kept, never what a single token chose.
"""

from torch_routers.metrics.agreement import Agreement, router_drift, routing_agreement
from torch_routers.metrics.congestion import equilibrium_load, gamma_eff
from torch_routers.metrics.consistency import (
    segment_cache_hit_rate,
    segment_routing_performance,
)
from torch_routers.metrics.counts import (
    ACTIVE_SHARE,
    active_experts,
    dead,
    load,
    load_cv,
    load_divergence,
    max_share,
    max_vio,
    mutual_information,
)
from torch_routers.metrics.meter import RoutingMeter, by_layer, read, summary
from torch_routers.metrics.sparsity import chunk_sparsity, reuse_ratio, token_sparsity
from torch_routers.metrics.tokens import (
    Totals,
    active_mean,
    drop_rate,
    entropy,
    ess,
    selection_share,
    top1_fraction,
    totals,
    z_mean,
)

__all__ = [
    "ACTIVE_SHARE",
    "Agreement",
    "RoutingMeter",
    "Totals",
    "active_experts",
    "active_mean",
    "by_layer",
    "chunk_sparsity",
    "dead",
    "drop_rate",
    "entropy",
    "equilibrium_load",
    "ess",
    "gamma_eff",
    "load",
    "load_cv",
    "load_divergence",
    "max_share",
    "max_vio",
    "mutual_information",
    "read",
    "reuse_ratio",
    "router_drift",
    "routing_agreement",
    "segment_cache_hit_rate",
    "segment_routing_performance",
    "selection_share",
    "summary",
    "token_sparsity",
    "top1_fraction",
    "totals",
    "z_mean",
]
