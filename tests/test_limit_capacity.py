"""What is true of limit_capacity and expert_capacity alone: optimality, who competes with whom,
randomness, derivatives."""

import itertools
import math

import pytest
import torch

from cases.op_case import seeded
from cases.ops.limit_capacity import drawn, plan_of, scores_of
from torch_routers import ops

POLICIES = "position", "weight", "priority", "random"
EXPERTS, GROUPS = 4, torch.tensor([0, 13, 13, 40])


def limit(indices, policy, capacity=5, *, scores=None, **options):
    """The new plan of these indices, with scores of its own."""
    scores = scores_of(policy, indices) if scores is None else scores
    if policy == "random":
        options = {"seed": 5} | options
    argument = {"weight": "weights", "priority": "priority"}.get(policy)
    options |= {argument: scores} if argument else {}
    return ops.limit_capacity(plan_of(indices, EXPERTS), capacity, policy=policy, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


# ---- which rows are kept -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_no_dropped_slot_ranks_before_a_kept_one(policy, seed):
    """In each expert and group; and no row is dropped while there is room."""
    indices = drawn(40, 3, EXPERTS, seed=seed)
    scores = scores_of(policy, indices, "ties")
    new = limit(indices, policy, scores=scores, group_offsets=GROUPS)

    def rank(token, j):
        if policy == "position":
            return j, token
        return -scores.view(40, -1).expand(40, 3)[token, j].item(), token, j

    assert new.dropped > 0
    for expert, (first, past) in itertools.product(range(EXPERTS), itertools.pairwise(GROUPS)):
        slots = [(int(t), int(j)) for t, j in (indices == expert).nonzero() if first <= t < past]
        kept = [slot for slot in slots if new.inverse[slot] >= 0]
        assert len(kept) == min(5, len(slots))
        lost = set(slots) - set(kept)
        assert all(rank(*a) < rank(*b) for a in kept for b in lost)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_new_plan_is_a_plan(policy):
    indices = drawn(40, 3, EXPERTS)
    new = limit(indices, policy, group_offsets=GROUPS)
    again = plan_of(indices.where(new.inverse >= 0, -1), EXPERTS)
    assert same(new[:4], again[:4])
    assert new.dropped == (indices >= 0).sum() - new.offsets[-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_room_for_all_changes_nothing(policy):
    indices = drawn(40, 3, EXPERTS)
    new, plan = limit(indices, policy, int((indices == 0).sum())), plan_of(indices, EXPERTS)
    assert same(new, plan)
    assert not {x.data_ptr() for x in new} & {x.data_ptr() for x in plan}


def test_a_plan_may_have_gaps_in_memory():
    plan = plan_of(drawn(40, 3, EXPERTS), EXPERTS)
    apart = [torch.stack([x, x - 9], -1) for x in plan[:4]]
    apart = type(plan)(*(x[..., 0] for x in apart), plan.dropped)
    transposed = apart._replace(inverse=plan.inverse.t().contiguous().t())
    for other in apart, transposed:
        assert not other.inverse.is_contiguous()
        assert same(ops.limit_capacity(other, 5), ops.limit_capacity(plan, 5))


@pytest.mark.parametrize("policy", POLICIES)
def test_limiting_twice_is_limiting_once(policy):
    indices = drawn(40, 3, EXPERTS)
    scores = scores_of(policy, indices)
    once = limit(indices, policy, scores=scores)
    twice = limit(indices.where(once.inverse >= 0, -1), policy, scores=scores)
    assert same(once[:4], twice[:4]) and twice.dropped == 0


def test_position_serves_first_choices_before_second_ones():
    new = limit(torch.tensor([[1, 0], [2, 0], [0, 1], [0, 2]]), "position", 3)
    assert (new.inverse >= 0).tolist() == [[True, True], [True, False], [True, True], [True, True]]


def test_later_tokens_take_no_first_choice_from_earlier_ones():
    indices = drawn(40, 1, EXPERTS)
    whole, start = limit(indices, "position"), limit(indices[:20], "position")
    assert torch.equal(whole.inverse[:20] >= 0, start.inverse >= 0)


@pytest.mark.parametrize("policy", ["weight", "priority"])
def test_the_order_of_floats_is_that_of_the_gate(policy):
    x = torch.tensor([-0.0, 0.0, torch.nan, torch.inf, -torch.nan, 1e-45, -torch.inf])
    indices = torch.zeros(7, 1, dtype=torch.int64)
    expected = [2, 4, 3, 5, 0, 1, 6]
    for capacity in range(8):
        new = limit(indices, policy, capacity, scores=x[:, None] if policy == "weight" else x)
        assert new.order[:capacity].tolist() == sorted(expected[:capacity])


@pytest.mark.parametrize("policy", POLICIES)
def test_empty_slots_do_not_compete(policy):
    indices = drawn(40, 3, EXPERTS)
    indices[::3] = -1
    scores = scores_of(policy, indices)
    expected = limit(indices, policy, scores=scores)
    if policy == "weight":
        scores = scores.where(indices >= 0, torch.inf)
    if policy == "priority":
        scores[::3] = torch.nan
    assert same(limit(indices, policy, scores=scores), expected)
    compact = [i for i in range(40) if i % 3]
    if scores is not None:
        scores = scores[compact]
    ids = torch.tensor(compact) if policy == "random" else None
    alone = limit(indices[compact], policy, scores=scores, row_ids=ids)
    assert torch.equal(alone.inverse, expected.inverse[compact])


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_are_limited_alone(policy):
    indices = drawn(40, 3, EXPERTS)
    scores = scores_of(policy, indices)
    capacity = torch.tensor([2, 9, 6])
    ids = torch.arange(40) if policy == "random" else None
    whole = limit(indices, policy, capacity, scores=scores, group_offsets=GROUPS, row_ids=ids)
    for g, (first, past) in enumerate(itertools.pairwise(GROUPS.tolist())):
        part = limit(
            indices[first:past],
            policy,
            int(capacity[g]),
            scores=None if scores is None else scores[first:past],
            row_ids=None if ids is None else ids[first:past],
        )
        assert torch.equal(part.inverse >= 0, whole.inverse[first:past] >= 0)


# ---- randomness ----------------------------------------------------------------------------------


def test_a_random_choice_follows_the_rows():
    indices = drawn(40, 3, EXPERTS)
    ids = 2**40 + torch.arange(40)
    expected = limit(indices, "random", row_ids=ids).inverse >= 0
    order = seeded(40).argsort()
    actual = limit(indices[order], "random", row_ids=ids[order]).inverse >= 0
    assert torch.equal(actual, expected[order])


def test_rows_are_numbered_from_0():
    indices = drawn(40, 3, EXPERTS)
    assert same(limit(indices, "random"), limit(indices, "random", row_ids=torch.arange(40)))


def test_seeds_choose_differently():
    indices = drawn(40, 3, EXPERTS)
    chosen = {tuple(limit(indices, "random", seed=seed).order.tolist()) for seed in range(10)}
    assert len(chosen) == 10
    tensor = torch.tensor(3)
    assert same(limit(indices, "random", seed=3), limit(indices, "random", seed=tensor))


def test_a_random_choice_is_fair():
    """Each of 8 rows is kept in about half of 2000 choices: within 5 standard deviations."""
    indices = torch.zeros(8, 1, dtype=torch.int64)
    kept = sum(limit(indices, "random", 4, seed=seed).inverse >= 0 for seed in range(2000))
    assert ((kept - 1000).abs() < 5 * math.sqrt(2000 / 4)).all()


# ---- derivatives, transforms, compilation --------------------------------------------------------


@pytest.mark.parametrize("policy", ["weight", "priority"])
def test_scores_get_no_gradient(policy):
    indices = drawn(40, 3, EXPERTS)
    scores = scores_of(policy, indices)

    def kept(x):
        rows = limit(indices, policy, scores=x).inverse
        assert not rows.requires_grad
        return (rows if policy == "weight" else rows[:, 0]) >= 0

    def kept_sum(x):
        return (x * kept(x)).sum()

    expected = kept(scores).double()
    leaf = scores.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(kept_sum(leaf), leaf)[0], expected)
    assert torch.equal(torch.func.grad(kept_sum)(scores), expected)
    _, tangent = torch.func.jvp(kept_sum, (scores,), (torch.ones_like(scores),))
    assert tangent == expected.sum()


def test_vmap_limits_each_sample():
    batch = [drawn(12, 2, EXPERTS, seed=seed) for seed in range(3)]
    plans = [plan_of(indices, EXPERTS) for indices in batch]
    weights = seeded(3, 12, 2)
    stacked = type(plans[0])(*map(torch.stack, zip(*plans)))

    def one(plan, x):
        return ops.limit_capacity(plan, 2, policy="weight", weights=x)

    actual = torch.func.vmap(one)(stacked, weights)
    expected = [one(plan, x) for plan, x in zip(plans, weights)]
    assert same(actual, map(torch.stack, zip(*expected)))
    shared = torch.func.vmap(one, in_dims=(None, -1))(plans[0], weights.movedim(0, -1))
    assert same(shared, map(torch.stack, zip(*(one(plans[0], x) for x in weights))))


def test_compiles_once_for_all_seeds_and_capacities():
    indices = drawn(40, 3, EXPERTS)
    compiled = torch.compile(limit, fullgraph=True, backend="aot_eager")
    for seed, capacity in (1, 5), (2, 6), (2**40, 1):
        options = {"seed": torch.tensor(seed), "capacity": torch.tensor([capacity])}
        with torch.compiler.set_stance("default" if seed == 1 else "fail_on_recompile"):
            actual = compiled(indices, "random", **options)
        assert same(actual, limit(indices, "random", **options))


# ---- expert_capacity -----------------------------------------------------------------------------


def test_expert_capacity_is_the_exact_quotient_rounded_up():
    tokens = torch.cat([torch.arange(3000), 10 ** torch.arange(4, 13)])
    for top_k, num_experts, hundredths in itertools.product(
        (1, 2, 8), (1, 7, 10, 64), (100, 110, 125)
    ):
        actual = ops.expert_capacity(tokens, top_k, num_experts, hundredths / 100)
        expected = -(-tokens * top_k * hundredths // (100 * num_experts))
        assert torch.equal(actual, expected)


def test_expert_capacity_has_a_minimum():
    tokens = torch.tensor([0, 8, 80])
    assert ops.expert_capacity(tokens, 1, 4, 1.0, min_capacity=8).tolist() == [8, 8, 20]
    assert ops.expert_capacity(tokens, 1, 4, 0.0).tolist() == [0, 0, 0]


def test_expert_capacity_compiles_and_maps():
    tokens = torch.tensor([[3, 70], [1000, 0]])
    compiled = torch.compile(ops.expert_capacity, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, 2, 8, 1.25), ops.expert_capacity(tokens, 2, 8, 1.25))
    mapped = torch.func.vmap(lambda x: ops.expert_capacity(x, 2, 8, 1.25))(tokens)
    assert torch.equal(mapped, ops.expert_capacity(tokens, 2, 8, 1.25))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_tokens": torch.tensor([1.0])}, "num_tokens in int64, got float32"),
        ({"top_k": 0}, "top_k >= 1, got 0"),
        ({"num_experts": 0}, "num_experts >= 1, got 0"),
        ({"factor": -0.5}, "a finite factor >= 0, got -0.5"),
        ({"factor": math.inf}, "a finite factor >= 0, got inf"),
        ({"factor": math.nan}, "a finite factor >= 0, got nan"),
        ({"min_capacity": -1}, "min_capacity >= 0, got -1"),
    ],
)
def test_expert_capacity_says_what_is_wrong(change, said):
    arguments = {"num_tokens": torch.tensor([4]), "top_k": 1, "num_experts": 2, "factor": 1.0}
    with pytest.raises(ValueError) as info:
        ops.expert_capacity(**arguments | change)
    assert str(info.value).splitlines()[0] == f"expert_capacity: expected {said}"
