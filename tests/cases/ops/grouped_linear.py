import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops


def reference(x, weight, offsets, bias=None, *, engine=None):
    rows = [x.new_zeros(weight.shape[1])] * len(x)
    for expert, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        for n in range(begin, end):
            rows[n] = weight[expert] @ x[n]
            if bias is not None:
                rows[n] = rows[n] + bias[expert]
    return {"y": torch.stack(rows) if rows else x.new_zeros(0, weight.shape[1])}


def call(x, *args, engine=None):
    if engine == "grouped_mm" and x.dtype == torch.float64:
        engine = None  # not possible; derivatives of this engine are in test_grouped_linear.py
    return {"y": ops.grouped_linear(x, *args, engine=engine)}


def sample(name, rows, experts, out, features, offsets, *, bias=False, smooth=True, **options):
    args = [seeded(rows, features), seeded(experts, out, features, seed=1), torch.tensor(offsets)]
    if bias:
        args.append(seeded(experts, out, seed=2))
    return Sample(name, tuple(args), options, smooth=smooth)


def samples():
    yield sample("every row", 6, 3, 4, 5, [0, 2, 3, 6])
    yield sample("a bias", 7, 4, 2, 3, [0, 2, 2, 5, 6], bias=True)
    yield sample("empty experts", 5, 4, 2, 3, [0, 0, 4, 4, 5])
    yield sample("a tail", 7, 2, 3, 3, [0, 2, 5])
    yield sample("only a tail", 3, 2, 3, 3, [0, 0, 0], bias=True)
    yield sample("no rows", 0, 2, 3, 4, [0, 0, 0], bias=True, smooth=False)
    yield sample("one expert", 3, 1, 2, 2, [0, 3])
    yield sample("one feature", 3, 2, 1, 1, [0, 1, 3], bias=True)
    yield sample("larger", 130, 5, 33, 65, [0, 40, 41, 99, 99, 120], bias=True, smooth=False)


def samples_of_native():
    for s in samples():
        yield Sample(s.name, s.args, {"engine": "native"}, s.smooth)
    # Every width of tile and remainder; more terms than one running sum takes.
    for features in 16, 31, 64, 600:
        yield sample(f"{features} features", 23, 4, features + 3, features, [0, 1, 4, 11, 22],
                     bias=True, smooth=False, engine="native")  # fmt: skip
    yield sample("many rows", 700, 2, 5, 70, [0, 600, 690], smooth=False, engine="native")


def samples_of_mm():
    for s in samples():
        yield Sample(s.name, s.args, {"engine": "mm"}, s.smooth)


def samples_of_grouped_mm():
    yield sample("every row", 6, 3, 8, 16, [0, 2, 3, 6], engine="grouped_mm")
    yield sample("a tail and a bias", 9, 3, 8, 8, [0, 2, 2, 6], bias=True, engine="grouped_mm")
    yield sample("only a tail", 3, 2, 8, 8, [0, 0, 0], engine="grouped_mm")
    yield sample("no rows", 0, 2, 8, 8, [0, 0, 0], bias=True, smooth=False, engine="grouped_mm")


def sized(rows):
    x, weight = seeded(rows, 33), seeded(4, 65, 33, seed=1)
    offsets = torch.tensor([0, rows // 3, rows // 3, rows // 2, rows - rows // 8])
    yield Sample("uneven", (x, weight, offsets), {"engine": "native"})


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
    shape = op + "bias of shape [num_experts=2, out_features=5], got "
    yield Error("bias shape", (x, weight, offsets, torch.zeros(2, 3)), shape + "[2, 3]")
    yield Error("bias dimensions", (x, weight, offsets, torch.zeros(5)), shape + "[5]")
    yield Error("bias dtype", (x, weight, offsets, torch.zeros(2, 5).half()),
                op + "bias in the dtype of x, float32, got float16")  # fmt: skip
    names = "engine among mm, native for in_features=3 and out_features=5 in float32, got "
    for engine in "fast", "grouped_mm", "":
        yield Error(f"engine {engine}", (x, weight, offsets), op + names + engine,
                    {"engine": engine})  # fmt: skip
    for dtype, names in (torch.float32, "mm, grouped_mm, native"), (torch.float64, "mm, native"):
        x, weight = torch.zeros(4, 8, dtype=dtype), torch.zeros(2, 4, 8, dtype=dtype)
        yield Error(f"engine of aligned {dtype}", (x, weight, offsets),
                    f"{op}engine among {names} for in_features=8 and out_features=4 in "
                    f"{str(dtype)[6:]}, got fast", {"engine": "fast"})  # fmt: skip
    x, weight = torch.zeros(4, 3), torch.zeros(2, 5, 3)
    for name, wrong, said in (
        ("start", [1, 1, 4], "offsets from 0 to at most 4, the number of rows, got 1 to 4"),
        ("end", [0, 1, 5], "offsets from 0 to at most 4, the number of rows, got 0 to 5"),
        ("order", [0, 3, 2], "offsets in ascending order, got 2 after 3"),
    ):
        yield Error(f"offsets {name}", (x, weight, torch.tensor(wrong)), op + said, static=False)


def overloads(sample):
    x, weight, offsets, *bias = sample.args
    engine = sample.options.get("engine")
    bias = bias[0] if bias else None
    yield torch.ops.torch_routers.grouped_linear.default, (x, weight, offsets, bias, engine)
    y = seeded(len(x), weight.shape[1], seed=2).to(x.dtype).requires_grad_()
    yield torch.ops.torch_routers._grouped_outer.default, (y, x, offsets, engine)


def case(name, samples, *dtypes, errors=lambda: (), same_bits_on_every_isa=False, sized=None):
    """Torch's products are not the same to the bit on every instruction set."""
    return OpCase(
        name, call, reference, samples, errors, overloads, dtypes,
        lambda sample: 4 + max(sample.args[0].shape) / 2,
        same_bits_on_every_isa=same_bits_on_every_isa,
        sized=sized,
    )  # fmt: skip


_DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
CASES = [
    case("grouped_linear", samples, *_DTYPES, errors=errors),
    case("grouped_linear native", samples_of_native, *_DTYPES, same_bits_on_every_isa=True,
         sized=sized),
    case("grouped_linear mm", samples_of_mm, *_DTYPES),
    case("grouped_linear grouped_mm", samples_of_grouped_mm, torch.float32, torch.bfloat16,
         torch.float16),
]  # fmt: skip
