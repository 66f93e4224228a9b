import torch

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    logits = router.weight.to(x.dtype) @ x
    experts = sorted(range(EXPERTS), key=lambda e: (-logits[e].item(), e))[: router.top_k]
    probs = logits.softmax(0)[experts]
    return experts, probs / probs.sum() if router.renormalize else probs


def losses():
    return [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]


def make(top_k, **options):
    # A larger weight than that of a fresh router: decisions with a margin.
    router = tr.TopKRouter(HIDDEN, EXPERTS, top_k, losses=losses(), **options)
    router.weight.data *= 20
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 2}
ERRORS = [
    (ARGUMENTS | {"top_k": 7}, "TopKRouter: expected top_k in [1, num_experts=6], got 7"),
    (ARGUMENTS | {"top_k": 0}, "TopKRouter: expected top_k in [1, num_experts=6], got 0"),
    (ARGUMENTS | {"num_experts": 0}, "TopKRouter: expected num_experts >= 1, got 0"),
    (
        ARGUMENTS | {"losses": [tr.losses.ZLoss(1), tr.losses.ZLoss(2)]},
        "TopKRouter: expected losses with distinct names, got ['z', 'z']",
    ),
]
CALL_ERRORS = [
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
]
