"""The noisy top-k router: its noise, its load, and what it shares with the top-k router."""

import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torch_routers as tr
from torch_routers.noise import Noise, Stream

T, E, H = 40, 5, 8


def make(losses=(), **options):
    torch.manual_seed(0)
    router = tr.NoisyTopKRouter(H, E, 2, losses=losses, **options)
    with torch.no_grad():
        router.weight.normal_(std=0.5)
        router.noise_weight.normal_(std=0.5)
    return router


def load_losses():
    return [tr.losses.ImportanceLoss(0.1), tr.losses.LoadLoss(0.1)]


def inputs(*leading, dtype=torch.float32, seed=1):
    return torch.randn(*leading, H, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equals_its_formula():
    router, x = make(load_losses()).double(), inputs(T, dtype=torch.float64)
    routing = router(x, seed=3)
    clean = x @ router.weight.T
    sigma = (x @ router.noise_weight.T).exp().log1p() + 0.01
    noisy = clean + sigma * Noise(x, 3).normal(Stream.LOGITS, E)
    assert_close(routing.logits, noisy)
    best = noisy.topk(3, -1)
    assert_close(routing.weights, best.values[:, :2].softmax(-1))
    assert torch.equal(routing.indices, best.indices[:, :2])
    normal, load = torch.distributions.Normal(0, 1), torch.zeros(E, dtype=torch.float64)
    for t in range(T):
        for e in range(E):
            others = torch.cat([noisy[t, :e], noisy[t, e + 1 :]]).sort(descending=True).values
            load[e] += normal.cdf((clean[t, e] - others[1]) / sigma[t, e])
    assert_close(routing.load, load)
    assert_close(routing.losses["load"], load.var(unbiased=False) / load.mean() ** 2)


def test_has_no_noise_in_eval():
    router, x = make(load_losses()).eval(), inputs(T)
    plain = tr.TopKRouter(H, E, 2)
    plain.load_state_dict({"weight": router.weight})
    a, b = router(x), plain(x)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
    assert a.load is None


def test_begins_with_equal_experts_and_noise_that_decides():
    router = tr.NoisyTopKRouter(H, E, 2)
    assert not router.weight.any() and not router.noise_weight.any()
    counts = router(inputs(4000)).counts
    assert_close(counts / counts.sum(), torch.full((E,), 1 / E), rtol=0, atol=0.02)


@pytest.mark.parametrize("loss", [tr.losses.LoadLoss, tr.losses.ImportanceLoss])
def test_a_loss_alone_trains_both_weights(loss):
    router = make([loss(1.0)])
    router(inputs(T)).aux_loss.backward()
    assert router.weight.grad.any() and router.noise_weight.grad.any()


def test_the_load_loss_balances():
    router = make([tr.losses.LoadLoss(1.0)])
    router.weight.data[0] += 2
    x = inputs(256) + 1
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    before = router(x, seed=0)
    for _ in range(100):
        optimizer.zero_grad()
        router(x).aux_loss.backward()
        optimizer.step()
    after = router(x, seed=0)
    assert after.losses["load"] < 0.1 * before.losses["load"]
    assert after.counts.max() < 0.7 * before.counts.max()


def test_padding_changes_nothing():
    valid, results = torch.arange(T) % 3 != 1, []
    for content in 0.0, torch.nan, 1e30:
        router, x = make(load_losses()), inputs(T)
        x[~valid] = content
        routing = router(x, valid_mask=valid, seed=5)
        (routing.weights.square().sum() + routing.aux_loss).backward()
        assert (routing.indices[~valid] == -1).all()
        results.append(
            [routing.weights, routing.load, router.weight.grad, router.noise_weight.grad]
        )
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    compacted = make(load_losses())
    ids = torch.arange(T)[valid]
    routing = compacted(inputs(T)[valid], seed=5, row_ids=ids)
    assert_close(routing.load, results[0][1])
    assert_close(routing.weights, results[0][0][valid])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_noise_again(use_reentrant):
    gradients = []
    for run in (lambda f, x: f(x)), partial(checkpoint, use_reentrant=use_reentrant):
        moe = tr.MoE(make(load_losses()), tr.SwiGLUExperts(E, H, 6))
        torch.manual_seed(2)
        attached = tr.attach(moe)
        attached(run(moe, inputs(T).requires_grad_()).square().sum()).backward()
        gradients.append([moe.router.weight.grad, moe.router.noise_weight.grad])
    assert_close(*gradients, rtol=0, atol=0)


def test_compiles_and_is_described_as_data():
    router, x = make(load_losses(), capacity_factor=1.0), inputs(2, 20)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, seed=1).load, router(x, seed=1).load)
    again = tr.from_config(json.loads(json.dumps(router.config())))
    assert again.config() == router.config() and again.traits == router.traits
    again.load_state_dict(router.state_dict())
    assert torch.equal(again(x, seed=1).indices, router(x, seed=1).indices)


def test_errors():
    with pytest.raises(ValueError, match=r"NoisyTopKRouter: expected min_noise > 0, got 0"):
        make(min_noise=0.0)
    with pytest.raises(ValueError, match=r"NoisyTopKRouter: expected x of shape \[..., hidden_si"):
        make()(torch.zeros(3, H + 1))
    with pytest.raises(ValueError, match=r"NoisyTopKRouter: expected top_k in \[1, num_experts=3"):
        tr.NoisyTopKRouter(H, 3, 4)
