"""Numbers about one trained model, as pure functions of sums and counts."""

import math

import torch
from torch import Tensor

ACTIVE_SHARE = 0.1
"""An expert is active if it gets at least this part of its fair share of the slots."""


def bits_per_byte(nats: float, bytes_: int) -> float:
    """The code length of the text per byte: ``nats / ln 2 / bytes``."""
    return nats / math.log(2) / bytes_


def load_cv(load: Tensor) -> float:
    """Standard deviation of the experts' load over its mean, averaged over layers.

    Args:
        load: ``[layers, experts]``, slots.

    Returns:
        0 where all experts get the same; ``sqrt(experts - 1)`` where one gets everything.
    """
    load = load.double()
    return (load.std(-1, correction=0) / load.mean(-1)).mean().item()


def active_experts(load: Tensor) -> float:
    """Experts with at least a tenth of the fair share, averaged over layers.

    Args:
        load: ``[layers, experts]``, slots.
    """
    fair = load.double().mean(-1, keepdim=True)
    return (load >= ACTIVE_SHARE * fair).double().sum(-1).mean().item()


def mutual_information(load: Tensor) -> float:
    """Bits that the expert of a slot tells about its domain, averaged over layers.

    The plug-in estimate from counts. It is never negative, and too high by about
    ``(domains - 1) * (experts - 1) / (2 * slots * ln 2)`` if slots were independent.

    Args:
        load: ``[layers, domains, experts]``, slots.

    Returns:
        0 where they are independent, at most the entropy of the domains.
    """
    joint = load.double() / load.double().sum((-2, -1), keepdim=True)
    independent = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent, 1)
    return (joint * ratio.log2()).sum((-2, -1)).mean().item()
