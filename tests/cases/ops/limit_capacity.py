"""limit_capacity on plans that a stable sort makes, against one sort per expert and group."""

import itertools
import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops
from torch_routers.ops.plan import Plan

# ---- plans ---------------------------------------------------------------------------------------


def plan_of(indices, num_experts, *, padding=0):
    """The plan of indices ``[tokens, slots]``, with more rows than slots by ``padding``."""
    experts = indices.where(indices >= 0, num_experts).flatten()
    counts = (experts == torch.arange(num_experts, device=experts.device)[:, None]).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    order = experts.argsort(stable=True)
    row = torch.arange(len(order), device=order.device)
    inverse = order.argsort().view(indices.shape).where(indices >= 0, -1)
    tail = row.new_full((padding,), -1)
    order = torch.cat([order.where(row < offsets[-1], -1), tail])
    return Plan(order, inverse, counts, offsets, counts.new_zeros(()))


# ---- reference -----------------------------------------------------------------------------------


def philox(key, counter):
    """Philox 4x32-10 of Python's integers."""
    word = 2**32
    k0, k1 = key % word, key // word % word
    c0, c1, c2, c3 = counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // word ^ c1 ^ k0, b % word, a // word ^ c3 ^ k1, a % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def random_number(seed, row, expert):
    word = 2**32
    w0, w1, _, _ = philox(seed % 2**64, (row % word, row // word % word, expert, 0))
    return w1 * word + w0


def descending(x):
    """A sort key: NaN first, then from infinity to -infinity."""
    return (0, 0.0) if math.isnan(x) else (1, -x)


def reference(
    indices, capacity, scores,
    *, num_experts, padding=0, dropped=0, policy="position", seed=None, row_ids=None,
    group_offsets=None,
):  # fmt: skip
    order, inverse, _, offsets, _ = plan_of(indices, num_experts, padding=padding)
    tokens, slots = inverse.shape
    scores = None if scores is None else scores.detach()
    groups = [0, tokens] if group_offsets is None else group_offsets.tolist()
    limits = [capacity] * (len(groups) - 1) if isinstance(capacity, int) else capacity.tolist()

    def key(slot, expert):
        token, j = divmod(slot, slots)
        if policy == "position":
            return j, token
        if policy == "weight":
            return descending(float(scores[token, j])), token, j
        if policy == "priority":
            return descending(float(scores[token])), token, j
        row = token if row_ids is None else int(row_ids[token])
        return random_number(int(seed), row, expert), token, j

    new_order, new_offsets = [], [0]
    new_inverse = torch.full((tokens * slots,), -1)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        rows = order[begin:end].tolist()
        kept = []
        for limit, (first, past) in zip(limits, itertools.pairwise(groups)):
            segment = [slot for slot in rows if first <= slot // slots < past]
            kept += sorted(segment, key=lambda slot: key(slot, expert))[:limit]
        for slot in sorted(kept):
            new_inverse[slot] = len(new_order)
            new_order.append(slot)
        new_offsets.append(len(new_order))
    tail = [-1] * (len(order) - len(new_order))
    new_offsets = torch.tensor(new_offsets)
    return {
        "order": torch.tensor(new_order + tail, dtype=torch.int64),
        "inverse": new_inverse.view(tokens, slots),
        "counts": new_offsets.diff(),
        "offsets": new_offsets,
        "dropped": torch.tensor(int(dropped) + int(offsets[-1]) - len(new_order)),
    }


def call(indices, capacity, scores, *, num_experts, padding=0, **options):
    """Options named as parts of the plan take their places; if all are, no plan is made."""
    given = {name: options.pop(name) for name in Plan._fields if name in options}
    if len(given) < len(Plan._fields):
        given = plan_of(indices, num_experts, padding=padding)._asdict() | given
    plan = Plan(**given)
    argument = {"weight": "weights", "priority": "priority"}.get(options.get("policy"))
    if argument:
        options[argument] = scores
    return ops.limit_capacity(plan, capacity, **options)._asdict()


# ---- samples -------------------------------------------------------------------------------------


def drawn(tokens, slots, num_experts, *, seed=0, empty=0.2):
    """Experts of which one is the favourite; some slots are empty."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(num_experts, (tokens, slots), generator=generator)
    indices = indices.where(torch.rand(indices.shape, generator=generator) < 0.6, 0)
    return indices.where(torch.rand(indices.shape, generator=generator) >= empty, -1)


def scores_of(policy, indices, kind="normal"):
    shape = {"weight": indices.shape, "priority": indices.shape[:1]}.get(policy)
    if shape is None:
        return None
    x = seeded(*shape, seed=2)
    if kind == "ties":
        return x.round()  # with 0 and -0
    if kind == "special":
        odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, 1e-45])
        return odd.double()[torch.arange(x.numel()) % 8].view(shape)
    return x


def sample(name, policy, indices, num_experts, capacity, kind="normal", **options):
    options = {"policy": policy, "num_experts": num_experts, **options}
    if policy == "random":
        options.setdefault("seed", 5)
    args = indices, capacity, scores_of(policy, indices, kind)
    return Sample(f"{policy}-{name}", args, options)


def samples():
    some = drawn(40, 3, 4)
    grouped = {"group_offsets": torch.tensor([0, 7, 7, 39, 40])}
    policies = "position", "weight", "priority", "random"
    yield from (sample("plain", policy, some, 4, 5) for policy in policies)
    for policy in policies:
        for capacity in 0, 1, 30, 200:
            yield sample(f"capacity-{capacity}", policy, some, 4, capacity)
        yield sample("groups", policy, some, 4, torch.tensor([2, 3, 0, 1]), **grouped)
        yield sample("groups-one-capacity", policy, some, 4, 2, padding=5, **grouped)
        yield sample("no-tokens", policy, some[:0], 4, 1)
        yield sample("same-expert-twice", policy, torch.zeros(6, 3).long(), 2, 7)
        yield sample("many-slots", policy, drawn(3, 300, 2), 2, 100)
        yield sample("large", policy, drawn(700, 4, 9, seed=1), 9, 150)
    for policy in "position", "weight":  # without keys and with them
        yield sample("no-tokens-padded", policy, some[:0], 4, 1, padding=3)
        yield sample("no-slots", policy, some[:, :0], 4, 1)
        yield sample("all-masked", policy, torch.full((4, 2), -1), 3, 1)
        yield sample("one-expert", policy, drawn(9, 2, 1), 1, 4)
    for policy in "weight", "priority":
        for kind in "ties", "special":
            yield sample(kind, policy, some, 4, 9, kind)
    ids = torch.arange(40).flip(0) * 2**33 - 7
    for name, seed in ("tensor", torch.tensor(2**40 + 3)), ("negative", -1):
        yield sample(f"seed-{name}", "random", some, 4, 9, seed=seed, row_ids=ids)
    yield sample("dropped-before", "position", some, 4, 5, dropped=torch.tensor(3))


def sized(tokens):
    indices = drawn(tokens, 10, 9)
    plan = plan_of(indices, 9)._asdict()
    for policy in "position", "weight", "priority", "random":
        yield sample("plain", policy, indices, 9, tokens // 2, **plan)


# ---- errors --------------------------------------------------------------------------------------


def errors():
    op = "limit_capacity: expected "
    indices = torch.tensor([[0, 1], [1, 0]])
    plan = plan_of(indices, 2)
    x, priority = torch.zeros(2, 2), torch.zeros(2)

    def error(name, said, *, capacity=1, scores=None, static=True, options=None, **changes):
        options = {"num_experts": 2} | (options or {}) | changes
        return Error(name, (indices, capacity, scores), op + said, options, static)

    yield error("policy", "policy in position, weight, priority or random, got best",
                options={"policy": "best"})  # fmt: skip
    for policy, needed in ("weight", "weights"), ("priority", "priority"), ("random", "seed"):
        yield error(f"no {needed}", f"{needed} with policy {policy}, got None",
                    options={"policy": policy})  # fmt: skip
    yield error("capacity", "capacity >= 0, got -1", capacity=-1)
    yield error("half a row", "capacity as an int or a tensor, got 1.5", capacity=1.5)
    yield error("large seed", f"seed in [-2^63, 2^63), got {2**63}",
                options={"policy": "random", "seed": 2**63})  # fmt: skip
    yield error("capacity tensor", "capacity >= 0, got -3", capacity=torch.tensor([-3]),
                static=False)  # fmt: skip
    yield error("capacity dtype", "capacity in int64, got int32",
                capacity=torch.tensor([1]).int())  # fmt: skip
    yield error("capacity shape", "capacity of shape [groups=1], got [2]",
                capacity=torch.tensor([1, 1]))  # fmt: skip
    yield error("order dtype", "plan.order in int64, got int32", order=plan.order.int())
    yield error("order shape", "plan.order of shape [max_rows], got [1, 4]", order=plan.order[None])
    yield error("inverse dtype", "plan.inverse in int64, got int32", inverse=plan.inverse.int())
    yield error("inverse shape", "plan.inverse of shape [tokens, slots], got [4]",
                inverse=plan.inverse.flatten())  # fmt: skip
    yield error("offsets dtype", "plan.offsets in int64, got float32",
                offsets=plan.offsets.float())  # fmt: skip
    yield error("offsets shape", "plan.offsets of shape [num_experts + 1], got [1]",
                offsets=plan.offsets[:1])  # fmt: skip
    yield error("dropped dtype", "plan.dropped in int64, got bool", dropped=plan.dropped.bool())
    yield error("dropped shape", "plan.dropped of shape [], got [1]", dropped=plan.dropped[None])

    for policy, name, good, shape in (
        ("weight", "weights", x, "[tokens=2, slots=2]"),
        ("priority", "priority", priority, "[tokens=2]"),
    ):
        options = {"policy": policy}
        said = f"{name} in float32, float64, bfloat16 or float16, got int64"
        yield error(f"{name} dtype", said, scores=good.long(), options=options)
        said = f"{name} of shape {shape}, got [1{', 2' * (good.dim() - 1)}]"
        yield error(f"{name} shape", said, scores=good[:1], options=options)
    for name, said, options in (
        ("seed dtype", "seed in int64, got float32", {"seed": torch.tensor(1.0)}),
        ("seed shape", "seed of shape [], got [1]", {"seed": torch.tensor([1])}),
        ("ids dtype", "row_ids in int64, got float32", {"seed": 1, "row_ids": priority}),
        ("ids shape", "row_ids of shape [tokens=2], got [3]",
         {"seed": 1, "row_ids": torch.arange(3)}),
    ):  # fmt: skip
        yield error(name, said, options={"policy": "random", **options})

    groups = "group_offsets "
    for name, offsets, said in (
        ("dtype", torch.tensor([0, 2]).int(), "in int64, got int32"),
        ("shape", torch.tensor([2]), "of shape [groups + 1], got [1]"),
        ("dimensions", torch.tensor(2), "of shape [groups + 1], got []"),
        ("start", torch.tensor([1, 2]), "from 0 to the number of tokens, 2, got 1 to 2"),
        ("end", torch.tensor([0, 3]), "from 0 to the number of tokens, 2, got 0 to 3"),
        ("order", torch.tensor([0, 2, 1, 2]), "in ascending order, got 1 after 2"),
    ):
        yield error(f"groups {name}", groups + said, options={"group_offsets": offsets},
                    static=name in ("dtype", "shape", "dimensions"))  # fmt: skip

    for name, offsets, said in (
        ("start", [1, 2, 4], "from 0 to at most the number of rows, 4, got 1 to 4"),
        ("end", [0, 2, 5], "from 0 to at most the number of rows, 4, got 0 to 5"),
        ("order", [0, 3, 2], "in ascending order, got 2 after 3"),
    ):
        yield error(f"offsets {name}", "plan.offsets " + said, offsets=torch.tensor(offsets),
                    static=False)  # fmt: skip
    slots = "plan.order in [0, tokens * slots=4), ascending within each expert, got "
    for name, order, value in (
        ("negative", [-1, 3, 1, 2], -1),
        ("too large", [0, 4, 1, 2], 4),
        ("descending", [0, 3, 2, 1], 1),
        ("twice", [0, 0, 1, 2], 0),
    ):
        yield error(f"order {name}", f"{slots}{value}", order=torch.tensor(order), static=False)
    for row in -2, 4:
        yield error(f"inverse {row}", f"plan.inverse in [-1, max_rows=4), got {row}",
                    inverse=torch.full((2, 2), row), static=False)  # fmt: skip


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    indices, capacity, scores = sample.args
    get = sample.options.get
    plan = plan_of(indices, get("num_experts"), padding=get("padding", 0))
    order, inverse, _, offsets, dropped = plan
    groups, seed = get("group_offsets"), get("seed")
    if isinstance(capacity, int):
        capacity = torch.full((1 if groups is None else len(groups) - 1,), capacity)
    if isinstance(seed, int):
        seed = torch.tensor(seed)
    yield torch.ops.torch_routers.limit_capacity.default, (
        order, inverse, offsets, dropped, capacity, get("policy", "position"), scores, seed,
        get("row_ids"), groups,
    )  # fmt: skip


CASES = [
    OpCase(
        "limit_capacity", call, reference, samples, errors, overloads,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16), lambda sample: 0,
        sized=sized,
    )
]  # fmt: skip
