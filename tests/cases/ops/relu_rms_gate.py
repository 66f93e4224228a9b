import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

NORMS = ("rms", "centered", "simple")

# ---- reference -----------------------------------------------------------------------------------


def row_of(logits, gain, eps, norm):
    """The weights of one token, its inverse RMS, and which experts are active."""
    a = [z.relu() for z in logits]
    mean, inverse = 0, torch.ones_like(logits[0])
    if norm == "centered":
        mean = sum(a) / len(a)
    if norm != "simple":
        inverse = 1 / (sum((x - mean) ** 2 for x in a) / len(a) + eps).sqrt()
    weights = [(x - (mean if x > 0 else 0)) * inverse * g for x, g in zip(a, gain)]
    return torch.stack(weights), inverse.detach(), torch.tensor([bool(x > 0) for x in a])


def reference(logits, gain, *, eps=1e-5, norm="rms", valid_mask=None):
    shape, experts = logits.shape, logits.shape[-1]
    counts = torch.zeros(experts, dtype=torch.int64)
    weights, inverses = [logits.new_empty(0, experts) + 0 * gain], [logits.new_empty(0).detach()]
    valid = [True] * math.prod(shape[:-1]) if valid_mask is None else valid_mask.flatten().tolist()
    for row, real in zip(logits.reshape(-1, experts), valid):
        if real:
            y, inverse, active = row_of(row, gain, eps, norm)
            counts += active
        else:
            y, inverse = torch.zeros_like(row), row.new_zeros(()).detach()
        weights.append(y[None])
        inverses.append(inverse[None].detach())
    return {
        "weights": torch.cat(weights).view(shape),
        "inverse_rms": torch.cat(inverses).view(shape[:-1]),
        "counts": counts,
    }


def call(logits, gain, **options):
    return ops.relu_rms_gate(logits, gain, **options)._asdict()


# ---- samples -------------------------------------------------------------------------------------


def inputs(*shape, seed=0):
    return seeded(*shape, seed=seed), seeded(shape[-1], seed=seed + 1)


def samples():
    mask = torch.tensor([True, False, True, True, False])
    for norm in NORMS:
        few = inputs(5, 7)
        yield Sample(f"{norm}", few, {"norm": norm}, smooth=True)
        yield Sample(f"{norm}, mask", few, {"norm": norm, "valid_mask": mask}, smooth=True)
        for experts in (1, 2, 8, 31, 33, 64, 65, 100) if norm == "centered" else (1, 33, 100):
            yield Sample(f"{norm}, {experts} experts", inputs(9, experts), {"norm": norm})
        yield Sample(f"{norm}, several blocks", inputs(150, 6), {"norm": norm})
        logits, gain = inputs(5, 7)
        logits[0], logits[1], logits[2], logits[3] = -1.0, 0.0, 2.0, logits[3].abs()
        yield Sample(f"{norm}, dead, zero, equal, positive rows", (logits, gain), {"norm": norm})
        logits = logits.clone()
        logits[0, 2], logits[2, 1], logits[3, 3] = torch.nan, torch.inf, -torch.inf
        yield Sample(f"{norm}, not a number", (logits, gain), {"norm": norm})
        yield Sample(
            f"{norm}, masked content", (logits, gain),
            {"norm": norm, "valid_mask": torch.tensor([False, True, False, True, True])},
        )  # fmt: skip
    yield Sample("leading dimensions", inputs(2, 3, 5))
    yield Sample("no tokens", inputs(0, 4))
    yield Sample("large eps", inputs(5, 7), {"eps": 0.5}, smooth=True)
    yield Sample("one token", (seeded(7), seeded(7, seed=1)), smooth=True)
    yield Sample("everything masked", inputs(3, 5), {"valid_mask": torch.zeros(3).bool()})


def sized(tokens):
    """Larger than a block."""
    mask = seeded(tokens, seed=5) > -1
    for norm in NORMS:
        yield Sample(f"{norm}", inputs(tokens, 33), {"norm": norm, "valid_mask": mask})


def errors():
    logits, gain = inputs(2, 4)
    op = "relu_rms_gate: expected "

    def error(name, said, *, logits=logits, gain=gain, **options):
        return Error(name, (logits, gain), op + said, options)

    yield error("norm", "norm among ['rms', 'centered', 'simple'], got 'layer'", norm="layer")
    shape = "logits of shape [..., num_experts] with num_experts >= 1, got "
    yield error("no experts", shape + "[2, 0]", logits=logits[:, :0])
    yield error("no dimensions", shape + "[]", logits=logits[0, 0])
    yield error("integers", "logits in float32, float64, bfloat16 or float16, got int64",
                logits=logits.long())  # fmt: skip
    yield error("gain of integers", "gain in float64, got int64", gain=gain.long())
    of_gain = "gain of shape [4], one value per expert, got "
    yield error("too few gains", of_gain + "[3]", gain=gain[:3])
    yield error("gain dimensions", of_gain + "[1, 4]", gain=gain[None])
    yield error("mask shape", "valid_mask of shape [2], one value per token, got [3]",
                valid_mask=torch.ones(3).bool())  # fmt: skip
    yield error("mask dtype", "valid_mask in bool, got int64",
                valid_mask=torch.ones(2, dtype=torch.int64))  # fmt: skip
    for eps in 0.0, -1.0, math.nan, math.inf:
        yield error(f"eps {eps}", f"eps in [1e-30, 1e30], got {eps:g}", eps=eps)


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    logits, gain = sample.args
    mask = sample.options.get("valid_mask")
    rest = (
        sample.options.get("eps", 1e-5),
        NORMS.index(sample.options.get("norm", "rms")),
        None if mask is None else mask.reshape(-1),
    )
    flat = logits.reshape(-1, logits.shape[-1])
    yield torch.ops.torch_routers.relu_rms_gate.default, (flat, gain, *rest)
    backward = torch.ops.torch_routers._relu_rms_gate_backward.default
    yield backward, (torch.ones_like(flat), flat, gain, *rest)


CASES = [
    OpCase(
        "relu_rms_gate", call, reference, samples, errors, overloads,
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lambda sample: 8 + sample.args[0].shape[-1] / 16,
        results_in_full_precision=True, sized=sized, per_token=True,
    ),
]  # fmt: skip
