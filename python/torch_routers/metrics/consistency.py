"""Local routing consistency: whether neighbouring tokens use the same experts (arXiv 2505.16056).

Both metrics say how well a device that holds a few of the experts could serve a model: one that
loads a set of experts for a segment of tokens, and one that keeps a cache of them.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torch_routers.routing import Routing


def segment_routing_performance(routings: Routing | Iterable[Routing], window: int) -> Tensor:
    r"""SRP, how well one set of experts per segment of tokens stands for the tokens' own choices.

    .. math::  \max_{t = 1, \dots, m} F_1(t), \qquad F_1(t) = \frac{
               2 \sum n [n \ge t]}{m \sum [n \ge t] + \sum n}

    The sums are over all segments of :math:`m` tokens, which overlap, all experts, samples and
    routings; :math:`n` is how many tokens of the segment use the expert. A set is the experts that
    at least :math:`t` tokens of the segment use, and is held by all of them: :math:`F_1` is of the
    pairs of token and expert that are predicted so. 1 where the tokens of a segment choose alike,
    and always with ``window=1``. Segment Routing Best Performance of arXiv 2505.16056.

    Args:
        routings: one, or those of several layers or batches, with ``indices`` ``[..., tokens, k]``;
            the leading dimensions are samples, and no segment reaches from one to another. Tokens
            without an expert, masked or dropped, are left out as if they were not there.
        window: :math:`m`, tokens per segment.

    Returns:
        A scalar float64; NaN where no sample has ``window`` tokens. Nothing waits for the device.

    Raises:
        ValueError: an argument that does not fit.

    >>> def chose(*experts):
    ...     return Routing(torch.ones(4, 1), torch.tensor(experts)[:, None], counts=torch.zeros(3))
    >>> segment_routing_performance(chose(1, 1, 1, 1), 2)
    tensor(1., dtype=torch.float64)
    >>> segment_routing_performance(chose(0, 1, 0, 1), 2)  # two experts held, each used once
    tensor(0.6667, dtype=torch.float64)
    """
    caller = "segment_routing_performance"
    if window < 1:
        raise ValueError(f"{caller}: expected window >= 1, got {window}")
    segments = []  # how many pairs of segment and expert have 0, 1, ..., m tokens
    for indices, num_experts in _samples(routings, caller):
        uses, routed = _uses(indices, num_experts)
        if uses.shape[1] < window:
            continue
        before = torch.nn.functional.pad(uses.cumsum(1), (0, 0, 1, 0))
        in_segment = before[:, window:] - before[:, :-window]
        last = torch.arange(window - 1, uses.shape[1], device=uses.device)
        whole = (last < routed[:, None]).unsqueeze(-1).expand_as(in_segment)
        ones = whole.flatten().long()
        sizes = ones.new_zeros(window + 1).scatter_add(0, in_segment.flatten(), ones)
        segments.append(sizes)
    if not segments:
        return torch.tensor(torch.nan, dtype=torch.float64)
    sizes = torch.stack(segments).sum(0)
    uses = sizes * torch.arange(window + 1, device=sizes.device)
    predicted, matched = (x.flip(0).cumsum(0).flip(0)[1:] for x in (window * sizes, uses))
    return (2 * matched / (predicted + uses.sum()).double()).amax()


def segment_cache_hit_rate(routings: Routing | Iterable[Routing], lookahead: int) -> Tensor:
    """SCH, how often an expert is in a cache that knows the next ``lookahead`` tokens, by its size.

    The cache loads an expert when a token asks for it, and gives up the one that the next tokens,
    this one included, use least; of equals, the one that was asked for longest ago. It looks up all
    experts of a token before it loads any, and loads them in the order of the slots. While it is
    not full, a new expert is no miss: it could have been there. Segment Cache Best Hit Rate of
    arXiv 2505.16056. One pass over the tokens finds the rates of caches of all sizes.

    An analysis, not something to log at every step: it goes over the tokens one by one on the CPU.

    Args:
        routings: as in `segment_routing_performance`. Each sample begins with an empty cache, each
            layer has its own. Sort the slots by weight, as routers do: the order matters.
        lookahead: tokens that the cache knows, this one included; at least 1.

    Returns:
        ``[num_experts]`` float64, on the CPU: the share of hits with room for 1, 2, … experts. It
        never falls, and ends with 1; NaN without tokens.

    Raises:
        ValueError: an argument that does not fit.

    >>> indices = torch.tensor([0, 1, 0, 1, 2, 2])[:, None]
    >>> segment_cache_hit_rate(Routing(torch.ones(6, 1), indices, counts=torch.zeros(3)), 2)
    tensor([0.3333, 0.8333, 1.0000], dtype=torch.float64)
    """
    caller = "segment_cache_hit_rate"
    if lookahead < 1:
        raise ValueError(f"{caller}: expected lookahead >= 1, got {lookahead}")
    hits = None  # at each place of the cache
    for indices, num_experts in _samples(routings, caller):
        hits = hits or [0] * num_experts
        if len(hits) != num_experts:
            raise ValueError(
                f"{caller}: expected routings with the same number of experts, "
                f"got {len(hits)} and {num_experts}"
            )
        for sample in indices.tolist():
            tokens = [[e for e in token if e >= 0] for token in sample]
            _count_hits([token for token in tokens if token], lookahead, hits)
    if hits is None:
        raise ValueError(f"{caller}: expected routings, got none")
    total = torch.tensor(hits, dtype=torch.float64)
    return total.cumsum(0) / total.sum()


def _samples(routings: Routing | Iterable[Routing], caller: str) -> Iterator[tuple[Tensor, int]]:
    """``[samples, tokens, k]`` indices of each routing, and its number of experts."""
    for routing in [routings] if isinstance(routings, Routing) else routings:
        indices = routing.indices
        if indices is None or indices.dim() < 2:
            got = "none" if indices is None else list(indices.shape)
            raise ValueError(f"{caller}: expected indices of shape [..., tokens, k], got {got}")
        yield indices.reshape(-1, *indices.shape[-2:]), routing.num_experts


def _uses(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``[samples, tokens, experts]`` int64, routed tokens first, and their number per sample."""
    routed = (indices >= 0).any(-1)
    order = (~routed).long().argsort(dim=1, stable=True).unsqueeze(-1)
    uses = indices.new_zeros(*indices.shape[:-1], num_experts + 1)
    uses = uses.scatter(-1, indices + 1, 1)[..., 1:]  # empty slots go to column 0
    return uses.gather(1, order.expand_as(uses)), routed.sum(1)


def _count_hits(tokens: list[list[int]], lookahead: int, hits: list[int]) -> None:
    """Add to ``hits`` how often an expert was found at each place of a stack of experts.

    The first c of the stack are what a cache of c experts holds, for every c at once (Mattson et
    al., 1970): an expert that is asked for goes on top, and at each place below the expert that is
    worth more stays, up to the place that became free.
    """
    stack: list[int] = []
    ahead, last = [0] * len(hits), [0] * len(hits)
    for token in tokens[:lookahead]:
        for expert in token:
            ahead[expert] += 1
    clock = 0
    for t, token in enumerate(tokens):
        new = 0
        for expert in token:
            if expert in stack:
                hits[stack.index(expert)] += 1
            else:
                hits[len(stack) + new] += 1
                new += 1
        for expert in token:
            free = stack.index(expert) if expert in stack else len(stack)
            if free == len(stack):
                stack.append(expert)
            if free > 0:
                carried = stack[0]
                for place in range(1, free):
                    other = stack[place]
                    if (ahead[other], last[other]) < (ahead[carried], last[carried]):
                        stack[place], carried = carried, other
                stack[free], stack[0] = carried, expert
            clock += 1
            ahead[expert] -= 1
            last[expert] = clock
        for expert in tokens[t + lookahead] if t + lookahead < len(tokens) else ():
            ahead[expert] += 1
