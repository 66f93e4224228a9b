"""Losses of LoRA mixtures: routers sure of their experts, experts that stay what they were."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.balance import first_choices
from torch_routers.losses.base import RouterLoss, full_precision, log_probs
from torch_routers.losses.entropy import entropy
from torch_routers.registry import check_choice
from torch_routers.routing import Routing

USAGES = ("top1", "topk")
ENTROPY_SIGNS = ("penalty", "paper")


def specialization_loss(
    logits: Tensor,
    counts: Tensor,
    *,
    entropy_weight: float = 0.1,
    entropy_sign: Literal["penalty", "paper"] = "penalty",
    valid_mask: Tensor | None = None,
) -> Tensor:
    r"""Balance over all tokens and certainty of each (RSL of LoRA-Mixer, arXiv 2507.00029).

    .. math::
        L = \sum_e P_e f_e \pm \frac{\lambda}{T} \sum_t H_t, \qquad
        P_e = \frac{1}{T} \sum_t p_{te}, \quad f_e = c_e \Big/ \sum_i c_i, \quad
        p_t = \mathrm{softmax}(z_t)

    The gradient goes through :math:`P` and the entropy :math:`H`; :math:`f` is constant. The first
    term has no factor :math:`E`: it is :math:`1/E` at balance.

    The paper contradicts itself about the sign. The text wants a low entropy, for specialised
    experts: that is ``"penalty"``, plus. The printed formula has minus, and thus rewards entropy:
    ``"paper"``. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        counts: ``[num_experts]``, the use of each expert: tokens of which it is the first choice
            (equation 3 of the paper), or slots that it is given (section 3.3).
        entropy_weight: :math:`\lambda`, of which the paper's :math:`\alpha` is divided out.
        entropy_sign: ``"penalty"``, plus, or ``"paper"``, minus.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    Raises:
        ValueError: ``entropy_sign`` does not fit.

    >>> p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    >>> specialization_loss(p.log(), torch.tensor([2, 1, 1]))
    tensor(0.4360)
    >>> specialization_loss(p.log(), torch.tensor([2, 1, 1]), entropy_sign="paper")
    tensor(0.2515)
    """
    check_choice("specialization_loss", "entropy_sign", entropy_sign, ENTROPY_SIGNS)
    log_p, live, tokens = log_probs(logits, valid_mask)
    p = torch.where(live.unsqueeze(-1), log_p.exp(), 0)
    usage = counts.to(p.dtype) / counts.sum().clamp(min=1)
    balance = (p.reshape(-1, p.shape[-1]).sum(0) * usage).sum() / tokens
    factor = entropy_weight if entropy_sign == "penalty" else -entropy_weight
    return balance + factor * entropy(logits, valid_mask)


class SpecializationLoss(RouterLoss):
    r"""`specialization_loss` of one router, over the tokens that chose an expert.

    Args:
        weight: the factor in the objective, :math:`\alpha` of the paper.
        usage: what :math:`f` counts: ``"top1"``, first choices: slot 0, or without slots the
            largest logit; or ``"topk"``, all slots.
        entropy_weight: the paper's :math:`\lambda` over its :math:`\alpha`.
        entropy_sign: as in `specialization_loss`.

    Raises:
        ValueError: an argument that does not fit, or a routing without logits.
    """

    name = "specialization"

    def __init__(
        self,
        weight: float,
        *,
        usage: Literal["top1", "topk"] = "top1",
        entropy_weight: float = 0.1,
        entropy_sign: Literal["penalty", "paper"] = "penalty",
    ) -> None:
        super().__init__(weight)
        check_choice(type(self).__name__, "usage", usage, USAGES)
        check_choice(type(self).__name__, "entropy_sign", entropy_sign, ENTROPY_SIGNS)
        self.usage, self.entropy_weight, self.entropy_sign = usage, entropy_weight, entropy_sign

    def forward(self, routing: Routing) -> Tensor:
        logits, chosen = self.logits_of(routing)
        counts, choice = routing.counts, routing.choice()
        if self.usage == "top1":
            if choice is None:  # a weight for every expert: of those that see the token, the best
                choice = ops.topk_select(logits.detach(), 1, valid_mask=chosen)
            counts = first_choices(choice, routing.num_experts)
        return specialization_loss(
            logits,
            counts,
            entropy_weight=self.entropy_weight,
            entropy_sign=self.entropy_sign,
            valid_mask=chosen,
        )


def route_label(logits: Tensor, labels: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
    r"""The cross-entropy of a router and the experts that tokens ought to have.

    .. math::  L = -\frac{1}{N} \sum_t \ln p_{t, y_t}, \qquad p_t = \mathrm{softmax}(z_t)

    over the :math:`N` tokens with a label: the expert of a known task, as in the hard phase of
    LoRA-Mixer (arXiv 2507.00029). A label whose logit is -inf costs infinitely much; a token whose
    logits are all -inf adds 0. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        labels: ``[...]`` integers; outside ``[0, num_experts)``, such as -1: the token has none.
        valid_mask: ``[...]`` bool, True = real token; the content of others changes nothing.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without labels.

    Raises:
        ValueError: ``labels`` do not fit.

    >>> route_label(torch.zeros(3, 4), torch.tensor([2, 0, -1]))  # ln 4
    tensor(1.3863)
    """
    if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"route_label: expected labels in integers of shape {list(logits.shape[:-1])}, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    labelled = (labels >= 0) & (labels < logits.shape[-1])
    if valid_mask is not None:
        labelled = labelled & valid_mask
    log_p, live, tokens = log_probs(logits, labelled)
    of_tokens = log_p.gather(-1, torch.where(live, labels, 0).long().unsqueeze(-1)).squeeze(-1)
    return -torch.where(live, of_tokens, 0).sum() / tokens


def expert_preservation(parameters: Iterable[Tensor], reference: Iterable[Tensor]) -> Tensor:
    r"""The squared distance of experts from what they were, to keep what they can do.

    .. math::  L = \sum_i \|\theta_i - \theta_i^0\|^2

    Of experts that were trained apart, such as LoRAs of single tasks, and now learn to work
    together (:math:`\beta` of LoRA-Mixer, arXiv 2507.00029). It is a sum, not a mean.

    Args:
        parameters: tensors, such as ``experts.parameters()``.
        reference: as many, of the same shapes, constant: ``[p.detach().clone() for p in …]`` before
            training.

    Returns:
        A scalar, float32 (float64 if there is a float64 parameter); 0 without parameters.

    Raises:
        ValueError: other numbers of tensors, or other shapes.

    >>> expert_preservation([torch.ones(3)], [torch.zeros(3)])
    tensor(3.)
    """
    parameters, reference = list(parameters), list(reference)
    shapes, expected = ([list(p.shape) for p in tensors] for tensors in (reference, parameters))
    if shapes != expected:
        raise ValueError(
            f"expert_preservation: expected reference of the shapes {expected}, got {shapes}"
        )
    squares = (
        (full_precision(now) - before.detach()).square().sum()
        for now, before in zip(parameters, reference)
    )
    return sum(squares, torch.zeros(()))
