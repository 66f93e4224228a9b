import torch

import torch_routers as tr
from cases.router_case import EXPERTS, RouterCase

TASKS = 5


def context(shape):
    # Tasks that are not in the table too.
    return {"task_ids": torch.arange(torch.Size(shape).numel()).view(shape) % (TASKS + 2) - 1}


def of_token(x, context, router):
    task = int(context["task_ids"])
    weights = []
    for split in range(router.num_splits):
        count = EXPERTS // router.num_splits
        row = router.weight[task if 0 <= task < TASKS else 0].to(x.dtype)
        skills = [row[split * count + e].sigmoid() for e in range(count)]
        if not 0 <= task < TASKS:
            skills = [torch.ones_like(skill) for skill in skills]
        weights += [skill / (sum(skills) + 1e-12) for skill in skills]
    return list(range(EXPERTS)), torch.stack(weights)


def make(**options):
    losses = [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
    router = tr.PolyRouter(EXPERTS, TASKS, noise=False, losses=losses, **options)
    router.weight.data *= 2000
    return router


ARGUMENTS = {"num_experts": EXPERTS, "num_tasks": TASKS}
ERRORS = [
    (ARGUMENTS | {"num_tasks": 0}, "PolyRouter: expected num_tasks >= 1, got 0"),
    (
        ARGUMENTS | {"num_splits": 4},
        "PolyRouter: expected num_splits that divides num_experts=6, got 4",
    ),
]
CALL_ERRORS = [
    (
        {"task_ids": None},
        "PolyRouter: expected task_ids, got none. Pass it by keyword, or use tr.follow_inputs",
    ),
    (
        {"task_ids": torch.zeros(2, 2, dtype=torch.int64)},
        "PolyRouter: expected task_ids in int64 of shape [2, 3], got torch.int64 of shape [2, 2]",
    ),
]

CASES = [
    RouterCase("poly", make, context, of_token, errors=ERRORS, call_errors=CALL_ERRORS),
    RouterCase("poly, split", lambda: make(num_splits=2), context, of_token),
]
