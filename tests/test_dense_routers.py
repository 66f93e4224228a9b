"""Routers with a weight for every expert: statistics and losses, against loops over tokens."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import torch_routers as tr

H, E = 7, 5


def softmax(routing, router):
    return routing.logits.softmax(-1)


def of_activations(routing, router):
    h = (routing.weights / router.gain).detach()
    return h / (h.sum(-1, keepdim=True) + 1e-5)


ROUTERS = {
    "entropy": (tr.EntropyRouter, softmax),
    "top-p": (tr.TopPRouter, softmax),
    "entmax": (tr.EntmaxRouter, lambda routing, router: routing.weights),
    "relu": (tr.ReLURouter, of_activations),
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def router(name, *losses):
    torch.manual_seed(0)
    each = ROUTERS[name][0](H, E, losses=losses).double()
    each.weight.data.normal_()
    return each


def inputs(*shape):
    return torch.randn(*shape, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(name, each, x, groups):
    """Score sums, counts and tokens of each group, given as lists of token numbers."""
    flat = x.view(-1, H)
    sums, counts, tokens = [], [], []
    for group in groups:
        sums.append(torch.zeros(E, dtype=torch.float64))
        counts.append(torch.zeros(E, dtype=torch.int64))
        tokens.append(len(group))
        for t in group:
            routing = each(flat[t : t + 1])
            sums[-1] += ROUTERS[name][1](routing, each)[0].detach()
            counts[-1] += routing.weights[0] != 0
    return torch.stack(sums), torch.stack(counts), torch.tensor(tokens)


@every_router
@pytest.mark.parametrize("groups", ["one", "samples", "offsets"])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_equal_a_loop(name, groups, masked):
    loss = tr.losses.SequenceBalanceLoss(1.0) if groups == "samples" else tr.losses.ZLoss(1.0)
    each, x = router(name, loss), inputs(3, 4)
    valid = torch.arange(12).view(3, 4) % 4 != 1 if masked else torch.ones(3, 4, dtype=torch.bool)
    ends = {"one": [0, 12], "samples": [0, 4, 8, 12], "offsets": [0, 1, 1, 7, 12]}[groups]
    ranges = [range(a, b) for a, b in pairwise(ends)]
    context = {"group_offsets": torch.tensor(ends)} if groups == "offsets" else {}
    routing = each(x, valid_mask=valid if masked else None, **context)
    lists = [[t for t in r if valid.flatten()[t]] for r in ranges]
    sums, counts, tokens = expected(name, each, x, lists)
    statistics = routing.statistics
    assert_close(statistics.score_sums.detach(), sums)
    assert torch.equal(statistics.group_counts, counts)
    assert torch.equal(statistics.group_tokens, tokens)
    assert torch.equal(routing.counts, counts.sum(0))
    logits = x @ each.weight.T
    assert_close(statistics.lse, torch.where(valid, logits.logsumexp(-1), 0))


@every_router
def test_balance_loss_equals_its_formula(name):
    each, x = router(name, tr.losses.LoadBalanceLoss(0.5)), inputs(9)
    routing = each(x)
    sums, counts, _ = expected(name, each, x, [range(9)])
    value = E * (counts[0] / counts.sum() * sums[0] / 9).sum()
    assert_close(routing.losses["load_balance"], value)
    assert_close(routing.aux_loss.detach(), 0.5 * value)


@every_router
def test_a_token_without_experts_makes_no_nan(name):
    each = router(name, tr.losses.ZLoss(1.0), tr.losses.LoadBalanceLoss(1.0))
    each.weight.data[:] = -torch.inf
    routing = each(inputs(2).abs())
    assert (routing.weights == 0).all()
    assert routing.losses["z"] == 0 and routing.losses["load_balance"] == 0
    (of_logits,) = torch.autograd.grad(routing.aux_loss, routing.logits)
    assert of_logits.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_losses_of_the_entropy_router_equal_their_formulas(masked):
    losses = tr.losses.RoutingEntropyLoss(1e-2), tr.losses.SoftBalanceLoss(1e-3)
    each, x = router("entropy", *losses), inputs(3, 5)
    valid = torch.arange(15).view(3, 5) % 4 != 2 if masked else torch.ones(3, 5, dtype=torch.bool)
    routing = each(x, valid_mask=valid if masked else None)
    rows = [each(row[None]) for row in x[valid]]
    weights = torch.cat([row.weights for row in rows]).detach()
    p = torch.cat([row.logits for row in rows]).softmax(-1).detach()
    entropy = torch.cat([row.entropy for row in rows]).mean().detach()
    balance = E * (weights.mean(0) * p.mean(0)).sum()
    assert_close(routing.losses["routing_entropy"], entropy)
    assert_close(routing.losses["soft_balance"], balance)
    assert_close(routing.aux_loss.detach(), 1e-2 * entropy + 1e-3 * balance)


def test_losses_that_do_not_fit_say_so():
    top_k = tr.TopKRouter(H, E, 2, losses=[tr.losses.ZLoss(1.0)])(inputs(3))
    with pytest.raises(ValueError, match="RoutingEntropyLoss: expected a routing with entropy"):
        tr.losses.RoutingEntropyLoss(1.0)(top_k)
    with pytest.raises(ValueError, match="SoftBalanceLoss: expected a routing with a weight for"):
        tr.losses.SoftBalanceLoss(1.0)(top_k)
