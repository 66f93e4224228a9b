r"""A mixture of low-rank experts: what a layer of routed LoRAs adds to a linear map.

.. math::  y_t = \sum_e w_{te} \, c_e \, B_e A_e \, x_t

Two ways that compute the same. *Stacked*: the experts' ranks side by side, two matrix products for
all tokens and experts, and between them the choice of what each token gets. *Segmented*: each token
meets its own experts only, without a copy of it per expert; see `_lora_mix_rules`. For inference on
the CPU there is a third, one call that stacks nothing and keeps nothing.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_routers._autograd import (
    _any_requires_grad,
    _below_autograd,
    autocast_dtype,
    shapes_may_depend_on,
)
from torch_routers.ops._check import dtype_name
from torch_routers.ops._lora_mix_rules import Segmented, Stacked, is_plain, mixture
from torch_routers.ops.expert_plan import expert_plan, expert_plan_from_weights

_infer_op = torch.ops.torch_routers._lora_infer.default

_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
_STRATEGIES = "stacked", "segmented"
_ROUTER_GRADS = "selected", "dense"


def lora_mix(
    x: Tensor,
    factors_a: Sequence[Tensor],
    factors_b: Sequence[Tensor],
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    scaling: Sequence[float] | None = None,
    strategy: str | None = None,
    router_grad: str = "selected",
    inference: bool | None = None,
) -> Tensor:
    r"""Add up, for each token, the low-rank maps of its experts, weighted.

    .. math::  y_t = \sum_s w_{ts} \, c_{e} \, B_{e} A_{e} \, x_t, \qquad e = \mathrm{indices}_{ts}

    Args:
        x: ``[..., in_features]``, float32, float64, bfloat16 or float16.
        factors_a: :math:`A_e`, ``[rank_e, in_features]`` for each expert. Ranks may differ, and be
            0: such an expert adds nothing.
        factors_b: :math:`B_e`, ``[out_features, rank_e]`` for each expert.
        weights: ``[..., slots]`` with ``indices``, ``[..., num_experts]`` without; float32 or
            float64.
        indices: ``[..., slots]`` int64 in ``[-1, num_experts)``: the expert of each slot; -1 is
            none. Default: each expert has its own weight, and is selected where that is not 0.
        scaling: :math:`c_e` for each expert: ``alpha / rank`` of LoRA. Default: ones.
        strategy: ``"stacked"`` multiplies all tokens by all experts, and keeps what was selected.
            ``"segmented"`` computes what was selected alone. None (default) is the one that was
            measured to be faster for such sizes; for inference on the CPU that is most often a
            third one, which computes what was selected in one call.
        router_grad: of which weights there is a gradient. ``"selected"``: of those that were
            selected; others get 0. ``"dense"``: of all, as if those that are 0 had been selected
            too, for routers that learn from the experts they did not choose. It needs weights of
            all experts, and the stacked strategy.
        inference: whether nobody will compute the same again to learn from it, so that last bits
            may be others than where something is learned. None (default): where nothing requires a
            gradient, or in inference mode; not under ``torch.no_grad()`` alone, where a reentrant
            checkpoint runs what it will run again.

    Returns:
        ``[..., out_features]`` in the dtype of ``x``; 0 for a token without experts.

    Raises:
        ValueError: a shape, dtype, index or option that does not fit. On CUDA an index out of range
            cannot be reported without a synchronisation: there it counts as -1.

    The factors are converted to the dtype of ``x``, and under autocast all of them to that of
    autocast: parameters may stay in float32. An expert without tokens has a zero gradient, not
    none. For the backward ``x``, the parameters as they are, the routing and
    :math:`A_e x_t` are kept: stacked ``[tokens, sum of ranks]``, segmented
    ``[rows, largest rank]`` for as many rows as slots were selected.

    E. Hu et al., LoRA (arXiv 2106.09685), for one expert; mixtures of them by routing as in MixLoRA
    (arXiv 2404.15159). Where an expert's result overflows, tokens that did not select it do not
    see it: what was not selected is left out, not multiplied by 0.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> factors_a = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])]
    >>> factors_b = [torch.tensor([[1.0]]), torch.tensor([[10.0, 0.0]])]
    >>> weights, indices = torch.tensor([[1.0, 0.5], [1.0, 0.0]]), torch.tensor([[0, 1], [0, -1]])
    >>> lora_mix(x, factors_a, factors_b, weights, indices)
    tensor([[11.],
            [ 3.]])
    """
    _check_options(indices, strategy, router_grad)
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    if strategy is None and _is_inference(inference, x, weights, factors_a, factors_b):
        few = 16 if x.dtype.itemsize == 2 else 256  # processors have products of 16-bit matrices
        if weights.shape[:-1].numel() <= few or _is_sparse(weights, indices, len(factors_a)):
            return _infer(x, factors_a, factors_b, weights, indices, scaling)
    _check_inputs(x, factors_a, factors_b, weights, indices, scaling)
    leading = x.shape[:-1]
    if x.dim() != 2:
        x, weights = (v.reshape(leading.numel(), v.shape[-1]) for v in (x, weights))
        indices = None if indices is None else indices.reshape(weights.shape)
    gates = weights.to(_wide(x))
    if strategy is None:
        is_sparse = router_grad != "dense" and _is_sparse(weights, indices, len(factors_a))
        strategy = "segmented" if is_sparse else "stacked"
    mix = _segmented if strategy == "segmented" else _stacked
    y = mix(x, factors_a, factors_b, gates, indices, scaling, router_grad == "dense")
    return y if len(leading) == 1 else y.view(*leading, y.shape[-1])


def _is_sparse(weights, indices, num_experts):
    """Whether less than half of all tokens and experts meet, as far as that can be known."""
    if indices is not None:
        rows, pairs = weights.numel(), weights.shape[:-1].numel() * num_experts
    else:
        known = shapes_may_depend_on(weights)
        rows, pairs = int(weights.count_nonzero()) if known else weights.numel(), weights.numel()
    return 2 * rows <= pairs


def _wide(x):
    """The dtype of gates."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- inference -----------------------------------------------------------------------------------


@torch.library.register_fake(_infer_op)
def _infer_fake(x, factors_a, factors_b, weights, indices, scaling):
    return x.new_empty(*x.shape[:-1], factors_b[0].shape[0])


# Not for `lora_mix`, which calls it where there is nothing to learn, but for who calls it directly.
def _setup_infer(ctx, inputs, output):
    x, factors_a, factors_b, weights, *ctx.rest = inputs
    ctx.save_for_backward(x, weights, *factors_a, *factors_b)


def _infer_backward(ctx, grad):
    with torch.enable_grad():
        inputs = [value.view_as(value) for value in ctx.saved_tensors]
        x, weights, *factors = inputs
        half, (indices, scaling) = len(factors) // 2, ctx.rest
        factors = factors[:half], factors[half:]
        y = lora_mix(x, *factors, weights, indices, scaling=scaling, strategy="segmented")
        wanted = [value for value in inputs if value.requires_grad]
        found = torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True)
    rest = iter(found)
    grad_x, grad_weights, *grads = [next(rest) if v.requires_grad else None for v in inputs]
    return grad_x, grads[:half], grads[half:], grad_weights, None, None


torch.library.register_autograd(_infer_op._schema.name, _infer_backward, setup_context=_setup_infer)


def _is_inference(told, x, weights, factors_a, factors_b):
    """Whether nothing is learned, and nobody wants to see how it is computed."""
    tensors = x, weights, *factors_a, *factors_b
    if not (x.is_cpu and is_plain(x, weights, tensors[2:])):
        return False
    if torch.is_grad_enabled():
        return told is not False and not _any_requires_grad(*tensors)
    return torch.is_inference_mode_enabled() if told is None else told


def _infer(x, factors_a, factors_b, weights, indices, scaling):
    """In one call, which reads every factor where it lies."""
    other = torch.float32 if x.dtype == torch.float64 else torch.float64
    gates = weights.to(_wide(x)) if weights.dtype == other else weights
    try:
        with _below_autograd():
            return _infer_op(x, factors_a, factors_b, gates, indices, scaling)
    except ValueError as error:
        # In the words of every other way, where these have some.
        _check_inputs(x, factors_a, factors_b, weights, indices, scaling)
        raise ValueError(str(error).replace("_lora_infer", "lora_mix", 1)) from None


# ---- two ways ------------------------------------------------------------------------------------


def _segmented(x, factors_a, factors_b, gates, indices, scaling, _):
    num_experts, factors = len(factors_a), (*factors_a, *factors_b)
    if indices is None:
        exact = shapes_may_depend_on(gates)
        max_rows = int(gates.count_nonzero()) if exact else None
        plan = expert_plan_from_weights(gates.detach(), max_rows=max_rows)
        if scaling is not None:
            gates = gates * gates.new_tensor(scaling)
    else:
        plan = _plan(indices, num_experts)
        if scaling is not None:
            gates = gates * gates.new_tensor(scaling)[indices.clamp(0, num_experts - 1)]
    ranks = _ranks(factors_a, plan.counts if is_plain(x, gates, factors) else None)
    way = Segmented(ranks, x.device)
    return mixture(way, x, gates, (plan.order, plan.inverse, plan.offsets), factors_a, factors_b)


def _ranks(factors_a, counts):
    """The rank of each expert; where it costs nothing to know, 0 of those without tokens."""
    ranks = [a.shape[0] for a in factors_a]
    if counts is None or not shapes_may_depend_on(counts):
        return ranks
    return [rank if count else 0 for rank, count in zip(ranks, counts.tolist())]


def _plan(indices, num_experts):
    try:
        return expert_plan(indices, num_experts)
    except ValueError as error:  # of what indices hold
        raise ValueError(str(error).replace("expert_plan", "lora_mix", 1)) from None


def _stacked(x, factors_a, factors_b, gates, indices, scaling, all_learn):
    if indices is None:
        selected = gates != 0
    else:
        gates, selected = _of_all_experts(gates, indices, len(factors_a))
    if scaling is not None:
        gates = gates * gates.new_tensor(scaling)
    plain = is_plain(x, gates, (*factors_a, *factors_b))
    if plain and shapes_may_depend_on(selected) and bool(selected.all()):
        routing, ranks = (), _ranks(factors_a, None)
    else:
        routing = (selected,)
        ranks = _ranks(factors_a, selected.any(0) if plain and not all_learn else None)
    way = Stacked(ranks, x.device, all_learn)
    return mixture(way, x, gates, routing, factors_a, factors_b)


def _of_all_experts(gates, indices, num_experts):
    """``[tokens, num_experts]``: the weight of each expert, and whether it is selected."""
    if shapes_may_depend_on(indices) and indices.numel():
        _check_range(*(int(x) for x in indices.aminmax()), num_experts)
    places = indices.where((indices >= 0) & (indices < num_experts), num_experts)
    empty = gates.new_zeros(gates.shape[0], num_experts + 1)
    dense = empty.scatter_add(1, places, gates)
    selected = empty.scatter(1, places, 1) != 0
    return dense[:, :-1], selected[:, :-1]


# ---- checks --------------------------------------------------------------------------------------


def _check(condition, message):
    if not condition:
        raise ValueError(f"lora_mix: expected {message()}")


def _check_range(low, high, num_experts):
    _check(
        low >= -1 and high < num_experts,
        lambda: f"indices in [-1, num_experts={num_experts}), got {low if low < -1 else high}",
    )


def _check_dtype(name, tensor, *dtypes):
    if tensor.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        _check(False, lambda: f"{name} in {', '.join(most)} or {last}, got {dtype_name(tensor)}")


def _check_inputs(x, factors_a, factors_b, weights, indices, scaling):
    _check(x.dim() > 0, lambda: "x of shape [..., in_features], got []")
    _check_dtype("x", x, *_DTYPES)
    _check_factors(x, factors_a, factors_b)
    num_experts, leading = len(factors_a), x.shape[:-1]
    _check_dtype("weights", weights, torch.float32, torch.float64)
    last = f"num_experts={num_experts}" if indices is None else "slots"
    fits = weights.dim() == x.dim() and weights.shape[:-1] == leading
    _check(
        fits and (indices is not None or weights.shape[-1] == num_experts),
        lambda: (
            f"weights of shape [{', '.join([*map(str, leading), last])}], got {list(weights.shape)}"
        ),
    )
    if indices is not None:
        _check(indices.dtype == torch.int64, lambda: f"indices in int64, got {dtype_name(indices)}")
        _check(
            indices.shape == weights.shape,
            lambda: (
                f"indices of the shape of weights, {list(weights.shape)}, got {list(indices.shape)}"
            ),
        )
    _check(
        scaling is None or len(scaling) == num_experts,
        lambda: f"scaling with num_experts={num_experts} numbers, got {len(scaling)}",
    )


def _check_factors(x, factors_a, factors_b):
    num_experts, in_features = len(factors_a), x.shape[-1]
    _check(num_experts > 0, lambda: "factors_a of at least one expert, got none")
    _check(
        len(factors_b) == num_experts,
        lambda: f"factors_b of num_experts={num_experts} experts, got {len(factors_b)}",
    )
    out_features = factors_b[0].shape[0] if factors_b[0].dim() > 0 else 0
    for e, (a, b) in enumerate(zip(factors_a, factors_b)):
        # Most calls have nothing to say, in as little time as possible.
        if not (
            a.dim() == b.dim() == 2
            and a.size(1) == in_features
            and b.size(0) == out_features
            and a.size(0) == b.size(1)
            and a.dtype in _DTYPES
            and b.dtype in _DTYPES
        ):
            _explain(e, a, b, in_features, out_features)


def _explain(e, a, b, in_features, out_features):
    _check(
        a.dim() == 2 and a.shape[1] == in_features,
        lambda: f"factors_a[{e}] of shape [rank, in_features={in_features}], got {list(a.shape)}",
    )
    _check(
        b.dim() == 2 and b.shape == (out_features, a.shape[0]),
        lambda: (
            f"factors_b[{e}] of shape [out_features{f'={out_features}' if e else ''}, "
            f"rank={a.shape[0]}], got {list(b.shape)}"
        ),
    )
    _check_dtype(f"factors_a[{e}]", a, *_DTYPES)
    _check_dtype(f"factors_b[{e}]", b, *_DTYPES)


def _check_options(indices, strategy, router_grad):
    _check(
        strategy in (None, *_STRATEGIES),
        lambda: f"strategy among {', '.join(_STRATEGIES)}, got {strategy}",
    )
    _check(
        router_grad in _ROUTER_GRADS,
        lambda: f"router_grad among {', '.join(_ROUTER_GRADS)}, got {router_grad}",
    )
    if router_grad == "dense":
        _check(indices is None, lambda: "no indices with router_grad=dense, got some")
        _check(
            strategy != "segmented",
            lambda: "strategy=stacked with router_grad=dense, got segmented",
        )
