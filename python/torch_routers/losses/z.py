"""The z-loss: logits that stay small."""

from torch import Tensor

from torch_routers.losses.base import RouterLoss
from torch_routers.routing import Routing


def z_loss(lse: Tensor, num_tokens: Tensor) -> Tensor:
    r"""The mean square of the log-sum-exp of each token (ST-MoE, arXiv 2202.08906).

    .. math::  L = \frac{1}{T} \sum_t \Big( \ln \sum_e e^{z_{te}} \Big)^2

    Args:
        lse: ``[...]``, the log-sum-exp of each token; 0 where it is masked.
        num_tokens: scalar, the number of tokens that are not masked; 0 gives the loss 0.

    Returns:
        A scalar in the dtype of ``lse``.

    >>> import torch
    >>> z_loss(torch.tensor([1.0, 3.0]), torch.tensor(2))
    tensor(5.)
    """
    return lse.square().sum() / num_tokens.clamp(min=1)


class ZLoss(RouterLoss):
    """`z_loss` of one router.

    Args:
        weight: the factor in the objective; 1e-3 in the paper.
    """

    name = "z"

    def forward(self, routing: Routing) -> Tensor:
        lse, _, _, tokens = self.statistics(routing)
        return z_loss(lse, tokens.sum())
