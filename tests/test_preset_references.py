"""Presets with capacities against loops over tokens: Switch, the top-k gate of DeepSpeed, V-MoE.

The loops are written from what the papers and the code of the authors compute, one token and one
expert at a time, so that kept slots, weights, outputs, losses and gradients can be compared.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import torch_routers as tr

T, E, H, SIZE = 40, 8, 16, 12


def best_experts(scores, k):
    """The k experts of the largest scores, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e].item(), e))[:k]


def expert_output(moe, e, x):
    hidden = F.linear(x, moe.experts.up_proj[e])
    hidden = F.relu(hidden) if moe.experts.activation == "relu" else F.gelu(hidden)
    return F.linear(hidden, moe.experts.down_proj[e])


def layer(moe, x, kept, weights):
    """``weights[t][e]`` of the kept pairs; a token without an expert is zero."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for e in range(E):
            if (t, e) in kept:
                y = y + weights[t][e] * expert_output(moe, e, x[t])
        rows.append(y)
    return torch.stack(rows)


# ---- the references: x [tokens, hidden_size] of one group to (y, kept pairs, weights, loss) ------


def switch(moe, x, capacity):
    """Top-1 in order of arrival; the probability is the weight, and the loss is E sum f P."""
    probabilities = (x @ moe.router.weight.T).softmax(-1)
    kept, weights, load, filled = set(), [{} for _ in x], [0] * E, [0] * E
    for t in range(len(x)):
        (e,) = best_experts(probabilities[t], 1)
        load[e] += 1
        if filled[e] < capacity:
            filled[e] += 1
            kept.add((t, e))
            weights[t][e] = probabilities[t, e]
    loss = E * sum(load[e] / len(x) * probabilities[:, e].mean() for e in range(E))
    return layer(moe, x, kept, weights), kept, weights, loss


def deepspeed(moe, x, capacity_factor, min_capacity, rank_by="probability"):
    """Each expert keeps the tokens that want it most; what a token kept is renormalised.

    The code ranks by the logit, in a column where the tokens that did not choose the expert have 0.
    """
    k, logits = moe.router.top_k, x @ moe.router.weight.T
    probabilities = logits.softmax(-1)
    capacity = max(math.ceil(len(x) / E * capacity_factor * k), min_capacity)
    chosen = {(t, e) for t in range(len(x)) for e in best_experts(logits[t], k)}
    kept = set()
    for e in range(E):
        if rank_by == "probability":
            column = {t: probabilities[t, e].item() for t in range(len(x)) if (t, e) in chosen}
        else:
            column = {t: logits[t, e].item() if (t, e) in chosen else 0.0 for t in range(len(x))}
        best = sorted(column, key=lambda t, column=column: -column[t])[:capacity]
        kept |= {(t, e) for t in best if (t, e) in chosen}
    weights = []
    for t in range(len(x)):
        mine = [e for e in range(E) if (t, e) in kept]
        total = sum(probabilities[t, e] for e in mine)
        weights.append({e: probabilities[t, e] / total for e in mine})
    load = [sum((t, e) in chosen for t in range(len(x))) for e in range(E)]
    products = [load[e] / len(x) * probabilities[:, e].mean() for e in range(E)]
    loss = sum(products) / E * E * E / k
    return layer(moe, x, kept, weights), kept, weights, loss


def vmoe(moe, x, capacity, batch_priority=False):
    """All first choices in order of arrival, or of the largest probability; then all second ones.

    Weights are probabilities. The loss is the squared coefficient of variation of their sums.
    """
    k, probabilities = moe.router.top_k, (x @ moe.router.weight.T).softmax(-1)
    order = list(range(len(x)))
    if batch_priority:
        order.sort(key=lambda t: -probabilities[t].max().item())
    kept, weights, filled = set(), [{} for _ in x], [0] * E
    for j in range(k):
        for t in order:
            e = best_experts(probabilities[t], k)[j]
            if filled[e] < capacity:
                filled[e] += 1
                kept.add((t, e))
                weights[t][e] = probabilities[t, e]
    importance = probabilities.sum(0)
    loss = importance.var(correction=0) / importance.mean() ** 2
    return layer(moe, x, kept, weights), kept, weights, loss


# ---- the comparison ------------------------------------------------------------------------------


def build(name, loss, **options):
    torch.manual_seed(1)
    moe = tr.create_moe(name, H, SIZE, num_experts=E, losses=[loss], **options).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5)
    return moe


def compare(moe, x, reference, call=None, share_dropped=(0.05, 0.9), **options):
    """Of every sample of ``x`` by itself; gradients of outputs and losses together."""
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, routing = moe(inputs[0], return_routing=True, **(call or {}))
    parts = [reference(moe, sample, **options) for sample in inputs[1]]
    expected, loss = torch.stack([part[0] for part in parts]), parts[0][3]
    for b, (_, kept, weights, _) in enumerate(parts):
        indices = routing.indices[b]
        assert {(t, int(e)) for t, row in enumerate(indices) for e in row if e >= 0} == kept
        for t, row in enumerate(indices):
            for e, weight in zip(row.tolist(), routing.weights[b, t]):
                assert_close(weight, weights[t][e] if e >= 0 else torch.zeros_like(weight))
    dropped = (routing.indices < 0).double().mean()
    assert share_dropped[0] <= dropped <= share_dropped[1]
    assert_close(y, expected)
    factor = torch.randn(y.shape, dtype=y.dtype)
    objectives = [(y * factor).sum(), (expected * factor).sum()]
    if moe.training:
        assert_close(routing.aux_loss, loss)
        objectives = [objectives[0] + 3 * routing.aux_loss, objectives[1] + 3 * loss]
    gradients = [
        torch.autograd.grad(objective, [of, *moe.parameters()])
        for objective, of in zip(objectives, inputs)
    ]
    for actual, wanted in zip(*gradients):
        assert_close(actual, wanted, rtol=1e-10, atol=1e-12)


def tokens(samples, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, T, H, dtype=torch.float64, generator=generator)
    return x + 0.3  # towards some experts


LOAD_BALANCE = tr.losses.LoadBalanceLoss


@pytest.mark.parametrize("capacity", [1, 3, 6])
def test_switch_drops_in_order_of_arrival(capacity):
    moe = build("switch", LOAD_BALANCE(1.0, "switch"), capacity=capacity, jitter=0.0)
    compare(moe, tokens(1), switch, capacity=capacity)
    moe.eval()  # the capacity stays, per sequence
    compare(moe, tokens(3), switch, capacity=capacity)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity_factor, min_capacity", [(1.0, 1), (0.6, 0), (0.1, 4)])
def test_deepspeed_keeps_the_most_probable(top_k, capacity_factor, min_capacity):
    options = {"capacity_factor": capacity_factor, "min_capacity": min_capacity}
    loss = LOAD_BALANCE(1.0, "deepspeed")
    moe = build("deepspeed_topk", loss, jitter=0.0, top_k=top_k, **options)
    compare(moe, tokens(1), deepspeed, **options)


def test_deepspeed_ranks_by_logits_which_is_the_same_where_they_are_normalised():
    """Logits are log-probabilities and 20: order like probabilities, and none below 0."""
    options = {"capacity_factor": 1.0, "min_capacity": 1}
    moe = build("deepspeed_topk", LOAD_BALANCE(1.0, "deepspeed"), jitter=0.0, **options)
    torch.nn.init.eye_(moe.router.weight)
    x = tokens(1)
    x[..., :E] = x[..., :E].log_softmax(-1) + 20
    compare(moe, x, deepspeed, rank_by="logit", **options)


def test_vmoe_fills_experts_with_first_choices_first():
    moe = build("vmoe", tr.losses.ImportanceLoss(1.0), noise_scale=0.0)
    compare(moe, tokens(1), vmoe, call={"capacity": 7}, capacity=7)
    moe = build("vmoe", tr.losses.ImportanceLoss(1.0)).eval()  # where noise is off
    compare(moe, tokens(3), vmoe, call={"capacity": 7}, capacity=7)
    compare(moe, tokens(3), vmoe, capacity=T, share_dropped=(0, 0))  # dropless by default


@pytest.mark.parametrize("top_k, capacity", [(1, 3), (2, 7), (3, 5)])
def test_batch_priority_of_vmoe(top_k, capacity):
    options = {"top_k": top_k, "drop_policy": "batch_priority"}
    moe = build("vmoe", tr.losses.ImportanceLoss(1.0), noise_scale=0.0, **options)
    call = {"capacity": capacity}
    compare(moe, tokens(1), vmoe, call=call, capacity=capacity, batch_priority=True)
    compare(moe.eval(), tokens(3), vmoe, call=call, capacity=capacity, batch_priority=True)
    by_token = build("vmoe", tr.losses.ImportanceLoss(1.0), top_k=top_k, drop_policy="priority")
    routings = [layer.eval().router(tokens(3), **call) for layer in (moe, by_token)]
    assert torch.equal(*(routing.indices for routing in routings)) == (top_k == 1)
