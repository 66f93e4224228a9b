"""topk_gate, gate and topk_select: one reference, with indices chosen or given."""

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


def scores_of(row, score):
    if score == "softmax":
        return softmax(row)
    if score == "sigmoid":
        return torch.sigmoid(row)
    if score == "sqrt_softplus":  # next to 0, ln(1 + e^x) is e^x
        zero = (row * 0).nan_to_num(0, 0, 0)
        return torch.stack([
            (x / 2).exp() if x < -40 else x.exp().log1p().sqrt() if x < 30 else x.sqrt() + z
            for x, z in zip(row, zero)
        ])  # fmt: skip
    return row


def select(row, top_k, *, score, bias, num_groups, topk_group, group_score):
    """The experts of one token, best first."""
    with torch.no_grad():
        values, groups_by = row, row
        best = {"max": 1, "top2_sum": 2, "topk_sum": max(1, top_k // topk_group)}[group_score]
        if bias is not None or (num_groups > 1 and best > 1):
            groups_by = scores_of(row, score)
            groups_by = groups_by if bias is None else groups_by + bias
        if bias is not None:
            values = groups_by
        size = len(row) // num_groups
        allowed = list(range(len(row)))
        if num_groups > 1:
            sums = []
            for group in groups_by.split(size):
                total = group.new_zeros(())
                for expert in ranking(group)[:best]:
                    total = total + group[expert]
                sums.append(total)
            kept = set(ranking(torch.stack(sums))[:topk_group])
            allowed = [e for e in allowed if e // size in kept]
        return [e for e in ranking(values) if e in allowed][:top_k]


SELECTION = {
    "bias": None, "num_groups": 1, "topk_group": 1, "group_score": "top2_sum",
}  # fmt: skip


def reference(
    logits, indices, *, score="softmax", renormalize=True, epsilon=None, scale=1.0,
    token_top_k=None, valid_mask=None, group_offsets=None, statistics=False, **selection,
):  # fmt: skip
    leading, num_experts = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(-1, num_experts)
    is_given = isinstance(indices, torch.Tensor)
    slots = indices.shape[-1] if is_given else indices
    given = indices.reshape(len(rows), slots).tolist() if is_given else None
    valid = [True] * len(rows) if valid_mask is None else valid_mask.flatten().tolist()
    limits = [slots] * len(rows) if token_top_k is None else token_top_k.flatten().tolist()
    offsets = [0, len(rows)] if group_offsets is None else group_offsets.tolist()
    if epsilon is None:
        epsilon = 0.0 if score == "softmax" else 1e-20

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
            if given is None:
                experts = select(x, slots, score=score, **SELECTION | selection)[: limits[t]]
                experts += [-1] * (slots - len(experts))
            else:
                experts = given[t]
            scores = scores_of(x, score)
            total = sum((scores[e] for e in experts if e >= 0), zero) + epsilon
            kept = [e for e in experts if e >= 0]
            of_kept = iter(softmax(x[kept])) if kept else None
            for e in experts:
                if e < 0:
                    weights.append(zero)
                    continue
                if not renormalize:
                    weights.append(scale * scores[e])
                elif score == "softmax" and epsilon == 0:
                    weights.append(scale * next(of_kept))
                else:
                    weights.append(scale * (scores[e] / total if total != 0 else scores[e]))
                group_counts[e] += 1
            chosen += experts
            lse.append(log_sum_exp(x))
            everything = scores.sum()
            group_sums = group_sums + (scores if everything == 0 else scores / everything)
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


def select_reference(scores, top_k, *, score=None, **options):
    indices = reference(scores.detach(), top_k, score=score or "identity", **options)["indices"]
    return {"indices": indices}


# ---- the functions -------------------------------------------------------------------------------


def present(statistics):
    return {name: x for name, x in statistics._asdict().items() if x is not None}


def topk_gate(*args, **options):
    weights, indices, statistics = ops.topk_gate(*args, **options)
    return {"weights": weights, "indices": indices} | present(statistics)


def gate(*args, **options):
    weights, statistics = ops.gate(*args, **options)
    return {"weights": weights} | present(statistics)


def topk_select(*args, **options):
    return {"indices": ops.topk_select(*args, **options)}


# ---- samples -------------------------------------------------------------------------------------


def mask(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def spread(*shape, seed=0):
    """Logits no two of which, in a row, are closer than 0.01."""
    x = seeded(*shape, seed=seed)
    return (x + 0.5 * x.argsort(-1).argsort(-1)) / 2


OPTIONS = (
    {"renormalize": True, "statistics": True},
    {"renormalize": False, "statistics": True},
    {"renormalize": True},
)


def name_of(options):
    return "-".join(key for key, value in options.items() if value)


def topk_samples():
    yield from shaped_samples(OPTIONS[0])
    for o in OPTIONS:
        yield from weighed_samples(o)
    yield from scored_samples()


def shaped_samples(o):
    """Shapes and ties, which are the same for all options."""
    name = name_of(o)
    yield Sample(f"{name}", (spread(4, 7), 3), o, smooth=True)
    yield Sample(f"{name}-leading", (spread(2, 3, 6), 2), o | {"valid_mask": mask(2, 3)})
    yield Sample(f"{name}-row", (spread(6), 2), o)
    yield Sample(f"{name}-no-tokens", (seeded(0, 4), 2), o)
    yield Sample(f"{name}-one-expert", (seeded(3, 1), 1), o)
    yield Sample(f"{name}-every-expert", (spread(3, 4), 4), o, smooth=True)
    yield Sample(f"{name}-all-masked", (seeded(3, 4), 2), o | {"valid_mask": mask(3) < 0})
    yield Sample(f"{name}-ties", (seeded(65, 9).round(), 4), o)
    yield Sample(f"{name}-constant", (torch.zeros(3, 6).double(), 4), o)
    yield Sample(f"{name}-many-ties", (seeded(3, 300).round(), 12), o)


def weighed_samples(o):
    """What weights and statistics are made of."""
    name = name_of(o)
    if o != OPTIONS[0]:
        yield Sample(f"{name}", (spread(4, 7), 3), o, smooth=True)
    yield Sample(
        f"{name}-masked-grouped",
        (spread(7, 5), 2),
        o | {"valid_mask": mask(7), "group_offsets": torch.tensor([0, 3, 3, 7])},
        smooth=True,
    )
    hidden = seeded(65, 9).where(mask(65, 9), -torch.inf)
    hidden[5] = -torch.inf
    yield Sample(f"{name}-some-hidden", (hidden, 4), o)
    infinite = seeded(20, 9).where(mask(20, 9), torch.inf)
    yield Sample(f"{name}-infinite", (infinite, 4), o)
    yield Sample(f"{name}-nan", (seeded(20, 9).where(mask(20, 9), torch.nan), 4), o)
    yield Sample(f"{name}-extreme", (3000 * seeded(20, 33), 5), o)
    yield Sample(f"{name}-wide", (spread(3, 300), 40), o)
    if "statistics" in o:
        yield Sample(f"{name}-long", (seeded(2, 1100), 7), o)
        offsets = torch.tensor([0, 1, 64, 64, 200, 300])
        yield Sample(
            f"{name}-blocks",
            (spread(300, 17), 3),
            o | {"valid_mask": mask(300), "group_offsets": offsets},
        )


def scored_samples():
    """Every score, and what goes with it."""
    for score in "softmax", "sigmoid", "sqrt_softplus":
        for o in (
            {"renormalize": True, "statistics": True},
            {"renormalize": False, "scale": 2.5, "statistics": True},
            {"renormalize": True, "epsilon": 0.5, "scale": 0.5},
        )[:: 1 if score == "sigmoid" else 2]:
            o = o | {"score": score}
            name = f"{score}-{'-'.join(key for key, value in o.items() if value is not False)}"
            yield Sample(name, (spread(4, 6), 3), o, smooth=True)
            grouped = {"valid_mask": mask(7), "group_offsets": torch.tensor([0, 3, 3, 7])}
            yield Sample(f"{name}-masked-grouped", (spread(7, 5), 2), o | grouped, smooth=True)
            yield Sample(f"{name}-rows", (spread(3, 70), 4), o)
            extreme = (40 * seeded(20, 9)).where(mask(20, 9, seed=5), -torch.inf)
            extreme[3] = -torch.inf
            yield Sample(f"{name}-extreme", (extreme, 3), o)
            yield Sample(f"{name}-nan", (seeded(20, 9).where(mask(20, 9), torch.nan), 4), o)


def selected_samples():
    """What chooses experts, other than their logits."""
    for score in "softmax", "sigmoid", "sqrt_softplus":
        o = {"score": score}
        bias = seeded(8, seed=9)
        yield Sample(f"{score}-bias", (spread(5, 8), 3), o | {"bias": bias}, smooth=True)
        for group_score, kept in ("max", 2), ("top2_sum", 2), ("topk_sum", 1):
            if score != "sigmoid" and group_score != "top2_sum":
                continue  # how groups are ranked depends on the values of scores alone
            groups = {"num_groups": 4, "topk_group": kept, "group_score": group_score}
            yield Sample(f"{score}-{group_score}", (seeded(20, 8), 2), o | groups)
            hidden = seeded(20, 8).where(mask(20, 8), -torch.inf)
            yield Sample(f"{score}-{group_score}-some-hidden", (hidden, 2), o | groups)
            ties = {"bias": bias.round()}
            yield Sample(
                f"{score}-{group_score}-bias", (seeded(20, 8).round(), 2), o | groups | ties
            )
            wide = {"num_groups": 8, "topk_group": 3, "bias": seeded(96, seed=4)}
            yield Sample(f"{score}-{group_score}-wide", (seeded(9, 96), 6), o | groups | wide)
        nan = seeded(20, 8).where(mask(20, 8), torch.nan)
        yield Sample(f"{score}-bias-nan", (nan, 3), o | {"bias": bias, "num_groups": 2})
        hidden_by_bias = bias.where(torch.arange(8) % 3 > 0, -torch.inf)
        yield Sample(f"{score}-bias-hidden", (seeded(9, 8), 7), o | {"bias": hidden_by_bias})
    counts = torch.tensor([0, 3, 1, 2, 3])
    yield Sample("token-top-k", (spread(5, 6), 3), {"token_top_k": counts}, smooth=True)
    masked = {"token_top_k": counts.view(1, 5), "valid_mask": mask(1, 5)}
    yield Sample("token-top-k-masked", (spread(1, 5, 70), 3), masked)


def as_selection(sample):
    keys = "score", "valid_mask", "token_top_k", *SELECTION
    options = {key: value for key, value in sample.options.items() if key in keys}
    return Sample(sample.name, sample.args, options)


def select_samples():
    """Indices do not depend on how weights are made, nor values as they are on a score."""
    o = OPTIONS[0]
    extreme = (sample for sample in scored_samples() if sample.name.endswith("-extreme"))
    of_scores = {sample.options["score"]: sample for sample in extreme}.values()
    for sample in (*selected_samples(), *shaped_samples(o), *weighed_samples(o), *of_scores):
        selection = as_selection(sample)
        yield selection
        if selection.options.get("score") == "sigmoid":
            options = {key: value for key, value in selection.options.items() if key != "score"}
            yield Sample(f"{sample.name}-values", sample.args, options)


def topk_gate_samples():
    yield from topk_samples()
    yield from selected_samples()


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


def topk_sized(tokens):
    masked = {"statistics": True, "valid_mask": mask(tokens)}
    for renormalize in True, False:
        for score in "softmax", "sigmoid", "sqrt_softplus":
            options = masked | {"score": score, "renormalize": renormalize}
            yield Sample(f"{score}-{renormalize}", (seeded(tokens, 33), 4), options)
    groups = {"score": "sigmoid", "bias": seeded(32, seed=4), "num_groups": 4, "topk_group": 2}
    counts = torch.arange(tokens) % 5
    yield Sample("groups", (seeded(tokens, 32), 4), groups | {"token_top_k": counts})
    yield Sample("many", (seeded(tokens, 70), 33))


def gate_sized(tokens):
    for sample in topk_sized(tokens):
        if sample.options.keys() & SELECTION:
            continue
        logits, slots = sample.args
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(-1, logits.shape[1], (tokens, slots), generator=generator)
        yield Sample(sample.name, (logits, indices), sample.options)


def select_sized(tokens):
    return map(as_selection, topk_sized(tokens))


# ---- errors --------------------------------------------------------------------------------------


def shared_errors(op, last, values="logits"):
    """Errors that all have; ``last`` is their second argument for two tokens."""
    x = torch.zeros(2, 4)
    logits = f"{op}: expected {values} of shape [..., num_experts] with num_experts >= 1, got "
    yield Error("no dimension", (torch.zeros(()), last), logits + "[]")
    yield Error("no experts", (torch.zeros(2, 0), last), logits + "[2, 0]")
    dtype = f"{op}: expected {values} in float32, float64, bfloat16 or float16, got "
    yield Error("integers", (x.long(), last), dtype + "int64")
    yield Error("complex", (x.cfloat(), last), dtype + "complex64")
    valid = f"{op}: expected valid_mask "
    yield Error("mask shape", (x, last), valid + "of shape [2], one value per token, got [3]",
                {"valid_mask": torch.ones(3).bool()})  # fmt: skip
    yield Error(
        "mask dtype", (x, last), valid + "in bool, got float32", {"valid_mask": torch.ones(2)}
    )


def weighing_errors(op, last):
    x = torch.zeros(2, 4)
    said = f"{op}: expected score among ['softmax', 'sigmoid', 'sqrt_softplus'], got 'tanh'"
    yield Error("score", (x, last), said, {"score": "tanh"})
    said = f"{op}: expected epsilon >= 0, got -1"
    yield Error("epsilon", (x, last), said, {"epsilon": -1.0})
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


def selection_errors(op):
    x = torch.zeros(2, 4)
    for top_k in -1, 0, 5:
        said = f"{op}: expected top_k in [1, num_experts=4], got {top_k}"
        yield Error(f"top_k {top_k}", (x, top_k), said)
    said = f"{op}: expected bias "
    shape = said + "of shape [num_experts=4], got [3]"
    yield Error("bias shape", (x, 2), shape, {"bias": torch.zeros(3)})
    dtype = said + "in float32, got float64"
    yield Error("bias dtype", (x, 2), dtype, {"bias": torch.zeros(4).double()})
    for groups in 0, 3:
        said = f"{op}: expected num_groups to divide num_experts=4, got {groups}"
        yield Error(f"groups {groups}", (x, 2), said, {"num_groups": groups})
    for kept in 0, 3:
        said = f"{op}: expected topk_group in [1, num_groups=2], got {kept}"
        yield Error(f"kept {kept}", (x, 2), said, {"num_groups": 2, "topk_group": kept})
    said = f"{op}: expected group_score to add up at most the 1 experts of a group, got 2"
    yield Error("group of one", (x, 2), said, {"num_groups": 4, "topk_group": 3})
    said = f"{op}: expected group_score among ['max', 'top2_sum', 'topk_sum'], got 'mean'"
    yield Error("group score", (x, 2), said, {"group_score": "mean"})
    said = f"{op}: expected top_k at most the 2 experts of topk_group groups, got 3"
    yield Error("groups too small", (x, 3), said, {"num_groups": 2})
    said = f"{op}: expected token_top_k "
    shape = said + "of shape [2], one value per token, got [3]"
    yield Error("counts shape", (x, 2), shape, {"token_top_k": torch.ones(3).long()})
    dtype = said + "in int64, got int32"
    yield Error("counts dtype", (x, 2), dtype, {"token_top_k": torch.ones(2).int()})
    for value in -1, 3:
        options = {"token_top_k": torch.tensor([1, value])}
        text = said + f"in [0, top_k=2], got {value}"
        yield Error(f"counts {value}", (x, 2), text, options, static=False)


def topk_errors():
    yield from shared_errors("topk_gate", 2)
    yield from weighing_errors("topk_gate", 2)
    yield from selection_errors("topk_gate")


def select_errors():
    yield from shared_errors("topk_select", 2, "scores")
    yield from selection_errors("topk_select")


def gate_errors():
    indices = torch.zeros(2, 1, dtype=torch.int64)
    for error in shared_errors("gate", indices):
        if error.name != "no dimension":
            yield error
    yield from weighing_errors("gate", indices)
    x, said = torch.zeros(2, 4), "gate: expected indices "
    yield Error("indices dtype", (x, indices.int()), said + "in int64, got int32")
    yield Error("indices rows", (x, indices[:1]), said + "of shape [2, slots], got [1, 1]")
    yield Error("indices dimensions", (x, indices[0]), said + "of shape [2, slots], got [1]")
    for index in -2, 4:
        wrong = indices.clone().fill_(index)
        text = f"in [-1, num_experts=4), got {index}"
        yield Error(f"index {index}", (x, wrong), said + text, static=False)


# ---- what opcheck calls --------------------------------------------------------------------------


def flat(x):
    return None if x is None else x.reshape(-1)


def selection_arguments(get, top_k):
    bias = get("bias")
    bias = bias if bias is None else bias.detach()
    best = {"max": 1, "top2_sum": 2, "topk_sum": max(1, top_k // get("topk_group", 1))}
    return (
        bias, get("num_groups", 1), get("topk_group", 1), best[get("group_score", "top2_sum")],
        flat(get("token_top_k")),
    )  # fmt: skip


def overloads(forward):
    def of(sample):
        logits, second = sample.args
        get = sample.options.get
        rows = logits.reshape(-1, logits.shape[-1])
        is_given = isinstance(second, torch.Tensor)
        score = get("score", "softmax")
        epsilon = get("epsilon", 0.0 if score == "softmax" else 1e-20)
        number = ["softmax", "sigmoid", "sqrt_softplus"].index(score)
        weighing = number, get("renormalize", True), epsilon, get("scale", 1.0)
        statistics = get("statistics", False)
        valid, offsets = flat(get("valid_mask")), get("group_offsets")
        last = (valid, offsets, statistics)
        indices = second if is_given else reference(rows, second)["indices"]
        indices = indices.reshape(len(rows), indices.shape[-1])
        if is_given:
            yield forward, (rows, indices, *weighing, *last)
        else:
            yield forward, (rows, second, *weighing, *selection_arguments(get, second), *last)

        groups = 1 if offsets is None else len(offsets) - 1
        yield torch.ops.torch_routers._gate_backward.default, (
            seeded(*indices.shape, seed=5).to(rows.dtype).requires_grad_(),
            seeded(len(rows), seed=6).to(rows.dtype) if statistics else None,
            seeded(groups, rows.shape[1], seed=7).to(rows.dtype) if statistics else None,
            rows, indices, *weighing, valid, offsets,
        )  # fmt: skip

    return of


def select_overloads(sample):
    scores, top_k = sample.args
    get = sample.options.get
    score = ["softmax", "sigmoid", "sqrt_softplus", None].index(get("score"))
    rows = scores.detach().reshape(-1, scores.shape[-1])
    arguments = (rows, top_k, score, *selection_arguments(get, top_k), flat(get("valid_mask")))
    yield torch.ops.torch_routers.topk_select.default, arguments


def tolerance(sample):
    """A sum over the experts, one over the tokens, and scores whose root is taken."""
    logits = sample.args[0]
    return 8 + logits.shape[-1] / 4 + logits.numel() / max(1, logits.shape[-1]) / 4


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    OpCase("topk_gate", topk_gate, reference, topk_gate_samples, topk_errors,
           overloads(torch.ops.torch_routers.topk_gate.default), DTYPES, tolerance,
           results_in_full_precision=True, sized=topk_sized, per_token=True),
    OpCase("gate", gate, reference, gate_samples, gate_errors,
           overloads(torch.ops.torch_routers.gate.default), DTYPES, tolerance,
           results_in_full_precision=True, sized=gate_sized, per_token=True),
    OpCase("topk_select", topk_select, select_reference, select_samples, select_errors,
           select_overloads, DTYPES, tolerance, sized=select_sized, per_token=True),
]  # fmt: skip
