"""ReLU routing: each token takes every expert that its router activates."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.losses.activation import activation_probs
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routers.dense import dense_statistics
from torch_routers.routing import Routing


class ReLURouter(Router):
    r"""The router of BlockFFN (arXiv 2507.08771): a ReLU chooses, an RMSNorm scales.

    .. math::
        z = W x, \qquad a = \mathrm{ReLU}(z), \qquad
        y = \gamma \odot \frac{a}{\sqrt{\frac{1}{E} \sum_e a_e^2 + \epsilon}}

    Every expert with :math:`z_e > 0` is active, so that a token's number of experts is its own, and
    may be 0; the choice is differentiable almost everywhere. Weights are not normalised to 1. How
    many experts are active is for losses to control: `losses.ChunkSparsificationLoss`,
    `losses.ActivationLocalityLoss`, `losses.ReLUSparsityLoss`. An expert that no token activates
    gets no gradient from the task.

    The routing is *dense*: ``indices`` is None, ``weights`` ``[..., num_experts]``, 0 for experts
    that are not active. ``active`` says which are, whatever their gain, and ``counts`` for how many
    tokens each is. In the statistics of training the scores of a token are
    :math:`p_e = h_e / (\sum_i h_i + 10^{-5})`, :math:`h` the weights without the gain (of those
    three, ``norm="centered"`` alone makes negative ones).

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        eps: :math:`\epsilon`; 1e-5 in the configurations of the paper.
        norm: ``"rms"``, ``"centered"`` or ``"simple"``, as in `ops.relu_rms_gate`.
        init_std: standard deviation of the initial ``weight``, 0.1 with scaling by width in the
            reference code.
        losses: auxiliary losses.

    ``weight`` is ``[num_experts, hidden_size]``, ``gain`` ``[num_experts]``, at first ones.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = ReLURouter(hidden_size=16, num_experts=8)
    >>> routing = router(torch.randn(4, 16))
    >>> routing.indices is None, routing.weights.shape
    (True, torch.Size([4, 8]))
    >>> torch.equal(routing.counts, (routing.weights > 0).sum(0))
    True
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        eps: float = 1e-5,
        norm: str = "rms",
        init_std: float = 0.02,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        check_choice(self._name, "norm", norm, ("rms", "centered", "simple"))
        if not 1e-30 <= eps <= 1e30:
            raise ValueError(f"{self._name}: expected eps in [1e-30, 1e30], got {eps}")
        if not init_std >= 0:
            raise ValueError(f"{self._name}: expected init_std >= 0, got {init_std}")
        self.hidden_size, self.eps, self.norm, self.init_std = hidden_size, eps, norm, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.gain = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)
        nn.init.ones_(self.gain)

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
        logits = F.linear(x, self.weight.to(x.dtype))
        weights, _, counts = ops.relu_rms_gate(
            logits, self.gain, eps=self.eps, norm=self.norm, valid_mask=valid_mask
        )
        scores = None
        if self.wants_statistics:
            scores = activation_probs(logits, valid_mask, eps=self.eps, norm=self.norm)
        if valid_mask is not None:  # for the losses, which do not see the mask
            logits = torch.where(valid_mask.unsqueeze(-1), logits, -torch.inf)
        statistics = dense_statistics(
            logits,
            scores,
            counts,
            lambda: logits > 0,
            valid_mask=valid_mask,
            group_offsets=group_offsets,
            per_sample=self.wants_groups,
        )
        active = ~(logits <= 0)  # also where NaN: it is to be noticed
        return Routing(weights, None, logits, counts, statistics, active=active)
