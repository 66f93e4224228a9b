"""Experts of Transformers' models, run by the library's kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_routers import ops


def register_experts(name: str = "torch_routers") -> str:
    """Make the library's kernels known to Transformers as a way to run experts, under ``name``.

    ``model.set_experts_implementation(register_experts())`` lets a model use it; so does
    ``from_pretrained(..., experts_implementation="torch_routers")``, once it is registered. Any
    model whose experts Transformers can run in several ways will do, with its router swapped or
    not: weights as they are or transposed, with or without gate and biases.

    Slots are sorted by expert (`ops.expert_plan`), each expert multiplies its rows
    (`ops.grouped_linear`), and the results are summed in slot order in float32
    (`ops.combine_tokens`): equal to ``"eager"`` up to rounding, forward and backward, with
    gradients that are zero for experts that see no token. A slot that repeats the first one's
    expert is empty, and costs nothing.

    Returns:
        ``name``.

    Raises:
        RuntimeError: a Transformers before 5, which has one way to run experts.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        import transformers

        raise RuntimeError(
            "register_experts: expected transformers >= 5, where the experts of a model can be run "
            f"in several ways, got {transformers.__version__}. Run: pip install 'transformers>=5'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(name, grouped_experts)
    return name


def grouped_experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a module of experts in the layout that Transformers 5 gives all of them.

    Args:
        experts: has ``gate_up_proj``, or ``up_proj`` without a gate, and ``down_proj``, each
            ``[num_experts, out, in]``, or ``[num_experts, in, out]`` where ``is_transposed``. What
            the first releases of Transformers 5 do not tell is as it is there.
        hidden_states: ``[tokens, hidden_size]``.
        top_k_index: ``[tokens, slots]`` int64; ``num_experts`` and more is no expert of this rank.
        top_k_weights: ``[tokens, slots]``.

    Returns:
        ``[tokens, hidden_size]`` in the dtype of ``hidden_states``.
    """

    def linear(name: str, rows: Tensor, offsets: Tensor) -> Tensor:
        weight = getattr(experts, name)
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        weight = weight.transpose(1, 2) if experts.is_transposed else weight
        return ops.grouped_linear(rows.to(weight.dtype), weight, offsets, bias)

    def apply(rows: Tensor, offsets: Tensor) -> Tensor:
        if getattr(experts, "has_gate", True):
            hidden = experts._apply_gate(linear("gate_up_proj", rows, offsets))
        else:
            hidden = experts.act_fn(linear("up_proj", rows, offsets))
        rows = linear("down_proj", hidden, offsets)
        return (
            experts.post_expert_norm(rows)
            if getattr(experts, "has_post_expert_norm", False)
            else rows
        )

    return mix(apply, hidden_states, top_k_index, top_k_weights, experts.num_experts)


def mix(
    apply: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """The weighted sum over slots of what experts make of tokens, as a layer of Transformers.

    Args:
        apply: from rows sorted by expert, and where each expert's begin, to their results.
        x: ``[tokens, hidden_size]``.
        indices, weights: ``[tokens, slots]``. Empty is a slot whose expert does not exist, or is
            that of the first slot again.
        num_experts: of ``apply``.
    """
    again = F.pad(indices[:, 1:] == indices[:, :1], (1, 0))
    indices = torch.where(again | (indices >= num_experts), -1, indices)
    plan = ops.expert_plan(indices, num_experts)
    y = apply(ops.permute_tokens(x, plan), plan.offsets)
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    return ops.combine_tokens(y, weights.to(dtype), plan).to(x.dtype)
