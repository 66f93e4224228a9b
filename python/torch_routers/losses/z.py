"""The z-loss: logits that stay small."""

from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import StatisticsLoss


def z_loss(lse: Tensor, num_tokens: Tensor) -> Tensor:
    r"""The mean square of the log-sum-exp of each token (ST-MoE, arXiv 2202.08906).

    .. math::  L = \frac{1}{T} \sum_t \Big( \ln \sum_e e^{z_{te}} \Big)^2

    A token whose logits are all -inf adds 0, and has no gradient.

    Args:
        lse: ``[...]``, the log-sum-exp of each token; 0 where it is masked.
        num_tokens: scalar int64, the number of tokens that are not masked; 0 gives the loss 0.

    Returns:
        A scalar in the dtype of ``lse``.

    >>> import torch
    >>> z_loss(torch.tensor([1.0, 3.0]), torch.tensor(2))
    tensor(5.)
    """
    return ops.router_losses(ops.Statistics(lse, None, None, num_tokens[None]), z=1.0).total


class ZLoss(StatisticsLoss):
    """`z_loss` of one router.

    Args:
        weight: the factor in the objective; 1e-3 in the paper.
    """

    name = term = "z"
