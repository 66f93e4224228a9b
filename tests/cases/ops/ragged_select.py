"""ragged_select: as many experts as a rule gives a token; against a loop over tokens."""

import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def number_of(z, order, rule, top_p=0.4, crossing="exceeding", thresholds=(), counts=()):
    if rule == "positive":
        return next((j for j, e in enumerate(order) if not z[e] > 0), len(order))
    p = z.softmax(0)
    if rule == "top_p":
        total = torch.zeros_like(p[0])
        for j, e in enumerate(order):
            with_it = total + p[e]
            fits = {
                "below": with_it <= top_p,
                "reaching": total < top_p,
                "exceeding": total <= top_p,
            }[crossing]
            if not fits or with_it.isnan():
                return j
            total = with_it
        return len(order)
    value = p.max() if rule == "confidence" else -sum(x * x.log() for x in p if x != 0)
    return counts[sum(bool(threshold <= value) for threshold in thresholds)]


def reference(logits, rule, *, min_k=1, max_k=None, valid_mask=None, **options):
    experts = logits.shape[-1]
    rows = logits.detach().reshape(-1, experts)
    max_k = experts if max_k is None else max_k
    indices = torch.full((rows.shape[0], max_k), -1)
    for t, z in enumerate(rows):
        if valid_mask is not None and not valid_mask.reshape(-1)[t]:
            continue
        values = [math.inf if math.isnan(x) else x for x in z.tolist()]
        order = sorted(range(experts), key=lambda e: (-values[e], e, not math.isnan(z[e])))
        order = sorted(order, key=lambda e: not math.isnan(z[e]))[:max_k]
        number = min(max(min_k, number_of(z, order, rule, **options)), max_k)
        indices[t, :number] = torch.tensor(order[:number], dtype=torch.int64)
    return {"indices": indices.view(*logits.shape[:-1], max_k)}


def call(logits, rule, **options):
    return {"indices": ops.ragged_select(logits, rule, **options)}


# ---- samples -------------------------------------------------------------------------------------

RULES = {
    "top_p": ("top_p", {}),
    "entropy": ("entropy", {"thresholds": [0.6, 1.2], "counts": [1, 2, 4], "max_k": 4}),
    "confidence": ("confidence", {"thresholds": [0.3, 0.6], "counts": [4, 2, 1]}),
    "positive": ("positive", {"min_k": 0}),
    "top_p below": ("top_p", {"top_p": 0.7, "crossing": "below", "min_k": 2}),
    "top_p reaching": ("top_p", {"top_p": 0.7, "crossing": "reaching"}),
    "all": ("top_p", {"top_p": 1.5}),
    "none": ("top_p", {"top_p": 0.0, "crossing": "reaching", "min_k": 0}),
    "few": ("top_p", {"top_p": 0.9, "max_k": 2}),
    "one step": ("entropy", {"thresholds": [1.275], "counts": [1, 2], "max_k": 2}),
    "no step": ("entropy", {"thresholds": [], "counts": [3]}),
    "positive, two at least": ("positive", {"min_k": 2, "max_k": 3}),
}


def samples():
    for name, (rule, options) in RULES.items():
        yield Sample(name, (1.7 * seeded(7, 6, seed=3), rule), options)
    mask = torch.tensor([True, False, True, True, False])
    yield Sample("masked", (2 * seeded(5, 6), "top_p"), {"valid_mask": mask, "top_p": 0.8})
    options = {"valid_mask": torch.ones(2, 3).bool(), "min_k": 2}
    yield Sample("leading", (2 * seeded(2, 3, 4), "positive"), options)
    for experts in 1, 2, 7, 33, 64, 300, 600:
        yield Sample(f"{experts} experts", (3 * seeded(19, experts), "top_p"), {"top_p": 0.8})
    for experts in 1, 33, 600:
        options = {"thresholds": [0.5, 2.0], "counts": [1, 1, experts]}
        yield Sample(f"{experts} experts, entropy", (3 * seeded(19, experts), "entropy"), options)
    yield Sample("one token", (seeded(5), "top_p"), {"top_p": 0.8})
    yield Sample("no tokens", (seeded(0, 5), "top_p"))
    for crossing in "below", "reaching", "exceeding":  # four of eight make exactly a half
        options = {"crossing": crossing, "top_p": 0.5}
        yield Sample(
            f"ties, {crossing}", (torch.zeros(2, 8, dtype=torch.float64), "top_p"), options
        )
    logits = seeded(6, 5)
    logits[0, 1], logits[1, 2], logits[2, 3], logits[3] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    logits[4, :4] = -torch.inf
    for name in "top_p", "entropy", "confidence", "positive":
        rule, options = RULES[name]
        yield Sample(f"not finite, {name}", (logits, rule), options)
    hidden = logits.index_fill(0, torch.tensor([0, 1, 2]), torch.nan)
    mask = torch.arange(6) > 2
    yield Sample("NaN where nobody looks", (hidden, "top_p"), {"valid_mask": mask})


def sized(tokens):
    mask = torch.arange(tokens) % 5 != 1
    options = {"valid_mask": mask, "top_p": 0.8}
    yield Sample("sized", (2 * seeded(tokens, 12), "top_p"), options)


def errors():
    logits = seeded(2, 4)
    op = "ragged_select: expected "

    def error(name, said, logits=logits, rule="top_p", static=True, **options):
        return Error(name, (logits, rule), op + said, options, static)

    shape = "logits of shape [..., num_experts], got "
    yield error("no dimension", shape + "[]", logits[0, 0])
    yield error("no experts", shape + "[2, 0]", logits[:, :0])
    half = "logits in float32 or float64, got bfloat16. Convert it with .float()"
    yield error("half", half, logits.bfloat16())
    rules = "rule in ['top_p', 'entropy', 'confidence', 'positive'], got 'all'"
    yield error("rule", rules, rule="all")
    crossings = "crossing in ['below', 'reaching', 'exceeding'], got 'at'"
    yield error("crossing", crossings, crossing="at")
    yield error("max_k", "max_k in [1, num_experts=4], got 5", max_k=5)
    yield error("min_k", "min_k in [0, max_k=2], got 3", min_k=3, max_k=2)
    yield error("top_p", "top_p >= 0, got -0.5", static=False, top_p=-0.5)
    steps = {"rule": "entropy", "counts": [1, 2, 4]}
    yield error("order", "thresholds that ascend, got [2, 1]", thresholds=[2, 1], **steps)
    nan = "thresholds that ascend, got [nan]"
    yield error("NaN", nan, rule="entropy", thresholds=[math.nan], counts=[1, 2])
    yield error("counts", "counts of shape [steps + 1=2], got [3]", thresholds=[1.0], **steps)
    negative = {"thresholds": [1.0], "counts": [1, -2]}
    yield error("negative", "counts >= 0, got [1, -2]", rule="entropy", **negative)


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    (logits, rule), options = sample.args, sample.options
    flat = logits.reshape(-1, logits.shape[-1])
    mask = options.get("valid_mask")
    order = torch.ops.torch_routers.topk_select.default(
        flat, options.get("max_k", flat.shape[1]), 0, None, 1, 1, 1, None,
        None if mask is None else mask.reshape(-1),
    )  # fmt: skip
    by_steps = rule in ("entropy", "confidence")
    yield (
        torch.ops.torch_routers.ragged_select.default,
        (
            flat,
            order,
            ["top_p", "entropy", "confidence", "positive"].index(rule),
            options.get("top_p", 0.4),
            ["below", "reaching", "exceeding"].index(options.get("crossing", "exceeding")),
            torch.tensor(options["thresholds"], dtype=torch.float64) if by_steps else None,
            torch.tensor(options["counts"]) if by_steps else None,
            options.get("min_k", 1),
        ),
    )


CASES = [
    OpCase("ragged_select", call, reference, samples, errors, overloads,
           (torch.float32, torch.float64), lambda sample: 0, sized=sized, per_token=True),
]  # fmt: skip
