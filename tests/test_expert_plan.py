"""What is true of `expert_plan` alone: many slots and threads, and bounds known late."""

import pytest
import torch

from torch_routers import ops


def by_sorting(experts, num_experts):
    """`experts`: of each slot; num_experts for none."""
    order = experts.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    counts = torch.bincount(experts, minlength=num_experts + 1)[:-1]
    live = counts.sum()
    return (
        order.where(torch.arange(len(order)) < live, -1),
        inverse.where(inverse < live, -1),
        counts,
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("tokens", [20_000, 65_537])
def test_equals_a_sort(threads, tokens):
    generator = torch.Generator().manual_seed(tokens)
    indices = torch.randint(-1, 50, (tokens, 4), generator=generator)
    weights = torch.randn(tokens, 8, generator=generator).relu()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plans = ops.expert_plan(indices, 50), ops.expert_plan_from_weights(weights)
    finally:
        torch.set_num_threads(before)
    of_slot = torch.arange(8).expand_as(weights).where(weights != 0, 8)
    for plan, experts, num_experts in (
        (plans[0], indices.where(indices >= 0, 50), 50),
        (plans[1], of_slot, 8),
    ):
        order, inverse, counts = by_sorting(experts.flatten(), num_experts)
        assert torch.equal(plan.order, order)
        assert torch.equal(plan.inverse.flatten(), inverse)
        assert torch.equal(plan.counts, counts)
        assert torch.equal(plan.offsets[1:], counts.cumsum(0))
        assert plan.offsets[0] == plan.dropped == 0


def test_an_index_out_of_range_in_any_part_is_an_error():
    indices = torch.zeros(200_000, 1, dtype=torch.int64)
    for slot in 0, 40_000, 199_999:
        wrong = indices.clone()
        wrong[slot] = 4
        with pytest.raises(ValueError, match=r"expected indices in \[-1, num_experts=4\), got 4"):
            ops.expert_plan(wrong, 4)


def test_other_sizes_and_bounds_compile_nothing_anew():
    def function(indices, weights):
        plan = ops.expert_plan(indices, 5, max_rows=indices.shape[0] + 1)
        return *plan, *ops.expert_plan_from_weights(weights, max_rows=2 * weights.shape[0])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in 6, 9, 20:
        inputs = torch.randint(-1, 5, (tokens, 2)), torch.randn(tokens, 5).relu()
        with torch.compiler.set_stance("fail_on_recompile" if tokens > 6 else "default"):
            results = compiled(*inputs)
        for x, y in zip(results, function(*inputs)):
            assert torch.equal(x, y)
