import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops


def reference(x, weight, offsets):
    rows = [x.new_zeros(weight.shape[1])] * len(x)
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        for n in range(begin, end):
            rows[n] = weight[expert] @ x[n]
    return {"y": torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])}


def call(x, weight, offsets):
    return {"y": ops.grouped_linear(x, weight, offsets)}


def samples():
    def sample(name, rows, experts, out, features, offsets, smooth=True):
        x, weight = seeded(rows, features), seeded(experts, out, features, seed=1)
        return Sample(name, (x, weight, torch.tensor(offsets)), smooth=smooth)

    yield sample("every row", 6, 3, 4, 5, [0, 2, 3, 6])
    yield sample("empty experts", 5, 4, 2, 3, [0, 0, 4, 4, 5])
    yield sample("a tail", 7, 2, 3, 3, [0, 2, 5])
    yield sample("only a tail", 3, 2, 3, 3, [0, 0, 0])
    yield sample("no rows", 0, 2, 3, 4, [0, 0, 0], smooth=False)
    yield sample("one expert", 3, 1, 2, 2, [0, 3])
    yield sample("larger", 130, 5, 33, 65, [0, 40, 41, 99, 99, 120], smooth=False)


def sized(rows):
    x, weight = seeded(rows, 33), seeded(4, 65, 33, seed=1)
    offsets = torch.tensor([0, rows // 3, rows // 3, rows // 2, rows - rows // 8])
    yield Sample("uneven", (x, weight, offsets))


def errors():
    x, weight, offsets = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([0, 1, 4])
    op = "grouped_linear: expected "
    yield Error("x", (x[0], weight, offsets), op + "x of shape [rows, in_features], got [3]")
    shape = op + "weight of shape [num_experts, out_features, in_features="
    yield Error("features", (x[:, :2], weight, offsets), shape + "2], got [2, 5, 3]")
    yield Error("weight dimensions", (x, weight[0], offsets), shape + "3], got [5, 3]")
    yield Error("integers", (x.long(), weight, offsets),
                op + "x in float32, float64, bfloat16 or float16, got int64")  # fmt: skip
    yield Error("two dtypes", (x, weight.double(), offsets),
                op + "weight in the dtype of x, float32, got float64")  # fmt: skip
    yield Error("offsets dtype", (x, weight, offsets.int()), op + "offsets in int64, got int32")
    yield Error("offsets length", (x, weight, offsets[:2]),
                op + "offsets of shape [num_experts + 1], here [3], got [2]")  # fmt: skip
    yield Error("offsets dimensions", (x, weight, offsets[None]),
                op + "offsets of shape [num_experts + 1], got [1, 3]")  # fmt: skip
    for name, wrong, said in (
        ("start", [1, 1, 4], "offsets from 0 to at most 4, the number of rows, got 1 to 4"),
        ("end", [0, 1, 5], "offsets from 0 to at most 4, the number of rows, got 0 to 5"),
        ("order", [0, 3, 2], "offsets in ascending order, got 2 after 3"),
    ):
        yield Error(f"offsets {name}", (x, weight, torch.tensor(wrong)), op + said, static=False)


def overloads(sample):
    x, weight, offsets = sample.args
    yield torch.ops.torch_routers.grouped_linear.default, (x, weight, offsets)
    y = seeded(len(x), weight.shape[1], seed=2).to(x.dtype).requires_grad_()
    yield torch.ops.torch_routers._grouped_outer.default, (y, x, offsets)


CASES = [
    OpCase(
        "grouped_linear", call, reference, samples, errors, overloads,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lambda sample: 4 + max(sample.args[0].shape) / 2,
        same_bits_on_every_isa=False,  # torch's products
        sized=sized,
    )
]  # fmt: skip
