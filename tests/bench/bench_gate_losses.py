"""The training path of a router: `ops.topk_gate` with statistics, balance loss and z-loss.

No baseline makes one-hot matrices: those are slower still.
"""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .bench_topk_gate import softmax_topk, topk_softmax
from .harness import Options, Row, name_of

BALANCE, Z = 1e-2, 1e-3


def losses(probabilities, lse, counts):
    share = counts / counts.sum()
    balance = counts.shape[0] * (share * probabilities.mean(0)).sum()
    return BALANCE * balance + Z * lse.square().mean()


def by_bincount(logits, k):
    weights, indices = topk_softmax(logits, k)
    counts = torch.bincount(indices.flatten(), minlength=logits.shape[1])
    return weights, indices, losses(logits.softmax(-1), logits.logsumexp(-1), counts)


def by_scatter(logits, k):
    """The probabilities from the log-sum-exp: one pass less."""
    weights, indices = topk_softmax(logits, k)
    lse = logits.logsumexp(-1)
    return weights, indices, losses((logits - lse[:, None]).exp(), lse, _scatter(logits, indices))


def softmax_first(logits, k):
    weights, indices = softmax_topk(logits, k)
    counts = _scatter(logits, indices)
    return weights, indices, losses(logits.softmax(-1), logits.logsumexp(-1), counts)


def _scatter(logits, indices):
    slots = indices.flatten()
    return logits.new_zeros(logits.shape[1]).scatter_add(
        0, slots, torch.ones_like(slots, dtype=logits.dtype)
    )


def ours(logits, k):
    weights, indices, statistics = ops.topk_gate(logits, k, statistics=True)
    return weights, indices, ops.router_losses(statistics, balance=BALANCE, z=Z).total


def rows(options: Options) -> Iterator[Row]:
    for experts, k, tokens in options.cases():
        for backward in False, True:
            forward_bytes = tokens * (4 * experts + 12 * k + 4)
            yield Row(
                name=name_of("gate_losses", backward, experts, k, tokens),
                inputs=lambda e=experts, k=k, t=tokens: (torch.randn(t, e), k),
                ours=ours,
                baselines={
                    "bincount": by_bincount,
                    "scatter": by_scatter,
                    "softmax first": softmax_first,
                },
                compiled={"scatter": by_scatter, "softmax first": softmax_first},
                backward=backward,
                traffic=forward_bytes + backward * tokens * (8 * experts + 12 * k + 4),
                tolerance=2e-5,
            )
