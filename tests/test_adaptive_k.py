"""AdaptiveKRouter: edges of its steps, thresholds that are calibrated, and what survives a cast."""

import math
import re

import pytest
import torch
from torch import nn

import torch_routers as tr
from torch_routers.routers import calibrate_thresholds


def router_of_logits(**options):
    """A router whose logits are its input."""
    router = tr.AdaptiveKRouter(4, 4, **options)
    nn.init.eye_(router.weight)
    return router


def entropy(p):
    return -(p * p.log()).sum(-1)


def numbers(routing):
    return (routing.indices >= 0).sum(-1)


def test_an_entropy_at_the_threshold_has_reached_it():
    logits = torch.zeros(1, 4, dtype=torch.float64)
    edge = entropy(logits.softmax(-1)).item()
    for threshold, expected in (edge, 3), (math.nextafter(edge, 2), 1), (edge - 1e-9, 3):
        router = router_of_logits(top_ks=(1, 3), thresholds=(threshold,)).double()
        assert numbers(router(logits)).tolist() == [expected]


def test_the_number_does_not_fall_as_the_entropy_grows():
    router = router_of_logits(top_ks=(1, 2, 4), thresholds=(0.6, 1.2))
    x = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    order = entropy(x.softmax(-1)).argsort()
    found = numbers(router(x))[order]
    assert (found.diff() >= 0).all()
    assert found.unique().tolist() == [1, 2, 4]


def test_a_sure_token_gets_few_by_confidence():
    router = router_of_logits(measure="confidence", top_ks=(3, 1), thresholds=(0.8,))
    p = torch.tensor([[0.79, 0.1, 0.1, 0.01], [0.81, 0.1, 0.08, 0.01]])
    routing = router(p.log())
    assert routing.indices.tolist() == [[0, 1, 2], [0, -1, -1]]
    torch.testing.assert_close(routing.weights[0], p[0, :3] / 0.99)
    assert routing.weights[1].tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_thresholds_survive_a_cast(dtype):
    router = tr.AdaptiveKRouter(4, 4, top_ks=(1, 2), thresholds=(1.2345678,))
    before = [x.clone() for x in router._steps]
    router = router.to(dtype).float()
    assert all(map(torch.equal, before, router._steps))
    assert router.thresholds == [1.2345678]


@pytest.mark.parametrize("top_ks", [(1, 2), (1, 2, 4), (2, 4, 8, 3), (4, 2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_calibrated_thresholds_meet_the_mean(top_ks, share):
    measured = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    mean = min(top_ks) + share * (max(top_ks) - min(top_ks))
    thresholds = calibrate_thresholds(measured, top_ks, mean)
    assert thresholds == sorted(thresholds)
    reached = (torch.tensor(thresholds, dtype=torch.float64) <= measured[:, None]).sum(1)
    found = torch.tensor(top_ks)[reached].double().mean()
    assert abs(found - mean) < 2e-3


def test_calibrated_shares_are_the_evenest():
    measured = torch.arange(3000.0)
    assert calibrate_thresholds(measured, (1, 2, 3), 2.0) == [1000, 2000]
    shares = torch.tensor(calibrate_thresholds(measured, (1, 2, 3), 1.5)).diff() / 3000
    assert 0.2 < shares.item() < 0.3  # of 1, .616, .268, .116: a geometric series


def test_a_calibrated_router_has_the_mean():
    x = 3 * torch.randn(2000, 4, generator=torch.Generator().manual_seed(1))
    thresholds = calibrate_thresholds(entropy(x.softmax(-1)), (1, 2, 4), 2.2)
    router = router_of_logits(top_ks=(1, 2, 4), thresholds=thresholds)
    assert abs(numbers(router(x)).double().mean() - 2.2) < 5e-3


@pytest.mark.parametrize(
    ("measured", "mean", "message"),
    [
        (torch.zeros(0), 1.5, "expected measured to be finite numbers, at least one, got 0"),
        (torch.tensor([math.nan]), 1.5, "expected measured to be finite numbers"),
        (torch.ones(3), 2.5, "expected mean_top_k in [1, 2], got 2.5"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(measured, mean, message):
    with pytest.raises(ValueError, match=re.escape(f"calibrate_thresholds: {message}")):
        calibrate_thresholds(measured, (1, 2), mean)
