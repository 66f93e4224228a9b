import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops


def reference(x, a, b, weights, indices=None, *, ranks, scaling=None, router_grad="selected", **_):
    tokens = x.flatten(0, -2) if x.dim() > 1 else x[None]
    weights = weights.reshape(len(tokens), weights.shape[-1])
    if indices is None:
        indices = torch.arange(len(ranks)).expand(weights.shape)
        if router_grad == "selected":
            indices = indices.where(weights != 0, -1)
    rows = []
    for token, of_slots, experts in zip(tokens, weights, indices.reshape(weights.shape).tolist()):
        y = token.new_zeros(b.shape[1])
        for weight, e in zip(of_slots, experts):
            if e >= 0:
                factor_a, factor_b = a[e, : ranks[e]], b[e, :, : ranks[e]]
                y = y + weight * (scaling[e] if scaling else 1) * (factor_b @ (factor_a @ token))
        rows.append(y)
    y = torch.stack(rows) if rows else x.new_zeros(0, b.shape[1])
    return {"y": y.view(*x.shape[:-1], b.shape[1])}


def call(x, a, b, weights, *indices, ranks, **options):
    """Parameters come as one tensor each, of which an expert has the first ranks."""
    factors_a = [factor[:rank] for factor, rank in zip(a.unbind(), ranks)]
    factors_b = [factor[:, :rank] for factor, rank in zip(b.unbind(), ranks)]
    weights = weights.float() if weights.dtype.itemsize == 2 else weights  # none of its own
    return {"y": ops.lora_mix(x, factors_a, factors_b, weights, *indices, **options)}


def sample(
    name, shape, ranks, indices=None, *, sizes=(4, 3), weights=None, smooth=False, **options
):
    experts, (in_features, out_features) = len(ranks), sizes
    x = seeded(*shape, in_features)
    a = seeded(experts, max(ranks), in_features, seed=1)
    b = seeded(experts, out_features, max(ranks), seed=2)
    if indices is not None:
        indices = torch.tensor(indices, dtype=torch.int64)
        weights = seeded(*indices.shape, seed=3).sigmoid()
        return Sample(name, (x, a, b, weights, indices), dict(ranks=ranks, **options), smooth)
    if weights is None:
        weights = seeded(*shape, experts, seed=3).softmax(-1)
    return Sample(name, (x, a, b, weights), dict(ranks=ranks, **options), smooth)


def top_two(tokens, experts):
    return seeded(tokens, experts, seed=4).topk(2).indices.tolist()


def samples():
    scaled = {"scaling": [0.5, 2.0, 3.0]}
    some = [[0, 2], [-1, 0], [2, 1]]
    some_zeros = torch.tensor([[0.5, 0, 0.2], [0, 0, 0], [0, 1.5, 0]], dtype=torch.float64)
    for strategy in "segmented", "stacked":
        way = {"strategy": strategy}
        yield sample(f"{strategy}", (3,), [2, 0, 1], some, smooth=True, **way, **scaled)
        yield sample(f"{strategy}, of all experts", (2,), [1, 2], smooth=True, **way)
        yield sample(f"{strategy}, some weights 0", (3,), [2, 3, 1], weights=some_zeros,
                     **way, **scaled)  # fmt: skip
        yield sample(f"{strategy}, an expert twice", (2,), [2, 1], [[1, 1], [0, 1]], **way)
        yield sample(f"{strategy}, empty slots", (2,), [2, 1], [[-1, -1], [-1, -1]], **way)
        yield sample(f"{strategy}, one expert", (2,), [3], [[0], [0]], **way)
        yield sample(f"{strategy}, rank 0", (2,), [0, 0], [[0, 1], [1, -1]], **way)
        yield sample(f"{strategy}, no slots", (2,), [2, 1], [[], []], **way)
        yield sample(f"{strategy}, larger", (70,), [5, 16, 0, 3, 9], top_two(70, 5),
                     sizes=(67, 35), **way)  # fmt: skip
    yield sample("every weight learns", (2,), [2, 1, 1], smooth=True, router_grad="dense",
                 weights=torch.tensor([[0.5, 0, 0], [0, 0.3, 0.7]]).double(), **scaled)  # fmt: skip
    yield sample("one token", (), [2, 1], [1, 0])
    # In one call, where nothing requires a gradient.
    yield sample("every rank a block", (5,), [16] * 3, top_two(5, 3), sizes=(40, 130))
    yield sample("several rows a block", (5,), [4] * 3, top_two(5, 3), sizes=(19, 70), **scaled)
    yield sample("ranks of all kinds", (70,), [5, 16, 0, 3, 25], top_two(70, 5), sizes=(67, 35))
    yield sample("all experts, some weights 0", (3,), [2, 3, 1], weights=some_zeros, **scaled)
    yield sample("more dimensions", (2, 2), [2, 1], [[[1], [0]], [[0], [-1]]])
    yield sample("no tokens", (0, 2), [2, 1])


def errors():
    op = "lora_mix: expected "
    x, a, b = torch.zeros(4, 3), torch.zeros(2, 2, 3), torch.zeros(2, 5, 2)
    weights, indices = torch.zeros(4, 1), torch.zeros(4, 1, dtype=torch.int64)
    of_all = torch.zeros(4, 2)

    def error(name, args, message, *, ranks=(2, 2), static=True, **options):
        return Error(name, args, op + message, dict(ranks=ranks, **options), static)

    yield error("x", (x[0, 0], a, b, weights), "x of shape [..., in_features], got []")
    yield error("x dtype", (x.long(), a, b, weights),
                "x in float32, float64, bfloat16 or float16, got int64")  # fmt: skip
    yield error("no experts", (x, a, b, weights), "factors_a of at least one expert, got none",
                ranks=())  # fmt: skip
    yield error("number of factors", (x, a, b[:1], weights),
                "factors_b of num_experts=2 experts, got 1")  # fmt: skip
    yield error("in_features", (x[:, :2], a, b, weights),
                "factors_a[0] of shape [rank, in_features=2], got [2, 3]")  # fmt: skip
    yield error("rank", (x, a, b[:, :, :1], weights),
                "factors_b[0] of shape [out_features, rank=2], got [5, 1]")  # fmt: skip
    yield error("factor dtype", (x, a.long(), b, weights),
                "factors_a[0] in float32, float64, bfloat16 or float16, got int64")  # fmt: skip
    yield error("weights", (x, a, b, weights),
                "weights of shape [4, num_experts=2], got [4, 1]")  # fmt: skip
    yield error("tokens", (x, a, b, weights[:3], indices),
                "weights of shape [4, slots], got [3, 1]")  # fmt: skip
    yield error("weights dtype", (x, a, b, of_all.long()),
                "weights in float32 or float64, got int64")  # fmt: skip
    yield error("indices dtype", (x, a, b, weights, indices.int()),
                "indices in int64, got int32")  # fmt: skip
    yield error("indices", (x, a, b, weights, indices[:, 0]),
                "indices of the shape of weights, [4, 1], got [4]")  # fmt: skip
    yield error("scaling", (x, a, b, of_all), "scaling with num_experts=2 numbers, got 3",
                scaling=[1, 2, 3])  # fmt: skip
    yield error("strategy", (x, a, b, of_all), "strategy among stacked, segmented, got loop",
                strategy="loop")  # fmt: skip
    yield error("router_grad", (x, a, b, of_all), "router_grad among selected, dense, got all",
                router_grad="all")  # fmt: skip
    yield error("dense with indices", (x, a, b, weights, indices),
                "no indices with router_grad=dense, got some", router_grad="dense")  # fmt: skip
    yield error("dense, segmented", (x, a, b, of_all),
                "strategy=stacked with router_grad=dense, got segmented",
                router_grad="dense", strategy="segmented")  # fmt: skip
    for strategy in "stacked", "segmented":
        for index in 2, -2:
            yield error(f"index {index} {strategy}", (x, a, b, weights, indices + index),
                        f"indices in [-1, num_experts=2), got {index}",
                        strategy=strategy, static=False)  # fmt: skip


def overloads(sample):
    """With rows of two experts, and one of none."""
    x = seeded(3, 5).to(sample.args[0].dtype)
    order, inverse = torch.tensor([1, 4, 0, -1]), torch.tensor([[2, 0], [-1, -1], [1, -1]])
    plan = order, inverse, torch.tensor([0, 2, 3]), torch.tensor([0, 2, 3])
    weight, z = x.new_ones(3, 5), x.new_ones(4, 2)
    yield torch.ops.torch_routers._lora_shrink.default, (x, weight, *plan, 2)
    yield torch.ops.torch_routers._lora_expand.default, (z, weight, *plan)
    yield torch.ops.torch_routers._lora_outer.default, (z, x, *plan, 3)
    factors = [x.new_ones(2, 5), x.new_ones(1, 5)], [x.new_ones(4, 2), x.new_ones(4, 1)]
    weights, indices = torch.full((3, 2), 0.5), torch.tensor([[1, 0], [-1, 0], [1, -1]])
    infer = torch.ops.torch_routers._lora_infer.default
    if x.dtype == torch.float64:
        weights = weights.double()
    yield infer, (x, *factors, weights, indices, [0.5, 2.0])
    yield infer, (x, *factors, weights, None, None)
    yield infer, (x[0], *factors, weights[0], indices[0], None)


CASES = [
    OpCase(
        "lora_mix", call, reference, samples, errors, overloads,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        # Two sums, and what is between them is rounded.
        lambda sample: 8 + sum(x.shape[-1] for x in sample.args[:3]) / 2,
        same_bits_on_every_isa=False,
    )
]  # fmt: skip
