"""What is true of the soft router alone."""

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr
from cases.op_case import seeded


def make(mode, **options):
    torch.manual_seed(0)
    router = tr.SoftRouter(6, 5, mode=mode, top_k=2, **options).double()
    router.weight.data *= 20
    return router


def test_straight_through_has_the_values_of_top_k_and_the_gradient_of_softmax():
    x = seeded(4, 6).double()
    hard, soft, straight = (make(mode) for mode in ("soft_topk", "soft", "st_topk"))
    factors = seeded(4, 5, seed=3).double()
    results = [router(x).weights for router in (hard, soft, straight)]
    for result in results:
        (result * factors).sum().backward()
    assert torch.equal(results[2], results[0])
    assert_close(straight.weight.grad, soft.weight.grad)
    assert not torch.allclose(straight.weight.grad, hard.weight.grad)


def test_top_k_of_all_experts_is_soft():
    x, soft = seeded(4, 6).double(), make("soft")
    for mode in "soft_topk", "st_topk":
        router = tr.SoftRouter(6, 5, mode=mode, top_k=5).double()
        router.load_state_dict(soft.state_dict())
        assert_close(router(x).weights, soft(x).weights)


def test_the_worked_example():
    router = tr.SoftRouter(2, 2).double()
    router.weight.data = torch.tensor([[0.3, 0.0], [-0.3, 0.0]]).double()
    x = torch.tensor([1.0, 2.0]).double()
    assert_close(
        router(x).weights, torch.tensor([0.6456563, 0.3543437]).double(), atol=5e-8, rtol=0
    )


def test_a_label_that_is_no_expert_gives_none():
    routing = make("hard")(seeded(3, 6).double(), task_ids=torch.tensor([-1, 4, 5]))
    assert routing.weights.sum(-1).tolist() == [0, 1, 0]
    assert routing.counts.tolist() == [0, 0, 0, 0, 1]


def test_hard_asks_for_labels():
    with pytest.raises(
        ValueError, match='SoftRouter: expected task_ids with mode="hard", got none'
    ):
        make("hard")(seeded(3, 6).double())


def test_the_mode_changes_between_calls():
    router, x = make("soft"), seeded(3, 6).double()
    router.mode = "soft_topk"
    assert (router(x).weights != 0).sum(-1).tolist() == [2, 2, 2]
    assert router.config()["mode"] == "soft_topk"
    with pytest.raises(ValueError, match="SoftRouter: expected mode among"):
        router.mode = "sharp"


def test_jitter_is_of_training_alone():
    router, x = make("soft", jitter=0.5), seeded(3, 6).double()
    noisy = router(x, seed=1).weights
    assert not torch.allclose(noisy, router(x, seed=2).weights)
    assert torch.equal(noisy, router(x, seed=1).weights)
    router.eval()
    assert torch.equal(router(x, seed=1).weights, router(x, seed=2).weights)
