"""A mixture of low-rank experts of 1024 features, against what people write by hand.

Stacked by hand has its parameters stacked before, outside the time; ours and the loop have one
tensor per expert. Both precisions of torch's matrix products as in `bench_moe`: "medium".
"""

from collections.abc import Iterator

import torch

from torch_routers.ops import lora_mix

from .harness import Options, Row, name_of

HIDDEN = 1024
#: (num_experts, top_k, rank); as many slots as experts: all of them, without indices
MIXTURES = [(8, 2, 16), (64, 8, 8), (8, 8, 16)]


def rows(options: Options) -> Iterator[Row]:
    for experts, slots, rank in MIXTURES[:1] if options.quick else MIXTURES:
        for tokens in (1, 64) if options.quick else (1, 64, 4096):
            for backward in False, True:
                yield row(experts, slots, rank, tokens, backward)


def row(experts: int, slots: int, rank: int, tokens: int, backward: bool) -> Row:
    generator = torch.Generator().manual_seed(0)
    stacked_a = torch.randn(experts * rank, HIDDEN, generator=generator) / HIDDEN**0.5
    stacked_b = torch.randn(HIDDEN, experts * rank, generator=generator) / rank**0.5
    factors_a, factors_b = stacked_a.split(rank), stacked_b.split(rank, 1)
    factors_a, factors_b = ([x.clone() for x in factors] for factors in (factors_a, factors_b))

    def inputs():
        x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, experts)
        return (x, *weights.topk(slots)) if slots < experts else (x, weights)

    def dense(weights, indices=None):
        if indices is None:
            return weights
        return weights.new_zeros(tokens, experts).scatter(1, indices, weights)

    def stacked(x, *routing):
        gates = dense(*routing).repeat_interleave(rank, 1)
        return ((x @ stacked_a.T * gates) @ stacked_b.T,)

    def einsum(x, *routing):
        a, b = stacked_a.view(experts, rank, HIDDEN), stacked_b.view(HIDDEN, experts, rank)
        u = torch.einsum("th,erh->ter", x, a)
        return (torch.einsum("ter,te,oer->to", u, dense(*routing), b),)

    def loop(x, weights, indices=None):
        y = torch.zeros_like(x)
        for e, (a, b) in enumerate(zip(factors_a, factors_b)):
            if indices is None:
                y = y + x @ a.T @ b.T * weights[:, e, None]
                continue
            token, slot = torch.where(indices == e)
            part = x[token] @ a.T @ b.T
            y = y.index_add(0, token, part * weights[token, slot, None])
        return (y,)

    def ours(x, *routing):
        return (lora_mix(x, factors_a, factors_b, *routing),)

    return Row(
        name=name_of("lora_mix", backward, experts, slots, tokens),
        inputs=inputs,
        ours=ours,
        baselines={"stacked": stacked, "einsum": einsum, "loop": loop},
        backward=backward,
        max_rounds=9 if tokens > 1000 else 1000,
        matmul_precision="medium",
    )
