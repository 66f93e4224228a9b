"""entropy_gate: top-p, or all experts where the entropy is high; against a loop over tokens."""

import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def entropy_of(p, entropy="tsallis", q=1.1, epsilon=1e-5):
    x = [value + epsilon for value in p]
    if len(x) == 1:
        return p[0] * 0
    if abs(q - 1) < 1e-4:
        return -sum(v * v.log() for v in x if not v <= 0) / math.log(len(x))
    powers = sum(v**q for v in x if not v <= 0)
    if entropy == "renyi":
        return (powers + 1e-10).log() / ((1 - q) * math.log(len(x)))
    if abs(q - 1) >= 1e-2:
        return (1 - powers) / (1 - len(x) ** (1 - q))
    # The sum of all, of which the powers leave little, without the cancellation.
    left = sum(v * torch.expm1((q - 1) * v.log()) for v in x if not v <= 0)
    return left / math.expm1((1 - q) * math.log(len(x)))


def kept_of(logits, p, top_p=0.75, crossing="below", keep_top_k=2):
    values = [math.inf if math.isnan(z) else z for z in logits.tolist()]
    order = sorted(range(len(values)), key=lambda e: (-values[e], e))
    total, kept = torch.zeros_like(p[0]), []
    for j, e in enumerate(order):
        with_it = total + p[e].detach()
        fits = {
            "below": with_it <= top_p,
            "reaching": j == 0 or total < top_p,
            "exceeding": j == 0 or total <= top_p,
        }[crossing]
        if not fits and j >= keep_top_k:
            break
        kept.append(e)
        total = with_it
    return kept


def reference(
    logits, *, threshold=0.9, renormalize=False, valid_mask=None,
    entropy="tsallis", q=1.1, epsilon=1e-5, **rule,
):  # fmt: skip
    rows, experts = logits.reshape(-1, logits.shape[-1]), logits.shape[-1]
    weights, entropies = [], []
    for t, z in enumerate(rows):
        masked = valid_mask is not None and not valid_mask.reshape(-1)[t]
        if masked or (z == -torch.inf).all():
            weights.append(torch.zeros_like(z))
            entropies.append(z.new_zeros(()))
            continue
        p = z.softmax(0)
        entropies.append(entropy_of(p, entropy, q, epsilon))
        kept = kept_of(z.detach(), p, **rule)
        if threshold < 1 and entropies[-1] > threshold:
            kept = range(experts)
        is_kept = torch.tensor([e in kept for e in range(experts)])
        row = torch.where(is_kept, p, 0)
        weights.append(row / row.sum() if renormalize else row)
    stacked = [torch.stack(x) if x else logits.new_zeros(0, *shape)
               for x, shape in ((weights, (experts,)), (entropies, ()))]  # fmt: skip
    return {
        "weights": stacked[0].view(logits.shape),
        "entropy": stacked[1].view(logits.shape[:-1]),
    }


def call(logits, **options):
    return ops.entropy_gate(logits, **options)._asdict()


# ---- samples -------------------------------------------------------------------------------------

RULES = {
    "default": {},
    "shannon": {"q": 1.0},
    "close to shannon": {"q": 1.001},
    "q 2": {"q": 2.0, "epsilon": 0.0},
    "q half": {"q": 0.5},
    "renyi": {"entropy": "renyi", "q": 1.4},
    "renyi half": {"entropy": "renyi", "q": 0.5},
    "reaching": {"crossing": "reaching", "threshold": 1.0},
    "exceeding": {"crossing": "exceeding", "threshold": 1.0, "keep_top_k": 1, "top_p": 0.4},
    "renormalized": {"renormalize": True},
    "soft": {"threshold": 0.0},
    "none but the best": {"threshold": 2.0, "top_p": 0.0, "keep_top_k": 1},
    "all": {"threshold": 1.0, "top_p": 2.0},
    "no floor": {"threshold": 1.0, "top_p": 0.3, "keep_top_k": 0},
}


def samples():
    for name, rule in RULES.items():
        yield Sample(name, (1.7 * seeded(5, 6, seed=3),), rule, smooth=True)
    mask = torch.tensor([True, False, True, True, False])
    yield Sample("masked", (2 * seeded(5, 6),), {"valid_mask": mask}, smooth=True)
    yield Sample("leading", (2 * seeded(2, 3, 4),), {"valid_mask": torch.ones(2, 3).bool()})
    for experts in 1, 2, 7, 33, 64, 300:
        for name in "default", "reaching", "renormalized":
            if name == "default" or experts in (1, 64, 300):
                yield Sample(f"{name}, {experts} experts", (3 * seeded(9, experts),), RULES[name])
    yield Sample("one token", (seeded(5),))
    yield Sample("no tokens", (seeded(0, 5),))
    yield Sample("floor above all", (seeded(3, 4),), {"keep_top_k": 9, "threshold": 1.0})
    for crossing in "below", "reaching", "exceeding":
        equal = torch.zeros(2, 8, dtype=torch.float64)
        options = {"crossing": crossing, "threshold": 1.0, "top_p": 0.5, "keep_top_k": 0}
        yield Sample(f"ties, {crossing}", (equal,), options)
    logits = seeded(7, 5)
    logits[0, 1], logits[1, 2], logits[2, 3], logits[3] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.inf,
    )
    logits[4, :4] = -torch.inf
    for threshold in 0.9, 1.0:
        yield Sample(f"not finite, {threshold}", (logits,), {"threshold": threshold})
    hidden = logits.index_fill(0, torch.tensor([0, 1, 2]), torch.nan)
    mask = torch.arange(7) > 2
    yield Sample("NaN where nobody looks", (hidden,), {"valid_mask": mask})


def sized(tokens):
    mask = torch.arange(tokens) % 5 != 1
    yield Sample("sized", (2 * seeded(tokens, 12),), {"valid_mask": mask})


EPSILON = "epsilon from 0 to below 1, above 0 with q below 1, got "


def errors():
    logits = seeded(2, 4)
    op = "entropy_gate: expected "

    def error(name, said, logits=logits, **options):
        return Error(name, (logits,), op + said, options)

    def value(name, said, **options):
        return Error(name, (logits,), op + said, options, static=False)

    yield error("no dimension", "logits of shape [..., num_experts], got []", logits[0, 0])
    yield error("no experts", "logits of shape [tokens, num_experts], got [2, 0]", logits[:, :0])
    half = "logits in float32 or float64, got bfloat16. Convert it with .float()"
    yield error("half", half, logits.bfloat16())
    yield error("entropy", "entropy in ['tsallis', 'renyi'], got 'gini'", entropy="gini")
    yield error(
        "crossing", "crossing in ['below', 'reaching', 'exceeding'], got 'at'", crossing="at"
    )
    yield error("mask dtype", "valid_mask in bool, got float32", valid_mask=torch.ones(2))
    mask = torch.ones(3, dtype=torch.bool)
    yield error("mask shape", "valid_mask of shape [tokens=2], got [3]", valid_mask=mask)
    yield value("q", "q above 0 and at most 2, got 2.5", q=2.5)
    yield value("epsilon", EPSILON + "-1", epsilon=-1)
    yield value("slope", EPSILON + "0", q=0.5, epsilon=0.0)
    yield value("threshold", "threshold to be a number, got nan", threshold=math.nan)
    yield value("top_p", "top_p >= 0, got -0.5", top_p=-0.5)
    yield value("keep_top_k", "keep_top_k >= 0, got -1", keep_top_k=-1)


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    (logits,), options = sample.args, sample.options
    mask = options.get("valid_mask")
    rule = (
        ["tsallis", "renyi"].index(options.get("entropy", "tsallis")),
        options.get("q", 1.1),
        options.get("epsilon", 1e-5),
        options.get("threshold", 0.9),
        options.get("top_p", 0.75),
        ["below", "reaching", "exceeding"].index(options.get("crossing", "below")),
        options.get("keep_top_k", 2),
        options.get("renormalize", False),
    )
    flat = logits.reshape(-1, logits.shape[-1])
    mask = None if mask is None else mask.reshape(-1)
    yield torch.ops.torch_routers.entropy_gate.default, (flat, mask, *rule)
    weights = torch.ops.torch_routers.entropy_gate.default(flat.detach(), mask, *rule)[0]
    inputs = torch.ones_like(flat), torch.ones_like(flat[:, 0]), flat, weights, mask, *rule
    yield torch.ops.torch_routers._entropy_gate_backward.default, inputs


CASES = [
    OpCase("entropy_gate", call, reference, samples, errors, overloads,
           (torch.float32, torch.float64), lambda sample: 64 + sample.args[0].shape[-1],
           sized=sized, per_token=True),
]  # fmt: skip
