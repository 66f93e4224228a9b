"""A router by which sure tokens get few experts, and others more."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops
from torch_routers.losses import RouterLoss
from torch_routers.registry import check_choice
from torch_routers.routers.base import Router
from torch_routers.routers.topk import sample_offsets
from torch_routers.routing import Routing


class AdaptiveKRouter(Router):
    r"""One of a few numbers of experts, by how sure the router is of a token.

    .. math::  k = k_i, \quad i = \#\{j : \tau_j \le H\}, \qquad H = -\sum_e p_e \ln p_e, \qquad
               p = \mathrm{softmax}(W x)

    and then the best :math:`k` experts with the renormalised softmax of `TopKRouter`. An entropy of
    exactly :math:`\tau_j` has reached it. With ``measure="confidence"`` it is :math:`\max_e p_e`
    that the thresholds are for, and numbers usually descend.

    The rule is that of Adaptive-K routing, a third-party proposal that sets thresholds on a trained
    model and has no paper; it has :math:`k` in (1, 2) and a threshold of 1.275 for Mixtral, which
    are the defaults, and (2, 4, 8) and (1.3, 1.7) elsewhere. `calibrate_thresholds` finds others.
    Their entropy has 1e-9 added to :math:`p`, ours :math:`0 \ln 0 = 0`. The rule of LaDiMo (arXiv
    2408.04278), one expert where the best one is sure enough, else ``k``, is
    ``measure="confidence"``, ``top_ks=(k, 1)``. (Ada-K, arXiv 2410.10456, learns :math:`k`: it is
    another method.) Thresholds have no gradient.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_ks: numbers of experts, each in ``[1, num_experts]``, one more than thresholds.
        thresholds: ascending, of the entropy in nats, at most :math:`\ln E`; or of the largest
            probability.
        measure: ``"entropy"`` or ``"confidence"``.
        renormalize: make the weights of each token sum to 1.
        losses: auxiliary losses, such as ``LoadBalanceLoss(1e-2)``.

    ``routing.indices`` is ``[..., max(top_ks)]``, best first, -1 behind a token's last expert.
    ``weight`` is ``[num_experts, hidden_size]``, initialised from a normal distribution of standard
    deviation 0.02.

    Call it with ``group_offsets`` ``[groups + 1]`` int64, where sequences begin in the flattened
    tokens, for sequence-wise losses.

    Raises:
        ValueError: an argument that does not fit.

    >>> router = AdaptiveKRouter(16, 8, top_ks=(1, 2, 4), thresholds=(0.6, 2.0))
    >>> router(torch.randn(3, 5, 16)).indices.shape
    torch.Size([3, 5, 4])
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_ks: Sequence[int] = (1, 2),
        thresholds: Sequence[float] = (1.275,),
        measure: str = "entropy",
        renormalize: bool = True,
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        super().__init__(num_experts, losses)
        check_choice(self._name, "measure", measure, ("entropy", "confidence"))
        top_ks, thresholds = list(top_ks), list(thresholds)
        if len(top_ks) != len(thresholds) + 1:
            raise ValueError(
                f"{self._name}: expected one of top_ks more than thresholds={thresholds}, "
                f"got {top_ks}"
            )
        if not all(1 <= top_k <= num_experts for top_k in top_ks):
            raise ValueError(
                f"{self._name}: expected top_ks in [1, num_experts={num_experts}], got {top_ks}"
            )
        self.hidden_size = hidden_size
        self.top_ks, self.thresholds, self.measure = top_ks, thresholds, measure
        self.renormalize = renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self._place_steps()
        # What the operator refuses it refuses now.
        ops.ragged_select(
            torch.zeros(0, num_experts), measure, thresholds=thresholds, counts=top_ks
        )
        self.reset_parameters()

    @property
    def top_k(self) -> int:
        """Slots per token, the largest of ``top_ks``."""
        return max(self.top_ks)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

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
        thresholds, top_ks = self._steps
        indices = ops.ragged_select(
            logits,
            self.measure,
            thresholds=thresholds,
            counts=top_ks,
            max_k=self.top_k,
            valid_mask=valid_mask,
        )
        if group_offsets is None and self.wants_groups:
            group_offsets = sample_offsets(logits)
        weights, statistics = ops.gate(
            logits,
            indices,
            renormalize=self.renormalize,
            valid_mask=valid_mask,
            group_offsets=group_offsets,
            statistics=self.wants_statistics,
        )
        counts = statistics.group_counts.sum(0)
        return Routing(weights, indices, logits, counts, statistics)

    def _place_steps(self) -> None:
        """Thresholds and numbers where the weight is; no buffers, which a cast would round."""
        device = self.weight.device
        self._steps = (
            torch.tensor(self.thresholds, dtype=torch.float64, device=device),
            torch.tensor(self.top_ks, device=device),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptiveKRouter":
        super()._apply(fn, recurse)
        self._place_steps()
        return self


def calibrate_thresholds(measured: Tensor, top_ks: Sequence[int], mean_top_k: float) -> list[float]:
    r"""Thresholds for an `AdaptiveKRouter` that give a trained model a mean number of experts.

    They are quantiles of what was measured on tokens of the model's own data: the entropies, or the
    largest probabilities. Of all ways to share the tokens out among the numbers :math:`k_i` with
    that mean, the evenest is taken, with shares :math:`\propto e^{\lambda k_i}`; for two numbers
    there is but one.

    Args:
        measured: any shape, of real tokens alone.
        top_ks: the numbers of experts, as the router gets them.
        mean_top_k: the mean number of experts, from the least of ``top_ks`` to the largest.

    Returns:
        ``len(top_ks) - 1`` ascending thresholds. With equal values among ``measured`` the mean is
        met as nearly as these allow.

    Raises:
        ValueError: an argument that does not fit.

    >>> entropies = torch.arange(8) / 4
    >>> calibrate_thresholds(entropies, (1, 2), 1.25)  # a quarter gets two
    [1.5]
    """
    low, high = min(top_ks), max(top_ks)
    if measured.numel() == 0 or not bool(measured.isfinite().all()):
        raise ValueError(
            "calibrate_thresholds: expected measured to be finite numbers, at least one, got "
            f"{measured.numel()} of shape {list(measured.shape)}"
        )
    if not low <= mean_top_k <= high:
        raise ValueError(
            f"calibrate_thresholds: expected mean_top_k in [{low}, {high}], got {mean_top_k}"
        )
    shares = _shares([k - low for k in top_ks], mean_top_k - low)
    levels = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1].clamp(max=1)
    ordered = measured.detach().double().flatten().sort().values
    ranks = (levels * ordered.numel()).round().long()
    # Nothing reaches what comes behind the largest.
    above = math.nextafter(ordered[-1].item(), math.inf)
    ordered = torch.cat([ordered, ordered.new_tensor([above])])
    return [ordered[rank].item() for rank in ranks.tolist()]


def _shares(numbers: list[int], mean: float) -> list[float]:
    """Shares proportional to exp(slope * number) with this mean; by bisection."""

    def of(slope: float) -> list[float]:
        largest = max(slope * number for number in numbers)
        powers = [math.exp(slope * number - largest) for number in numbers]
        return [power / sum(powers) for power in powers]

    low, high = -800.0, 800.0
    for _ in range(100):
        middle = (low + high) / 2
        shares = of(middle)
        too_small = sum(s * n for s, n in zip(shares, numbers, strict=True)) < mean
        low, high = (middle, high) if too_small else (low, middle)
    return shares
