"""permute_tokens and combine_tokens, with plans made here by a stable sort."""

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops
from torch_routers.ops.plan import Plan

# ---- reference -----------------------------------------------------------------------------------


def permute_reference(x, order, inverse):
    tokens, slots = x.reshape(len(inverse), x.shape[-1]), inverse.shape[1]
    rows = [tokens[i // slots] if i >= 0 else x.new_zeros(x.shape[-1]) for i in order.tolist()]
    return {"rows": torch.stack(rows) if rows else x.new_zeros(0, x.shape[-1])}


def combine_reference(rows, weights, order, inverse):
    leading = inverse.shape[:1] if weights is None else weights.shape[:-1]
    y = []
    for t, places in enumerate(inverse.tolist()):
        total = rows.new_zeros(rows.shape[1])
        for j, r in enumerate(places):
            if r >= 0:
                weight = 1 if weights is None else weights.reshape(inverse.shape)[t, j]
                total = total + weight * rows[r]
        y.append(total)
    return {"y": (torch.stack(y) if y else rows[:0]).reshape(*leading, rows.shape[1])}


# ---- the functions -------------------------------------------------------------------------------


def plan_of(order, inverse):
    """A plan of which no more is known."""
    return Plan(order, inverse, order[:0], order[:0], order[:0])


def permute(x, order, inverse):
    return {"rows": ops.permute_tokens(x, plan_of(order, inverse))}


def combine(rows, weights, order, inverse):
    if weights is not None and weights.dtype in (torch.bfloat16, torch.float16):
        weights = weights.float()
    return {"y": ops.combine_tokens(rows, weights, plan_of(order, inverse))}


# ---- samples -------------------------------------------------------------------------------------


def order_and_inverse(experts, spare=0, drop=0):
    """Of slots with these experts; ``spare`` rows more than needed, or ``drop`` fewer."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    order = order[(flat < 0).sum() :]
    order = order[: len(order) - drop]
    inverse = torch.full_like(flat, -1)
    inverse[order] = torch.arange(len(order))
    return torch.cat([order, order.new_full((spare,), -1)]), inverse.view(experts.shape)


def random_experts(tokens, slots, experts=5, empty=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(experts, (tokens, slots), generator=generator)
    return chosen.where(torch.rand(tokens, slots, generator=generator) >= empty, -1)


def plans():
    """Names, sizes and plans; the small ones for finite differences."""
    yield "every slot", 3, order_and_inverse(random_experts(4, 2))
    yield "one slot", 4, order_and_inverse(random_experts(5, 1))
    yield "a tail", 3, order_and_inverse(random_experts(4, 2, empty=0.4), spare=3)
    yield "dropped", 2, order_and_inverse(random_experts(4, 3), drop=5)
    yield "no live slot", 3, order_and_inverse(random_experts(3, 2) - 9, spare=2)
    holes = torch.tensor([5, -1, 0, 3, -1, 2]), torch.tensor([[2, -1, 5], [3, -1, 0]])
    yield "holes", 3, holes
    yield "more slots than at once", 2, order_and_inverse(random_experts(2, 19, empty=0.2))
    yield "no tokens", 3, order_and_inverse(random_experts(0, 2), spare=2)
    yield "no slots", 3, order_and_inverse(random_experts(3, 0), spare=1)
    yield "no rows", 3, order_and_inverse(random_experts(3, 2) - 9)
    yield "no hidden", 0, order_and_inverse(random_experts(3, 2))
    for hidden in 1, 16, 33, 600:
        plan = order_and_inverse(random_experts(37, 4, empty=0.1), spare=5)
        yield f"hidden {hidden}", hidden, plan
    yield "tiles", 1100, order_and_inverse(random_experts(9, 20, empty=0.3), spare=3)


SMOOTH = {"every slot", "one slot", "a tail", "dropped", "no live slot", "holes"}


def permute_samples():
    for name, hidden, (order, inverse) in plans():
        x = seeded(len(inverse), hidden)
        yield Sample(name, (x, order, inverse), smooth=name in SMOOTH)
    order, inverse = order_and_inverse(random_experts(6, 2), spare=1)
    yield Sample("leading", (seeded(2, 3, 4), order, inverse), smooth=True)
    order, inverse = order_and_inverse(random_experts(1, 3))
    yield Sample("one token", (seeded(5), order, inverse))
    x = seeded(6, 40)
    x[0, 0], x[1, 1], x[2] = torch.nan, torch.inf, -0.0
    order, inverse = order_and_inverse(random_experts(6, 2, empty=0.2), spare=2)
    yield Sample("not finite", (x, order, inverse))


def combine_samples():
    for name, hidden, (order, inverse) in plans():
        rows, weights = seeded(len(order), hidden), seeded(*inverse.shape, seed=1)
        yield Sample(name, (rows, weights, order, inverse), smooth=name in SMOOTH)
        yield Sample(f"{name}, unit weights", (rows, None, order, inverse), smooth=name in SMOOTH)
    order, inverse = order_and_inverse(random_experts(6, 2), spare=1)
    leading = seeded(2, 3, 2, seed=1)
    yield Sample("leading", (seeded(13, 4), leading, order, inverse), smooth=True)
    order, inverse = order_and_inverse(random_experts(1, 3))
    yield Sample("one token", (seeded(3, 5), seeded(3, seed=1), order, inverse))
    order, inverse = order_and_inverse(random_experts(6, 3, empty=0.4), spare=2)
    rows, weights = seeded(len(order), 40), seeded(6, 3, seed=1)
    rows[-1], weights = torch.nan, weights.where(inverse >= 0, torch.nan)
    yield Sample("NaN where nobody looks", (rows, weights, order, inverse))
    rows[0, 0], rows[1, 1] = torch.nan, torch.inf
    yield Sample("not finite", (rows, weights, order, inverse))


def sized_plan(tokens):
    return order_and_inverse(random_experts(tokens, 3, empty=0.2), spare=tokens // 10)


def permute_sized(tokens):
    yield Sample("some slots", (seeded(tokens, 33), *sized_plan(tokens)))


def combine_sized(tokens):
    order, inverse = sized_plan(tokens)
    rows = seeded(len(order), 33)
    for weights in seeded(tokens, 3, seed=1), None:
        yield Sample("some slots", (rows, weights, order, inverse))


# ---- errors --------------------------------------------------------------------------------------


def plan_errors(op, with_plan):
    """Errors of the plan; ``with_plan`` completes the arguments for 3 tokens, 2 slots, 7 rows."""
    order, inverse = order_and_inverse(random_experts(3, 2), spare=1)
    said = f"{op}: expected plan."
    yield Error("order dtype", with_plan(order.int(), inverse), said + "order in int64, got int32")
    yield Error("inverse dtype", with_plan(order, inverse.double()),
                said + "inverse in int64, got float64")  # fmt: skip
    yield Error("order shape", with_plan(order[None], inverse),
                said + "order of shape [max_rows], got [1, 7]")  # fmt: skip
    yield Error("inverse shape", with_plan(order, inverse.flatten()),
                said + "inverse of shape [tokens, slots], got [6]")  # fmt: skip

    def changed(tensor, place, value):
        tensor = tensor.clone()
        tensor.flatten()[place] = value
        return tensor

    first = int(order[0])
    for name, plan, text in (
        ("order too large", (changed(order, 0, 6), inverse),
         "order in [-1, tokens * slots=6), got 6"),
        ("order too small", (changed(order, 0, -2), inverse),
         "order in [-1, tokens * slots=6), got -2"),
        ("slot twice", (changed(order, 6, first), inverse),
         f"inverse with row 6 for slot {first}, as in plan.order, got 0"),
        ("slot without a row", (order, changed(inverse, first, -1)),
         f"inverse with row 0 for slot {first}, as in plan.order, got -1"),
        ("row too large", (changed(order, 0, -1), changed(inverse, first, 7)),
         "inverse in [-1, max_rows=7), got 7"),
        ("row too small", (changed(order, 0, -1), changed(inverse, first, -5)),
         "inverse in [-1, max_rows=7), got -5"),
        ("row without a slot", (changed(order, 0, -1), inverse),
         f"order with slot {first} in row 0, as in plan.inverse, got -1"),
    ):  # fmt: skip
        yield Error(name, with_plan(*plan), said + text, static=False)


def permute_errors():
    op, x = "permute_tokens", torch.zeros(3, 4)
    order, inverse = order_and_inverse(random_experts(3, 2), spare=1)
    said = f"{op}: expected x "
    yield Error("no dimension", (x[0, 0], order, inverse), said + "of shape [..., hidden], got []")
    tokens = said + "with 3 tokens, those of the plan, got 4"
    yield Error("tokens", (torch.zeros(2, 2, 4), order, inverse), tokens)
    dtypes = said + "in float32, float64, bfloat16 or float16, got int64"
    yield Error("integers", (x.long(), order, inverse), dtypes)
    yield from plan_errors(op, lambda order, inverse: (x, order, inverse))


def combine_errors():
    op, rows, weights = "combine_tokens", torch.zeros(7, 4), torch.zeros(3, 2)
    plan = order_and_inverse(random_experts(3, 2), spare=1)
    said = f"{op}: expected rows "
    shape = said + "of shape [max_rows=7, hidden], got "
    yield Error("rows", (rows[:6], weights, *plan), shape + "[6, 4]")
    yield Error("rows dimensions", (rows[None], weights, *plan), shape + "[1, 7, 4]")
    dtypes = said + "in float32, float64, bfloat16 or float16, got int64"
    yield Error("integers", (rows.long(), weights, *plan), dtypes)
    said = f"{op}: expected weights "
    yield Error("no weights", (rows, weights[0, 0], *plan), said + "of shape [..., slots], got []")
    yield Error("weights", (rows, weights[:2], *plan),
                said + "of shape [tokens=3, slots=2], got [2, 2]")  # fmt: skip
    yield Error("two dtypes", (rows, weights.double(), *plan),
                said + "in float32 with float32, got float64")  # fmt: skip
    yield Error("double", (rows.double(), weights, *plan),
                said + "in float64 with float64, got float32")  # fmt: skip
    yield from plan_errors(op, lambda order, inverse: (rows, weights, order, inverse))


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    *values, order, inverse = sample.args
    dtype, hidden = values[0].dtype, values[0].shape[-1]

    def random(*shape, seed):
        return seeded(*shape, seed=seed).to(dtype).requires_grad_()

    tokens, rows = random(len(inverse), hidden, seed=2), random(len(order), hidden, seed=3)
    weights, calls = random(*inverse.shape, seed=4), torch.ops.torch_routers
    for w in weights, None:
        yield calls.permute_tokens.default, (tokens, w, order, inverse)
        yield calls.combine_tokens.default, (rows, w, order, inverse)
        yield calls._combine_backward.default, (tokens, rows, w, order, inverse)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    OpCase("permute_tokens", permute, permute_reference, permute_samples, permute_errors, overloads,
           DTYPES, lambda sample: 0, sized=permute_sized),
    OpCase("combine_tokens", combine, combine_reference, combine_samples, combine_errors, overloads,
           DTYPES, lambda sample: 1 + sample.args[-1].shape[1], sized=combine_sized),
]  # fmt: skip
