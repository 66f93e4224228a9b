"""topk_gate and gate: the same reference, with indices chosen or given."""

import itertools
import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def before(x, i, j):
    """Whether expert i ranks before expert j."""
    if math.isnan(x[i]) != math.isnan(x[j]):
        return math.isnan(x[i])
    if math.isnan(x[i]) or x[i] == x[j]:
        return i < j
    return x[i] > x[j]


def ranking(row):
    """The experts of a row, best first, by a sort that only uses `before`."""
    order = []
    x = row.tolist()
    for expert in range(len(x)):
        place = sum(before(x, other, expert) for other in order)
        order.insert(place, expert)
    return order


def softmax(x):
    if (x == -torch.inf).all():
        return torch.zeros_like(x)
    exps = (x - x.detach().max()).exp()
    return exps / exps.sum()


def log_sum_exp(x):
    if (x == -torch.inf).all():
        return x.new_tensor(-torch.inf)
    largest = x.detach().max()
    return largest + (x - largest).exp().sum().log()


def reference(
    logits, indices, *, renormalize=True, valid_mask=None, group_offsets=None, statistics=False
):
    leading, num_experts = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(-1, num_experts)
    is_given = isinstance(indices, torch.Tensor)
    slots = indices.shape[-1] if is_given else indices
    given = indices.reshape(len(rows), slots).tolist() if is_given else None
    valid = [True] * len(rows) if valid_mask is None else valid_mask.flatten().tolist()
    offsets = [0, len(rows)] if group_offsets is None else group_offsets.tolist()

    zero = logits.new_zeros(())
    weights, chosen, lse, sums, counts, tokens = [], [], [], [], [], []
    for begin, end in itertools.pairwise(offsets):
        group_sums, group_counts = logits.new_zeros(num_experts), [0] * num_experts
        for t in range(begin, end):
            if not valid[t]:
                weights += [zero] * slots
                chosen += [-1] * slots
                lse.append(zero)
                continue
            x = rows[t]
            experts = ranking(x)[:slots] if given is None else given[t]
            probs = softmax(x)
            kept = [e for e in experts if e >= 0]
            among_kept = iter(softmax(x[kept])) if kept else None
            for e in experts:
                if e < 0:
                    weights.append(zero)
                else:
                    weights.append(next(among_kept) if renormalize else probs[e])
                    group_counts[e] += 1
            chosen += experts
            lse.append(log_sum_exp(x))
            group_sums = group_sums + probs
        sums.append(group_sums)
        counts.append(group_counts)
        tokens.append(sum(valid[begin:end]))

    def stack(values):
        return torch.stack(values) if values else logits.new_zeros(0)

    result = {
        "weights": stack(weights).view(*leading, slots),
        "group_counts": torch.tensor(counts),
        "group_tokens": torch.tensor(tokens),
    }
    if not is_given:
        result["indices"] = torch.tensor(chosen, dtype=torch.int64).view(*leading, slots)
    if statistics:
        result["lse"] = stack(lse).view(leading)
        result["score_sums"] = torch.stack(sums)
    return result


# ---- the functions -------------------------------------------------------------------------------


def present(statistics):
    return {name: x for name, x in statistics._asdict().items() if x is not None}


def topk_gate(*args, **options):
    weights, indices, statistics = ops.topk_gate(*args, **options)
    return {"weights": weights, "indices": indices} | present(statistics)


def gate(*args, **options):
    weights, statistics = ops.gate(*args, **options)
    return {"weights": weights} | present(statistics)


# ---- samples -------------------------------------------------------------------------------------


def mask(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def spread(*shape, seed=0):
    """Logits no two of which, in a row, are closer than 0.01."""
    x = seeded(*shape, seed=seed)
    return (x + 0.5 * x.argsort(-1).argsort(-1)) / 2


def topk_samples():
    options = [{"renormalize": r, "statistics": s} for r in (True, False) for s in (True, False)]
    for o in options:
        name = "-".join(key for key, value in o.items() if value) or "softmax"
        yield Sample(f"{name}", (spread(4, 7), 3), o, smooth=True)
        yield Sample(
            f"{name}-masked-grouped",
            (spread(7, 5), 2),
            o | {"valid_mask": mask(7), "group_offsets": torch.tensor([0, 3, 3, 7])},
            smooth=True,
        )
        yield Sample(f"{name}-leading", (spread(2, 3, 6), 2), o | {"valid_mask": mask(2, 3)})
        yield Sample(f"{name}-row", (spread(6), 2), o)
        yield Sample(f"{name}-no-tokens", (seeded(0, 4), 2), o)
        yield Sample(f"{name}-one-expert", (seeded(3, 1), 1), o)
        yield Sample(f"{name}-every-expert", (spread(3, 4), 4), o, smooth=o == options[0])
        yield Sample(f"{name}-all-masked", (seeded(3, 4), 2), o | {"valid_mask": mask(3) < 0})
        yield Sample(f"{name}-ties", (seeded(65, 9).round(), 4), o)
        yield Sample(f"{name}-constant", (torch.zeros(3, 6).double(), 4), o)
        hidden = seeded(65, 9).where(mask(65, 9), -torch.inf)
        hidden[5] = -torch.inf
        yield Sample(f"{name}-some-hidden", (hidden, 4), o)
        infinite = seeded(20, 9).where(mask(20, 9), torch.inf)
        yield Sample(f"{name}-infinite", (infinite, 4), o)
        yield Sample(f"{name}-nan", (seeded(20, 9).where(mask(20, 9), torch.nan), 4), o)
        yield Sample(f"{name}-extreme", (3000 * seeded(20, 33), 5), o)
        yield Sample(f"{name}-wide", (spread(3, 300), 40), o)
        offsets = torch.tensor([0, 1, 64, 64, 200, 300])
        yield Sample(
            f"{name}-blocks",
            (spread(300, 17), 3),
            o | {"valid_mask": mask(300), "group_offsets": offsets},
        )


def gate_samples():
    for sample in topk_samples():
        logits, top_k = sample.args
        chosen = reference(logits, top_k)["indices"].roll(1, -1)  # an order of its own
        yield Sample(sample.name, (logits, chosen), sample.options, sample.smooth)
    empty = torch.tensor([[1, -1], [-1, -1], [-1, 4]])
    for renormalize in True, False:
        o = {"renormalize": renormalize, "statistics": True}
        yield Sample(f"empty-slots-{renormalize}", (spread(3, 6), empty), o, smooth=True)
        twice = torch.tensor([[2, 2], [0, 0], [1, 3]])
        yield Sample(f"same-expert-twice-{renormalize}", (spread(3, 6), twice), o, smooth=True)
        yield Sample(f"no-slots-{renormalize}", (spread(3, 6), empty[:, :0]), o)
        far = torch.tensor([[0.0, -300.0, -301.0]]).double()
        yield Sample(f"far-below-{renormalize}", (far, torch.tensor([[1, 2]])), o)


# ---- errors --------------------------------------------------------------------------------------


def shared_errors(op, last):
    """Errors that both operators have; ``last`` is their second argument for two tokens."""
    x = torch.zeros(2, 4)
    logits = f"{op}: expected logits of shape [..., num_experts] with num_experts >= 1, got "
    yield Error("no dimension", (torch.zeros(()), last), logits + "[]")
    yield Error("no experts", (torch.zeros(2, 0), last), logits + "[2, 0]")
    dtype = f"{op}: expected logits in float32 or float64, got "
    yield Error("half", (x.half(), last), dtype + "float16. Convert it with .float()")
    yield Error("integers", (x.long(), last), dtype + "int64. Convert it with .float()")
    yield Error("complex", (x.cfloat(), last), dtype + "complex64. Convert it with .float()")
    valid = f"{op}: expected valid_mask "
    yield Error("mask shape", (x, last), valid + "of shape [2], one value per token, got [3]",
                {"valid_mask": torch.ones(3).bool()})  # fmt: skip
    yield Error(
        "mask dtype", (x, last), valid + "in bool, got float32", {"valid_mask": torch.ones(2)}
    )
    groups = f"{op}: expected group_offsets "
    for name, offsets, said in (
        ("dtype", torch.tensor([0, 2]).int(), "in int64, got int32"),
        ("shape", torch.tensor([2]), "of shape [groups + 1], got [1]"),
        ("start", torch.tensor([1, 2]), "from 0 to the number of tokens, 2, got 1 to 2"),
        ("end", torch.tensor([0, 3]), "from 0 to the number of tokens, 2, got 0 to 3"),
        ("order", torch.tensor([0, 2, 1, 2]), "in ascending order, got 1 after 2"),
    ):
        static = name in ("dtype", "shape")
        options = {"group_offsets": offsets}
        yield Error(f"offsets {name}", (x, last), groups + said, options, static)


def topk_errors():
    yield from shared_errors("topk_gate", 2)
    for top_k in -1, 0, 5:
        said = f"topk_gate: expected top_k in [1, num_experts=4], got {top_k}"
        yield Error(f"top_k {top_k}", (torch.zeros(2, 4), top_k), said)


def gate_errors():
    indices = torch.zeros(2, 1, dtype=torch.int64)
    for error in shared_errors("gate", indices):
        if error.name != "no dimension":
            yield error
    x, said = torch.zeros(2, 4), "gate: expected indices "
    yield Error("indices dtype", (x, indices.int()), said + "in int64, got int32")
    yield Error("indices rows", (x, indices[:1]), said + "of shape [2, slots], got [1, 1]")
    yield Error("indices dimensions", (x, indices[0]), said + "of shape [2, slots], got [1]")
    for index in -2, 4:
        wrong = indices.clone().fill_(index)
        text = f"in [-1, num_experts=4), got {index}"
        yield Error(f"index {index}", (x, wrong), said + text, static=False)


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(forward):
    def of(sample):
        logits, second = sample.args
        get = sample.options.get
        rows = logits.reshape(-1, logits.shape[-1])
        valid = get("valid_mask")
        valid = None if valid is None else valid.reshape(-1)
        offsets, statistics = get("group_offsets"), get("statistics", False)
        is_given = isinstance(second, torch.Tensor)
        indices = second if is_given else reference(rows, second)["indices"]
        indices = indices.reshape(len(rows), indices.shape[-1])
        second = indices if is_given else second
        yield forward, (rows, second, get("renormalize"), valid, offsets, statistics)

        groups = 1 if offsets is None else len(offsets) - 1
        yield torch.ops.torch_routers._gate_backward.default, (
            seeded(*indices.shape, seed=5).to(rows.dtype).requires_grad_(),
            seeded(len(rows), seed=6).to(rows.dtype) if statistics else None,
            seeded(groups, rows.shape[1], seed=7).to(rows.dtype) if statistics else None,
            rows, indices, get("renormalize"), valid, offsets,
        )  # fmt: skip

    return of


def tolerance(sample):
    """A sum over the experts, one over the tokens."""
    logits = sample.args[0]
    return 8 + logits.shape[-1] / 4 + logits.numel() / max(1, logits.shape[-1]) / 4


DTYPES = (torch.float32, torch.float64)
CASES = [
    OpCase("topk_gate", topk_gate, reference, topk_samples, topk_errors,
           overloads(torch.ops.torch_routers.topk_gate.default), DTYPES, tolerance),
    OpCase("gate", gate, reference, gate_samples, gate_errors,
           overloads(torch.ops.torch_routers.gate.default), DTYPES, tolerance),
]  # fmt: skip
