"""Variance: scores that tell experts apart, or tokens."""

from typing import Literal

import torch
from torch import Tensor

from torch_routers.losses.base import (
    RouterLoss,
    full_precision,
    probabilities,
    valid_tokens,
)
from torch_routers.registry import check_choice
from torch_routers.routing import Routing

AXES = ("expert", "token")


def variance_loss(
    scores: Tensor,
    *,
    axis: Literal["expert", "token"] = "expert",
    valid_mask: Tensor | None = None,
) -> Tensor:
    r"""Minus the variance of the scores: of a token over experts, or of an expert over tokens.

    .. math::
        L_\mathrm{expert} = -\frac{1}{T (E - 1)} \sum_{t, e} (s_{te} - \bar s_t)^2, \qquad
        L_\mathrm{token} = -\frac{1}{E} \sum_{t, e} (s_{te} - \bar s_e)^2

    The first is a mean over tokens of unbiased variances; for scores that sum to 1 it is, but for
    constants, minus :math:`\sum_e s_{te}^2`. The second is the form printed in arXiv 2505.22323,
    equation 7: a *sum* over tokens, which grows with them, of deviations from the mean of an
    expert. Only the second sees whether all tokens score alike. Written in plain PyTorch.

    Args:
        scores: ``[..., num_experts]``.
        axis: over which the variance is taken, ``"expert"`` or ``"token"``.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without tokens. A single expert has no
        variance over experts.

    Raises:
        ValueError: ``axis`` does not fit.

    >>> variance_loss(torch.tensor([[0.5, 0.3, 0.2]]))
    tensor(-0.0233)
    """
    check_choice("variance_loss", "axis", axis, AXES)
    num_experts = scores.shape[-1]
    valid = valid_tokens(scores, valid_mask)
    scores = torch.where(valid.unsqueeze(-1), full_precision(scores), 0).reshape(-1, num_experts)
    tokens = valid.sum().clamp(min=1)
    if axis == "expert":
        deviations = scores - scores.mean(1, keepdim=True)
        return -deviations.square().sum() / (tokens * max(1, num_experts - 1))
    deviations = torch.where(valid.reshape(-1, 1), scores - scores.sum(0) / tokens, 0)
    return -deviations.square().sum() / num_experts


class VarianceLoss(RouterLoss):
    """`variance_loss` of the softmax of one router, over the tokens that chose an expert.

    A token whose logits are all -inf has scores of 0, and is a token like others.

    Args:
        weight: the factor in the objective.
        axis: as in `variance_loss`.

    Raises:
        ValueError: an argument that does not fit, or a routing without logits.
    """

    name = "variance"

    def __init__(self, weight: float, *, axis: Literal["expert", "token"] = "expert") -> None:
        super().__init__(weight)
        check_choice(type(self).__name__, "axis", axis, AXES)
        self.axis = axis

    def forward(self, routing: Routing) -> Tensor:
        logits, chosen = self.logits_of(routing)
        return variance_loss(probabilities(logits, chosen), axis=self.axis, valid_mask=chosen)
