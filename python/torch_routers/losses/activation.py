"""Losses of routers whose experts are active or not, several per token: BlockFFN, ReMoE.

Those that look at neighbouring tokens are in `neighbours` and `chunks`.
"""

import torch
from torch import Tensor

from torch_routers import ops
from torch_routers.losses.base import RouterLoss, full_precision, valid_tokens
from torch_routers.routing import Routing


def activation_probs(
    logits: Tensor, valid_mask: Tensor | None = None, *, eps: float = 1e-5, norm: str = "rms"
) -> Tensor:
    r"""How a token's activation is shared by experts, :math:`p_e = h_e / (\sum_i h_i + 10^{-5})`.

    :math:`h` is the normalised activation, what `ops.relu_rms_gate` returns for gains of 1.

    Args:
        logits: ``[..., num_experts]``.
        valid_mask: ``[...]`` bool, True = real token; the others have probabilities 0.
        eps, norm: as in `ops.relu_rms_gate`.

    Returns:
        ``[..., num_experts]``, float32 (float64 for float64 logits), never in a half type.

    >>> activation_probs(torch.tensor([0.6, -0.2, 0.3, 0.0]))
    tensor([0.6667, 0.0000, 0.3333, 0.0000])
    """
    gain = logits.new_ones(logits.shape[-1], dtype=torch.promote_types(logits.dtype, torch.float32))
    h = ops.relu_rms_gate(logits, gain, eps=eps, norm=norm, valid_mask=valid_mask).weights
    return h / (h.sum(-1, keepdim=True) + 1e-5)


def activation_entropy(probs: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
    r"""The mean entropy of how a token's activation is shared (code of BlockFFN, arXiv 2507.08771).

    .. math::  L = -\frac{1}{T} \sum_{t, e} p_{te} \ln (p_{te} + 10^{-5})

    An expert that is not active adds 0 and has no gradient. Written in plain PyTorch.

    Args:
        probs: ``[..., num_experts]``, such as those of `activation_probs`, in any floating dtype.
        valid_mask: ``[...]`` bool, True = real token.

    Returns:
        A scalar, float32 (float64 for float64 input); 0 without tokens.

    >>> activation_entropy(activation_probs(torch.tensor([0.6, -0.2, 0.3, 0.0])))
    tensor(0.6365)
    """
    valid = valid_tokens(probs, valid_mask)
    p = torch.where(valid.unsqueeze(-1), full_precision(probs), 0)
    return -(p * (p + 1e-5).log()).sum() / valid.sum().clamp(min=1)


def relu_sparsity(logits: Tensor, top_k: int, *, valid_mask: Tensor | None = None) -> Tensor:
    r"""The balanced L1 loss of ReMoE (arXiv 2412.14711, equations 7 and 10).

    .. math::
        L = \frac{E}{T^2 k} \sum_e c_e \sum_t a_{te}, \qquad a = \mathrm{ReLU}(z), \quad
        c_e = \sum_t 1[a_{te} > 0]

    Counts are constants. Its factor is to be adapted: `AdaptiveSparsity`. Written in plain PyTorch.

    Args:
        logits: ``[..., num_experts]``.
        top_k: :math:`k`, active experts per token to aim for.
        valid_mask: ``[...]`` bool, True = real token.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 without tokens.

    >>> relu_sparsity(torch.tensor([[1.0, -1.0], [2.0, 1.0]]), 1)
    tensor(3.5000)
    """
    valid = valid_tokens(logits, valid_mask)
    experts = logits.shape[-1]
    a = torch.where(valid.unsqueeze(-1), full_precision(logits), 0).relu().reshape(-1, experts)
    counts = (a > 0).sum(0)
    tokens = valid.sum().clamp(min=1).to(a.dtype)
    return (a.sum(0) * counts).sum() * experts / (tokens.square() * top_k)


class DenseLoss(RouterLoss):
    """Reads the logits of a `ReLURouter`, where a masked token is a row of -inf."""

    def logits_of(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The logits, and which tokens are real."""
        if routing.logits is None or routing.indices is not None:
            raise ValueError(
                f"{type(self).__name__}: expected a dense routing with logits, such as that of a "
                "ReLURouter, got another"
            )
        return routing.logits, (routing.logits != -torch.inf).any(-1)


class SequenceLoss(DenseLoss):
    """A `DenseLoss` along the tokens of sequences, and of the documents in them."""

    def sequences_of(self, routing: Routing) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits ``[..., tokens, num_experts]``, which tokens are real, and their documents."""
        logits, valid = self.logits_of(routing)
        group_ids = routing.group_ids()
        if logits.dim() > 1:
            return logits, valid, group_ids
        return logits[None], valid[None], None if group_ids is None else group_ids[None]


class ActivationEntropyLoss(DenseLoss):
    """`activation_entropy` of one router: minimised, few experts have all of the activation.

    Args:
        weight: the factor in the objective; 0 in the released recipes of BlockFFN.
        eps: of the normalisation, as in the router.

    Raises:
        ValueError: the routing is not dense.
    """

    name = "activation_entropy"

    def __init__(self, weight: float, *, eps: float = 1e-5) -> None:
        super().__init__(weight)
        self.eps = eps

    def forward(self, routing: Routing) -> Tensor:
        logits, valid = self.logits_of(routing)
        probs = activation_probs(logits, valid, eps=self.eps)
        return activation_entropy(probs, valid_mask=valid)


class ReLUSparsityLoss(DenseLoss):
    """`relu_sparsity` of one router; ``weight`` is moved by `AdaptiveSparsity`.

    Args:
        weight: the factor in the objective; at first 1e-8 in the paper.
        top_k: active experts per token to aim for.

    Raises:
        ValueError: an argument that does not fit, or the routing is not dense.
    """

    name = "relu_sparsity"

    def __init__(self, weight: float, top_k: int) -> None:
        super().__init__(weight)
        if top_k < 1:
            raise ValueError(f"ReLUSparsityLoss: expected top_k >= 1, got {top_k}")
        self.top_k = top_k

    def forward(self, routing: Routing) -> Tensor:
        logits, valid = self.logits_of(routing)
        return relu_sparsity(logits, self.top_k, valid_mask=valid)


class WeightL1Loss(RouterLoss):
    r"""The L1 norm of the weights, :math:`\sum_{t, e} |y_{te}|` (code of BlockFFN).

    A sum, not a mean: it grows with the tokens of a call. Weights that are 0 have no gradient, and
    those of masked tokens are 0. The norm of a `ReLURouter` fixes the sum of their squares, so that
    it falls as fewer experts share it; a smaller gain lowers it too, and makes nothing sparse.

    Args:
        weight: the factor in the objective, 1e-8 in the reference code (thunlp/BlockFFN), and
            switched off in the released recipes. A schedule may move it.

    >>> WeightL1Loss(1e-8)(Routing(torch.tensor([[1.5, 0.0], [-0.5, 2.0]])))
    tensor(4.)
    """

    name = "weight_l1"

    def forward(self, routing: Routing) -> Tensor:
        return routing.weights.abs().sum()
