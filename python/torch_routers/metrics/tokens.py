"""What tokens look like to the router: means over tokens, from sums that add up over batches.

A token is *routed* if it has at least one slot in use: it is neither masked nor dropped altogether.
``routing`` is a `Routing` or the `Totals` of some. Everything is detached and float64, and NaN
without tokens.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torch_routers.routing import Routing


class Totals(NamedTuple):
    """All that the metrics of one router need, as sums: over batches, or over ranks."""

    counts: Tensor
    """``[num_experts]`` int64: slots given to each expert, before dropping."""
    top1: Tensor
    """``[num_experts]`` int64: routed tokens whose largest weight is this expert's."""
    tokens: Tensor
    """Scalar int64: tokens that are not masked; routed ones where a routing has no statistics."""
    routed: Tensor
    """Scalar int64: tokens with a slot in use."""
    kept: Tensor
    """Scalar int64: slots in use."""
    ess: Tensor
    """Scalar float64, as the next two: the sum over routed tokens of what `ess` is the mean of."""
    entropy: Tensor | None
    """The sum of the normalised entropies. None for a router without logits."""
    lse: Tensor | None
    """The sum of the log-sum-exps. None for a router without logits."""

    def plus(self, other: "Totals") -> "Totals":
        """The totals of both."""
        return Totals(*(a if b is None else a + b for a, b in zip(self, other)))


def totals(routing: Routing | Totals) -> Totals:
    """The sums of one routing; the totals themselves, if given those. Nothing waits for the device.

    >>> router = TopKRouter(hidden_size=8, num_experts=4, top_k=2)
    >>> sums = totals(router(torch.randn(3, 8))).plus(totals(router(torch.randn(5, 8))))
    >>> sums.tokens, sums.kept
    (tensor(8), tensor(16))
    """
    if isinstance(routing, Totals):
        return routing
    used, weights = routing.used(), routing.weights.detach()
    routed = used.any(-1)
    top = top_expert(routing)
    last = routing.num_experts  # where tokens are counted that are not routed
    top1 = top.new_zeros(last + 1)
    top1 = top1.scatter_add(0, torch.where(routed, top, last).flatten(), routed.flatten().long())
    magnitude = torch.where(used, weights.abs(), 0).double()
    squares = magnitude.square().sum(-1)
    ess = torch.where(squares == 0, 0, magnitude.sum(-1).square() / squares)
    statistics, entropy, lse = routing.statistics, None, None
    if routing.logits is not None:
        logits = routing.logits.detach()
        uniform = math.log(max(2, last))
        lse = logits.logsumexp(-1)
        countable = routed & (lse != -torch.inf)  # a row of -inf adds nothing, NaN is noticed
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1) / uniform
        entropy = torch.where(countable, entropy, 0).sum(dtype=torch.float64)
        lse = torch.where(countable, lse, 0).sum(dtype=torch.float64)
    return Totals(
        counts=routing.counts,
        top1=top1[:last],
        tokens=routed.sum() if statistics is None else statistics.group_tokens.sum(),
        routed=routed.sum(),
        kept=used.sum(),
        ess=ess.sum(),
        entropy=entropy,
        lse=lse,
    )


def entropy(routing: Routing | Totals) -> Tensor:
    r"""The mean entropy of softmax(logits) of a routed token, over that of equal probabilities.

    .. math::  -\frac{1}{T} \sum_t \sum_e p_{te} \ln p_{te} \Big/ \ln E

    1 is undecided, 0 certain; 0 for a single expert. A row of -inf alone adds 0.

    Raises:
        ValueError: the router has no logits.
    """
    sums = totals(routing)
    return _of_logits("entropy", sums.entropy) / sums.routed


def z_mean(routing: Routing | Totals) -> Tensor:
    """The mean log-sum-exp of the logits of a routed token, whose square is the z-loss.

    A row of -inf alone adds 0.

    Raises:
        ValueError: the router has no logits.
    """
    sums = totals(routing)
    return _of_logits("z_mean", sums.lse) / sums.routed


def top1_fraction(routing: Routing | Totals) -> Tensor:
    """``[experts]``: the share of the routed tokens whose largest weight is this expert's.

    Of equal weights it is the first slot's. Switch (arXiv 2101.03961) balances this share.
    """
    sums = totals(routing)
    return sums.top1 / sums.routed.double()


def selection_share(routing: Routing | Totals) -> Tensor:
    """``[experts]``: the share of the tokens that choose each expert, before dropping.

    It adds up to the number of slots per token.
    """
    sums = totals(routing)
    return sums.counts / sums.tokens.double()


def drop_rate(routing: Routing | Totals) -> Tensor:
    """The share of the given slots that are empty in ``indices``.

    ``counts`` are taken before dropping, the slots in use after it.
    """
    sums = totals(routing)
    given = sums.counts.sum()
    return (given - sums.kept) / given.double()


def active_mean(routing: Routing | Totals) -> Tensor:
    """The mean number of slots that a token uses: k, unless it varies or slots are dropped."""
    sums = totals(routing)
    return sums.kept / sums.tokens.double()


def ess(routing: Routing | Totals) -> Tensor:
    r"""The effective number of experts of a routed token, by its weights.

    .. math::  \frac{1}{T} \sum_t \big( \lVert w_t \rVert_1 / \lVert w_t \rVert_2 \big)^2

    k where the weights are equal, 1 where one expert has all; a token without weight adds 0.
    """
    sums = totals(routing)
    return sums.ess / sums.routed


def top_expert(routing: Routing) -> Tensor:
    """``[...]`` int64: the expert of the largest weight of each token; -1 if it is not routed."""
    used = routing.used()
    slot = torch.where(used, routing.weights.detach().abs(), -1).argmax(-1, keepdim=True)
    expert = slot if routing.indices is None else routing.indices.gather(-1, slot)
    return torch.where(used.any(-1), expert.squeeze(-1), -1)


def _of_logits(name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"{name}: expected a routing with logits, got one without")
    return value
