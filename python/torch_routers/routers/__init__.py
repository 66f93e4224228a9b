"""Routers: modules that decide which expert sees which token."""

from torch_routers.routers.base import Router, RouterTraits
from torch_routers.routers.hash import HashRouter
from torch_routers.routers.noisy_topk import NoisyTopKRouter
from torch_routers.routers.relu import ReLURouter
from torch_routers.routers.topk import TopKRouter

__all__ = ["HashRouter", "NoisyTopKRouter", "ReLURouter", "Router", "RouterTraits", "TopKRouter"]
