"""Local routing consistency, against one segment and one cache at a time."""

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr
from torch_routers.metrics import segment_cache_hit_rate, segment_routing_performance

E = 6


def routing_of(indices, num_experts=E):
    indices = torch.as_tensor(indices)
    return tr.Routing(torch.ones(indices.shape), indices, counts=torch.zeros(num_experts))


def walk(*leading, k=2, seed=0):
    """Tokens that mostly choose what the one before chose."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*leading, E, generator=generator)
    for t in range(1, leading[-1]):
        scores[..., t, :] = 0.7 * scores[..., t - 1, :] + 0.6 * scores[..., t, :]
    return scores.topk(k).indices


def samples_of(indices):
    """Lists of the experts of each token that has some."""
    for sample in indices.reshape(-1, *indices.shape[-2:]).tolist():
        yield [chosen for chosen in ([e for e in t if e >= 0] for t in sample) if chosen]


def performance_by_loop(all_indices, m):
    """The F1 of predicting, for each segment, the experts of at least t of its tokens."""
    best = 0
    for t in range(1, m + 1):
        right = predicted = actual = 0
        for indices in all_indices:
            for tokens in samples_of(indices):
                for begin in range(len(tokens) - m + 1):
                    segment = tokens[begin : begin + m]
                    held = [e for e in range(E) if sum(e in token for token in segment) >= t]
                    for token in segment:
                        right += len(set(held) & set(token))
                        predicted += len(held)
                        actual += len(token)
        best = max(best, 2 * right / (predicted + actual))
    return best


def hit_rate_by_loop(all_indices, m, size):
    """A cache of one size, which is told the tokens from this one on, as far as it has not seen."""
    hits = total = 0
    for indices in all_indices:
        for tokens in samples_of(indices):
            cache, asked, seen, clock = set(), {}, set(), 0
            for t, token in enumerate(tokens):
                before, seen_before = set(cache), set(seen)
                for expert in token:
                    room = expert not in seen_before and len(seen) < size
                    hits += expert in before or room
                    seen.add(expert)
                    total += 1
                for j, expert in enumerate(token):
                    # What is ahead: the slots of this token that are still to be loaded, and the
                    # tokens after it.
                    ahead = [*token[j:], *(e for later in tokens[t + 1 : t + m] for e in later)]
                    if expert not in cache and len(cache) == size:
                        cache.remove(min(cache, key=lambda e: (ahead.count(e), asked[e])))
                    cache.add(expert)
                    clock += 1
                    asked[expert] = clock
    return hits / total


LAYERS = [walk(20), walk(3, 9, k=1, seed=1), walk(2, 2, 7, k=3, seed=2)]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("layers", [*([layer] for layer in LAYERS), LAYERS], ids=len)
def test_segment_routing_performance_equals_a_loop(layers, window):
    value = segment_routing_performance([routing_of(layer) for layer in layers], window)
    assert value.dtype == torch.float64
    assert_close(value.item(), performance_by_loop(layers, window), rtol=1e-14, atol=0)
    if window == 1:
        assert value == 1
    if len(layers) == 1:
        assert segment_routing_performance(routing_of(layers[0]), window) == value


@pytest.mark.parametrize("lookahead", [1, 2, 4, 100])
@pytest.mark.parametrize("layers", [*([layer] for layer in LAYERS), LAYERS], ids=len)
def test_segment_cache_hit_rate_equals_a_cache_of_each_size(layers, lookahead):
    rates = segment_cache_hit_rate([routing_of(layer) for layer in layers], lookahead)
    expected = [hit_rate_by_loop(layers, lookahead, size) for size in range(1, E + 1)]
    assert_close(rates, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    assert (rates.diff() >= 0).all() and rates[-1] == 1


def test_a_cache_that_looks_ahead_is_better():
    routing = routing_of(walk(300, k=1))
    least_recent, ahead = (segment_cache_hit_rate(routing, m) for m in (1, 8))
    assert (least_recent[:4] + 0.02 < ahead[:4])[1:].all()


def test_consistent_tokens_and_tokens_that_take_turns():
    same, turns = routing_of([[1, 2]] * 8), routing_of([[0], [1], [2]] * 4)
    assert segment_routing_performance(same, 4) == 1
    assert segment_cache_hit_rate(same, 4)[1] == 1
    # Three experts held, of which each token uses one: precision 1/3, recall 1.
    assert_close(segment_routing_performance(turns, 3).item(), 2 * (1 / 3) / (1 + 1 / 3))
    assert segment_cache_hit_rate(turns, 1)[0] == 1 / 12


def test_empty_slots_and_tokens_that_are_not_there():
    """Masked tokens are left out wherever they stand; a token with one slot left stays."""
    indices = walk(2, 9)
    indices[:, 4, 1] = -1
    padded = torch.full((2, 14, 2), -1)
    padded[0, torch.tensor([0, 1, 3, 4, 5, 8, 9, 12, 13])] = indices[0]
    padded[1, 5:] = indices[1]
    for metric in segment_routing_performance, segment_cache_hit_rate:
        for m in 2, 4:
            alone, within = metric(routing_of(indices), m), metric(routing_of(padded), m)
            assert torch.equal(alone, within)
    assert_close(
        segment_routing_performance(routing_of(padded), 3).item(),
        performance_by_loop([indices], 3),
    )


def test_without_segments_there_is_no_number():
    assert segment_routing_performance(routing_of(walk(3)), 4).isnan()
    assert segment_routing_performance([], 4).isnan()
    assert segment_routing_performance(routing_of([[-1, -1]] * 4), 4).isnan()
    assert segment_cache_hit_rate(routing_of([[-1, -1]] * 4), 4).isnan().all()


def test_of_a_router():
    router = tr.TopKRouter(8, E, 2).eval()
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    routing = router(torch.randn(2, 12, 8), valid_mask=mask)
    assert 0.3 < segment_routing_performance(routing, 4) < 1
    assert segment_cache_hit_rate(routing, 4).shape == (E,)


@pytest.mark.parametrize("metric", [segment_routing_performance, segment_cache_hit_rate])
def test_errors(metric):
    with pytest.raises(ValueError, match=r"expected (window|lookahead) >= 1, got 0"):
        metric(routing_of(walk(3)), 0)
    with pytest.raises(ValueError, match=r"expected indices of shape \[..., tokens, k\], got none"):
        metric(tr.Routing(torch.ones(3, E), counts=torch.zeros(E)), 2)
    with pytest.raises(ValueError, match=r"expected indices of shape .* got \[2\]"):
        metric(routing_of([0, 1]), 2)
    if metric is segment_cache_hit_rate:
        with pytest.raises(ValueError, match="expected routings with the same number of experts"):
            metric([routing_of(walk(3)), routing_of(walk(3), 7)], 2)
        with pytest.raises(ValueError, match="expected routings, got none"):
            metric([], 2)
