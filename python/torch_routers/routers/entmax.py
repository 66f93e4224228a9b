"""The entmax router: each token has as many experts as its logits ask for."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.routers.base import Router
from torch_routers.routers.dense import dense_statistics
from torch_routers.routing import Routing


class EntmaxRouter(Router):
    r"""Weigh experts by the entmax of their logits, which leaves many of them at exactly zero.

    .. math::  z = W x + b, \qquad w = \alpha\text{-entmax}(z) =
               \big[(\alpha - 1) z - \tau\big]_+^{1 / (\alpha - 1)}

    with :math:`\tau` such that the weights sum to one (arXiv 1905.05702). No number of experts is
    set: a token whose logits are close has many, one with a clear favourite has one. Unlike with
    top-k nothing is cut off: weights fall to zero continuously, and the gradient is that of all of
    them. The larger ``alpha``, the fewer experts; logits that grow have the same effect.

    The Tsallis entropy, which entmax maximises, makes *scores* here. In DynMoLE the entropy of a
    softmax is a *criterion*, by which it decides how many experts a token gets.

    The routing is dense: ``indices`` is None, ``weights`` are ``[..., num_experts]``, and an expert
    is active where its weight is not 0. ``counts`` are the tokens for which it is. The balance and
    importance losses take the weights as probabilities; the z-loss has the log-sum-exp of the
    logits.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        alpha: 1 is softmax, where every expert is active; 2 is sparsemax (arXiv 1602.02068).
        learn_alpha: train it from this value, which must be in (1, 2), as
            :math:`1 + \sigma(a)` with the parameter ``alpha_logit`` :math:`a` (arXiv 1909.00015):
            between softmax and sparsemax, because beyond 2 the slope of a weight is infinite where
            it becomes 0.
        gate_bias: train a bias :math:`b` of the logits, the parameter ``bias``.
        losses: auxiliary losses.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = EntmaxRouter(hidden_size=16, num_experts=8)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.indices
    (torch.Size([3, 5, 8]), None)
    >>> bool((routing.counts == (routing.weights != 0).sum((0, 1))).all())
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        alpha: float = 1.5,
        *,
        learn_alpha: bool = False,
        gate_bias: bool = False,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        if learn_alpha and not 1 < alpha < 2:
            raise ValueError(f"{self._name}: expected a learned alpha in (1, 2), got {alpha}")
        ops.entmax(torch.zeros(0, num_experts), alpha)  # what it refuses it refuses now
        self.hidden_size, self.alpha, self.learn_alpha = hidden_size, alpha, learn_alpha
        self.gate_bias = gate_bias
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if gate_bias else None
        # One number in a dimension: FSDP shards no scalars.
        self.alpha_logit = nn.Parameter(torch.empty(1)) if learn_alpha else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.alpha_logit is not None:
            nn.init.constant_(self.alpha_logit, math.log((self.alpha - 1) / (2 - self.alpha)))

    def current_alpha(self, dtype: torch.dtype = torch.float32) -> float | Tensor:
        """``alpha``, or the scalar that it is by now if it is learned."""
        if self.alpha_logit is None:
            return self.alpha
        return 1 + torch.sigmoid(self.alpha_logit.to(dtype)).squeeze(0)

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        group_offsets: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        logits = F.linear(x, self.weight.to(x.dtype), bias)
        alpha = self.current_alpha(x.dtype)
        weights, counts = ops.entmax(logits, alpha, valid_mask=valid_mask)
        statistics = dense_statistics(
            logits,
            weights if self.wants_statistics else None,
            counts,
            lambda: weights != 0,
            valid_mask=valid_mask,
            group_offsets=group_offsets,
            per_sample=self.wants_groups,
        )
        return Routing(weights, None, logits, counts, statistics)
