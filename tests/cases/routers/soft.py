import torch

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    probs = (router.weight.to(x.dtype) @ x).softmax(0)
    if router.mode == "soft":
        return list(range(EXPERTS)), probs
    if router.mode == "hard":
        return [int(context["task_ids"])], x.new_ones(1)
    order = probs.tolist()
    experts = sorted(sorted(range(EXPERTS), key=lambda e: (-order[e], e))[: router.top_k])
    weights = probs[experts]
    return experts, weights / weights.sum() if router.renormalize else weights


def labels(shape):
    return {"task_ids": torch.arange(torch.Size(shape).numel()).view(shape) * 5 % EXPERTS}


def make(**options):
    losses = [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
    router = tr.SoftRouter(HIDDEN, EXPERTS, losses=losses, **options)
    router.weight.data *= 20
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
ERRORS = [
    (ARGUMENTS | {"num_experts": 0}, "SoftRouter: expected num_experts >= 1, got 0"),
    (ARGUMENTS | {"top_k": 7}, "SoftRouter: expected top_k in [1, num_experts=6], got 7"),
    (ARGUMENTS | {"jitter": 1.0}, "SoftRouter: expected jitter in [0, 1), got 1.0"),
    (
        ARGUMENTS | {"mode": "sharp"},
        "SoftRouter: expected mode among ['soft', 'soft_topk', 'st_topk', 'hard'], got 'sharp'",
    ),
    (ARGUMENTS | {"mode": "st_topk"}, 'SoftRouter: expected top_k with mode="st_topk", got none'),
]
CALL_ERRORS = [
    (
        {"task_ids": torch.zeros(2, 4, dtype=torch.int64)},
        "SoftRouter: expected task_ids in int64 of shape [2, 3], got torch.int64 of shape [2, 4]",
    ),
]

CASES = [
    RouterCase("soft", make, of_token=of_token, errors=ERRORS),
    RouterCase("soft top-k", lambda: make(mode="soft_topk", top_k=2), of_token=of_token),
    RouterCase(
        "soft top-k, not renormalised",
        lambda: make(mode="soft_topk", top_k=3, renormalize=False),
        of_token=of_token,
    ),
    RouterCase("straight-through", lambda: make(mode="st_topk", top_k=2), of_token=of_token),
    RouterCase(
        "hard",
        lambda: make(mode="hard"),
        context=labels,
        of_token=of_token,
        learns_from_task=False,
        call_errors=CALL_ERRORS,
    ),
]
