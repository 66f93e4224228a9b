import math

import torch

from cases.op_case import Error, OpCase, Sample, seeded
from torch_routers import ops

# ---- reference -----------------------------------------------------------------------------------


def softmax(row, alpha):
    """What entmax becomes where alpha is 1. The second term is 0, and has its slope in alpha."""
    p = (row - row.detach().max()).exp()
    p = p / p.sum()
    if not isinstance(alpha, torch.Tensor):
        return p
    shift = (p.log() ** 2 / 2).where(p > 0, 0).detach() * (alpha - alpha.detach())
    p = (row - row.detach().max() - shift).exp()
    return p / p.sum()


def entmax(row, alpha):
    """The weights of one token: a threshold found by bisection, which Newton then makes exact.

    Two steps that are differentiated make two derivatives exact too.
    """
    if row.isnan().any() or (row == torch.inf).any():
        return row * torch.nan
    if (row == -torch.inf).all():
        return torch.zeros_like(row)
    if float(alpha) < 1 + 1e-4:
        return softmax(row, alpha)
    power = 1 / (alpha - 1)
    x = (alpha - 1) * (row - row.detach().max())
    low, high = -1.0, 0.0
    values, exponent = x.tolist(), float(power)
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break  # neighbours
        if sum((v - middle) ** exponent for v in values if v > middle) >= 1:
            low = middle
        else:
            high = middle
    support = x > low
    tau = torch.full((), low, dtype=row.dtype)
    for _ in range(2):
        distance = (x - tau).where(support, 1)
        slope = power * (distance ** (power - 1)).where(support, 0).sum()
        tau = tau + ((distance**power).where(support, 0).sum() - 1) / slope
    p = ((x - tau).where(support, 1).clamp(min=0) ** power).where(support, 0)
    return p / p.sum()


def reference(logits, alpha, *, valid_mask=None):
    rows = logits.reshape(-1, logits.shape[-1])
    valid = [True] * len(rows) if valid_mask is None else valid_mask.flatten().tolist()
    weights = [
        entmax(row, alpha) if is_valid else torch.zeros_like(row)
        for row, is_valid in zip(rows, valid)
    ]
    weights = torch.stack(weights) if weights else rows
    counts = torch.tensor([sum(w != 0 for w in column) for column in weights.detach().T.tolist()])
    return {"weights": weights.view(logits.shape), "counts": counts}


def call(*args, **options):
    weights, counts = ops.entmax(*args, **options)
    return {"weights": weights, "counts": counts}


# ---- samples -------------------------------------------------------------------------------------

ALPHAS = (1.0, 1.05, 1.3, 1.5, 1.8, 2.0, 2.5, 3.0)
#: One for each way to the weights: softmax, powers below 2, squares, a sum, powers above 2.
WAYS = (1.0, 1.3, 1.5, 2.0, 2.5)


def mask(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7


def learned(alpha):
    return torch.tensor(alpha, dtype=torch.float64)


def samples():
    for alpha in ALPHAS:
        yield Sample(f"{alpha}", (seeded(4, 6), alpha), smooth=True)
        # Mapped tests double and halve every tensor: both must be at least 1.
        of_tensor = 2.2 if alpha < 2.2 else alpha
        if alpha == of_tensor:
            yield Sample(f"{alpha} learned", (seeded(3, 5), learned(alpha)), smooth=True)
        else:
            yield Sample(f"{alpha} learned", (seeded(9, 5), learned(alpha)))
        if alpha == 1.0:
            continue  # which weights are too small to be numbers depends on the dtype
        extreme = 3000 * seeded(20, 33)
        yield Sample(f"{alpha} extreme", (extreme, alpha), {"valid_mask": mask(20)})
        yield Sample(f"{alpha} flat", (1e-3 * seeded(5, 40), alpha))
    for alpha in WAYS:
        yield Sample(f"{alpha} masked", (seeded(7, 5), alpha), {"valid_mask": mask(7)}, smooth=True)
        if alpha != 1.0:
            yield Sample(f"{alpha} wide", (seeded(37, 70), alpha))
            yield Sample(f"{alpha} long", (seeded(3, 300), learned(alpha)))
        yield Sample(f"{alpha} ties", (seeded(65, 9).round(), alpha))
        yield Sample(f"{alpha} constant", (torch.full((3, 7), 2.5).double(), learned(alpha)))
        hidden = seeded(65, 9).where(mask(65, 9), -torch.inf)
        hidden[5] = -torch.inf
        yield Sample(f"{alpha} some hidden", (hidden, alpha))
        yield Sample(f"{alpha} some hidden, learned", (hidden, learned(alpha)))
        infinite = seeded(20, 9).where(mask(20, 9), torch.inf)
        yield Sample(f"{alpha} infinite", (infinite, alpha))
        nan = seeded(20, 9)
        nan[3, 4] = nan[17] = torch.nan
        yield Sample(f"{alpha} not a number", (nan, alpha))
    for alpha in 1.5, 2.5:  # shapes are the same for all
        yield Sample(f"{alpha} leading", (seeded(2, 3, 6), alpha), {"valid_mask": mask(2, 3)})
        yield Sample(f"{alpha} row", (seeded(6), alpha))
        yield Sample(f"{alpha} no tokens", (seeded(0, 4), alpha))
        yield Sample(f"{alpha} one expert", (seeded(3, 1), learned(alpha)))
        yield Sample(f"{alpha} all masked", (seeded(3, 4), alpha), {"valid_mask": mask(3) < 0})
    yield Sample("steep and constant", (torch.zeros(5, 4).double(), 50.0))


def sized(tokens):
    for alpha in 1.5, 2.0, learned(1.7):
        for experts in 9, 300:
            yield Sample(
                f"{alpha:.1f} of {experts}",
                (2 * seeded(tokens, experts), alpha),
                {"valid_mask": mask(tokens)},
            )


def errors():
    x, op = torch.zeros(2, 4), "entmax: expected "
    for alpha in 0.5, -1.0, math.nan, math.inf:
        yield Error(f"alpha {alpha}", (x, alpha), op + f"a finite alpha >= 1, got {alpha:g}")
        text = op + f"a finite alpha >= 1, got {alpha:g}"
        yield Error(f"learned alpha {alpha}", (x, torch.tensor(alpha)), text, static=False)
    yield Error("alpha shape", (x, torch.ones(2)), op + "alpha of shape [], got [2]")
    said = op + "alpha in a floating dtype, got int64"
    yield Error("alpha dtype", (x, torch.tensor(2)), said)
    said = op + "logits of shape [..., num_experts] with num_experts >= 1, got "
    yield Error("no dimension", (torch.zeros(()), 1.5), said + "[]")
    yield Error("no experts", (x[:, :0], 1.5), said + "[2, 0]")
    said = op + "logits in float32, float64, bfloat16 or float16, got int64"
    yield Error("logits dtype", (x.long(), 1.5), said)
    said = op + "valid_mask in bool, got float32"
    yield Error("mask dtype", (x, 1.5), said, {"valid_mask": torch.ones(2)})
    said = op + "valid_mask of shape [2], one value per token, got [3]"
    yield Error("mask shape", (x, 1.5), said, {"valid_mask": torch.ones(3).bool()})


# ---- what opcheck calls --------------------------------------------------------------------------


def overloads(sample):
    logits, alpha = sample.args
    rows = logits.reshape(-1, logits.shape[-1])
    valid_mask = sample.options.get("valid_mask")
    valid_mask = None if valid_mask is None else valid_mask.reshape(-1)
    is_learned = isinstance(alpha, torch.Tensor)
    full = rows.dtype if rows.dtype == torch.float64 else torch.float32
    alphas = (alpha.to(full), 0.0) if is_learned else (None, alpha)
    yield torch.ops.torch_routers.entmax.default, (rows, *alphas, valid_mask)
    weights = reference(rows.detach().double(), alpha, valid_mask=valid_mask)["weights"].to(full)
    grad = seeded(*weights.shape, seed=5).to(full)
    yield torch.ops.torch_routers._entmax_backward.default, (grad, weights.detach(), *alphas)


def tolerance(sample):
    """Beyond 2 the slope of a weight is infinite where it becomes 0: rounding shows there."""
    logits, alpha = sample.args
    return 16 + logits.shape[-1] / 4 if float(alpha) <= 2 else 500


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    OpCase("entmax", call, reference, samples, errors, overloads, DTYPES, tolerance,
           results_in_full_precision=True, sized=sized, per_token=True),
]  # fmt: skip
