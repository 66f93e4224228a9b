import torch

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    z = router.projection.to(x.dtype) @ x
    order = (z + router.expert_bias.to(x.dtype)).abs().tolist()
    experts = sorted(range(EXPERTS), key=lambda e: (-order[e], e))[: router.top_k]
    return experts, x.new_ones(router.top_k)


def make():
    router = tr.RankRouter(HIDDEN, EXPERTS, 2)
    router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS))
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 2}
ERRORS = [
    (ARGUMENTS | {"top_k": 0}, "RankRouter: expected top_k in [1, num_experts=6], got 0"),
    (ARGUMENTS | {"density": 0.0}, "RankRouter: expected density in (0, 1], got 0.0"),
]

CASES = [RouterCase("rank", make, of_token=of_token, learns_from_task=False, errors=ERRORS)]
