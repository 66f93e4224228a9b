import torch

import torch_routers as tr
from cases.router_case import EXPERTS, RouterCase

VOCABULARY = 40


def context(shape):
    # Beyond the vocabulary too.
    generator = torch.Generator().manual_seed(2)
    return {"token_ids": torch.randint(0, VOCABULARY + 9, shape, generator=generator)}


def of_token(x, context, router):
    token = int(context["token_ids"])
    if token < VOCABULARY:
        experts = router.table[token].tolist()
    else:
        experts = [(token + j) % EXPERTS for j in range(router.top_k)]
    return experts, x.new_full((router.top_k,), 1 / router.top_k)


ARGUMENTS = {"vocab_size": VOCABULARY, "num_experts": EXPERTS, "top_k": 2}
ERRORS = [
    (ARGUMENTS | {"top_k": 7}, "HashRouter: expected top_k in [1, num_experts=6], got 7"),
    (ARGUMENTS | {"vocab_size": 0}, "HashRouter: expected vocab_size >= 1, got 0"),
]
IDS = "HashRouter: expected token_ids "
CALL_ERRORS = [
    (
        {"token_ids": None},
        "HashRouter: expected token_ids, got none. Pass it by keyword, or use tr.follow_inputs",
    ),
    (
        {"token_ids": torch.zeros(2, 2, dtype=torch.int64)},
        IDS + "of integers of shape [2, 3], got torch.int64 of shape [2, 2]",
    ),
    (
        {"token_ids": torch.zeros(2, 3)},
        IDS + "of integers of shape [2, 3], got torch.float32 of shape [2, 3]",
    ),
]

CASES = [
    RouterCase(
        "hash",
        lambda: tr.HashRouter(VOCABULARY, EXPERTS, 2, seed=3),
        context,
        of_token,
        learns_from_task=False,
        errors=ERRORS,
        call_errors=CALL_ERRORS,
    )
]
