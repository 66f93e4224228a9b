import torch_routers as tr
from cases.ops.entropy_gate import entropy_of, kept_of
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    logits = router.weight @ x
    p = logits.softmax(0)
    kept = kept_of(logits.detach(), p, router.top_p, router.crossing, router.keep_top_k)
    if router.threshold < 1 and entropy_of(p, router.entropy, router.q) > router.threshold:
        kept = range(EXPERTS)
    kept = sorted(kept)
    weights = p[kept]
    return kept, weights / weights.sum() if router.renormalize else weights


def make(router_class=tr.EntropyRouter, losses=(), **options):
    losses = losses or [tr.losses.RoutingEntropyLoss(1e-2), tr.losses.SoftBalanceLoss(1e-3)]
    router = router_class(HIDDEN, EXPERTS, losses=losses, **options)
    router.weight.data *= 2
    return router


def top_p():
    losses = [tr.losses.LoadBalanceLoss(1e-2, "switch"), tr.losses.EntropyLoss(1e-4)]
    return make(tr.TopPRouter, losses)


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
ERRORS = [
    (ARGUMENTS | {"q": 3.0}, "entropy_gate: expected q above 0 and at most 2, got 3"),
    (ARGUMENTS | {"top_p": -1.0}, "entropy_gate: expected top_p >= 0, got -1"),
    (ARGUMENTS | {"num_experts": 0}, "EntropyRouter: expected num_experts >= 1, got 0"),
    (
        ARGUMENTS | {"crossing": "at"},
        "EntropyRouter: expected crossing among ['below', 'reaching', 'exceeding'], got 'at'",
    ),
]

CASES = [
    RouterCase("entropy", make, of_token=of_token, errors=ERRORS),
    RouterCase(
        "entropy, renormalized",
        lambda: make(renormalize=True, crossing="reaching", threshold=0.8),
        of_token=of_token,
    ),
    RouterCase("top-p", top_p, of_token=of_token),
]
