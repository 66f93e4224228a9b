"""Noisy top-k: how loud the noise of a token's logits is, is learned."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers.losses import RouterLoss
from torch_routers.noise import Noise, Stream
from torch_routers.routers.base import RouterTraits
from torch_routers.routers.topk import TopKRouter


class NoisyTopKRouter(TopKRouter):
    r"""The router of the sparsely-gated mixture of experts (Shazeer et al., arXiv 1701.06538).

    .. math::  z = W x + \varepsilon \odot \sigma, \qquad
               \sigma = \mathrm{softplus}(W_\mathrm{noise}\, x) + \sigma_0, \qquad
               \varepsilon_e \sim \mathcal N(0, 1)

    in training; in eval mode :math:`z = W x`. The :math:`k` largest :math:`z` are chosen, and
    weighed by their softmax. The noise lets experts that are almost as good be tried, and makes the
    expected load of each expert differentiable: `losses.LoadLoss` reads it from
    ``routing.load``.

    Both weights begin as zeros, as in the paper, so that at first all experts are equally likely
    and the noise decides. The widely used code of davidmrau/mixture-of-experts compares
    probabilities with logits in its load, which makes that loss meaningless; here both are logits.

    Args:
        hidden_size: size of the last dimension of the input.
        num_experts: experts to choose from.
        top_k: experts per token, in ``[1, num_experts]``.
        min_noise: :math:`\sigma_0`, 1e-2 in the reference code.
        capacity_factor, drop_policy: as in `TopKRouter`.
        losses: auxiliary losses; in the paper ``ImportanceLoss(0.1, of="weights")`` and
            ``LoadLoss(0.1)``.

    ``weight`` and ``noise_weight`` are ``[num_experts, hidden_size]``. A call takes what that of a
    `TopKRouter` does.

    Raises:
        ValueError: an argument that does not fit.

    >>> from torch_routers.losses import LoadLoss
    >>> router = NoisyTopKRouter(16, 4, 2, losses=[LoadLoss(0.1)])
    >>> router(torch.randn(9, 16)).load.shape
    torch.Size([4])
    """

    traits = RouterTraits(random=True)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        min_noise: float = 1e-2,
        capacity_factor: float | None = None,
        drop_policy: str = "position",
        losses: Sequence[RouterLoss] = (),
    ) -> None:
        if not min_noise > 0:
            raise ValueError(f"NoisyTopKRouter: expected min_noise > 0, got {min_noise}")
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            capacity_factor=capacity_factor,
            drop_policy=drop_policy,
            losses=losses,
        )
        self.min_noise = min_noise
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weight, getattr(self, "noise_weight", None):
            if weight is not None:
                nn.init.zeros_(weight)

    def logits(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        clean = F.linear(x, self.weight.to(x.dtype))
        if noise is None:
            return clean, None, None
        sigma = F.softplus(F.linear(x, self.noise_weight.to(x.dtype))) + self.min_noise
        return clean + sigma * noise.normal(Stream.LOGITS, self.num_experts), clean, sigma
