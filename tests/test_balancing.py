"""Loss-free balancing: the bias, and counts in every mode in which a model is trained."""

import copy
import itertools
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import torch_routers as tr
from test_delivery import BATCHES, CHECKPOINTS, compiled
from test_delivery import model as delivery_model

E = 4


def with_bias():
    return tr.TopKRouter(8, E, 2, score="sigmoid", selection_bias=True)


model = partial(delivery_model, router=with_bias)


def routers(model):
    return [block.moe.router for block in model[1:]]


def counts_of(batches):
    m = model()
    with tr.collect(m) as routings:
        for x in batches:
            m(x)
    counts = torch.stack([routing.counts for routing in routings])
    return counts.view(2, len(batches), E).sum(1)  # router by router


def expected_bias(counts, rate=1e-3):
    excess = counts * E - counts.sum(-1, keepdim=True)
    return -rate * excess.sign().float()


@pytest.mark.parametrize("checkpointing", CHECKPOINTS)
@pytest.mark.parametrize("compile", [None, "model", "blocks"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_tokens_are_counted_once_in_every_mode(checkpointing, compile, micro_batches):
    m, batches = model(checkpointing), BATCHES[:micro_batches]
    tr.BalanceController(m)
    forward = compiled(m, compile)
    for x in batches:
        forward(x).square().mean().backward()
    loads = torch.stack([router._load for router in routers(m)])
    assert torch.equal(loads, counts_of(batches))


@pytest.mark.parametrize(
    "checkpointing, compile", [*itertools.product(CHECKPOINTS, [None, "model"])]
)
def test_tokens_are_counted_once_when_all_forwards_come_first(checkpointing, compile):
    m = model(checkpointing)
    tr.BalanceController(m)
    forward = compiled(m, compile)
    losses = [forward(x).square().mean() for x in BATCHES]
    for loss in losses:
        loss.backward()
    loads = torch.stack([router._load for router in routers(m)])
    assert torch.equal(loads, counts_of(BATCHES))


def test_tokens_are_counted_with_inductor():
    m = model()
    tr.BalanceController(m)
    forward = compiled(m, "model", "inductor")
    for x in BATCHES:
        forward(x).square().mean().backward()
    assert torch.equal(torch.stack([r._load for r in routers(m)]), counts_of(BATCHES))


def test_a_second_backward_counts_nothing():
    m = model()
    tr.BalanceController(m)
    loss = m(BATCHES[0]).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(torch.stack([r._load for r in routers(m)]), counts_of(BATCHES[:1]))


def test_neither_eval_nor_padding_is_counted():
    m = model()
    tr.BalanceController(m)
    m.eval()(BATCHES[0].clone().requires_grad_()).sum().backward()
    assert all(int(router._load.sum()) == 0 for router in routers(m))
    router = routers(m.train())[0]
    mask = torch.arange(10).view(2, 5) % 3 > 0
    router(BATCHES[0], valid_mask=mask).weights.sum().backward()
    assert router._load.sum() == 2 * mask.sum()


def test_a_step_moves_the_bias_against_the_load():
    m = model()
    controller, counts = tr.BalanceController(m, 0.01), counts_of(BATCHES[:1])
    m(BATCHES[0]).sum().backward()
    controller.step()
    biases = torch.stack([router.expert_bias for router in routers(m)])
    assert torch.equal(biases, expected_bias(counts, 0.01)) and biases.any()
    assert all(not router._load.any() for router in routers(m))
    controller.step()  # of no tokens
    assert torch.equal(torch.stack([r.expert_bias for r in routers(m)]), biases)


def test_a_proportional_step_and_recentring():
    m = model()
    controller = tr.BalanceController(m, 0.5, update="proportional", recenter=True)
    counts = counts_of(BATCHES[:1]).double()
    m(BATCHES[0]).sum().backward()
    for router in routers(m):
        router.expert_bias += 3
    controller.step()
    for router, c in zip(routers(m), counts):
        torch.testing.assert_close(router.expert_bias.double(), 0.5 * (c.mean() - c))


def test_rates_by_name():
    m = model()
    controller = tr.BalanceController(m, {"1.moe.router": 0.0, "2.moe.router": 1.0})
    m(BATCHES[0]).sum().backward()
    controller.step()
    first, second = routers(m)
    assert not first.expert_bias.any() and second.expert_bias.abs().max() == 1
    controller.remove()
    with pytest.raises(ValueError, match=r"expected rate for each of \['1.moe.router', "):
        tr.BalanceController(m, {"1": 0.1})


def test_balancing_balances():
    """A router that prefers one expert comes to share alike; the weights stay unbiased."""
    torch.manual_seed(0)
    router = tr.TopKRouter(8, E, 1, score="sigmoid", renormalize=False, selection_bias=True)
    router.weight.data[:, 0] = torch.tensor([1.0, 0.2, 0.1, 0.0])
    controller = tr.BalanceController(router, 2e-3)
    x = torch.randn(512, 8)
    x[:, 0] += 2
    before = router(x)
    for _ in range(300):
        router(x).weights.sum().backward()
        controller.step()
    after = router(x)
    assert before.counts.max() > 0.8 * 512 and after.counts.max() < 0.3 * 512
    scores = (x @ router.weight.T).sigmoid()
    torch.testing.assert_close(after.weights, scores.gather(1, after.indices))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_survives_casts(dtype):
    router = tr.TopKRouter(8, E, 2, score="sigmoid", selection_bias=True)
    router.expert_bias += torch.tensor([0.1234567, 1e-3, -5.0, 3e-8])
    bias = router.expert_bias.clone()
    m = nn.Sequential(router).to(dtype)
    assert m[0].weight.dtype == dtype and m[0].expert_bias.dtype == torch.float32
    assert torch.equal(m[0].expert_bias, bias)
    assert m.half().bfloat16().float()[0].expert_bias.equal(bias)
    for assign in False, True:
        other = tr.TopKRouter(8, E, 2, score="sigmoid", selection_bias=True)
        state = {name: x.to(dtype) for name, x in router.state_dict().items()}
        other.load_state_dict(state, assign=assign)
        assert other.expert_bias.dtype == torch.float32
        torch.testing.assert_close(other.expert_bias, bias, rtol=0.01, atol=1e-6)
    with torch.device("meta"):
        router = tr.TopKRouter(8, E, 2, score="sigmoid", selection_bias=True).to(dtype)
    router = router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.expert_bias.dtype == torch.float32 and not router.expert_bias.any()
    assert router(torch.randn(3, 8).to(dtype)).weights.isfinite().all()


def test_counters_are_no_part_of_the_state_and_copies_have_their_own():
    m = model()
    tr.BalanceController(m)
    assert not any("load" in name for name in m.state_dict())
    for other in copy.deepcopy(m[1].moe), pickle.loads(pickle.dumps(m[1].moe)):
        other(BATCHES[0]).sum().backward()
        assert other.router._load.any() and not m[1].moe.router._load.any()


def test_errors():
    with pytest.raises(ValueError, match="BalanceController: expected a model with routers, got"):
        tr.BalanceController(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"got TopKRouter\. Build them with selection_bias=True"):
        tr.BalanceController(tr.TopKRouter(8, E, 2))
    m = model()
    controller = tr.BalanceController(m)
    with pytest.raises(ValueError, match=r"got one that has one\. Call remove"):
        tr.BalanceController(m)
    controller.remove()
    with pytest.raises(ValueError, match=r"expected update among .* got 'x'"):
        tr.BalanceController(m, update="x")


def test_opcheck():
    load, counts = torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    op = torch.ops.torch_routers._add_after.default
    torch.library.opcheck(op, (load, counts, torch.ones(2)))


def test_parameter_groups():
    m = model()
    others, of_routers = tr.parameter_groups(m)
    assert of_routers["weight_decay"] == 0 and len(of_routers["params"]) == 2
    assert len(others["params"]) + 2 == len(list(m.parameters()))
