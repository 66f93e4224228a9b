import torch

import torch_routers as tr
from cases.op_case import seeded
from cases.router_case import EXPERTS, HIDDEN, RouterCase

SIZE = 4


def context(shape):
    return {"state": seeded(*shape, SIZE, seed=4, dtype=torch.float32).tanh()}


def of_token(x, context, router):
    cell = router.cell
    module = {"gru": torch.nn.GRUCell, "rnn": torch.nn.RNNCell}[cell.kind](SIZE, SIZE).to(x.dtype)
    module.load_state_dict(cell.state_dict())
    state = module(router.projector @ x, context["state"].to(x.dtype))
    logits = router.weight @ state
    experts = sorted(range(EXPERTS), key=lambda e: (-float(logits[e]), e))[: router.top_k]
    return experts, logits[experts].softmax(0)


def make(kind="gru", **options):
    losses = [tr.losses.LoadBalanceLoss(1e-2), tr.losses.ZLoss(1e-3)]
    cell = tr.RecurrentCell(SIZE, kind)
    router = tr.RecurrentRouter(HIDDEN, EXPERTS, 2, cell=cell, losses=losses, **options)
    router.weight.data *= 40  # decisions with a margin
    router.projector.data *= 20
    return router


ARGUMENTS = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k": 2}
ERRORS = [
    (ARGUMENTS | {"top_k": 7}, "RecurrentRouter: expected top_k in [1, num_experts=6], got 7"),
]
STATE = "RecurrentRouter: expected state in a floating dtype of shape [2, 3, 4], got "
CALL_ERRORS = [
    ({"state": torch.zeros(2, 3, 6)}, STATE + "torch.float32 of shape [2, 3, 6]"),
    ({"state": torch.zeros(2, 3, 4).long()}, STATE + "torch.int64 of shape [2, 3, 4]"),
    ({"top_k": 7}, "topk_gate: expected top_k in [1, num_experts=6], got 7"),
]

CASES = [
    RouterCase("recurrent", make, context, of_token, errors=ERRORS, call_errors=CALL_ERRORS),
    RouterCase("recurrent, plain cell", lambda: make("rnn"), context, of_token),
]
