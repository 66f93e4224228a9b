"""`ops.permute_tokens` and `ops.combine_tokens`: rows to the experts, and the weighted way back.

Both sides get the plan for nothing, in the form they like best.
"""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .bench_expert_plan import random_indices
from .harness import Options, Row, name_of

HIDDEN = 1024
SUFFIX = {torch.float32: "", torch.bfloat16: " bfloat16"}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def permute(x, plan, tokens):
    return (ops.permute_tokens(x, plan),)


def index_select(x, plan, tokens):
    return (x.index_select(0, tokens),)


def index(x, plan, tokens):
    return (x[tokens],)


def combine(rows, weights, plan, tokens):
    return (ops.combine_tokens(rows, weights, plan),)


def mul_index_add(rows, weights, plan, tokens):
    scaled = rows * weights.flatten()[plan.order, None]
    out = torch.zeros(weights.shape[0], rows.shape[1], dtype=scaled.dtype)
    return (out.index_add_(0, tokens, scaled).to(rows.dtype),)


def gather_mul_sum(rows, weights, plan, tokens):
    chosen = rows.index_select(0, plan.inverse.flatten()).view(*weights.shape, rows.shape[1])
    return ((chosen * weights[..., None]).sum(1).to(rows.dtype),)


def gather_bmm(rows, weights, plan, tokens):
    chosen = rows.index_select(0, plan.inverse.flatten()).view(*weights.shape, rows.shape[1])
    return (torch.bmm(weights[:, None].to(rows.dtype), chosen).squeeze(1),)


def make_plan(tokens, experts, slots):
    plan = ops.expert_plan(random_indices(tokens, experts, slots), experts)
    return plan, plan.order // slots


def permute_rows(experts: int, k: int, tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    for backward in False, True:
        yield Row(
            name=name_of("permute", backward, experts, k, tokens) + SUFFIX[dtype],
            inputs=lambda: (
                torch.randn(tokens, HIDDEN, dtype=dtype),
                *make_plan(tokens, experts, k),
            ),
            ours=permute,
            baselines={"index_select": index_select, "x[tokens]": index},
            compiled={"x[tokens]": index},
            backward=backward,
            traffic=(1 + backward) * tokens * (1 + k) * HIDDEN * dtype.itemsize,
            tolerance=TOLERANCE[dtype],
        )


def combine_rows(experts: int, k: int, tokens: int, dtype: torch.dtype) -> Iterator[Row]:
    for backward in False, True:
        yield Row(
            name=name_of("combine", backward, experts, k, tokens) + SUFFIX[dtype],
            inputs=lambda: (
                torch.randn(tokens * k, HIDDEN, dtype=dtype),
                torch.rand(tokens, k),
                *make_plan(tokens, experts, k),
            ),
            ours=combine,
            baselines={
                "mul, index_add": mul_index_add,
                "gather, mul, sum": gather_mul_sum,
                "gather, bmm": gather_bmm,
            },
            compiled={"gather, mul, sum": gather_mul_sum},
            backward=backward,
            # Backward: rows and the gradient in, gradients of rows out.
            traffic=tokens * (1 + k + backward * (1 + 2 * k)) * HIDDEN * dtype.itemsize,
            tolerance=TOLERANCE[dtype],
        )


def rows(options: Options) -> Iterator[Row]:
    for operation in permute_rows, combine_rows:
        for experts, k, tokens in options.cases():
            if experts <= 64:  # the number of slots decides, not that of experts
                yield from operation(experts, k, tokens, options.dtype)
