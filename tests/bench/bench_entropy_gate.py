"""`ops.entropy_gate` with the rule of DynMoLE, against a sort."""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .harness import Options, Row

Q, EPSILON, THRESHOLD, TOP_P, KEEP = 1.1, 1e-5, 0.9, 0.75, 2


def by_sort(logits):
    p = logits.softmax(-1)
    entropy = (1 - (p + EPSILON).pow(Q).sum(-1)) / (1 - logits.shape[1] ** (1 - Q))
    with torch.no_grad():
        values, order = p.sort(stable=True, dim=-1, descending=True)
        kept = values.cumsum(-1) <= TOP_P
        kept[:, :KEEP] = True
        kept |= (entropy > THRESHOLD)[:, None]
        kept = torch.zeros_like(kept).scatter(1, order, kept)
    return p * kept, entropy


def rows(options: Options) -> Iterator[Row]:
    for experts, _, tokens in options.cases():
        for backward in False, True:
            direction = "forward+backward" if backward else "forward"
            yield Row(
                name=f"entropy_gate {direction} E={experts} T={tokens}",
                inputs=lambda e=experts, t=tokens: (2 * torch.randn(t, e),),
                ours=lambda logits: tuple(ops.entropy_gate(logits)),
                baselines={"sort": by_sort},
                compiled={"sort": by_sort},
                backward=backward,
                traffic=4 * tokens * experts * (5 if backward else 2),
                tolerance=1e-4,
            )
