"""Orthogonality: experts that differ, in the router's eyes or in what they say."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers.losses.base import RouterLoss, full_precision, matmul
from torch_routers.registry import check_choice
from torch_routers.routing import Routing

ROUTER_FORMS = ("l1", "cosine")
EXPERT_FORMS = ("projection", "cosine")
REDUCTIONS = ("mean", "sum")


def router_orthogonality(weight: Tensor, form: Literal["l1", "cosine"] = "l1") -> Tensor:
    r"""How far the rows of a router's weight are from being orthogonal.

    .. math::
        L_{\ell_1} = \sum_{i, j} \big| W W^\top - I \big|_{ij}, \qquad
        L_\mathrm{cosine} = \sum_{i \neq j} (u_i \cdot u_j)^2, \quad u_i = w_i / \|w_i\|

    ``"l1"`` is SimBal (arXiv 2506.14038, equation 4, with :math:`R = W^\top`); it wants rows of
    length 1 too, and its gradient, :math:`2\, \mathrm{sign}(W W^\top - I)\, W`, does not shrink on
    the way. ``"cosine"`` leaves lengths alone. Both are sums over entries, not means. More experts
    than ``hidden_size`` cannot be orthogonal. Written in plain PyTorch.

    Args:
        weight: ``[num_experts, hidden_size]``, such as ``router.weight``.
        form: ``"l1"`` or ``"cosine"``.

    Returns:
        A scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: an argument that does not fit.

    >>> router_orthogonality(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))  # too long by 4 - 1
    tensor(3.)
    >>> router_orthogonality(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "cosine")  # twice 0.6 squared
    tensor(0.7200)
    """
    check_choice("router_orthogonality", "form", form, ROUTER_FORMS)
    if weight.dim() != 2:
        raise ValueError(
            "router_orthogonality: expected weight of shape [num_experts, hidden_size], got "
            f"{list(weight.shape)}"
        )
    weight = full_precision(weight)
    if form == "l1":
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        return (matmul(weight, weight.T) - eye).abs().sum()
    unit = F.normalize(weight, dim=1)
    return torch.where(_pairs(weight), matmul(unit, unit.T), 0).square().sum()


class RouterOrthogonalityLoss(RouterLoss):
    """`router_orthogonality` of the parameter ``weight`` of the router that evaluates it.

    It is of the router, not of tokens: the same for every call, without tokens too, and on every
    rank. One router after the other may have it, since it gets the router with the call.

    Args:
        weight: the factor in the objective; 0.1 in arXiv 2506.14038.
        form: as in `router_orthogonality`.

    Raises:
        ValueError: an argument that does not fit, or a router without such a weight.
    """

    name = "router_orthogonality"
    needs = ("router",)

    def __init__(self, weight: float, *, form: Literal["l1", "cosine"] = "l1") -> None:
        super().__init__(weight)
        check_choice(type(self).__name__, "form", form, ROUTER_FORMS)
        self.form = form

    def forward(self, routing: Routing, router: torch.nn.Module | None = None) -> Tensor:
        weight = getattr(router, "weight", None)
        if weight is None or weight.dim() != 2:
            raise ValueError(
                "RouterOrthogonalityLoss: expected a router with a weight [num_experts, "
                f"hidden_size], got {type(router).__name__}"
            )
        return router_orthogonality(weight, self.form)


def expert_orthogonality(
    outputs: Tensor,
    used: Tensor | None = None,
    *,
    form: Literal["projection", "cosine"] = "projection",
    reduction: Literal["mean", "sum"] = "mean",
    eps: float = 1e-8,
) -> Tensor:
    r"""How alike the outputs of the experts are that a token chose.

    Of the ordered pairs :math:`(j, k)`, :math:`j \neq k`, of used slots of a token,
    ``"projection"`` takes the square of what one output has in the direction of the other,

    .. math::
        \Big\| \frac{\langle o_j, o_k \rangle}{\langle o_k, o_k \rangle + \epsilon}\, o_k \Big\|^2

    (arXiv 2505.22323, equation 6), which sees the length of :math:`o_j` but hardly that of
    :math:`o_k`; ``"cosine"`` the cosine of both (CompeteSMoE), whose mean over a token's pairs its
    code divides by :math:`k^2` instead of :math:`k (k - 1)`. The gradient goes to both outputs.
    Written in plain PyTorch.

    Args:
        outputs: ``[..., k, hidden_size]``, what the expert of each slot returned for the token.
        used: ``[..., k]`` bool, the slots to look at, such as ``routing.indices >= 0``; the content
            of others changes nothing. Default: all.
        form: ``"projection"`` or ``"cosine"``.
        reduction: ``"mean"`` over all pairs of all tokens; or their ``"sum"``, as in the papers'
            formula, which grows with the tokens.
        eps: :math:`\epsilon`, added to the square of a length.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without pairs.

    Raises:
        ValueError: an argument that does not fit.

    >>> outputs = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # 9/25 of 1, 9 of 25
    >>> expert_orthogonality(outputs, reduction="sum")
    tensor(9.3600)
    >>> expert_orthogonality(outputs, form="cosine")
    tensor(0.6000)
    """
    check_choice("expert_orthogonality", "form", form, EXPERT_FORMS)
    check_choice("expert_orthogonality", "reduction", reduction, REDUCTIONS)
    if used is None:
        used = torch.ones_like(outputs[..., 0], dtype=torch.bool)
    if used.dtype != torch.bool or used.shape != outputs.shape[:-1]:
        raise ValueError(
            f"expert_orthogonality: expected used in bool of shape {list(outputs.shape[:-1])}, "
            f"got {used.dtype} of shape {list(used.shape)}"
        )
    outputs = torch.where(used.unsqueeze(-1), full_precision(outputs), 0)
    squares = outputs.square().sum(-1, keepdim=True)
    if form == "cosine":
        unit = outputs * (squares + eps).rsqrt()
        alike = matmul(unit, unit.mT)
    else:  # each pair is there in both orders, so either length may divide
        alike = (matmul(outputs, outputs.mT) / (squares + eps)).square() * squares
    pairs = used.unsqueeze(-1) & used.unsqueeze(-2) & _pairs(outputs)
    total = torch.where(pairs, alike, 0).sum()
    return total / pairs.sum().clamp(min=1) if reduction == "mean" else total


def _pairs(rows: Tensor) -> Tensor:
    """``[n, n]`` bool for ``[..., n, size]``: two different rows."""
    return ~torch.eye(rows.shape[-2], dtype=torch.bool, device=rows.device)
