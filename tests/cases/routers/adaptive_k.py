import torch

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    p = (router.weight @ x).softmax(0)
    value = p.max() if router.measure == "confidence" else -(p * p.log()).sum()
    reached = sum(bool(threshold <= value) for threshold in router.thresholds)
    experts = p.argsort(descending=True, stable=True)[: router.top_ks[reached]]
    weights = p[experts]
    return experts.tolist(), weights / weights.sum() if router.renormalize else weights


def make(**options):
    losses = [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
    options = {"top_ks": (2, 3, 6), "thresholds": (1.0, 1.4)} | options
    router = tr.AdaptiveKRouter(HIDDEN, EXPERTS, losses=losses, **options)
    with torch.no_grad():
        router.weight *= 30  # some tokens are sure
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
ERRORS = [
    (
        ARGUMENTS | {"top_ks": (1, 2, 3)},
        "AdaptiveKRouter: expected one of top_ks more than thresholds=[1.275], got [1, 2, 3]",
    ),
    (
        ARGUMENTS | {"top_ks": (1, 7)},
        "AdaptiveKRouter: expected top_ks in [1, num_experts=6], got [1, 7]",
    ),
    (
        ARGUMENTS | {"measure": "margin"},
        "AdaptiveKRouter: expected measure among ['entropy', 'confidence'], got 'margin'",
    ),
    (
        ARGUMENTS | {"top_ks": (1, 2, 3), "thresholds": (2.0, 1.0)},
        "ragged_select: expected thresholds that ascend, got [2.0, 1.0]",
    ),
]

CASES = [
    RouterCase("adaptive k", make, of_token=of_token, errors=ERRORS),
    RouterCase(
        "adaptive k, confidence",
        lambda: make(measure="confidence", top_ks=(4, 2), thresholds=(0.5,), renormalize=False),
        of_token=of_token,
    ),
]
