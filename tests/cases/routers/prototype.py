import torch

import torch_routers as tr
from cases.op_case import seeded
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    prototypes = router.prototypes.to(x.dtype)
    if router.score == "absolute":
        scores = (prototypes @ x).abs() / (router.temperature or 1)
    else:
        rows = [(row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt() for row in prototypes]
        token = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        scores = torch.stack([row @ token for row in rows]) / HIDDEN**0.5
    order = scores.tolist()
    experts = sorted(range(EXPERTS), key=lambda e: (-order[e], e))[: router.top_k]
    return experts, scores[experts].softmax(0)


def make(**options):
    router = tr.PrototypeRouter(HIDDEN, EXPERTS, 3, **options)
    router.prototypes.copy_(seeded(EXPERTS, HIDDEN, seed=4))
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 3}
ERRORS = [
    (ARGUMENTS | {"top_k": 7}, "PrototypeRouter: expected top_k in [1, num_experts=6], got 7"),
    (
        ARGUMENTS | {"score": "cosine"},
        "PrototypeRouter: expected score among ['absolute', 'normalized'], got 'cosine'",
    ),
    (ARGUMENTS | {"temperature": 0.0}, "PrototypeRouter: expected temperature > 0, got 0.0"),
]

CASES = [
    RouterCase("prototype", make, of_token=of_token, learns_from_task=False, errors=ERRORS),
    RouterCase(
        "prototype, normalised",
        lambda: make(score="normalized"),
        of_token=of_token,
        learns_from_task=False,
    ),
]
