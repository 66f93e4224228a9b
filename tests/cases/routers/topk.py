import torch
from torch import nn

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase

SCORES = {
    "softmax": lambda logits: logits.softmax(0),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrt_softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


def best(values, count, among=range(EXPERTS)):
    return sorted(among, key=lambda i: (-float(values[i]), i))[:count]


def of_token(x, context, router):
    logits = router.weight.to(x.dtype) @ x
    if router.bias is not None:
        logits = logits + router.bias
    scores = SCORES[router.score](logits)
    by = logits
    if router.expert_bias is not None:
        by = (logits if router.selection_bias == "logits" else scores) + router.expert_bias
    groups = [range(EXPERTS)]
    if router.num_groups > 1:
        size = EXPERTS // router.num_groups
        groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
        values = [sum(by[e] for e in best(by, 2, group)) for group in groups]
        groups = [groups[g] for g in best(values, router.topk_group, range(len(groups)))]
    experts = best(by, router.top_k, [e for group in groups for e in group])
    weights = scores[experts]
    if router.renormalize:
        weights = weights / (weights.sum() + (router.epsilon or 0))
    return experts, router.scale * weights


def losses():
    return [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]


def make(top_k, **options):
    # A larger weight than that of a fresh router: decisions with a margin.
    router = tr.TopKRouter(HIDDEN, EXPERTS, top_k, losses=losses(), **options)
    router.weight.data *= 20
    for bias in router.bias, router.expert_bias:
        if bias is not None:
            bias.data.copy_(torch.linspace(-0.4, 0.5, EXPERTS).roll(2))
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 2}
ERRORS = [
    (ARGUMENTS | {"top_k": 7}, "TopKRouter: expected top_k in [1, num_experts=6], got 7"),
    (ARGUMENTS | {"top_k": 0}, "TopKRouter: expected top_k in [1, num_experts=6], got 0"),
    (ARGUMENTS | {"num_experts": 0}, "TopKRouter: expected num_experts >= 1, got 0"),
    (
        ARGUMENTS | {"score": "tanh"},
        "TopKRouter: expected score among ['softmax', 'sigmoid', 'sqrt_softplus'], got 'tanh'",
    ),
    (
        ARGUMENTS | {"num_groups": 4},
        "topk_select: expected num_groups to divide num_experts=6, got 4",
    ),
    (
        ARGUMENTS | {"selection_bias": "weights"},
        "TopKRouter: expected selection_bias among [False, True, 'logits'], got 'weights'",
    ),
    (ARGUMENTS | {"jitter": 1.0}, "TopKRouter: expected jitter in [0, 1), got 1.0"),
    (
        ARGUMENTS | {"capacity_factor": -1.0},
        "expert_capacity: expected a finite factor >= 0, got -1.0",
    ),
    (
        ARGUMENTS | {"losses": [tr.losses.ZLoss(1), tr.losses.ZLoss(2)]},
        "TopKRouter: expected losses with distinct names, got ['z', 'z']",
    ),
]
CALL_ERRORS = [
    ({"top_k": 7}, "topk_gate: expected top_k in [1, num_experts=6], got 7"),
    ({"capacity": -1}, "limit_capacity: expected capacity >= 0, got -1"),
    ({"indices": torch.full((2, 3, 2), 6)}, "gate: expected indices in [-1, num_experts=6), got 6"),
    (
        {"indices": torch.zeros(2, 2, 2, dtype=torch.int64)},
        "gate: expected indices of shape [2, 3, slots], got [2, 2, 2]",
    ),
]

CASES = [
    RouterCase("top-2", lambda: make(2), of_token=of_token, errors=ERRORS, call_errors=CALL_ERRORS),
    RouterCase("softmax top-3", lambda: make(3, renormalize=False), of_token=of_token),
    RouterCase("switch", lambda: make(1, renormalize=False), of_token=of_token),
    RouterCase("gate bias", lambda: make(2, gate_bias=True), of_token=of_token),
    RouterCase(
        "sigmoid, bias, groups",
        lambda: make(
            2, score="sigmoid", selection_bias=True, num_groups=3, topk_group=2, scale=2.5
        ),
        of_token=of_token,
    ),
    RouterCase("bias of logits", lambda: make(2, selection_bias="logits"), of_token=of_token),
    RouterCase(
        "bias of logits, groups",
        lambda: make(
            2,
            score="sigmoid",
            selection_bias="logits",
            num_groups=3,
            topk_group=2,
            renormalize=False,
        ),
        of_token=of_token,
    ),
    RouterCase(
        "square root of softplus",
        lambda: make(2, score="sqrt_softplus", renormalize=False),
        of_token=of_token,
    ),
]
