import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def balance_of(score_sums, counts, tokens, switch):
    """Of the sums of one set of tokens."""
    if tokens == 0 or sum(counts) == 0:
        return 0 * score_sums.sum()
    loss = 0
    for s, c in zip(score_sums, counts):
        f = c / (tokens if switch else sum(counts))
        loss = loss + f * s / tokens
    return len(counts) * loss


def balance_loss(score_sums, counts, group_tokens, switch, per_group):
    if not per_group:
        tokens = sum(group_tokens)
        return balance_of(score_sums.sum(0), counts.sum(0).tolist(), tokens, switch)
    losses = [
        balance_of(score_sums[g], counts[g].tolist(), tokens, switch)
        for g, tokens in enumerate(group_tokens)
        if tokens > 0
    ]
    return sum(losses, 0 * score_sums.sum()) / max(1, len(losses))


def z_loss(lse, tokens):
    squares = [x.square() for x in lse if x != -math.inf]
    return sum(squares, 0 * lse[:0].sum()) / max(1, tokens)


def importance_loss(score_sums, unbiased):
    sums = score_sums.sum(0)
    if len(sums) == 1 or sums.sum() == 0:
        return 0 * sums.sum()
    mean = sum(sums) / len(sums)
    variance = sum((s - mean) ** 2 for s in sums) / (len(sums) - unbiased)
    return variance / mean**2


def reference(
    lse, score_sums, counts, group_tokens, *, balance=None, z=None, importance=None,
    convention="megatron", per_group=False, unbiased=False,
):  # fmt: skip
    tokens, result, total = group_tokens.tolist(), {}, 0
    if balance is not None:
        loss = balance_loss(score_sums, counts, tokens, convention == "switch", per_group)
        result["balance"], total = loss.detach(), total + balance * loss
    if z is not None:
        loss = z_loss(lse.reshape(-1), sum(tokens))
        result["z"], total = loss.detach(), total + z * loss
    if importance is not None:
        loss = importance_loss(score_sums, unbiased)
        result["importance"], total = loss.detach(), total + importance * loss
    return {"total": total} | result


def call(lse, score_sums, counts, group_tokens, **options):
    statistics = ops.Statistics(lse, score_sums, counts, group_tokens)
    losses = ops.router_losses(statistics, **options)
    return {name: x for name, x in losses._asdict().items() if x is not None}


# ---- samples -------------------------------------------------------------------------------------

ALL = {"balance": 0.5, "z": 0.25, "importance": 2.0}


def statistics(groups, experts, slots=2):
    """Of random tokens: what a gate would give for groups of these sizes."""
    tokens = sum(groups)
    scores = seeded(tokens, experts).softmax(-1)
    chosen = scores.topk(min(slots, experts)).indices
    one_hot = torch.zeros(tokens, experts, dtype=torch.int64).scatter_(1, chosen, 1)
    return (
        seeded(tokens, seed=1) + 2,
        torch.stack([x.sum(0) for x in scores.split(groups)]),
        torch.stack([x.sum(0) for x in one_hot.split(groups)]),
        torch.tensor(groups),
    )


def samples():
    one, several = statistics([7], 5), statistics([3, 0, 4], 5)
    for name in ALL:
        yield Sample(f"{name} alone", one, {name: 1.5}, smooth=True)
    for name, options in {
        "all": {},
        "switch": {"convention": "switch"},
        "unbiased": {"unbiased": True},
        "per group": {"per_group": True},
        "switch per group": {"convention": "switch", "per_group": True},
    }.items():
        yield Sample(f"{name}, one group", one, ALL | options)
        yield Sample(f"{name}, groups", several, ALL | options, smooth=True)
    for per_group in False, True:
        options = ALL | {"per_group": per_group}
        yield Sample(f"per group {per_group}, many", statistics([5000, 1, 4100], 33), options)
    yield Sample("weights of zero", one, dict.fromkeys(ALL, 0.0))
    yield Sample("one token", statistics([1], 8), ALL)
    yield Sample("no tokens", statistics([0], 4), ALL)
    yield Sample("no tokens in any group", statistics([0, 0], 4), ALL | {"per_group": True})
    yield Sample("one expert", statistics([4], 1), ALL | {"unbiased": True})
    yield Sample("every expert", statistics([4], 3, slots=3), ALL)
    lse, *rest = one
    yield Sample(
        "leading dimensions", (statistics([6], 5)[0].view(2, 3), *rest[:2], torch.tensor([6])), ALL
    )
    lse = lse.clone()
    lse[2] = -torch.inf
    yield Sample("a token of hidden experts", (lse, *rest), ALL)
    lse, sums, counts, tokens = one
    yield Sample("empty slots", (lse, sums, counts - (counts > 1).long(), tokens), ALL)
    yield Sample("only empty slots", (lse, sums, 0 * counts, tokens), ALL)
    yield Sample(
        "not a number", (lse.index_fill(0, tokens - 1, torch.nan), sums, counts, tokens), ALL
    )


def sized(tokens):
    """Twenty times as many: so little is done with one."""
    groups = statistics([6 * tokens, 0, 14 * tokens], 33)
    for per_group in False, True:
        yield Sample(f"per group {per_group}", groups, ALL | {"per_group": per_group})


def errors():
    lse, sums, counts, tokens = (x[:2] if i == 0 else x for i, x in enumerate(statistics([2], 4)))
    op = "router_losses: expected "

    def error(name, said, *, lse=lse, sums=sums, counts=counts, tokens=tokens, **options):
        return Error(name, (lse, sums, counts, tokens), op + said, options or ALL)

    yield Error("no loss", (lse, sums, counts, tokens), op + "the weight of a loss, got none")
    yield error("convention", "convention in ['megatron', 'switch'], got 'gshard'",
                balance=1.0, convention="gshard")  # fmt: skip
    none = " for the losses asked for, got none"
    yield error("no lse", "lse" + none, lse=None)
    yield error("no score_sums", "score_sums" + none, sums=None)
    yield error("no counts", "group_counts" + none, counts=None)
    matrix = "of shape [groups=1, num_experts], got "
    yield error("sums dimensions", "score_sums " + matrix + "[4]", sums=sums[0])
    yield error("no experts", "score_sums " + matrix + "[1, 0]", sums=sums[:, :0])
    yield error("sums groups", "score_sums " + matrix + "[2, 4]", sums=sums.repeat(2, 1))
    yield error("counts groups", "group_counts " + matrix + "[2, 4]", counts=counts.repeat(2, 1))
    yield error("counts experts", "group_counts of shape [1, 4], that of score_sums, got [1, 3]",
                counts=counts[:, :3])  # fmt: skip
    yield error("counts dtype", "group_counts in int64, got int32", counts=counts.int())
    yield error("tokens dtype", "group_tokens in int64, got int32", tokens=tokens.int())
    yield error("tokens shape", "group_tokens of shape [groups], got []", tokens=tokens[0])
    yield error("two dtypes", "score_sums in the dtype of lse, float64, got float32",
                sums=sums.float())  # fmt: skip
    convert = " in float32 or float64, got bfloat16. Convert it with .float()"
    yield error("half", "lse" + convert, lse=lse.bfloat16(), sums=sums.bfloat16())
    yield error("half sums", "score_sums" + convert, sums=sums.bfloat16(), importance=1.0)


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    lse, *rest = sample.args
    get = sample.options.get
    inputs = (
        lse.reshape(-1), *rest, *map(get, ALL),
        get("convention") == "switch", get("per_group", False), get("unbiased", False),
    )  # fmt: skip
    yield torch.ops.torch_routers.router_losses.default, inputs
    grad = lse.new_tensor(1.5)
    yield torch.ops.torch_routers._router_losses_backward.default, (grad, *inputs)


CASES = [
    OpCase("router_losses", call, reference, samples, errors, overloads,
           (torch.float32, torch.float64), lambda sample: 8 + sample.args[0].numel() / 256,
           sized=sized),
]  # fmt: skip
