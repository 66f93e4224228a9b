"""Auxiliary losses: pure functions of tensors, and the small modules that carry a weight."""

from torch_routers.losses.balance import LoadBalanceLoss, load_balance
from torch_routers.losses.base import RouterLoss
from torch_routers.losses.z import ZLoss, z_loss

__all__ = ["LoadBalanceLoss", "RouterLoss", "ZLoss", "load_balance", "z_loss"]
