"""The router whose experts are the ranks of a LoRA."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers import ops
from torch_routers.routers.base import Router
from torch_routers.routing import Routing


class RankRouter(Router):
    r"""Keep the ranks of a random projection that answer most (FlyLoRA, arXiv 2510.08396).

    .. math::  z = A x, \qquad \mathrm{chosen} = \mathrm{top}_k(|z + d|), \qquad w = 1

    The projection :math:`A` is sparse, random and never trained: it is the factor A of a LoRA and
    the router at once, and each of its rows is an expert. :math:`d` is the ``expert_bias``, a
    buffer which `BalanceController` moves by 1e-3 per optimiser step; it takes part in the choice
    alone. The authors' code (gfyddha/FlyLoRA) moves it in each forward, recomputation included.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: ranks.
        top_k: ranks per token, in ``[1, num_experts]``; 8 of 32 in the paper.
        density: fraction of each row of A that is not 0. Default: ``top_k / num_experts``.

    ``projection`` is ``[num_experts, hidden_size]``, a buffer of the ``state_dict``:
    ``max(1, int(density * hidden_size))`` numbers of each row, at random places, are from a normal
    distribution of standard deviation ``1 / num_experts``. It is multiplied as a dense matrix.

    ``routing.logits`` are :math:`z`, of which a layer needs the chosen ones.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = RankRouter(hidden_size=16, num_experts=8, top_k=2)
    >>> router(torch.randn(3, 5, 16)).weights.unique()
    tensor([1.])
    """

    has_fixed_weights = True

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, density: float | None = None
    ) -> None:
        super().__init__(num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"{self._name}: expected top_k in [1, num_experts={num_experts}], got {top_k}"
            )
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"{self._name}: expected density in (0, 1], got {density}")
        self.hidden_size, self.top_k, self.density = hidden_size, top_k, density
        self.projection: Tensor
        self.register_buffer("projection", torch.empty(num_experts, hidden_size))
        self.add_expert_bias()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the projection."""
        density = self.top_k / self.num_experts if self.density is None else self.density
        kept = max(1, int(density * self.hidden_size))
        places = torch.rand_like(self.projection).argsort(-1)[:, :kept]
        values = torch.randn_like(self.projection[:, :kept]) / self.num_experts
        self.projection.zero_().scatter_(1, places, values)

    def route(
        self,
        x: Tensor,
        *,
        valid_mask: Tensor | None,
        indices: Tensor | None = None,
        **context: Any,
    ) -> Routing:
        self.check_hidden_size(x)
        x = self.full_precision(x)
        logits = F.linear(x, self.projection.to(x.dtype))
        if indices is None:
            scores = (logits.detach() + self.expert_bias.to(x.dtype)).abs()
            indices = ops.topk_select(scores, self.top_k, valid_mask=valid_mask)
        elif valid_mask is not None:
            indices = torch.where(valid_mask.unsqueeze(-1), indices, -1)
        taken = indices >= 0
        slots = torch.where(taken, indices, self.num_experts).flatten()
        counts = slots.new_zeros(self.num_experts + 1)
        counts = counts.scatter_add(0, slots, torch.ones_like(slots))[:-1]
        return Routing(taken.to(x.dtype), indices, logits, counts)
