"""Load: experts that would receive equally many tokens, whatever the noise."""

from typing import Literal

import torch
from torch import Tensor

from torch_routers.losses.base import RouterLoss
from torch_routers.losses.importance import importance
from torch_routers.routing import Routing

THRESHOLDS = ("kth_excluding", "kth")


def expected_load(
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    top_k: int,
    *,
    valid_mask: Tensor | None = None,
    threshold: Literal["kth_excluding", "kth"] = "kth_excluding",
) -> Tensor:
    r"""How many tokens each expert is expected to get, if its own noise were drawn anew.

    .. math::  \mathrm{Load}_e = \sum_t \Phi\Big(\frac{z_{te} - \theta_{te}}{\sigma_{te}}\Big)

    with :math:`z` the logits without noise, :math:`\Phi` the normal distribution and
    :math:`\theta` what a noisy logit must exceed for its expert to be among the ``top_k``. The
    gradient goes to all three inputs, to ``noisy`` where it is the threshold. With ``top_k`` equal
    to the number of experts every expert gets every token, and the gradient is 0. Written in plain
    PyTorch.

    Args:
        clean: ``[..., num_experts]``, the logits without noise, finite.
        noisy: ``[..., num_experts]``, the logits by which experts were chosen.
        sigma: the standard deviation of the noise, positive, of a shape that broadcasts to
            ``clean``.
        top_k: experts per token, in ``[1, num_experts]``.
        valid_mask: ``[...]`` bool, True = real token; the others are in no sum.
        threshold: ``"kth_excluding"``: the k-th largest noisy logit of the *other* experts, thus
            the (k+1)-th of all where the expert is among the k (arXiv 1701.06538). ``"kth"``: the
            k-th of all, for every expert (V-MoE, arXiv 2106.05974, and Tutel, whose ``sigma`` is
            the noise over ``num_experts``).

    Returns:
        ``[num_experts]`` float32 (float64 for float64 logits).

    Raises:
        ValueError: an argument that does not fit.

    >>> clean, noisy = torch.tensor([1.0, 0.2, -0.3, 0.5]), torch.tensor([1.1, 0.6, -0.5, 0.4])
    >>> expected_load(clean, noisy, torch.tensor(0.5), top_k=2)
    tensor([0.8849, 0.3446, 0.0359, 0.4207])
    """
    num_experts = clean.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"expected_load: expected top_k in [1, num_experts={num_experts}], got {top_k}"
        )
    if threshold not in THRESHOLDS:
        raise ValueError(
            f"expected_load: expected threshold in {list(THRESHOLDS)}, got {threshold!r}"
        )
    if noisy.shape != clean.shape:
        raise ValueError(
            f"expected_load: expected noisy of shape {list(clean.shape)}, that of clean, "
            f"got {list(noisy.shape)}"
        )
    clean, noisy, sigma = (
        x if x.dtype == torch.float64 else x.float() for x in (clean, noisy, sigma)
    )
    if valid_mask is None:
        valid_mask = torch.ones_like(clean[..., 0], dtype=torch.bool)
    valid = valid_mask.unsqueeze(-1)  # applied before any arithmetic: what is masked may be NaN
    clean, noisy, sigma = (torch.where(valid, x, 1) for x in (clean, noisy, sigma))
    if top_k == num_experts:
        chances = torch.where(valid, 1, clean)  # has a gradient, which is zero
    else:
        best = noisy.topk(top_k + 1, dim=-1).values
        to_enter, to_stay = best[..., top_k - 1 : top_k], best[..., top_k:]
        if threshold == "kth_excluding":
            to_enter = torch.where(noisy > to_stay, to_stay, to_enter)
        chances = torch.special.ndtr((clean - to_enter) / sigma)
    chances = torch.where(valid, chances, 0)
    return chances.reshape(-1, num_experts).sum(0)


class LoadLoss(RouterLoss):
    r"""The squared coefficient of variation of ``routing.load``, as `expected_load` computes it.

    .. math::  L = \frac{\mathrm{Var}_e(\mathrm{Load}_e)}{\mathrm{mean}_e(\mathrm{Load}_e)^2}

    Like `importance`, but of what experts receive: equal scores may come from many tokens or from
    a few (arXiv 1701.06538). Routers with noise compute the load, in training.

    Args:
        weight: the factor in the objective; 0.1 in the paper.
        unbiased: divide the variance by ``num_experts - 1`` instead of ``num_experts``.

    Raises:
        ValueError: the routing has no load.
    """

    name = "load"

    def __init__(self, weight: float, unbiased: bool = False) -> None:
        super().__init__(weight)
        self.unbiased = unbiased

    def forward(self, routing: Routing) -> Tensor:
        if routing.load is None:
            raise ValueError(
                "LoadLoss: expected a routing with load, got none. Routers with noise compute it "
                "in training"
            )
        return importance(routing.load, unbiased=self.unbiased)
