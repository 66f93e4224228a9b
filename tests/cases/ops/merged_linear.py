import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops


def reference(x, weight, mix, offsets, bias=None):
    rows = [x.new_zeros(weight.shape[1])] * len(x)
    for segment, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        p = mix[segment].to(x.dtype)
        merged = sum(p[e] * weight[e] for e in range(len(weight)))
        for n in range(begin, end):
            rows[n] = merged @ x[n]
            if bias is not None:
                rows[n] = rows[n] + sum(p[e] * bias[e] for e in range(len(weight)))
    return {"y": torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])}


def call(x, weight, mix, *rest):
    mix = mix.float() if mix.itemsize == 2 else mix  # half types are none of its own
    return {"y": ops.merged_linear(x, weight, mix, *rest)}


def sample(name, rows, experts, out, features, offsets, *, bias=False, smooth=True):
    mix = seeded(len(offsets) - 1, experts, seed=2).softmax(-1)
    weight = seeded(experts, out, features, seed=1)
    args = [seeded(rows, features), weight, mix, torch.tensor(offsets)]
    if bias:
        args.append(seeded(experts, out, seed=3))
    return Sample(name, tuple(args), smooth=smooth)


def samples():
    yield sample("every row", 6, 3, 4, 5, [0, 2, 6])
    yield sample("a bias", 7, 2, 2, 3, [0, 2, 2, 5, 6], bias=True)
    yield sample("a tail", 5, 2, 3, 3, [0, 2, 4])
    yield sample("only a tail", 3, 2, 3, 3, [0, 0, 0], bias=True)
    yield sample("no rows", 0, 2, 3, 4, [0, 0, 0], bias=True, smooth=False)
    yield sample("one expert", 3, 1, 2, 2, [0, 1, 3], bias=True)
    yield sample("one segment", 4, 3, 2, 3, [0, 4])
    yield sample("one feature", 3, 2, 1, 1, [0, 1, 3], bias=True)
    yield sample("larger", 130, 5, 33, 65, [0, 40, 99, 99, 120], bias=True, smooth=False)


def errors():
    x, weight, mix = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(1, 2)
    offsets, op = torch.tensor([0, 4]), "merged_linear: expected "
    yield Error("x", (x[0], weight, mix, offsets), op + "x of shape [rows, in_features], got [3]")
    yield Error("x dtype", (x.long(), weight.long(), mix, offsets),
                op + "x in float32, float64, bfloat16 or float16, got int64")  # fmt: skip
    shape = op + "weight of shape [num_experts, out_features, in_features="
    yield Error("features", (x[:, :2], weight, mix, offsets), shape + "2], got [2, 5, 3]")
    yield Error("weight dimensions", (x, weight[0], mix, offsets), shape + "3], got [5, 3]")
    shape = op + "mix of shape [segments, num_experts=2], segments >= 1, got "
    yield Error("no segments", (x, weight, mix[:0], offsets[:1]), shape + "[0, 2]")
    yield Error("mix", (x, weight, mix[0], offsets), shape + "[2]")
    yield Error("experts", (x, weight, torch.zeros(1, 3), offsets), shape + "[1, 3]")
    yield Error("mix dtype", (x, weight, mix.long(), offsets),
                op + "mix in float32 or float64, got int64")  # fmt: skip
    yield Error("offsets dtype", (x, weight, mix, offsets.int()),
                op + "offsets in int64, got int32")  # fmt: skip
    shape = op + "offsets of shape [segments + 1], here [2], got "
    yield Error("offsets length", (x, weight, mix, offsets[:1]), shape + "[1]")
    yield Error("offsets dimensions", (x, weight, mix, offsets[None]), shape + "[1, 2]")
    shape = op + "bias of shape [num_experts=2, out_features=5], got "
    yield Error("bias", (x, weight, mix, offsets, torch.zeros(1, 5)), shape + "[1, 5]")
    yield Error("bias dimensions", (x, weight, mix, offsets, torch.zeros(2)), shape + "[2]")
    for name, parameters in (
        ("weight", (weight.double(), mix, offsets)),
        ("bias", (weight, mix, offsets, torch.zeros(2, 5).double())),
    ):
        yield Error(f"dtype of {name}", (x, *parameters),
                    f"{op}{name} in the dtype of x, float32, got float64")  # fmt: skip
    for name, wrong, said in (
        ("start", [1, 4], "offsets from 0 to at most 4, the number of rows, got 1 to 4"),
        ("end", [0, 5], "offsets from 0 to at most 4, the number of rows, got 0 to 5"),
    ):
        yield Error(f"offsets {name}", (x, weight, mix, torch.tensor(wrong)),
                    op + said, static=False)  # fmt: skip


def overloads(sample):
    x, weight, mix, offsets, *bias = sample.args
    bias = bias[0] if bias else None
    yield torch.ops.torch_routers.merged_linear.default, (x, weight, mix, offsets, bias)


CASES = [
    OpCase(
        "merged_linear", call, reference, samples, errors, overloads,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        # A merged weight is rounded, then a sum of so many terms.
        lambda sample: 6 + max(sample.args[0].shape) / 2,
        same_bits_on_every_isa=False,
    )
]  # fmt: skip
