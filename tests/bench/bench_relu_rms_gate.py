"""`ops.relu_rms_gate`, weights and counts, against what PyTorch says in a few lines."""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .harness import Options, Row, name_of


def plain(logits, gain):
    a = logits.relu()
    weights = a * (a.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain
    return weights, (a > 0).sum(0)


def rms_norm(logits, gain):
    a = logits.relu()
    return torch.nn.functional.rms_norm(a, a.shape[-1:], gain, 1e-5), (a > 0).sum(0)


def ours(logits, gain):
    weights, _, counts = ops.relu_rms_gate(logits, gain)
    return weights, counts


def rows(options: Options) -> Iterator[Row]:
    for experts, k, tokens in options.cases():
        for backward in False, True:
            yield Row(
                name=name_of("relu_rms_gate", backward, experts, k, tokens),
                inputs=lambda e=experts, t=tokens: (torch.randn(t, e), torch.rand(e)),
                ours=ours,
                baselines={"plain": plain, "rms_norm": rms_norm},
                compiled={"plain": plain},
                backward=backward,
                traffic=tokens * experts * (8 + 12 * backward),
                tolerance=2e-5,
            )
