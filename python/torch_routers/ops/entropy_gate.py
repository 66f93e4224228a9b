r"""As many experts as a token needs: by their probabilities, and by the entropy of these.

.. math::
    p = \mathrm{softmax}(z), \qquad
    H = \frac{1 - \sum_e p_e'^q}{1 - E^{1 - q}}, \qquad p' = p + \varepsilon, \qquad
    w_e = \begin{cases} p_e & \text{kept} \\ 0 & \text{else} \end{cases}

``csrc/entropy_gate/entropy_gate_kernel.h`` says which are kept, and has the derivatives.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_routers._autograd import differentiable, jvp, vmap_by_rows
from torch_routers.ops._check import check, check_dtype

_op = torch.ops.torch_routers.entropy_gate.default
_backward_op = torch.ops.torch_routers._entropy_gate_backward.default

ENTROPIES = ("tsallis", "renyi")
CROSSINGS = ("below", "reaching", "exceeding")


class EntropyGate(NamedTuple):
    """What `entropy_gate` returns."""

    weights: Tensor
    """``[..., num_experts]``: 0 for experts that are not kept."""
    entropy: Tensor
    """``[...]``: from 0, one expert has all, to 1, all have equal shares; differentiable."""


def entropy_gate(
    logits: Tensor,
    *,
    entropy: Literal["tsallis", "renyi"] = "tsallis",
    q: float = 1.1,
    epsilon: float = 1e-5,
    threshold: float = 0.9,
    top_p: float = 0.75,
    crossing: Literal["below", "reaching", "exceeding"] = "below",
    keep_top_k: int = 2,
    renormalize: bool = False,
    valid_mask: Tensor | None = None,
) -> EntropyGate:
    r"""Keep the most probable experts up to ``top_p``, or all where the entropy is high.

    The rule of DynMoLE (arXiv 2504.00661; equations from the authors' code, mikecovlee/DynMoLE,
    whose defaults are ours). Experts are ordered by their logits, the largest first, the lower
    index first of equals. Which are kept is constant; weights and entropy are differentiable.

    Args:
        logits: ``[..., num_experts]``, float32 or float64.
        entropy: ``"tsallis"`` as above, which for ``q=1`` is Shannon's; or ``"renyi"``,
            :math:`\ln(\sum p'^q + 10^{-10}) / ((1 - q) \ln E)`.
        q: in (0, 2]. For :math:`|q - 1| < 10^{-4}` it is Shannon's.
        epsilon: added to the probabilities in the entropy; above 0 where ``q`` is below 1, at
            which the slope at a probability of 0 would be infinite.
        threshold: tokens with a larger entropy keep all experts; 1 or more: none does.
        top_p: the sum of probabilities to be kept.
        crossing: ``"below"``: an expert is kept while the sum, with it, is at most ``top_p``
            (DynMoLE). ``"reaching"``: while the sum before it is below ``top_p``, so that the kept
            ones reach it, as in nucleus sampling. ``"exceeding"``: while the sum before it is at
            most ``top_p``, as in Dynamic MoE (arXiv 2403.07652).
        keep_top_k: so many are kept in any case.
        renormalize: divide the weights of each token by their sum.
        valid_mask: ``[...]`` bool; a masked token keeps none and has entropy 0.

    Returns:
        Weights and entropies in the dtype of ``logits``. A NaN among the logits of a token makes
        its entropy and its kept weights NaN; where all logits are -inf, all are 0.

    Raises:
        ValueError: an argument that does not fit.

    >>> gate = entropy_gate(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.06, 0.04]).log())
    >>> gate.weights, gate.entropy
    (tensor([0.5000, 0.2000, 0.0000, 0.0000, 0.0000, 0.0000]), tensor(0.7926))
    """
    op = "entropy_gate: expected"
    for name, value, choices in ("entropy", entropy, ENTROPIES), ("crossing", crossing, CROSSINGS):
        if value not in choices:
            raise ValueError(f"{op} {name} in {list(choices)}, got {value!r}")
    if logits.dim() == 0:
        raise ValueError(f"{op} logits of shape [..., num_experts], got []")
    flat, mask = logits, valid_mask
    if logits.dim() != 2:
        flat = logits[None] if logits.dim() == 1 else logits.flatten(0, -2)
        mask = None if mask is None else mask.reshape(-1)
    # What is no number or not finite has no place in a graph of torch.compile.
    rule = (
        ENTROPIES.index(entropy), float(q), float(epsilon), min(float(threshold), 2.0),
        min(float(top_p), 2.0), CROSSINGS.index(crossing), keep_top_k, renormalize,
    )  # fmt: skip
    weights, entropies = _entropy_gate(flat, mask, *rule)
    leading = logits.shape[:-1]
    return EntropyGate(weights.view(logits.shape), entropies.view(leading))


# ---- shapes --------------------------------------------------------------------------------------


def _check(op, logits, valid_mask):
    check(
        logits.dim() == 2 and logits.shape[1] >= 1,
        lambda: f"{op}: expected logits of shape [tokens, num_experts], got {list(logits.shape)}",
    )
    remedy = ". Convert it with .float()"
    check_dtype(op, "logits", logits, torch.float32, torch.float64, remedy=remedy)
    if valid_mask is not None:
        tokens = logits.shape[0]
        check_dtype(op, "valid_mask", valid_mask, torch.bool)
        check(
            valid_mask.dim() == 1 and valid_mask.shape[0] == tokens,
            lambda: (
                f"{op}: expected valid_mask of shape [tokens={tokens}], "
                f"got {list(valid_mask.shape)}"
            ),
        )


@torch.library.register_fake(_op)
def _fake(logits, valid_mask, *rule):
    _check("entropy_gate", logits, valid_mask)
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[0])


@torch.library.register_fake(_backward_op)
def _backward_fake(grad_weights, grad_entropy, logits, weights, valid_mask, *rule):
    _check("_entropy_gate_backward", logits, valid_mask)
    return logits.new_empty(logits.shape)


# ---- the formula for given experts, and what is derived from it ----------------------------------


def _plain(logits, kept, entropy, q, epsilon, renormalize):
    """Weights and entropy in plain PyTorch, of rows with an expert at least."""
    p = logits.softmax(-1)
    weights = torch.where(kept, p, 0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, _entropy(p + epsilon, epsilon, entropy, q)


def _entropy(x, epsilon, entropy, q):
    num_experts = x.shape[-1]
    if num_experts == 1:
        return 0 * x.sum(-1)
    positive = x > 0
    log = torch.where(positive, x, 1).log()
    if abs(q - 1) < 1e-4:
        return -(x * log).sum(-1) / math.log(num_experts)
    if ENTROPIES[entropy] == "renyi":
        power = torch.where(positive, torch.exp(q * log), 0)
        return (power.sum(-1) + 1e-10).log() / ((1 - q) * math.log(num_experts))
    missing = num_experts * epsilon if abs(q - 1) >= 1e-2 else 0
    left = torch.where(positive, x * torch.expm1((q - 1) * log), 0).sum(-1)
    return (left + missing) / math.expm1((1 - q) * math.log(num_experts))


def _rows(logits, weights, valid_mask, *grads):
    """Rows without an expert are constant: what they hold is replaced, and spreads to nothing."""
    live = (logits != -torch.inf).any(-1)
    if valid_mask is not None:
        live = live & valid_mask
    rows = live.unsqueeze(-1)
    grads = [torch.where(rows if grad.dim() == logits.dim() else live, grad, 0) for grad in grads]
    return torch.where(rows, logits, 0), (weights != 0) | ~rows, *grads


def _plain_backward(grad_weights, grad_entropy, logits, weights, valid_mask, rule):
    entropy, q, epsilon, _, _, _, _, renormalize = rule
    logits, kept, *grads = _rows(logits, weights, valid_mask, grad_weights, grad_entropy)
    _, vjp = torch.func.vjp(
        lambda logits: _plain(logits, kept, entropy, q, epsilon, renormalize), logits
    )
    return vjp(tuple(grads))[0]


def _setup(ctx, inputs, output):
    logits, valid_mask, *ctx.rule = inputs
    ctx.save_for_backward(logits, output[0], valid_mask)


def _gradient(ctx, *grads):
    return _entropy_gate_backward(*grads, *ctx.saved_tensors, *ctx.rule), *[None] * 9


def _tangent(ctx, tangent, *_):
    logits, weights, valid_mask = ctx.saved_tensors
    entropy, q, epsilon, _, _, _, _, renormalize = ctx.rule
    rows, kept, tangent = _rows(logits, weights, valid_mask, tangent)
    return jvp(
        lambda logits: _plain(logits, kept, entropy, q, epsilon, renormalize), [rows], [tangent]
    )


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.rule = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)


def _double_gradient(ctx, grad):
    *inputs, weights, valid_mask = ctx.saved_tensors
    _, vjp = torch.func.vjp(
        lambda *inputs: _plain_backward(*inputs, weights.detach(), valid_mask, ctx.rule), *inputs
    )
    return *vjp(grad), *[None] * 10


def _backward_tangent(ctx, *tangents):
    *inputs, weights, valid_mask = ctx.saved_tensors
    return jvp(
        lambda *inputs: _plain_backward(*inputs, weights.detach(), valid_mask, ctx.rule),
        inputs,
        tangents,
    )


# ---- the operators: tokens do not depend on each other -------------------------------------------


_entropy_gate_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_gradient,
    jvp=_backward_tangent,
    vmap=vmap_by_rows(lambda *inputs: _entropy_gate_backward(*inputs), 5),
)
_entropy_gate = differentiable(
    _op,
    setup_context=_setup,
    backward=_gradient,
    jvp=_tangent,
    vmap=vmap_by_rows(lambda *inputs: _entropy_gate(*inputs), 2),
)
