r"""Entmax: probabilities of which some are exactly zero.

:math:`\alpha`-entmax (arXiv 1905.05702) is, for each row :math:`x`,

.. math::  p = \arg\max_{p \in \Delta} \langle p, x \rangle + H_\alpha(p), \qquad
           H_\alpha(p) = \frac{1}{\alpha (\alpha - 1)} \sum_i \big(p_i - p_i^\alpha\big)

which is :math:`p_i = [(\alpha - 1) x_i - \tau]_+^{1 / (\alpha - 1)}` with :math:`\tau` such that
the row sums to one: softmax for :math:`\alpha = 1`, sparsemax (arXiv 1602.02068) for 2.
"""

import torch
from torch import Tensor

from torch_routers._autograd import batched, differentiable, flat, jvp, unflat, vmap_by_loop
from torch_routers.ops._check import check, check_dtype, dtype_name

_op = torch.ops.torch_routers.entmax.default
_backward_op = torch.ops.torch_routers._entmax_backward.default


def entmax(
    logits: Tensor, alpha: float | Tensor = 1.5, *, valid_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""The entmax of each row of logits, and how many tokens each expert is active for.

    The larger ``alpha``, the fewer weights are not zero; how many they are is each token's own.
    1.5 and 2 are solved exactly, by steps whose last is the root for the experts that are left;
    any other ``alpha`` by Newton's method in float64. Below ``1 + 1e-4`` it is softmax.

    Args:
        logits: ``[..., num_experts]``, float32, float64, bfloat16 or float16. The arithmetic is in
            float32, or float64 for float64. Infinity, as NaN, makes NaN of its row; an expert with
            -infinity is never active, and a row of them has weights 0.
        alpha: a finite number of at least 1; or a scalar tensor, which gets a gradient
            (arXiv 1909.00015).
        valid_mask: ``[...]`` bool, True = real token. A masked token has weights 0 and no gradient,
            is not counted, and its logits do not matter. Default: all are real.

    Returns:
        ``weights`` ``[..., num_experts]`` float32 (float64 for float64 logits), whose rows sum to
        one, and ``counts`` ``[num_experts]`` int64, the tokens whose weight is not 0.

    Raises:
        ValueError: an argument that does not fit. On CUDA an ``alpha`` in a tensor cannot be looked
            at without a synchronisation: a wrong one makes all weights NaN.

    With :math:`s_i = p_i^{2 - \alpha}` where :math:`p_i > 0`, 0 elsewhere, the gradient of weights
    with gradient :math:`v` is

    .. math::  g_i = s_i \Big(v_i - \sum_j s_j v_j \Big/ \sum_j s_j\Big), \qquad
               g_\alpha = -\sum_i r_i\, g_i, \qquad
               r_i = \frac{1 - e^{y_i} (1 - y_i)}{(\alpha - 1)^2}, \quad
               y_i = (\alpha - 1) \ln p_i

    The second is the derivative of arXiv 1909.00015 in a form that loses no digits as
    :math:`\alpha` approaches 1, where :math:`r_i = (\ln p_i)^2 / 2`.

    >>> weights, counts = entmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> weights
    tensor([[0.8307, 0.1693, 0.0000],
            [0.3333, 0.3333, 0.3333]])
    >>> counts
    tensor([2, 2, 1])
    """
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            "entmax: expected logits of shape [..., num_experts] with num_experts >= 1, "
            f"got {list(logits.shape)}"
        )
    if valid_mask is not None:
        if valid_mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"entmax: expected valid_mask of shape {list(logits.shape[:-1])}, one value per "
                f"token, got {list(valid_mask.shape)}"
            )
        valid_mask = valid_mask.reshape(-1)
    learned = None
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(f"entmax: expected alpha in a floating dtype, got {dtype_name(alpha)}")
        learned, alpha = alpha.to(_compute_dtype(logits)), 0.0
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    weights, counts = _entmax(rows, learned, float(alpha), valid_mask)
    return weights if logits.dim() == 2 else weights.view(logits.shape), counts


# ---- shapes --------------------------------------------------------------------------------------


def _compute_dtype(logits):
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("torch_routers::entmax")
def _fake(logits, learned, alpha, valid_mask):
    check_dtype("entmax", "logits", logits, torch.float32, torch.float64, torch.bfloat16,
                torch.float16)  # fmt: skip
    if valid_mask is not None:
        check_dtype("entmax", "valid_mask", valid_mask, torch.bool)
    if learned is None:
        check(
            1 <= alpha < float("inf"),
            lambda: f"entmax: expected a finite alpha >= 1, got {alpha:g}",
        )
    else:
        check(
            learned.dim() == 0,
            lambda: f"entmax: expected alpha of shape [], got {list(learned.shape)}",
        )
    return (
        logits.new_empty(logits.shape, dtype=_compute_dtype(logits)),
        logits.new_empty(logits.shape[1], dtype=torch.int64),
    )


@torch.library.register_fake("torch_routers::_entmax_backward")
def _backward_fake(grad, weights, learned, alpha):
    grad_logits = torch.empty_like(weights, memory_format=torch.contiguous_format)
    return grad_logits, weights.new_empty(0 if learned is None else ())


# ---- the formula of the gradient, and what is derived from it ------------------------------------


def _plain_backward(grad, weights, learned, alpha):
    """The gradients of the logits and of alpha in plain PyTorch: a formula in the weights.

    What is derived from it is a derivative in the weights, whose own is known.
    """
    alpha = alpha if learned is None else learned
    active = weights != 0
    log = weights.where(active, 1).log()
    a = alpha - 1
    if learned is not None:
        a = a.where(a >= 1e-4, 0)
    elif a < 1e-4:
        a = 0.0
    slopes = ((1 - a) * log).exp().where(active, 0)
    total = slopes.sum(-1, keepdim=True)
    total = total.where(total != 0, 1)
    mean = (slopes * grad.where(active, 0)).sum(-1, keepdim=True) / total
    grad_logits = (slopes * (grad - mean)).where(active, 0)
    if learned is None:
        return grad_logits, weights.new_empty(0)
    return grad_logits, -(_alpha_shift(a, log) * grad_logits).sum()


def _alpha_shift(a, log):
    """What a change of alpha takes from each logit: ``(1 - e^y (1 - y)) / a^2``, ``y = a log``."""
    y = a * log
    is_small = y >= -0.5
    small, large = y.where(is_small, 0), y.where(~is_small, -1)
    series = torch.ones_like(y)
    for k in range(15, 0, -1):
        series = 1 + series * small * ((k + 1) / (k * (k + 2)))
    # Without a division by a: of a^2 = (y / log)^2.
    ratio = torch.where(is_small, 0.5 * series, (1 - large.exp() * (1 - large)) / large**2)
    return log**2 * ratio


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.alpha = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiated(ctx):
    """The backward as a function of its tensors that are there, and those."""
    grad, weights, learned = ctx.saved_tensors
    if learned is None:
        return lambda g, w: _plain_backward(g, w, None, ctx.alpha)[:1], [grad, weights]
    return lambda g, w, a: _plain_backward(g, w, a, ctx.alpha), [grad, weights, learned]


def _double_backward(ctx, *grads):
    function, inputs = _differentiated(ctx)
    outputs, vjp = torch.func.vjp(function, *inputs)
    grads = tuple(torch.zeros_like(y) if g is None else g for g, y in zip(grads, outputs))
    gradients = vjp(grads)
    return *gradients, *[None] * (4 - len(gradients))


def _backward_jvp(ctx, *tangents):
    results = jvp(*_differentiated(ctx), tangents)
    return results if len(results) == 2 else (*results, None)


def _backward_vmap(info, in_dims, *inputs):
    *tensors, alpha = inputs
    present = [i for i, x in enumerate(tensors) if x is not None]

    def function(*values):
        full = [None] * 3
        for i, value in zip(present, values):
            full[i] = value
        return _plain_backward(*full, alpha)

    dims = tuple(in_dims[i] for i in present)
    return torch.func.vmap(function, dims)(*(tensors[i] for i in present)), (0, 0)


_backward = differentiable(
    _backward_op,
    setup_context=_setup_backward,
    backward=_double_backward,
    jvp=_backward_jvp,
    vmap=_backward_vmap,
)


# ---- the operator --------------------------------------------------------------------------------


def _setup(ctx, inputs, output):
    logits, learned, ctx.alpha, _ = inputs
    weights, counts = output
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(counts)
    ctx.save_for_backward(weights, learned)
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    weights, learned = ctx.saved_tensors
    grad_logits, grad_alpha = _backward(grad, weights, learned, ctx.alpha)
    return grad_logits.to(ctx.dtype), None if learned is None else grad_alpha, None, None


def _tangents(ctx, tangent, tangent_alpha, *_):
    """The Jacobian is symmetric: its product with a tangent is that of the backward."""
    weights, learned = ctx.saved_tensors
    direction = torch.zeros_like(weights) if tangent is None else tangent.to(weights.dtype)
    if learned is not None and tangent_alpha is not None:
        active = weights != 0
        a = (learned - 1).where(learned - 1 >= 1e-4, 0)
        shift = _alpha_shift(a, weights.where(active, 1).log())
        direction = direction - tangent_alpha * shift
    return _backward(direction, weights, learned, ctx.alpha)[0], None


def _vmap(info, in_dims, logits, learned, alpha, valid_mask):
    if in_dims[1] is not None:
        return vmap_by_loop(_entmax)(info, in_dims, logits, learned, alpha, valid_mask)

    rows, mask = map(flat, batched(info, (in_dims[0], in_dims[3]), (logits, valid_mask)))
    weights = unflat(info, _entmax(rows, learned, alpha, mask)[0])
    return (weights, (weights != 0).sum(1)), (0, 0)


_entmax = differentiable(
    _op,
    setup_context=_setup,
    backward=_gradient,
    jvp=_tangents,
    vmap=_vmap,
    autocast=torch.float32,
)
