r"""As many experts as a token needs, best first: how many is what the rules here say.

`topk_select` orders the experts, the operator cuts the order off, and `gate` weighs what is left.
``csrc/ragged_select/ragged_select_kernel.h`` has the rules.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from torch_routers._autograd import vmap_by_rows
from torch_routers.ops._check import check, dtype_name
from torch_routers.ops.entropy_gate import CROSSINGS
from torch_routers.ops.gate import topk_select

RULES = ("top_p", "entropy", "confidence", "positive")

_op = torch.ops.torch_routers.ragged_select.default


def ragged_select(
    logits: Tensor,
    rule: Literal["top_p", "entropy", "confidence", "positive"],
    *,
    top_p: float = 0.4,
    crossing: Literal["below", "reaching", "exceeding"] = "exceeding",
    thresholds: Sequence[float] | Tensor = (),
    counts: Sequence[int] | Tensor = (),
    min_k: int = 1,
    max_k: int | None = None,
    valid_mask: Tensor | None = None,
) -> Tensor:
    r"""The best experts of each token, as many as a rule gives it; the choice has no derivative.

    With :math:`p = \mathrm{softmax}(z)` over all experts:

    - ``"top_p"``: experts until the sum of their :math:`p` passes ``top_p``, by ``crossing`` as in
      `entropy_gate`; the default is Dynamic MoE (arXiv 2403.07652), where the expert that exceeds
      ``top_p`` is kept, and a sum of exactly ``top_p`` does not stop;
    - ``"entropy"``: ``counts[i]`` where :math:`H = -\sum_e p_e \ln p_e`, in nats, has reached ``i``
      of the thresholds: ``counts[0]`` below the first, ``counts[1]`` from there on;
    - ``"confidence"``: the same of the largest :math:`p`, so that ``counts`` usually descend;
    - ``"positive"``: all with :math:`z > 0`.

    Args:
        logits: ``[..., num_experts]``, float32 or float64.
        rule: one of the four.
        top_p: the sum of probabilities to be kept, from 0.
        crossing: what ``top_p`` does with the expert that crosses it.
        thresholds: ``[steps]`` ascending numbers (as a tensor float64), of the entropy or the
            largest probability.
        counts: ``[steps + 1]`` numbers of experts (as a tensor int64).
        min_k: so many are kept in any case.
        max_k: no more are kept. Default: ``num_experts``.
        valid_mask: ``[...]`` bool; a masked token keeps none.

    Returns:
        ``[..., max_k]`` int64, best first, in the order of `topk_select`; -1 in slots behind the
        last expert. A NaN among the logits of a token comes first; the token keeps ``min_k`` by
        ``"top_p"``, ``counts[0]`` by the next two, and none for it by ``"positive"``.

    Raises:
        ValueError: an argument that does not fit.

    >>> p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    >>> ragged_select(p.log(), "top_p", top_p=0.4)
    tensor([[ 0, -1, -1],
            [ 1, -1, -1]])
    >>> ragged_select(p.log(), "entropy", thresholds=[0.7], counts=[1, 2], max_k=2)
    tensor([[ 0,  1],
            [ 1, -1]])
    """
    op = "ragged_select: expected"
    for name, value, choices in ("rule", rule, RULES), ("crossing", crossing, CROSSINGS):
        if value not in choices:
            raise ValueError(f"{op} {name} in {list(choices)}, got {value!r}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op} logits of shape [..., num_experts], got {list(logits.shape)}")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{op} logits in float32 or float64, got {dtype_name(logits)}. Convert it with .float()"
        )
    num_experts = logits.shape[-1]
    max_k = num_experts if max_k is None else max_k
    if not 1 <= max_k <= num_experts:
        raise ValueError(f"{op} max_k in [1, num_experts={num_experts}], got {max_k}")
    if not 0 <= min_k <= max_k:
        raise ValueError(f"{op} min_k in [0, max_k={max_k}], got {min_k}")
    steps = None, None
    if rule in ("entropy", "confidence"):
        steps = _steps(thresholds, counts, logits.device)
    flat = logits.reshape(-1, num_experts)
    mask = None if valid_mask is None else valid_mask.reshape(-1)
    order = topk_select(flat, max_k, valid_mask=mask)
    # What is not finite has no place in a graph of torch.compile.
    indices = _op(
        flat, order, RULES.index(rule), min(float(top_p), 2.0), CROSSINGS.index(crossing),
        *steps, min_k,
    )  # fmt: skip
    return indices.view(*logits.shape[:-1], max_k)


def _steps(thresholds, counts, device) -> tuple[Tensor, Tensor]:
    """Both as tensors; what is in a list is looked at."""
    if not isinstance(thresholds, Tensor):
        ascends = all(a <= b for a, b in pairwise(thresholds))
        if not ascends or any(x != x for x in thresholds):
            raise ValueError(
                f"ragged_select: expected thresholds that ascend, got {list(thresholds)}"
            )
        thresholds = torch.tensor(thresholds, dtype=torch.float64, device=device)
    if not isinstance(counts, Tensor):
        if any(count < 0 for count in counts):
            raise ValueError(f"ragged_select: expected counts >= 0, got {list(counts)}")
        counts = torch.tensor(counts, dtype=torch.int64, device=device)
    return thresholds, counts


@torch.library.register_fake(_op)
def _fake(logits, order, rule, top_p, crossing, thresholds, counts, least):
    steps = 0 if thresholds is None else thresholds.shape[0]
    if counts is not None:
        check(
            counts.dim() == 1 and counts.shape[0] == steps + 1,
            lambda: (
                f"ragged_select: expected counts of shape [steps + 1={steps + 1}], "
                f"got {list(counts.shape)}"
            ),
        )
    return torch.empty_like(order)


torch.library.register_vmap("torch_routers::ragged_select", vmap_by_rows(_op, 2))
