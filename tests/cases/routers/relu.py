import torch
from torch import nn

import torch_routers as tr
from cases.router_case import EXPERTS, HIDDEN, RouterCase


def of_token(x, context, router):
    a = (router.weight.to(x.dtype) @ x).relu()
    experts = [e for e in range(EXPERTS) if a[e] > 0]
    inverse = 1
    if router.norm == "rms":
        inverse = (a.square().mean() + router.eps).rsqrt()
    return experts, (a * inverse * router.gain.to(x.dtype))[experts]


def losses():
    return [
        # Those of neighbours and chunks depend on where padding stands: test_relu.py.
        tr.losses.LoadBalanceLoss(1e-2),
        tr.losses.ReLUSparsityLoss(1e-3, top_k=2),
    ]


def with_gains(router):
    router.gain.data.copy_(torch.linspace(-0.4, 1.5, EXPERTS))
    return router


def make(**options):
    return with_gains(
        tr.ReLURouter(HIDDEN, EXPERTS, init_std=0.4, losses=losses(), **options),
    )


def make_layer():
    layer = tr.BlockFFN(HIDDEN, EXPERTS, 10, init_std=0.4, losses=losses())
    with_gains(layer.router)
    return layer


def expert(experts, e, x):
    return experts.down_proj[e] @ nn.functional.silu(experts.up_proj[e] @ x)


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS}
ERRORS = [
    (
        ARGUMENTS | {"norm": "layer"},
        "ReLURouter: expected norm among ['rms', 'centered', 'simple'], got 'layer'",
    ),
    (ARGUMENTS | {"eps": 0.0}, "ReLURouter: expected eps in [1e-30, 1e30], got 0.0"),
    (ARGUMENTS | {"init_std": -1.0}, "ReLURouter: expected init_std >= 0, got -1.0"),
    (ARGUMENTS | {"num_experts": 0}, "ReLURouter: expected num_experts >= 1, got 0"),
]

CASES = [
    RouterCase("relu", make, of_token=of_token, beyond_losses=("gain",), errors=ERRORS),
    RouterCase(
        "relu of BlockFFN",
        make,
        of_token=of_token,
        beyond_losses=("gain",),
        make_layer=make_layer,
        expert=expert,
    ),
    RouterCase(
        "relu without a norm",
        lambda: make(norm="simple"),
        of_token=of_token,
        beyond_losses=("gain",),
    ),
]
