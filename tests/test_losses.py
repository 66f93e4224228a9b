"""The auxiliary losses: worked examples, gradients, and what they refuse."""

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr
from torch_routers.losses import load_balance, z_loss

LOGITS = torch.tensor(
    [[2, 1, 0], [0, 2, 1], [3, 0, 1], [1, 0.5, 0]], dtype=torch.float64, requires_grad=True
)


def statistics(logits, top_k=2, **options):
    return tr.ops.topk_gate(logits, top_k, statistics=True, **options)[2]


def balance(logits, **options):
    s = statistics(logits, **options)
    return load_balance(s.score_sums[0], s.group_counts[0], s.group_tokens[0])


def z(logits, **options):
    s = statistics(logits, **options)
    return z_loss(s.lse, s.group_tokens[0])


def test_balance_of_a_worked_example():
    """Counts 3, 3, 2 of two slots per token; mean probabilities .526, .315, .159."""
    assert_close(balance(LOGITS).item(), 1.0654427, rtol=0, atol=5e-8)
    gradient = torch.autograd.grad(balance(LOGITS), LOGITS)[0][0]
    expected = torch.tensor([0.0056149, 0.0020656, -0.0076805], dtype=torch.float64)
    assert_close(gradient, expected, rtol=0, atol=5e-8)


def test_balance_is_one_when_experts_share_alike_and_num_experts_when_one_has_all():
    assert_close(balance(10 * torch.eye(4), top_k=1), torch.tensor(1.0))
    assert_close(balance(torch.tensor([[99.0, 0, 0, 0]] * 5), top_k=1), torch.tensor(4.0))


def test_z_is_the_mean_square_of_the_log_sum_exp():
    assert_close(z(LOGITS), LOGITS.logsumexp(1).square().mean())


@pytest.mark.parametrize("loss", [balance, z])
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, LOGITS)
    assert torch.autograd.gradgradcheck(loss, LOGITS)


@pytest.mark.parametrize("loss", [balance, z])
def test_masked_tokens_count_for_nothing(loss):
    mask = torch.tensor([True, False, True, True])
    assert_close(loss(LOGITS, valid_mask=mask), loss(LOGITS[mask]))


@pytest.mark.parametrize("loss", [balance, z])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tokens_are_no_loss(loss, dtype):
    logits = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    value = loss(logits)
    assert value.item() == 0 and value.dtype == dtype
    assert torch.autograd.grad(value, logits)[0].shape == (0, 3)


def test_the_objective_is_the_weighted_sum():
    losses = [tr.losses.LoadBalanceLoss(0.5), tr.losses.ZLoss(0.25)]
    routing = tr.TopKRouter(6, 4, 2, losses=losses)(torch.randn(9, 6))
    expected = 0.5 * routing.losses["load_balance"] + 0.25 * routing.losses["z"]
    assert_close(routing.aux_loss.detach(), expected)


def test_a_loss_without_statistics_says_so():
    routing = tr.TopKRouter(6, 4, 2)(torch.randn(9, 6))
    with pytest.raises(ValueError, match="ZLoss: expected a routing with statistics, got none"):
        tr.losses.ZLoss(1.0)(routing)
