r"""The ReLU-RMSNorm gate: every expert with a positive logit, weighed by the normalised logit."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_routers.ops import _relu_rms_gate_rules
from torch_routers.ops._check import check, check_dtype


class ReLUGate(NamedTuple):
    """What `relu_rms_gate` returns."""

    weights: Tensor
    """``[..., num_experts]`` float32 (float64 for float64 logits), differentiable; 0 where the
    expert is not active."""
    inverse_rms: Tensor
    """``[...]`` in the dtype of the weights, without gradient: what each row was multiplied by; 1
    for ``norm="simple"``, 0 for a masked token."""
    counts: Tensor
    """``[num_experts]`` int64: the tokens for which each expert is active."""


def relu_rms_gate(
    logits: Tensor,
    gain: Tensor,
    *,
    eps: float = 1e-5,
    norm: Literal["rms", "centered", "simple"] = "rms",
    valid_mask: Tensor | None = None,
) -> ReLUGate:
    r"""The weights of the experts that a token activates, a number of its own per token.

    .. math::
        a = \mathrm{ReLU}(z), \qquad
        h = \frac{a}{\sqrt{\frac{1}{E} \sum_e a_e^2 + \epsilon}}, \qquad
        y = \gamma \odot h

    An expert is active where :math:`a_e > 0`, whatever the sign of its gain. Weights are not
    normalised to 1. The gradient reaches active experts alone: a row without any has weights and
    gradient 0. Without a derivative at 0, its subgradient 0 is taken.

    Logits that are NaN make all weights of their token NaN (its own alone for ``"simple"``); so
    does +inf for its own weight. In float32 the squares of logits beyond 1e19 overflow, and weights
    become 0.

    Args:
        logits: ``[..., num_experts]``, float32, float64, bfloat16 or float16; computed in float32
            or float64.
        gain: ``[num_experts]``, :math:`\gamma`, in a floating dtype.
        eps: :math:`\epsilon`, in [1e-30, 1e30].
        norm: ``"rms"`` as above. ``"centered"``: the mean :math:`m` of :math:`a` over all experts
            is subtracted, and :math:`h = (a - m) / \sqrt{\frac{1}{E}\sum_e (a_e - m)^2 + \epsilon}`
            for active experts; the others keep 0, or nothing would be sparse. An active expert
            whose activation is exactly the mean has the weight 0. ``"simple"``: :math:`h = a`.
        valid_mask: ``[...]`` bool, True = real token; a masked token has weights 0, no gradient, is
            counted nowhere, and its content changes nothing.

    Returns:
        `ReLUGate`.

    Raises:
        ValueError: an argument that does not fit.

    Source: BlockFFN (arXiv 2507.08771), equations of its router. The kernel of the reference code
    takes weights > 0 as active, which drops experts of negative gain that its training keeps; here
    an active expert is one with :math:`a_e > 0`.

    >>> gate = relu_rms_gate(torch.tensor([[3.0, -1.0, 4.0, 0.0]]), torch.ones(4))
    >>> gate.weights, gate.counts
    (tensor([[1.2000, 0.0000, 1.6000, 0.0000]]), tensor([1, 0, 1, 0]))
    """
    op = "relu_rms_gate"
    if norm not in _relu_rms_gate_rules.NORMS:
        raise ValueError(
            f"{op}: expected norm among {list(_relu_rms_gate_rules.NORMS)}, got {norm!r}"
        )
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected logits of shape [..., num_experts] with num_experts >= 1, "
            f"got {list(logits.shape)}"
        )
    if valid_mask is not None:
        if valid_mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"{op}: expected valid_mask of shape {list(logits.shape[:-1])}, one value per "
                f"token, got {list(valid_mask.shape)}"
            )
        valid_mask = valid_mask.reshape(-1)
    if gain.is_floating_point():  # half types are converted; another dtype is an error of the op
        gain = gain.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weights, inverse_rms, counts = _relu_rms_gate_rules.relu_rms_gate(
        logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1]),
        gain,
        eps,
        _relu_rms_gate_rules.NORMS.index(norm),
        valid_mask,
    )
    if logits.dim() != 2:
        weights, inverse_rms = weights.view(logits.shape), inverse_rms.view(logits.shape[:-1])
    return ReLUGate(weights, inverse_rms, counts)


# ---- shapes --------------------------------------------------------------------------------------


@torch.library.register_fake("torch_routers::relu_rms_gate")
def _fake(logits, gain, eps, norm, valid_mask):
    op = "relu_rms_gate"
    check_dtype(op, "logits", logits, torch.float32, torch.float64, torch.bfloat16, torch.float16)
    tokens, experts = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    check_dtype(op, "gain", gain, dtype)
    check(
        gain.dim() == 1 and gain.shape[0] == experts,
        lambda: (
            f"{op}: expected gain of shape [{experts}], one value per expert, "
            f"got {list(gain.shape)}"
        ),
    )
    if valid_mask is not None:
        check_dtype(op, "valid_mask", valid_mask, torch.bool)
    check(1e-30 <= eps <= 1e30, lambda: f"{op}: expected eps in [1e-30, 1e30], got {eps:g}")
    return (
        logits.new_empty(tokens, experts, dtype=dtype),
        logits.new_empty(tokens, dtype=dtype),
        logits.new_empty(experts, dtype=torch.int64),
    )


@torch.library.register_fake("torch_routers::_relu_rms_gate_backward")
def _backward_fake(grad, logits, gain, eps, norm, valid_mask):
    return torch.empty_like(logits, memory_format=torch.contiguous_format), gain.new_empty(
        gain.shape
    )
