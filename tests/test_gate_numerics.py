"""How exact the gate's weights are, which experts it selects, and what it does with NaN."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_routers import ops

#: The formula of each score in fp64, by its name, with the options that choose it.
SCORES = {
    "softmax": (lambda x: x.softmax(-1), {}),
    "sigmoid": (lambda x: x.sigmoid(), {"score": "sigmoid"}),
    "sqrt_softplus": (
        lambda x: torch.nn.functional.softplus(x, threshold=700).sqrt(),
        {"score": "sqrt_softplus"},
    ),
}
EVERY_SCORE = pytest.mark.parametrize("score", SCORES)

# ---- weights -------------------------------------------------------------------------------------


def adversarial(experts):
    """Rows that are hard on a softmax."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(10, experts, generator=generator)
    yield 1e4 * normal.sign()
    yield 1e4 + normal
    yield -1e4 + normal
    yield torch.full((1, experts), 0.3)
    yield 20 * torch.eye(experts)
    yield 1e-40 * normal  # subnormal
    yield torch.linspace(-80, 0, experts)[None]
    yield 30 * normal


def ulps(actual, exact):
    """The distance in float32 numbers; of the same sign."""
    rounded = exact.float()
    return (actual.view(torch.int32).long() - rounded.view(torch.int32).long()).abs()


@pytest.mark.parametrize("renormalize", [True, False])
@EVERY_SCORE
def test_weights_are_within_four_ulps(score, renormalize):
    formula, options = SCORES[score]
    for experts, top_k in (8, 2), (64, 8), (256, 8), (9, 9):
        normal = torch.randn(200, experts, generator=torch.Generator().manual_seed(0))
        for logits in normal, *adversarial(experts):
            weights, indices, _ = ops.topk_gate(logits, top_k, renormalize=renormalize, **options)
            exact = formula(logits.double()).gather(1, indices)
            if renormalize:
                exact = exact / (exact.sum(1, keepdim=True) + (0 if score == "softmax" else 1e-20))
            # The difference x - max of a softmax is rounded to float32 too, which moves a weight
            # by half of its last place times 2 |x - max|.
            largest = logits.amax(1, keepdim=True)
            rounding = (largest - logits.gather(1, indices)) if score == "softmax" else 0
            normal_numbers = exact > torch.finfo(torch.float32).tiny
            excess = (ulps(weights, exact) - 4 - rounding)[normal_numbers]
            assert (excess <= 0).all(), (experts, top_k, excess.max())
            tiny = (weights - exact).abs()[~normal_numbers]
            assert (tiny <= torch.finfo(torch.float32).tiny).all()


# ---- selection -----------------------------------------------------------------------------------


def rank(row, expert):
    """NaN before all numbers, the larger before the smaller, of equals the lower index first."""
    x = row[expert]
    return (0, 0.0, expert) if math.isnan(x) else (1, -x, expert)


numbers = st.floats(width=32)
bfloat16 = numbers.map(lambda x: torch.tensor(x).bfloat16().item())
rows = st.integers(1, 70).flatmap(
    lambda experts: st.one_of(
        st.lists(numbers, min_size=experts, max_size=experts),
        st.lists(bfloat16, min_size=experts, max_size=experts),
        numbers.map(lambda x: [x] * experts),
        st.tuples(numbers, numbers).flatmap(
            lambda two: st.lists(st.sampled_from(two), min_size=experts, max_size=experts)
        ),
    )
)


@settings(max_examples=200, deadline=None)
@given(rows, st.data())
def test_selects_as_a_stable_sort_does(row, data):
    top_k = data.draw(st.integers(1, len(row)))
    _, indices, _ = ops.topk_gate(torch.tensor([row]), top_k)
    assert indices[0].tolist() == sorted(range(len(row)), key=partial(rank, row))[:top_k]


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("renormalize", [True, False])
@EVERY_SCORE
def test_what_is_not_finite_stays_in_its_row(score, renormalize, value):
    options = {"renormalize": renormalize, "statistics": True, **SCORES[score][1]}
    for experts, top_k in (1, 1), (9, 3), (40, 8), (70, 70):
        logits = torch.randn(experts + 2, experts, generator=torch.Generator().manual_seed(2))
        clean = ops.topk_gate(logits, top_k, **options)
        for place in range(experts):
            logits[place + 1, place] = value  # in each position, in a row of its own
        weights, indices, statistics = ops.topk_gate(logits, top_k, **options)
        assert ((indices >= 0) & (indices < experts)).all()
        assert (indices.sort(1).values.diff(dim=1) > 0).all()
        for row in 0, experts + 1:
            assert torch.equal(weights[row], clean[0][row])
            assert torch.equal(indices[row], clean[1][row])
            assert torch.equal(statistics.lse[row], clean[2].lse[row])
        spoiled = weights[1:-1].isnan().any(1)
        assert spoiled.all() if math.isnan(value) else (value > 0 or not spoiled.any())
