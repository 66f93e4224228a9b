"""Routers: modules that decide which expert sees which token."""

from torch_routers.routers.base import Router, RouterTraits
from torch_routers.routers.entmax import EntmaxRouter
from torch_routers.routers.hash import HashRouter
from torch_routers.routers.noisy_topk import NoisyTopKRouter
from torch_routers.routers.topk import TopKRouter

__all__ = ["EntmaxRouter", "HashRouter", "NoisyTopKRouter", "Router", "RouterTraits", "TopKRouter"]
