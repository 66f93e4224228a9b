"""Routers: modules that decide which expert sees which token."""

from torch_routers.routers.adaptive_k import AdaptiveKRouter, calibrate_thresholds
from torch_routers.routers.base import Router, RouterTraits
from torch_routers.routers.entmax import EntmaxRouter
from torch_routers.routers.entropy import EntropyRouter, TopPRouter
from torch_routers.routers.hash import HashRouter
from torch_routers.routers.noisy_topk import NoisyTopKRouter
from torch_routers.routers.poly import PolyRouter
from torch_routers.routers.prototype import PrototypeRouter
from torch_routers.routers.rank import RankRouter
from torch_routers.routers.recurrent import (
    RecurrentCell,
    RecurrentRouter,
    RecurrentStack,
    share_cell,
)
from torch_routers.routers.relu import ReLURouter
from torch_routers.routers.smear import SMEARRouter
from torch_routers.routers.soft import SoftRouter
from torch_routers.routers.topk import TopKRouter

__all__ = [
    "AdaptiveKRouter",
    "EntmaxRouter",
    "EntropyRouter",
    "HashRouter",
    "NoisyTopKRouter",
    "PolyRouter",
    "PrototypeRouter",
    "RankRouter",
    "ReLURouter",
    "RecurrentCell",
    "RecurrentRouter",
    "RecurrentStack",
    "Router",
    "RouterTraits",
    "SMEARRouter",
    "SoftRouter",
    "TopKRouter",
    "TopPRouter",
    "calibrate_thresholds",
    "share_cell",
]
