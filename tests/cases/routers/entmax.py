import torch

import torch_routers as tr
from cases.ops.entmax import entmax
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    logits = router.weight.to(x.dtype) @ x
    if router.bias is not None:
        logits = logits + router.bias
    alpha = router.alpha
    if router.alpha_logit is not None:
        alpha = 1 + torch.sigmoid(router.alpha_logit[0]).to(x.dtype)
    weights = entmax(logits, alpha)
    active = weights.nonzero().flatten()
    return active.tolist(), weights[active]


def make(**options):
    losses = [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
    # A larger weight than that of a fresh router: experts with a weight of zero.
    router = tr.EntmaxRouter(HIDDEN, EXPERTS, losses=losses, **options)
    router.weight.data *= 20
    if router.bias is not None:
        router.bias.data.copy_(torch.linspace(-0.4, 0.5, EXPERTS).roll(2))
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
ERRORS = [
    (ARGUMENTS | {"num_experts": 0}, "EntmaxRouter: expected num_experts >= 1, got 0"),
    (ARGUMENTS | {"alpha": 0.5}, "entmax: expected a finite alpha >= 1, got 0.5"),
    (
        ARGUMENTS | {"alpha": 2.0, "learn_alpha": True},
        "EntmaxRouter: expected a learned alpha in (1, 2), got 2.0",
    ),
]

CASES = [
    RouterCase("entmax", make, of_token=of_token, errors=ERRORS),
    RouterCase("sparsemax", lambda: make(alpha=2.0, gate_bias=True), of_token=of_token),
    RouterCase("learned alpha", lambda: make(alpha=1.3, learn_alpha=True), of_token=of_token),
]
