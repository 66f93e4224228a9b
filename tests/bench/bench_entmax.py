"""`ops.entmax` against the same in PyTorch: solved by sorting, and by Newton's method compiled."""

from collections.abc import Iterator

import torch

from torch_routers import ops

from .harness import Options, Row


def ours(logits, alpha):
    return (ops.entmax(logits, alpha)[0],)


class _Weights(torch.autograd.Function):
    """Weights from a threshold, with the gradient that needs the weights alone."""

    @staticmethod
    def forward(ctx, logits, tau, alpha):
        distance = ((alpha - 1) * logits - tau).clamp(min=0)
        weights = distance.square() if alpha == 1.5 else distance ** (1 / (alpha - 1))
        weights = weights / weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights)
        ctx.alpha = alpha
        return weights

    @staticmethod
    def backward(ctx, grad):
        (weights,) = ctx.saved_tensors
        slopes = torch.where(weights > 0, weights ** (2 - ctx.alpha), 0)
        mean = (slopes * grad).sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True)
        return slopes * (grad - mean), None, None


def by_sorting(logits, alpha):
    """1.5 and 2: the threshold for each possible number of experts, and the one that fits."""
    with torch.no_grad():
        x = (alpha - 1) * logits
        best, _ = x.sort(-1, descending=True)
        count = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
        sums = best.cumsum(-1)
        if alpha == 2:
            tau = (sums - 1) / count
        else:
            mean = sums / count
            spread = best.square().cumsum(-1) - count * mean.square()
            tau = mean - ((1 - spread).clamp(min=0) / count).sqrt()
        support = (tau < best).sum(-1, keepdim=True)
        tau = tau.gather(-1, support - 1)
    return (_Weights.apply(logits, tau, alpha),)


def newton(logits, alpha, steps=9):
    """From the left, where it is monotone for alpha <= 2."""
    with torch.no_grad():
        x = (alpha - 1) * logits
        power = 1 / (alpha - 1)
        tau = x.amax(-1, keepdim=True) - 1
        for _ in range(steps):
            distance = (x - tau).clamp(min=0)
            if alpha == 1.5:
                total, slope = distance.square().sum(-1, True), 2 * distance.sum(-1, True)
            elif alpha == 2:
                total, slope = distance.sum(-1, True), (distance > 0).sum(-1, True)
            else:
                total = (distance**power).sum(-1, True)
                slope = power * (distance ** (power - 1)).sum(-1, True)
            tau = tau + (total - 1) / slope
    return (_Weights.apply(logits, tau, alpha),)


def rows(options: Options) -> Iterator[Row]:
    for alpha in 1.5, 2.0, 1.7:
        by = {"sort": by_sorting} if alpha != 1.7 else {"Newton": newton}
        for experts, _, tokens in options.cases():
            if alpha == 1.7 and tokens not in (1, 512):
                continue
            for backward in False, True:
                direction = "forward+backward" if backward else "forward"
                yield Row(
                    name=f"entmax {direction} alpha={alpha} E={experts} T={tokens}",
                    inputs=lambda e=experts, t=tokens, a=alpha: (torch.randn(t, e), a),
                    ours=ours,
                    baselines=by,
                    compiled={"Newton": newton, **({"sort": by_sorting} if alpha != 1.7 else {})},
                    backward=backward,
                    traffic=(8 + 12 * backward) * tokens * experts,
                )
