"""Losses of a token and the next: that they have the same experts, and equally many."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_routers.losses.activation import SequenceLoss
from torch_routers.losses.base import full_precision, valid_tokens
from torch_routers.routing import Routing


def activation_locality(
    logits: Tensor,
    *,
    sharpness: float = 100.0,
    detach_target: bool = False,
    valid_mask: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    r"""How unlike the activation of a token is to that of the next (BlockFFN, arXiv 2507.08771).

    .. math::
        L = \frac{1}{M} \sum_{t, e} \mathrm{softplus}(u) - u v, \qquad
        u = \alpha z_{t-1, e}, \quad v = \sigma(\alpha z_{te})

    the cross-entropy of both, over the :math:`M` elements of the pairs of neighbours. It sees
    logits before the ReLU, and hence can revive an expert. Written in plain PyTorch.

    Args:
        logits: ``[..., tokens, num_experts]``; each row of the leading dimensions is a sequence.
        sharpness: :math:`\alpha`, 100 in the paper.
        detach_target: keep the gradient from the later token, :math:`v`. The reference code does
            not: there the later token is pushed too.
        valid_mask: ``[..., tokens]`` bool, True = real token; pairs with another are left out.
        group_ids: ``[..., tokens]`` integers, the document of each token; pairs stay within one.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without pairs.

    >>> z = torch.tensor([[0.5, -0.3], [0.2, 0.4], [-0.1, 0.6]])
    >>> activation_locality(z, sharpness=2)
    tensor(0.7138)
    """
    z, pairs = _pairs(logits, sharpness, valid_mask, group_ids)
    target = z[..., 1:, :].sigmoid()
    if detach_target:
        target = target.detach()
    u = z[..., :-1, :]
    of_pairs = (F.softplus(u) - u * target).mean(-1)
    return torch.where(pairs, of_pairs, 0).sum() / pairs.sum().clamp(min=1)


def token_balance(
    logits: Tensor,
    *,
    sharpness: float = 100.0,
    valid_mask: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    r"""How unlike the number of active experts of a token is to that of the next.

    .. math::
        L = \frac{1}{|P|} \sum_{(t-1, t) \in P} (n_{t-1} - n_t)^2, \qquad
        n_t = \frac{1}{E} \sum_e \sigma(\alpha z_{te})

    over the pairs :math:`P` of neighbours; :math:`n` is the share of active experts, softly. Both
    tokens of a pair have a gradient. From the reference code of BlockFFN (thunlp/BlockFFN, arXiv
    2507.08771), where it is a mean over all pairs of a batch too. Written in plain PyTorch.

    Args:
        logits: ``[..., tokens, num_experts]``; each row of the leading dimensions is a sequence.
        sharpness: :math:`\alpha`, 100 in the reference code.
        valid_mask, group_ids: as in `activation_locality`.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without pairs.

    >>> token_balance(torch.tensor([[5.0, -5.0], [5.0, 5.0], [5.0, -5.0]]))
    tensor(0.2500)
    """
    z, pairs = _pairs(logits, sharpness, valid_mask, group_ids)
    active = z.sigmoid().mean(-1)
    change = active[..., 1:] - active[..., :-1]
    return torch.where(pairs, change.square(), 0).sum() / pairs.sum().clamp(min=1)


def _pairs(
    logits: Tensor, sharpness: float, valid_mask: Tensor | None, group_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sharpened logits, 0 where masked, and ``[..., tokens - 1]`` which neighbours count."""
    valid = valid_tokens(logits, valid_mask)
    pairs = valid[..., 1:] & valid[..., :-1]
    if group_ids is not None:
        pairs = pairs & (group_ids[..., 1:] == group_ids[..., :-1])
    return sharpness * torch.where(valid.unsqueeze(-1), full_precision(logits), 0), pairs


class ActivationLocalityLoss(SequenceLoss):
    """`activation_locality` of one router, along the last but one dimension of its logits.

    Pairs stay within a sequence, and within a document where the router is told ``group_offsets``.

    Args:
        weight: the factor in the objective; 2e-3 in the paper, 1e-3 for its 0.8B model.
        sharpness, detach_target: as in `activation_locality`.

    Raises:
        ValueError: the routing is not dense.
    """

    name = "activation_locality"

    def __init__(
        self, weight: float, sharpness: float = 100.0, detach_target: bool = False
    ) -> None:
        super().__init__(weight)
        self.sharpness, self.detach_target = sharpness, detach_target

    def forward(self, routing: Routing) -> Tensor:
        logits, valid, group_ids = self.sequences_of(routing)
        return activation_locality(
            logits,
            sharpness=self.sharpness,
            detach_target=self.detach_target,
            valid_mask=valid,
            group_ids=group_ids,
        )


class TokenBalanceLoss(SequenceLoss):
    """`token_balance` of one router, so that a token has as many experts as the one before.

    Pairs stay within a sequence, and within a document where the router is told ``group_offsets``.

    Args:
        weight: the factor in the objective; 0 in the released recipes of BlockFFN.
        sharpness: as in `token_balance`.

    Raises:
        ValueError: the routing is not dense.
    """

    name = "token_balance"

    def __init__(self, weight: float, *, sharpness: float = 100.0) -> None:
        super().__init__(weight)
        self.sharpness = sharpness

    def forward(self, routing: Routing) -> Tensor:
        logits, valid, group_ids = self.sequences_of(routing)
        return token_balance(
            logits, sharpness=self.sharpness, valid_mask=valid, group_ids=group_ids
        )
