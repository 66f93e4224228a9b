"""`ops.ragged_select` by Dynamic MoE's rule and by thresholds of entropy, against a sort."""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .harness import Options, Row

TOP_P, SLOTS = 0.4, 8
THRESHOLDS, COUNTS = torch.tensor([0.5, 1.5], dtype=torch.float64), torch.tensor([1, 2, SLOTS])


def cut(order, kept):
    return (order.masked_fill(~kept, -1),)


def top_p_by_sort(logits):
    p, order = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    return cut(order, p.cumsum(-1) - p <= TOP_P)


def top_p_by_topk(logits):  # here and below: with ties in any order
    p, order = logits.softmax(-1).topk(SLOTS)
    return cut(order, p.cumsum(-1) - p <= TOP_P)


def entropy_by(order, logits):
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    counts = COUNTS[torch.bucketize(entropy, THRESHOLDS, right=True)]
    return cut(order, torch.arange(SLOTS) < counts[:, None])


def entropy_by_sort(logits):
    order = logits.sort(stable=True, dim=-1, descending=True).indices
    return entropy_by(order[:, :SLOTS], logits)


def entropy_by_topk(logits):
    return entropy_by(logits.topk(SLOTS).indices, logits)


RULES = {
    "top_p": ("top_p", {"top_p": TOP_P}, {"sort": top_p_by_sort}),
    "top_p k=8": ("top_p", {"top_p": TOP_P, "max_k": SLOTS}, {"topk": top_p_by_topk}),
    "entropy k=8": (
        "entropy",
        {"thresholds": THRESHOLDS, "counts": COUNTS, "max_k": SLOTS},
        {"sort": entropy_by_sort, "topk": entropy_by_topk},
    ),
}


def rows(options: Options) -> Iterator[Row]:
    for name, (rule, arguments, plain) in RULES.items():
        for experts, _, tokens in options.cases():
            yield Row(
                name=f"ragged_select {name} E={experts} T={tokens}",
                inputs=lambda e=experts, t=tokens: (2 * torch.randn(t, e),),
                ours=lambda logits, r=rule, a=arguments: (ops.ragged_select(logits, r, **a),),
                baselines=plain,
                compiled=plain,
                traffic=tokens * (4 * experts + 8 * arguments.get("max_k", experts)),
            )
