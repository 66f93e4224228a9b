"""Routers by which a token gets as many experts as it needs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.ops.entropy_gate import CROSSINGS, ENTROPIES
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routers.dense import dense_statistics
from torch_routers.routing import Routing


class EntropyRouter(Router):
    r"""The most probable experts, or all where the router cannot tell (DynMoLE, arXiv 2504.00661).

    .. math::  p = \mathrm{softmax}(W x), \qquad w_e = p_e \text{ of the kept}, \text{ else } 0

    Experts are kept in descending order while their probabilities sum up to at most ``top_p``, and
    at least ``keep_top_k`` of them; all where the normalised Tsallis entropy of :math:`p` is above
    ``threshold``. Weights are not renormalised. `ops.entropy_gate` has the formulas. The entropy
    decides *how many* experts there are; it is not a score, as in the routers of the entmax family.

    The rules are those of the authors' code (mikecovlee/DynMoLE), which computes all experts for
    every token whatever was kept; `MoE` computes the kept ones alone. There the mean entropy of the
    loss has padding in it, here nothing has.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from; 6 in the paper's experiments.
        entropy: ``"tsallis"`` or ``"renyi"``.
        q: entropic index in (0, 2]; 1 is Shannon's entropy.
        threshold: of the normalised entropy; 1 or more: no token keeps all experts for it.
        top_p: the sum of probabilities to be kept.
        keep_top_k: the least number of experts.
        crossing: whether the expert that crosses ``top_p`` is kept: ``"below"`` (not, DynMoLE),
            ``"reaching"`` or ``"exceeding"``, as in `ops.entropy_gate`.
        renormalize: divide the weights of each token by their sum.
        losses: auxiliary losses; in the paper ``RoutingEntropyLoss(1e-2)`` and
            ``SoftBalanceLoss(1e-3)``.

    ``routing.indices`` is None, ``routing.weights`` ``[..., num_experts]``, ``routing.entropy``
    ``[...]``. ``weight`` is ``[num_experts, hidden_size]``, uniform in
    ``[-1, 1] / sqrt(hidden_size)`` at first, as in their code.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = EntropyRouter(hidden_size=16, num_experts=6)
    >>> routing = router(torch.randn(3, 5, 16))
    >>> routing.weights.shape, routing.entropy.shape
    (torch.Size([3, 5, 6]), torch.Size([3, 5]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        entropy: str = "tsallis",
        q: float = 1.1,
        threshold: float = 0.9,
        top_p: float = 0.75,
        keep_top_k: int = 2,
        crossing: str = "below",
        renormalize: bool = False,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        check_choice(self._name, "entropy", entropy, ENTROPIES)
        check_choice(self._name, "crossing", crossing, CROSSINGS)
        self.hidden_size = hidden_size
        self.entropy, self.q, self.threshold = entropy, q, threshold
        self.top_p, self.keep_top_k, self.crossing = top_p, keep_top_k, crossing
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self._gate(torch.zeros(0, num_experts), None)  # what the operator refuses it refuses now
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

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
        weights, entropy = self._gate(logits, valid_mask)
        active = weights != 0
        counts = active.reshape(-1, self.num_experts).sum(0)
        scores = None
        if self.wants_statistics:
            live = (logits != -torch.inf).any(-1, keepdim=True)  # of others they would be NaN
            if valid_mask is not None:
                live = live & valid_mask.unsqueeze(-1)
            scores = torch.where(live, torch.where(live, logits, 0).softmax(-1), 0)
        statistics = dense_statistics(
            logits,
            scores,
            counts,
            lambda: active,
            valid_mask=valid_mask,
            group_offsets=group_offsets,
            per_sample=self.wants_groups,
        )
        return Routing(weights, None, logits, counts, statistics, entropy=entropy)

    def _gate(self, logits: Tensor, valid_mask: Tensor | None) -> ops.EntropyGate:
        return ops.entropy_gate(
            logits,
            entropy=self.entropy,
            q=self.q,
            threshold=self.threshold,
            top_p=self.top_p,
            keep_top_k=self.keep_top_k,
            crossing=self.crossing,
            renormalize=self.renormalize,
            valid_mask=valid_mask,
        )


class TopPRouter(EntropyRouter):
    r"""The most probable experts until their sum exceeds ``top_p`` (Dynamic MoE, arXiv 2403.07652).

    The expert that crosses is kept; a sum of exactly ``top_p`` does not stop. Weights are the
    probabilities, not renormalised. The paper has ``top_p=0.4``, and as losses
    ``SoftBalanceLoss`` (there with counts, 1e-2) and the Shannon entropy (1e-4).

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_p: from 0, one expert, to 1, all.
        renormalize: divide the weights of each token by their sum.
        losses: auxiliary losses.

    Raises:
        ValueError: an argument that does not fit.

    >>> TopPRouter(hidden_size=16, num_experts=6)(torch.randn(3, 16)).weights.shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_p: float = 0.4,
        renormalize: bool = False,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            q=1.0,
            threshold=1.0,
            top_p=top_p,
            keep_top_k=1,
            crossing="exceeding",
            renormalize=renormalize,
            losses=losses,
        )
