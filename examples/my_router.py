"""A router of your own: cosine similarity with a learned temperature (X-MoE, arXiv 2204.09179).

    python examples/my_router.py
    python -m torch_routers.ablation --router examples/my_router.py:CosineRouter

The ablation builds a router from ``hidden_size``, ``num_experts`` and ``top_k``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_routers as tr


class CosineRouter(tr.Router):
    """Score each expert by the angle between a token and the expert's direction.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token.
        losses: auxiliary losses; by default a balance loss, with which the ablation trains it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        losses: Sequence[tr.losses.RouterLoss] | None = None,
    ) -> None:
        if losses is None:
            losses = [tr.losses.LoadBalanceLoss(1e-2)]
        super().__init__(num_experts, losses)
        self.hidden_size, self.top_k = hidden_size, top_k
        self.directions = nn.Parameter(torch.randn(num_experts, hidden_size))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def route(self, x: Tensor, *, valid_mask: Tensor | None, **context: Any) -> tr.Routing:
        cosines = F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.directions, dim=-1))
        logits = self.log_scale.exp() * cosines
        # One fused, differentiable pass: the best experts, their weights, what the losses read.
        weights, indices, statistics = tr.ops.topk_gate(
            logits, self.top_k, valid_mask=valid_mask, statistics=self.training
        )
        return tr.Routing(weights, indices, logits, statistics.group_counts[0], statistics)


if __name__ == "__main__":
    torch.manual_seed(0)
    router = CosineRouter(hidden_size=16, num_experts=4, top_k=2)
    routing = router(torch.randn(3, 16))
    for token, (experts, weights) in enumerate(
        zip(routing.indices.tolist(), routing.weights.tolist(), strict=True)
    ):
        shares = ", ".join(f"{w:.2f} of expert {e}" for e, w in zip(experts, weights, strict=True))
        print(f"token {token}: {shares}")
    print(f"slots per expert: {routing.counts.tolist()}")
    print(f"load balance: {routing.losses['load_balance'].item():.3f} (1 is even)")
