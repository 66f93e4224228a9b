"""`ops.topk_gate`, renormalised, no statistics: the router of Mixtral without losses."""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .harness import Options, Row, name_of


def topk_softmax(logits, k):
    values, indices = logits.topk(k)
    return values.softmax(-1), indices


def softmax_topk(logits, k):
    values, indices = logits.softmax(-1).topk(k)
    return values / values.sum(-1, keepdim=True), indices


def rounds_of_max(logits, k):
    """What a compiler can fuse: k times the maximum, each time without the ones before."""
    rest, best = logits.detach(), []
    for _ in range(k):
        best.append(rest.argmax(-1, keepdim=True))
        rest = rest.scatter(-1, best[-1], -torch.inf)
    indices = torch.cat(best, -1)
    return logits.gather(-1, indices).softmax(-1), indices


def ours(logits, k):
    weights, indices, _ = ops.topk_gate(logits, k)
    return weights, indices


def rows(options: Options) -> Iterator[Row]:
    for experts, k, tokens in options.cases():
        for backward in False, True:
            forward_bytes = tokens * (4 * experts + 12 * k)
            yield Row(
                name=name_of("topk_gate", backward, experts, k, tokens),
                inputs=lambda e=experts, k=k, t=tokens: (torch.randn(t, e), k),
                ours=ours,
                baselines={"topk, softmax": topk_softmax, "softmax, topk": softmax_topk},
                compiled={
                    "topk, softmax": topk_softmax,
                    "softmax, topk": softmax_topk,
                    "rounds of max": rounds_of_max,
                },
                backward=backward,
                # Backward: weights, their gradients and indices in, gradients of logits out.
                traffic=forward_bytes + backward * tokens * (16 * k + 4 * experts),
            )
