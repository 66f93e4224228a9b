"""expert_plan by index and by weight: the same reference."""

import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def plan(expert_of_slot, shape, num_experts, max_rows):
    """`expert_of_slot`: a number or None for each slot of all tokens."""
    size = len(expert_of_slot)
    max_rows = size if max_rows is None else max_rows
    order, counts, dropped = [], [0] * num_experts, 0
    for expert in range(num_experts):
        for slot in range(size):
            if expert_of_slot[slot] != expert:
                continue
            if len(order) < max_rows:
                order.append(slot)
                counts[expert] += 1
            else:
                dropped += 1
    inverse = [order.index(slot) if slot in order else -1 for slot in range(size)]
    return {
        "order": torch.tensor(order + [-1] * (max_rows - len(order)), dtype=torch.int64),
        "inverse": torch.tensor(inverse, dtype=torch.int64).view(math.prod(shape[:-1]), shape[-1]),
        "counts": torch.tensor(counts),
        "offsets": torch.tensor([sum(counts[:expert]) for expert in range(num_experts + 1)]),
        "dropped": torch.tensor(dropped),
    }


def by_index(indices, num_experts, *, max_rows=None):
    experts = [None if e == -1 else e for e in indices.flatten().tolist()]
    return plan(experts, indices.shape, num_experts, max_rows)


def by_weight(weights, *, max_rows=None):
    num_experts = weights.shape[-1]
    experts = [
        i % num_experts if w != 0 or math.isnan(w) else None
        for i, w in enumerate(weights.flatten().tolist())
    ]
    return plan(experts, weights.shape, num_experts, max_rows)


# ---- samples -------------------------------------------------------------------------------------


def random_indices(*shape, num_experts, lowest=-1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lowest, num_experts, shape, generator=generator)


def samples_by_index():
    def sample(name, indices, num_experts, **options):
        return Sample(name, (indices, num_experts), options)

    yield sample("every slot", random_indices(13, 2, num_experts=4, lowest=0), 4)
    yield sample("some slots", random_indices(17, 3, num_experts=5), 5)
    yield sample("no slot", torch.full((6, 2), -1), 3)
    yield sample("one slot", torch.tensor([[1]]), 3)
    yield sample("one expert", random_indices(9, 2, num_experts=1), 1)
    yield sample("empty experts", 2 * random_indices(9, 2, num_experts=3, lowest=0), 7)
    yield sample("one expert of many", torch.full((7, 2), 70), 71)
    yield sample("no tokens", torch.zeros(0, 2, dtype=torch.int64), 3)
    yield sample("no tokens, rows", torch.zeros(0, 2, dtype=torch.int64), 3, max_rows=4)
    yield sample("no slots", torch.zeros(4, 0, dtype=torch.int64), 3)
    yield sample("leading dimensions", random_indices(2, 3, 5, 2, num_experts=4), 4)
    yield sample("one token", random_indices(4, num_experts=6), 6)
    yield sample("too few rows", random_indices(11, 2, num_experts=4), 4, max_rows=9)
    yield sample("no rows", random_indices(5, 2, num_experts=4), 4, max_rows=0)
    yield sample("exactly enough rows", torch.tensor([[0, -1], [2, 1]]), 3, max_rows=3)
    yield sample("more rows than slots", random_indices(5, 2, num_experts=4), 4, max_rows=15)
    yield sample("larger", random_indices(211, 4, num_experts=33), 33)


def samples_by_weight():
    def sparse(*shape, seed=0):
        return seeded(*shape, seed=seed).sub(0.5).relu()

    yield Sample("sparse", (sparse(13, 5),))
    yield Sample("dense", (seeded(5, 3),))
    yield Sample("all zero", (torch.zeros(4, 3, dtype=torch.float64),))
    yield Sample("one expert", (sparse(7, 1),))
    yield Sample("no tokens", (torch.zeros(0, 3, dtype=torch.float64),))
    yield Sample("leading dimensions", (sparse(2, 3, 4),))
    yield Sample("one token", (sparse(9),))
    yield Sample("too few rows", (sparse(11, 4),), {"max_rows": 5})
    yield Sample("more rows than slots", (sparse(3, 4),), {"max_rows": 20})
    zeros_and_nans = torch.tensor([[0.0, -0.0, torch.nan], [torch.inf, -torch.nan, -torch.inf]])
    yield Sample("zeros and NaN", (zeros_and_nans.double(),))
    yield Sample("more experts than bits in a word", (sparse(5, 130),))
    yield Sample("the last of 64 experts", (torch.eye(64, dtype=torch.float64)[[63, 0, 31]],))


def sized_by_index(tokens):
    indices = random_indices(tokens, 20, num_experts=33)
    yield Sample("every row", (indices, 33))
    yield Sample("too few rows", (indices, 33), {"max_rows": 15 * tokens})


def sized_by_weight(tokens):
    yield Sample("sparse", (seeded(tokens, 33).sub(0.5).relu(),))


# ---- errors --------------------------------------------------------------------------------------


def errors_by_index():
    indices = torch.tensor([[0, 2], [-1, 1]])
    op = "expert_plan: expected "
    yield Error("dimensions", (indices[0, 0], 3), op + "indices of shape [..., slots], got []")
    yield Error("dtype", (indices.int(), 3), op + "indices in int64, got int32")
    yield Error("num_experts", (indices, 0), op + "num_experts >= 1, got 0")
    yield Error("max_rows", (indices, 3), op + "max_rows >= 0, got -1", {"max_rows": -1})
    for name, wrong in ("too large", 3), ("too small", -2), ("largest", 2**63 - 1):
        yield Error(
            name, (torch.tensor([[0, 2], [1, wrong], [-7, 0]]), 3),
            op + f"indices in [-1, num_experts=3), got {wrong}", static=False,
        )  # fmt: skip


def errors_by_weight():
    weights = torch.ones(2, 3)
    op = "expert_plan_from_weights: expected "
    shape = op + "weights of shape [..., num_experts] with num_experts >= 1, got "
    yield Error("dimensions", (weights[0, 0],), shape + "[]")
    yield Error("no experts", (weights[:, :0],), shape + "[2, 0]")
    yield Error("dtype", (weights.long(),),
                op + "weights in float32, float64, bfloat16 or float16, got int64")  # fmt: skip
    yield Error("max_rows", (weights,), op + "max_rows >= 0, got -1", {"max_rows": -1})


# ---- cases ---------------------------------------------------------------------------------------


def call_by_index(*args, **options):
    return ops.expert_plan(*args, **options)._asdict()


def call_by_weight(*args, **options):
    return ops.expert_plan_from_weights(*args, **options)._asdict()


def overloads_by_index(sample):
    indices, num_experts = sample.args
    rows = indices.reshape(-1, indices.shape[-1]) if indices.numel() else indices
    max_rows = sample.options.get("max_rows")
    yield torch.ops.torch_routers.expert_plan.default, (rows, num_experts, max_rows)


def overloads_by_weight(sample):
    (weights,) = sample.args
    args = weights.reshape(-1, weights.shape[-1]), sample.options.get("max_rows")
    yield torch.ops.torch_routers.expert_plan_from_weights.default, args


CASES = [
    OpCase(
        "expert_plan", call_by_index, by_index, samples_by_index, errors_by_index,
        overloads_by_index, dtypes=(torch.float32,), tolerance=lambda sample: 0,
        sized=sized_by_index,
    ),
    OpCase(
        "expert_plan_from_weights", call_by_weight, by_weight, samples_by_weight, errors_by_weight,
        overloads_by_weight, tolerance=lambda sample: 0, sized=sized_by_weight,
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    ),
]  # fmt: skip
